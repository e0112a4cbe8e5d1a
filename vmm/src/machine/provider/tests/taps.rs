//! A machine that is handed over with its taps, of which one is an uplink.

#![allow(unsafe_code)]

use super::*;
use devices::gate::Reasons;
use driver::host::{HostDma, HostFunction};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};

const RARP: u16 = 0x8035;
const PATIENCE: Duration = Duration::from_secs(10);
/// How long to listen where nothing is to be heard.
const MOMENT: Duration = Duration::from_millis(50);
const NOTHING: [[u8; 0]; 2] = [[]; 2];

/// A raw socket of the host on interface `name`, which it brings up, that hears announcements.
fn host(name: &str) -> File {
    // SAFETY: plain system calls; `request` and `address` are valid for their lengths, and the new descriptor is owned by
    // nobody else.
    unsafe {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        let fd = libc::socket(libc::AF_PACKET, kind, i32::from(RARP.to_be()));
        assert!(fd >= 0, "{}", io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let fd = socket.as_raw_fd();
        assert_eq!(libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut request), 0);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = RARP.to_be();
        address.sll_ifindex = request.ifr_ifru.ifru_ifindex;
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        assert_eq!(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request), 0);
        let len = size_of_val(&address) as libc::socklen_t;
        assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
        socket.into()
    }
}

/// A broadcast of the host with `n` in it.
fn numbered(n: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9, 0x88, 0xb5]);
    frame.extend([n; 50]);
    frame
}

/// A machine, and the drivers of its two interfaces.
struct Rig {
    functions: Functions,
    drivers: [Net<HostFunction, HostDma>; 2],
    _machine: Machine,
}

impl Rig {
    /// Its guest does not run.
    fn new(spec: &MachineSpec, provider: Provider) -> Self {
        let backends = Backends::open_from(spec, provider, None, &Loss::default()).unwrap();
        let machine = Machine::new().unwrap();
        let (ram, msi) = (machine.dma().ram(), machine.msi());
        let functions = Functions::plug(backends, ram, machine.root(), msi).unwrap();
        for function in functions.all() {
            function.close(Reasons::PAUSED);
        }
        machine.power_on().unwrap();
        let drivers = [(0, 1), (1, 0)].map(|(bus, device)| {
            let function = machine.function(Address::new(bus, device, 0));
            change_command(&function, command::MEMORY | command::BUS_MASTER, 0);
            let transport = Transport::new(function).unwrap();
            Net::start(transport, machine.dma().clone(), 0).unwrap()
        });
        Self {
            functions,
            drivers,
            _machine: machine,
        }
    }

    /// Numbers of the frames that come to interface `index`: `count` of them, or what comes in a moment.
    fn heard(&mut self, index: usize, count: usize) -> Vec<u8> {
        let patience = if count == 0 { MOMENT } else { PATIENCE };
        let mut got = Vec::new();
        // The host's own chatter comes in too.
        while let Some(frame) = self.drivers[index].receive(patience).unwrap() {
            if frame.len() == 64 && frame == numbered(frame[14]) {
                got.push(frame[14]);
                if got.len() == count {
                    break;
                }
            }
        }
        got
    }
}

#[test]
#[ignore = "needs the privilege to create a tap"]
fn a_machine_is_handed_over_with_its_taps_and_what_waits_in_them() {
    fn hand_over() {
        let config = Config {
            kernel: Some("vmlinuz".into()),
            rng: Some(false),
            nets: vec!["tap=tern-net".parse().unwrap()],
            pfs: vec!["net,vfs=1,passthrough,uplink-tap=tern-up".parse().unwrap()],
            ..Config::default()
        };
        let spec = config.resolve().unwrap();
        let mut source = Rig::new(&spec, Provider::by_name());
        let mut hosts = ["tern-net", "tern-up"].map(host);
        let mut send = |n| {
            for host in &mut hosts {
                host.write_all(&numbered(n)).unwrap();
            }
        };
        send(1);
        assert_eq!([0, 1].map(|i| source.heard(i, 0)), NOTHING);
        source.functions.reopen(Reasons::PAUSED);
        assert_eq!([0, 1].map(|i| source.heard(i, 1)), [[1], [1]]);

        source
            .functions
            .close_and_drain(Reasons::PAUSED, PATIENCE)
            .unwrap();
        send(2);
        let received = lent(&source.functions);
        assert!(received.keys().eq(["net0", "pf0-uplink"]));
        let mut destination = Rig::new(&spec, Provider::by_name().received(received));
        send(3);
        assert_eq!([0, 1].map(|i| source.heard(i, 0)), NOTHING);
        assert_eq!([0, 1].map(|i| destination.heard(i, 0)), NOTHING);
        drop(source);
        destination.functions.reopen(Reasons::PAUSED);
        assert_eq!([0, 1].map(|i| destination.heard(i, 2)), [[2, 3], [2, 3]]);

        destination.functions.announce();
        for (host, driver) in hosts.iter_mut().zip(&destination.drivers) {
            let mut frame = [0; 100];
            let len = host.read(&mut frame).unwrap();
            assert_eq!(announced(&frame[..len]), Some(driver.mac()));
        }
    }
    let thread = std::thread::spawn(|| {
        // SAFETY: the call affects this thread alone, and those it starts, which are the machines'.
        let isolated = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
        assert!(isolated, "{}", io::Error::last_os_error());
        hand_over();
    });
    thread.join().unwrap();
}
