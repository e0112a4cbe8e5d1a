//! Commands of the control virtqueue (virtio 1.4, "Control Virtqueue").
//!
//! | part of a chain | offset | field |
//! |---|---|---|
//! | device-readable | 0 | u8 class |
//! | | 1 | u8 command |
//! | | 2 | command-specific-data |
//! | device-writable | 0 | u8 ack |
//! | | 1 | command-specific-result |
//!
//! The one command of this device has neither data nor a result; data is ignored.

use vm_memory::GuestMemoryError;

use crate::memory::View;
use crate::virtio::Chain;

/// VIRTIO_NET_CTRL_ANNOUNCE.
const CLASS_ANNOUNCE: u8 = 3;
/// VIRTIO_NET_CTRL_ANNOUNCE_ACK.
const ANNOUNCE_ACK: u8 = 0;

/// What a driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// The driver announces itself, and so the device does not ask for it any more.
    AnnounceAck,
    /// Something this device does not have, or less than a command.
    Unknown,
}

/// The answer to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Ack {
    /// VIRTIO_NET_OK.
    Ok = 0,
    /// VIRTIO_NET_ERR.
    Err = 1,
}

impl Command {
    /// Reads the command in `chain`, whatever is in it.
    pub fn read(chain: &Chain, view: &View) -> Result<Self, GuestMemoryError> {
        let mut header = [0; 2];
        let len = chain.read(view, 0, &mut header)?;
        Ok(match header {
            [CLASS_ANNOUNCE, ANNOUNCE_ACK] if len == header.len() => Self::AnnounceAck,
            _ => Self::Unknown,
        })
    }
}
