//! The device context as JSON: the fields of [`devices::context`], each an object.
//!
//! ```json
//! [
//!   {"type": "DEV_FEATURES", "features": "0x130000000"},
//!   {"type": "VQ_CFG", "queue": 0, "size": 256, "vector": 1, "descriptor_area": "0x7f000", …},
//!   {"type": "0x1234", "value": "00ff"}
//! ]
//! ```
//!
//! Every context that is well framed has this form, and [`Context::encode`] gives its very bytes: a field that the
//! named form cannot hold (an unknown type, a value of another length, reserved bytes that are not zero) is its type in
//! hexadecimal and its value in bytes.

mod parts;
#[cfg(test)]
mod tests;

use std::fmt;

use devices::context::{
    self, COUNT_LEN, CommonConfig, ContextError, Decoder, FIELD_HEADER_LEN, FieldType, OwnedChains,
    OwnedPackedChains, PackedRuntime, QueueConfig, QueueStatus, SplitRuntime,
};
use devices::state::{FunctionState, OwnedBuffer, OwnedChain, OwnedKind, Shape};
use devices::virtio;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use zerocopy::little_endian::U16;

use super::error::{At, Invalid};
use super::hex::{Hex, HexBytes};

/// Longest context that is encoded from JSON, in bytes: twice what a device of 256 packed queues of 256 descriptors has, or four
/// times what one of 256 split queues of 1024 descriptors has.
pub const MAX_LEN: usize = 4 << 20;
/// Largest value of the 6 reserved bytes of a field.
const MAX_RESERVED: u64 = (1 << 48) - 1;
/// Wrap counter, in a position within a packed ring.
const WRAP: u16 = 1 << 15;

/// A device context: its fields, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Context(pub Vec<Field>);

/// One field of a device context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "type", deny_unknown_fields)]
pub enum Field {
    /// Features the device offers.
    #[serde(rename = "DEV_FEATURES")]
    DeviceFeatures {
        /// Bit `n` is feature `n`.
        features: Hex<u128>,
    },
    /// Features the driver accepted.
    #[serde(rename = "DRV_FEATURES")]
    DriverFeatures {
        /// Bit `n` is feature `n`.
        features: Hex<u128>,
    },
    /// Common configuration, as the driver would read it.
    #[serde(rename = "PCI_COMMON_CFG")]
    CommonConfig(Box<Common>),
    /// Registers of a queue.
    #[serde(rename = "VQ_CFG")]
    QueueConfig {
        /// Index of the queue.
        queue: u16,
        /// `queue_size`.
        size: u16,
        /// `queue_msix_vector`.
        vector: u16,
        /// `queue_desc`, a guest physical address.
        descriptor_area: Hex<u64>,
        /// `queue_driver`, a guest physical address.
        driver_area: Hex<u64>,
        /// `queue_device`, a guest physical address.
        device_area: Hex<u64>,
    },
    /// Position of a split queue.
    #[serde(rename = "VQ_SPLIT_RUNTIME_CFG")]
    SplitRuntime {
        /// Index of the queue.
        queue: u16,
        /// `queue_enable`.
        enabled: bool,
        /// Available-ring entry the device fetches next, modulo 2^16.
        next_available: u16,
    },
    /// Chains of a split queue that the device fetched and did not use.
    #[serde(rename = "VQ_SPLIT_DEV_OWN_DESC")]
    OwnedChains {
        /// Index of the queue.
        queue: u16,
        /// Head descriptors of the chains, in the order in which they were fetched.
        heads: Vec<u16>,
    },
    /// Position of a packed queue.
    #[serde(rename = "VQ_PACKED_RUNTIME")]
    PackedRuntime {
        /// Index of the queue.
        queue: u16,
        /// `queue_enable`.
        enabled: bool,
        /// Descriptor the device fetches next.
        available: Position,
        /// Descriptor the device uses next.
        used: Position,
    },
    /// Chains of a packed queue that the device fetched and did not use.
    #[serde(rename = "VQ_PACKED_DEV_OWN_DESC")]
    OwnedPackedChains {
        /// Index of the queue.
        queue: u16,
        /// The chains, in the order in which they were fetched.
        chains: Vec<Chain>,
    },
    /// Registers of the device-state capability for a queue.
    #[serde(rename = "VQ_STATUS")]
    QueueStatus {
        /// Index of the queue.
        queue: u16,
        /// `queue_status`: false if the driver stopped the queue.
        running: bool,
        /// The driver wrote where the queue goes on, and nothing was fetched since.
        restarts: bool,
        /// `queue_select` of the capability selects this queue.
        selected: bool,
        /// Used-ring entry the device writes next, modulo 2^16; 0 of a packed queue.
        next_used: u16,
    },
    /// Device configuration.
    #[serde(rename = "DEV_CFG")]
    DeviceConfig {
        /// Its bytes.
        config: HexBytes,
    },
    /// A field of an unknown type, or one that the named form cannot hold.
    #[serde(untagged)]
    Raw(Raw),
}

/// The common configuration. Several registers are windows that a selector moves, and repeat a part of what other
/// fields say in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Common {
    /// `device_feature_select`.
    pub device_feature_select: u32,
    /// `device_feature`: the window that `device_feature_select` selects.
    pub device_feature: Hex<u32>,
    /// `driver_feature_select`.
    pub driver_feature_select: u32,
    /// `driver_feature`: the window that `driver_feature_select` selects.
    pub driver_feature: Hex<u32>,
    /// `config_msix_vector`.
    pub config_vector: u16,
    /// `num_queues`.
    pub num_queues: u16,
    /// `device_status`.
    pub status: u8,
    /// `config_generation`.
    pub config_generation: u8,
    /// `queue_select`. The following registers are those of this queue, and 0 if there is none.
    pub queue_select: u16,
    /// `queue_size`.
    pub queue_size: u16,
    /// `queue_msix_vector`.
    pub queue_vector: u16,
    /// `queue_enable`.
    pub queue_enable: u16,
    /// `queue_notify_off`.
    pub queue_notify_off: u16,
    /// `queue_desc`.
    pub queue_desc: Hex<u64>,
    /// `queue_driver`.
    pub queue_driver: Hex<u64>,
    /// `queue_device`.
    pub queue_device: Hex<u64>,
    /// `queue_notif_config_data`.
    pub queue_notif_config_data: u16,
    /// `queue_reset`.
    pub queue_reset: u16,
    /// `admin_queue_index`.
    pub admin_queue_index: u16,
    /// `admin_queue_num`.
    pub admin_queue_num: u16,
}

/// A position within a packed ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Index of the descriptor, at most 32767.
    #[schemars(range(max = 0x7fff))]
    pub descriptor: u16,
    /// Wrap counter.
    pub wrap: bool,
}

/// A chain of a packed queue. Its descriptors may have been overwritten, so what they said is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Chain {
    /// Buffer id.
    pub id: u16,
    /// Descriptors of the ring that it takes.
    pub descriptors: u16,
    /// What is in them; those without a length may be left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub buffers: Vec<Buffer>,
}

/// A buffer of a chain, or its indirect table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Buffer {
    /// Guest physical address.
    pub address: Hex<u64>,
    /// Length in bytes.
    pub length: u32,
    /// What is there.
    pub kind: BufferKind,
}

/// What is at the address of a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BufferKind {
    /// A buffer that the device reads.
    Readable,
    /// A buffer that the device writes.
    Writable,
    /// An indirect table. The chain has nothing else.
    Table,
}

/// A field as it is in the context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Raw {
    /// Type of the field.
    #[serde(rename = "type")]
    pub kind: Hex<u16>,
    /// Reserved bytes of its header, as a little-endian number; absent if they are 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reserved: Option<Hex<u64>>,
    /// Its value.
    pub value: HexBytes,
}

impl Context {
    /// The context of a device of `shape` whose state is `state`.
    pub fn of_state(state: &FunctionState, shape: &Shape) -> Self {
        Self::of_fields(&context::state_fields(state, shape))
    }

    /// The context of `fields`, in this order.
    pub fn of_fields(fields: &[context::Field]) -> Self {
        Self(fields.iter().map(Field::of).collect())
    }

    /// Reads the bytes of one whole context, as DEV_CTX_READ gives them.
    ///
    /// # Errors
    ///
    /// [`Truncated`](ContextError::Truncated) and [`Trailing`](ContextError::Trailing): what is not framed as a context.
    pub fn decode(bytes: &[u8]) -> Result<Self, ContextError> {
        let (count, mut rest) = bytes
            .split_first_chunk::<COUNT_LEN>()
            .ok_or(ContextError::Truncated)?;
        let mut fields = Vec::new();
        for _ in 0..u32::from_le_bytes(*count) {
            let (field, after) = split_field(rest).ok_or(ContextError::Truncated)?;
            fields.push(field.named());
            rest = after;
        }
        match rest.len() {
            0 => Ok(Self(fields)),
            trailing => Err(ContextError::Trailing(trailing)),
        }
    }

    /// The bytes of the context, as DEV_CTX_WRITE takes them.
    ///
    /// # Errors
    ///
    /// A value that no field has, or more than [`MAX_LEN`] bytes.
    pub fn encode(&self) -> Result<Vec<u8>, Invalid> {
        let mut bytes = (self.0.len() as u32).to_le_bytes().to_vec();
        for (index, field) in self.0.iter().enumerate() {
            field.encode(&mut bytes).entry(index)?;
            if bytes.len() > MAX_LEN {
                let reason = format!("the context has more than {MAX_LEN} bytes up to here");
                return Err(Invalid::new(reason)).entry(index);
            }
        }
        Ok(bytes)
    }

    /// The state of a device of `shape` that has this context.
    ///
    /// # Errors
    ///
    /// What the decoder of the migration commands rejects.
    pub fn state(&self, shape: &Shape) -> Result<FunctionState, Invalid> {
        let mut decoder = Decoder::new(shape);
        let count = (self.0.len() as u32).to_le_bytes();
        decoder.push(&count).map_err(Invalid::new)?;
        for (index, field) in self.0.iter().enumerate() {
            let mut bytes = Vec::new();
            let pushed = field.encode(&mut bytes).and_then(|()| {
                let pushed = decoder.push(&bytes);
                pushed.map_err(Invalid::new)
            });
            pushed.entry(index)?;
        }
        let state = decoder.take_latest();
        state.ok_or_else(|| Invalid::new("the context has no fields"))
    }
}

/// The first field of `bytes`, and what follows it.
fn split_field(bytes: &[u8]) -> Option<(Raw, &[u8])> {
    let (header, after) = bytes.split_first_chunk::<FIELD_HEADER_LEN>()?;
    let header = u128::from_le_bytes(*header);
    let len = usize::try_from((header >> u64::BITS) as u64).ok()?;
    let (value, after) = after.split_at_checked(len)?;
    let reserved = header as u64 >> u16::BITS;
    let field = Raw {
        kind: Hex(header as u16),
        reserved: (reserved != 0).then_some(Hex(reserved)),
        value: HexBytes(value.to_vec()),
    };
    Some((field, after))
}

impl Raw {
    /// The field in its named form if that gives the same bytes.
    fn named(self) -> Field {
        let kind = FieldType::from_raw(self.kind.0);
        let plain = kind.and_then(|kind| context::Field::decode(kind, &self.value.0).ok());
        let named = plain.map(|plain| Field::of_plain(&plain));
        match named {
            Some(named) if same_bytes(&named, &self) => named,
            _ => Field::Raw(self),
        }
    }

    fn encode(&self, bytes: &mut Vec<u8>) -> Result<(), Invalid> {
        let reserved = self.reserved.map_or(0, |reserved| reserved.0);
        if reserved > MAX_RESERVED {
            let reason =
                format!("{reserved:#x} is more than {MAX_RESERVED:#x}, the most in 6 bytes");
            return Err(Invalid::new(reason)).field("reserved");
        }
        let head = reserved << u16::BITS | u64::from(self.kind.0);
        bytes.extend_from_slice(&head.to_le_bytes());
        bytes.extend_from_slice(&(self.value.0.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&self.value.0);
        Ok(())
    }
}

fn same_bytes(named: &Field, raw: &Raw) -> bool {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    named.encode(&mut ours).is_ok() && raw.encode(&mut theirs).is_ok() && ours == theirs
}

impl Position {
    pub(super) fn of(position: virtio::Position) -> Self {
        Self {
            descriptor: position.offset(),
            wrap: position.wrap(),
        }
    }

    fn of_raw(raw: U16) -> Self {
        Self::of(virtio::Position::from_raw(raw.get()))
    }

    /// The position; an error if no ring has so many descriptors.
    pub(super) fn plain(self) -> Result<virtio::Position, Invalid> {
        if self.descriptor >= WRAP {
            let reason = format!("{} is more than {}", self.descriptor, WRAP - 1);
            return Err(Invalid::new(reason)).field("descriptor");
        }
        let wrap = if self.wrap { WRAP } else { 0 };
        Ok(virtio::Position::from_raw(self.descriptor | wrap))
    }
}

impl Chain {
    pub(super) fn of(chain: &OwnedChain) -> Self {
        let buffers = chain.buffers.iter().map(|buffer| Buffer {
            address: Hex(buffer.address),
            length: buffer.len,
            kind: match buffer.kind {
                OwnedKind::Readable => BufferKind::Readable,
                OwnedKind::Writable => BufferKind::Writable,
                OwnedKind::Table => BufferKind::Table,
            },
        });
        Self {
            id: chain.id,
            descriptors: chain.descriptors,
            buffers: buffers.collect(),
        }
    }

    /// The chain; an error if it has more buffers than descriptors.
    pub(super) fn plain(&self) -> Result<OwnedChain, Invalid> {
        if self.buffers.len() > self.descriptors.into() {
            let (buffers, descriptors) = (self.buffers.len(), self.descriptors);
            let reason = format!("{buffers} buffers are too many for {descriptors} descriptors");
            return Err(Invalid::new(reason)).field("buffers");
        }
        let buffers = self.buffers.iter().map(|buffer| OwnedBuffer {
            address: buffer.address.0,
            len: buffer.length,
            kind: match buffer.kind {
                BufferKind::Readable => OwnedKind::Readable,
                BufferKind::Writable => OwnedKind::Writable,
                BufferKind::Table => OwnedKind::Table,
            },
        });
        Ok(OwnedChain {
            id: self.id,
            descriptors: self.descriptors,
            buffers: buffers.collect(),
        })
    }
}

impl Field {
    /// The JSON of `field`.
    pub fn of(field: &context::Field) -> Self {
        let mut bytes = Vec::new();
        field.encode(&mut bytes);
        match split_field(&bytes) {
            // Reserved bytes of a value have no place in the named form.
            Some((raw, _)) => raw.named(),
            None => Self::of_plain(field),
        }
    }

    /// The JSON of what is named in `field`; reserved bytes and values that are out of range are lost.
    fn of_plain(field: &context::Field) -> Self {
        match field {
            context::Field::CommonConfig(value) => Self::CommonConfig(Box::new(Common::of(value))),
            context::Field::DeviceFeatures(features) => Self::DeviceFeatures {
                features: Hex(*features),
            },
            context::Field::DriverFeatures(features) => Self::DriverFeatures {
                features: Hex(*features),
            },
            context::Field::QueueConfig(value) => Self::QueueConfig {
                queue: value.queue.get(),
                size: value.size.get(),
                vector: value.vector.get(),
                descriptor_area: Hex(value.descriptor_area.get()),
                driver_area: Hex(value.driver_area.get()),
                device_area: Hex(value.device_area.get()),
            },
            context::Field::SplitRuntime(value) => Self::SplitRuntime {
                queue: value.queue.get(),
                enabled: value.enabled != 0,
                next_available: value.next_available.get(),
            },
            context::Field::OwnedChains(value) => Self::OwnedChains {
                queue: value.queue,
                heads: value.heads.clone(),
            },
            context::Field::PackedRuntime(value) => Self::PackedRuntime {
                queue: value.queue.get(),
                enabled: value.enabled != 0,
                available: Position::of_raw(value.next_available),
                used: Position::of_raw(value.next_used),
            },
            context::Field::OwnedPackedChains(value) => {
                let chains = value.chains.iter().map(Chain::of);
                Self::OwnedPackedChains {
                    queue: value.queue,
                    chains: chains.collect(),
                }
            }
            context::Field::QueueStatus(value) => Self::QueueStatus {
                queue: value.queue.get(),
                running: value.running != 0,
                restarts: value.has(QueueStatus::RESTARTS),
                selected: value.has(QueueStatus::SELECTED),
                next_used: value.next_used.get(),
            },
            context::Field::DeviceConfig(config) => Self::DeviceConfig {
                config: HexBytes(config.clone()),
            },
        }
    }

    /// The field as `devices` has it; `None` if it is in raw form.
    ///
    /// # Errors
    ///
    /// A value that no field has.
    pub fn plain(&self) -> Result<Option<context::Field>, Invalid> {
        let field = match self {
            Self::DeviceFeatures { features } => context::Field::DeviceFeatures(features.0),
            Self::DriverFeatures { features } => context::Field::DriverFeatures(features.0),
            Self::CommonConfig(common) => context::Field::CommonConfig(common.plain()),
            Self::QueueConfig {
                queue,
                size,
                vector,
                descriptor_area,
                driver_area,
                device_area,
            } => context::Field::QueueConfig(QueueConfig {
                queue: (*queue).into(),
                size: (*size).into(),
                vector: (*vector).into(),
                descriptor_area: descriptor_area.0.into(),
                driver_area: driver_area.0.into(),
                device_area: device_area.0.into(),
            }),
            Self::SplitRuntime {
                queue,
                enabled,
                next_available,
            } => context::Field::SplitRuntime(SplitRuntime {
                queue: (*queue).into(),
                next_available: (*next_available).into(),
                enabled: (*enabled).into(),
            }),
            Self::OwnedChains { queue, heads } => {
                check_count(heads.len()).field("heads")?;
                context::Field::OwnedChains(OwnedChains {
                    queue: *queue,
                    heads: heads.clone(),
                })
            }
            Self::PackedRuntime {
                queue,
                enabled,
                available,
                used,
            } => context::Field::PackedRuntime(PackedRuntime {
                queue: (*queue).into(),
                next_available: available.plain().field("available")?.raw().into(),
                next_used: used.plain().field("used")?.raw().into(),
                enabled: (*enabled).into(),
                reserved: 0,
            }),
            Self::OwnedPackedChains { queue, chains } => {
                check_count(chains.len()).field("chains")?;
                let chains = super::error::convert_all(chains, Chain::plain).field("chains")?;
                let queue = *queue;
                context::Field::OwnedPackedChains(OwnedPackedChains { queue, chains })
            }
            Self::QueueStatus {
                queue,
                running,
                restarts,
                selected,
                next_used,
            } => context::Field::QueueStatus(QueueStatus {
                queue: (*queue).into(),
                running: (*running).into(),
                flags: QueueStatus::flags(*restarts, *selected),
                next_used: (*next_used).into(),
                reserved: 0.into(),
            }),
            Self::DeviceConfig { config } => context::Field::DeviceConfig(config.0.clone()),
            Self::Raw(_) => return Ok(None),
        };
        Ok(Some(field))
    }

    /// Appends the field, header and value, to `bytes`.
    fn encode(&self, bytes: &mut Vec<u8>) -> Result<(), Invalid> {
        match (self, self.plain()?) {
            (Self::Raw(raw), _) => raw.encode(bytes)?,
            (_, Some(field)) => field.encode(bytes),
            (_, None) => {}
        }
        Ok(())
    }
}

/// Number of chains in a list, which is 16 bits wide.
fn check_count(chains: usize) -> Result<(), Invalid> {
    if chains > usize::from(u16::MAX) {
        let reason = format!("{chains} chains are more than {}", u16::MAX);
        return Err(Invalid::new(reason));
    }
    Ok(())
}

impl Common {
    fn of(value: &CommonConfig) -> Self {
        Self {
            device_feature_select: value.device_feature_select.get(),
            device_feature: Hex(value.device_feature.get()),
            driver_feature_select: value.driver_feature_select.get(),
            driver_feature: Hex(value.driver_feature.get()),
            config_vector: value.config_vector.get(),
            num_queues: value.num_queues.get(),
            status: value.status,
            config_generation: value.config_generation,
            queue_select: value.queue_select.get(),
            queue_size: value.queue_size.get(),
            queue_vector: value.queue_vector.get(),
            queue_enable: value.queue_enable.get(),
            queue_notify_off: value.queue_notify_off.get(),
            queue_desc: Hex(value.queue_desc.get()),
            queue_driver: Hex(value.queue_driver.get()),
            queue_device: Hex(value.queue_device.get()),
            queue_notif_config_data: value.queue_notif_config_data.get(),
            queue_reset: value.queue_reset.get(),
            admin_queue_index: value.admin_queue_index.get(),
            admin_queue_num: value.admin_queue_num.get(),
        }
    }

    fn plain(&self) -> CommonConfig {
        CommonConfig {
            device_feature_select: self.device_feature_select.into(),
            device_feature: self.device_feature.0.into(),
            driver_feature_select: self.driver_feature_select.into(),
            driver_feature: self.driver_feature.0.into(),
            config_vector: self.config_vector.into(),
            num_queues: self.num_queues.into(),
            status: self.status,
            config_generation: self.config_generation,
            queue_select: self.queue_select.into(),
            queue_size: self.queue_size.into(),
            queue_vector: self.queue_vector.into(),
            queue_enable: self.queue_enable.into(),
            queue_notify_off: self.queue_notify_off.into(),
            queue_desc: self.queue_desc.0.into(),
            queue_driver: self.queue_driver.0.into(),
            queue_device: self.queue_device.0.into(),
            queue_notif_config_data: self.queue_notif_config_data.into(),
            queue_reset: self.queue_reset.into(),
            admin_queue_index: self.admin_queue_index.into(),
            admin_queue_num: self.admin_queue_num.into(),
        }
    }
}

/// The field in a line.
impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.plain()) {
            (Self::Raw(raw), _) => {
                let kind = raw.kind.0;
                match FieldType::from_raw(kind) {
                    Some(known) => write!(f, "{known}, malformed: {:02x?}", raw.value.0),
                    None => write!(f, "{kind:#06x}: {:02x?}", raw.value.0),
                }
            }
            (_, Ok(Some(field))) => field.fmt(f),
            (_, Err(error)) => write!(f, "malformed: {error}"),
            (_, Ok(None)) => Ok(()),
        }
    }
}
