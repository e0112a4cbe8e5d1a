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
    CommonConfig, OwnedChains, OwnedPackedChains, PackedRuntime, QueueConfig, QueueStatus,
    SplitRuntime,
};

use crate::state::{FunctionState, QueueState, RingState, Shape};

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
/// one. A queue without chains that are the device's has no VQ_SPLIT_DEV_OWN_DESC (G3-g). The fields of a packed queue are
/// others (G3-i).
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
    // That of a packed queue is in VQ_PACKED_RUNTIME.
    let mut next_used = 0;
    match &queue.ring {
        RingState::Split(ring) => {
            next_used = ring.next_used;
            fields.push(Field::SplitRuntime(SplitRuntime {
                queue: index.into(),
                next_available: ring.next_available.into(),
                enabled: queue.enabled.into(),
            }));
            if !ring.owned.is_empty() {
                let heads = ring.owned.clone();
                let queue = index;
                fields.push(Field::OwnedChains(OwnedChains { queue, heads }));
            }
        }
        RingState::Packed(ring) => {
            fields.push(Field::PackedRuntime(PackedRuntime {
                queue: index.into(),
                next_available: ring.next_available.raw().into(),
                next_used: ring.next_used.raw().into(),
                enabled: queue.enabled.into(),
                reserved: 0,
            }));
            if !ring.owned.is_empty() {
                let chains = ring.owned.clone();
                let queue = index;
                let owned = OwnedPackedChains { queue, chains };
                fields.push(Field::OwnedPackedChains(owned));
            }
        }
    }
    if shape.queue_status {
        fields.push(Field::QueueStatus(QueueStatus {
            queue: index.into(),
            running: (!queue.stopped).into(),
            flags: QueueStatus::flags(queue.restarts, selected),
            next_used: next_used.into(),
            reserved: 0.into(),
        }));
    }
}

/// The fields a device of `shape` has, in the order G3-j, and the bytes of the value of each (S3-35). Of the lists of chains
/// it is the most any queue can need (G3-h); all other lengths are exact.
///
/// Of a device that offers packed rings they are the fields of both kinds, of which a context has those that its driver uses.
pub fn fields(shape: &Shape) -> Vec<(FieldType, u64)> {
    let largest = shape.queue_sizes.iter().max();
    let present = |kind: &FieldType| match kind {
        FieldType::PackedRuntime | FieldType::OwnedPackedChains => {
            largest.is_some() && shape.packed
        }
        FieldType::QueueStatus => largest.is_some() && shape.queue_status,
        FieldType::DeviceConfig => shape.config_len > 0,
        kind => !kind.is_per_queue() || largest.is_some(),
    };
    let len = |kind: FieldType| match list_len(kind, largest.copied().unwrap_or(0)) {
        Some(len) => len,
        None if kind == FieldType::DeviceConfig => shape.config_len,
        None => kind.fixed_len().unwrap_or(0),
    };
    let kinds = FieldType::ALL.into_iter().filter(present);
    kinds.map(|kind| (kind, len(kind) as u64)).collect()
}

/// Bytes of the longest list of this type that a queue of `size` can need, if it is one.
fn list_len(kind: FieldType, size: u16) -> Option<usize> {
    match kind {
        FieldType::OwnedChains => Some(OwnedChains::len_of(size.into())),
        FieldType::OwnedPackedChains => Some(OwnedPackedChains::len_of(size.into())),
        _ => None,
    }
}

/// No context of a device of `shape` has more bytes than this.
pub fn max_len(shape: &Shape) -> usize {
    let values: usize = fields(shape)
        .into_iter()
        .map(|(kind, len)| match kind {
            kind if kind.is_per_queue() => {
                let sizes = shape.queue_sizes.iter();
                sizes
                    .map(|size| FIELD_HEADER_LEN + list_len(kind, *size).unwrap_or(len as usize))
                    .sum()
            }
            _ => FIELD_HEADER_LEN + len as usize,
        })
        .sum();
    COUNT_LEN + values
}
