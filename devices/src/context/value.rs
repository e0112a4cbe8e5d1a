//! The values of fields, byte by byte.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::state::{FunctionState, OwnedBuffer, OwnedChain, OwnedKind};

/// PCI_COMMON_CFG: the common configuration as the driver would read it now, 64 bytes.
///
/// | offset | register | offset | register |
/// |---|---|---|---|
/// | 0 | le32 device_feature_select | 26 | le16 queue_msix_vector |
/// | 4 | le32 device_feature | 28 | le16 queue_enable |
/// | 8 | le32 driver_feature_select | 30 | le16 queue_notify_off |
/// | 12 | le32 driver_feature | 32 | le64 queue_desc |
/// | 16 | le16 config_msix_vector | 40 | le64 queue_driver |
/// | 18 | le16 num_queues | 48 | le64 queue_device |
/// | 20 | u8 device_status | 56 | le16 queue_notif_config_data |
/// | 21 | u8 config_generation | 58 | le16 queue_reset |
/// | 22 | le16 queue_select | 60 | le16 admin_queue_index |
/// | 24 | le16 queue_size | 62 | le16 admin_queue_num |
///
/// Several registers are windows that a selector moves, so they repeat a part of what other fields say in full. Read
/// back are only the three selectors, config_msix_vector, device_status and config_generation; num_queues must be
/// right, and the rest is ignored (G3-f).
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct CommonConfig {
    /// `device_feature_select`.
    pub device_feature_select: U32,
    /// `device_feature`: the window of the offered features that `device_feature_select` chooses.
    pub device_feature: U32,
    /// `driver_feature_select`.
    pub driver_feature_select: U32,
    /// `driver_feature`: the window of the accepted features that `driver_feature_select` chooses.
    pub driver_feature: U32,
    /// `config_msix_vector`.
    pub config_vector: U16,
    /// `num_queues`.
    pub num_queues: U16,
    /// `device_status`.
    pub status: u8,
    /// `config_generation`.
    pub config_generation: u8,
    /// `queue_select`. The following registers are those of this queue, and 0 if there is none.
    pub queue_select: U16,
    /// `queue_size`.
    pub queue_size: U16,
    /// `queue_msix_vector`.
    pub queue_vector: U16,
    /// `queue_enable`.
    pub queue_enable: U16,
    /// `queue_notify_off`: the number of the queue.
    pub queue_notify_off: U16,
    /// `queue_desc`.
    pub queue_desc: U64,
    /// `queue_driver`.
    pub queue_driver: U64,
    /// `queue_device`.
    pub queue_device: U64,
    /// `queue_notif_config_data`: 0, as VIRTIO_F_NOTIF_CONFIG_DATA is not offered.
    pub queue_notif_config_data: U16,
    /// `queue_reset`: 0, as nothing is in flight.
    pub queue_reset: U16,
    /// `admin_queue_index`: 0, as members have no administration virtqueue.
    pub admin_queue_index: U16,
    /// `admin_queue_num`: 0, for the same reason.
    pub admin_queue_num: U16,
}

impl CommonConfig {
    /// What the driver would read from a function in `state`.
    pub(super) fn of(state: &FunctionState) -> Self {
        let registers = &state.registers;
        let index = registers.queue_select;
        let queue = state.queues.get(usize::from(index));
        Self {
            device_feature_select: registers.device_feature_select.into(),
            device_feature: window(state.offered, registers.device_feature_select).into(),
            driver_feature_select: registers.driver_feature_select.into(),
            driver_feature: window(state.accepted, registers.driver_feature_select).into(),
            config_vector: registers.config_vector.into(),
            num_queues: registers.num_queues.into(),
            status: registers.status,
            config_generation: registers.config_generation,
            queue_select: index.into(),
            queue_size: queue.map_or(0, |q| q.size).into(),
            queue_vector: queue.map_or(0, |q| q.vector).into(),
            queue_enable: queue.map_or(0, |q| q.enabled.into()).into(),
            queue_notify_off: queue.map_or(0, |_| index).into(),
            queue_desc: queue.map_or(0, |q| q.descriptor_area).into(),
            queue_driver: queue.map_or(0, |q| q.driver_area).into(),
            queue_device: queue.map_or(0, |q| q.device_area).into(),
            queue_notif_config_data: U16::ZERO,
            queue_reset: U16::ZERO,
            admin_queue_index: U16::ZERO,
            admin_queue_num: U16::ZERO,
        }
    }
}

/// Bits `32 * select` and the 31 above it; 0 beyond bit 127.
fn window(features: u128, select: u32) -> u32 {
    let shift = select.checked_mul(u32::BITS);
    shift.and_then(|by| features.checked_shr(by)).unwrap_or(0) as u32
}

/// VQ_CFG: the registers of one queue, 30 bytes (G3-e).
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | le16 queue_size |
/// | 4 | le16 queue_msix_vector |
/// | 6 | le64 queue_desc |
/// | 14 | le64 queue_driver |
/// | 22 | le64 queue_device |
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct QueueConfig {
    /// Index of the queue.
    pub queue: U16,
    /// `queue_size`.
    pub size: U16,
    /// `queue_msix_vector`.
    pub vector: U16,
    /// `queue_desc`, a guest physical address.
    pub descriptor_area: U64,
    /// `queue_driver`, a guest physical address.
    pub driver_area: U64,
    /// `queue_device`, a guest physical address.
    pub device_area: U64,
}

/// VQ_SPLIT_RUNTIME_CFG: where one split queue stands, 5 bytes.
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | le16 available-ring entry that is fetched next, modulo 2^16 |
/// | 4 | u8 queue_enable, 0 or 1 |
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct SplitRuntime {
    /// Index of the queue.
    pub queue: U16,
    /// The available-ring entry the device fetches next.
    pub next_available: U16,
    /// `queue_enable`, 0 or 1.
    pub enabled: u8,
}

/// VQ_PACKED_RUNTIME (G3-i): where one packed queue stands, 8 bytes.
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | le16 descriptor that is fetched next; bit 15 is its wrap counter |
/// | 4 | le16 descriptor that is used next; bit 15 is its wrap counter |
/// | 6 | u8 queue_enable, 0 or 1 |
/// | 7 | a reserved byte |
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct PackedRuntime {
    /// Index of the queue.
    pub queue: U16,
    /// Offset of the descriptor the device fetches next in bits 0 to 14, its wrap counter in bit 15.
    pub next_available: U16,
    /// Offset of the descriptor the device uses next in bits 0 to 14, its wrap counter in bit 15.
    pub next_used: U16,
    /// `queue_enable`, 0 or 1.
    pub enabled: u8,
    /// Reserved: written as 0, ignored when read.
    pub reserved: u8,
}

/// VQ_STATUS: one queue as the device-state capability has it; 8 bytes.
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | u8 queue_status: 0 stopped, 1 running, or not enabled |
/// | 3 | u8 flags: bit 0, the driver wrote where the queue goes on and nothing was fetched since; bit 1, queue_select of the capability selects this queue |
/// | 4 | le16 next entry of the used ring; 0 of a packed queue, whose position is in VQ_PACKED_RUNTIME |
/// | 6 | 2 reserved bytes |
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct QueueStatus {
    /// Index of the queue.
    pub queue: U16,
    /// 0 if the driver stopped the queue, otherwise 1.
    pub running: u8,
    /// [`RESTARTS`](Self::RESTARTS) and [`SELECTED`](Self::SELECTED).
    pub flags: u8,
    /// The used-ring entry that is written next; 0 of a packed queue.
    pub next_used: U16,
    /// Reserved: written as 0, ignored when read.
    pub reserved: U16,
}

impl QueueStatus {
    /// The driver wrote `last_avail_idx`, and nothing was fetched since.
    pub const RESTARTS: u8 = 1;
    /// `queue_select` of the device-state capability selects this queue.
    pub const SELECTED: u8 = 2;

    /// Both flags.
    pub fn flags(restarts: bool, selected: bool) -> u8 {
        let set = |flag, is_set| if is_set { flag } else { 0 };
        set(Self::RESTARTS, restarts) | set(Self::SELECTED, selected)
    }

    /// True if `flag` is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// VQ_SPLIT_DEV_OWN_DESC: chains of one split queue that were fetched and not used, `4 + 2 * n` bytes (G3-g).
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | le16 number of chains, n |
/// | 4 | n times le16: index of the head descriptor, in the order in which they were fetched |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedChains {
    /// Index of the queue.
    pub queue: u16,
    /// Heads of the chains. There are never more than 65535.
    pub heads: Vec<u16>,
}

impl OwnedChains {
    /// Bytes of a value with so many chains.
    pub(super) const fn len_of(chains: usize) -> usize {
        size_of::<ListHeader>() + chains * size_of::<U16>()
    }
}

/// VQ_PACKED_DEV_OWN_DESC (G3-i): chains of one packed queue that were fetched and not used, with what their descriptors say,
/// since the device may have written used descriptors over them. `4 + 8 * n + 16 * m` bytes for n chains of m buffers.
///
/// | offset | value |
/// |---|---|
/// | 0 | le16 queue index |
/// | 2 | le16 number of chains, n |
/// | 4 | n chains, in the order in which they were fetched |
///
/// | offset | chain |
/// |---|---|
/// | 0 | le16 buffer id |
/// | 2 | le16 descriptors of the ring that it takes |
/// | 4 | le16 number of buffers: at most that |
/// | 6 | 2 reserved bytes |
/// | 8 | the buffers |
///
/// | offset | buffer |
/// |---|---|
/// | 0 | le64 guest physical address |
/// | 8 | le32 length in bytes |
/// | 12 | le16 flags as in a descriptor: 0, 2 (device-writable), or 4 (indirect table, the only buffer of its chain) |
/// | 14 | 2 reserved bytes |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnedPackedChains {
    /// Index of the queue.
    pub queue: u16,
    /// The chains. There are never more than 65535.
    pub chains: Vec<OwnedChain>,
}

impl OwnedPackedChains {
    /// Bytes of the longest value of a queue of `size`: each chain has a descriptor at least, and no more buffers.
    pub(super) const fn len_of(size: usize) -> usize {
        size_of::<ListHeader>() + size * (size_of::<ChainHeader>() + size_of::<PackedBuffer>())
    }

    /// Appends the value to `bytes`.
    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        bytes.extend_from_slice(ListHeader::new(self.queue, self.chains.len()).as_bytes());
        for chain in &self.chains {
            let header = ChainHeader {
                id: chain.id.into(),
                descriptors: chain.descriptors.into(),
                buffers: (chain.buffers.len() as u16).into(),
                reserved: 0.into(),
            };
            bytes.extend_from_slice(header.as_bytes());
            for buffer in &chain.buffers {
                let buffer = PackedBuffer {
                    address: buffer.address.into(),
                    len: buffer.len.into(),
                    flags: buffer.kind.flags().into(),
                    reserved: 0.into(),
                };
                bytes.extend_from_slice(buffer.as_bytes());
            }
        }
    }

    /// Reads the value from all of `bytes`.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, ListError> {
        let (header, mut rest) =
            ListHeader::ref_from_prefix(bytes).map_err(|_| ListError::NoHeader)?;
        let (queue, count) = (header.queue.get(), header.count.get());
        let mut chains = Vec::new();
        let error = ListError::Count { queue, count };
        for _ in 0..count {
            let (header, after) = ChainHeader::ref_from_prefix(rest).map_err(|_| error)?;
            let buffers = usize::from(header.buffers.get());
            let (buffers, after) =
                <[PackedBuffer]>::ref_from_prefix_with_elems(after, buffers).map_err(|_| error)?;
            let buffers = buffers.iter().map(|buffer| {
                let flags = buffer.flags.get();
                Ok(OwnedBuffer {
                    address: buffer.address.get(),
                    len: buffer.len.get(),
                    kind: OwnedKind::from_flags(flags).ok_or(ListError::Flags { queue, flags })?,
                })
            });
            chains.push(OwnedChain {
                id: header.id.get(),
                descriptors: header.descriptors.get(),
                buffers: buffers.collect::<Result<_, _>>()?,
            });
            rest = after;
        }
        match rest {
            [] => Ok(Self { queue, chains }),
            _ => Err(error),
        }
    }
}

/// What is wrong with a list.
#[derive(Clone, Copy, Debug)]
pub(super) enum ListError {
    /// It is too short to say how many entries there are.
    NoHeader,
    /// It has not the length that so many entries have.
    Count { queue: u16, count: u16 },
    /// A buffer has flags that none has.
    Flags { queue: u16, flags: u16 },
}

/// What a chain begins with.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ChainHeader {
    id: U16,
    descriptors: U16,
    buffers: U16,
    reserved: U16,
}

/// A buffer of a chain.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct PackedBuffer {
    address: U64,
    len: U32,
    flags: U16,
    reserved: U16,
}

/// What lists of chains begin with.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct ListHeader {
    pub queue: U16,
    pub count: U16,
}

impl ListHeader {
    pub fn new(queue: u16, count: usize) -> Self {
        Self {
            queue: queue.into(),
            count: (count as u16).into(),
        }
    }
}

const _: () = assert!(size_of::<CommonConfig>() == 64);
const _: () = assert!(size_of::<QueueConfig>() == 30);
const _: () = assert!(size_of::<SplitRuntime>() == 5);
const _: () = assert!(size_of::<PackedRuntime>() == 8);
const _: () = assert!(size_of::<QueueStatus>() == 8);
