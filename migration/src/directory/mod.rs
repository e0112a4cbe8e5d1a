//! The directory of a snapshot.
//!
//! | file | what it has |
//! |---|---|
//! | `state.json` | all but the memory; this crate does not look into it |
//! | `memory.bin` | guest RAM: see [`memory`](crate::memory) |
//! | `memory.map` | for an incremental snapshot: which pages of RAM `memory.bin` has, one bit each |
//!
//! | module | what it does |
//! |---|---|
//! | [`writer`] | a snapshot is there whole or not at all |
//! | [`draft`] | the directory it is written to until it is whole, and those that killed writers left |
//! | [`reader`] | opens one that may be anything |

pub(crate) mod draft;
pub mod reader;
pub mod writer;

pub(crate) use draft::Draft;
pub use reader::{FileId, Reader};
pub use writer::{Committed, Existing, Writer};

/// Name of the file with all but the memory.
pub const STATE: &str = "state.json";
/// Name of the file with the memory.
pub const MEMORY: &str = "memory.bin";
/// Name of the file that says which pages are in [`MEMORY`].
pub const MAP: &str = "memory.map";

/// All files a snapshot can have.
pub const FILES: [&str; 3] = [STATE, MEMORY, MAP];

/// The longest `state.json` that is read or written, in bytes.
pub const MAX_STATE: u64 = 160 << 20;
