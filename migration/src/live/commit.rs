//! Who owns the guest.
//!
//! Each end of a migration has one of these state machines. They do no I/O, so that a model checker can run every order of
//! messages, losses and crashes through the code that decides (`tests` of this module): never do both run the guest, and
//! neither does only while the source says that it is in doubt, or has crashed.
//!
//! ```text
//! source:       Moving ─ prepared ─► Committing ─ running ─► Moved
//!                 │                   │   │  └─ refused ─► Kept
//!                 │ anything else     │ lost
//!                 ▼                   ▼
//!                Kept ◄─ discarded ─ InDoubt ─ running ─► Moved
//!                     ◄─ resolve: run ┘    └─ resolve: discard ─► Moved
//!
//! destination:  Receiving ─ restored ─► Prepared ─ commit ─► Running
//!                    │                      │
//!                    └─ anything else ──────┴─► Discarded
//! ```

use crate::wire::message::Outcome;

/// The guest as its source sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// It runs here, or stands still here for a moment.
    Moving,
    /// The destination was told to run it. It must not run here.
    Committing,
    /// Nobody could say whether the destination runs it. It does not run here.
    InDoubt,
    /// It runs at the destination. Final.
    Moved,
    /// It runs here, and never will at the destination. Final.
    Kept,
}

/// What happens to a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceEvent {
    /// The destination has restored everything.
    Prepared,
    /// Called off, or something failed here.
    Failed,
    /// The destination refuses the guest.
    Refused,
    /// The connection is lost.
    Lost,
    /// The destination says that it runs the guest.
    Running,
    /// The destination was asked, and this is its answer.
    Outcome(Outcome),
    /// A person says what to do.
    Resolve(Resolution),
}

/// How a person ends a doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resolution {
    /// The guest does not run elsewhere: run it here.
    Run,
    /// It runs elsewhere, or shall not run: end it here.
    Discard,
}

/// What a source does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceAction {
    /// Nothing.
    Nothing,
    /// Let go of what only one may hold, and send the commit.
    Commit,
    /// Run the guest here.
    Resume,
    /// Ask the destination on a new connection.
    Ask,
    /// End: the guest is elsewhere.
    End,
}

impl Source {
    /// The next state, and what to do.
    pub fn on(self, event: SourceEvent) -> (Self, SourceAction) {
        use SourceAction as Action;
        use SourceEvent as Event;
        match (self, event) {
            (Self::Moving, Event::Prepared) => (Self::Committing, Action::Commit),
            (Self::Moving, Event::Failed | Event::Refused | Event::Lost) => {
                (Self::Kept, Action::Resume)
            }
            (Self::Committing | Self::InDoubt, Event::Running) => (Self::Moved, Action::End),
            (Self::Committing | Self::InDoubt, Event::Refused) => (Self::Kept, Action::Resume),
            // Whatever failed: the destination may have been told already.
            (Self::Committing, Event::Lost | Event::Failed) => (Self::InDoubt, Action::Ask),
            (Self::InDoubt, Event::Outcome(Outcome::Running)) => (Self::Moved, Action::End),
            (Self::InDoubt, Event::Outcome(Outcome::Discarded)) => (Self::Kept, Action::Resume),
            (Self::InDoubt, Event::Resolve(Resolution::Run)) => (Self::Kept, Action::Resume),
            (Self::InDoubt, Event::Resolve(Resolution::Discard)) => (Self::Moved, Action::End),
            (state, _) => (state, Action::Nothing),
        }
    }

    /// True if the guest may run here.
    pub fn may_run(self) -> bool {
        matches!(self, Self::Moving | Self::Kept)
    }
}

/// The guest as its destination sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// It is on its way.
    Receiving,
    /// It is complete, and waits for the commit.
    Prepared,
    /// It runs here. Final.
    Running,
    /// It never will run here. Final.
    Discarded,
}

/// What happens to a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationEvent {
    /// Everything is restored and verified.
    Restored,
    /// Something failed here, the source called it off, or the connection is lost.
    Failed,
    /// The source says that the guest is to run here, and what only one may hold was taken.
    Commit,
    /// The source asks on another connection. It has given up the first one, so that no commit on that one counts any more.
    Asked,
}

/// What a destination does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationAction {
    /// Nothing.
    Nothing,
    /// Tell the source that everything is prepared.
    Prepared,
    /// Run the guest.
    Run,
    /// Drop it, and say so if anybody can hear it.
    Discard,
    /// Answer the question.
    Answer(Outcome),
}

impl Destination {
    /// The next state, and what to do.
    pub fn on(self, event: DestinationEvent) -> (Self, DestinationAction) {
        use DestinationAction as Action;
        use DestinationEvent as Event;
        match (self, event) {
            (Self::Receiving, Event::Restored) => (Self::Prepared, Action::Prepared),
            (Self::Prepared, Event::Commit) => (Self::Running, Action::Run),
            (Self::Running, Event::Asked) => (self, Action::Answer(Outcome::Running)),
            (_, Event::Asked) => (Self::Discarded, Action::Answer(Outcome::Discarded)),
            (Self::Receiving | Self::Prepared, Event::Failed) => (Self::Discarded, Action::Discard),
            // Called off in between: whoever sent it hears that.
            (Self::Discarded, Event::Commit) => (self, Action::Discard),
            (state, _) => (state, Action::Nothing),
        }
    }
}

#[cfg(test)]
mod tests;
