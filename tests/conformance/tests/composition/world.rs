//! A real owner with two members, and everyone who has a hand on one of them: its driver, the owner driver in the guest,
//! the monitor, and the device's backend.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use conformance::enable_msix;
use devices::admin::{Drain, GroupType, Member, Options, Owner, OwnerDriver, Rest, Status};
use devices::block::{Block, BlockConfig};
use devices::context::encode as encode_context;
use devices::gate::{Party, Patience, Reasons};
use devices::virtio::{Doors, Suspend, VirtioDevice, VirtioFunction};
use driver::access::{Dma, DmaExt, FunctionExt, Register};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Shape, VirtualFunction};
use driver::pci::{Address, change_command, command, find_extended_capability, id, request_flr};
use driver::virtio::admin::command as encode;
use driver::virtio::{Buffer, NO_VECTOR, SplitQueue, Transport, common, feature, status};
use pci::owner::{self, OwnerPci};
use proptest::prelude::*;

use crate::disk::{Disk, SECTOR};
use crate::model::{ACTIVE, CONFIG_LEN, Effects, FREEZE, Id, Model, Moved, QUEUES, initial_config};
use crate::snapshot::Snapshot;
use crate::step::{By, Step};

pub const SUSPEND: u8 = 16;
pub const STOPPED: u8 = 32;
const STOP_FEATURE: u64 = 1 << 44;

const MODE_SET: u16 = 0x08;
const CONTEXT_READ: u16 = 0x0a;
const CONTEXT_WRITE: u16 = 0x0b;
const CONTEXT_DISCARD: u16 = 0x0d;
const RECORDS_START: u16 = 0x10;

/// How long what a disk's thread does may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of one queue that can be outstanding.
const SLOTS: usize = 4;
/// Bytes of a request to a loopback device.
const ECHO: usize = 24;
/// Bytes of the buffers of the administration queue.
const ADMIN_BUFFER: usize = 8192;
/// Bytes that are looked at at once.
const PIECE: usize = 64 << 10;
/// Requests a function level reset waits for take 100 ms of everybody's time.
const SLOW_RESETS: u32 = 1;

/// The device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `recall`: it has not begun what it holds.
    Loopback {
        recall: bool,
    },
    Disk,
}

/// The SUSPEND it offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspending {
    None,
    V5,
    V1_4,
}

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub kind: Kind,
    pub suspend: Suspending,
    pub event_index: bool,
}

pub fn loopback() -> BoxedStrategy<Kind> {
    any::<bool>()
        .prop_map(|recall| Kind::Loopback { recall })
        .boxed()
}

pub fn setup(kind: BoxedStrategy<Kind>) -> impl Strategy<Value = Setup> {
    let suspend = prop_oneof![
        1 => Just(Suspending::None),
        4 => Just(Suspending::V5),
        4 => Just(Suspending::V1_4)
    ];
    (kind, suspend, any::<bool>()).prop_map(|(kind, suspend, event_index)| Setup {
        kind,
        suspend,
        event_index,
    })
}

/// What is not as it must be.
pub type Check = Result<(), String>;

macro_rules! same {
    ($found:expr, $expected:expr, $($what:tt)+) => {{
        let (found, expected) = ($found, $expected);
        if found != expected {
            return Err(format!("{}: {found:x?}, not {expected:x?}", format_args!($($what)+)));
        }
    }};
}
pub(crate) use same;

/// Addresses of a request's buffers.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// What the device reads; of a disk, the header and the data.
    from: u64,
    /// What it writes; of a disk, the data and the status.
    to: u64,
}

struct Queue {
    ring: SplitQueue<HostDma>,
    free: Vec<Slot>,
    /// By the head of the chain.
    outstanding: HashMap<u16, (Id, Slot)>,
}

/// One member, and its device.
pub struct Seat {
    pub function: Arc<VirtioFunction>,
    pub place: VirtualFunction,
    controls: Option<Controls>,
}

/// What is a request to the administration queue of the guest.
struct AdminQueue {
    transport: Transport<HostFunction>,
    ring: SplitQueue<HostDma>,
    index: u16,
    request: u64,
    answer: u64,
}

/// What a snapshot leaves behind, and what is made anew for it.
pub struct Hardware {
    pub owner: Arc<Owner>,
    pub owner_function: Arc<VirtioFunction>,
    pub pf: HostFunction,
    pub seats: [Seat; 2],
}

pub struct World {
    setup: Setup,
    machine: Machine,
    owner: Arc<Owner>,
    owner_function: Arc<VirtioFunction>,
    pf: HostFunction,
    seats: [Seat; 2],
    /// Vectors of this step, from machines that are no more.
    signalled: BTreeSet<u16>,
    disk: Arc<Disk>,
    admin: AdminQueue,
    monitor: OwnerDriver,
    /// The member the driver drives.
    at: usize,
    transport: Transport<VirtualFunction>,
    queues: Vec<Queue>,
    /// Memory of the driver of the member.
    region: std::ops::Range<u64>,
    model: Model,
    next: Id,
    slow_resets: u32,
}

impl Hardware {
    /// An owner and its two members, which exist, in an empty `machine`.
    pub fn new(machine: &Machine, setup: Setup, disk: &Arc<Disk>) -> Self {
        let doors = Doors {
            suspend: match setup.suspend {
                Suspending::None => None,
                Suspending::V5 => Some(Suspend::V5),
                Suspending::V1_4 => Some(Suspend::V1_4),
            },
            device_stop: Some(Doors::DEVICE_STOP),
            queue_status: true,
        };
        let view = || machine.dma().ram().view().unwrap();
        let members = [1, 2].map(|number| {
            let (device, controls) = device(setup.kind, disk);
            let function =
                VirtioFunction::offering(format!("vf{number}"), device, view(), doors).unwrap();
            (function, controls)
        });
        let options = Options {
            // What can be given up is given up at once, so that no answer depends on time.
            drain: Drain(Duration::ZERO),
            ..Options::default()
        };
        let group = members
            .iter()
            .map(|(function, _)| Arc::clone(function) as _);
        let owner = Owner::new(group.collect(), options).unwrap();
        let (device, _) = device(setup.kind, disk);
        let owner_function =
            VirtioFunction::new_owner("pf", device, view(), Arc::clone(&owner)).unwrap();
        let functions = members.iter().map(|(function, _)| Arc::clone(function));
        let shown = OwnerPci::new(
            Arc::clone(&owner_function),
            functions.collect(),
            machine.msi(),
            owner::Options::default(),
        );
        let port = machine.root().add_root_port(shown.unwrap()).unwrap();
        machine.power_on().unwrap();
        machine.serve(&owner_function).unwrap();
        for (function, _) in &members {
            machine.serve(function).unwrap();
        }
        let bus = machine.root().secondary_bus(port).unwrap().0;
        let pf = machine.function(Address { bus, devfn: 0 });
        change_command(&pf, command::MEMORY | command::BUS_MASTER, 0);
        enable_members(&pf, true);
        let mut number = 0;
        let seats = members.map(|(function, controls)| {
            number += 1;
            Seat {
                function,
                place: VirtualFunction::new(&pf, number).unwrap().unwrap(),
                controls,
            }
        });
        Self {
            owner,
            owner_function,
            pf,
            seats,
        }
    }

    /// All functions, the owner's first.
    pub fn functions(&self) -> [&Arc<VirtioFunction>; 3] {
        let [first, second] = &self.seats;
        [&self.owner_function, &first.function, &second.function]
    }
}

impl World {
    pub fn new(setup: Setup) -> Self {
        let machine = Machine::new().unwrap();
        let disk = Arc::new(Disk::new());
        let Hardware {
            owner,
            owner_function,
            pf,
            seats,
        } = Hardware::new(&machine, setup, &disk);
        let transport = Transport::new(seats[0].place.clone()).unwrap();
        let dma = machine.dma();
        let start = dma.allocate(16, 16).unwrap();
        let queues = (0..QUEUES as u16).map(|index| {
            let size = transport.queue_size(index);
            let ring = SplitQueue::new(dma.clone(), size, setup.event_index).unwrap();
            let slot = |_| Slot {
                from: dma.allocate(16 + SECTOR, 16).unwrap(),
                to: dma.allocate(SECTOR + 1, 16).unwrap(),
            };
            Queue {
                ring,
                free: (0..SLOTS).map(slot).collect(),
                outstanding: HashMap::new(),
            }
        });
        let queues: Vec<_> = queues.collect();
        let region = start..dma.allocate(16, 16).unwrap();
        let admin = AdminQueue::new(pf.clone(), dma);
        let mut monitor = OwnerDriver::new(Arc::clone(&owner));
        monitor.set_patience(Duration::ZERO);
        monitor.negotiate(GroupType::SrIov).unwrap();
        let mut world = Self {
            setup,
            owner,
            owner_function,
            pf,
            seats,
            disk,
            signalled: BTreeSet::new(),
            admin,
            monitor,
            at: 0,
            transport,
            queues,
            region,
            model: Model::new(setup),
            next: 0,
            slow_resets: 0,
            machine,
        };
        let list = world.guest(0, 0, &[], 64).unwrap();
        world.guest(1, 0, &list, 64).unwrap();
        for step in [Step::BusMaster(true), Step::Init] {
            world.apply(&step).unwrap();
        }
        world
    }

    fn seat(&self) -> &Seat {
        &self.seats[self.at]
    }

    fn function(&self) -> &VirtioFunction {
        &self.seat().function
    }

    fn memory(&self) -> Vec<u8> {
        let len = self.region.end - self.region.start;
        self.machine.dma().bytes(self.region.start, len as usize)
    }

    // Steps --------------------------------------------------------------------------------------------------------

    /// Does `step`, lets everyone work, and compares.
    pub fn apply(&mut self, step: &Step) -> Check {
        self.model.effects = Effects::default();
        // A disk that is being reset may finish the request it has begun.
        let called_off = self.setup.kind == Kind::Disk && self.model.resetting;
        let closed = self.model.is_closed() && !called_off;
        if let Step::Submit { queue, kick } = *step {
            let wanted = self.submit(queue);
            let before = self.memory();
            if wanted && (kick || self.model.takes(queue)) {
                self.transport.notify(queue as u16);
            }
            return self.conclude(closed, &before);
        }
        let before = self.memory();
        self.act(step)?;
        self.conclude(closed, &before)
    }

    fn act(&mut self, step: &Step) -> Check {
        let settled = self.model.live && !self.model.resetting;
        match *step {
            Step::Submit { .. } => {}
            Step::Kick(queue) => self.transport.notify(queue as u16),
            Step::Hold(hold) => {
                self.model.set_hold(hold);
                self.set_hold(hold);
            }
            Step::Release(count) => {
                let count = count.min(self.model.held.len());
                if count > 0 {
                    self.model.release(count);
                    match &self.seat().controls {
                        Some(controls) => controls.release(count),
                        None if self.model.hold => self.disk.release(count),
                        None => {}
                    }
                }
            }
            Step::Suspend(suspend) if settled => self.suspend(suspend),
            Step::DeviceStop(stop) if settled => {
                self.write_status(self.model.suspended, stop);
                if !self.model.is_frozen() {
                    self.model.stopped = stop;
                }
            }
            Step::GuestMode(mode) if self.model.pending.is_none() => {
                self.model.set_mode(0, mode);
                let member = self.at as u64 + 1;
                self.admin.send(MODE_SET, member, &[mode], 8);
            }
            Step::MonitorMode(mode) => {
                self.monitor_mode(mode)?;
            }
            Step::RunQueue(index, run) if settled => {
                self.state_register(Register::<u16>::at(0), index as u16);
                self.state_register(Register::<u8>::at(4), run.into());
                if !self.model.ignores_writes() {
                    let queue = &mut self.model.queues[index];
                    queue.stopped = !run && queue.enabled;
                }
            }
            Step::Index(index) if settled && !self.model.ignores_writes() => {
                self.state_register(Register::<u16>::at(0), index as u16);
                let place = self.state_region();
                let register = Register::<u16>::at(2);
                let found: u16 = self.transport.function().get(place, register);
                same!(
                    found,
                    self.model.index(index),
                    "last_avail_idx of queue {index}"
                );
                if self.model.queues[index].enabled {
                    self.state_register(register, found);
                }
            }
            Step::ResetQueue(index) if settled => {
                // Which queue is selected cannot be changed either while writes are ignored.
                if !self.model.ignores_writes() {
                    let queue = &mut self.model.queues[index];
                    queue.resetting = queue.enabled;
                    self.transport.select(index as u16);
                }
                self.transport.set(common::QUEUE_RESET, 1);
            }
            Step::EnableQueue(index) => {
                let queue = &mut self.model.queues[index];
                let disabled = !queue.enabled && !queue.resetting;
                if settled && disabled && !self.model.ignores_writes() {
                    self.model.queues[index].enabled = true;
                    self.enable_queue(index);
                }
            }
            Step::WriteConfig(at, byte) if self.setup.kind != Kind::Disk => {
                self.transport
                    .device_set(Register::<u8>::at(at as u64), byte);
                if !self.model.ignores_config_writes() {
                    self.model.config[at] = byte;
                }
            }
            Step::ChangeConfig(byte) if self.setup.kind != Kind::Disk => {
                let config = vec![byte; CONFIG_LEN];
                self.model.change_config(config.clone());
                self.seat().controls.iter().for_each(|controls| {
                    controls.change_config(config.clone());
                });
            }
            // A write that takes it away waits for what is in flight.
            Step::BusMaster(on) if on || self.model.is_drained() => {
                self.model.bus_master = on;
                self.set_bus_master(self.at, on);
            }
            Step::Pause(pause) => {
                self.model.paused = pause;
                self.pause(self.at, pause);
            }
            Step::FunctionReset => {
                if !self.model.is_drained() {
                    self.slow_resets += 1;
                }
                if self.model.is_drained() || self.slow_resets <= SLOW_RESETS {
                    self.model.bus_master = false;
                    self.model.start_reset();
                    assert!(request_flr(self.transport.function()));
                }
            }
            Step::DeviceReset => {
                self.transport.set(common::DEVICE_STATUS, 0);
                if !self.model.is_frozen() {
                    self.model.start_reset();
                }
            }
            Step::Init => {
                let reset = !self.model.live && !self.model.resetting;
                if reset && !self.model.is_frozen() {
                    self.initialise();
                }
            }
            Step::Renew => {
                self.model.renew();
                enable_members(&self.pf, false);
                enable_members(&self.pf, true);
            }
            Step::SaveRestore(by, chunk) => self.save_restore(by, chunk)?,
            Step::Move(by, chunk) => self.change_place(by, chunk)?,
            Step::Snapshot(chunk) if self.model.can_stand_still() => self.snapshot(chunk)?,
            _ => {}
        }
        Ok(())
    }

    /// Makes a request available. True if the device wants to be notified.
    fn submit(&mut self, index: usize) -> bool {
        let model = &mut self.model.queues[index];
        let queue = &mut self.queues[index];
        let usable = model.enabled && !model.resetting && !self.model.resetting;
        let Some(slot) = queue.free.pop_if(|_| usable) else {
            return false;
        };
        let id = self.next;
        self.next += 1;
        model.available.push_back(id);
        let dma = self.machine.dma();
        let bytes = pattern(id, SECTOR);
        dma.write(slot.to, &[0xee; SECTOR + 1]);
        let chain = if self.setup.kind == Kind::Disk {
            let mut header = [0; 16];
            header[0] = u8::from(is_write(id));
            header[8] = id as u8;
            dma.write(slot.from, &header);
            dma.write(slot.from + 16, &bytes);
            let data = match is_write(id) {
                true => Buffer::readable(slot.from + 16, SECTOR as u32),
                false => Buffer::writable(slot.to, SECTOR as u32),
            };
            let status = Buffer::writable(slot.to + SECTOR as u64, 1);
            vec![Buffer::readable(slot.from, 16), data, status]
        } else {
            dma.write(slot.from, &bytes[..ECHO]);
            vec![
                Buffer::readable(slot.from, ECHO as u32),
                Buffer::writable(slot.to, ECHO as u32),
            ]
        };
        let head = queue.ring.add(&chain).unwrap();
        queue.outstanding.insert(head, (id, slot));
        queue.ring.publish()
    }

    fn set_hold(&self, hold: bool) {
        match &self.seat().controls {
            Some(controls) => controls.hold(hold),
            None => self.disk.hold(hold),
        }
    }

    fn suspend(&mut self, suspend: bool) {
        let was = self.model.suspended;
        let frozen = self.model.is_frozen();
        let model = &mut self.model;
        let after = match self.setup.suspend {
            _ if frozen => was,
            Suspending::None => false,
            Suspending::V5 => suspend,
            // What the driver asked for it cannot take back (B-49).
            Suspending::V1_4 => suspend || was && !model.is_suspended(),
        };
        self.write_status(suspend, self.model.stopped);
        self.model.suspended = after;
    }

    /// Writes the status of a live device whose driver wants it like this.
    fn write_status(&self, suspend: bool, stop: bool) {
        let mut bits = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        let stays = self.setup.suspend == Suspending::V1_4 && self.model.is_suspended() && suspend;
        if !stays {
            bits |= status::DRIVER_OK;
        }
        if suspend {
            bits |= SUSPEND;
        }
        if stop {
            bits |= STOPPED;
        }
        self.transport.set(common::DEVICE_STATUS, bits);
    }

    fn initialise(&mut self) {
        self.model.bus_master = true;
        self.set_bus_master(self.at, true);
        enable_msix(&self.transport);
        let suspend = match self.setup.suspend {
            Suspending::None => 0,
            Suspending::V5 => 1 << 42,
            Suspending::V1_4 => 1 << 43,
        };
        let mut wanted = conformance::SIMPLE | STOP_FEATURE | suspend;
        if self.setup.event_index {
            wanted |= feature::EVENT_IDX;
        }
        // Without FLUSH every write would be followed by one.
        wanted |= 1 << 9;
        let features = self.transport.negotiate(wanted).unwrap();
        let must = suspend | STOP_FEATURE;
        assert_eq!(features & must, must);
        self.transport.set_config_vector(0).unwrap();
        (0..QUEUES).for_each(|index| self.enable_queue(index));
        self.transport.start();
        self.model.initialise();
    }

    fn enable_queue(&self, index: usize) {
        let layout = self.queues[index].ring.layout();
        let vector = 1 + index as u16;
        self.transport
            .enable_queue(index as u16, layout, vector)
            .unwrap();
    }

    fn set_bus_master(&self, at: usize, on: bool) {
        let bit = command::BUS_MASTER;
        let (set, clear) = if on { (bit, 0) } else { (0, bit) };
        change_command(&self.seats[at].place, set, clear);
    }

    fn pause(&self, at: usize, pause: bool) {
        let function = &self.seats[at].function;
        match pause {
            true => function.close(Reasons::PAUSED),
            false => function.reopen(Reasons::PAUSED),
        }
    }

    fn state_region(&self) -> driver::access::Region {
        let structures = self.transport.structures();
        structures.iter().find(|s| s.kind == 10).unwrap().region
    }

    fn state_register<T: driver::access::Word>(&self, register: Register<T>, value: T) {
        let region = self.state_region();
        self.transport.function().set(region, register, value);
    }

    // Owner drivers ------------------------------------------------------------------------------------------------

    /// A command of the guest that has its answer at once; the result, or the status.
    fn guest(
        &mut self,
        opcode: u16,
        member: u64,
        data: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, u16> {
        self.admin.send(opcode, member, data, 8 + room);
        assert!(self.machine.settle(), "a device never rests");
        self.admin.take().expect("an answer")
    }

    fn by(
        &mut self,
        by: By,
        opcode: u16,
        at: usize,
        data: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, u16> {
        let member = at as u64 + 1;
        match by {
            By::Guest => self.guest(opcode, member, data, room),
            By::Monitor => {
                let request = encode(opcode, 1, member, data);
                let reply = self.monitor.execute_within(&request, 8 + room).0;
                reply
                    .map(|answer| answer.result)
                    .map_err(|failure| failure.status as u16)
            }
        }
    }

    /// DEV_MODE_SET by the monitor. True if it was done.
    fn monitor_mode(&mut self, mode: u8) -> Result<bool, String> {
        let moved = self.model.set_mode(1, mode);
        let answer = self.by(By::Monitor, MODE_SET, self.at, &[mode], 0);
        let expected = match moved {
            Moved::Done => Ok(Vec::new()),
            Moved::Later => Err(Status::Again as u16),
        };
        if answer != expected {
            return Err(format!("the monitor's DEV_MODE_SET: {answer:?}"));
        }
        Ok(moved == Moved::Done)
    }

    /// Freezes the member. False if that has to wait; the guest's command then does.
    fn freeze(&mut self, by: By) -> Result<bool, String> {
        match by {
            By::Monitor => self.monitor_mode(FREEZE),
            By::Guest if self.model.pending.is_some() => Ok(false),
            By::Guest => {
                let moved = self.model.set_mode(0, FREEZE);
                self.admin.send(MODE_SET, self.at as u64 + 1, &[FREEZE], 8);
                if moved == Moved::Later {
                    return Ok(false);
                }
                self.model.effects.answered = false;
                assert!(self.machine.settle(), "a device never rests");
                same!(
                    self.admin.take(),
                    Some(Ok(Vec::new())),
                    "the guest's DEV_MODE_SET"
                );
                Ok(true)
            }
        }
    }

    /// Reads all of the context of member `from`, and writes it to `to`, which then runs.
    fn copy(&mut self, by: By, from: usize, to: usize, chunk: usize) -> Check {
        let mut context = Vec::new();
        loop {
            let piece = self.by(by, CONTEXT_READ, from, &[], chunk);
            let piece = piece.map_err(|status| format!("DEV_CTX_READ: {status}"))?;
            if piece.is_empty() {
                break;
            }
            context.extend(piece);
        }
        for piece in context.chunks(chunk) {
            self.by(by, CONTEXT_WRITE, to, piece, 0)
                .map_err(|status| format!("DEV_CTX_WRITE: {status}"))?;
        }
        Ok(())
    }

    fn set_mode_at(&mut self, by: By, at: usize, mode: u8) -> Check {
        let answer = self.by(by, MODE_SET, at, &[mode], 0);
        same!(answer, Ok(Vec::new()), "DEV_MODE_SET of member {at}");
        Ok(())
    }

    fn save_restore(&mut self, by: By, chunk: usize) -> Check {
        if !self.freeze(by)? {
            return Ok(());
        }
        self.copy(by, self.at, self.at, chunk)?;
        self.model.modes[by as usize] = ACTIVE;
        self.model.restored();
        self.set_mode_at(by, self.at, ACTIVE)
    }

    /// What a hypervisor does: the context, and what PCI knows of the function.
    fn change_place(&mut self, by: By, chunk: usize) -> Check {
        let other = self.model.modes[1 - by as usize];
        let quiet = other == ACTIVE && self.model.new_config.is_none() && !self.model.resetting;
        if !quiet || !self.freeze(by)? {
            return Ok(());
        }
        let (from, to) = (self.at, 1 - self.at);
        self.set_mode_at(by, to, FREEZE)?;
        self.copy(by, from, to, chunk)?;
        self.at = to;
        self.transport = Transport::new(self.seats[to].place.clone()).unwrap();
        enable_msix(&self.transport);
        self.pause(to, self.model.paused);
        self.pause(from, false);
        self.set_bus_master(to, self.model.bus_master);
        self.set_hold(self.model.hold);
        self.model.modes[by as usize] = ACTIVE;
        self.model.restored();
        self.set_mode_at(by, to, ACTIVE)?;
        assert!(request_flr(&self.seats[from].place));
        self.set_mode_at(by, from, ACTIVE)
    }

    // Snapshots ----------------------------------------------------------------------------------------------------

    /// Everything stands still, is saved, put into another machine with the same memory, and goes on there. What is saved of
    /// that machine is the same, and nothing of it was written to memory.
    fn snapshot(&mut self, chunk: usize) -> Check {
        let other = 1 - self.at;
        let half = self.read_half(other)?;
        self.stop_all()?;
        let old = Hardware {
            owner: Arc::clone(&self.owner),
            owner_function: Arc::clone(&self.owner_function),
            pf: self.pf.clone(),
            seats: std::array::from_fn(|at| Seat {
                function: Arc::clone(&self.seats[at].function),
                place: self.seats[at].place.clone(),
                controls: None,
            }),
        };
        let saved = Snapshot::save(&old, &self.monitor)?;
        let memory = self.memory();
        let dma = self.machine.dma().clone();
        self.signalled.extend(self.machine.msi().take_vectors());

        let machine = Machine::with_memory(dma).unwrap();
        let new = Hardware::new(&machine, self.setup, &self.disk);
        for function in new.functions() {
            function.close(Reasons::PAUSED);
        }
        for seat in &new.seats {
            enable_msix(&Transport::new(seat.place.clone()).unwrap());
        }
        let mut monitor = OwnerDriver::new(Arc::clone(&new.owner));
        monitor.set_patience(Duration::ZERO);
        saved.restore(&new, &mut monitor, chunk)?;
        let again = Snapshot::save(&new, &monitor)?;
        same!(again, saved, "what is saved again");
        same!(self.memory() == memory, true, "memory is as it was");

        self.machine = machine;
        self.monitor = monitor;
        self.owner = new.owner;
        self.owner_function = new.owner_function;
        self.pf = new.pf;
        self.seats = new.seats;
        self.admin.transport = Transport::new(self.pf.clone()).unwrap();
        self.transport = Transport::new(self.seat().place.clone()).unwrap();
        self.set_hold(self.model.hold);
        // It waits in the backend, not in the device.
        if let (Some(config), Some(controls)) = (&self.model.new_config, &self.seat().controls) {
            controls.change_config(config.clone());
        }
        // The device learns of it while it has to be still.
        self.machine.settle();
        self.owner_function.reopen(Reasons::PAUSED);
        for at in [0, 1] {
            self.pause(at, self.model.paused && at == self.at);
        }
        self.read_rest(other, &half)
    }

    /// All functions stop, as for a pause of the VM.
    fn stop_all(&mut self) -> Check {
        let functions = [
            &self.owner_function,
            &self.seats[0].function,
            &self.seats[1].function,
        ];
        for function in functions {
            function.close(Reasons::PAUSED);
        }
        for function in functions {
            function.recall();
        }
        let begun = self.setup.kind == Kind::Disk && !self.model.is_drained();
        self.model.stand_still();
        if begun && self.model.hold {
            self.disk.release(1);
        }
        let deadline = Instant::now() + PATIENCE;
        for function in functions {
            while !function.stop(Reasons::PAUSED, Patience::prompt(Duration::ZERO)) {
                self.machine.settle();
                if Instant::now() > deadline {
                    return Err(format!("{} does not stand still", function.name()));
                }
            }
        }
        Ok(())
    }

    /// The monitor begins to record the member that is driven, and to read the context of the other one. What it read.
    fn read_half(&mut self, other: usize) -> Result<Vec<u8>, String> {
        let words = [0x1000u64, 1, 0, 0x1000].map(u64::to_le_bytes);
        // It may record already.
        let _ = self.by(By::Monitor, RECORDS_START, self.at, words.as_flattened(), 0);
        let discarded = self.by(By::Monitor, CONTEXT_DISCARD, other, &[], 0);
        same!(discarded, Ok(Vec::new()), "DEV_CTX_DISCARD");
        let half = self.by(By::Monitor, CONTEXT_READ, other, &[], 100);
        half.map_err(|status| format!("DEV_CTX_READ: {status}"))
    }

    /// It goes on with that.
    fn read_rest(&mut self, other: usize, half: &[u8]) -> Check {
        let function = &self.seats[other].function;
        let whole = encode_context(&function.save(), &function.shape());
        let rest = self.by(By::Monitor, CONTEXT_READ, other, &[], 1 << 20);
        let read = rest.map(|rest| [half.to_vec(), rest].concat());
        same!(read, Ok(whole), "the context that was read in two machines");
        let discarded = self.by(By::Monitor, CONTEXT_DISCARD, other, &[], 0);
        same!(discarded, Ok(Vec::new()), "DEV_CTX_DISCARD");
        Ok(())
    }

    // Comparing ----------------------------------------------------------------------------------------------------

    /// Lets everyone work, and compares with the model. The function was `closed` before the step, and memory `before`
    /// the device had a chance to see it.
    fn conclude(&mut self, closed: bool, before: &[u8]) -> Check {
        self.model.settle();
        let answer = self.converge()?;
        let effects = self.model.effects.clone();
        same!(answer.is_some(), effects.answered, "an answer to the guest");
        if let Some(answer) = answer {
            same!(answer, Ok(Vec::new()), "the guest's DEV_MODE_SET");
        }
        let mut vectors = std::mem::take(&mut self.signalled);
        vectors.extend(self.machine.msi().take_vectors());
        let used = effects.completed.iter().map(|(queue, _)| 1 + *queue as u16);
        let again = effects.signalled.iter().map(|queue| 1 + *queue as u16);
        let expected: BTreeSet<_> = used
            .chain(again)
            .chain(effects.config.then_some(0))
            .collect();
        same!(vectors, expected, "interrupts");
        let still = closed && self.model.is_closed() && effects.completed.is_empty();
        if still && self.memory() != before {
            return Err("memory was written while the function was stopped".into());
        }
        self.compare_registers()?;
        for index in effects.reset {
            let queue = &mut self.queues[index];
            queue.ring.clear();
            queue
                .free
                .extend(queue.outstanding.drain().map(|(_, (_, slot))| slot));
        }
        Ok(())
    }

    /// Lets everyone work until what is expected has happened and nobody has anything to do. The guest's answer, if it
    /// came.
    fn converge(&mut self) -> Result<Option<Result<Vec<u8>, u16>>, String> {
        let deadline = Instant::now() + PATIENCE;
        let mut found: [Vec<Id>; QUEUES] = Default::default();
        loop {
            if !self.machine.settle() {
                return Err("a device never rests".into());
            }
            for (index, found) in found.iter_mut().enumerate() {
                self.take(index, found)?;
            }
            let count: usize = found.iter().map(Vec::len).sum();
            let drained = self.function().rest() == Rest::AtRest;
            let done =
                count >= self.model.effects.completed.len() && drained == self.model.is_drained();
            if done || self.setup.kind != Kind::Disk || Instant::now() > deadline {
                break;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        for (index, found) in found.iter().enumerate() {
            let completed = self.model.effects.completed.iter();
            let expected = completed.filter(|(queue, _)| *queue == index);
            let expected: Vec<_> = expected.map(|(_, id)| *id).collect();
            same!(found, &expected, "requests that came back on queue {index}");
        }
        let begun = self.setup.kind == Kind::Disk && !self.model.is_drained();
        if begun && !self.disk.wait_for_one() {
            return Err("no request gets to the disk".into());
        }
        // A disk's last completion may have woken a command.
        if !self.machine.settle() {
            return Err("a device never rests".into());
        }
        Ok(self.admin.take())
    }

    /// Takes back what was used on queue `index`, and looks at the data.
    fn take(&mut self, index: usize, found: &mut Vec<Id>) -> Check {
        let queue = &mut self.queues[index];
        let mut any = false;
        while let Some(used) = queue.ring.take().map_err(|error| error.to_string())? {
            any = true;
            let (id, slot) = queue.outstanding.remove(&used.head).unwrap();
            queue.free.push(slot);
            found.push(id);
            let dma = self.machine.dma();
            if self.setup.kind == Kind::Disk {
                let status = dma.get::<u8>(slot.to + SECTOR as u64);
                same!(status, 0, "status of request {id}");
                let sector = id as usize;
                if is_write(id) {
                    same!(self.disk.writes(sector), 1, "writes of request {id}");
                    same!(self.disk.sector(sector), pattern(id, SECTOR), "sector {id}");
                } else {
                    let content = self.disk.sector(sector);
                    same!(dma.bytes(slot.to, SECTOR), content, "data of request {id}");
                }
            } else {
                same!(used.len as usize, ECHO, "length of request {id}");
                let echo = dma.bytes(slot.to, ECHO);
                same!(echo, pattern(id, ECHO), "data of request {id}");
            }
        }
        if any && self.setup.event_index {
            queue.ring.want_interrupts(true);
        }
        Ok(())
    }

    fn compare_registers(&self) -> Check {
        let (function, model) = (self.function(), &self.model);
        same!(self.transport.status(), model.status(), "device_status");
        same!(
            function.is_resetting(),
            model.resetting,
            "a reset is under way"
        );
        for (index, queue) in (0..).zip(&model.queues) {
            let at = usize::from(index);
            let info = function.queue(index).unwrap();
            same!(info.enabled, queue.enabled, "queue_enable of {index}");
            same!(info.resetting, queue.resetting, "queue_reset of {index}");
            same!(
                function.queue_runs(index),
                model.runs(at),
                "queue_status of {index}"
            );
            let next = function.next_available(index);
            same!(next, model.index(at), "last_avail_idx of {index}");
        }
        for (party, mode) in [Party::Guest, Party::Monitor].into_iter().zip(model.modes) {
            let found = Member::mode(function, party) as u8;
            same!(found, mode, "the mode of {party:?}");
        }
        let generation: u8 = self.transport.get(common::CONFIG_GENERATION);
        same!(generation, model.generation, "config_generation");
        if self.setup.kind != Kind::Disk {
            let at = |at| self.transport.device_get(Register::<u8>::at(at));
            let config: Vec<u8> = (0..CONFIG_LEN as u64).map(at).collect();
            same!(&config, &model.config, "the device configuration");
        }
        Ok(())
    }

    /// Nothing stops the function any more: nothing is outstanding, both queues work, and nobody wrote where they must
    /// not.
    pub fn finish(mut self) -> Check {
        if self.model.is_closed() {
            return Err("the last reason is not gone".into());
        }
        for queue in 0..QUEUES {
            same!(
                self.queues[queue].outstanding.len(),
                0,
                "outstanding on {queue}"
            );
            self.apply(&Step::Submit { queue, kick: true })?;
            same!(
                self.model.effects.completed.len(),
                1,
                "requests of queue {queue}"
            );
        }
        same!(self.owner.members().count(), 2, "members");
        let dma = self.machine.dma();
        let end = dma.allocate(PIECE, PIECE).unwrap() as usize;
        let clean = (end..driver::host::RAM)
            .step_by(PIECE)
            .all(|at| dma.bytes(at as u64, PIECE) == [0; PIECE]);
        same!(clean, true, "memory that is nobody's stays as it was");
        Ok(())
    }
}

impl AdminQueue {
    fn new(pf: HostFunction, dma: &HostDma) -> Self {
        let transport = Transport::new(pf).unwrap();
        let wanted = feature::ADMIN_VQ | feature::SR_IOV;
        let features = transport.negotiate(wanted).unwrap();
        assert_eq!(features & wanted, wanted);
        let index = transport.get(common::ADMIN_QUEUE_INDEX);
        let size = transport.queue_size(index);
        let ring = SplitQueue::new(dma.clone(), size, false).unwrap();
        transport
            .enable_queue(index, ring.layout(), NO_VECTOR)
            .unwrap();
        transport.start();
        Self {
            transport,
            ring,
            index,
            request: dma.allocate(ADMIN_BUFFER, 16).unwrap(),
            answer: dma.allocate(ADMIN_BUFFER, 16).unwrap(),
        }
    }

    fn dma(&self) -> &HostDma {
        self.transport.function().machine().dma()
    }

    fn send(&mut self, opcode: u16, member: u64, data: &[u8], room: usize) {
        let request = encode(opcode, 1, member, data);
        self.dma().write(self.request, &request);
        let chain = [
            Buffer::readable(self.request, request.len() as u32),
            Buffer::writable(self.answer, room as u32),
        ];
        self.ring.add(&chain).unwrap();
        if self.ring.publish() {
            self.transport.notify(self.index);
        }
    }

    /// The answer, if there is one: the result, or the status.
    fn take(&mut self) -> Option<Result<Vec<u8>, u16>> {
        let used = self.ring.take().unwrap()?;
        let bytes = self.dma().bytes(self.answer, used.len as usize);
        Some(match u16::from_le_bytes([bytes[0], bytes[1]]) {
            0 => {
                let output = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
                let result = &bytes[8..];
                // What is read of a context is padded; how much of it counts, the output says.
                let len = if output == 0 {
                    result.len()
                } else {
                    output as usize
                };
                Ok(result[..len].to_vec())
            }
            status => Err(status),
        })
    }
}

fn device(kind: Kind, disk: &Arc<Disk>) -> (Box<dyn VirtioDevice>, Option<Controls>) {
    match kind {
        Kind::Disk => {
            let mut config = BlockConfig::new("memory");
            config.queues = QUEUES as u16;
            let disk = Arc::clone(disk);
            (Box::new(Block::with_backend(disk, &config).unwrap()), None)
        }
        Kind::Loopback { recall } => {
            let shape = Shape {
                config: initial_config(),
                ..Shape::default()
            };
            let (device, controls) = Loopback::new(shape).unwrap();
            controls.give_up(recall);
            (device, Some(controls))
        }
    }
}

/// VF Enable of `pf`.
fn enable_members(pf: &HostFunction, enable: bool) {
    let at = find_extended_capability(pf, id::EXT_SRIOV)
        .unwrap()
        .unwrap()
        .offset;
    if enable {
        pf.set_config(at + 0x10, 2u16);
    }
    pf.set_config(at + 0x08, if enable { 0x19u16 } else { 0x10 });
}

/// Requests to a disk take turns.
fn is_write(id: Id) -> bool {
    id.is_multiple_of(2)
}

fn pattern(id: Id, len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|at| (at.wrapping_mul(7) ^ id.wrapping_mul(31).wrapping_add(1)) as u8)
        .collect()
}
