//! Snapshots of a VM on disk.
//!
//! This crate knows no KVM, no PCI and no device: `vmm` gives it memory to read and bytes to carry.

pub mod layout;
pub mod pages;

pub use layout::{PAGE_SIZE, RamLayout};
pub use pages::{PageSet, Run};
