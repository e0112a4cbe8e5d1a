//! A function as a member of a group: what its owner's drivers do to it.

use std::sync::Arc;

use super::VirtioFunction;
use crate::admin::{Epoch, Member, Rest, Wake};
use crate::gate::{Mode, Party, Reasons};
use crate::memory::records::Records;
use crate::state::{FunctionState, Shape};
use crate::virtio::{CheckedState, Restoration, RestoreError};

impl Member for VirtioFunction {
    fn name(&self) -> &str {
        Self::name(self)
    }

    fn mode(&self, party: Party) -> Mode {
        self.reasons().mode(party)
    }

    fn set_mode(&self, party: Party, mode: Mode) {
        let mut core = self.lock();
        let reason = Reasons::of_mode(party, mode);
        // The new reason before the old one goes, so that the gate does not open in between.
        core.gate.close(reason);
        self.open(&mut core, Reasons::modes(party) - reason);
    }

    fn rest(&self) -> Rest {
        let mut core = self.lock();
        let rest = match core.drained() {
            _ if core.gate.reasons().contains(Reasons::RESET) => Rest::Resetting,
            true => Rest::AtRest,
            false => Rest::Draining,
        };
        core.awaited |= rest != Rest::AtRest;
        rest
    }

    fn recall(&self) {
        Self::recall(self);
    }

    fn epoch(&self) -> Epoch {
        self.lock().epoch
    }

    fn shape(&self) -> Shape {
        Self::shape(self)
    }

    fn save(&self) -> FunctionState {
        Self::save(self)
    }

    fn check(&self, state: &FunctionState) -> Result<CheckedState, RestoreError> {
        Self::check(self, state)
    }

    fn restore(
        &self,
        state: &FunctionState,
        checked: Option<CheckedState>,
        epoch: Epoch,
        how: Restoration,
    ) -> Result<(), RestoreError> {
        let mut core = self.lock();
        if core.epoch != epoch {
            return Err(RestoreError::Stale);
        }
        self.restore_locked(&mut core, state, checked, how)
    }

    fn records(&self) -> Arc<Records> {
        Arc::clone(self.lock().view.records())
    }

    fn set_wake(&self, wake: Arc<dyn Wake>) {
        // A function is a member of one group, so only the first counts.
        let _ = self.wake.set(wake);
    }
}

impl VirtioFunction {
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
