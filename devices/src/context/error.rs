//! Why a context is refused.

use super::field::{FieldId, FieldType};

/// Why a context is refused: which field, of which queue, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// The context is well formed, but no state this device can be in.
    #[error("{0}")]
    Device(String),
    /// The number of fields is one that no context of this device can have.
    #[error("a context of {count} fields; this device has {least} to {most}")]
    FieldCount {
        /// Fields announced.
        count: u32,
        /// Fields that must be there.
        least: u64,
        /// Fields that can be there.
        most: u64,
    },
    /// No field has this type (G3-q).
    #[error("field type {0:#06x} is unknown")]
    UnknownType(u16),
    /// This device has no such field.
    #[error("this device has no {0}")]
    Unsupported(FieldType),
    /// The length is not the one the field has in this device (S3-33).
    #[error("{field} has {len} bytes, not {expected}")]
    Length {
        /// The field.
        field: FieldType,
        /// Bytes announced.
        len: u64,
        /// Bytes it has.
        expected: u64,
    },
    /// The length is none that this list can have in this device (G3-h).
    #[error("{field} has {len} bytes, which no list of at most {most} bytes has")]
    ListLength {
        /// The field.
        field: FieldType,
        /// Bytes announced.
        len: u64,
        /// The most it can have.
        most: u64,
    },
    /// The length does not fit the number of chains in the list (G3-h).
    #[error("{field} has {len} bytes and lists {count} chains")]
    ListCount {
        /// The field.
        field: FieldId,
        /// Bytes announced.
        len: usize,
        /// Chains announced.
        count: u16,
    },
    /// More chains than the queue has descriptors (G3-h).
    #[error("{field} lists {count} chains of a queue of size {size}")]
    TooManyChains {
        /// The field.
        field: FieldId,
        /// Chains listed.
        count: usize,
        /// Size of the queue.
        size: u16,
    },
    /// A chain begins outside the queue.
    #[error("{field} lists descriptor {head} of a queue of size {size}")]
    Head {
        /// The field.
        field: FieldId,
        /// Index of the descriptor.
        head: u16,
        /// Size of the queue.
        size: u16,
    },
    /// A buffer of a packed queue has flags that none has.
    #[error(
        "a buffer in {field} has flags {flags:#x}; they are 0, 2 (writable) or 4 (indirect table)"
    )]
    Flags {
        /// The field.
        field: FieldId,
        /// The flags.
        flags: u16,
    },
    /// More descriptors than the queue has (G3-i).
    #[error("chains in {field} take {count} descriptors of a queue of size {size}")]
    TooManyDescriptors {
        /// The field.
        field: FieldId,
        /// Descriptors.
        count: u32,
        /// Size of the queue.
        size: u16,
    },
    /// Fields of both kinds of rings for one queue.
    #[error("{0} although the queue has a field of the other kind of rings")]
    Mixed(FieldId),
    /// What can be 0 or 1 is something else.
    #[error("{register} in {field} is {value}, not 0 or 1")]
    NotBoolean {
        /// The field.
        field: FieldId,
        /// What it is about.
        register: &'static str,
        /// The value.
        value: u8,
    },
    /// The context is of a device with another number of queues.
    #[error("num_queues in {} is {found}, not {expected}", FieldType::CommonConfig)]
    QueueCount {
        /// Queues of the device it was made for.
        found: u16,
        /// Queues of this device.
        expected: usize,
    },
    /// There is no such queue.
    #[error("{field} in a device of {queues} queues")]
    NoSuchQueue {
        /// The field.
        field: FieldId,
        /// Queues of this device.
        queues: usize,
    },
    /// The field is there twice (G3-q).
    #[error("{0} is there twice")]
    Duplicate(FieldId),
    /// The last field is in, and this one is not there.
    #[error("{0} is missing")]
    Missing(FieldId),
    /// The bytes end within the context. Only of [`parse`](super::parse).
    #[error("the context ends within a field")]
    Truncated,
    /// Bytes follow the context. Only of [`parse`](super::parse).
    #[error("{0} bytes follow the context")]
    Trailing(usize),
}
