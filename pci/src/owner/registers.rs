//! The SR-IOV registers of an owner, wherever somebody asks which members exist.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::admin::Membership;

use crate::config::ConfigSpace;
use crate::ecap::sriov::Sriov;

/// A way to the registers, not a copy of them. It refers to the configuration space and to nothing else of the owner's.
///
/// The lock of the configuration space is the last in every order, so this can be asked from anywhere.
pub(crate) struct SriovRegisters {
    sriov: Sriov,
    config: Arc<Mutex<ConfigSpace>>,
}

impl SriovRegisters {
    pub(crate) fn new(sriov: Sriov, config: Arc<Mutex<ConfigSpace>>) -> Self {
        Self { sriov, config }
    }

    /// The index of the member that has byte `offset` of the VF BAR space, and the offset in its BAR. `None` for a
    /// member that does not exist, or while members do not decode.
    pub(super) fn locate(&self, offset: u64) -> Option<(u16, u64)> {
        self.sriov.locate(&self.config(), offset)
    }

    /// Bytes between the BARs of neighbouring members.
    pub(super) fn member_size(&self) -> u64 {
        self.sriov.vf_size(&self.config())
    }

    /// How many members exist by the saved configuration space `saved`; none if it is not of this owner.
    pub(super) fn enabled_in(&self, saved: &[u8]) -> u16 {
        let config = self.config().restored(saved).ok();
        config.and_then(|c| self.sriov.enabled_vfs(&c)).unwrap_or(0)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Membership for SriovRegisters {
    fn enabled_members(&self) -> Option<u16> {
        self.sriov.enabled_vfs(&self.config())
    }
}
