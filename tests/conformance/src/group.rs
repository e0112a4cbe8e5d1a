//! A machine with an owner behind a root port, and the driver's view of its functions.

use std::sync::Arc;
use std::time::Duration;

use devices::admin::{Options, Owner};
use devices::virtio::{Doors, VirtioDevice, VirtioFunction};
use driver::access::{DmaExt, Function, FunctionExt};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Shape, VirtualFunction};
use driver::pci::{
    Address, change_command, command, find_capability, find_extended_capability, header, id,
};
use driver::virtio::{Buffer, SplitQueue, Transport, Used, feature};
use pci::owner::{self, OwnerPci};

/// How long a device may take that works on a thread of its own.
const PATIENCE: Duration = Duration::from_secs(30);

/// Feature of an owner: it has virtual functions.
pub const SR_IOV: u64 = feature::SR_IOV;
/// Feature of an owner: it has administration queues.
pub const ADMIN_VQ: u64 = feature::ADMIN_VQ;

/// Registers of the SR-IOV capability, by byte offset.
pub mod sriov {
    /// SR-IOV Control.
    pub const CONTROL: u16 = 0x08;
    /// InitialVFs.
    pub const INITIAL_VFS: u16 = 0x0c;
    /// TotalVFs.
    pub const TOTAL_VFS: u16 = 0x0e;
    /// NumVFs.
    pub const NUM_VFS: u16 = 0x10;
    /// Function Dependency Link.
    pub const FUNCTION_LINK: u16 = 0x12;
    /// First VF Offset.
    pub const FIRST_VF_OFFSET: u16 = 0x14;
    /// VF Stride.
    pub const VF_STRIDE: u16 = 0x16;
    /// VF Device ID.
    pub const VF_DEVICE_ID: u16 = 0x1a;
    /// Supported Page Sizes.
    pub const SUPPORTED_PAGES: u16 = 0x1c;
    /// System Page Size.
    pub const SYSTEM_PAGE: u16 = 0x20;
    /// In SR-IOV Control: VF Enable, VF MSE, ARI Capable Hierarchy.
    pub const ON: u16 = 0x19;
    /// In SR-IOV Control: the last of these alone.
    pub const OFF: u16 = 0x10;
}

/// Device Control 2 of a port: ARI forwarding.
const DEVICE_CONTROL_2: u16 = 0x28;
const ARI_FORWARDING: u16 = 1 << 5;

/// The devices of a group: all of them of one type.
pub struct Devices {
    /// Of the PF.
    pub pf: Box<dyn VirtioDevice>,
    /// Of the VFs, and the doors they offer their drivers.
    pub vfs: Vec<(Box<dyn VirtioDevice>, Doors)>,
}

/// The machine with its group.
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    /// The owner behind the PF.
    pub owner: Arc<Owner>,
    /// The PF and its VFs.
    pub functions: Vec<Arc<VirtioFunction>>,
    /// The controls of their devices, if these are [`Loopback`]s.
    pub controls: Vec<Controls>,
    bus: u8,
}

impl Rig {
    /// An owner with `vfs` members, powered on, with memory decoding and bus mastering of the PF enabled and ARI
    /// forwarding in the port above it. All devices are [`Loopback`]s.
    pub fn new(vfs: usize, options: Options) -> Self {
        Self::with_doors(&vec![Doors::default(); vfs], options)
    }

    /// The same, with VFs that offer these doors.
    pub fn with_doors(doors: &[Doors], options: Options) -> Self {
        let loopback = || Loopback::new(Shape::default()).unwrap();
        let (pf, pf_controls) = loopback();
        let mut controls = vec![pf_controls];
        let mut vfs: Vec<(Box<dyn VirtioDevice>, Doors)> = Vec::new();
        for doors in doors {
            let (device, of_it) = loopback();
            vfs.push((device, *doors));
            controls.push(of_it);
        }
        let machine = Machine::new().unwrap();
        let mut rig = Self::of(machine, Devices { pf, vfs }, options);
        rig.controls = controls;
        rig
    }

    /// The same for any devices, in an empty `machine`.
    pub fn of(machine: Machine, devices: Devices, options: Options) -> Self {
        let view = || machine.dma().ram().view().unwrap();
        let mut members = Vec::new();
        for (index, (device, doors)) in devices.vfs.into_iter().enumerate() {
            let name = format!("vf{}", index + 1);
            members.push(VirtioFunction::offering(name, device, view(), doors).unwrap());
        }
        let group = members.iter().map(|vf| Arc::clone(vf) as _).collect();
        let owner = Owner::new(group, options).unwrap();
        let pf = VirtioFunction::new_owner("pf", devices.pf, view(), Arc::clone(&owner)).unwrap();
        let shown = OwnerPci::new(
            Arc::clone(&pf),
            members.clone(),
            machine.msi(),
            owner::Options::default(),
        );
        let port = machine.root().add_root_port(shown.unwrap()).unwrap();
        machine.power_on().unwrap();
        let functions: Vec<_> = [pf].into_iter().chain(members).collect();
        for function in &functions {
            machine.serve(function).unwrap();
        }
        let bus = machine.root().secondary_bus(port).unwrap().0;
        let rig = Self {
            machine,
            owner,
            functions,
            controls: Vec::new(),
            bus,
        };
        let port = rig.machine.function(Address {
            bus: 0,
            devfn: port.devfn.0,
        });
        let express = find_capability(&port, id::EXPRESS).unwrap().unwrap();
        port.set_config(express.offset + DEVICE_CONTROL_2, ARI_FORWARDING);
        change_command(&rig.at(0), command::MEMORY | command::BUS_MASTER, 0);
        rig
    }

    /// Whatever is at `devfn` of the owner's bus.
    pub fn at(&self, devfn: u8) -> HostFunction {
        self.machine.function(Address {
            bus: self.bus,
            devfn,
        })
    }

    /// Where register `at` of the SR-IOV capability is.
    pub fn sriov(&self, at: u16) -> u16 {
        let found = find_extended_capability(&self.at(0), id::EXT_SRIOV);
        found.unwrap().unwrap().offset + at
    }

    /// Enables `vfs` VFs, as a driver does.
    pub fn enable(&self, vfs: u16) {
        self.at(0).set_config(self.sriov(sriov::NUM_VFS), vfs);
        self.at(0).set_config(self.sriov(sriov::CONTROL), sriov::ON);
    }

    /// Disables all VFs.
    pub fn disable(&self) {
        self.at(0)
            .set_config(self.sriov(sriov::CONTROL), sriov::OFF);
        self.at(0).set_config(self.sriov(sriov::NUM_VFS), 0u16);
    }

    /// The places after the PF at which a function answers.
    pub fn answering(&self) -> Vec<u8> {
        let there = |devfn: &u8| {
            let class: u32 = self.at(*devfn).config(header::REVISION);
            class != u32::MAX
        };
        (1..=255).filter(there).collect()
    }

    /// VF `index`, from 1, as a driver reaches it.
    pub fn vf(&self, index: u8) -> VirtualFunction {
        VirtualFunction::new(&self.at(0), index).unwrap().unwrap()
    }

    /// A driver of `function` with `features`, all queues enabled, and the administration queue if it has one. It notifies
    /// by index if the features say so.
    pub fn drive<F: Function + Clone>(&self, function: F, features: u64) -> Live<F> {
        change_command(&function, command::BUS_MASTER, 0);
        let transport = Transport::new(function).unwrap();
        let features = transport.negotiate(features).unwrap();
        crate::enable_msix(&transport);
        transport.set_config_vector(0).unwrap();
        let mut count: u16 = transport.get(driver::virtio::common::NUM_QUEUES);
        if features & ADMIN_VQ != 0 {
            let index: u16 = transport.get(driver::virtio::common::ADMIN_QUEUE_INDEX);
            let num: u16 = transport.get(driver::virtio::common::ADMIN_QUEUE_NUM);
            assert!(index >= count && num >= 1, "B-9");
            count = index + 1;
        }
        let event_index = features & feature::EVENT_IDX != 0;
        let queues = (0..count).map(|index| {
            let size = transport.queue_size(index);
            let queue = SplitQueue::new(self.machine.dma().clone(), size, event_index).unwrap();
            let vector = 1 + index;
            transport
                .enable_queue(index, queue.layout(), vector)
                .unwrap();
            queue
        });
        let queues = queues.collect();
        transport.start();
        self.machine.settle();
        Live {
            machine: self.machine.clone(),
            transport,
            queues,
        }
    }
}

/// A driver and a function that is live.
pub struct Live<F> {
    /// The machine it is in.
    pub machine: Machine,
    /// The transport.
    pub transport: Transport<F>,
    /// The queues.
    pub queues: Vec<SplitQueue<HostDma>>,
}

impl<F: Function> Live<F> {
    /// Makes a chain of `out` and `room` writable bytes available on `queue`; returns where the answer goes.
    pub fn submit(&mut self, queue: usize, out: &[u8], room: u32) -> u64 {
        let dma = self.machine.dma();
        let from = dma.place(out).unwrap();
        let to = dma.place(&vec![0xee; room as usize]).unwrap();
        let chain = [
            Buffer::readable(from, out.len() as u32),
            Buffer::writable(to, room),
        ];
        self.queues[queue].add(&chain).unwrap();
        if self.queues[queue].publish() {
            self.transport.notify(queue as u16);
        }
        to
    }

    /// Lets everything work; the used length of the chain that came back on `queue`, if one did.
    pub fn complete(&mut self, queue: usize) -> Option<u32> {
        self.machine.settle();
        self.queues[queue].take().unwrap().map(|used| used.len)
    }

    /// Waits until `count` chains came back on `queue`, in this order.
    pub fn collect(&mut self, queue: usize, count: usize) -> Vec<Used> {
        let mut used = Vec::new();
        let function = self.transport.function();
        let done = function.wait_until(PATIENCE, || {
            used.extend(std::iter::from_fn(|| self.queues[queue].take().unwrap()));
            used.len() >= count
        });
        assert!(done, "{} of {count} chains came back", used.len());
        used
    }

    /// Submits a chain and waits for it; returns what was written.
    pub fn request(&mut self, queue: usize, out: &[u8], room: u32) -> Vec<u8> {
        let to = self.submit(queue, out, room);
        let len = self.complete(queue).expect("the chain comes back");
        self.machine.dma().bytes(to, len as usize)
    }
}
