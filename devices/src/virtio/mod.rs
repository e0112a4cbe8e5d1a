//! The virtio core: what every virtio device has, whatever its type and its transport.
//!
//! ```text
//! transport ──► VirtioFunction ──► VirtioDevice (block, net, …)
//!  registers     status, features    requests
//!                queues, gate ◄────── Io (pop, push)
//! ```
//!
//! A transport calls [`VirtioFunction`] for registers; the I/O thread calls it for kicks and backend events. The
//! function decides whether the gate is open and hands the device an [`Io`], its only way to the rings. Virtqueues that are
//! not the device's own, such as the administration virtqueue, are served by a [`Service`] each.

mod chain;
mod device;
mod function;
mod interrupt;
mod queue;
mod service;
mod wakeups;
mod warnings;

#[cfg(test)]
mod tests;

pub use chain::{Chain, ChainError, Ticket};
pub use device::{Io, Progress, Source, VirtioDevice};
pub use function::{
    CheckedState, Doors, Epoch, Offer, QueueError, QueueInfo, Rest, Restoration, RestoreError,
    Selectors, Suspend, VirtioFunction, Wake,
};
pub use interrupt::{Cause, Interrupt, NO_VECTOR};
pub use queue::{Position, QueueRegisters, RingError, Virtqueue};
pub use service::{Executed, Service};
pub(crate) use wakeups::Wakeups;
pub(crate) use warnings::Warnings;

use bitflags::bitflags;

/// Feature bits that belong to no device type (virtio 1.4, "Reserved Feature Bits").
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` suppress notifications.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// The device follows virtio 1.0 or later; every device here requires it.
    pub const VERSION_1: u64 = 1 << 32;
    /// Virtqueues are packed rings. Offered by functions that are told to.
    pub const RING_PACKED: u64 = 1 << 34;
    /// The device is an SR-IOV physical function.
    pub const SR_IOV: u64 = 1 << 37;
    /// A single virtqueue can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// The device has administration virtqueues.
    pub const ADMIN_VQ: u64 = 1 << 41;

    /// What the core offers for every device.
    pub const TRANSPORT: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_RESET;
}

bitflags! {
    /// The device status field (virtio 1.4, "Device Status Field").
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Status: u8 {
        /// The driver noticed the device.
        const ACKNOWLEDGE = 1;
        /// The driver knows how to drive the device.
        const DRIVER = 2;
        /// The driver is ready; the device is live.
        const DRIVER_OK = 4;
        /// Feature negotiation is complete.
        const FEATURES_OK = 8;
        /// The device is suspended.
        const SUSPEND = 16;
        /// The device is stopped.
        const DEVICE_STOPPED = 32;
        /// The device met an error it cannot recover from.
        const NEEDS_RESET = 64;
        /// The driver gave up.
        const FAILED = 128;
    }
}

/// The virtio device type (virtio 1.4, "Device Types"). The PCI device ID is 0x1040 plus this number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum DeviceType {
    /// Network device.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Console.
    Console = 3,
    /// Entropy source.
    Rng = 4,
}

impl DeviceType {
    /// The name used in messages and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Console => "console",
            Self::Rng => "rng",
        }
    }
}
