//! How far the migration of a machine is, for those who ask; and what they ask for.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use migration::live::commit::Resolution;
use migration::live::destination::Arrived;
use migration::live::source::{Phase, Progress};
use serde::{Deserialize, Serialize};

/// What is known of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "role", deny_unknown_fields)]
pub enum Status {
    /// The guest goes to another process.
    Source {
        /// Where to.
        to: String,
        /// What is being done.
        phase: Phase,
        /// Number of the round of copying, from 1 on.
        round: u32,
        /// Bytes of the round that were dealt with.
        done: u64,
        /// Bytes of the round.
        total: u64,
        /// How much the guest is slowed down, in percent.
        slow_down: u8,
        /// The pause if the guest had been stopped after the last round, in microseconds.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        predicted_us: Option<u64>,
    },
    /// The guest was given away, and nobody could say whether it runs there.
    InDoubt {
        /// Where to.
        to: String,
        /// What happened, and how to end the doubt.
        reason: String,
    },
    /// The guest comes from another process.
    Destination {
        /// The round of copying that arrives, from 1 on; 0 if memory is handed over.
        round: u32,
        /// Pages that have arrived.
        pages: u64,
    },
}

/// How the migration of one machine stands.
#[derive(Debug, Default)]
pub struct Monitor {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    status: Option<Status>,
    called_off: bool,
    resolution: Option<Resolution>,
    /// Why a guest that was to go on here does not.
    stuck: Option<String>,
}

impl Monitor {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known.
    pub fn status(&self) -> Option<Status> {
        self.lock().status.clone()
    }

    /// True while the guest was given away and nobody can say whether it runs there.
    pub fn in_doubt(&self) -> bool {
        matches!(self.lock().status, Some(Status::InDoubt { .. }))
    }

    /// True while the guest stands still to be given away.
    pub fn is_leaving_still(&self) -> bool {
        match self.lock().status {
            Some(Status::Source { phase, .. }) => phase >= Phase::Pause,
            _ => false,
        }
    }

    /// Calls off the migration that is under way. False if there is none, or if it is too late.
    pub fn call_off(&self) -> bool {
        let mut inner = self.lock();
        match inner.status {
            Some(Status::Source {
                phase: Phase::Commit,
                ..
            })
            | Some(Status::InDoubt { .. } | Status::Destination { .. })
            | None => false,
            Some(Status::Source { .. }) => {
                inner.called_off = true;
                true
            }
        }
    }

    /// Ends the doubt. False if there is none.
    pub fn resolve(&self, resolution: Resolution) -> bool {
        let mut inner = self.lock();
        if !matches!(inner.status, Some(Status::InDoubt { .. })) {
            return false;
        }
        inner.resolution = Some(resolution);
        self.changed.notify_all();
        true
    }

    /// A migration to `to` begins at its source, which is not called off yet.
    pub(super) fn begin(&self, to: &str) {
        *self.lock() = Inner {
            status: Some(Status::Source {
                to: to.to_owned(),
                phase: Phase::Connect,
                round: 0,
                done: 0,
                total: 0,
                slow_down: 0,
                predicted_us: None,
            }),
            ..Inner::default()
        };
    }

    /// So far is the source. True if it was called off.
    pub(super) fn leaving(&self, to: &str, progress: &Progress) -> bool {
        let mut inner = self.lock();
        inner.status = Some(Status::Source {
            to: to.to_owned(),
            phase: progress.phase,
            round: progress.round,
            done: progress.done,
            total: progress.total,
            slow_down: progress.slow_down,
            predicted_us: progress.predicted_us,
        });
        inner.called_off
    }

    /// So far is the destination.
    pub(super) fn arriving(&self, arrived: Arrived) {
        self.lock().status = Some(Status::Destination {
            round: arrived.round,
            pages: arrived.pages,
        });
    }

    /// The source is in doubt.
    pub(super) fn doubt(&self, to: &str, reason: String) {
        self.lock().status = Some(Status::InDoubt {
            to: to.to_owned(),
            reason,
        });
    }

    /// What a person said, waiting for it no longer than `limit`.
    pub(super) fn wait_for_resolution(&self, limit: Duration) -> Option<Resolution> {
        let inner = self.lock();
        if let Some(resolution) = inner.resolution {
            return Some(resolution);
        }
        let (inner, _) = self
            .changed
            .wait_timeout(inner, limit)
            .unwrap_or_else(PoisonError::into_inner);
        inner.resolution
    }

    /// The guest was to go on here, and does not.
    pub(super) fn stuck(&self, why: String) {
        self.lock().stuck = Some(why);
    }

    /// Why the guest does not go on here although its doubt was resolved so; told once.
    pub fn take_stuck(&self) -> Option<String> {
        self.lock().stuck.take()
    }

    /// No migration is under way any more.
    pub(super) fn end(&self) {
        let mut inner = self.lock();
        *inner = Inner {
            stuck: inner.stuck.take(),
            ..Inner::default()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_leaves_still_from_the_pause_on() {
        let monitor = Monitor::default();
        assert!(!monitor.is_leaving_still());
        monitor.begin("there");
        for (phase, still) in [
            (Phase::Offer, false),
            (Phase::Memory, false),
            (Phase::Pause, true),
            (Phase::Verify, true),
            (Phase::Restore, true),
            (Phase::Commit, true),
        ] {
            let progress = Progress {
                phase,
                ..Progress::default()
            };
            assert!(!monitor.leaving("there", &progress));
            assert_eq!(monitor.is_leaving_still(), still, "{phase}");
        }
        // Whoever is in doubt may want to end it.
        monitor.doubt("there", String::new());
        assert!(!monitor.is_leaving_still());
        monitor.end();
        assert!(!monitor.is_leaving_still());
    }
}
