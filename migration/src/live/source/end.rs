//! How far a migration is, and what became of the guest.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::id::SnapshotId;
use crate::live::guest::GuestError;
use crate::live::report::Report;
use crate::wire::WireError;
use crate::wire::message::VERSION;

/// What is being done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Reaching the destination.
    #[default]
    Connect,
    /// The destination builds the machine.
    Offer,
    /// Memory is copied while the guest runs.
    Memory,
    /// The guest stands still: last pages and state.
    Pause,
    /// All of memory is compared.
    Verify,
    /// The destination restores and verifies.
    Restore,
    /// The guest is handed over.
    Commit,
}

impl Phase {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Offer => "offer",
            Self::Memory => "memory",
            Self::Pause => "pause",
            Self::Verify => "verify",
            Self::Restore => "restore",
            Self::Commit => "commit",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Number of the round, from 1 on; 0 before.
    pub round: u32,
    /// Bytes of this round that were dealt with.
    pub done: u64,
    /// Bytes of this round.
    pub total: u64,
    /// How much the guest is slowed down, in percent.
    pub slow_down: u8,
    /// The pause if the guest had been stopped after the last round, in microseconds.
    pub predicted_us: Option<u64>,
}

/// Why a guest was not moved.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// The connection.
    #[error("{phase}: {source}")]
    Wire {
        /// When.
        phase: Phase,
        /// What failed.
        source: WireError,
    },
    /// This side.
    #[error("{phase}: {source}")]
    Guest {
        /// When.
        phase: Phase,
        /// What failed.
        source: GuestError,
    },
    /// The destination refused it.
    #[error("{phase}: the destination refuses the guest:{}", listed(reasons))]
    Refused {
        /// When.
        phase: Phase,
        /// Everything that does not fit.
        reasons: Vec<String>,
    },
    /// No common version of the protocol.
    #[error(
        "the destination speaks version {0} of the migration protocol, and this tern version {VERSION}"
    )]
    Version(u32),
    /// It was called off.
    #[error("{0}: called off")]
    Cancelled(Phase),
    /// It did not converge.
    #[error(
        "the guest writes memory faster than it can be copied: after {} s, slowed down by {slow_down} %, {written} MiB \
         are left, and a pause would take {} ms where {} are allowed; allow more (--downtime), or have it moved \
         nevertheless (--on-timeout switch)",
        elapsed.as_secs(), predicted.as_millis(), allowed.as_millis()
    )]
    Timeout {
        /// How long it was tried.
        elapsed: Duration,
        /// The last step of slowing down, in percent.
        slow_down: u8,
        /// What is left, in MiB.
        written: u64,
        /// How long the pause would take.
        predicted: Duration,
        /// How long it may take.
        allowed: Duration,
    },
}

fn listed(reasons: &[String]) -> String {
    reasons.iter().map(|one| format!("\n  {one}")).collect()
}

/// What became of the guest.
#[derive(Debug)]
pub enum End {
    /// It runs at the destination.
    Moved(Box<Report>),
    /// It goes on here.
    Kept(Reason),
    /// It was to go on here, and cannot.
    Lost {
        /// Why it was not moved.
        reason: Reason,
        /// Why it cannot go on.
        error: GuestError,
    },
    /// It stands still here, and may run at the destination: nobody can be asked.
    InDoubt {
        /// What to ask the destination about.
        session: SnapshotId,
        /// What failed.
        reason: Reason,
        /// What was found out since.
        asked: String,
    },
}
