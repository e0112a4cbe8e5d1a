//! The network hears where a guest is that was moved: from the monitor, and from the guest's own kernel.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType, recv, socket};

use super::move_to;
use crate::load::Load;
use crate::net::with_interface;
use crate::trial;
use crate::vm::PATIENCE;

/// EtherTypes.
const ARP: u16 = 0x0806;
const RARP: u16 = 0x8035;
/// Frames that the monitor sends for an interface.
const FRAMES: usize = 5;
/// Longer than it takes to send them.
const QUIET: Duration = Duration::from_secs(1);

/// A MAC address.
type Mac = [u8; 6];

/// An interface on a tap of its own, and a virtual function behind the tap of its owner's switch.
const INTERFACE: Mac = [2, 0, 0, 0x5e, 1, 0];
const OWNER: Mac = [2, 0, 0, 0x5e, 2, 0];
const MEMBER: Mac = [2, 0, 0, 0x5e, 2, 1];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("migrate::a_moved_guest_is_announced", || {
            announced("ternann", 80, |load| load)
        }),
        trial("migrate::a_moved_guest_with_linux_6_1_is_announced", || {
            announced("ternann6", 82, Load::linux_6_1)
        }),
    ]
}

/// What was heard of one interface.
#[derive(Debug, Default)]
struct Heard {
    /// Frames of the monitor.
    monitor: usize,
    /// Gratuitous ARP requests of the guest.
    guest: usize,
}

/// Hears announcements on all interfaces of this host.
struct Listener(Vec<OwnedFd>);

impl Listener {
    fn new() -> Result<Self> {
        let open = |kind: u16| -> Result<OwnedFd> {
            let protocol = NonZeroU32::new(kind.to_be().into()).map(Protocol::from_raw);
            let socket = socket(AddressFamily::PACKET, SocketType::RAW, protocol)
                .context("a packet socket")?;
            set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(20)))?;
            Ok(socket)
        };
        Ok(Self(vec![open(ARP)?, open(RARP)?]))
    }

    /// Adds what arrived, and returns after a short time without anything.
    fn listen(&self, heard: &mut BTreeMap<Mac, Heard>) {
        let mut frame = [0; 128];
        for socket in &self.0 {
            while let Ok((len, _)) = recv(socket, &mut frame, RecvFlags::empty()) {
                if let Some((mac, is_guest)) = announcement(&frame[..len]) {
                    let heard = heard.entry(mac).or_default();
                    if is_guest {
                        heard.guest += 1;
                    } else {
                        heard.monitor += 1;
                    }
                }
            }
        }
    }

    /// What is heard from now on, until `enough`.
    fn until(&self, enough: impl Fn(&BTreeMap<Mac, Heard>) -> bool) -> BTreeMap<Mac, Heard> {
        let deadline = Instant::now() + PATIENCE;
        let mut heard = BTreeMap::new();
        while !enough(&heard) && Instant::now() < deadline {
            self.listen(&mut heard);
        }
        heard
    }
}

/// The sender of an announcement, and whether it is the guest: an ARP request for the sender's own address.
fn announcement(frame: &[u8]) -> Option<(Mac, bool)> {
    let field = |at: usize, len: usize| frame.get(at..at + len);
    let sender = field(6, 6)?.try_into().ok()?;
    let kind: [u8; 2] = field(12, 2)?.try_into().ok()?;
    match u16::from_be_bytes(kind) {
        RARP => Some((sender, false)),
        ARP if field(28, 4)? == field(38, 4)? => Some((sender, true)),
        _ => None,
    }
}

fn text(mac: Mac) -> String {
    mac.map(|octet| format!("{octet:02x}")).join(":")
}

fn announced(tap: &str, network: u8, adjust: impl FnOnce(Load) -> Load) -> Result<()> {
    let (a, b) = (format!("{tap}0"), format!("{tap}1"));
    let address = |network: u8, host: u8| format!("192.168.{network}.{host}");
    let use_network = |device: &str, network: u8| {
        let (peer, own) = (address(network, 1), address(network, 2));
        format!("net-tap:dev={device}:peer={peer}:addr={own}")
    };
    with_interface(&a, &address(network, 1), || {
        with_interface(&b, &address(network + 1, 1), || {
            let scenario = [
                use_network("eth0", network),
                "sriov-enable:n=1".into(),
                use_network("eth2", network + 1),
                "steady:mib=4".into(),
                "dmesg-clean".into(),
            ];
            let load = Load::new(1)?.scenario(&scenario.join(",")).options([
                "--net".into(),
                format!("tap={a},mac={}", text(INTERFACE)),
                "--pf".into(),
                format!("net,vfs=1,uplink-tap={b},mac={}", text(OWNER)),
            ]);
            moved(adjust(load))
        })
    })
}

fn moved(load: Load) -> Result<()> {
    let listener = Listener::new()?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    for (number, options) in [(1, [].as_slice()), (2, &["--copy"])] {
        // What the guest had to say before.
        listener.listen(&mut BTreeMap::new());
        guest = move_to(guest, load.directory(), number, options)?.guest;
        let is_complete = |heard: &Heard| heard.guest > 0 && heard.monitor >= FRAMES;
        let heard = listener.until(|heard| {
            let mut both = [INTERFACE, MEMBER].iter();
            both.all(|mac| heard.get(mac).is_some_and(is_complete))
        });
        for mac in [INTERFACE, MEMBER] {
            let name = text(mac);
            let heard = heard
                .get(&mac)
                .with_context(|| format!("{name} is silent"))?;
            ensure!(heard.monitor == FRAMES, "{name}: {heard:?}");
            ensure!(heard.guest > 0, "{name}: {heard:?}");
        }
        std::thread::sleep(QUIET);
        let mut later = BTreeMap::new();
        listener.listen(&mut later);
        ensure!(later.values().all(|heard| heard.monitor == 0), "{later:?}");
        guest.ticks(1)?;
    }
    guest.enough().map(drop)
}
