//! Functions and machines to fuzz.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use devices::block::{Backend, Block, BlockConfig};
use devices::console::Console;
use devices::gate::{Patience, Reasons};
use devices::memory::{GuestRead, GuestWrite};
use devices::net::{MacAddress, Net, PortConfig, Switch};
use devices::rng::Rng;
use devices::virtio::{Cause, Doors, Interrupt, NO_VECTOR, Offer, VirtioDevice, VirtioFunction};
use driver::access::{DmaExt, Function};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Place, Pump, Shape};
use driver::pci::{Address, change_command, command};
use driver::virtio::{Buffer, SplitQueue, Transport, feature, status};
use pci::root::Doorbell;

/// How long anything may take that a thread of its own does.
const PATIENCE: Duration = Duration::from_secs(10);

/// Interrupts that nobody hears: what a transport keeps of them.
#[derive(Default)]
struct Vectors(Mutex<HashMap<Cause, u16>>);

impl Vectors {
    fn lock(&self) -> MutexGuard<'_, HashMap<Cause, u16>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupt for Vectors {
    fn signal(&self, _cause: Cause) {}

    fn deliver_pending(&self) {}

    fn reset(&self) {
        self.lock().clear();
    }

    fn reset_queue(&self, queue: u16) {
        self.lock().remove(&Cause::Queue(queue));
    }

    fn vectors(&self) -> u16 {
        NO_VECTOR
    }

    fn vector(&self, cause: Cause) -> u16 {
        self.lock().get(&cause).copied().unwrap_or(NO_VECTOR)
    }

    fn assign(&self, config: u16, queues: &mut dyn Iterator<Item = u16>) {
        let queues = (0..).map(Cause::Queue).zip(queues);
        *self.lock() = queues.chain([(Cause::Config, config)]).collect();
    }
}

/// A function without a bus.
pub struct Rig {
    pub function: Arc<VirtioFunction>,
    pump: Pump,
}

impl Rig {
    pub fn new(device: Box<dyn VirtioDevice>, dma: &HostDma) -> Self {
        // Drivers choose whether they take packed rings.
        let (doors, packed) = (Doors::default(), true);
        Self::offering(device, dma, Offer { doors, packed })
    }

    pub fn offering(device: Box<dyn VirtioDevice>, dma: &HostDma, offer: impl Into<Offer>) -> Self {
        let view = dma.ram().view().expect("view");
        let function = VirtioFunction::offering("fuzz", device, view, offer).expect("events");
        function.set_interrupt(Arc::new(Vectors::default()));
        let pump = Pump::new(Arc::clone(&function)).expect("epoll");
        Self { function, pump }
    }

    /// A function with device number `kind`, whatever number it is.
    pub fn any(kind: u8, dma: &HostDma) -> Self {
        let device: Box<dyn VirtioDevice> = match kind % 5 {
            0 => loopback(Shape::default()).0,
            1 => block(64),
            2 => Box::new(net(&Switch::new(), 1)),
            3 => Box::new(Rng::new()),
            _ => Box::new(Console::new(None, Box::new(io::sink())).expect("console")),
        };
        Self::new(device, dma)
    }

    /// Lets the function work until it is idle; one that never is spins for ever.
    pub fn settle(&self) {
        assert!(self.pump.rest(4096), "the device never rests");
    }

    /// Lets the function work until it is idle and holds nothing.
    pub fn drain(&self) {
        let deadline = Instant::now() + PATIENCE;
        self.settle();
        while !self
            .function
            .stop(Reasons::PAUSED, Patience::complete(Duration::ZERO))
        {
            assert!(Instant::now() < deadline, "the device keeps a chain");
            std::thread::sleep(Duration::from_micros(20));
            self.settle();
        }
        self.function.reopen(Reasons::PAUSED);
        self.settle();
    }
}

pub fn loopback(shape: Shape) -> (Box<Loopback>, Controls) {
    Loopback::new(shape).expect("event")
}

/// A network device on `switch`, with an address that ends in `last`.
pub fn net(switch: &Switch, last: u8) -> Net {
    let mac = MacAddress::new([2, 0, 0, 0, 0, last]);
    let config = PortConfig {
        name: last.to_string(),
        mac,
        check_source: false,
    };
    Net::new(mac, switch.port(config).expect("port"))
}

/// A disk of so many sectors, in memory.
pub fn block(sectors: usize) -> Box<Block> {
    let mut config = BlockConfig::new("memory");
    config.queues = 2;
    let disk = Disk(Mutex::new(vec![0; 512 * sectors]), 512 * sectors as u64);
    Box::new(Block::with_backend(Arc::new(disk), &config).expect("disk"))
}

/// Contents, and their length.
struct Disk(Mutex<Vec<u8>>, u64);

impl Disk {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Backend for Disk {
    fn len(&self) -> u64 {
        self.1
    }

    fn read(&self, offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        let bytes = self.bytes();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from(&bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &[GuestRead<'_>]) -> io::Result<()> {
        let mut bytes = self.bytes();
        let mut at = offset as usize;
        for buffer in buffers {
            let len = buffer.len();
            assert_eq!(buffer.copy_to(&mut bytes[at..at + len]), len);
            at += len;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.bytes()[offset as usize..(offset + len) as usize].fill(0);
        Ok(())
    }
}

/// A machine with one loopback device on the root bus and one behind a port.
pub struct Board {
    pub machine: Machine,
    pub functions: [HostFunction; 2],
}

impl Board {
    pub fn new() -> Self {
        let machine = Machine::new().expect("machine");
        let plugged = [Place::RootBus, Place::BehindPort].map(|place| {
            let (device, _) = loopback(Shape::default());
            machine.add("fuzz", device, place).expect("place")
        });
        machine.power_on().expect("addresses");
        let functions = plugged.map(|p| machine.function(machine.locate(&p)));
        for function in &functions {
            change_command(function, command::MEMORY | command::BUS_MASTER, 0);
        }
        Self { machine, functions }
    }

    /// The root port.
    pub fn port(&self) -> HostFunction {
        self.machine.function(Address::new(0, 2, 0))
    }

    pub fn settle(&self) {
        assert!(self.machine.settle(), "a device never rests");
    }

    /// See [`check_doorbells`].
    pub fn check_doorbells(&self) {
        check_doorbells(&self.machine);
    }

    /// See [`check_interrupts`].
    pub fn check_interrupts(&self) {
        check_interrupts(&self.machine);
    }
}

/// The doorbells that are registered are the ones that should be.
pub fn check_doorbells(machine: &Machine) {
    let addresses =
        |list: Vec<Doorbell>| -> BTreeSet<u64> { list.iter().map(|d| d.address).collect() };
    let registered = addresses(machine.registered_doorbells());
    let due = addresses(machine.root().doorbells());
    assert_eq!(registered, due, "a layout change was not reported");
}

/// Every interrupt so far went somewhere.
pub fn check_interrupts(machine: &Machine) {
    for delivery in machine.msi().take() {
        assert!(delivery.message.is_some(), "no route: {delivery:?}");
    }
}

/// Starts the device behind `function` from reset and has it echo: whatever happened to it before, it works again.
pub fn assert_works(machine: &Machine, function: impl Function) {
    let transport = Transport::new(function).expect("capabilities");
    transport.negotiate(feature::EVENT_IDX).expect("features");
    let dma = machine.dma();
    let mut queue = SplitQueue::new(dma.clone(), 8, true).expect("memory");
    transport
        .enable_queue(1, queue.layout(), 0xffff)
        .expect("queue");
    transport.start();
    let bytes = b"still alive";
    let len = bytes.len() as u32;
    let to = dma.place(&[0; 11]).expect("memory");
    let from = dma.place(bytes).expect("memory");
    queue
        .add(&[Buffer::readable(from, len), Buffer::writable(to, len)])
        .expect("room");
    if queue.publish() {
        transport.notify(1);
    }
    assert!(machine.settle(), "a device never rests");
    let used = queue.take().expect("a used ring by the rules");
    assert_eq!(used.map(|u| u.len), Some(len));
    assert_eq!(dma.bytes(to, 11), bytes);
    assert_eq!(transport.status() & status::NEEDS_RESET, 0);
}
