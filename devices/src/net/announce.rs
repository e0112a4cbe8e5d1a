//! Telling the network where a machine is now.
//!
//! Switches learn from the source of a frame which way its sender is. After a machine was moved they would send frames for it
//! the old way until it happens to send something, so a frame is sent in its name: a RARP request (RFC 903), which asks for
//! the protocol address of its own sender and so changes no table of neighbours, and which nobody answers any more.

use super::MacAddress;
use super::link::HEADER_LEN;
use super::switch::Outlet;
use super::tap::TapHandle;

/// Length of the shortest frame on a wire, without its checksum. Some switches drop what is shorter.
const LEN: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
const ETHERTYPE_RARP: [u8; 2] = 0x8035u16.to_be_bytes();
/// Hardware addresses of Ethernet (1), of 6 octets, for protocol addresses of IPv4, of 4.
const ADDRESSES: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];
const REVERSE_REQUEST: [u8; 2] = 3u16.to_be_bytes();
const UNKNOWN: [u8; 4] = [0; 4];

/// Says where a network device is. Thread-safe; it may outlive the device, and then does nothing.
pub struct Announcer {
    mac: MacAddress,
    way: Way,
}

enum Way {
    Tap(TapHandle),
    Port(Outlet),
}

impl Announcer {
    pub(super) fn on_tap(mac: MacAddress, tap: TapHandle) -> Self {
        let way = Way::Tap(tap);
        Self { mac, way }
    }

    pub(super) fn on_port(mac: MacAddress, port: Outlet) -> Self {
        let way = Way::Port(port);
        Self { mac, way }
    }

    /// Sends the frame from where the device sends its own, if a driver is there.
    pub fn announce(&self) {
        let frame = frame(self.mac);
        match &self.way {
            Way::Tap(tap) => tap.announce(&frame),
            Way::Port(port) => port.announce(frame, self.mac, MacAddress::new(BROADCAST)),
        }
    }
}

/// The frame for `mac`, header included.
fn frame(mac: MacAddress) -> Vec<u8> {
    let mac = mac.octets();
    let mut frame = vec![0; HEADER_LEN];
    for part in [
        BROADCAST.as_slice(),
        &mac,
        &ETHERTYPE_RARP,
        &ADDRESSES,
        &REVERSE_REQUEST,
        // Sender, then target.
        &mac,
        &UNKNOWN,
        &mac,
        &UNKNOWN,
    ] {
        frame.extend_from_slice(part);
    }
    frame.resize(HEADER_LEN + LEN, 0);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::link::Link;
    use crate::net::{PortConfig, Switch, SwitchPort};

    const MAC: MacAddress = MacAddress::new([2, 0, 0, 0, 0, 1]);

    fn port(switch: &Switch, mac: MacAddress) -> SwitchPort {
        let config = PortConfig {
            name: String::new(),
            mac,
            check_source: true,
        };
        switch.port(config).unwrap()
    }

    #[test]
    fn the_frame_is_a_request_of_the_device_for_its_own_address() {
        let frame = frame(MAC);
        let expected = [
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // header of virtio
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x80, 0x35, // Ethernet
            0, 1, 8, 0, 6, 4, 0, 3, // kinds and lengths of addresses, operation
            2, 0, 0, 0, 0, 1, 0, 0, 0, 0, // sender
            2, 0, 0, 0, 0, 1, 0, 0, 0, 0, // target
        ];
        assert_eq!(frame[..expected.len()], expected);
        assert_eq!(frame[expected.len()..], [0; 18]);
    }

    #[test]
    fn it_reaches_every_other_port_and_wakes_its_receiver() {
        let switch = Switch::new();
        let mut sender = port(&switch, MAC);
        let announcer = sender.announcer();
        let mut others = [2, 3].map(|n| port(&switch, MacAddress::new([2, 0, 0, 0, 0, n])));
        for port in &mut others {
            port.up(0);
        }
        announcer.announce();
        assert!(others[0].peek().is_none(), "announced without a driver");

        sender.up(0);
        std::thread::spawn(move || announcer.announce())
            .join()
            .unwrap();
        for port in &mut others {
            assert_eq!(port.peek().unwrap(), frame(MAC));
            port.consume();
            assert!(port.peek().is_none());
            assert_eq!(port.shared_event().read().unwrap(), 1);
        }
        assert!(sender.peek().is_none());
    }

    #[test]
    fn an_announcer_of_a_port_that_is_gone_does_not_speak_for_the_next_one() {
        let switch = Switch::new();
        let mut sender = port(&switch, MAC);
        sender.up(0);
        let announcer = sender.announcer();
        drop(sender);
        let next = MacAddress::new([2, 0, 0, 0, 0, 9]);
        let mut others = [next, MacAddress::new([2, 0, 0, 0, 0, 8])].map(|mac| port(&switch, mac));
        for port in &mut others {
            port.up(0);
        }
        announcer.announce();
        assert!(others.iter_mut().all(|port| port.peek().is_none()));
        assert_eq!(switch.ports()[0].learned, 0);
    }
}
