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
}

impl MutEventSubscriber for Uplink {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.tap.event_fd() {
            self.feed_switch();
        } else {
            self.feed_host();
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
    use crate::net::tap::tests::{in_a_network_of_its_own, packet_socket};
    use crate::net::{MacAddress, Net, PortConfig, Switch};
    use crate::testing::{Buf, Driver};
    use std::io::{Read, Write};

    fn frame(destination: [u8; 6], source: [u8; 6]) -> Vec<u8> {
        let mut frame = [destination, source].concat();
        frame.extend([0x88, 0xb5]);
        frame.extend([7; 50]);
        frame
    }

    #[test]
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
        if !in_a_network_of_its_own(cross) {
            eprintln!("not run: no privilege to create a tap");
        }
    }
}
