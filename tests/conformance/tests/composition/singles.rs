//! Functions that belong to no group, saved at any moment and put into another machine with the same memory: what is saved
//! there is the same, and every request comes back once, with what was meant for it.

use std::io::{PipeReader, Write};
use std::time::{Duration, Instant};

use conformance::enable_msix;
use devices::block::{Block, BlockConfig};
use devices::console::Console;
use devices::gate::{Patience, Reasons};
use devices::net::{MacAddress, Net, PortConfig, Switch};
use devices::rng::Rng;
use devices::virtio::{Doors, VirtioDevice};
use driver::access::{Dma, DmaExt, FunctionExt};
use driver::host::{HostDma, HostFunction, Loopback, Machine, Place, Plugged, Shape, Storage};
use driver::pci::{change_command, command, header};
use driver::virtio::{Buffer, SplitQueue, Transport, feature};
use proptest::prelude::*;

use crate::world::{Check, same};

/// How long what a disk's thread does may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of one queue that can be outstanding.
const MOST: usize = 4;
/// Bytes of a request's buffers.
const ROOM: u32 = 2048;
const SECTORS: usize = 64;

/// The functions of the machine.
const LOOPBACK: usize = 0;
const BLOCK: usize = 1;
const CONSOLE: usize = 2;
const RNG: usize = 3;
/// Two, on one switch.
const NETS: [usize; 2] = [4, 5];
const FUNCTIONS: usize = 6;

#[derive(Clone, Debug)]
enum Step {
    /// The driver of a function makes a request available, and notifies the device or forgets to.
    Submit(usize, usize, bool),
    /// A driver takes back what was used.
    Take(usize),
    /// Something comes in at the console.
    Type(usize),
    /// The loopback device changes its configuration.
    ChangeConfig(u8),
    /// Storage answers no more, or again.
    Block(bool),
    BusMaster(usize, bool),
    /// A driver resets its function, and sets it up as far as this.
    Init(usize, u8),
    Work,
    Snapshot,
}

fn step() -> impl Strategy<Value = Step> {
    let function = || 0..FUNCTIONS;
    prop_oneof![
        12 => (function(), 0..2usize, any::<bool>()).prop_map(|(f, q, n)| Step::Submit(f, q, n)),
        2 => function().prop_map(Step::Take),
        2 => (1..60usize).prop_map(Step::Type),
        1 => any::<u8>().prop_map(Step::ChangeConfig),
        2 => any::<bool>().prop_map(Step::Block),
        2 => (function(), any::<bool>()).prop_map(|(f, on)| Step::BusMaster(f, on)),
        1 => (function(), 0..4u8).prop_map(|(f, how)| Step::Init(f, how)),
        6 => Just(Step::Work),
        3 => Just(Step::Snapshot),
    ]
}

/// What is behind the devices, and goes on with the VM.
struct Backends {
    loopback: Vec<driver::host::Controls>,
    storage: Storage,
    keyboard: std::io::PipeWriter,
    input: PipeReader,
    /// Everything that was typed.
    typed: Vec<u8>,
    blocked: bool,
}

impl Backends {
    fn new() -> Self {
        let (input, keyboard) = std::io::pipe().unwrap();
        Self {
            loopback: Vec::new(),
            storage: Storage::new((0..512 * SECTORS).map(|at| (at / 512) as u8).collect()),
            keyboard,
            input,
            typed: Vec::new(),
            blocked: false,
        }
    }

    /// New devices in front of them, in the order of the functions.
    fn devices(&mut self) -> Vec<Box<dyn VirtioDevice>> {
        let (loopback, controls) = Loopback::new(Shape::default()).unwrap();
        self.loopback = vec![controls];
        let config = BlockConfig::new("memory");
        let disk = Block::with_backend(self.storage.backend(), &config).unwrap();
        let input = self.input.try_clone().unwrap();
        let console = Console::new(Some(input.into()), Box::new(std::io::sink())).unwrap();
        let switch = Switch::new();
        let net = |last: u8| {
            let mac = MacAddress::new([2, 0, 0, 0, 0, last]);
            let port = PortConfig {
                name: last.to_string(),
                mac,
                check_source: false,
            };
            Net::new(mac, switch.port(port).unwrap())
        };
        vec![
            loopback,
            Box::new(disk),
            Box::new(console),
            Box::new(Rng::new()),
            Box::new(net(1)),
            Box::new(net(2)),
        ]
    }
}

/// A driver of one function.
struct Seat {
    plugged: Plugged,
    transport: Transport<HostFunction>,
    queues: Vec<SplitQueue<HostDma>>,
    /// Where the answers to requests are written, by queue and head.
    answers: Vec<std::collections::HashMap<u16, u64>>,
    live: bool,
}

struct World {
    machine: Machine,
    backends: Backends,
    seats: Vec<Seat>,
    event_index: bool,
    /// What the driver of the console received.
    received: Vec<u8>,
    /// A reset of the console loses input.
    lossy: bool,
}

fn plug(machine: &Machine, backends: &mut Backends) -> Vec<Plugged> {
    let devices = backends.devices().into_iter();
    let plugged = devices.map(|device| {
        let none = Doors::default();
        let added = machine.add_offering("function", device, Place::RootBus, none);
        added.unwrap()
    });
    let plugged = plugged.collect();
    machine.power_on().unwrap();
    plugged
}

fn transport(machine: &Machine, plugged: &Plugged) -> Transport<HostFunction> {
    let function = machine.function(machine.locate(plugged));
    change_command(&function, command::MEMORY, 0);
    Transport::new(function).unwrap()
}

impl World {
    fn new(event_index: bool) -> Self {
        let machine = Machine::new().unwrap();
        let mut backends = Backends::new();
        let plugged = plug(&machine, &mut backends);
        let seats = plugged.into_iter().map(|plugged| Seat {
            transport: transport(&machine, &plugged),
            plugged,
            queues: Vec::new(),
            answers: Vec::new(),
            live: false,
        });
        let mut world = Self {
            seats: seats.collect(),
            machine,
            backends,
            event_index,
            received: Vec::new(),
            lossy: false,
        };
        (0..FUNCTIONS).for_each(|function| world.init(function, 3));
        world
    }

    /// Resets a function and sets it up: as far as FEATURES_OK, enabled queues, or DRIVER_OK.
    fn init(&mut self, function: usize, how: u8) {
        let seat = &mut self.seats[function];
        change_command(seat.transport.function(), command::BUS_MASTER, 0);
        if function == BLOCK {
            // A reset waits for what storage has begun.
            self.backends.storage.unblock();
            self.backends.blocked = false;
        }
        self.lossy |= function == CONSOLE;
        seat.live = how == 3;
        seat.answers.clear();
        seat.queues.clear();
        if how == 0 {
            seat.transport.reset().unwrap();
            return;
        }
        let wanted = if self.event_index {
            feature::EVENT_IDX
        } else {
            0
        };
        seat.transport.negotiate(wanted | 1 << 9).unwrap();
        enable_msix(&seat.transport);
        seat.transport.set_config_vector(0).unwrap();
        let count = seat.plugged.function.num_queues();
        for index in 0..count.min(if how > 1 { 2 } else { 0 }) {
            let size = seat.transport.queue_size(index);
            let dma = self.machine.dma().clone();
            let queue = SplitQueue::new(dma, size.min(32), self.event_index).unwrap();
            let layout = queue.layout();
            seat.transport
                .enable_queue(index, layout, 1 + index)
                .unwrap();
            seat.queues.push(queue);
            seat.answers.push(std::collections::HashMap::new());
        }
        if seat.live {
            seat.transport.start();
        }
    }

    /// A request to a function that its driver has set up.
    fn submit(&mut self, function: usize, index: usize, notify: bool) {
        let dma = self.machine.dma().clone();
        let seat = &mut self.seats[function];
        let Some(queue) = seat.queues.get_mut(index) else {
            return;
        };
        if queue.in_flight() >= MOST {
            return;
        }
        let to = dma.allocate(ROOM as usize, 16).unwrap();
        let receives = (function == CONSOLE || NETS.contains(&function)) && index == 0;
        let out = match function {
            RNG => Vec::new(),
            _ if receives => Vec::new(),
            // A read.
            BLOCK => [[0; 8], 5u64.to_le_bytes()].concat(),
            // To the other one.
            4 | 5 => frame(1 + (5 - function) as u8),
            _ => (0..40).collect(),
        };
        let mut chain = Vec::new();
        if !out.is_empty() {
            let from = dma.place(&out).unwrap();
            chain.push(Buffer::readable(from, out.len() as u32));
        }
        match function {
            BLOCK => chain.push(Buffer::writable(to, 512 + 1)),
            CONSOLE if receives => chain.push(Buffer::writable(to, 9)),
            CONSOLE | 4 | 5 if !receives => {}
            _ => chain.push(Buffer::writable(to, ROOM)),
        }
        let head = queue.add(&chain).unwrap();
        seat.answers[index].insert(head, to);
        if queue.publish() && notify {
            seat.transport.notify(index as u16);
        }
    }

    /// Takes back what was used, each once, and looks at it.
    fn take(&mut self, function: usize) -> Check {
        let seat = &mut self.seats[function];
        for (index, queue) in seat.queues.iter_mut().enumerate() {
            while let Some(used) = queue.take().map_err(|error| error.to_string())? {
                let to = seat.answers[index].remove(&used.head).unwrap();
                let bytes = self.machine.dma().bytes(to, used.len as usize);
                match function {
                    LOOPBACK => same!(bytes, (0..40).collect::<Vec<u8>>(), "an echo"),
                    BLOCK => same!(bytes, [vec![5; 512], vec![0]].concat(), "a sector"),
                    CONSOLE if index == 0 => self.received.extend(bytes),
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn apply(&mut self, step: &Step) -> Check {
        match *step {
            Step::Submit(function, queue, notify) => self.submit(function, queue, notify),
            Step::Take(function) => self.take(function)?,
            Step::Type(len) => {
                let from = self.backends.typed.len();
                let text: Vec<_> = (from..from + len).map(|at| at as u8).collect();
                self.backends.keyboard.write_all(&text).unwrap();
                self.backends.typed.extend(text);
            }
            Step::ChangeConfig(byte) => self.backends.loopback[0].change_config(vec![byte; 16]),
            Step::Block(blocked) => {
                self.backends.blocked = blocked;
                match blocked {
                    true => self.backends.storage.block(),
                    false => self.backends.storage.unblock(),
                }
            }
            // A write that takes it away waits for what storage has begun.
            Step::BusMaster(BLOCK, false) if self.backends.blocked => {}
            Step::BusMaster(function, on) => {
                let bit = command::BUS_MASTER;
                let (set, clear) = if on { (bit, 0) } else { (0, bit) };
                change_command(self.seats[function].transport.function(), set, clear);
            }
            Step::Init(function, how) => {
                self.take(function)?;
                self.init(function, how);
            }
            Step::Work => {
                self.machine.settle();
            }
            Step::Snapshot => self.snapshot()?,
        }
        Ok(())
    }

    fn snapshot(&mut self) -> Check {
        // What a device has not been told yet is its backend's, and not saved.
        self.machine.settle();
        for seat in &self.seats {
            seat.plugged.function.close(Reasons::PAUSED);
        }
        for seat in &self.seats {
            seat.plugged.function.recall();
        }
        self.backends.storage.unblock();
        let deadline = Instant::now() + PATIENCE;
        for seat in &self.seats {
            let function = &seat.plugged.function;
            while !function.stop(Reasons::PAUSED, Patience::prompt(Duration::ZERO)) {
                self.machine.settle();
                same!(Instant::now() < deadline, true, "it stands still");
            }
        }
        let save = |plugged: &Plugged| {
            let function = &plugged.function;
            (function.save(), function.save_transient().unwrap())
        };
        let saved: Vec<_> = self.seats.iter().map(|seat| save(&seat.plugged)).collect();
        let dma = self.machine.dma();
        let memory = dma.bytes(0, driver::host::RAM);

        let machine = Machine::with_memory(dma.clone()).unwrap();
        let plugged = plug(&machine, &mut self.backends);
        let seats = self.seats.iter_mut().zip(plugged).zip(&saved);
        for ((seat, plugged), (state, transient)) in seats {
            let commands: u16 = seat.transport.function().config(header::COMMAND);
            let function = &plugged.function;
            function.close(Reasons::PAUSED);
            let new = transport(&machine, &plugged);
            enable_msix(&new);
            new.function().set_config(header::COMMAND, commands);
            function
                .restore_exact(state, transient)
                .map_err(|error| error.to_string())?;
            same!(
                &save(&plugged),
                &(state.clone(), transient.clone()),
                "what is saved again"
            );
            seat.transport = new;
            seat.plugged = plugged;
        }
        machine.settle();
        for (seat, saved) in self.seats.iter().zip(&saved) {
            same!(&save(&seat.plugged), saved, "what is saved while paused");
        }
        let unchanged = machine.dma().bytes(0, driver::host::RAM) == memory;
        same!(unchanged, true, "memory is as it was");
        self.machine = machine;
        if self.backends.blocked {
            self.backends.storage.block();
        }
        for seat in &self.seats {
            seat.plugged.function.reopen(Reasons::PAUSED);
        }
        Ok(())
    }

    /// Nothing holds anybody up any more: everything that was asked for comes back.
    fn finish(mut self) -> Check {
        self.apply(&Step::Block(false))?;
        for function in 0..FUNCTIONS {
            self.apply(&Step::BusMaster(function, true))?;
            if !self.seats[function].live {
                self.seats[function].queues.clear();
            }
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            for function in 0..FUNCTIONS {
                self.take(function)?;
                // Notified or not before, it is now.
                let seat = &self.seats[function];
                for index in 0..seat.queues.len() {
                    seat.transport.notify(index as u16);
                }
            }
            // Whoever waits to receive gets something.
            self.apply(&Step::Type(1))?;
            for function in NETS {
                let waits = self.seats[function].queues.first();
                if waits.is_some_and(|queue| queue.in_flight() > 0) {
                    let from = NETS[0] + NETS[1] - function;
                    if !self.seats[from].live {
                        self.seats[function].queues.clear();
                    }
                    self.submit(from, 1, true);
                }
            }
            self.machine.settle();
            let queues = self.seats.iter().flat_map(|seat| &seat.queues);
            let left: usize = queues.map(SplitQueue::in_flight).sum();
            if left == 0 {
                break;
            }
            let counts = self.seats.iter().map(|seat| {
                let queues = seat.queues.iter();
                queues.map(SplitQueue::in_flight).collect::<Vec<_>>()
            });
            let counts: Vec<_> = counts.collect();
            same!(Instant::now() < deadline, true, "outstanding: {counts:?}");
        }
        if !self.lossy {
            let expected = self.backends.typed.get(..self.received.len());
            same!(Some(&self.received[..]), expected, "what was typed");
        }
        Ok(())
    }
}

/// A frame of 60 bytes to the function whose address ends in `to`, behind its header.
fn frame(to: u8) -> Vec<u8> {
    let mut frame = vec![0; 12 + 60];
    frame[12..18].copy_from_slice(&[2, 0, 0, 0, 0, to]);
    frame[18..24].copy_from_slice(&[2, 0, 0, 0, 0, 3 - to]);
    frame
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// A disk whose storage holds requests, two functions on a switch, a console, an entropy source and a loopback device.
    #[test]
    fn functions_go_on_in_another_machine_as_they_were(
        event_index: bool,
        steps in prop::collection::vec(step(), 1..80),
    ) {
        let mut world = World::new(event_index);
        world.lossy = false;
        for (index, step) in steps.iter().chain([&Step::Snapshot]).enumerate() {
            let done = world.apply(step);
            prop_assert_eq!(done, Ok(()), "step {}, {:?}", index, step);
        }
        prop_assert_eq!(world.finish(), Ok(()));
    }
}
