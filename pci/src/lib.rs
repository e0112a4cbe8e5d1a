//! PCI Express topology, configuration space, MSI-X and the virtio-pci transport.

pub mod msi;
pub mod topology;
