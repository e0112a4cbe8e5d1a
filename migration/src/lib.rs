//! Snapshots of a VM on disk, and live migration of a VM between processes.
//!
//! This crate knows no KVM, no PCI and no device: `vmm` gives it memory to read and bytes to carry. The README
//! has the layout byte by byte and what stops which threat.
//!
//! | module | what it does |
//! |---|---|
//! | [`directory`] | a snapshot is there whole or not at all; how one is opened that may be anything |
//! | [`memory`] | `memory.bin` and `memory.map`: written in passes, read as a chain |
//! | [`layout`], [`pages`] | guest RAM as numbered pages, and sets of them |
//! | [`guest`] | what the VMM implements so that its guest's RAM can be read |
//! | `checksum` | of a page that may be written meanwhile |
//! | [`live`] | live migration: both ends, who owns the guest, when to stop it |
//! | [`wire`] | the stream between the two ends: frames, messages, the connection |
//!
//! Writing one:
//!
//! ```no_run
//! # use std::ops::ControlFlow;
//! # use migration::{*, directory::*, guest::GuestPages, memory::*};
//! # fn snapshot(guest: &impl GuestPages, changed: impl Fn() -> PageSet) -> Result<(), WriteError> {
//! let progress = &mut |_: Progress| ControlFlow::Continue(());
//! let writer = Writer::create("before-the-upgrade".as_ref(), Existing::Refuse)?;
//! let mut memory = writer.memory(guest.layout(), None)?;
//! memory.pass(guest, &PageSet::full(guest.layout()), Guest::Running, progress)?;
//! // The guest is paused now.
//! memory.pass(guest, &changed(), Guest::Paused, progress)?;
//! let state = format!(r#"{{"memory":"{}"}}"#, memory.id());
//! // The guest runs again.
//! let memory = memory.finish(progress)?;
//! writer.commit(state.as_bytes(), memory)?;
//! # Ok(())
//! # }
//! ```

mod checksum;
pub mod directory;
pub mod error;
pub mod guest;
pub mod id;
pub mod layout;
pub mod live;
pub mod memory;
pub mod pages;
pub mod wire;

pub use directory::{Existing, Reader, Writer};
pub use error::{ReadError, WriteError};
pub use guest::GuestPages;
pub use id::SnapshotId;
pub use layout::{PAGE_SIZE, RamLayout};
pub use memory::{Bases, Expected, Finished, Guest, Image, MemoryWriter};
pub use pages::{PageSet, Run};

use std::ops::ControlFlow;

/// How far something is that takes a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of guest RAM that were dealt with.
    pub done: u64,
    /// Bytes of guest RAM to deal with.
    pub total: u64,
}

/// Told about progress every few MiB; with `Break` the work ends with an error that says so.
pub type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// Compiles the usage example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
