//! What one `--pf` puts on the bus, as a driver finds it: without KVM, over mock memory and interrupts.

// The helpers state what must hold, like the tests they are part of.
#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use devices::admin::{GroupType, Request};
use devices::net::MacAddress;
use driver::access::FunctionExt;
use driver::host::{HostFunction, Machine};
use driver::pci::{
    Address, Found, change_command, command, find_extended_capability, header, id, request_flr,
    scan,
};
use driver::virtio::{NO_VECTOR, SplitQueue, Transport};
use pci::topology::Bdf;
use vmm::config::Config;
use vmm::console::output::Loss;
use vmm::machine::functions::{Backends, Functions};
use vmm::machine::owner::Group;

/// Device ID of virtio-net.
const NET: u16 = 0x1041;
/// Device ID of virtio-block.
const BLOCK: u16 = 0x1042;

/// Byte offsets in the SR-IOV capability, and bits of its control register.
mod sriov {
    pub const CONTROL: u16 = 0x08;
    pub const TOTAL_VFS: u16 = 0x0e;
    pub const NUM_VFS: u16 = 0x10;
    /// VF Enable, VF MSE, ARI Capable Hierarchy.
    pub const ENABLE: u16 = 1 | 1 << 3 | 1 << 4;
}

struct Rig {
    machine: Machine,
    functions: Functions,
}

impl Rig {
    fn new(pf: &str) -> Self {
        let config = Config {
            kernel: Some("vmlinuz".into()),
            rng: Some(false),
            pfs: vec![pf.parse().unwrap()],
            ..Config::default()
        };
        let backends = Backends::open(&config.resolve().unwrap(), None, &Loss::default()).unwrap();
        let machine = Machine::new().unwrap();
        let (ram, msi) = (machine.dma().ram(), machine.msi());
        let functions = Functions::plug(backends, ram, machine.root(), msi).unwrap();
        machine.power_on().unwrap();
        Self { machine, functions }
    }

    fn group(&self) -> &Group {
        &self.functions.groups()[0]
    }

    fn scan(&self) -> Vec<Found> {
        scan(0, &|address| self.machine.function(address))
    }

    fn at(&self, bus: u8, devfn: u8) -> HostFunction {
        self.machine.function(Address { bus, devfn })
    }

    /// Lets the port at 00:01.0 forward more than eight functions, as a driver does that found ARI behind it.
    fn forward_ari(&self) {
        let port = self.machine.function(Address::new(0, 1, 0));
        let express = driver::pci::find_capability(&port, id::EXPRESS)
            .unwrap()
            .unwrap();
        port.set_config(express.offset + 0x28, 1u16 << 5);
    }

    /// Enables `count` members through the registers of their owner.
    fn enable(&self, count: u16) -> u16 {
        self.forward_ari();
        let pf = self.at(1, 0);
        let at = find_extended_capability(&pf, id::EXT_SRIOV)
            .unwrap()
            .unwrap()
            .offset;
        pf.set_config(at + sriov::NUM_VFS, count);
        pf.set_config(at + sriov::CONTROL, sriov::ENABLE);
        pf.config(at + sriov::TOTAL_VFS)
    }

    fn place(&self, number: u16) -> Option<String> {
        let place = self.group().place(self.machine.root(), number);
        place.as_ref().map(Bdf::to_string)
    }
}

/// The class code, which virtual functions have and absent ones do not.
fn class(function: &HostFunction) -> u32 {
    function.config::<u32>(header::REVISION) >> 8
}

fn macs(group: &Group) -> Vec<MacAddress> {
    group.switch_ports().iter().map(|port| port.mac).collect()
}

#[test]
fn an_owner_is_alone_on_its_bus_until_members_are_enabled() {
    let rig = Rig::new("net,vfs=20");
    let found: Vec<_> = rig
        .scan()
        .iter()
        .map(|f| (f.address.to_string(), f.device))
        .collect();
    let expected = [("00:00.0", 0x0008), ("00:01.0", 0x000c), ("01:00.0", NET)];
    assert_eq!(found, expected.map(|(at, device)| (at.to_owned(), device)));
    assert_eq!(rig.group().owner.members().count(), 0);

    assert_eq!(rig.enable(17), 20);
    let there: Vec<_> = (1..=255)
        .filter(|n| class(&rig.at(1, *n)) == 0x02_00_00)
        .collect();
    assert_eq!(there, (1..=17).collect::<Vec<_>>());
    assert_eq!(rig.group().owner.members().count(), 17);
    let places = [0, 1, 8, 17].map(|number| rig.place(number).unwrap());
    assert_eq!(places, ["01:00.0", "01:00.1", "01:01.0", "01:02.1"]);
}

#[test]
fn a_bus_has_room_for_255_members() {
    let rig = Rig::new("net,vfs=255");
    assert_eq!(rig.enable(255), 255);
    assert!((1..=255).all(|n| class(&rig.at(1, n)) == 0x02_00_00));
    assert_eq!(rig.place(255).unwrap(), "01:1f.7");
}

#[test]
fn members_passed_through_are_plain_endpoints_in_one_list() {
    let rig = Rig::new("net,vfs=20,passthrough");
    // Without ARI a device has eight functions.
    let found = rig.scan();
    assert_eq!(found.iter().filter(|f| f.device == NET).count(), 8);
    rig.forward_ari();
    let (mut next, mut visited) = (0, Vec::new());
    loop {
        let function = rig.at(1, next);
        visited.push(next);
        assert_eq!(function.config::<u16>(header::DEVICE_ID), NET);
        assert_eq!(find_extended_capability(&function, id::EXT_SRIOV), Ok(None));
        assert!(function.bar_address(0, 0) != 0);
        assert!(request_flr(&function));
        let ari = find_extended_capability(&function, id::EXT_ARI)
            .unwrap()
            .unwrap();
        next = function.config::<u8>(ari.offset + 5);
        if next == 0 {
            break;
        }
    }
    assert_eq!(visited, (0..20).collect::<Vec<_>>());
    assert!(rig.group().pf.is_none());
    assert_eq!(rig.group().owner.members().count(), 20);
    let places = [0, 1, 9].map(|number| rig.place(number));
    assert_eq!(
        places,
        [None, Some("01:00.0".to_owned()), Some("01:01.0".to_owned())]
    );
}

#[test]
fn addresses_are_distinct_and_the_same_each_time() {
    let first = macs(Rig::new("net,vfs=100").group());
    assert_eq!(first, macs(Rig::new("net,vfs=100").group()));
    assert_eq!(first.iter().collect::<HashSet<_>>().len(), 101);
    let given = macs(Rig::new("net,vfs=2,mac=02:00:5e:00:00:ff").group());
    let expected = [
        "02:00:5e:00:00:ff",
        "02:00:5e:00:01:00",
        "02:00:5e:00:01:01",
    ];
    let given: Vec<_> = given.iter().map(MacAddress::to_string).collect();
    assert_eq!(given, expected);
}

#[test]
fn every_member_of_a_block_owner_has_a_disk_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, len| {
        let file = std::fs::File::create(dir.path().join(name)).unwrap();
        file.set_len(len).unwrap();
    };
    file("pf.raw", 512);
    (1..=3).for_each(|n| file(&format!("vf{n}.raw"), 1024 * n));
    let at = dir.path().display();
    let rig = Rig::new(&format!(
        "block,vfs=3,path={at}/pf.raw,vf-path={at}/vf%d.raw"
    ));
    assert_eq!(rig.at(1, 0).config::<u16>(header::DEVICE_ID), BLOCK);
    let sectors = rig.group().functions().map(|function| {
        let mut capacity = [0; 8];
        function.read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    });
    assert_eq!(sectors.collect::<Vec<_>>(), [1, 2, 4, 6]);
}

#[test]
fn a_missing_disk_is_an_error_that_names_it() {
    let config = Config {
        kernel: Some("vmlinuz".into()),
        pfs: vec![
            "block,vfs=1,path=/nonexistent/pf,vf-path=/nonexistent/%d"
                .parse()
                .unwrap(),
        ],
        ..Config::default()
    };
    let error = Backends::open(&config.resolve().unwrap(), None, &Loss::default())
        .err()
        .unwrap();
    assert!(error.to_string().contains("/nonexistent/pf"), "{error}");
}

/// The monitor's session is its own: what it gives up, the guest's driver still has, and the other way round.
#[test]
fn the_monitor_drives_the_owner_with_bytes() {
    let rig = Rig::new("net,vfs=2,passthrough");
    let send = |opcode, data: &[u8]| {
        let request = Request::encode(opcode, GroupType::SrIov, 0, data);
        rig.group().execute(&request).encode()
    };
    assert_eq!(send(0, &[])[..4], [0; 4]);
    assert_eq!(send(1, &[2]), [0; 8]);
    assert_eq!(send(0, &[])[..4], [22, 0, 2, 0]);
    assert_eq!(rig.group().execute(&[0, 0, 9]).encode()[..4], [22, 0, 4, 0]);
}

/// A member that a context makes live has its doorbells, though no driver wrote a register: the machine is told to look.
#[test]
fn s3_32_a_context_that_takes_effect_brings_doorbells() {
    const MODE_SET: u16 = 8;
    const CONTEXT_READ: u16 = 0xa;
    const CONTEXT_WRITE: u16 = 0xb;
    let rig = Rig::new("net,vfs=2,passthrough");
    let send = |opcode, member, data: &[u8]| {
        let request = Request::encode(opcode, GroupType::SrIov, member, data);
        let answer = rig.group().execute(&request).0;
        answer.unwrap().result
    };
    let commands = send(0, 0, &[]);
    send(1, 0, &commands);
    let revived = || rig.functions.revived().read().is_ok();
    let doorbells = || rig.machine.root().doorbells().len();

    let decode = || change_command(&rig.at(1, 0), command::MEMORY | command::BUS_MASTER, 0);
    decode();
    let transport = Transport::new(rig.at(1, 0)).unwrap();
    transport.negotiate(0).unwrap();
    let queue = SplitQueue::new(rig.machine.dma().clone(), 8, false).unwrap();
    transport
        .enable_queue(0, queue.layout(), NO_VECTOR)
        .unwrap();
    transport.start();
    let live = doorbells();
    assert!(live > 0);
    send(MODE_SET, 1, &[2]);
    let context = send(CONTEXT_READ, 1, &[]);
    assert!(!revived());
    send(MODE_SET, 1, &[0]);
    assert!(!revived(), "nothing was written");

    let base: u64 = rig.at(1, 0).config(header::BAR0);
    assert!(request_flr(&rig.at(1, 0)));
    rig.at(1, 0).set_config(header::BAR0, base);
    decode();
    assert_eq!(doorbells(), 0);
    send(MODE_SET, 1, &[2]);
    send(CONTEXT_WRITE, 1, &context);
    assert_eq!(doorbells(), 0);
    send(MODE_SET, 1, &[0]);
    assert!(revived());
    assert_eq!(doorbells(), live);
}
