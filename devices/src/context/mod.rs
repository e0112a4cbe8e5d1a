//! The device context: [`FunctionState`] as a sequence of fields, each with a type, a length and a value.
//!
//! | offset | context |
//! |---|---|
//! | 0 | le32 number of fields |
//! | 4 | the fields, one after the other |
//!
//! | offset | field |
//! |---|---|
//! | 0 | le16 type |
//! | 2 | 6 reserved bytes |
//! | 8 | le64 length of the value in bytes |
//! | 16 | the value |
//!
//! Nothing is padded, so that values lie at any address. All numbers are little-endian.
//!
//! There are three forms, and a step between each two:
//!
//! ```text
//! FunctionState ── state_fields ─► Vec<Field> ── assemble ─► bytes
//!       ▲                                                     │ │
//!       └───────────────────── Decoder ◄──────────────────────┘ └─ parse ─► Vec<Field>, for people
//! ```
//!
//! What a device accepts is bounded by its [`Shape`]: which fields there are and how long ([`fields`]), and how long
//! all of them together can be ([`max_len`]). [`Decoder`] checks against it as bytes come in; [`parse`] knows no device
//! and reads every field there is.

mod decode;
mod draft;
mod error;
mod field;
#[cfg(test)]
mod tests;
mod value;

pub use decode::{Decoder, Pushed};
pub use error::ContextError;
pub use field::{Field, FieldId, FieldType, assemble, parse};
pub use value::{
    CommonConfig, OwnedChains, OwnedPackedChains, PackedChain, PackedRuntime, QueueConfig,
    QueueStatus, SplitRuntime,
};

use crate::state::{FunctionState, QueueState, Shape};

/// Bytes of the number of fields, at the start of a context.
pub const COUNT_LEN: usize = 4;
/// Bytes of a field before its value.
pub const FIELD_HEADER_LEN: usize = 16;

/// The context of a device of `shape` whose state is `state`.
pub fn encode(state: &FunctionState, shape: &Shape) -> Vec<u8> {
    assemble(&state_fields(state, shape))
}

/// The fields of the context of a device of `shape` whose state is `state`, in the order G3-j.
///
/// VQ_STATUS follows the other fields of its queue, and is there only if queues of this device can be stopped one by
/// one. A queue without chains that are the device's has no VQ_SPLIT_DEV_OWN_DESC (G3-g).
pub fn state_fields(state: &FunctionState, shape: &Shape) -> Vec<Field> {
    let mut fields = vec![
        Field::DeviceFeatures(state.offered),
        Field::DriverFeatures(state.accepted),
        Field::CommonConfig(CommonConfig::of(state)),
    ];
    for (queue, index) in state.queues.iter().zip(0..=u16::MAX) {
        let selected = state.registers.state_queue_select == index;
        queue_fields(index, queue, selected, shape, &mut fields);
    }
    if shape.config_len > 0 {
        fields.push(Field::DeviceConfig(state.config.clone()));
    }
    fields
}

fn queue_fields(
    index: u16,
    queue: &QueueState,
    selected: bool,
    shape: &Shape,
    fields: &mut Vec<Field>,
) {
    fields.push(Field::QueueConfig(QueueConfig {
        queue: index.into(),
        size: queue.size.into(),
        vector: queue.vector.into(),
        descriptor_area: queue.descriptor_area.into(),
        driver_area: queue.driver_area.into(),
        device_area: queue.device_area.into(),
    }));
    fields.push(Field::SplitRuntime(SplitRuntime {
        queue: index.into(),
        next_available: queue.next_available.into(),
        enabled: queue.enabled.into(),
    }));
    if !queue.owned.is_empty() {
        fields.push(Field::OwnedChains(OwnedChains {
            queue: index,
            heads: queue.owned.clone(),
        }));
    }
    if shape.queue_status {
        fields.push(Field::QueueStatus(QueueStatus {
            queue: index.into(),
            running: (!queue.stopped).into(),
            flags: QueueStatus::flags(queue.restarts, selected),
            next_used: queue.next_used.into(),
            reserved: 0.into(),
        }));
    }
}

/// The fields a device of `shape` has, in the order G3-j, and the bytes of the value of each (S3-35). Of
/// VQ_SPLIT_DEV_OWN_DESC it is the most any queue can need (G3-h); all other lengths are exact.
///
/// The fields of packed rings are never among them: no device here offers VIRTIO_F_RING_PACKED.
pub fn fields(shape: &Shape) -> Vec<(FieldType, u64)> {
    let largest = shape.queue_sizes.iter().max();
    let present = |kind: &FieldType| match kind {
        FieldType::PackedRuntime | FieldType::OwnedPackedChains => false,
        FieldType::QueueStatus => largest.is_some() && shape.queue_status,
        FieldType::DeviceConfig => shape.config_len > 0,
        kind => !kind.is_per_queue() || largest.is_some(),
    };
    let len = |kind: FieldType| match kind {
        FieldType::OwnedChains => OwnedChains::len_of(largest.copied().unwrap_or(0).into()),
        FieldType::DeviceConfig => shape.config_len,
        kind => kind.fixed_len().unwrap_or(0),
    };
    let kinds = FieldType::ALL.into_iter().filter(present);
    kinds.map(|kind| (kind, len(kind) as u64)).collect()
}

/// No context of a device of `shape` has more bytes than this.
pub fn max_len(shape: &Shape) -> usize {
    let values: usize = fields(shape)
        .into_iter()
        .map(|(kind, len)| match kind {
            FieldType::OwnedChains => shape
                .queue_sizes
                .iter()
                .map(|size| FIELD_HEADER_LEN + OwnedChains::len_of((*size).into()))
                .sum(),
            kind if kind.is_per_queue() => {
                shape.queue_sizes.len() * (FIELD_HEADER_LEN + len as usize)
            }
            _ => FIELD_HEADER_LEN + len as usize,
        })
        .sum();
    COUNT_LEN + values
}
