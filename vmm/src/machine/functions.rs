//! The virtio functions a configuration asks for, each shown on the PCI bus and served by the I/O thread.

use std::sync::Arc;

use devices::memory::{GuestRam, MemoryError};
use devices::virtio::VirtioFunction;
use pci::msi::MsiController;
use pci::root::PciRoot;

use crate::config::Machine;
use crate::config::check::OpenDisk;

/// Why a function could not be built.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// No view of guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// The functions of a machine.
#[derive(Default)]
pub struct Functions {
    all: Vec<Arc<VirtioFunction>>,
}

impl Functions {
    /// Builds what `config` asks for and plugs it into `pci`.
    pub fn build(
        _config: &Machine,
        _disks: Vec<OpenDisk>,
        _ram: &Arc<GuestRam>,
        _pci: &Arc<PciRoot>,
        _msi: &dyn MsiController,
    ) -> Result<Self, FunctionError> {
        Ok(Self::default())
    }

    /// All functions, in the order of their places on the bus.
    pub fn all(&self) -> impl Iterator<Item = &Arc<VirtioFunction>> {
        self.all.iter()
    }
}
