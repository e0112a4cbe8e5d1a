//! Managed devices in use, saved and moved into another machine.

use std::path::Path;
use std::time::Duration;

use driver::access::{Dma, DmaExt, FunctionExt};
use driver::host::HostDma;
use driver::virtio::management::{Management, Wire, command};
use driver::virtio::{Buffer, Queue, Transport, feature};
use vmm::config::Config;
use vmm::snapshot::format::state::State;

use super::rig::{Seat, World, file, spec};

/// Features of a management device.
const MANAGES: u64 = 1 << 45 | 1 << 46;
/// Virtio device types.
const NET: u32 = 1;
const BLOCK: u32 = 2;
/// Bytes of a disk.
const DISK: u64 = 64 << 10;
/// How long a device may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where messages go.
const MESSAGE: (u64, u32) = (0xfee0_0000, 0x41);

/// The driver of a management device.
struct Manager {
    transport: Transport<Seat>,
    management: Management<HostDma>,
}

/// A machine with two management devices; of the disks one is in use with a message that waits behind its mask, and one was
/// made and not touched since; of the cards one has packed rings.
pub struct Managed {
    pub world: World,
    disks: Manager,
    nets: Manager,
    disk: (u64, Queue<HostDma>),
    card: (u64, Queue<HostDma>),
    untouched: u64,
    /// Where a request of the disk is.
    request: u64,
}

fn manager(world: &mut World, place: u8) -> Manager {
    let memory = world.memory.clone();
    let seat = world.device(0, place);
    let transport = Transport::new(seat).unwrap();
    transport.negotiate(MANAGES | feature::VERSION_1).unwrap();
    let management = Management::new(&transport, memory, Wire::Aligned).unwrap();
    transport.start();
    Manager {
        transport,
        management,
    }
}

impl Manager {
    /// A live device, of whose virtqueues the last one has a ring and interrupts.
    fn device(&mut self, dma: &HostDma, kind: u32, more: u64, last: u16) -> (u64, Queue<HostDma>) {
        let Self {
            transport,
            management,
        } = self;
        let features = feature::VERSION_1 | more;
        let id = management.create(transport, kind, features, &[]).unwrap();
        management.negotiate(transport, id, features).unwrap();
        let queue = Queue::new(dma.clone(), 16, features).unwrap();
        management
            .enable_interrupt(transport, id, last, MESSAGE.0, MESSAGE.1)
            .unwrap();
        management
            .enable_queue(transport, id, last, &queue.layout())
            .unwrap();
        management.start(transport, id).unwrap();
        (id, queue)
    }

    /// Kicks a queue.
    fn kick(&mut self, id: u64, queue: u16) {
        let doorbell = self.management.doorbell(&self.transport, id, queue);
        let function = self.transport.function();
        driver::access::Function::write_bar(function, 0, doorbell.unwrap(), &queue.to_le_bytes());
        driver::access::Function::relax(function);
    }

    fn mask(&mut self, id: u64, value: u8) {
        let data = self.management.out().half(0).byte(value).bytes();
        self.management
            .execute(&self.transport, id, command::MASK_QUEUE_MSI, &data)
            .unwrap();
    }
}

impl Managed {
    pub fn new(dir: &Path) -> Self {
        for number in 0..=2 {
            file(&dir.join(format!("made{number}.raw")), DISK);
        }
        let disks = format!("block,devices=2,path={}/made%d.raw", dir.display());
        let mut world = World::new(spec(Config {
            managers: vec![
                disks.parse().unwrap(),
                "net,devices=2,packed,mac=02:00:00:00:00:01"
                    .parse()
                    .unwrap(),
            ],
            rng: Some(false),
            ..Config::default()
        }));
        let memory = world.memory.clone();
        let mut disks = manager(&mut world, 1);
        let mut nets = manager(&mut world, 2);
        let disk = disks.device(&memory, BLOCK, 0, 0);
        let untouched = disks
            .management
            .create(&disks.transport, BLOCK, feature::VERSION_1, &[]);
        let card = nets.device(&memory, NET, feature::RING_PACKED, 1);
        let mut managed = Self {
            world,
            disk,
            card,
            untouched: untouched.unwrap(),
            disks,
            nets,
            request: memory.allocate(512 + 17, 16).unwrap(),
        };
        managed.send();
        managed.read(0);
        managed.disks.mask(managed.disk.0, 0);
        managed.read(1);
        managed
    }

    /// Reads a sector of zeroes.
    fn read(&mut self, sector: u64) {
        let memory = self.world.memory.clone();
        let (data, head) = (self.request, self.request + 512);
        memory.write(data, &[0xee; 512]);
        memory.write(head, &[0; 16]);
        memory.write(head + 8, &sector.to_le_bytes());
        let status = memory.allocate(1, 1).unwrap();
        memory.write(status, &[0xff]);
        let chain = [
            Buffer::readable(head, 16),
            Buffer::writable(data, 512),
            Buffer::writable(status, 1),
        ];
        let (id, queue) = &mut self.disk;
        queue.add(&chain).unwrap();
        assert!(queue.publish());
        self.disks.kick(*id, 0);
        let mut used = None;
        let function = self.disks.transport.function();
        function.wait_until(PATIENCE, || {
            used = queue.take().unwrap();
            used.is_some()
        });
        assert_eq!(used.unwrap().len, 513);
        assert_eq!(memory.bytes(data, 512), [0; 512]);
        assert_eq!(memory.bytes(status, 1), [0]);
    }

    /// Sends a frame to nobody.
    fn send(&mut self) {
        let memory = self.world.memory.clone();
        let at = memory.allocate(12 + 60, 16).unwrap();
        memory.write(at, &[0; 72]);
        let (id, queue) = &mut self.card;
        queue.add(&[Buffer::readable(at, 72)]).unwrap();
        assert!(queue.publish());
        self.nets.kick(*id, 1);
        let function = self.nets.transport.function();
        let mut sent = false;
        function.wait_until(PATIENCE, || {
            sent = queue.take().unwrap().is_some();
            sent
        });
        assert!(sent);
    }

    /// Waits for one message of a managed device.
    fn await_message(&self) {
        let mut count = 0;
        let function = self.disks.transport.function();
        function.wait_until(PATIENCE, || {
            count += self.messages();
            count > 0
        });
        assert_eq!(count, 1);
    }

    fn messages(&self) -> usize {
        let delivered = self.world.rig().machine.msi().take();
        let message = |d: &driver::host::Delivery| d.message.map(|m| (m.address, m.data));
        let ours = delivered.iter().filter(|d| message(d) == Some(MESSAGE));
        ours.count()
    }

    fn finish(mut self) {
        // The message of the card is sent once more.
        self.await_message();
        self.disks.mask(self.disk.0, 1);
        // It was held back.
        self.await_message();
        self.read(2);
        self.send();
        let status = self
            .disks
            .management
            .status(&self.disks.transport, self.untouched);
        assert_eq!(status.unwrap(), 0);
        let ended = self.disks.management.execute(
            &self.disks.transport,
            self.untouched,
            command::DESTROY,
            &[],
        );
        ended.unwrap();
        let next = self
            .disks
            .management
            .create(&self.disks.transport, BLOCK, 0, &[]);
        assert!(next.unwrap() > self.untouched, "ids go on");
    }
}

#[test]
fn managed_devices_go_on_in_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut managed = Managed::new(dir.path());
    let document = managed.world.move_on();
    let names: Vec<_> = document.functions.iter().map(|f| f.name.as_str()).collect();
    let expected = [
        "manager0",
        "manager1",
        "manager0-1",
        "manager0-2",
        "manager1-1",
    ];
    assert_eq!(names, expected);
    managed.finish();
}

/// What is not a device is in no state, and cannot be put into one.
#[test]
fn seats_that_are_no_devices_have_no_state() {
    let dir = tempfile::tempdir().unwrap();
    let mut managed = Managed::new(dir.path());
    let document: State = managed.world.move_on();
    let of = |name: &str| document.functions.iter().find(|f| f.name == name);
    assert!(of("manager1-2").is_none());
    let own = &of("manager1").unwrap().transient;
    assert_eq!(own.managed.as_ref().unwrap().devices.len(), 1);
    assert!(own.transport_queue.is_some() && own.admin_queue.is_none());
}
