//! What the conformance tests share: a machine with one device in it, and a driver for it.
//!
//! The tests themselves are in `tests/`, a file per subject. The name of a test starts with the requirement it holds,
//! and a line `Requirements: E1, B-51` in its documentation lists all of them, for the table in
//! `docs/conformance.md`.

// A rig states what must hold, like the tests it is part of.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod group;

use devices::virtio::Offer;
use driver::access::{DmaExt, Function, FunctionExt};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Place, Plugged, Shape};
use driver::pci::{Address, VectorEntry, change_command, command};
use driver::virtio::{Buffer, SplitQueue, Transport, feature, status};

/// Everything the core offers for every device.
pub const ALL: u64 =
    feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX | feature::RING_RESET;
/// Without the event index, where interrupts are simple: one for each time the device looks at its rings.
pub const SIMPLE: u64 = feature::VERSION_1 | feature::INDIRECT_DESC | feature::RING_RESET;

/// No vectors at all.
pub const QUIET: [u16; 0] = [];

/// Where interrupts go: the message address of every vector.
pub const MESSAGE_ADDRESS: u64 = 0xfee0_0000;

/// The message data of `vector`.
pub fn message_data(vector: u16) -> u32 {
    0x40 + u32::from(vector)
}

/// A machine with one device.
pub struct Rig {
    /// The machine.
    pub machine: Machine,
    /// The device's function, behind the registers.
    pub plugged: Plugged,
    /// The device's controls.
    pub controls: Controls,
    /// Where the device is.
    pub address: Address,
}

impl Rig {
    /// A device of `shape` at `place`, powered on, with memory decoding and bus mastering enabled.
    pub fn with(shape: Shape, place: Place) -> Self {
        Self::offering(shape, place, Offer::default())
    }

    /// One that offers its driver more.
    pub fn offering(shape: Shape, place: Place, offer: Offer) -> Self {
        let machine = Machine::new().unwrap();
        let (device, controls) = Loopback::new(shape).unwrap();
        let plugged = machine
            .add_offering("device", device, place, offer)
            .unwrap();
        machine.power_on().unwrap();
        let address = machine.locate(&plugged);
        let rig = Self {
            machine,
            plugged,
            controls,
            address,
        };
        change_command(&rig.function(), command::MEMORY | command::BUS_MASTER, 0);
        rig
    }

    /// The usual device, on the root bus.
    pub fn new() -> Self {
        Self::with(Shape::default(), Place::RootBus)
    }

    /// The device's PCI function.
    pub fn function(&self) -> HostFunction {
        self.machine.function(self.address)
    }

    /// The device's transport.
    pub fn transport(&self) -> Transport<HostFunction> {
        Transport::new(self.function()).unwrap()
    }

    /// A driver that has set the device going with those of `features` that it offers: all queues enabled, and MSI-X
    /// with vector 0 for the configuration and `1 + q` for queue `q`.
    pub fn live(&self, features: u64) -> Live<'_> {
        let transport = self.transport();
        let features = transport.negotiate(features).unwrap();
        enable_msix(&transport);
        transport.set_config_vector(0).unwrap();
        let event_index = features & feature::EVENT_IDX != 0;
        let queues: Vec<_> = (0..self.plugged.function.num_queues())
            .map(|index| {
                let size = transport.queue_size(index);
                let queue = SplitQueue::new(self.machine.dma().clone(), size, event_index).unwrap();
                transport
                    .enable_queue(index, queue.layout(), 1 + index)
                    .unwrap();
                queue
            })
            .collect();
        transport.start();
        self.settle();
        Live {
            rig: self,
            transport,
            queues,
        }
    }

    /// Lets the device work until it is idle.
    pub fn settle(&self) {
        assert!(self.machine.settle(), "the device never rests");
    }
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

/// Programs every vector, unmasked, and turns MSI-X on.
pub fn enable_msix<F: Function>(transport: &Transport<F>) {
    let msix = transport.msix().unwrap();
    for vector in 0..msix.vectors {
        let entry = VectorEntry {
            address: MESSAGE_ADDRESS,
            data: message_data(vector),
            masked: false,
        };
        msix.set_entry(transport.function(), vector, entry);
    }
    msix.set_control(transport.function(), true, false);
}

/// A driver and a device that is live.
pub struct Live<'a> {
    /// The rig.
    pub rig: &'a Rig,
    /// The transport.
    pub transport: Transport<HostFunction>,
    /// The queues.
    pub queues: Vec<SplitQueue<HostDma>>,
}

impl Live<'_> {
    /// Adds a chain that the device is to echo, without showing it: `bytes`, and room for them. Returns where the
    /// echo goes.
    pub fn add(&mut self, queue: u16, bytes: &[u8]) -> u64 {
        let dma = self.rig.machine.dma();
        let len = bytes.len() as u32;
        let (from, to) = (
            dma.place(bytes).unwrap(),
            dma.place(&vec![0; bytes.len()]).unwrap(),
        );
        let chain = [Buffer::readable(from, len), Buffer::writable(to, len)];
        self.queues[usize::from(queue)].add(&chain).unwrap();
        to
    }

    /// Shows the device what was added, and notifies it if it wants that.
    pub fn publish(&mut self, queue: u16) {
        if self.queues[usize::from(queue)].publish() {
            self.transport.notify(queue);
        }
    }

    /// Adds and shows a chain, without letting the device work.
    pub fn submit(&mut self, queue: u16, bytes: &[u8]) -> u64 {
        let to = self.add(queue, bytes);
        self.publish(queue);
        to
    }

    /// Lets the device work; returns how many chains came back on `queue`.
    pub fn complete(&mut self, queue: u16) -> usize {
        self.rig.settle();
        let queue = &mut self.queues[usize::from(queue)];
        std::iter::from_fn(|| queue.take().unwrap()).count()
    }

    /// Submits a chain, lets the device work, and asserts that the echo came back.
    pub fn echo(&mut self, queue: u16, bytes: &[u8]) {
        let to = self.submit(queue, bytes);
        assert_eq!(self.complete(queue), 1, "no echo on queue {queue}");
        assert_eq!(self.rig.machine.dma().bytes(to, bytes.len()), bytes);
    }

    /// The vectors delivered since the last call.
    pub fn interrupts(&self) -> Vec<u16> {
        self.rig.machine.msi().take_vectors()
    }

    /// True if the device asks for a reset.
    pub fn needs_reset(&self) -> bool {
        self.transport.status() & status::NEEDS_RESET != 0
    }
}

/// Reads a capability or register of `function` as a byte string, for comparing before and after.
pub fn config_bytes(function: &impl Function, range: std::ops::Range<u16>) -> Vec<u8> {
    range.map(|at| function.config::<u8>(at)).collect()
}
