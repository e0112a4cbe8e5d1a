//! A machine with an owner behind a root port, and the driver's view of its functions.

use std::sync::Arc;

use devices::admin::{Options, Owner};
use devices::virtio::VirtioFunction;
use driver::access::{DmaExt, Function, FunctionExt};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Shape, VirtualFunction};
use driver::pci::{
    Address, change_command, command, find_capability, find_extended_capability, header, id,
};
use driver::virtio::{Buffer, SplitQueue, Transport, feature};
use pci::owner::{self, OwnerPci};

/// Features of an owner.
pub const SR_IOV: u64 = feature::SR_IOV;
pub const ADMIN_VQ: u64 = feature::ADMIN_VQ;

/// Registers of the SR-IOV capability, by byte offset.
pub mod sriov {
    pub const CONTROL: u16 = 0x08;
    pub const INITIAL_VFS: u16 = 0x0c;
    pub const TOTAL_VFS: u16 = 0x0e;
    pub const NUM_VFS: u16 = 0x10;
    pub const FUNCTION_LINK: u16 = 0x12;
    pub const FIRST_VF_OFFSET: u16 = 0x14;
    pub const VF_STRIDE: u16 = 0x16;
    pub const VF_DEVICE_ID: u16 = 0x1a;
    pub const SUPPORTED_PAGES: u16 = 0x1c;
    pub const SYSTEM_PAGE: u16 = 0x20;
    /// VF Enable, VF MSE, ARI Capable Hierarchy.
    pub const ON: u16 = 0x19;
    pub const OFF: u16 = 0x10;
}

/// Device Control 2 of a port: ARI forwarding.
const DEVICE_CONTROL_2: u16 = 0x28;
const ARI_FORWARDING: u16 = 1 << 5;

/// The machine.
pub struct Rig {
    pub machine: Machine,
    pub owner: Arc<Owner>,
    /// The PF and its VFs, and the controls of their devices.
    pub functions: Vec<(Arc<VirtioFunction>, Controls)>,
    bus: u8,
}

impl Rig {
    /// An owner with `vfs` members, powered on, with memory decoding and bus mastering of the PF enabled and ARI
    /// forwarding in the port above it.
    pub fn new(vfs: usize, options: Options) -> Self {
        let machine = Machine::new().unwrap();
        let view = || machine.dma().ram().view().unwrap();
        let (pf_device, pf_controls) = Loopback::new(Shape::default()).unwrap();
        let mut functions = Vec::new();
        for index in 1..=vfs {
            let (device, controls) = Loopback::new(Shape::default()).unwrap();
            let function = VirtioFunction::new(format!("vf{index}"), device, view()).unwrap();
            functions.push((function, controls));
        }
        let members = functions.iter().map(|(vf, _)| Arc::clone(vf));
        let members: Vec<_> = members.collect();
        let group = members.iter().map(|vf| Arc::clone(vf) as _).collect();
        let owner = Owner::new(group, options).unwrap();
        let pf = VirtioFunction::new_owner("pf", pf_device, view(), Arc::clone(&owner)).unwrap();
        let shown = OwnerPci::new(
            Arc::clone(&pf),
            members,
            machine.msi(),
            owner::Options::default(),
        );
        let port = machine.root().add_root_port(shown.unwrap()).unwrap();
        machine.power_on().unwrap();
        functions.insert(0, (pf, pf_controls));
        for (function, _) in &functions {
            machine.serve(function).unwrap();
        }
        let bus = machine.root().secondary_bus(port).unwrap().0;
        let rig = Self {
            machine,
            owner,
            functions,
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

    /// A driver of `function` with `features`, all queues enabled, and the administration queue if it has one.
    pub fn drive<F: Function + Clone>(&self, function: F, features: u64) -> Live<F> {
        change_command(&function, command::BUS_MASTER, 0);
        let transport = Transport::new(function).unwrap();
        let features = transport.negotiate(features).unwrap();
        enable_vectors(&transport);
        transport.set_config_vector(0).unwrap();
        let mut count: u16 = transport.get(driver::virtio::common::NUM_QUEUES);
        if features & ADMIN_VQ != 0 {
            let index: u16 = transport.get(driver::virtio::common::ADMIN_QUEUE_INDEX);
            let num: u16 = transport.get(driver::virtio::common::ADMIN_QUEUE_NUM);
            assert!(index >= count && num >= 1, "B-9");
            count = index + 1;
        }
        let queues = (0..count).map(|index| {
            let size = transport.queue_size(index);
            let queue = SplitQueue::new(self.machine.dma().clone(), size, false).unwrap();
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

/// Programs every vector, unmasked, and turns MSI-X on.
fn enable_vectors<F: Function>(transport: &Transport<F>) {
    let msix = transport.msix().unwrap();
    for vector in 0..msix.vectors {
        let entry = driver::pci::VectorEntry {
            address: conformance::MESSAGE_ADDRESS,
            data: conformance::message_data(vector),
            masked: false,
        };
        msix.set_entry(transport.function(), vector, entry);
    }
    msix.set_control(transport.function(), true, false);
}

/// A driver and a function that is live.
pub struct Live<F> {
    pub machine: Machine,
    pub transport: Transport<F>,
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

    /// Submits a chain and waits for it; returns what was written.
    pub fn request(&mut self, queue: usize, out: &[u8], room: u32) -> Vec<u8> {
        let to = self.submit(queue, out, room);
        let len = self.complete(queue).expect("the chain comes back");
        self.machine.dma().bytes(to, len as usize)
    }
}
