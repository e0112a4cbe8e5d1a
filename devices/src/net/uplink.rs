//! A tap of the host as a port of a switch: what connects the functions on the switch with the world.
//!
//! It is no function and has no gate, but stops with them: while it is closed, frames for the machine wait in the kernel.
//!
//! Its lock is taken before those of the switch, by nobody who has that of a function.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::link::Link;
use super::offload;
use super::{SwitchPort, Tap};

/// Frames carried at a time, so that other functions of the I/O thread get their turn.
const BATCH: usize = 256;
/// Batches carried to the host at the end. More than a port keeps.
const FLUSH_BATCHES: usize = 8;

/// Carries frames between a port and a tap, to be added to an [`IoThread`](crate::io::IoThread). It begins closed.
///
/// Both ends take every offload, so that no frame is changed on the way. A frame the host does not take is dropped and
/// counted at the tap.
pub struct Uplink {
    carrier: Arc<Mutex<Carrier>>,
    /// Descriptors of the two ends. The carrier keeps them open.
    port_fd: RawFd,
    tap_fd: RawFd,
}

/// Opens and closes an [`Uplink`].
#[derive(Clone)]
pub struct UplinkControl(Arc<Mutex<Carrier>>);

/// Whoever moves frames, or lets them be moved, has its lock.
struct Carrier {
    port: SwitchPort,
    tap: Tap,
    open: bool,
    /// The tap may have frames about which there will be no event.
    untold: bool,
}

impl UplinkControl {
    /// What the switch sent before goes out; then frames in either direction wait. When this returns, nothing reads from the
    /// tap or writes to it.
    pub fn close(&self) {
        let mut carrier = lock(&self.0);
        if carrier.open {
            // Their senders were told that they are gone, and a machine that moves away does not take them along.
            // And then no more, should somebody send all the same.
            for _ in 0..FLUSH_BATCHES {
                if !carrier.feed_host() {
                    break;
                }
            }
            carrier.open = false;
        }
    }

    /// Frames go on, those first that wait.
    pub fn reopen(&self) {
        let mut carrier = lock(&self.0);
        carrier.open = true;
        carrier.untold = true;
        carrier.port.wake();
    }
}

fn lock(carrier: &Mutex<Carrier>) -> MutexGuard<'_, Carrier> {
    carrier.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Uplink {
    /// Plugs `tap` into `port`.
    pub fn new(mut port: SwitchPort, mut tap: Tap) -> Self {
        port.up(offload::ALL);
        tap.up(offload::ALL);
        Self {
            port_fd: port.event_fd(),
            tap_fd: tap.event_fd(),
            carrier: Arc::new(Mutex::new(Carrier {
                port,
                tap,
                open: false,
                untold: false,
            })),
        }
    }

    /// What opens and closes it.
    pub fn control(&self) -> UplinkControl {
        UplinkControl(Arc::clone(&self.carrier))
    }
}

impl Carrier {
    /// True if there may be more.
    fn feed_host(&mut self) -> bool {
        for _ in 0..BATCH {
            let Some(frame) = self.port.peek() else {
                return false;
            };
            let len = frame.len();
            self.tap.write(frame);
            self.port.delivered(len);
            self.port.consume();
        }
        true
    }

    /// True if there may be more.
    fn feed_switch(&mut self) -> bool {
        let mut more = true;
        for _ in 0..BATCH {
            let Some(frame) = self.tap.peek() else {
                more = false;
                break;
            };
            self.port.inject(frame);
            self.tap.consume();
        }
        self.port.flush();
        more
    }

    /// One of the ends became readable; the tap, if `from_host`.
    fn carry(&mut self, from_host: bool) {
        self.untold |= from_host;
        if !self.open {
            // Whoever opens it wakes the port.
            return;
        }
        let mut more = !from_host && self.feed_host();
        if self.untold {
            self.untold = self.feed_switch();
            more |= self.untold;
        }
        if more {
            // Both are watched edge-triggered: the rest needs an event of its own.
            self.port.wake();
        }
    }
}

impl MutEventSubscriber for Uplink {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let from_host = events.fd() == self.tap_fd;
        let mut carrier = lock(&self.carrier);
        carrier.carry(from_host);
        let gone = EventSet::ERROR | EventSet::HANG_UP;
        if from_host && events.event_set().intersects(gone) {
            // The interface was deleted: nothing comes from it any more, and nothing needs to wait for it.
            carrier.port.down();
            if let Err(error) = ops.remove(Events::new_raw(self.tap_fd, EventSet::IN)) {
                tracing::error!(
                    tap = carrier.tap.name(),
                    ?error,
                    "cannot let go of an uplink"
                );
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for fd in [self.port_fd, self.tap_fd] {
            let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
            if let Err(error) = ops.add(Events::new_raw(fd, edges)) {
                let carrier = lock(&self.carrier);
                tracing::error!(tap = carrier.tap.name(), ?error, "cannot watch an uplink");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::IoThread;
    use crate::net::link::HEADER_LEN;
    use crate::net::tap::tests::{
        delete, in_a_network_of_its_own, packet_socket, packet_socket_for,
    };
    use crate::net::{MacAddress, Net, PortConfig, Switch};
    use crate::testing::{Buf, Driver};
    use event_manager::SubscriberOps;
    use std::io::{Read, Write};

    fn frame(destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
        let mut frame = [destination, source].concat();
        frame.extend([0x88, 0xb5]);
        frame.extend([7; 50]);
        frame
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn frames_cross_between_a_switch_and_the_host() {
        const HOST: [u8; 6] = [2, 0, 0, 0, 0, 9];
        const DEVICE: [u8; 6] = [2, 0, 0, 0, 0, 1];

        fn cross() {
            let switch = Switch::new();
            let plug = |octets, check_source| {
                let port = PortConfig {
                    name: String::new(),
                    mac: MacAddress::new(octets),
                    check_source,
                };
                switch.port(port).unwrap()
            };
            let device = Net::new(MacAddress::new(DEVICE), plug(DEVICE, true));
            let uplink = Uplink::new(
                plug([2, 0, 0, 0, 0, 2], false),
                Tap::open("tern-up").unwrap(),
            );
            let mut host = packet_socket("tern-up");
            uplink.control().reopen();
            let thread = IoThread::spawn("io").unwrap();
            thread.add(Box::new(uplink)).unwrap();

            let mut driver = Driver::live(device, 0);
            let header = || Buf::Out(vec![0; HEADER_LEN]);
            let out = frame(HOST, DEVICE);
            let mut got = [0; 2000];
            for _ in 0..3 {
                driver.request(1, &[header(), Buf::Out(out.clone())]);
                // The host's own chatter is not of this type.
                let n = host.read(&mut got).unwrap();
                assert_eq!(got[..n], out);
            }

            // The host's own chatter comes in too; ours is among it.
            let offered: Vec<_> = (0..100).map(|_| driver.add(0, &[Buf::In(2000)])).collect();
            driver.kick(0);
            let back = frame(DEVICE, HOST);
            for _ in 0..3 {
                host.write_all(&back).unwrap();
                driver.until("the frame", |d| {
                    let Some((head, len)) = d.used(0) else {
                        return false;
                    };
                    let buffer = offered.iter().find(|b| b.head == head).unwrap();
                    d.written(buffer)[HEADER_LEN..len as usize] == back
                });
            }
            let uplink = &switch.ports()[1];
            assert_eq!(
                (uplink.stats.tx_frames >= 3, uplink.learned >= 1),
                (true, true)
            );
            assert!(uplink.stats.rx_frames >= 3);
        }
        in_a_network_of_its_own(cross);
    }

    /// The other end of an uplink: a port that is up.
    fn plug(switch: &Switch, n: u8) -> SwitchPort {
        let port = PortConfig {
            name: String::new(),
            mac: MacAddress::new([2, 0, 0, 0, 0, n]),
            check_source: false,
        };
        let mut port = switch.port(port).unwrap();
        port.up(offload::ALL);
        port
    }

    /// A frame of port 1 with number `n`, from the host or to it.
    fn numbered(n: u8, to_host: bool) -> Vec<u8> {
        let (port, host) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 9]);
        let mut frame = match to_host {
            true => frame(host, port),
            false => frame(port, host),
        };
        frame.push(n);
        frame
    }

    /// The number in `bytes`, if they are such a frame.
    fn number(bytes: &[u8], to_host: bool) -> Option<u8> {
        let n = *bytes.last()?;
        (bytes == numbered(n, to_host)).then_some(n)
    }

    /// Numbers of the frames that wait at `port`.
    fn arrived(port: &mut SwitchPort) -> Vec<u8> {
        let mut got = Vec::new();
        while let Some(frame) = port.peek() {
            // The host's own chatter comes in too.
            got.extend(number(&frame[HEADER_LEN..], false));
            port.consume();
        }
        got
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn frames_wait_while_an_uplink_is_closed() {
        fn wait() {
            let switch = Switch::new();
            let mut device = plug(&switch, 1);
            let uplink = Uplink::new(plug(&switch, 2), Tap::open("tern-shut").unwrap());
            let control = uplink.control();
            let mut host = packet_socket("tern-shut");
            rustix::io::ioctl_fionbio(&host, true).unwrap();
            let mut events = event_manager::EventManager::<Uplink>::new().unwrap();
            events.add_subscriber(uplink);
            let mut rest = || {
                let rests = (0..100).any(|_| events.run_with_timeout(0).unwrap() == 0);
                assert!(rests, "a closed uplink is busy for ever");
            };
            let send = |device: &mut SwitchPort, n| {
                let mut bytes = vec![0; HEADER_LEN];
                bytes.extend(numbered(n, true));
                device.inject(&bytes);
                device.flush();
            };
            let heard = |host: &mut std::fs::File| {
                let mut bytes = [0; 2000];
                let mut got = Vec::new();
                while let Ok(len) = host.read(&mut bytes) {
                    got.extend(number(&bytes[..len], true));
                }
                got
            };

            // Not started yet.
            for n in 1..=3 {
                host.write_all(&numbered(n, false)).unwrap();
            }
            send(&mut device, 1);
            rest();
            assert_eq!(arrived(&mut device), []);
            assert_eq!(heard(&mut host), []);

            control.reopen();
            rest();
            assert_eq!(arrived(&mut device), [1, 2, 3]);
            assert_eq!(heard(&mut host), [1]);

            // Paused; what was sent before goes out without the thread.
            send(&mut device, 2);
            control.close();
            assert_eq!(heard(&mut host), [2]);
            host.write_all(&numbered(4, false)).unwrap();
            send(&mut device, 3);
            control.close();
            rest();
            assert_eq!(arrived(&mut device), []);
            assert_eq!(heard(&mut host), []);
            assert_eq!(switch.ports()[1].waiting, 1);

            control.reopen();
            rest();
            assert_eq!(arrived(&mut device), [4]);
            assert_eq!(heard(&mut host), [3]);
        }
        in_a_network_of_its_own(wait);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn more_than_a_batch_that_waited_is_carried() {
        fn carry() {
            let switch = Switch::new();
            let mut device = plug(&switch, 1);
            let uplink = Uplink::new(plug(&switch, 2), Tap::open("tern-many").unwrap());
            let control = uplink.control();
            let mut host = packet_socket("tern-many");
            let mut events = event_manager::EventManager::<Uplink>::new().unwrap();
            events.add_subscriber(uplink);
            // The kernel keeps 1000 for a tap.
            for round in 0..3u8 {
                for _ in 0..250 {
                    host.write_all(&numbered(round, false)).unwrap();
                }
            }
            control.reopen();
            while events.run_with_timeout(0).unwrap() > 0 {}
            let got = arrived(&mut device);
            assert_eq!(got, [[0; 250], [1; 250], [2; 250]].concat());
        }
        in_a_network_of_its_own(carry);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn an_address_is_announced_through_an_uplink() {
        fn announce() {
            let switch = Switch::new();
            let device = plug(&switch, 1);
            let uplink = Uplink::new(plug(&switch, 2), Tap::open("tern-call").unwrap());
            let control = uplink.control();
            let mut host = packet_socket_for("tern-call", 0x8035);
            let thread = IoThread::spawn("io").unwrap();
            thread.add(Box::new(uplink)).unwrap();
            // One that is announced a moment too early is heard when the machine goes on.
            device.announcer().announce();
            control.reopen();
            device.announcer().announce();
            for _ in 0..2 {
                let mut frame = [0; 100];
                assert_eq!(host.read(&mut frame).unwrap(), 60);
                assert_eq!(frame[..6], [0xff; 6]);
                assert_eq!(frame[6..14], [2, 0, 0, 0, 0, 1, 0x80, 0x35]);
            }
        }
        in_a_network_of_its_own(announce);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn an_uplink_whose_tap_is_deleted_comes_to_rest() {
        fn vanish() {
            let switch = Switch::new();
            let plug = |n| {
                let port = PortConfig {
                    name: String::new(),
                    mac: MacAddress::new([2, 0, 0, 0, 0, n]),
                    check_source: false,
                };
                switch.port(port).unwrap()
            };
            let mut sender = plug(1);
            let uplink = Uplink::new(plug(2), Tap::open("tern-gone").unwrap());
            uplink.control().reopen();
            let mut events = event_manager::EventManager::<Uplink>::new().unwrap();
            events.add_subscriber(uplink);
            let mut rests = || (0..20).any(|_| events.run_with_timeout(0).unwrap() == 0);
            assert!(rests());
            assert!(switch.ports()[1].up);
            delete("tern-gone");
            assert!(rests(), "the deleted tap is reported for ever");
            assert!(!switch.ports()[1].up);
            let mut bytes = vec![0; HEADER_LEN];
            bytes.extend(frame([0xff; 6], [2, 0, 0, 0, 0, 1]));
            sender.inject(&bytes);
            sender.flush();
            assert!(rests());
            assert_eq!(switch.ports()[1].waiting, 0);
        }
        in_a_network_of_its_own(vanish);
    }
}
