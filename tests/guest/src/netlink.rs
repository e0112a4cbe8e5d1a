//! Network interfaces: addresses, state, namespaces. Just the five requests the scenarios need, over rtnetlink.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketType, netdevice, recv, sendto, socket,
};

use crate::{Context, Failure, Result};

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_REPLACE: u16 = 0x100;
const IFF_UP: u32 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const AF_INET: u8 = 2;
/// The kernel puts a number in place of `%d`.
const ANY_NAME: &[u8; 8] = b"eth%d\0\0\0";

/// A connection to the network namespace of the thread that made it.
pub struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    pub fn open() -> Result<Self> {
        // Protocol 0 of this family is NETLINK_ROUTE.
        let socket =
            socket(AddressFamily::NETLINK, SocketType::RAW, None).context("opening netlink")?;
        Ok(Self { socket })
    }

    /// The index of an interface.
    pub fn index(&self, name: &str) -> Result<u32> {
        let inet =
            socket(AddressFamily::INET, SocketType::DGRAM, None).context("opening a socket")?;
        match netdevice::name_to_index(&inet, name) {
            Ok(index) => Ok(index),
            Err(Errno::NODEV) => Err(Failure(format!("there is no interface {name}"))),
            Err(error) => Err(Failure(format!("interface {name}: {error}"))),
        }
    }

    /// Brings an interface up.
    pub fn up(&self, name: &str) -> Result<()> {
        let message = Message::link(self.index(name)?, IFF_UP);
        self.request(message)
            .context(format_args!("bringing {name} up"))
    }

    /// Gives an interface an address.
    pub fn address(&self, name: &str, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let mut message = Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE);
        // struct ifaddrmsg: family, prefix length, flags, scope, index.
        message.0.extend_from_slice(&[AF_INET, prefix, 0, 0]);
        message
            .0
            .extend_from_slice(&self.index(name)?.to_ne_bytes());
        message.attribute(IFA_LOCAL, &address.octets());
        message.attribute(IFA_ADDRESS, &address.octets());
        self.request(message)
            .context(format_args!("giving {name} the address {address}/{prefix}"))
    }

    /// Moves an interface to another network namespace, which has none of that name.
    pub fn move_to(&self, name: &str, namespace: impl AsFd) -> Result<()> {
        let message = Message::link(self.index(name)?, 0);
        self.finish_move(name, namespace, message)
    }

    /// Moves an interface to another network namespace, where it gets the first name that is free.
    pub fn move_back(&self, name: &str, namespace: impl AsFd) -> Result<()> {
        let mut message = Message::link(self.index(name)?, 0);
        message.attribute(IFLA_IFNAME, ANY_NAME);
        self.finish_move(name, namespace, message)
    }

    fn finish_move(&self, name: &str, namespace: impl AsFd, mut message: Message) -> Result<()> {
        message.attribute(IFLA_NET_NS_FD, &namespace.as_fd().as_raw_fd().to_ne_bytes());
        self.request(message).context(format_args!("moving {name}"))
    }

    fn request(&self, message: Message) -> std::result::Result<(), Errno> {
        sendto(
            &self.socket,
            &message.finish(),
            SendFlags::empty(),
            &SocketAddrNetlink::new(0, 0),
        )?;
        let mut reply = [0; 1024];
        let (length, _) = recv(&self.socket, &mut reply, RecvFlags::empty())?;
        acknowledgement(&reply[..length])
    }
}

/// The errno in an acknowledgement: struct nlmsghdr (16 bytes), then the errno, negated.
fn acknowledgement(reply: &[u8]) -> std::result::Result<(), Errno> {
    const NLMSG_ERROR: [u8; 2] = 2u16.to_ne_bytes();
    match reply {
        [
            _,
            _,
            _,
            _,
            t0,
            t1,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            _,
            e0,
            e1,
            e2,
            e3,
            ..,
        ] if [*t0, *t1] == NLMSG_ERROR => match i32::from_ne_bytes([*e0, *e1, *e2, *e3]) {
            0 => Ok(()),
            error => Err(Errno::from_raw_os_error(-error)),
        },
        _ => Err(Errno::BADMSG),
    }
}

/// A request being put together.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4]; // length, set at the end
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]); // sequence number, port
        Self(bytes)
    }

    /// RTM_NEWLINK with struct ifinfomsg, setting these flags of the interface.
    fn link(index: u32, flags: u32) -> Self {
        let mut message = Self::new(RTM_NEWLINK, 0);
        message.0.extend_from_slice(&[0; 4]); // family, padding, type
        message.0.extend_from_slice(&index.to_ne_bytes());
        message.0.extend_from_slice(&flags.to_ne_bytes());
        message.0.extend_from_slice(&flags.to_ne_bytes()); // which flags change
        message
    }

    /// Adds an attribute whose value is a multiple of four bytes.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.0
            .extend_from_slice(&(value.len() as u16 + 4).to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.0.len() as u32;
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_know_their_length() {
        let mut message = Message::link(3, IFF_UP);
        message.attribute(IFLA_NET_NS_FD, &7i32.to_ne_bytes());
        let bytes = message.finish();
        assert_eq!(bytes.len(), 16 + 16 + 8);
        assert_eq!(bytes[..4], 40u32.to_ne_bytes());
        assert_eq!(bytes[4..6], RTM_NEWLINK.to_ne_bytes());
        assert_eq!(bytes[20..24], 3u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 8u16.to_ne_bytes());
    }

    #[test]
    fn acknowledgements_carry_an_errno() {
        let reply = |kind: u16, error: i32| {
            let mut bytes = vec![0; 36];
            bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
            bytes[16..20].copy_from_slice(&error.to_ne_bytes());
            bytes
        };
        assert_eq!(acknowledgement(&reply(2, 0)), Ok(()));
        assert_eq!(acknowledgement(&reply(2, -19)), Err(Errno::NODEV));
        assert_eq!(acknowledgement(&reply(16, 0)), Err(Errno::BADMSG));
        assert_eq!(acknowledgement(&[0; 8]), Err(Errno::BADMSG));
    }

    /// The loopback interface is there wherever these tests run, and asking needs no privilege.
    #[test]
    fn interfaces_have_indices() {
        let netlink = Netlink::open().unwrap();
        assert_eq!(netlink.index("lo").unwrap(), 1);
        assert_eq!(
            netlink.index("no-such-if").unwrap_err().to_string(),
            "there is no interface no-such-if"
        );
    }
}
