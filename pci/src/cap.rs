//! Capabilities in the first 256 bytes of configuration space, one per file.

pub mod msix;
pub mod pcie;
pub mod virtio;
