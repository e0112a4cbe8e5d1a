//! Drivers in user space that stop a virtual function under I/O, or have it stopped, and let it go on: one of a member's disk,
//! and one of the owner.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::thread;
use std::time::Duration;

use driver::access::{Dma, DmaExt, FunctionExt, Region, Register, Word};
use driver::pci::{change_command, command as pci_command};
use driver::virtio::admin::{AdminQueue, Shape, command, group, opcode, outcome};
use driver::virtio::block::request::{OUT, WRITE_ZEROES};
use driver::virtio::migration::mode;
use driver::virtio::migration::opcode as migration;
use driver::virtio::{Buffer, SplitQueue, Transport, common, feature, status};

use super::super::console;
use super::{Function, Owner};
use crate::pattern::{self, CHUNK};
use crate::user::function::SysfsFunction;
use crate::user::memory::Pages;
use crate::{Context, Failure, Result, check};

/// The driver that does nothing but let virtual functions be enabled.
const STUB: &str = "pci-pf-stub";
/// Requests of a page each that are begun at once.
pub const BURST: usize = 8;
const PAGE: usize = 4096;
const SECTORS: u64 = PAGE as u64 / 512;
/// Of what is written.
pub const SEED: u64 = 11;
/// How long a device may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing is to happen.
const PAUSE: Duration = Duration::from_millis(20);

/// The structure that stops single virtqueues, and its registers.
const DEVICE_STATE: u8 = 10;
const STATE_QUEUE: Register<u16> = Register::at(0);
const STATE_NEXT: Register<u16> = Register::at(2);
const STATE_RUNS: Register<u8> = Register::at(4);
/// Bytes of a context per command, so that it takes several.
const PIECE: usize = 64;

/// How the virtual function is stopped.
pub enum Way {
    /// SUSPEND, with DRIVER_OK set all the time.
    SuspendV5,
    /// SUSPEND of virtio 1.4.
    SuspendV14,
    /// DEVICE_STOPPED.
    DeviceStop,
    /// The queue, by the device-state capability.
    Queue,
    /// Mode Stop, by its owner.
    Stop,
    /// Mode Freeze, by its owner.
    Freeze,
}

impl Way {
    pub fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "suspend-v5" => Self::SuspendV5,
            "suspend-v1.4" => Self::SuspendV14,
            "device-stop" => Self::DeviceStop,
            "queue" => Self::Queue,
            "stop" => Self::Stop,
            "freeze" => Self::Freeze,
            other => {
                return Err(Failure(format!("way={other} is none")));
            }
        })
    }

    /// The owner's driver is needed.
    pub fn is_of_owner(&self) -> bool {
        matches!(self, Self::Stop | Self::Freeze)
    }

    /// The feature it takes.
    pub fn feature(&self) -> u64 {
        match self {
            Self::SuspendV5 => 1 << 42,
            Self::SuspendV14 => 1 << 43,
            Self::DeviceStop => 1 << 44,
            Self::Queue | Self::Stop | Self::Freeze => 0,
        }
    }

    /// Stops, and waits until that is acknowledged.
    pub fn stop(&self, load: &Load, mut owner: Option<&mut OwnerDriver>) -> Result<()> {
        match self {
            Self::SuspendV5 | Self::SuspendV14 => load.change_status(status::SUSPEND, 0),
            Self::DeviceStop => load.change_status(status::DEVICE_STOPPED, 0),
            Self::Queue => load.run_queue(0)?,
            Self::Stop => driver(owner.as_deref_mut())?.set_mode(load.member, mode::STOP)?,
            Self::Freeze => driver(owner.as_deref_mut())?.set_mode(load.member, mode::FREEZE)?,
        }
        self.expect_stopped(load, owner)
    }

    /// Fails unless it is stopped, and says so.
    pub fn expect_stopped(&self, load: &Load, owner: Option<&mut OwnerDriver>) -> Result<()> {
        let both = status::SUSPEND | status::DRIVER_OK;
        let stopped = status::DEVICE_STOPPED;
        match self {
            Self::SuspendV5 => load.await_status(both, both),
            Self::SuspendV14 => load.await_status(both, status::SUSPEND),
            Self::DeviceStop => load.await_status(stopped, stopped),
            Self::Queue => {
                let next = load.state(STATE_NEXT)?;
                let used = load.used();
                check(load.state(STATE_RUNS)? == 0 && next == used, || {
                    format!("last_avail_idx is {next}, and {used} chains were used")
                })
            }
            Self::Stop => driver(owner)?.expect_mode(load.member, mode::STOP),
            Self::Freeze => driver(owner)?.expect_mode(load.member, mode::FREEZE),
        }
    }

    /// Lets it go on.
    pub fn resume(&self, load: &Load, owner: Option<&mut OwnerDriver>) -> Result<()> {
        let (suspend, ok) = (status::SUSPEND, status::DRIVER_OK);
        match self {
            Self::SuspendV5 => {
                load.change_status(0, suspend);
                load.await_status(suspend | ok, ok)
            }
            Self::SuspendV14 => {
                load.change_status(ok, suspend);
                load.await_status(suspend | ok, ok)
            }
            Self::DeviceStop => {
                load.change_status(0, status::DEVICE_STOPPED);
                load.await_status(status::DEVICE_STOPPED, 0)
            }
            Self::Queue => load.run_queue(1),
            Self::Stop | Self::Freeze => driver(owner)?.set_mode(load.member, mode::ACTIVE),
        }
    }
}

/// Who does what only the driver of the owner can.
fn driver(owner: Option<&mut OwnerDriver>) -> Result<&mut OwnerDriver> {
    owner.ok_or_else(|| Failure("the owner has no driver here".into()))
}

/// A disk that is written page by page, many at once.
pub struct Load {
    /// Number of the virtual function among those of its owner, from 1 on.
    member: u64,
    transport: Transport<SysfsFunction>,
    pages: Rc<Pages>,
    queue: SplitQueue<Rc<Pages>>,
    state: Option<Region>,
    free: Vec<Slot>,
    busy: BTreeMap<u16, Slot>,
    /// Number of the next page.
    next: usize,
}

/// Memory of a request: header and status byte, and the data.
struct Slot {
    ends: u64,
    data: u64,
}

impl Load {
    /// Brings member number `member` to DRIVER_OK with these features, and one queue with this vector.
    pub fn start(function: &Function, member: u64, wanted: u64, vector: u16) -> Result<Self> {
        let place = || function.address.clone();
        let registers = function.open()?;
        change_command(&registers, pci_command::MEMORY | pci_command::BUS_MASTER, 0);
        let transport = Transport::new(registers).context(place())?;
        let agreed = transport.negotiate(wanted).context(place())?;
        check(agreed & wanted == wanted, || {
            format!("{} has features {agreed:#x} only", place())
        })?;
        let none = || Failure("no memory".into());
        // Two for each request, since the data take a whole one, and those of the rings.
        let pages = Rc::new(Pages::new(4 * BURST + 4)?);
        let queue = SplitQueue::new(Rc::clone(&pages), 64, false).ok_or_else(none)?;
        let slot = |_| {
            Some(Slot {
                ends: pages.allocate(17, 16)?,
                data: pages.allocate(PAGE, PAGE)?,
            })
        };
        let free = (0..2 * BURST).map(slot).collect::<Option<_>>();
        transport
            .enable_queue(0, queue.layout(), vector)
            .context(place())?;
        transport.start();
        let mut structures = transport.structures().iter();
        let state = structures.find(|structure| structure.kind == DEVICE_STATE);
        Ok(Self {
            member,
            state: state.map(|structure| structure.region),
            free: free.ok_or_else(none)?,
            busy: BTreeMap::new(),
            next: 0,
            transport,
            pages,
            queue,
        })
    }

    /// Pages that are not begun yet.
    pub fn left(&self) -> usize {
        (CHUNK / PAGE).saturating_sub(self.next)
    }

    /// Begins to write so many pages, or those that are left.
    pub fn submit(&mut self, count: usize) -> Result<()> {
        for _ in 0..count.min(self.left()) {
            let mut data = [0; PAGE];
            pattern::fill(&mut data, SEED, (self.next * PAGE) as u64);
            self.begin(OUT, self.next as u64 * SECTORS, &data)?;
            self.next += 1;
        }
        self.notify();
        Ok(())
    }

    /// Begins to write zeroes, `count` times, beyond what is written: long work for which little has to be said.
    pub fn submit_zeroes(&mut self, count: usize, bytes: u64) -> Result<()> {
        let (first, sectors) = ((CHUNK / 512) as u64, (bytes / 512) as u32);
        for _ in 0..count {
            let mut segment = [0; 16];
            segment[..8].copy_from_slice(&first.to_le_bytes());
            segment[8..12].copy_from_slice(&sectors.to_le_bytes());
            self.begin(WRITE_ZEROES, 0, &segment)?;
        }
        self.notify();
        Ok(())
    }

    fn notify(&mut self) {
        if self.queue.publish() {
            self.transport.notify(0);
        }
    }

    /// Puts a request into the ring.
    fn begin(&mut self, kind: u32, sector: u64, data: &[u8]) -> Result<()> {
        let slot = self.free.pop();
        let slot = slot.ok_or_else(|| Failure("no memory for a request".into()))?;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.pages.write(slot.ends, &header);
        self.pages.write(slot.ends + 16, &[0xff]);
        self.pages.write(slot.data, data);
        let head = self.queue.add(&[
            Buffer::readable(slot.ends, 16),
            Buffer::readable(slot.data, data.len() as u32),
            Buffer::writable(slot.ends + 16, 1),
        ]);
        self.busy.insert(head.context("a request")?, slot);
        Ok(())
    }

    /// Waits until all that was begun is done, each once and well.
    pub fn drain(&mut self) -> Result<()> {
        let (transport, queue) = (&self.transport, &mut self.queue);
        let mut outcome = Ok(());
        while !self.busy.is_empty() {
            let mut used = None;
            transport.function().wait_until(PATIENCE, || {
                match queue.take() {
                    Ok(taken) => used = taken,
                    Err(error) => outcome = Err(error),
                }
                used.is_some() || outcome.is_err()
            });
            outcome.context("the used ring")?;
            let Some(used) = used else {
                return Err(Failure(format!("{} requests are lost", self.busy.len())));
            };
            let slot = self.busy.remove(&used.head);
            let slot = slot.ok_or_else(|| Failure(format!("chain {} is none", used.head)))?;
            let code: u8 = self.pages.get(slot.ends + 16);
            check(code == 0, || format!("a request failed with status {code}"))?;
            self.free.push(slot);
        }
        Ok(())
    }

    /// How many chains were used, modulo 65536.
    pub fn used(&self) -> u16 {
        self.pages.load(self.queue.layout().used_index())
    }

    /// Fails if the device does anything.
    pub fn expect_stillness(&self) -> Result<()> {
        let before = self.used();
        thread::sleep(PAUSE);
        let after = self.used();
        check(before == after, || {
            format!("the used index went from {before} to {after}")
        })
    }

    /// Changes bits of the device status.
    fn change_status(&self, set: u8, clear: u8) {
        let transport = &self.transport;
        transport.set(common::DEVICE_STATUS, (transport.status() | set) & !clear);
    }

    /// Waits until the bits of the device status in `mask` are `expected`.
    fn await_status(&self, mask: u8, expected: u8) -> Result<()> {
        let transport = &self.transport;
        let done = || transport.status() & mask == expected;
        let done = transport.function().wait_until(PATIENCE, done);
        check(done, || {
            format!("device status is {:#x}", transport.status())
        })
    }

    /// Number of the virtual function among those of its owner.
    pub fn member(&self) -> String {
        format!("virtual function {}", self.member)
    }

    /// The function that is driven.
    pub fn transport(&self) -> &Transport<SysfsFunction> {
        &self.transport
    }

    fn state<T: Word>(&self, register: Register<T>) -> Result<T> {
        let function = self.transport.function();
        let region = self.region()?;
        function.set(region, STATE_QUEUE, 0);
        Ok(FunctionExt::get(function, region, register))
    }

    fn region(&self) -> Result<Region> {
        let missing = || Failure("there is no device-state capability".into());
        self.state.ok_or_else(missing)
    }

    /// Stops or starts queue 0, and waits until it is.
    fn run_queue(&self, run: u8) -> Result<()> {
        let (function, region) = (self.transport.function(), self.region()?);
        function.set(region, STATE_QUEUE, 0);
        function.set(region, STATE_RUNS, run);
        let there = || FunctionExt::get(function, region, STATE_RUNS) == run;
        check(function.wait_until(PATIENCE, there), || {
            format!("queue_status is not {run}")
        })
    }
}

/// Drives the owner.
pub struct OwnerDriver {
    transport: Transport<SysfsFunction>,
    queue: AdminQueue<Rc<Pages>>,
}

impl OwnerDriver {
    /// Takes the owner from its driver, and brings it to DRIVER_OK with nothing but its administration queue.
    pub fn start(owner: &Owner) -> Result<Self> {
        let module = Path::new("/sys/bus/pci/drivers").join(STUB);
        check(module.exists(), || format!("there is no driver {STUB}"))?;
        let is_taken = || owner.function.driver().as_deref() == Some(STUB);
        // One that has it already keeps the virtual functions.
        if !is_taken() {
            owner.function.unbind()?;
            owner.function.set("driver_override", STUB)?;
            owner.function.bind()?;
        }
        check(is_taken(), || format!("the PF is not bound to {STUB}"))?;
        let function = owner.function.open()?;
        change_command(&function, pci_command::MEMORY | pci_command::BUS_MASTER, 0);
        let transport = Transport::new(function).context("the PF")?;
        let wanted = feature::SR_IOV | feature::ADMIN_VQ;
        transport.negotiate(wanted).context("the PF")?;
        let queue = AdminQueue::new(&transport, Rc::new(Pages::new(8)?)).context("the PF")?;
        transport.start();
        Ok(Self { transport, queue })
    }

    /// Executes a command for a member; returns its output and its result.
    fn command(&mut self, opcode: u16, member: u64, data: &[u8]) -> Result<(u32, Vec<u8>)> {
        let bytes = command(opcode, group::SR_IOV, member, data);
        let sent = self
            .queue
            .send(&self.transport, &bytes, 8 + PIECE, Shape::Direct);
        let answer = sent.context(format_args!("command {opcode:#x}"))?;
        check(answer.outcome() == outcome::OK, || {
            format!("command {opcode:#x} is answered {:?}", answer.outcome())
        })?;
        let output = answer.bytes.get(4..).and_then(|rest| rest.first_chunk());
        let output = output.map_or(0, |bytes| u32::from_le_bytes(*bytes));
        Ok((output, answer.result().to_vec()))
    }

    /// Takes all commands for members into use. There are members.
    pub fn negotiate(&mut self) -> Result<()> {
        let (_, list) = self.command(opcode::LIST_QUERY, 0, &[])?;
        self.command(opcode::LIST_USE, 0, &list).map(drop)
    }

    /// Sets the mode of a member, which waits until that is done.
    pub fn set_mode(&mut self, member: u64, mode: u8) -> Result<()> {
        self.command(migration::MODE_SET, member, &[mode])?;
        self.expect_mode(member, mode)
    }

    fn expect_mode(&mut self, member: u64, mode: u8) -> Result<()> {
        let (_, answer) = self.command(migration::MODE_GET, member, &[])?;
        check(answer.first() == Some(&mode), || {
            format!("the mode is {:?} instead of {mode}", answer.first())
        })
    }

    /// Reads the context of the first member, which is frozen, resets it, and writes the context back. With `hold` each is done
    /// by half until a line is typed on the console.
    pub fn replace(&mut self, member: &Function, hold: bool) -> Result<()> {
        let mut context = Vec::new();
        loop {
            if hold && context.len() == PIECE {
                console::ask()?;
            }
            let (len, part) = self.command(migration::CONTEXT_READ, 1, &[])?;
            if len == 0 {
                break;
            }
            context.extend_from_slice(part.get(..len as usize).unwrap_or_default());
        }
        check(context.len() > PIECE, || {
            format!("a context of {} bytes", context.len())
        })?;
        member.set("reset", 1)?;
        // Reset or not, the mode is the owner's.
        self.expect_mode(1, mode::FREEZE)?;
        let transport = Transport::new(member.open()?).context(&member.address)?;
        check(transport.status() == 0, || {
            format!("device status is {:#x} after a reset", transport.status())
        })?;
        for (number, part) in context.chunks(PIECE).enumerate() {
            if hold && number == 1 {
                console::ask()?;
            }
            self.command(migration::CONTEXT_WRITE, 1, part)?;
        }
        Ok(())
    }
}
