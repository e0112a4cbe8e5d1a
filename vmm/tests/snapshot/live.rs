//! Devices in use, saved and moved into another machine: they go on, and no request is lost or answered twice.

use std::path::Path;
use std::time::Duration;

use driver::access::FunctionExt;
use driver::pci::{Address, VectorEntry, find_capability, id};
use driver::virtio::block::request::{IN, OUT};
use driver::virtio::migration::{Migrate, Range, mode};
use driver::virtio::net::net_feature;
use driver::virtio::{Door, NO_VECTOR, feature, status};
use vmm::config::{Config, Layout};

use super::drivers::{Device, Guest, Monitor};
use super::rig::{Place, World, file, spec};

/// Bytes of a disk.
const DISK: u64 = 64 << 10;
/// Byte before the frame of a network device.
const NET_HEADER: usize = 12;

/// What is written to a sector.
fn pattern(sector: u64) -> Vec<u8> {
    (0..512).map(|at| (at ^ (sector * 7)) as u8).collect()
}

/// A frame for everybody, with the right address of its sender, who is the only one that may send it.
fn frame(device: &Device, last: u8) -> Vec<u8> {
    let mac: [u8; 6] = std::array::from_fn(|at| {
        let register = driver::access::Register::<u8>::at(at as u64);
        device.transport.device_get(register)
    });
    let mut bytes = vec![0; NET_HEADER];
    bytes.extend_from_slice(&[0xff; 6]);
    bytes.extend_from_slice(&mac);
    bytes.extend_from_slice(&[0x88, 0xb5]);
    bytes.resize(NET_HEADER + 60, last);
    bytes
}

/// Disks, network interfaces, entropy and console, each of them in the middle of something.
pub struct Plain {
    pub world: World,
    disks: Vec<Device>,
    nets: Vec<Device>,
    rng: Device,
    console: Device,
}

impl Plain {
    pub fn new(dir: &Path) -> Self {
        let disk = |name: &str, more: &str| {
            let path = dir.join(name);
            file(&path, DISK);
            format!("path={}{more}", path.display()).parse().unwrap()
        };
        let mut world = World::new(spec(Config {
            disks: vec![
                disk("disk0.raw", ",queues=2,serial=GOLDEN"),
                disk("disk1.raw", ",bus=port,suspend=v5"),
                disk("disk2.raw", ",device-stop,device-state-cap"),
                disk("disk3.raw", ",readonly,suspend=v1.4"),
            ],
            nets: vec!["switch=lan".parse().unwrap(), "switch=lan".parse().unwrap()],
            rng: Some(true),
            virtio_console: Some(
                format!("file={}", dir.join("console").display())
                    .parse()
                    .unwrap(),
            ),
            ..Config::default()
        }));
        let memory = world.memory.clone();

        // A disk in use, with a vector for each queue, of which one is masked and pending.
        let seat = world.device(0, 1);
        let mut disk0 = Device::prepare(seat, &memory, feature::EVENT_IDX | feature::INDIRECT_DESC);
        let (msix, seat) = disk0.msix();
        for vector in 0..3 {
            let entry = VectorEntry {
                address: 0xfee0_0000,
                data: 0x30 + u32::from(vector),
                masked: vector == 2,
            };
            msix.set_entry(seat, vector, entry);
        }
        msix.set_control(seat, true, false);
        disk0.transport.set_config_vector(0).unwrap();
        disk0.add_queue(32, 1);
        disk0.add_queue(32, 2);
        disk0.transport.start();
        for sector in 0..8 {
            disk0.transact(OUT, sector, &pattern(sector), 0);
        }
        disk0.request(1, IN, 3, &[], 512);
        assert_eq!(disk0.next(1).unwrap().data, pattern(3));

        // Suspended in three ways, with requests that nobody looked at.
        let mut disks = vec![disk0];
        for (bus, device, door) in [
            (1, 0, Door::SuspendV5),
            (0, 3, Door::DeviceStop),
            (0, 4, Door::Suspend),
        ] {
            let seat = world.device(bus, device);
            let mut disk = Device::start(seat, &memory, 1 << door.feature(), 16, &[NO_VECTOR]);
            disk.transact(IN, 5, &[], 512);
            disk.transport.stop(door).unwrap();
            for sector in 0..3 {
                disk.request(0, IN, sector, &[], 512);
            }
            disks.push(disk);
        }

        let mut nets = Vec::new();
        for device in [5, 6] {
            let seat = world.device(0, device);
            let mut net = Device::start(seat, &memory, 0, 16, &[NO_VECTOR; 2]);
            (0..4).for_each(|_| net.receive(0, 2048));
            nets.push(net);
        }
        let hello = frame(&nets[1], 1);
        nets[1].send(1, &hello);
        assert!(nets[1].next(1).is_some());
        assert_eq!(nets[0].next(0).unwrap().data.last(), Some(&1));

        let seat = world.device(0, 7);
        let mut rng = Device::start(seat, &memory, 0, 8, &[NO_VECTOR]);
        rng.receive(0, 64);
        assert_eq!(rng.next(0).unwrap().data.len(), 64);
        let seat = world.device(0, 8);
        let mut console = Device::start(seat, &memory, 0, 8, &[NO_VECTOR; 2]);
        console.receive(0, 64);
        console.send(1, b"login: ");
        assert!(console.next(1).is_some());

        // Some of these are answered before the pause, others recalled and executed afterwards.
        for sector in 0..8 {
            disks[0].request(0, IN, sector, &[], 512);
        }
        Self {
            world,
            disks,
            nets,
            rng,
            console,
        }
    }

    fn finish(mut self) {
        let disk = &mut self.disks[0];
        let mut found: Vec<_> = (0..8)
            .map(|_| {
                let done = disk.next(0).expect("every request comes back");
                assert_eq!(done.status, Some(0));
                done.data
            })
            .collect();
        found.sort();
        let mut expected: Vec<_> = (0..8).map(pattern).collect();
        expected.sort();
        assert!(found == expected);
        assert!(disk.next_within(0, Duration::from_millis(20)).is_none());
        let (msix, seat) = disk.msix();
        assert!(msix.is_pending(seat, 2));
        self.world.rig().machine.msi().take();
        msix.mask(seat, 2, false);
        let delivered = self.world.rig().machine.msi().take();
        let data: Vec<_> = delivered.iter().map(|d| d.message.unwrap().data).collect();
        assert_eq!(data, [0x32]);
        disk.transact(OUT, 100, &pattern(100), 0);
        assert_eq!(disk.transact(IN, 100, &[], 512), pattern(100));

        let doors = [Door::SuspendV5, Door::DeviceStop, Door::Suspend];
        for (disk, door) in self.disks[1..].iter_mut().zip(doors) {
            assert_eq!(disk.waiting(0), 3);
            assert!(disk.next_within(0, Duration::from_millis(20)).is_none());
            disk.transport.resume(door).unwrap();
            for _ in 0..3 {
                assert_eq!(disk.next(0).unwrap().status, Some(0), "{door:?}");
            }
            disk.transact(IN, 9, &[], 512);
        }

        for (from, to) in [(0, 1), (1, 0)] {
            let hello = frame(&self.nets[from], 2);
            self.nets[from].send(1, &hello);
            assert!(self.nets[from].next(1).is_some());
            let got = self.nets[to].next(0).unwrap();
            assert_eq!(got.data.last(), Some(&2));
        }
        self.rng.receive(0, 32);
        assert_eq!(self.rng.next(0).unwrap().data.len(), 32);
        self.console.send(1, b"root\n");
        assert!(self.console.next(1).is_some());
        assert_eq!(self.console.waiting(0), 1);
    }
}

#[test]
fn devices_in_use_go_on_in_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut plain = Plain::new(dir.path());
    plain.world.move_on();
    plain.finish();
}

/// Nobody drives it between one move and the next, so both begin at the same state.
#[test]
fn a_machine_can_be_moved_again_before_its_guest_did_anything() {
    let dir = tempfile::tempdir().unwrap();
    let mut plain = Plain::new(dir.path());
    (0..3).for_each(|_| drop(plain.world.move_on()));
    plain.finish();
}

/// Registers of the virtio function and of its configuration space that are in no other test, as a driver sees them.
#[test]
fn a_driver_finds_registers_as_it_left_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut plain = Plain::new(dir.path());
    let look = |plain: &Plain| {
        let devices = plain.disks.iter().chain(&plain.nets);
        let devices = devices.chain([&plain.rng, &plain.console]);
        let looks = devices.map(|device| {
            let (msix, seat) = device.msix();
            let mut config = vec![0; 256];
            for (at, byte) in (0..).zip(&mut config) {
                *byte = seat.config::<u8>(at);
            }
            let entries: Vec<_> = (0..msix.vectors).map(|v| msix.entry(seat, v)).collect();
            let queues: Vec<_> = (0..device.queues.len() as u16)
                .map(|queue| device.transport.queue_size(queue))
                .collect();
            let express = find_capability(seat, id::EXPRESS).unwrap().is_some();
            (
                config,
                entries,
                queues,
                device.transport.accepted(),
                device.transport.status(),
                express,
            )
        });
        looks.collect::<Vec<_>>()
    };
    let before = look(&plain);
    assert!(before.iter().any(|l| l.4 & status::SUSPEND != 0));
    plain.world.move_on();
    assert_eq!(look(&plain), before);
}

/// A `--pf` whose owner the guest has, with members in every state that commands can bring about.
pub struct Owned {
    pub world: World,
    guest: Guest,
    members: Vec<Device>,
    /// What the guest's driver has of the context of member 2, and what all of it is.
    part: Vec<u8>,
    context: Vec<u8>,
    /// What the monitor has not written of the context of member 3.
    rest: Vec<u8>,
}

/// The owner behind the first port.
const PF: Address = Address::new(1, 0, 0);

impl Owned {
    pub fn new(dir: &Path) -> Self {
        file(&dir.join("pf.raw"), DISK);
        (1..=4).for_each(|n| file(&dir.join(format!("vf{n}.raw")), DISK));
        let at = dir.display();
        let pf = format!("block,vfs=4,path={at}/pf.raw,vf-path={at}/vf%d.raw");
        let mut world = World::new(spec(Config {
            pfs: vec![pf.parse().unwrap()],
            rng: Some(false),
            ..Config::default()
        }));
        let memory = world.memory.clone();
        let seat = world.seat(Place::At(PF));
        let mut guest = Guest::start(seat, &memory, 1);
        world.enable_members(PF, 3);
        guest.device.transact(OUT, 1, &pattern(1), 0);
        let mut members = Vec::new();
        for number in 1..=3 {
            let seat = world.seat(Place::Member(PF, number));
            let mut disk = Device::start(seat, &memory, feature::EVENT_IDX, 16, &[NO_VECTOR]);
            disk.transact(OUT, 2, &pattern(number.into()), 0);
            members.push(disk);
        }
        assert_ne!(guest.use_all().unwrap(), 0);
        let ranges = [Range {
            address: 0,
            pages: (super::rig::MEMORY as u64) >> 12,
        }];
        guest.start_records(1, 4096, &ranges).unwrap();
        members[0].transact(IN, 2, &[], 512);

        guest.set_mode(2, mode::FREEZE).unwrap();
        let context = guest.read_all(2, 64).unwrap();
        guest.discard(2).unwrap();
        let part = guest.read_context(2, 100).unwrap();

        let group = world.rig().group();
        let mut monitor = Monitor(group);
        monitor.use_all().unwrap();
        monitor.set_mode(3, mode::FREEZE).unwrap();
        let theirs = monitor.read_all(3, 4096).unwrap();
        let (first, rest) = theirs.split_at(theirs.len() / 2);
        monitor.write_context(3, first).unwrap();
        let rest = rest.to_vec();
        // In the middle of a part that is read by the other one, too.
        monitor.set_mode(2, mode::STOP).unwrap();
        members[0].request(0, IN, 2, &[], 512);
        members[1].request(0, IN, 2, &[], 512);
        Self {
            world,
            guest,
            members,
            part,
            context,
            rest,
        }
    }

    fn finish(mut self) {
        assert_eq!(self.members[0].next(0).unwrap().data, pattern(1));
        let mut monitor = Monitor(self.world.rig().group());
        assert_eq!(monitor.mode(1).unwrap(), mode::ACTIVE);
        assert_eq!(monitor.mode(2).unwrap(), mode::STOP);
        assert_eq!(monitor.mode(3).unwrap(), mode::FREEZE);
        assert_eq!(self.guest.mode(2).unwrap(), mode::FREEZE);
        assert_eq!(self.guest.mode(3).unwrap(), mode::ACTIVE);
        let pages = self
            .guest
            .read_records(1, 0, super::rig::MEMORY as u64, 1000)
            .unwrap();
        assert!(!pages.is_empty(), "what was written before the move");

        // The rest of the same context, though its member was in another machine when it began.
        let mut whole = std::mem::take(&mut self.part);
        whole.extend(self.guest.read_all(2, 64).unwrap());
        assert_eq!(whole, self.context);

        monitor.write_context(3, &self.rest).unwrap();
        monitor.set_mode(3, mode::ACTIVE).unwrap();
        assert_eq!(self.members[2].transact(IN, 2, &[], 512), pattern(3));

        let quiet = Duration::from_millis(20);
        assert!(self.members[1].next_within(0, quiet).is_none());
        self.guest.set_mode(2, mode::ACTIVE).unwrap();
        assert!(self.members[1].next_within(0, quiet).is_none());
        let mut monitor = Monitor(self.world.rig().group());
        monitor.set_mode(2, mode::ACTIVE).unwrap();
        assert_eq!(self.members[1].next(0).unwrap().data, pattern(2));
        assert!(self.members[1].next_within(0, quiet).is_none());
        self.guest.device.transact(IN, 1, &[], 512);
        self.guest.stop_records(1).unwrap();
    }
}

#[test]
fn an_owner_and_its_members_go_on_in_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut owned = Owned::new(dir.path());
    owned.world.move_on();
    owned.finish();
}

#[test]
fn sessions_survive_many_moves() {
    let dir = tempfile::tempdir().unwrap();
    let mut owned = Owned::new(dir.path());
    (0..3).for_each(|_| drop(owned.world.move_on()));
    owned.finish();
}

/// Members of a network owner, and those of a block owner that the monitor keeps.
pub struct Mixed {
    pub world: World,
    nets: Vec<Device>,
    disk: Device,
}

impl Mixed {
    pub fn new(dir: &Path) -> Self {
        (1..=2).for_each(|n| file(&dir.join(format!("vf{n}.raw")), DISK));
        let at = dir.display();
        let disks = format!("block,vfs=2,vf-path={at}/vf%d.raw,passthrough,drain-ms=7");
        let mut world = World::new(spec(Config {
            pfs: vec![
                "net,vfs=3,mac=02:00:5e:00:00:10".parse().unwrap(),
                disks.parse().unwrap(),
            ],
            nets: vec!["switch=lan,mac=02:00:5e:00:00:02".parse().unwrap()],
            rng: Some(false),
            ..Config::default()
        }));
        let memory = world.memory.clone();
        // 00:01 is net0; the ports are at 00:02 and 00:03, and bus 1 is behind the first.
        world.seat(Place::At(PF));
        world.enable_members(PF, 2);
        let mut nets = Vec::new();
        for number in 1..=2 {
            let seat = world.seat(Place::Member(PF, number));
            let mut net = Device::start(seat, &memory, 0, 16, &[NO_VECTOR; 2]);
            (0..4).for_each(|_| net.receive(0, 2048));
            nets.push(net);
        }
        let seat = world.device(2, 0);
        let mut disk = Device::start(seat, &memory, 0, 16, &[NO_VECTOR]);
        disk.transact(OUT, 7, &pattern(7), 0);
        let group = &world.rig().functions.groups()[1];
        let mut monitor = Monitor(group);
        monitor.use_all().unwrap();
        monitor.set_mode(1, mode::STOP).unwrap();
        disk.request(0, IN, 7, &[], 512);
        Self { world, nets, disk }
    }

    fn finish(mut self) {
        for (from, to) in [(0, 1), (1, 0)] {
            let hello = frame(&self.nets[from], 3);
            self.nets[from].send(1, &hello);
            assert!(self.nets[from].next(1).is_some());
            assert_eq!(self.nets[to].next(0).unwrap().data.last(), Some(&3));
        }
        let quiet = Duration::from_millis(20);
        assert!(self.disk.next_within(0, quiet).is_none());
        let group = &self.world.rig().functions.groups()[1];
        Monitor(group).set_mode(1, mode::ACTIVE).unwrap();
        assert_eq!(self.disk.next(0).unwrap().data, pattern(7));
        // Those that did not exist come to exist.
        let sriov =
            driver::pci::find_extended_capability(&self.world.at(1, 0), id::EXT_SRIOV).unwrap();
        let pf = self.world.at(1, 0);
        let at = sriov.unwrap().offset;
        pf.set_config(at + 0x08, 0u16);
        self.world.enable_members(PF, 3);
        assert_eq!(
            self.world.rig().functions.groups()[0]
                .owner
                .members()
                .count(),
            3
        );
    }
}

#[test]
fn members_of_all_kinds_go_on_in_another_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut mixed = Mixed::new(dir.path());
    mixed.world.move_on();
    mixed.finish();
}

/// A machine that nobody touched.
#[test]
fn devices_at_reset_are_saved_as_well() {
    let dir = tempfile::tempdir().unwrap();
    file(&dir.path().join("d"), DISK);
    let disk = format!("path={}", dir.path().join("d").display());
    let mut world = World::new(spec(Config {
        disks: vec![disk.parse().unwrap()],
        pfs: vec!["net,vfs=2".parse().unwrap()],
        ..Config::default()
    }));
    let state = world.move_on();
    assert_eq!(state.functions.len(), 3, "disk0, rng, pf0");
}

/// Network interfaces and a member that were asked to announce themselves: one has acknowledged it, one is about to, and one
/// was not told yet.
pub struct Asked {
    pub world: World,
    nets: Vec<Device>,
}

const ANNOUNCING: u64 = net_feature::STATUS | net_feature::CTRL_VQ | net_feature::GUEST_ANNOUNCE;
/// VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK.
const ACKNOWLEDGE: [u8; 2] = [3, 0];
/// Values of the status: the link is up; and the driver is asked.
const UP: u16 = 1;
const ASKED: u16 = 3;

fn net_status(device: &Device) -> u16 {
    let register = driver::access::Register::<u16>::at(6);
    device.transport.device_get(register)
}

impl Asked {
    pub fn new() -> Self {
        let mut world = World::new(spec(Config {
            nets: vec![
                "switch=lan,mac=02:00:5e:00:00:02".parse().unwrap(),
                "switch=lan,mac=02:00:5e:00:00:03".parse().unwrap(),
            ],
            pfs: vec!["net,vfs=2,mac=02:00:5e:00:00:10".parse().unwrap()],
            rng: Some(false),
            ..Config::default()
        }));
        let memory = world.memory.clone();
        // 00:01 and 00:02 are net0 and net1; the port is at 00:03.
        world.seat(Place::At(PF));
        world.enable_members(PF, 1);
        let seats = [
            world.device(0, 1),
            world.device(0, 2),
            world.seat(Place::Member(PF, 1)),
        ];
        let mut nets: Vec<_> = seats
            .into_iter()
            .map(|seat| Device::start(seat, &memory, ANNOUNCING, 16, &[NO_VECTOR; 3]))
            .collect();
        // What is not bus master cannot be told.
        let [acknowledged, _, untold] = nets.as_mut_slice() else {
            unreachable!("there are three");
        };
        let command = driver::pci::command::BUS_MASTER;
        driver::pci::change_command(untold.transport.function(), 0, command);
        for function in world.rig().functions.all() {
            function.request_announcement();
        }
        assert_eq!(acknowledged.ask(&ACKNOWLEDGE), Some(0));
        let looks: Vec<_> = nets.iter().map(net_status).collect();
        assert_eq!(looks, [UP, ASKED, ASKED]);
        Self { world, nets }
    }

    fn finish(mut self) {
        let looks: Vec<_> = self.nets.iter().map(net_status).collect();
        assert_eq!(looks, [UP, ASKED, ASKED]);
        let command = driver::pci::command::BUS_MASTER;
        driver::pci::change_command(self.nets[2].transport.function(), command, 0);
        for net in &mut self.nets {
            assert_eq!(net.ask(&ACKNOWLEDGE), Some(0));
            assert_eq!(net_status(net), UP);
            assert_eq!(net.ask(&[0, 0, 1]), Some(1), "another command");
        }
    }
}

#[test]
fn announcements_are_acknowledged_in_another_machine() {
    let mut asked = Asked::new();
    asked.world.move_on();
    asked.finish();
}

/// A machine of a snapshot from before network devices had control virtqueues.
#[test]
fn a_machine_of_the_first_layout_stays_one() {
    let mut spec = spec(Config {
        nets: vec!["switch=lan".parse().unwrap()],
        pfs: vec!["net,vfs=1".parse().unwrap()],
        rng: Some(false),
        ..Config::default()
    });
    spec.layout = Layout::V1;
    let mut world = World::new(spec);
    let memory = world.memory.clone();
    let seat = world.device(0, 1);
    let net = Device::start(seat, &memory, ANNOUNCING, 16, &[NO_VECTOR; 2]);
    let accepted = net.transport.accepted() & ANNOUNCING;
    assert_eq!(accepted, net_feature::STATUS);
    let state = world.move_on();
    assert_eq!(state.machine.layout, 1);
    for function in world.rig().functions.all() {
        assert_eq!(function.num_queues(), 2, "{}", function.name());
        function.request_announcement();
    }
    assert_eq!(net_status(&net), UP);
}
