//! Guest memory in a snapshot: `memory.bin`, and `memory.map` where it is not all of it.
//!
//! | module | what it does |
//! |---|---|
//! | [`header`] | what a memory file says about itself, in its last page |
//! | [`writer`] | writes one, in passes, while the guest runs and when it stands still |
//! | [`image`] | reads one, or a chain of them |

mod digest;
pub mod header;
pub mod image;
pub mod writer;

pub use digest::Digest;
pub use header::{BaseName, Header};
pub use image::{Bases, Expected, Image, Layer};
pub use writer::{Finished, Guest, MemoryWriter, Pass};

/// The most memory files a chain can have.
pub const MAX_CHAIN: u32 = 64;
