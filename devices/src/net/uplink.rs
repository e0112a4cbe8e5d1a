//! A tap of the host as a port of a switch: what connects the functions on the switch with the world.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::link::Link;
use super::offload;
use super::{SwitchPort, Tap};

/// Frames carried at a time, so that other functions of the I/O thread get their turn.
const BATCH: usize = 256;

/// Carries frames between a port and a tap, to be added to an [`IoThread`](crate::io::IoThread).
///
/// Both ends take every offload, so that no frame is changed on the way. A frame the host does not take is dropped and
/// counted at the tap.
pub struct Uplink {
    port: SwitchPort,
    tap: Tap,
}

impl Uplink {
    /// Plugs `tap` into `port`.
    pub fn new(mut port: SwitchPort, mut tap: Tap) -> Self {
        port.up(offload::ALL);
        tap.up(offload::ALL);
        Self { port, tap }
    }

    fn feed_host(&mut self) {
        for _ in 0..BATCH {
            let Some(frame) = self.port.peek() else {
                return;
            };
            let len = frame.len();
            self.tap.write(frame);
            self.port.delivered(len);
            self.port.consume();
        }
        // Watched edge-triggered: the rest needs an event of its own.
        self.port.wake();
    }

    fn feed_switch(&mut self) {
        for _ in 0..BATCH {
            let Some(frame) = self.tap.peek() else {
                break;
            };
            self.port.inject(frame);
            self.tap.consume();
        }
        self.port.flush();
    }

    /// The interface was deleted: nothing comes from it any more, and nothing needs to wait for it.
    fn retire(&mut self, ops: &mut EventOps<'_>) {
        self.port.down();
        let fd = self.tap.event_fd();
        if let Err(error) = ops.remove(Events::new_raw(fd, EventSet::IN)) {
            tracing::error!(tap = self.tap.name(), ?error, "cannot let go of an uplink");
        }
    }
}

impl MutEventSubscriber for Uplink {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() != self.tap.event_fd() {
            return self.feed_host();
        }
        self.feed_switch();
        let gone = EventSet::ERROR | EventSet::HANG_UP;
        if events.event_set().intersects(gone) {
            // It stays so and would be reported for ever.
            self.retire(ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, set) in [
            (self.port.event_fd(), edges),
            (self.tap.event_fd(), EventSet::IN),
        ] {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                tracing::error!(tap = self.tap.name(), ?error, "cannot watch an uplink");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::IoThread;
    use crate::net::link::HEADER_LEN;
    use crate::net::tap::tests::{delete, in_a_network_of_its_own, packet_socket};
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
