//! What the owner of a group does to a function that is a member of it. The function does not know its owner.

use std::sync::Arc;

use super::VirtioFunction;
use crate::gate::{Mode, Party, Reasons};
use crate::memory::records::Records;
use crate::state::FunctionState;
use crate::virtio::{CheckedState, Restoration, RestoreError};

/// How far a function is from standing still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing is in flight. If its gate is closed, it stands still.
    AtRest,
    /// Requests are in flight.
    Draining,
    /// A reset waits for requests in flight.
    Resetting,
}

/// What a function went through, to tell whether anything it was told before still holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epoch {
    /// How often it came to exist, or ceased to.
    pub life: u64,
    /// How often it was reset by a function level reset, or with its bus.
    pub resets: u64,
}

/// Someone who waits for functions to come to rest. Called with the lock of one held: it must only leave a note.
pub trait Wake: Send + Sync {
    /// One came to rest.
    fn wake(&self);
}

impl VirtioFunction {
    /// Sets its mode for `party`. Leaving Active is only complete when it is at rest.
    pub fn set_mode(&self, party: Party, mode: Mode) {
        let mut core = self.lock();
        let reason = Reasons::of_mode(party, mode);
        // The new reason before the old one goes, so that the gate does not open in between.
        core.gate.close(reason);
        self.open(&mut core, Reasons::modes(party) - reason);
    }

    /// How far it is from standing still. If it is not at rest, [`Wake::wake`] is called when it is.
    pub fn rest(&self) -> Rest {
        let mut core = self.lock();
        let rest = match core.drained() {
            _ if core.gate.reasons().contains(Reasons::RESET) => Rest::Resetting,
            true => Rest::AtRest,
            false => Rest::Draining,
        };
        core.awaited |= rest != Rest::AtRest;
        rest
    }

    /// What it went through.
    pub fn epoch(&self) -> Epoch {
        self.lock().epoch
    }

    /// [`Self::restore`] in a way that is told, unless the function is no longer in `epoch`. What is `checked` already, by
    /// this function, is not checked again.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong; [`RestoreError::Stale`] for another epoch.
    pub fn restore_in(
        &self,
        epoch: Epoch,
        state: &FunctionState,
        checked: Option<CheckedState>,
        how: Restoration,
    ) -> Result<(), RestoreError> {
        let mut core = self.lock();
        if core.epoch != epoch {
            return Err(RestoreError::Stale);
        }
        self.restore_locked(&mut core, state, checked, how)
    }

    /// The records of its writes to memory.
    pub fn records(&self) -> Arc<Records> {
        Arc::clone(self.lock().view.records())
    }

    /// Says who is to be woken when it comes to rest. A function is a member of one group, so only the first call counts.
    pub fn set_wake(&self, wake: Arc<dyn Wake>) {
        let _ = self.wake.set(wake);
    }

    /// The function, which was just reset, ceases to exist as a member, or comes to exist: it is Active for everyone (S3-2),
    /// and nobody records it.
    pub fn renew(&self) {
        let mut core = self.lock();
        core.epoch.life += 1;
        for party in Party::ALL {
            self.open(&mut core, Reasons::modes(party));
            core.view.records().stop(party);
        }
    }
}
