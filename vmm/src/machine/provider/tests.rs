//! Two machines of one specification stand for those of two processes: what is shared between open file descriptions is the
//! same within a process.

use super::*;
use crate::config::{Config, MachineSpec};
use crate::console::output::Loss;
use crate::machine::functions::{Backends, FunctionError, Functions};
use devices::gate::Reasons;
use driver::host::Machine;
use driver::pci::{Address, change_command, command};
use driver::virtio::Transport;
use driver::virtio::net::{Net, net_feature};
use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;
use tempfile::TempDir;

mod taps;

/// Files of a machine with two disks and an owner of two.
struct Files(TempDir);

const NAMES: [&str; 5] = ["disk0", "disk1", "pf0", "pf0-vf1", "pf0-vf2"];

impl Files {
    fn new() -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        for name in NAMES {
            let file = File::create(files.path(name)).unwrap();
            file.set_len(4096).unwrap();
        }
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn spec(&self) -> MachineSpec {
        let at = |name| self.path(name).display().to_string();
        let pf = format!("block,vfs=2,path={},vf-path={}", at("pf0"), at("pf0-vf%d"));
        let config = Config {
            kernel: Some("vmlinuz".into()),
            disks: vec![
                format!("path={}", at("disk0")).parse().unwrap(),
                format!("path={},readonly", at("disk1")).parse().unwrap(),
            ],
            pfs: vec![pf.parse().unwrap()],
            ..Config::default()
        };
        config.resolve().unwrap()
    }

    fn machine(&self, provider: Provider) -> Result<Functions, FunctionError> {
        machine(&self.spec(), provider)
    }

    /// True if a stranger could not have the file of disk `name`.
    fn is_locked(&self, name: &str) -> bool {
        match RawFile::open(&self.path(name), false) {
            Ok(_) => false,
            Err(BlockError::InUse(_)) => true,
            Err(error) => panic!("{error}"),
        }
    }

    fn locked(&self) -> Vec<&str> {
        let names = NAMES.into_iter();
        names.filter(|name| self.is_locked(name)).collect()
    }
}

fn machine(spec: &MachineSpec, provider: Provider) -> Result<Functions, FunctionError> {
    let backends = Backends::open_from(spec, provider, None, &Loss::default())?;
    let machine = Machine::new().unwrap();
    Functions::plug(backends, machine.dma().ram(), machine.root(), machine.msi())
}

fn lent(machine: &Functions) -> BTreeMap<String, OwnedFd> {
    machine.lend().unwrap().into_iter().collect()
}

#[test]
fn what_was_opened_by_name_is_locked_until_the_machine_ends() {
    let files = Files::new();
    let source = files.machine(Provider::by_name()).unwrap();
    assert_eq!(files.locked(), NAMES);
    assert!(matches!(
        files.machine(Provider::by_name()),
        Err(FunctionError::Block(BlockError::InUse(_)))
    ));
    source.take_locks().unwrap();
    drop(source);
    assert!(files.locked().is_empty());
}

#[test]
fn a_machine_is_handed_over_with_its_disks_and_their_locks() {
    let files = Files::new();
    let source = files.machine(Provider::by_name()).unwrap();
    let received = lent(&source);
    assert!(received.keys().eq(NAMES));
    let destination = files
        .machine(Provider::by_name().received(received))
        .unwrap();
    destination.take_locks().unwrap();
    source.release_locks();
    assert_eq!(files.locked(), NAMES);
    drop(source);
    assert_eq!(files.locked(), NAMES);
    // And on to the next.
    let last = files
        .machine(Provider::by_name().received(lent(&destination)))
        .unwrap();
    drop(destination);
    assert_eq!(files.locked(), NAMES);
    last.release_locks();
    assert!(files.locked().is_empty());
}

#[test]
fn a_source_whose_destination_failed_has_its_locks_and_can_give_them_back() {
    let files = Files::new();
    let source = files.machine(Provider::by_name()).unwrap();
    let mut received = lent(&source);
    received.insert("net0".into(), File::open("/dev/null").unwrap().into());
    assert!(
        files
            .machine(Provider::by_name().received(received))
            .is_err()
    );
    assert_eq!(files.locked(), NAMES);
    source.end_lending();
    source.release_locks();
    assert!(files.locked().is_empty());
}

#[test]
fn what_no_device_takes_is_named() {
    let files = Files::new();
    let file = || OwnedFd::from(File::open(files.path("disk0")).unwrap());
    let names = ["disk2", "net0", "pf0-uplink", "pf0-vf3"];
    let received = names.map(|name| (name.to_owned(), file())).into();
    let refused = files.machine(Provider::by_name().received(received));
    let message = refused.err().unwrap().to_string();
    assert!(
        message.contains("disk2, net0, pf0-uplink, pf0-vf3"),
        "{message}"
    );
    assert!(files.locked().is_empty());
}

#[test]
fn whoever_was_not_given_a_file_opens_it_by_name() {
    let files = Files::new();
    let one = File::options()
        .read(true)
        .write(true)
        .open(files.path("pf0-vf1"))
        .unwrap();
    let received = BTreeMap::from([("pf0-vf1".to_owned(), one.into())]);
    let machine = files
        .machine(Provider::by_name().received(received))
        .unwrap();
    assert_eq!(files.locked(), NAMES);
    machine.release_locks();
    assert!(files.locked().is_empty());
}

#[test]
fn a_file_that_is_not_open_as_its_disk_says_is_refused() {
    let files = Files::new();
    for name in NAMES {
        let read_only = name == "disk1";
        let wrong = File::options()
            .read(true)
            .write(read_only)
            .open(files.path(name))
            .unwrap();
        let received = BTreeMap::from([(name.to_owned(), wrong.into())]);
        let refused = files.machine(Provider::by_name().received(received));
        assert!(
            matches!(
                refused,
                Err(FunctionError::Block(BlockError::Received { .. }))
            ),
            "{name}"
        );
    }
}

#[test]
fn locks_move_between_machines_that_opened_the_same_files() {
    let files = Files::new();
    let source = files.machine(Provider::by_name()).unwrap();
    let destination = files.machine(Provider::by_name().without_locks()).unwrap();
    // Readers share the other one.
    let writable = ["disk0", "pf0", "pf0-vf1", "pf0-vf2"].map(str::to_owned);
    assert_eq!(destination.take_locks(), Err(writable.to_vec()));
    source.release_locks();
    source.release_locks();
    destination.take_locks().unwrap();
    destination.take_locks().unwrap();
    assert_eq!(source.take_locks(), Err(writable.to_vec()));
    drop(destination);
    source.take_locks().unwrap();
    assert_eq!(files.locked(), NAMES);
}

#[test]
fn all_locks_are_taken_or_none() {
    let files = Files::new();
    let machine = files.machine(Provider::by_name().without_locks()).unwrap();
    assert!(files.locked().is_empty());
    let stranger = RawFile::open(&files.path("pf0-vf1"), false).unwrap();
    assert_eq!(machine.take_locks(), Err(vec!["pf0-vf1".to_owned()]));
    assert_eq!(files.locked(), ["pf0-vf1"]);
    drop(stranger);
    machine.take_locks().unwrap();
    assert_eq!(files.locked(), NAMES);
}

#[test]
fn descriptors_that_are_lent_do_not_leave_by_an_exec() {
    let files = Files::new();
    let source = files.machine(Provider::by_name()).unwrap();
    for (name, file) in source.lend().unwrap() {
        let flags = rustix::io::fcntl_getfd(&file).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC), "{name}");
    }
}

/// Octets 6 to 12 of a frame that announces an address, which is where its sender is.
fn announced(frame: &[u8]) -> Option<[u8; 6]> {
    let is_one = frame.len() == 60 && frame[..6] == [0xff; 6] && frame[12..14] == [0x80, 0x35];
    is_one.then(|| frame[6..12].try_into().unwrap())
}

/// Frames of one interface that arrived somewhere.
const ROUNDS: usize = 5;

#[test]
fn every_interface_with_a_driver_is_announced() {
    let net = |n: u8| {
        format!("switch=a,mac=02:00:00:00:00:{n:02x}")
            .parse()
            .unwrap()
    };
    let pf = |n: u8, more: &str| {
        format!("net,vfs=2,switch=a,mac=02:00:00:00:{n:02x}:00{more}")
            .parse()
            .unwrap()
    };
    let config = Config {
        kernel: Some("vmlinuz".into()),
        rng: Some(false),
        nets: vec![net(1), net(2), net(3)],
        // Of the first, the owner gets a driver; of the second, member 2.
        pfs: vec![pf(4, ""), pf(5, ",passthrough")],
        ..Config::default()
    };
    let spec = config.resolve().unwrap();
    let backends = Backends::open(&spec, None, &Loss::default()).unwrap();
    let host = Machine::new().unwrap();
    let functions = Functions::plug(backends, host.dma().ram(), host.root(), host.msi()).unwrap();
    host.power_on().unwrap();
    let start = |bus, device, function, wanted| {
        let function = host.function(Address::new(bus, device, function));
        change_command(&function, command::MEMORY | command::BUS_MASTER, 0);
        let transport = Transport::new(function).unwrap();
        Net::start(transport, host.dma().clone(), wanted).unwrap()
    };
    let asked = net_feature::STATUS | net_feature::CTRL_VQ | net_feature::GUEST_ANNOUNCE;
    let mut listener = start(0, 1, 0, net_feature::STATUS);
    let live = [
        start(0, 2, 0, asked),
        start(1, 0, 0, 0),
        start(2, 0, 1, asked),
    ];
    functions.reopen(Reasons::PAUSED);
    functions.announce();
    assert_eq!(live.each_ref().map(Net::status), [3, 1, 3]);
    assert_eq!(listener.status(), 1);
    let mut heard = Vec::new();
    while heard.len() < ROUNDS * live.len() {
        let frame = listener.receive(Duration::from_secs(10)).unwrap();
        heard.extend(announced(&frame.expect("a frame in time")));
    }
    let macs = live.each_ref().map(Net::mac);
    assert!(heard.chunks(live.len()).all(|round| round == macs));
    assert_eq!(listener.receive(Duration::from_millis(500)).unwrap(), None);
}
