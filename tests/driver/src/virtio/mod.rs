//! Virtio as a driver sees it.

pub mod admin;
pub mod block;
mod device_state;
mod doors;
pub mod management;
pub mod migration;
pub mod net;
mod packed;
mod queue;
mod ring;
mod transport;

pub use device_state::{DeviceState, state};
pub use doors::Door;
pub use packed::{PackedLayout, PackedQueue, event_flag};
pub use queue::Queue;
pub use ring::{
    Buffer, Descriptor, Layout, QueueError, SplitQueue, Used, avail_flag, descriptor_flag,
    used_flag,
};
pub use transport::{Structure, Transport, TransportError, VENDOR, common, structure};

/// Bits of the device status field.
pub mod status {
    /// The driver noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Feature negotiation is complete.
    pub const FEATURES_OK: u8 = 8;
    /// The device is suspended.
    pub const SUSPEND: u8 = 16;
    /// The device is stopped.
    pub const DEVICE_STOPPED: u8 = 32;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver gave up.
    pub const FAILED: u8 = 128;
}

/// Feature bits that belong to no device type.
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Notifications are suppressed by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
    /// Virtqueues are packed rings.
    pub const RING_PACKED: u64 = 1 << 34;
    /// The device owns virtual functions.
    pub const SR_IOV: u64 = 1 << 37;
    /// Single queues can be reset.
    pub const RING_RESET: u64 = 1 << 40;
    /// There are administration queues.
    pub const ADMIN_VQ: u64 = 1 << 41;
}

/// The vector number that means "no interrupt".
pub const NO_VECTOR: u16 = 0xffff;

/// ISR status bits.
pub mod isr {
    /// A queue was used.
    pub const QUEUE: u8 = 1;
    /// The configuration changed.
    pub const CONFIG: u8 = 2;
}
