//! `vf-stop`: a virtual function under I/O by a driver in user space is stopped and goes on, in one of the ways there are,
//! while its sibling under the stock driver reads all the time. With `way=freeze` the driver is also that of the owner: it
//! freezes the virtual function, takes its context, resets it, and puts the context back. With `hold=yes` the first stop
//! lasts until a line is typed on the console; with `way=freeze` also the first context stays half read, and half written,
//! until then.

use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use driver::access::{Dma, DmaExt, FunctionExt, Region, Register};
use driver::pci::{change_command, command as pci_command};
use driver::virtio::admin::{AdminQueue, Shape, command, group, opcode, outcome};
use driver::virtio::block::request::OUT;
use driver::virtio::{Buffer, NO_VECTOR, SplitQueue, Transport, common, feature, status};

use super::super::block::Disk;
use super::super::{Found, console};
use super::{Function, Owner};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::pattern::{self, CHUNK};
use crate::user::function::SysfsFunction;
use crate::user::memory::Pages;
use crate::{Context, Failure, Result, check};

/// The driver that does nothing but let virtual functions be enabled.
const STUB: &str = "pci-pf-stub";
/// Requests of a page each that are begun at once.
const BURST: usize = 8;
const PAGE: usize = 4096;
const SECTORS: u64 = PAGE as u64 / 512;
/// Of what is written, and of what the sibling reads.
const SEEDS: (u64, u64) = (11, 12);
/// How long a device may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long nothing is to happen.
const PAUSE: Duration = Duration::from_millis(20);

/// Bits of the device status.
const SUSPEND: u8 = 16;
const DEVICE_STOPPED: u8 = 32;
/// The structure that stops single virtqueues, and its registers.
const DEVICE_STATE: u8 = 10;
const STATE_QUEUE: Register<u16> = Register::at(0);
const STATE_NEXT: Register<u16> = Register::at(2);
const STATE_RUNS: Register<u8> = Register::at(4);
/// Commands of the owner, and modes.
const MODE_GET: u16 = 7;
const MODE_SET: u16 = 8;
const CONTEXT_READ: u16 = 0xa;
const CONTEXT_WRITE: u16 = 0xb;
const ACTIVE: u8 = 0;
const FREEZE: u8 = 2;
/// Bytes of a context per command, so that it takes several.
const PIECE: usize = 64;

pub fn run(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let way = Way::named(request.text("way", "freeze"))?;
    let hold = match request.text("hold", "no") {
        "yes" => true,
        "no" => false,
        other => return Err(Failure(format!("hold={other} is neither yes nor no"))),
    };
    let log = Mark::now()?;
    if let Way::Freeze = way {
        owner.function.unbind()?;
        owner.function.set("driver_override", STUB)?;
        owner.function.bind()?;
        check(owner.function.driver().as_deref() == Some(STUB), || {
            format!("the PF is not bound to {STUB}")
        })?;
    }
    let mut driver = match way {
        Way::Freeze => Some(OwnerDriver::start(&owner)?),
        _ => None,
    };
    let members = owner.ensure(Some(2))?;
    let [first, sibling] = members.as_slice() else {
        return Err(Failure("there are not two virtual functions".into()));
    };
    if let Some(driver) = &mut driver {
        driver.negotiate()?;
    }
    first.unbind()?;
    first.set("reset_method", "flr")?;
    let disk = Disk::new(&sibling.disk()?);
    disk.write_pattern(SEEDS.1, 1)?;

    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let stops = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Relaxed) {
                let (there, expected) = (disk.checksum(1)?, pattern::checksum(SEEDS.1, 1));
                check(there == expected, || {
                    format!("crc32={there:08x} instead of {expected:08x}")
                })?;
                read.fetch_add(1, Relaxed);
            }
            Ok::<_, Failure>(())
        });
        let stops = rounds(first, &way, driver.as_mut(), &read, hold);
        stop.store(true, Relaxed);
        let reader = reader.join();
        reader
            .map_err(|_| Failure("the sibling panicked".into()))?
            .context("the sibling")?;
        stops
    })?;
    log.check_clean()?;
    Ok(Found::default()
        .with("stops", stops)
        .with("sibling_mib", read.into_inner())
        .with(
            "crc32",
            format_args!("{:08x}", pattern::checksum(SEEDS.0, 1)),
        ))
}

/// Writes a MiB, with a stop after each burst is begun. Returns how many.
fn rounds(
    function: &Function,
    way: &Way,
    mut owner: Option<&mut OwnerDriver>,
    read: &AtomicU64,
    hold: bool,
) -> Result<u32> {
    let mut load = Load::start(function, way.feature())?;
    let mut stops = 0;
    while load.left() > 0 {
        let doing = |what: &'static str| move || format!("stop {stops}: {what}");
        load.submit(BURST)?;
        way.stop(&load, owner.as_deref_mut())
            .context(doing("stopping")())?;
        load.expect_stillness().context(doing("stopped")())?;
        let hold = hold && stops == 0;
        if hold {
            console::ask()?;
            load.expect_stillness().context(doing("held")())?;
        }
        let before = read.load(Relaxed);
        if let Some(owner) = owner.as_deref_mut() {
            // Its driver knows nothing of this.
            load.submit(BURST)?;
            owner.replace(function, hold).context(doing("moving")())?;
            load.expect_stillness().context(doing("moved")())?;
        }
        super::wait("the sibling stands still", || read.load(Relaxed) > before)?;
        way.resume(&load, owner.as_deref_mut())
            .context(doing("resuming")())?;
        load.drain().context(doing("resumed")())?;
        stops += 1;
    }
    load.transport.reset().context(&function.address)?;
    Ok(stops)
}

/// How the virtual function is stopped.
enum Way {
    /// SUSPEND, with DRIVER_OK set all the time.
    SuspendV5,
    /// SUSPEND of virtio 1.4.
    SuspendV14,
    /// DEVICE_STOPPED.
    DeviceStop,
    /// The queue, by the device-state capability.
    Queue,
    /// Mode Freeze, by its owner.
    Freeze,
}

impl Way {
    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "suspend-v5" => Self::SuspendV5,
            "suspend-v1.4" => Self::SuspendV14,
            "device-stop" => Self::DeviceStop,
            "queue" => Self::Queue,
            "freeze" => Self::Freeze,
            other => {
                return Err(Failure(format!("way={other} is none")));
            }
        })
    }

    /// The feature it takes.
    fn feature(&self) -> u64 {
        match self {
            Self::SuspendV5 => 1 << 42,
            Self::SuspendV14 => 1 << 43,
            Self::DeviceStop => 1 << 44,
            Self::Queue | Self::Freeze => 0,
        }
    }

    /// Stops, and waits until that is acknowledged.
    fn stop(&self, load: &Load, owner: Option<&mut OwnerDriver>) -> Result<()> {
        match self {
            Self::SuspendV5 => {
                let ok = status::DRIVER_OK;
                load.set_status(SUSPEND, 0, SUSPEND | ok, SUSPEND | ok)
            }
            Self::SuspendV14 => load.set_status(SUSPEND, 0, SUSPEND | status::DRIVER_OK, SUSPEND),
            Self::DeviceStop => load.set_status(DEVICE_STOPPED, 0, DEVICE_STOPPED, DEVICE_STOPPED),
            Self::Queue => {
                load.run_queue(0)?;
                let next = load.state(STATE_NEXT)?;
                let used = load.used();
                check(next == used, || {
                    format!("last_avail_idx is {next}, and {used} chains were used")
                })
            }
            Self::Freeze => load.with(owner, |owner| owner.set_mode(FREEZE)),
        }
    }

    /// Lets it go on.
    fn resume(&self, load: &Load, owner: Option<&mut OwnerDriver>) -> Result<()> {
        let ok = status::DRIVER_OK;
        match self {
            Self::SuspendV5 => load.set_status(0, SUSPEND, SUSPEND | ok, ok),
            Self::SuspendV14 => load.set_status(ok, SUSPEND, SUSPEND | ok, ok),
            Self::DeviceStop => load.set_status(0, DEVICE_STOPPED, DEVICE_STOPPED, 0),
            Self::Queue => load.run_queue(1),
            Self::Freeze => load.with(owner, |owner| owner.set_mode(ACTIVE)),
        }
    }
}

/// A disk that is written page by page, many at once.
struct Load {
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
    fn start(function: &Function, wanted: u64) -> Result<Self> {
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
            .enable_queue(0, queue.layout(), NO_VECTOR)
            .context(place())?;
        transport.start();
        let mut structures = transport.structures().iter();
        let state = structures.find(|structure| structure.kind == DEVICE_STATE);
        Ok(Self {
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
    fn left(&self) -> usize {
        (CHUNK / PAGE).saturating_sub(self.next)
    }

    /// Begins to write so many pages, or those that are left.
    fn submit(&mut self, count: usize) -> Result<()> {
        for _ in 0..count.min(self.left()) {
            let slot = self
                .free
                .pop()
                .ok_or_else(|| Failure("no memory for a request".into()))?;
            let mut header = [0; 16];
            header[..4].copy_from_slice(&OUT.to_le_bytes());
            let sector = self.next as u64 * SECTORS;
            header[8..].copy_from_slice(&sector.to_le_bytes());
            let mut data = [0; PAGE];
            pattern::fill(&mut data, SEEDS.0, (self.next * PAGE) as u64);
            self.pages.write(slot.ends, &header);
            self.pages.write(slot.ends + 16, &[0xff]);
            self.pages.write(slot.data, &data);
            let head = self.queue.add(&[
                Buffer::readable(slot.ends, 16),
                Buffer::readable(slot.data, PAGE as u32),
                Buffer::writable(slot.ends + 16, 1),
            ]);
            self.busy.insert(head.context("a request")?, slot);
            self.next += 1;
        }
        if self.queue.publish() {
            self.transport.notify(0);
        }
        Ok(())
    }

    /// Waits until all that was begun is done, each once and well.
    fn drain(&mut self) -> Result<()> {
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
    fn used(&self) -> u16 {
        self.pages.load(self.queue.layout().used_index())
    }

    /// Fails if the device does anything.
    fn expect_stillness(&self) -> Result<()> {
        let before = self.used();
        thread::sleep(PAUSE);
        let after = self.used();
        check(before == after, || {
            format!("the used index went from {before} to {after}")
        })
    }

    /// Changes bits of the device status, and waits until those in `mask` are `expected`.
    fn set_status(&self, set: u8, clear: u8, mask: u8, expected: u8) -> Result<()> {
        let transport = &self.transport;
        transport.set(common::DEVICE_STATUS, (transport.status() | set) & !clear);
        let done = || transport.status() & mask == expected;
        let done = transport.function().wait_until(PATIENCE, done);
        check(done, || {
            format!("device status is {:#x}", transport.status())
        })
    }

    fn state<T: driver::access::Word>(&self, register: Register<T>) -> Result<T> {
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

    /// Does what only the driver of the owner can.
    fn with(
        &self,
        owner: Option<&mut OwnerDriver>,
        what: impl FnOnce(&mut OwnerDriver) -> Result<()>,
    ) -> Result<()> {
        owner.map_or_else(|| Err(Failure("the owner has no driver here".into())), what)
    }
}

/// Drives the owner, for its first member.
struct OwnerDriver {
    transport: Transport<SysfsFunction>,
    queue: AdminQueue<Rc<Pages>>,
}

impl OwnerDriver {
    /// Brings the owner to DRIVER_OK, with nothing but its administration queue.
    fn start(owner: &Owner) -> Result<Self> {
        let module = Path::new("/sys/bus/pci/drivers").join(STUB);
        check(module.exists(), || format!("there is no driver {STUB}"))?;
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

    /// Takes all commands for members into use.
    fn negotiate(&mut self) -> Result<()> {
        let (_, list) = self.command(opcode::LIST_QUERY, 0, &[])?;
        self.command(opcode::LIST_USE, 0, &list).map(drop)
    }

    fn set_mode(&mut self, mode: u8) -> Result<()> {
        self.command(MODE_SET, 1, &[mode])?;
        self.expect_mode(mode)
    }

    fn expect_mode(&mut self, mode: u8) -> Result<()> {
        let (_, answer) = self.command(MODE_GET, 1, &[])?;
        check(answer.first() == Some(&mode), || {
            format!("the mode is {:?} instead of {mode}", answer.first())
        })
    }

    /// Reads the context of the member, which is frozen, resets it, and writes the context back. With `hold` each is done
    /// by half until a line is typed on the console.
    fn replace(&mut self, member: &Function, hold: bool) -> Result<()> {
        let mut context = Vec::new();
        loop {
            if hold && context.len() == PIECE {
                console::ask()?;
            }
            let (len, part) = self.command(CONTEXT_READ, 1, &[])?;
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
        self.expect_mode(FREEZE)?;
        let transport = Transport::new(member.open()?).context(&member.address)?;
        check(transport.status() == 0, || {
            format!("device status is {:#x} after a reset", transport.status())
        })?;
        for (number, part) in context.chunks(PIECE).enumerate() {
            if hold && number == 1 {
                console::ask()?;
            }
            self.command(CONTEXT_WRITE, 1, part)?;
        }
        Ok(())
    }
}
