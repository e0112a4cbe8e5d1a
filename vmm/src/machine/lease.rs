//! Who may change what a machine does: one at a time.
//!
//! Starting, pausing, resuming, saving and moving a machine take a [`Lease`] each, for as long as they last. Taking one never
//! waits: while somebody holds it, everybody else is told who. A machine is saved and moved without administration commands
//! under way, and none begins until it is.
//!
//! Locks are taken in this order: the lease; the input of the guest (`Machine::input`); the state of the vCPUs
//! ([`Control`](crate::vcpu::Control)); a function's, an owner's before its members'; its MSI-X table; interrupt routes.
//! Nobody waits for a vCPU while holding the lock of a function.

use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// What a lease is held for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// The start of the guest.
    Start,
    /// The arrival of the guest from another process, and its start.
    Arrival,
    /// Pausing it.
    Pause,
    /// Resuming it.
    Resume,
    /// Taking a snapshot of it.
    Snapshot,
    /// Moving it to another process.
    Migration,
    /// Finding out whether it runs in the process it was given to.
    Doubt,
}

impl Purpose {
    /// True if no administration command may be under way meanwhile.
    fn excludes_commands(self) -> bool {
        match self {
            Self::Pause | Self::Resume => false,
            // A state may just have been put into a machine that has not been started.
            Self::Start | Self::Arrival | Self::Snapshot | Self::Migration | Self::Doubt => true,
        }
    }
}

impl fmt::Display for Purpose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "it is being started",
            Self::Pause => "it is being paused",
            Self::Resume => "it is being resumed",
            Self::Snapshot => "a snapshot of it is being taken",
            Self::Arrival => "it is still arriving, and stays at its source until all of it is here",
            Self::Migration => {
                "it is being moved to another process (`tern migrate --cancel` calls that off)"
            }
            Self::Doubt => {
                "it was given to another process, and nobody knows whether it runs there (`tern resolve` ends that)"
            }
        })
    }
}

/// Why a lease was not given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// Somebody has it.
    #[error("the guest is busy: {0}; try again when that is over")]
    Held(Purpose),
    /// An administration command is being executed.
    #[error(
        "the guest is busy: an administration command waits for its answer; try again when it is there"
    )]
    Command,
    /// The guest is here no more: how it ended.
    #[error("{0}")]
    Over(String),
}

/// Gives leases of one machine.
#[derive(Debug, Default)]
pub struct Leases {
    state: Mutex<State>,
    listener: Listener,
}

/// Whom to tell when somebody has taken or given back the lease.
#[derive(Default)]
struct Listener(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listener")
    }
}

#[derive(Debug, Default)]
struct State {
    holder: Option<Purpose>,
    /// Administration commands under way.
    commands: usize,
}

impl Leases {
    /// Of a machine that was not started: that lease is taken, until [`Self::started`].
    pub fn starting() -> Self {
        Self {
            state: Mutex::new(State {
                holder: Some(Purpose::Start),
                commands: 0,
            }),
            listener: Listener::default(),
        }
    }

    /// The machine that was not started is one whose guest comes from another process.
    pub fn arriving(&self) {
        let mut state = self.lock();
        if state.holder == Some(Purpose::Start) {
            state.holder = Some(Purpose::Arrival);
        }
    }

    /// The machine was started. Whoever says so tells the listener when it can look at the machine.
    pub fn started(&self) {
        let mut state = self.lock();
        if let Some(Purpose::Start | Purpose::Arrival) = state.holder {
            state.holder = None;
        }
    }

    /// Has `listener` called whenever the lease was taken, given back, or is held for something else, by whoever did that.
    /// The first one counts.
    pub fn listen(&self, listener: Box<dyn Fn() + Send + Sync>) {
        let _ = self.listener.0.set(listener);
    }

    /// Calls the listener.
    pub fn tell(&self) {
        if let Some(listener) = self.listener.0.get() {
            listener();
        }
    }

    /// Takes the lease, at once or not at all.
    pub fn take(&self, purpose: Purpose) -> Result<Lease<'_>, Busy> {
        let mut state = self.lock();
        if let Some(holder) = state.holder {
            return Err(Busy::Held(holder));
        }
        if state.commands > 0 && purpose.excludes_commands() {
            return Err(Busy::Command);
        }
        state.holder = Some(purpose);
        drop(state);
        self.tell();
        Ok(Lease { leases: self })
    }

    /// Who has the lease.
    pub fn holder(&self) -> Option<Purpose> {
        self.lock().holder
    }

    /// Says that an administration command is under way, until the result is dropped. Refused while somebody has the
    /// lease who cannot have that.
    pub fn command(&self) -> Result<UnderWay<'_>, Busy> {
        let mut state = self.lock();
        if let Some(holder) = state.holder.filter(|holder| holder.excludes_commands()) {
            return Err(Busy::Held(holder));
        }
        state.commands += 1;
        Ok(UnderWay { leases: self })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to change what a machine does; given back when dropped.
#[derive(Debug)]
pub struct Lease<'a> {
    leases: &'a Leases,
}

impl Lease<'_> {
    /// It is held for `purpose` from here on.
    pub fn becomes(&self, purpose: Purpose) {
        self.leases.lock().holder = Some(purpose);
        self.leases.tell();
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        self.leases.lock().holder = None;
        self.leases.tell();
    }
}

/// An administration command under way.
#[derive(Debug)]
pub struct UnderWay<'a> {
    leases: &'a Leases,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.leases.lock().commands -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_lease_and_it_says_who_has_it() {
        let leases = Leases::default();
        let first = leases.take(Purpose::Snapshot).unwrap();
        assert_eq!(leases.holder(), Some(Purpose::Snapshot));
        let refused = leases.take(Purpose::Pause).unwrap_err();
        assert_eq!(refused, Busy::Held(Purpose::Snapshot));
        assert!(refused.to_string().contains("a snapshot"), "{refused}");
        drop(first);
        assert_eq!(leases.holder(), None);
        leases.take(Purpose::Pause).unwrap();
    }

    #[test]
    fn nothing_else_comes_before_the_start() {
        let leases = Leases::starting();
        let refused = leases.take(Purpose::Snapshot).unwrap_err();
        assert_eq!(refused, Busy::Held(Purpose::Start));
        leases.started();
        let _lease = leases.take(Purpose::Snapshot).unwrap();
        leases.started();
        assert_eq!(leases.holder(), Some(Purpose::Snapshot));
    }

    #[test]
    fn a_guest_that_arrives_is_nobodys_until_it_was_started() {
        let leases = Leases::starting();
        leases.arriving();
        for purpose in [Purpose::Pause, Purpose::Resume, Purpose::Migration] {
            let refused = leases.take(purpose).unwrap_err().to_string();
            assert!(refused.contains("still arriving"), "{refused}");
        }
        let refused = leases.command().unwrap_err().to_string();
        assert!(refused.contains("still arriving"), "{refused}");
        leases.started();
        let _lease = leases.take(Purpose::Pause).unwrap();
        leases.arriving();
        assert_eq!(leases.holder(), Some(Purpose::Pause));
    }

    #[test]
    fn every_change_of_the_holder_is_told_when_it_can_be_seen() {
        let leases = std::sync::Arc::new(Leases::default());
        let seen = std::sync::Arc::new(Mutex::new(Vec::new()));
        let (weak, list) = (std::sync::Arc::downgrade(&leases), seen.clone());
        leases.listen(Box::new(move || {
            let holder = weak.upgrade().unwrap().holder();
            list.lock().unwrap().push(holder);
        }));
        let lease = leases.take(Purpose::Migration).unwrap();
        lease.becomes(Purpose::Doubt);
        drop(lease);
        let expected = [Some(Purpose::Migration), Some(Purpose::Doubt), None];
        assert_eq!(*seen.lock().unwrap(), expected);
    }

    #[test]
    fn commands_and_snapshots_exclude_each_other() {
        let leases = Leases::default();
        let commands = [leases.command().unwrap(), leases.command().unwrap()];
        assert_eq!(leases.take(Purpose::Snapshot).unwrap_err(), Busy::Command);
        let pause = leases.take(Purpose::Pause).unwrap();
        leases.command().unwrap();
        drop((pause, commands));
        let lease = leases.take(Purpose::Snapshot).unwrap();
        assert_eq!(leases.command().unwrap_err(), Busy::Held(Purpose::Snapshot));
        drop(lease);
        leases.command().unwrap();
    }
}
