//! A machine with one device that can be stopped, its driver, and everything that could disturb it meanwhile.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use devices::admin::{self, Owner};
use devices::state::FunctionState;
use devices::virtio::{Doors, Suspend, VirtioDevice, VirtioFunction};
use driver::access::{DmaExt, Function, FunctionExt, Region, Register};
use driver::host::{
    Controls, HostDma, HostFunction, Loopback, Machine, Place, RAM, Shape, VirtualFunction,
};
use driver::pci::{
    Address, change_command, command, find_capability, find_extended_capability, id,
};
use driver::virtio::{Buffer, DeviceState, Door, SplitQueue, Transport, common, feature};
use pci::owner::{self, OwnerPci};

/// Everything a driver accepts that knows all doors but one: of the two SUSPENDs, a device has at most one.
pub const ALL: u64 = conformance::ALL | DOORS;
/// The same without the event index.
pub const SIMPLE: u64 = conformance::SIMPLE | DOORS;
/// A driver that knows no door.
pub const NO_DOOR: u64 = conformance::ALL;

const DOORS: u64 = 1 << 42 | 1 << 43 | 1 << 44;

/// Offsets in the SR-IOV capability, and in a port's.
const NUM_VFS: u16 = 0x10;
const SRIOV_CONTROL: u16 = 0x08;
const VFS_ON: u16 = 0x19;
const DEVICE_CONTROL_2: u16 = 0x28;
const ARI_FORWARDING: u16 = 1 << 5;

/// What a function is to SR-IOV.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    Plain,
    /// The second virtual function of an owner.
    Member,
}

/// Every door at once, with that SUSPEND.
pub fn all_doors(suspend: Suspend) -> Doors {
    Doors {
        suspend: Some(suspend),
        device_stop: Some(Doors::DEVICE_STOP),
        queue_status: true,
    }
}

/// What a device offers for `door`.
pub fn only(door: Door) -> Doors {
    let mut doors = Doors::default();
    match door {
        Door::SuspendV5 => doors.suspend = Some(Suspend::V5),
        Door::Suspend => doors.suspend = Some(Suspend::V1_4),
        Door::DeviceStop => doors.device_stop = Some(Doors::DEVICE_STOP),
    }
    doors
}

/// A function and what drives it.
pub struct Rig {
    pub machine: Machine,
    kind: Kind,
    pub function: Arc<VirtioFunction>,
    /// The owner of a member.
    pub owner: Option<HostFunction>,
    pub controls: Controls,
    pub transport: Transport<Rc<dyn Function>>,
    pub queues: Vec<SplitQueue<HostDma>>,
    /// What is to come back, and where: by queue and head.
    expected: HashMap<(usize, u16), (u64, Vec<u8>)>,
    serial: u32,
}

impl Rig {
    /// A device that offers `doors`, with decoding, bus mastering and MSI-X on, which no driver has touched yet.
    pub fn untouched(kind: Kind, doors: Doors) -> Self {
        let (device, controls) = Loopback::new(Shape::default()).unwrap();
        let machine = Machine::new().unwrap();
        let (function, owner, pci) = plug(&machine, kind, device, doors, &loopback);
        let transport = Transport::new(pci).unwrap();
        conformance::enable_msix(&transport);
        Self {
            machine,
            kind,
            function,
            owner,
            controls,
            transport,
            queues: Vec::new(),
            expected: HashMap::new(),
            serial: 0,
        }
    }

    /// The same, up to all queues enabled, but without DRIVER_OK.
    pub fn prepared(kind: Kind, doors: Doors, features: u64) -> Self {
        let mut rig = Self::untouched(kind, doors);
        rig.prepare(features);
        rig
    }

    /// The same, live.
    pub fn live(kind: Kind, doors: Doors, features: u64) -> Self {
        let rig = Self::prepared(kind, doors, features);
        rig.transport.start();
        rig.settle();
        rig
    }

    /// Resets the device and sets it up anew, up to all queues enabled. What was outstanding is forgotten.
    pub fn prepare(&mut self, features: u64) {
        self.negotiate(features);
        for queue in 0..self.queues.len() as u16 {
            self.enable(queue);
        }
    }

    /// The same, but with no queue enabled.
    pub fn negotiate(&mut self, features: u64) {
        let features = self.transport.negotiate(features).unwrap();
        self.transport.set_config_vector(0).unwrap();
        let event_index = features & feature::EVENT_IDX != 0;
        self.queues = (0..self.function.num_queues())
            .map(|index| {
                let size = self.transport.queue_size(index);
                let dma = self.machine.dma().clone();
                SplitQueue::new(dma, size, event_index).unwrap()
            })
            .collect();
        self.expected.clear();
    }

    /// Enables `queue`, with a vector of its own.
    pub fn enable(&self, queue: u16) {
        let layout = self.queues[usize::from(queue)].layout();
        let vector = 1 + queue;
        self.transport.enable_queue(queue, layout, vector).unwrap();
    }

    /// Resets the device and shows that it works from the start.
    pub fn start_over(&mut self, features: u64) {
        self.prepare(features);
        self.transport.start();
        self.echo(0);
        self.echo(1);
    }

    /// A function level reset, after which the machine and the driver set the function up as after power-on.
    pub fn function_level_reset(&self) {
        let express = find_capability(self.pci(), id::EXPRESS).unwrap().unwrap();
        let control = express.offset + 8;
        let old: u16 = self.pci().config(control);
        self.pci().set_config(control, old | 1 << 15);
        let switches = match self.kind {
            Kind::Plain => {
                self.machine.power_on().unwrap();
                command::MEMORY | command::BUS_MASTER
            }
            Kind::Member => command::BUS_MASTER,
        };
        change_command(self.pci(), switches, 0);
        assert!(!self.transport.msix().unwrap().is_enabled(self.pci()));
        conformance::enable_msix(&self.transport);
    }

    /// The PCI function.
    pub fn pci(&self) -> &Rc<dyn Function> {
        self.transport.function()
    }

    /// Lets the device work until it is idle.
    pub fn settle(&self) {
        assert!(self.machine.settle(), "the device never rests");
    }

    /// Makes a chain available on `queue` without a kick. Returns where its echo goes.
    pub fn lay(&mut self, queue: usize) -> u64 {
        self.serial += 1;
        let bytes: Vec<u8> = (self.serial..self.serial + 6)
            .flat_map(u32::to_le_bytes)
            .collect();
        let dma = self.machine.dma();
        let len = bytes.len() as u32;
        let from = dma.place(&bytes).unwrap();
        let to = dma.place(&vec![0xee; bytes.len()]).unwrap();
        let chain = [Buffer::readable(from, len), Buffer::writable(to, len)];
        let head = self.queues[queue].add(&chain).unwrap();
        // The device's wish is not asked: the callers kick always or never.
        let _ = self.queues[queue].publish();
        let old = self.expected.insert((queue, head), (to, bytes));
        assert_eq!(old, None, "the driver's own book-keeping");
        to
    }

    /// Makes a chain available on `queue`, with a kick whether it is wanted or not.
    pub fn submit(&mut self, queue: usize) -> u64 {
        let to = self.lay(queue);
        self.transport.notify(queue as u16);
        to
    }

    /// Has the device take a chain of `queue` and keep it. From then on it keeps what it fetches.
    pub fn occupy(&mut self, queue: usize) -> u64 {
        let held = self.controls.held();
        self.controls.hold(true);
        let to = self.submit(queue);
        self.settle();
        assert_eq!(self.controls.held(), held + 1);
        to
    }

    /// Lets all that the device keeps come back, and what it fetches from now on.
    pub fn release(&self) {
        self.controls.hold(false);
        self.controls.release(self.controls.held());
        self.settle();
    }

    /// Takes back what was used, and checks each echo; returns how many there were.
    pub fn collect(&mut self) -> usize {
        let mut count = 0;
        for (index, queue) in self.queues.iter_mut().enumerate() {
            while let Some(used) = queue.take().unwrap() {
                let (to, bytes) = self.expected.remove(&(index, used.head)).unwrap();
                assert_eq!(used.len as usize, bytes.len());
                assert_eq!(self.machine.dma().bytes(to, bytes.len()), bytes);
                count += 1;
            }
            queue.want_interrupts(true);
        }
        count
    }

    /// Chains that have not come back.
    pub fn outstanding(&self) -> usize {
        self.expected.len()
    }

    /// Lets the device work without a kick. All `count` that are outstanding come back, each once.
    pub fn all_come_back(&mut self, count: usize) {
        assert_eq!(self.outstanding(), count);
        self.settle();
        assert_eq!(self.collect(), count, "without a kick");
        self.settle();
        assert_eq!(self.collect(), 0);
        assert_eq!(self.outstanding(), 0);
    }

    /// A chain goes and its echo comes back, with a kick if the device wants one.
    pub fn echo(&mut self, queue: usize) {
        let before = self.outstanding();
        self.serial += 1;
        let bytes = self.serial.to_le_bytes().to_vec();
        let dma = self.machine.dma();
        let (from, to) = (dma.place(&bytes).unwrap(), dma.place(&[0; 4]).unwrap());
        let chain = [Buffer::readable(from, 4), Buffer::writable(to, 4)];
        let head = self.queues[queue].add(&chain).unwrap();
        self.expected.insert((queue, head), (to, bytes));
        if self.queues[queue].publish() {
            self.transport.notify(queue as u16);
        }
        self.settle();
        assert_eq!(self.collect(), 1, "no echo on queue {queue}");
        assert_eq!(self.outstanding(), before);
    }

    /// Registers of the device-state structure.
    pub fn state(&self) -> DeviceState<'_, Rc<dyn Function>> {
        self.transport
            .device_state()
            .expect("a device-state capability")
    }

    /// The vectors delivered since the last call.
    pub fn interrupts(&self) -> Vec<u16> {
        self.machine.msi().take_vectors()
    }

    /// All of memory, to be compared.
    pub fn memory(&self) -> Vec<u8> {
        self.machine.dma().bytes(0, RAM)
    }

    /// The byte strings a driver reads without changing anything: common configuration but for the status, device
    /// configuration, MSI-X pending bits and, if there is one, the device-state structure.
    pub fn registers(&self) -> Vec<Vec<u8>> {
        let msix = self.transport.msix().unwrap();
        let state = self.transport.device_state().map(|state| state.region());
        let regions = [
            Some(self.transport.common_region()),
            self.transport.device_region(),
            Some(msix.pending),
            state,
        ];
        let status = common::DEVICE_STATUS.offset;
        let read = |region: Region| {
            let skipped = |at| region == self.transport.common_region() && at == status;
            (0..region.len)
                .filter(|at| !skipped(*at))
                .map(|at| self.pci().get(region, Register::<u8>::at(at)))
                .collect()
        };
        regions.into_iter().flatten().map(read).collect()
    }

    /// The registers of queue `queue`, which is selected for it.
    pub fn queue_registers(&self, queue: u16) -> Vec<u8> {
        self.transport.select(queue);
        let region = self.transport.common_region();
        (22..64)
            .map(|at| self.pci().get(region, Register::<u8>::at(at)))
            .collect()
    }

    /// What would move with the function, its place in the rings included; without the status.
    pub fn place(&self) -> FunctionState {
        let mut state = self.function.save();
        state.registers.status = 0;
        state
    }

    /// Kicks every queue, by register and by doorbell.
    pub fn kick_all(&self) {
        for queue in 0..self.function.num_queues() {
            let place = self.notify_place(queue);
            self.pci().set(place, Register::<u16>::at(0), queue);
            let doorbell = self.function.kick_event(queue).unwrap();
            doorbell.write(1).expect("room in the counter");
        }
        self.settle();
    }

    /// Everything that could wake a stopped device: kicks by register and by doorbell, news from behind, bus mastering
    /// off and on, interrupts masked and unmasked, one by one and all at once.
    pub fn disturb(&self) {
        self.kick_all();
        self.controls.release(self.controls.held());
        self.settle();
        change_command(self.pci(), 0, command::BUS_MASTER);
        self.settle();
        change_command(self.pci(), command::BUS_MASTER, 0);
        self.settle();
        let msix = self.transport.msix().unwrap();
        for vector in 0..msix.vectors {
            msix.mask(self.pci(), vector, true);
            self.settle();
            msix.mask(self.pci(), vector, false);
        }
        msix.set_control(self.pci(), true, true);
        self.settle();
        msix.set_control(self.pci(), true, false);
        self.settle();
    }

    /// Where `queue` is notified. Queues are numbered like their notification registers, so that nothing has to be
    /// selected.
    fn notify_place(&self, queue: u16) -> Region {
        let notify = self.transport.notify_region();
        let unit = u64::from(self.transport.notify_multiplier());
        Region {
            offset: notify.offset + u64::from(queue) * unit,
            len: 2,
            ..notify
        }
    }

    /// Disturbs the device, and asserts that it does nothing: no byte of memory changes, no register, no place in a ring,
    /// and no interrupt comes.
    pub fn stays_still(&self) {
        let before = (self.memory(), self.registers(), self.place());
        self.interrupts();
        self.disturb();
        assert_eq!(self.interrupts(), conformance::QUIET);
        let after = (self.memory(), self.registers(), self.place());
        assert!(before.0 == after.0, "memory changed");
        assert_eq!(before.1, after.1);
        assert_eq!(before.2, after.2);
    }
}

/// Puts `device` into `machine`, and switches decoding and bus mastering on. The owner is that of a member;
/// it and a sibling of the member are `spare` devices.
pub fn plug(
    machine: &Machine,
    kind: Kind,
    device: Box<dyn VirtioDevice>,
    doors: Doors,
    spare: &dyn Fn() -> Box<dyn VirtioDevice>,
) -> (Arc<VirtioFunction>, Option<HostFunction>, Rc<dyn Function>) {
    match kind {
        Kind::Plain => {
            let plugged = machine.add_offering("device", device, Place::RootBus, doors);
            let plugged = plugged.unwrap();
            machine.power_on().unwrap();
            let pci = machine.function(machine.locate(&plugged));
            change_command(&pci, command::MEMORY | command::BUS_MASTER, 0);
            (plugged.function, None, Rc::new(pci))
        }
        Kind::Member => {
            let view = || machine.dma().ram().view().unwrap();
            let sibling = VirtioFunction::offering("vf1", spare(), view(), doors).unwrap();
            let function = VirtioFunction::offering("vf2", device, view(), doors).unwrap();
            let pf = own(machine, spare(), vec![sibling, Arc::clone(&function)]);
            let pci = VirtualFunction::new(&pf, 2).unwrap().unwrap();
            change_command(&pci, command::BUS_MASTER, 0);
            (function, Some(pf), Rc::new(pci))
        }
    }
}

fn loopback() -> Box<dyn VirtioDevice> {
    Loopback::new(Shape::default()).unwrap().0
}

/// Makes `members` the virtual functions of an owner behind a port of `machine`, and enables all of them.
fn own(
    machine: &Machine,
    device: Box<dyn VirtioDevice>,
    members: Vec<Arc<VirtioFunction>>,
) -> HostFunction {
    let count = members.len() as u16;
    let view = machine.dma().ram().view().unwrap();
    let group = members.iter().map(|vf| Arc::clone(vf) as _).collect();
    let owner = Owner::new(group, admin::Options::default()).unwrap();
    let pf = VirtioFunction::new_owner("pf", device, view, owner).unwrap();
    let options = owner::Options::default();
    let shown = OwnerPci::new(Arc::clone(&pf), members.clone(), machine.msi(), options);
    let port = machine.root().add_root_port(shown.unwrap()).unwrap();
    machine.power_on().unwrap();
    for function in members.iter().chain([&pf]) {
        machine.serve(function).unwrap();
    }
    let bridge = machine.function(Address {
        bus: 0,
        devfn: port.devfn.0,
    });
    let express = find_capability(&bridge, id::EXPRESS).unwrap().unwrap();
    bridge.set_config(express.offset + DEVICE_CONTROL_2, ARI_FORWARDING);
    let pf = machine.function(Address {
        bus: machine.root().secondary_bus(port).unwrap().0,
        devfn: 0,
    });
    change_command(&pf, command::MEMORY | command::BUS_MASTER, 0);
    let sriov = find_extended_capability(&pf, id::EXT_SRIOV)
        .unwrap()
        .unwrap();
    pf.set_config(sriov.offset + NUM_VFS, count);
    pf.set_config(sriov.offset + SRIOV_CONTROL, VFS_ON);
    pf
}

/// The functions and notification rules that most tests go through.
pub const CASES: [(Kind, u64); 4] = [
    (Kind::Plain, ALL),
    (Kind::Plain, SIMPLE),
    (Kind::Member, ALL),
    (Kind::Member, SIMPLE),
];

/// Calls `test` with a live device for each of [`CASES`].
pub fn for_each(doors: Doors, test: impl Fn(Rig)) {
    for (kind, features) in CASES {
        test(Rig::live(kind, doors, features));
    }
}
