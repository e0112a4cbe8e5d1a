//! Live migration of a guest from one process to another.
//!
//! ```text
//! source                                     destination
//!   hello ─────────────────────────────────► welcome
//!   offer (sections, descriptors) ─────────► builds the machine: accept, or refuse with all reasons
//!   pages, round ──────────────────────────► arrived              copying only, while the guest runs
//!   stop; last pages, sections, complete ──► restores and verifies: prepared    checksums before complete, if asked for
//!   commit ────────────────────────────────► running
//!   bye ───────────────────────────────────►
//! ```
//!
//! | module | what it does |
//! |---|---|
//! | [`commit`] | who owns the guest: the state machines of both ends, free of I/O |
//! | [`destination`] | the receiving end, one type for each stage |
//! | [`guest`] | what the VMM implements |
//! | [`page_connections`] | pages over several connections at once |
//! | [`pages`] | guest memory to frames and back |
//! | [`policy`] | when to stop the guest: predicted pause, slowing down, patience |
//! | [`report`] | what a migration came to |
//! | [`source`] | the sending end |
//! | [`verify`] | all of memory compared at both ends |

pub mod commit;
pub mod destination;
pub mod guest;
pub mod page_connections;
pub mod pages;
pub mod policy;
pub mod report;
pub mod source;
pub mod verify;

#[cfg(test)]
mod tests;

pub use destination::{Incoming, Offered};
pub use guest::{DestinationGuest, GuestError, SourceGuest};
pub use policy::{Limits, OnTimeout};
pub use report::{Attempt, Report};
pub use source::{End, Options, attempt, migrate};
