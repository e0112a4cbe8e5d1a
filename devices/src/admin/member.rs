//! What an owner's drivers can do to a member.

use std::sync::Arc;

use crate::gate::{Mode, Party};
use crate::memory::records::Records;
use crate::state::{FunctionState, Shape};
use crate::virtio::{CheckedState, Epoch, Rest, Restoration, RestoreError, VirtioFunction, Wake};

/// A member's number within its group: 1 for the first VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub u16);

/// A device that belongs to a group. It does not know its owner.
pub trait Member: Send + Sync {
    /// The name in messages and in `tern info`.
    fn name(&self) -> &str;

    /// Its mode for `party` (S3-3).
    fn mode(&self, party: Party) -> Mode;

    /// Sets its mode for `party`. Leaving Active is only complete when it is at rest.
    fn set_mode(&self, party: Party, mode: Mode);

    /// How far it is from standing still. If it is not at rest, [`Wake::wake`] is called when it is.
    fn rest(&self) -> Rest;

    /// Gives up requests in flight whose execution has not begun: they become descriptors that the member owns.
    fn recall(&self);

    /// What it went through.
    fn epoch(&self) -> Epoch;

    /// What bounds its context.
    fn shape(&self) -> Shape;

    /// Its state now.
    fn save(&self) -> FunctionState;

    /// Whether it could be put into `state`; what it would be then.
    fn check(&self, state: &FunctionState) -> Result<CheckedState, RestoreError>;

    /// Puts it into `state`, or does nothing; also if it is no longer in `epoch`. What is `checked` already, by this member,
    /// is not checked again.
    fn restore(
        &self,
        state: &FunctionState,
        checked: Option<CheckedState>,
        epoch: Epoch,
        how: Restoration,
    ) -> Result<(), RestoreError>;

    /// The records of its writes to memory.
    fn records(&self) -> Arc<Records>;

    /// Says who is to be woken. Only the first call counts.
    fn set_wake(&self, wake: Arc<dyn Wake>);
}

impl Member for VirtioFunction {
    fn name(&self) -> &str {
        Self::name(self)
    }

    fn mode(&self, party: Party) -> Mode {
        self.reasons().mode(party)
    }

    fn set_mode(&self, party: Party, mode: Mode) {
        Self::set_mode(self, party, mode);
    }

    fn rest(&self) -> Rest {
        Self::rest(self)
    }

    fn recall(&self) {
        Self::recall(self);
    }

    fn epoch(&self) -> Epoch {
        Self::epoch(self)
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
        self.restore_in(epoch, state, checked, how)
    }

    fn records(&self) -> Arc<Records> {
        Self::records(self)
    }

    fn set_wake(&self, wake: Arc<dyn Wake>) {
        Self::set_wake(self, wake);
    }
}
