//! What moves with a virtio function: the one plain struct that every saved form is an encoding of.
//!
//! The device context of the migration commands ([`context`](crate::context)) is such an encoding. These types are
//! never the running ones: [`VirtioFunction::save`](crate::virtio::VirtioFunction::save) makes one of them from a
//! function at rest, and [`restore`](crate::virtio::VirtioFunction::restore) checks all of one before it changes
//! anything.
//!
//! PCI configuration space and the MSI-X table are not in it: a hypervisor saves those by itself.

/// The state of one function, as its driver left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionState {
    /// Feature bits that the device offered, bit `n` being feature `n`.
    pub offered: u128,
    /// Feature bits that the driver accepted.
    pub accepted: u128,
    /// The registers that belong to no queue.
    pub registers: RegisterState,
    /// Every virtqueue, by its index. The administration virtqueue of an owner is not among them.
    pub queues: Vec<QueueState>,
    /// The device configuration.
    pub config: Vec<u8>,
}

/// The registers of the common configuration that belong to no queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterState {
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// `config_msix_vector`.
    pub config_vector: u16,
    /// `num_queues`: always the number of queues of the device.
    pub num_queues: u16,
    /// `device_status`, with the bits of the stop that is in force.
    pub status: u8,
    /// `config_generation`.
    pub config_generation: u8,
    /// `queue_select`.
    pub queue_select: u16,
    /// `queue_select` of the device-state capability; 0 without it.
    pub state_queue_select: u16,
}

/// One split virtqueue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// `queue_size`.
    pub size: u16,
    /// `queue_msix_vector`.
    pub vector: u16,
    /// Guest physical address of the descriptor table.
    pub descriptor_area: u64,
    /// Guest physical address of the available ring.
    pub driver_area: u64,
    /// Guest physical address of the used ring.
    pub device_area: u64,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_status` of the device-state capability was written 0 while the queue was enabled.
    pub stopped: bool,
    /// The available-ring entry the device fetches next, modulo 2^16. Of a queue that is not enabled: where it will
    /// start.
    pub next_available: u16,
    /// The used-ring entry the device writes next, modulo 2^16. Of a queue whose driver left `last_avail_idx` alone that is
    /// `next_available - owned.len()`.
    pub next_used: u16,
    /// The driver wrote `last_avail_idx`, and nothing was fetched since: the device goes on in the used ring where that
    /// says it stands (G0-l).
    pub restarts: bool,
    /// Heads of the chains that the device fetched and did not use, in the order in which they were fetched. They are
    /// executed anew before anything else is fetched.
    pub owned: Vec<u16>,
}

/// What is the same in every state of one device, and bounds what a saved form of it can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The largest size of each virtqueue, by index.
    pub queue_sizes: Vec<u16>,
    /// Bytes of the device configuration.
    pub config_len: usize,
    /// The device has the device-state capability, so that its queues can be stopped one by one.
    pub queue_status: bool,
}
