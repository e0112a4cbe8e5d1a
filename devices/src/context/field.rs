//! Fields one by one, without a device they belong to.

use std::fmt;

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, IntoBytes};

use super::error::ContextError;
use super::value::{
    CommonConfig, ListError, ListHeader, OwnedChains, OwnedPackedChains, PackedRuntime,
    QueueConfig, QueueStatus, SplitRuntime,
};
use super::{COUNT_LEN, FIELD_HEADER_LEN};
use crate::virtio::Position;

/// Type of a field. 0x1000 to 0x1fff are the device's own; what is not here is reserved (G3-b).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum FieldType {
    /// PCI_COMMON_CFG: the common configuration.
    CommonConfig = 0x0000,
    /// DEV_FEATURES: the features the device offers.
    DeviceFeatures = 0x0001,
    /// VQ_CFG: the registers of a queue.
    QueueConfig = 0x0002,
    /// VQ_SPLIT_RUNTIME_CFG: where a split queue stands.
    SplitRuntime = 0x0003,
    /// VQ_SPLIT_DEV_OWN_DESC: chains of a split queue that are the device's.
    OwnedChains = 0x0004,
    /// DRV_FEATURES: the features the driver accepted (G3-d).
    DriverFeatures = 0x0005,
    /// VQ_PACKED_RUNTIME: where a packed queue stands (G3-i).
    PackedRuntime = 0x0006,
    /// VQ_PACKED_DEV_OWN_DESC: chains of a packed queue that are the device's (G3-i).
    OwnedPackedChains = 0x0007,
    /// VQ_STATUS: whether a queue runs.
    QueueStatus = 0x0008,
    /// DEV_CFG: the device configuration.
    DeviceConfig = 0x1000,
}

impl FieldType {
    /// Every type, in the order in which a context has them (G3-j).
    pub const ALL: [Self; 10] = [
        Self::DeviceFeatures,
        Self::DriverFeatures,
        Self::CommonConfig,
        Self::QueueConfig,
        Self::SplitRuntime,
        Self::PackedRuntime,
        Self::OwnedChains,
        Self::OwnedPackedChains,
        Self::QueueStatus,
        Self::DeviceConfig,
    ];

    /// The type with this number.
    pub fn from_raw(raw: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.raw() == raw)
    }

    /// The number on the wire.
    pub fn raw(self) -> u16 {
        self as u16
    }

    /// The name requirements use.
    pub fn name(self) -> &'static str {
        match self {
            Self::CommonConfig => "PCI_COMMON_CFG",
            Self::DeviceFeatures => "DEV_FEATURES",
            Self::QueueConfig => "VQ_CFG",
            Self::SplitRuntime => "VQ_SPLIT_RUNTIME_CFG",
            Self::OwnedChains => "VQ_SPLIT_DEV_OWN_DESC",
            Self::DriverFeatures => "DRV_FEATURES",
            Self::PackedRuntime => "VQ_PACKED_RUNTIME",
            Self::OwnedPackedChains => "VQ_PACKED_DEV_OWN_DESC",
            Self::QueueStatus => "VQ_STATUS",
            Self::DeviceConfig => "DEV_CFG",
        }
    }

    /// A context has one such field for each queue, rather than one.
    pub fn is_per_queue(self) -> bool {
        match self {
            Self::QueueConfig
            | Self::SplitRuntime
            | Self::OwnedChains
            | Self::PackedRuntime
            | Self::OwnedPackedChains
            | Self::QueueStatus => true,
            Self::CommonConfig
            | Self::DeviceFeatures
            | Self::DriverFeatures
            | Self::DeviceConfig => false,
        }
    }

    /// Bytes of the value, where they are the same in every device and state.
    pub fn fixed_len(self) -> Option<usize> {
        match self {
            Self::CommonConfig => Some(size_of::<CommonConfig>()),
            Self::DeviceFeatures | Self::DriverFeatures => Some(size_of::<u128>()),
            Self::QueueConfig => Some(size_of::<QueueConfig>()),
            Self::SplitRuntime => Some(size_of::<SplitRuntime>()),
            Self::PackedRuntime => Some(size_of::<PackedRuntime>()),
            Self::QueueStatus => Some(size_of::<QueueStatus>()),
            Self::OwnedChains | Self::OwnedPackedChains | Self::DeviceConfig => None,
        }
    }

    /// The field of this type that belongs to no queue, or to this one.
    pub(super) fn of(self, queue: impl Into<Option<u16>>) -> FieldId {
        FieldId {
            kind: self,
            queue: queue.into(),
        }
    }
}

impl fmt::Display for FieldType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Which field of a context: no two have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FieldId {
    /// Its type.
    pub kind: FieldType,
    /// The queue it belongs to, if it belongs to one.
    pub queue: Option<u16>,
}

impl fmt::Display for FieldId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.queue {
            Some(queue) => write!(f, "{} of queue {queue}", self.kind),
            None => self.kind.fmt(f),
        }
    }
}

/// One field of a context. `Display` says in a line what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Field {
    /// The common configuration.
    CommonConfig(CommonConfig),
    /// The features the device offers: le64\[2\], bit `n` being feature `n`.
    DeviceFeatures(u128),
    /// The registers of a queue.
    QueueConfig(QueueConfig),
    /// Where a split queue stands.
    SplitRuntime(SplitRuntime),
    /// Chains of a split queue that are the device's.
    OwnedChains(OwnedChains),
    /// The features the driver accepted: le64\[2\], bit `n` being feature `n`.
    DriverFeatures(u128),
    /// Where a packed queue stands.
    PackedRuntime(PackedRuntime),
    /// Chains of a packed queue that are the device's.
    OwnedPackedChains(OwnedPackedChains),
    /// Whether a queue runs.
    QueueStatus(QueueStatus),
    /// The device configuration.
    DeviceConfig(Vec<u8>),
}

impl Field {
    /// Its type, and the queue it belongs to.
    pub fn id(&self) -> FieldId {
        match self {
            Self::CommonConfig(_) => FieldType::CommonConfig.of(None),
            Self::DeviceFeatures(_) => FieldType::DeviceFeatures.of(None),
            Self::QueueConfig(value) => FieldType::QueueConfig.of(value.queue.get()),
            Self::SplitRuntime(value) => FieldType::SplitRuntime.of(value.queue.get()),
            Self::OwnedChains(value) => FieldType::OwnedChains.of(value.queue),
            Self::DriverFeatures(_) => FieldType::DriverFeatures.of(None),
            Self::PackedRuntime(value) => FieldType::PackedRuntime.of(value.queue.get()),
            Self::OwnedPackedChains(value) => FieldType::OwnedPackedChains.of(value.queue),
            Self::QueueStatus(value) => FieldType::QueueStatus.of(value.queue.get()),
            Self::DeviceConfig(_) => FieldType::DeviceConfig.of(None),
        }
    }

    /// Reads `value` as that of a field of type `kind`.
    ///
    /// # Errors
    ///
    /// [`Length`](ContextError::Length), [`ListCount`](ContextError::ListCount) and
    /// [`NotBoolean`](ContextError::NotBoolean): what is wrong for every device.
    pub fn decode(kind: FieldType, value: &[u8]) -> Result<Self, ContextError> {
        let field = match kind {
            FieldType::CommonConfig => Self::CommonConfig(fixed(kind, value)?),
            FieldType::DeviceFeatures => Self::DeviceFeatures(features(kind, value)?),
            FieldType::QueueConfig => Self::QueueConfig(fixed(kind, value)?),
            FieldType::SplitRuntime => Self::SplitRuntime(fixed(kind, value)?),
            FieldType::OwnedChains => {
                let (queue, heads) =
                    heads(value).map_err(|error| list_error(kind, value, error))?;
                Self::OwnedChains(OwnedChains { queue, heads })
            }
            FieldType::DriverFeatures => Self::DriverFeatures(features(kind, value)?),
            FieldType::PackedRuntime => Self::PackedRuntime(fixed(kind, value)?),
            FieldType::OwnedPackedChains => {
                let chains = OwnedPackedChains::decode(value);
                Self::OwnedPackedChains(chains.map_err(|error| list_error(kind, value, error))?)
            }
            FieldType::QueueStatus => Self::QueueStatus(fixed(kind, value)?),
            FieldType::DeviceConfig => Self::DeviceConfig(value.to_vec()),
        };
        match field.boolean() {
            Some((register, value)) if value > 1 => Err(ContextError::NotBoolean {
                field: field.id(),
                register,
                value,
            }),
            _ => Ok(field),
        }
    }

    /// What in this field can only be 0 or 1.
    fn boolean(&self) -> Option<(&'static str, u8)> {
        match self {
            Self::SplitRuntime(value) => Some(("queue_enable", value.enabled)),
            Self::PackedRuntime(value) => Some(("queue_enable", value.enabled)),
            Self::QueueStatus(value) => Some(("queue_status", value.running)),
            _ => None,
        }
    }

    /// Appends the field, header and value, to `bytes`.
    pub fn encode(&self, bytes: &mut Vec<u8>) {
        let start = bytes.len();
        bytes.extend_from_slice(&self.id().kind.raw().to_le_bytes());
        bytes.extend_from_slice(&[0; 14]);
        match self {
            Self::CommonConfig(value) => bytes.extend_from_slice(value.as_bytes()),
            Self::DeviceFeatures(value) | Self::DriverFeatures(value) => {
                bytes.extend_from_slice(&value.to_le_bytes());
            }
            Self::QueueConfig(value) => bytes.extend_from_slice(value.as_bytes()),
            Self::SplitRuntime(value) => bytes.extend_from_slice(value.as_bytes()),
            Self::OwnedChains(value) => {
                let header = ListHeader::new(value.queue, value.heads.len());
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend(value.heads.iter().flat_map(|head| head.to_le_bytes()));
            }
            Self::PackedRuntime(value) => bytes.extend_from_slice(value.as_bytes()),
            Self::OwnedPackedChains(value) => value.encode(bytes),
            Self::QueueStatus(value) => bytes.extend_from_slice(value.as_bytes()),
            Self::DeviceConfig(value) => bytes.extend_from_slice(value),
        }
        let value = bytes.len() - start - FIELD_HEADER_LEN;
        if let Some(len) = bytes.get_mut(start + 8..start + FIELD_HEADER_LEN) {
            len.copy_from_slice(&(value as u64).to_le_bytes());
        }
    }
}

/// The context of `fields`, as they are and in this order.
pub fn assemble(fields: &[Field]) -> Vec<u8> {
    let mut bytes = (fields.len() as u32).to_le_bytes().to_vec();
    for field in fields {
        field.encode(&mut bytes);
    }
    bytes
}

/// Reads the fields of one whole context, whatever device it is of, to show them to people. Which fields are there, how
/// often, and whether they fit each other is not looked at.
///
/// # Errors
///
/// A type that is unknown, a value that is wrong for every device, or bytes that are missing or too many.
pub fn parse(context: &[u8]) -> Result<Vec<Field>, ContextError> {
    let (count, mut rest) = context
        .split_first_chunk::<COUNT_LEN>()
        .ok_or(ContextError::Truncated)?;
    let mut fields = Vec::new();
    for _ in 0..u32::from_le_bytes(*count) {
        let (header, after) = rest
            .split_first_chunk::<FIELD_HEADER_LEN>()
            .ok_or(ContextError::Truncated)?;
        let (kind, len) = split_header(header);
        let kind = FieldType::from_raw(kind).ok_or(ContextError::UnknownType(kind))?;
        let (value, after) = usize::try_from(len)
            .ok()
            .and_then(|len| after.split_at_checked(len))
            .ok_or(ContextError::Truncated)?;
        fields.push(Field::decode(kind, value)?);
        rest = after;
    }
    match rest.len() {
        0 => Ok(fields),
        trailing => Err(ContextError::Trailing(trailing)),
    }
}

/// Type and length of a field. The reserved bytes are ignored.
pub(super) fn split_header(header: &[u8; FIELD_HEADER_LEN]) -> (u16, u64) {
    let number = u128::from_le_bytes(*header);
    (number as u16, (number >> u64::BITS) as u64)
}

/// The field header with this type and length.
pub(super) fn join_header(kind: u16, len: u64) -> [u8; FIELD_HEADER_LEN] {
    (u128::from(len) << u64::BITS | u128::from(kind)).to_le_bytes()
}

fn fixed<T: FromBytes>(kind: FieldType, value: &[u8]) -> Result<T, ContextError> {
    T::read_from_bytes(value).map_err(|_| ContextError::Length {
        field: kind,
        len: value.len() as u64,
        expected: size_of::<T>() as u64,
    })
}

fn features(kind: FieldType, value: &[u8]) -> Result<u128, ContextError> {
    fixed(kind, value).map(u128::from_le_bytes)
}

/// The queue and the heads of chains of a value that lists them.
fn heads(value: &[u8]) -> Result<(u16, Vec<u16>), ListError> {
    let (header, heads) = ListHeader::ref_from_prefix(value).map_err(|_| ListError::NoHeader)?;
    let (queue, count) = (header.queue.get(), header.count.get());
    let heads = <[U16]>::ref_from_bytes_with_elems(heads, count.into())
        .map_err(|_| ListError::Count { queue, count })?;
    Ok((queue, heads.iter().map(|head| head.get()).collect()))
}

fn list_error(kind: FieldType, value: &[u8], error: ListError) -> ContextError {
    let len = value.len();
    match error {
        ListError::NoHeader => ContextError::Length {
            field: kind,
            len: len as u64,
            expected: size_of::<ListHeader>() as u64,
        },
        ListError::Count { queue, count } => ContextError::ListCount {
            field: kind.of(queue),
            len,
            count,
        },
        ListError::Flags { queue, flags } => ContextError::Flags {
            field: kind.of(queue),
            flags,
        },
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.id())?;
        match self {
            Self::CommonConfig(value) => write!(
                f,
                "status {:#04x}, generation {}, configuration vector {:#x}, {} queues, queue {} selected",
                value.status,
                value.config_generation,
                value.config_vector,
                value.num_queues,
                value.queue_select,
            ),
            Self::DeviceFeatures(value) | Self::DriverFeatures(value) => write!(f, "{value:#x}"),
            Self::QueueConfig(value) => write!(
                f,
                "size {}, vector {:#x}, descriptors at {:#x}, available ring at {:#x}, used ring at {:#x}",
                value.size,
                value.vector,
                value.descriptor_area,
                value.driver_area,
                value.device_area,
            ),
            Self::SplitRuntime(value) => write!(
                f,
                "{}, next available {}",
                enabled(value.enabled),
                value.next_available
            ),
            Self::OwnedChains(value) => write!(f, "{:?}", value.heads),
            Self::PackedRuntime(value) => {
                let position = |raw: U16| Position::from_raw(raw.get());
                let (available, used) = (position(value.next_available), position(value.next_used));
                write!(
                    f,
                    "{}, next available {} with wrap counter {}, next used {} with wrap counter {}",
                    enabled(value.enabled),
                    available.offset(),
                    u8::from(available.wrap()),
                    used.offset(),
                    u8::from(used.wrap()),
                )
            }
            Self::OwnedPackedChains(value) => {
                let chains = value.chains.iter();
                let pairs = chains.map(|chain| (chain.id, chain.descriptors));
                f.debug_map().entries(pairs).finish()
            }
            Self::QueueStatus(value) => {
                f.write_str(match value.running {
                    0 => "stopped",
                    _ => "running",
                })?;
                write!(f, ", next used {}", value.next_used)?;
                if value.has(QueueStatus::RESTARTS) {
                    f.write_str(", goes on where the driver said")?;
                }
                if value.has(QueueStatus::SELECTED) {
                    f.write_str(", selected")?;
                }
                Ok(())
            }
            Self::DeviceConfig(value) => write!(f, "{value:02x?}"),
        }
    }
}

fn enabled(enable: u8) -> &'static str {
    match enable {
        0 => "disabled",
        _ => "enabled",
    }
}
