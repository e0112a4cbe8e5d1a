//! PCI Express topology, configuration space, MSI-X and the virtio-pci transport.

pub mod bar;
pub mod cap;
pub mod config;
pub mod ecap;
pub mod header;
pub mod msi;
pub mod msix;
#[cfg(test)]
pub(crate) mod testing;
pub mod topology;
