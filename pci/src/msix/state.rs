//! Saved form of a function's MSI-X.

use super::{Control, Entry, Msix};

/// Everything a guest can observe, and what it is still owed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsixState {
    /// Message Control, as the capability has it too.
    pub control: Control,
    /// The table, one entry per vector.
    pub entries: Vec<Entry>,
    /// Vectors with their pending bit set, ascending.
    pub pending: Vec<u16>,
}

/// Why saved state was refused. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsixStateError {
    /// The state is of a function with another number of vectors.
    #[error("MSI-X state has {saved} vectors, the function has {own}")]
    Count {
        /// Vectors in the state.
        saved: usize,
        /// Vectors of this function.
        own: usize,
    },
    /// An address that no guest could have programmed.
    #[error("MSI-X vector {vector} has address {address:#x}, which is not a multiple of 4")]
    Address {
        /// The vector.
        vector: usize,
        /// Its address.
        address: u64,
    },
    /// A pending bit of a vector that is not there, or of a function whose MSI-X is disabled.
    #[error("MSI-X vector {0} cannot be pending")]
    Pending(u16),
    /// The pending vectors are not in ascending order, each of them once.
    #[error("MSI-X vector {0} is out of order in the list of pending vectors")]
    Order(u16),
}

impl Msix {
    /// Takes the state. The function must be quiet: a signal in between may or may not be in it.
    pub fn save(&self) -> MsixState {
        let table = self.table();
        let pending = (0..self.len()).filter(|vector| self.vectors.is_pending(*vector));
        MsixState {
            control: table.control,
            entries: table.entries.clone(),
            pending: pending.collect(),
        }
    }

    /// Whether `state` can be restored.
    pub fn check(&self, state: &MsixState) -> Result<(), MsixStateError> {
        let (saved, own) = (state.entries.len(), usize::from(self.len()));
        if saved != own {
            return Err(MsixStateError::Count { saved, own });
        }
        for (vector, entry) in state.entries.iter().enumerate() {
            if entry.address % 4 != 0 {
                let address = entry.address;
                return Err(MsixStateError::Address { vector, address });
            }
        }
        let mut next = 0;
        for vector in &state.pending {
            let there = usize::from(*vector) < own;
            if !there || !state.control.enabled {
                return Err(MsixStateError::Pending(*vector));
            }
            if usize::from(*vector) < next {
                return Err(MsixStateError::Order(*vector));
            }
            next = usize::from(*vector) + 1;
        }
        Ok(())
    }

    /// Checks all of `state`, then takes it over. The capability's registers are restored separately, and messages
    /// that are owed are delivered when the function goes on.
    pub fn restore(&self, state: &MsixState) -> Result<(), MsixStateError> {
        self.check(state)?;
        let mut table = self.table();
        table.control = state.control;
        table.entries.clone_from(&state.entries);
        self.vectors.forget_pending();
        for vector in &state.pending {
            self.vectors.restore_pending(*vector);
        }
        let _later = self.settle_all(&table);
        Ok(())
    }
}
