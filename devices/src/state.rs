//! What moves with a virtio function: the one plain struct that every saved form is an encoding of.
//!
//! The device context of the migration commands ([`context`](crate::context)) is such an encoding. These types are
//! never the running ones: [`VirtioFunction::save`](crate::virtio::VirtioFunction::save) makes one of them from a
//! function at rest, and [`restore`](crate::virtio::VirtioFunction::restore) checks all of one before it changes
//! anything. That and the context announce themselves to the driver, as the migration commands want it: it is told of a
//! change of the configuration and of used buffers once more. [`restore_exact`](crate::virtio::VirtioFunction::restore_exact),
//! which needs the [`TransientState`] as well, changes nothing that a driver could see: what is saved again is the same.
//!
//! PCI configuration space and the MSI-X table are not in it: a hypervisor saves those by itself.
//!
//! | type | whose state | in a device context |
//! |---|---|---|
//! | [`FunctionState`] | a function, as its driver set it up | yes |
//! | [`TransientState`] | a function: notifications it owes, its services, what is its device type's own | no |
//! | [`OwnerState`] | an owner: sessions of its drivers, modes, write records | no |

use std::collections::BTreeMap;

use crate::gate::{Mode, Party};
use crate::memory::records::PageRange;
use crate::virtio::Position;

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

/// One virtqueue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueState {
    /// `queue_size`.
    pub size: u16,
    /// `queue_msix_vector`.
    pub vector: u16,
    /// Guest physical address of the descriptor table, or of the packed ring.
    pub descriptor_area: u64,
    /// Guest physical address of the available ring, or of the driver's event suppression.
    pub driver_area: u64,
    /// Guest physical address of the used ring, or of the device's event suppression.
    pub device_area: u64,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_status` of the device-state capability was written 0 while the queue was enabled; or VQ_ENABLE 0 waits for it.
    pub stopped: bool,
    /// The driver wrote where the queue goes on, and nothing was fetched since. A split ring goes on in the used ring where
    /// that says it stands (G0-l).
    pub restarts: bool,
    /// Where the device is in the rings. Packed if and only if the driver accepted VIRTIO_F_RING_PACKED and set FEATURES_OK.
    pub ring: RingState,
}

impl QueueState {
    /// Where the device is in its split rings, if it has these.
    pub fn split(&self) -> Option<&SplitState> {
        match &self.ring {
            RingState::Split(ring) => Some(ring),
            RingState::Packed(_) => None,
        }
    }

    /// The same, to change it.
    pub fn split_mut(&mut self) -> Option<&mut SplitState> {
        match &mut self.ring {
            RingState::Split(ring) => Some(ring),
            RingState::Packed(_) => None,
        }
    }
}

/// Where the device is in the rings of a virtqueue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RingState {
    /// In split rings.
    Split(SplitState),
    /// In a packed ring.
    Packed(PackedState),
}

/// Where the device is in split rings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitState {
    /// The available-ring entry the device fetches next, modulo 2^16. Of a queue that is not enabled: where it will
    /// start.
    pub next_available: u16,
    /// The used-ring entry the device writes next, modulo 2^16. Of a queue whose driver left `last_avail_idx` alone that is
    /// `next_available - owned.len()`.
    pub next_used: u16,
    /// Heads of the chains that the device fetched and did not use, in the order in which they were fetched. They are
    /// executed anew before anything else is fetched.
    pub owned: Vec<u16>,
}

/// Where the device is in a packed ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedState {
    /// The descriptor the device fetches next.
    pub next_available: Position,
    /// The descriptor the device uses next. Between the two are as many as the chains that the device owns have, unless its
    /// driver said where it goes on.
    pub next_used: Position,
    /// Chains that the device fetched and did not use, in the order in which they were fetched. They are executed anew before
    /// anything else is fetched.
    pub owned: Vec<OwnedChain>,
}

impl Default for PackedState {
    /// That of a ring at its start.
    fn default() -> Self {
        Self {
            next_available: Position::START,
            next_used: Position::START,
            owned: Vec::new(),
        }
    }
}

/// A chain of a packed ring. Its descriptors travel with it, since the device may have written used descriptors over them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedChain {
    /// Its buffer id.
    pub id: u16,
    /// Descriptors of the ring that it takes.
    pub descriptors: u16,
    /// What is in them. Descriptors without a length may be left out, so these may be fewer.
    pub buffers: Vec<OwnedBuffer>,
}

/// What a descriptor of a chain in a packed ring refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnedBuffer {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// What is there.
    pub kind: OwnedKind,
}

/// What is at the address of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnedKind {
    /// A buffer that the device reads.
    Readable,
    /// A buffer that the device writes.
    Writable,
    /// An indirect table. The chain has nothing else.
    Table,
}

impl OwnedKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Readable, Self::Writable, Self::Table];

    /// Its flags in a descriptor: VIRTQ_DESC_F_WRITE and VIRTQ_DESC_F_INDIRECT.
    pub fn flags(self) -> u16 {
        match self {
            Self::Readable => 0,
            Self::Writable => 2,
            Self::Table => 4,
        }
    }

    /// The one with these flags.
    pub fn from_flags(flags: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.flags() == flags)
    }
}

/// What is the same in every state of one device, and bounds what a saved form of it can hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The largest size of each virtqueue, by index.
    pub queue_sizes: Vec<u16>,
    /// Bytes of the device configuration.
    pub config_len: usize,
    /// Its queues can be stopped one by one, by the device-state capability or by commands of a transport virtqueue.
    pub queue_status: bool,
    /// The device offers packed rings.
    pub packed: bool,
}

/// State of a function that its device context leaves out, since whoever writes a context has the function notify its
/// driver once more. An exact restore, as that of a whole VM, needs both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TransientState {
    /// ISR status.
    pub isr: u8,
    /// A configuration change, or DEVICE_NEEDS_RESET, was not announced to the driver yet.
    pub config_pending: bool,
    /// Virtqueues with used buffers that the driver was not notified of yet, ascending. Those of services have the numbers
    /// after those of the device.
    pub unsignalled: Vec<u16>,
    /// Services, by name.
    pub services: BTreeMap<&'static str, ServiceState>,
    /// State of the device type's own.
    pub device: DeviceState,
}

/// State of one service: its virtqueue, and what else it keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceState {
    /// Its virtqueue. A command that waits is in it as a chain that the device owns.
    pub queue: QueueState,
    /// The rest.
    pub kept: Kept,
}

/// What a service keeps besides its virtqueue, and moves with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Kept {
    /// Nothing.
    #[default]
    Nothing,
    /// Managed devices.
    Managed(ManagerState),
}

/// State of one device type that is neither in its virtqueues nor in its configuration.
///
/// Frames that wait in a switch or a tap for a driver with buffers are not: networks may drop them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceState {
    /// There is none.
    #[default]
    None,
    /// virtio-console.
    Console {
        /// Bytes read from the input and not yet given to the driver.
        input: Vec<u8>,
    },
}

impl DeviceState {
    /// What a device without such state says to this one.
    pub fn must_be_none(&self) -> Result<(), &'static str> {
        match self {
            Self::None => Ok(()),
            _ => Err("it is of another type of device; this one has none"),
        }
    }
}

/// Why the state of a device cannot be saved. The message follows the name of the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot be saved: {0}")]
pub struct Unsavable(pub String);

/// State of a management device, apart from its function's: which managed devices there are. The state of each is that of its
/// function besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagerState {
    /// The id that the next device gets. Those of all devices are below.
    pub next_id: u64,
    /// The devices.
    pub devices: Vec<ManagedState>,
}

/// What a managed device has and its function has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManagedState {
    /// Device id.
    pub id: u64,
    /// The name of its function.
    pub name: String,
    /// Feature bits that it offers.
    pub features: u64,
    /// Interrupts for the configuration.
    pub config: MessageState,
    /// Interrupts for each virtqueue.
    pub queues: Vec<MessageState>,
}

/// A message that is an interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MessageState {
    /// Guest physical address that it is written to.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// It is sent.
    pub enabled: bool,
    /// It is held back.
    pub masked: bool,
    /// It waits behind the mask.
    pub pending: bool,
}

/// State of a group's owner, apart from its function's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnerState {
    /// Sessions of the drivers that move with the VM: that of the guest, and that of the monitor's commands.
    pub sessions: Vec<SessionState>,
}

/// State of one driver's session with an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionState {
    /// Whose session it is.
    pub party: Party,
    /// Commands chosen by LIST_USE for the self group, bit `n` being opcode `n`.
    pub self_group: Option<u128>,
    /// Commands chosen by LIST_USE for the SR-IOV group.
    pub sr_iov: Option<u128>,
    /// Members this driver has done something to, ascending by id.
    pub members: Vec<MemberSessionState>,
    /// The DEV_MODE_SET that waits for a member.
    pub transition: Option<TransitionState>,
}

/// What one driver has done to one member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberSessionState {
    /// Group member id.
    pub id: u16,
    /// Mode.
    pub mode: Mode,
    /// DEV_CTX_READ.
    pub reading: ReadingState,
    /// DEV_CTX_WRITE, if something was written that has not taken effect.
    pub writing: Option<WritingState>,
    /// Write records, if they were started.
    pub recording: Option<RecordingState>,
}

/// How far a context was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ReadingState {
    /// Not at all.
    #[default]
    Begin,
    /// In part.
    Part {
        /// The context as it was when its first byte was read.
        bytes: Vec<u8>,
        /// Bytes of it that were read.
        at: usize,
    },
    /// To its end.
    End,
}

/// Contexts that were written and have not taken effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WritingState {
    /// The last complete context.
    pub complete: Option<Vec<u8>>,
    /// The beginning of one that is not complete.
    pub partial: Vec<u8>,
}

/// Write records of one member, for one driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordingState {
    /// Page size in bytes.
    pub page_size: u64,
    /// Ranges under record, ascending and disjoint.
    pub ranges: Vec<PageRange>,
    /// Pages that were written and not yet read, ascending and disjoint.
    pub written: Vec<PageRange>,
}

/// A change of mode that waits for requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransitionState {
    /// Group member id.
    pub member: u16,
    /// The mode that was asked for, in force already.
    pub mode: Mode,
    /// The mode to return to if the command is abandoned.
    pub previous: Mode,
    /// Milliseconds until requests that have not begun are recalled; `None` once that was done.
    pub recall_after_ms: Option<u64>,
}
