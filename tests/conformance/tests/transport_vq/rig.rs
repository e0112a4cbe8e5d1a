//! A machine with a management device, its driver, and drivers of managed devices.

use std::sync::Arc;

use devices::transport_vq::{Manager, Options};
use devices::virtio::{Doors, Offer, Suspend, VirtioDevice, VirtioFunction};
use driver::access::{Dma, DmaExt};
use driver::host::{Controls, HostDma, HostFunction, Loopback, Machine, Plugged, Shape};
use driver::pci::{change_command, command as pci_command};
use driver::virtio::management::{Management, Wire, command};
use driver::virtio::{Buffer, Queue, Transport, feature};
use pci::virtio::{self, VirtioPci};

/// Features of a management device that has managed devices.
pub const MANAGES: u64 = 1 << 45 | 1 << 46;
/// Of managed devices: what makes tests simple.
pub const SIMPLE: u64 = feature::VERSION_1 | feature::RING_RESET;
/// The type of [`Loopback`]s.
pub const TYPE: u32 = 4;
/// The feature of [`Loopback`]s.
pub const OWN_FEATURE: u64 = 1 << 5;
/// Virtqueues of a [`Loopback`].
pub const QUEUES: u16 = 2;
/// A device can be suspended, by the fifth version of the proposal.
pub const SUSPEND: u64 = 1 << 42;
/// Where messages of managed devices go, by device and then queue.
pub const MESSAGES: u64 = 0xfee0_0000;

/// The machine, and the management device in it.
pub struct Rig {
    pub machine: Machine,
    pub manager: Plugged,
    /// Of the management device, and then of each seat, if these are [`Loopback`]s.
    pub controls: Vec<Controls>,
    /// What managed devices can be made of.
    pub seats: Vec<Arc<VirtioFunction>>,
}

/// The driver of the management device.
pub struct Live {
    pub transport: Transport<HostFunction>,
    pub management: Management<HostDma>,
}

/// A managed device that is driven: its queues, and where they are kicked.
pub struct Device {
    pub id: u64,
    pub queues: Vec<Queue<HostDma>>,
    doorbells: Vec<u64>,
    /// Where each chain's answer goes, by queue and head.
    answers: Vec<(u16, u16, u64, u32)>,
}

impl Rig {
    /// With `seats` [`Loopback`]s.
    pub fn new(seats: usize) -> Self {
        Self::with(seats, Options::default())
    }

    pub fn with(seats: usize, options: Options) -> Self {
        Self::in_machine(Machine::new().unwrap(), seats, options)
    }

    /// The same in an empty machine.
    pub fn in_machine(machine: Machine, seats: usize, options: Options) -> Self {
        let loopback = || Loopback::new(Shape::default()).unwrap();
        let (own, of_it) = loopback();
        let mut controls = vec![of_it];
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for _ in 0..seats {
            let (device, of_it) = loopback();
            controls.push(of_it);
            devices.push(device);
        }
        let mut rig = Self::of(machine, own, devices, options);
        rig.controls = controls;
        rig
    }

    /// With any devices, in an empty machine. All may have packed rings.
    pub fn of(
        machine: Machine,
        own: Box<dyn VirtioDevice>,
        devices: Vec<Box<dyn VirtioDevice>>,
        options: Options,
    ) -> Self {
        let view = || machine.dma().ram().view().unwrap();
        let offer = Offer {
            packed: true,
            doors: Doors {
                suspend: Some(Suspend::V5),
                ..Doors::default()
            },
        };
        let mut seats = Vec::new();
        for (index, device) in devices.into_iter().enumerate() {
            let name = format!("manager-device{}", index + 1);
            seats.push(VirtioFunction::offering(name, device, view(), offer).unwrap());
        }
        let manager = Manager::new(seats.clone(), machine.msi(), options).unwrap();
        let function = VirtioFunction::new_manager("manager", own, view(), manager, true).unwrap();
        let pci = VirtioPci::new(
            Arc::clone(&function),
            machine.msi(),
            virtio::Options::ROOT_BUS,
        );
        let place = machine.root().add_endpoint(pci.unwrap()).unwrap();
        machine.serve(&function).unwrap();
        for seat in &seats {
            machine.serve(seat).unwrap();
        }
        machine.power_on().unwrap();
        let manager = Plugged::new(function, place);
        let rig = Self {
            machine,
            manager,
            controls: Vec::new(),
            seats,
        };
        let decode = pci_command::MEMORY | pci_command::BUS_MASTER;
        change_command(&rig.function(), decode, 0);
        rig
    }

    /// The management device on the bus.
    pub fn function(&self) -> HostFunction {
        self.machine.function(self.machine.locate(&self.manager))
    }

    /// A driver of the management device, live.
    pub fn live(&self) -> Live {
        self.live_with(MANAGES | SIMPLE, Wire::Aligned)
    }

    pub fn live_with(&self, features: u64, wire: Wire) -> Live {
        let transport = Transport::new(self.function()).unwrap();
        transport.negotiate(features).unwrap();
        let management = Management::new(&transport, self.machine.dma().clone(), wire).unwrap();
        transport.start();
        Live {
            transport,
            management,
        }
    }

    /// A live device with `features`, whose queues interrupt with data of its id and their index.
    pub fn device(&self, live: &mut Live, features: u64) -> Device {
        let offered = OWN_FEATURE | features;
        let id = live.create(offered);
        let mut device = self.set_up(live, id, features);
        live.management.start(&live.transport, id).unwrap();
        device.find_doorbells(live);
        self.machine.settle();
        device
    }

    /// A device at FEATURES_OK, with its queues enabled.
    pub fn set_up(&self, live: &mut Live, id: u64, features: u64) -> Device {
        let Live {
            transport,
            management,
        } = live;
        let features = management.negotiate(transport, id, features).unwrap();
        let mut queues = Vec::new();
        for index in 0..QUEUES {
            let size = if index == 0 { 16 } else { 8 };
            let queue = Queue::new(self.machine.dma().clone(), size, features).unwrap();
            let message = (MESSAGES | id << 12, u32::from(index));
            management
                .enable_interrupt(transport, id, index, message.0, message.1)
                .unwrap();
            management
                .enable_queue(transport, id, index, &queue.layout())
                .unwrap();
            queues.push(queue);
        }
        Device {
            id,
            queues,
            doorbells: Vec::new(),
            answers: Vec::new(),
        }
    }

    /// Messages of managed devices since the last call: address and data.
    pub fn messages(&self) -> Vec<(u64, u32)> {
        self.machine.settle();
        let delivered = self.machine.msi().take();
        let messages = delivered.iter().filter_map(|d| d.message);
        messages.map(|m| (m.address, m.data)).collect()
    }

    /// Has `device` copy `bytes` on `queue`, and forgets the messages.
    pub fn echoes(&self, device: &mut Device, queue: u16, bytes: &[u8]) {
        device.submit(self, queue, bytes);
        self.machine.settle();
        assert_eq!(device.take(self, queue).as_deref(), Some(bytes));
        self.messages();
    }
}

impl Live {
    /// The same driver in `rig`, where its device was moved.
    pub fn moved(self, rig: &Rig) -> Self {
        Self {
            transport: Transport::new(rig.function()).unwrap(),
            management: self.management,
        }
    }

    /// Sets its virtqueue up anew, after that was reset.
    pub fn renew(&mut self, rig: &Rig) {
        let (dma, wire) = (rig.machine.dma().clone(), self.management.wire());
        self.management = Management::new(&self.transport, dma, wire).unwrap();
    }

    /// Executes a command: command-in-data, or the code of an error.
    pub fn call(&mut self, device: u64, command: (u16, u16), data: &[u8]) -> Result<Vec<u8>, u8> {
        self.management
            .call(&self.transport, device, command, data)
            .unwrap()
    }

    /// A device that offers these features.
    pub fn create(&mut self, features: u64) -> u64 {
        self.management
            .create(&self.transport, TYPE, features, &[])
            .unwrap()
    }

    pub fn status(&mut self, id: u64) -> u8 {
        self.management.status(&self.transport, id).unwrap()
    }

    pub fn set_status(&mut self, id: u64, value: u8) {
        self.management
            .set_status(&self.transport, id, value)
            .unwrap();
    }

    /// The answer to a command whose out data is the index of a queue, or begins with it.
    pub fn of_queue(&mut self, id: u64, command: (u16, u16), queue: u16) -> Result<Vec<u8>, u8> {
        let data = self.management.out().half(queue).bytes();
        self.call(id, command, &data)
    }

    /// A command whose out data is an index and a byte.
    pub fn switch(
        &mut self,
        id: u64,
        command: (u16, u16),
        queue: u16,
        value: u8,
    ) -> Result<Vec<u8>, u8> {
        let data = self.management.out().half(queue).byte(value).bytes();
        self.call(id, command, &data)
    }

    /// num_avail_vqs, min_mdev_vqs, max_mdev_vqs, num_avail_mdev.
    pub fn resources(&mut self) -> [u16; 4] {
        let answer = self.call(0, command::AVAIL_RES_GET, &[]).unwrap();
        halves(&answer).try_into().unwrap()
    }

    /// Guest physical address of a doorbell.
    pub fn doorbell(&mut self, id: u64, queue: u16) -> u64 {
        let offset = self
            .management
            .doorbell(&self.transport, id, queue)
            .unwrap();
        self.transport.function().bar_address(0, offset)
    }
}

impl Device {
    /// Asks where its queues are kicked.
    pub fn find_doorbells(&mut self, live: &mut Live) {
        let queues = 0..QUEUES;
        self.doorbells = queues.map(|queue| live.doorbell(self.id, queue)).collect();
    }

    /// Has the device copy `bytes`, and kicks it if it wants to be.
    pub fn submit(&mut self, rig: &Rig, queue: u16, bytes: &[u8]) {
        let dma = rig.machine.dma();
        let from = dma.allocate(bytes.len(), 16).unwrap();
        let to = dma.allocate(bytes.len(), 16).unwrap();
        dma.write(from, bytes);
        let len = bytes.len() as u32;
        let chain = [Buffer::readable(from, len), Buffer::writable(to, len)];
        let ring = &mut self.queues[usize::from(queue)];
        let head = ring.add(&chain).unwrap();
        let wanted = ring.publish();
        self.answers.push((queue, head, to, len));
        if wanted && let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            rig.machine.write(*doorbell, &queue.to_le_bytes());
        }
    }

    /// The answer on `queue` that came first, if one did.
    pub fn take(&mut self, rig: &Rig, queue: u16) -> Option<Vec<u8>> {
        let used = self.queues[usize::from(queue)].take().unwrap()?;
        let is_it = |answer: &(u16, u16, u64, u32)| (answer.0, answer.1) == (queue, used.head);
        let at = self.answers.iter().position(is_it).unwrap();
        let (.., to, len) = self.answers.remove(at);
        assert_eq!(used.len, len);
        Some(rig.machine.dma().bytes(to, len as usize))
    }

    /// Has another ring from now on.
    pub fn replace_queue(&mut self, queue: u16, ring: Queue<HostDma>) {
        self.queues[usize::from(queue)] = ring;
        self.answers.retain(|answer| answer.0 != queue);
    }

    /// Where queue `queue` is kicked.
    pub fn doorbell(&self, queue: u16) -> u64 {
        self.doorbells[usize::from(queue)]
    }
}

/// The half words of an answer.
pub fn halves(answer: &[u8]) -> Vec<u16> {
    let (pairs, _) = answer.as_chunks();
    pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect()
}
