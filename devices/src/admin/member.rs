//! What an owner's drivers can do to a member.

use std::sync::Arc;

use crate::gate::{Mode, Party};
use crate::memory::records::Records;
use crate::state::{FunctionState, Shape};
use crate::virtio::{CheckedState, Restoration, RestoreError};

/// A member's number within its group: 1 for the first VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub u16);

/// How far a member is from standing still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rest {
    /// Nothing is in flight. If its gate is closed, it stands still.
    AtRest,
    /// Requests are in flight.
    Draining,
    /// A reset waits for requests in flight.
    Resetting,
}

/// What a member went through, to tell whether anything it was told before still holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Epoch {
    /// How often it came to exist, or ceased to.
    pub life: u64,
    /// How often it was reset by a function level reset, or with its bus.
    pub resets: u64,
}

/// Someone who waits for members. Called with the lock of a member's function held: it must only leave a note.
pub trait Wake: Send + Sync {
    /// A member came to rest.
    fn wake(&self);
}

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
