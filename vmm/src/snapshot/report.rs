//! What a snapshot is asked for, how far it is, and what it came to.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

/// What is to be written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Directory to write. Relative to that of the monitor; better an absolute path.
    pub directory: PathBuf,
    /// A snapshot of this guest, to write only what changed since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<PathBuf>,
    /// Track what changes from now on, so that this snapshot can be the base of the next.
    #[serde(default)]
    pub track: bool,
    /// A snapshot that is in the place of the directory is replaced.
    #[serde(default)]
    pub replace: bool,
    /// What the guest does afterwards.
    #[serde(default)]
    pub then: Then,
}

/// What a guest does after a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Then {
    /// What it did before.
    #[default]
    Resume,
    /// It stays paused.
    Pause,
    /// It is ended.
    Stop,
}

/// What a snapshot came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The directory.
    pub directory: PathBuf,
    /// What names this snapshot.
    pub id: String,
    /// How much was written.
    pub bytes: Bytes,
    /// How long nothing of the guest happened, in microseconds, and what took the time.
    pub pause_us: Pause,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

/// Sizes of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bytes {
    /// Guest memory.
    pub memory: u64,
    /// Data that was written while the guest ran.
    pub written_running: u64,
    /// Data that was written while nothing of it happened.
    pub written_paused: u64,
    /// The state of everything else.
    pub state: u64,
}

/// Parts of a pause, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// All of it. It also counts in a guest that was paused already.
    pub total: u64,
    /// vCPUs left the guest and devices came to rest.
    pub stop: u64,
    /// The state of devices was read.
    pub devices: u64,
    /// The state of vCPUs and interrupt controllers was read.
    pub vcpus: u64,
    /// The last pages of memory were written.
    pub memory: u64,
}

/// How far a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done.
    pub phase: Phase,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes there are in this phase; 0 if that is unknown.
    pub total: u64,
}

/// What is being done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Memory is written while the guest runs.
    #[default]
    Memory,
    /// The guest stands still for the rest.
    Pause,
    /// What was written is read back for its digest. The guest runs.
    Digest,
    /// The disk is waited for. The guest runs.
    Sync,
}

impl Phase {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Pause => "pause",
            Self::Digest => "digest",
            Self::Sync => "sync",
        }
    }
}

/// Where progress is written, and read by others.
#[derive(Debug, Default)]
pub struct Meter {
    phase: Mutex<Option<Phase>>,
    done: AtomicU64,
    total: AtomicU64,
    given_up: AtomicBool,
}

impl Meter {
    /// Whoever asked for it does not wait any more.
    pub fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// True once nobody waits any more.
    pub fn is_given_up(&self) -> bool {
        self.given_up.load(Ordering::Relaxed)
    }

    /// Nothing of `phase` is done yet.
    pub fn begin(&self, phase: Phase) {
        self.show(0, 0);
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = Some(phase);
    }

    /// So much is done.
    pub fn show(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    /// Nothing is under way any more.
    pub fn end(&self) {
        self.given_up.store(false, Ordering::Relaxed);
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// How far it is, if something is under way.
    pub fn read(&self) -> Option<Progress> {
        let phase = *self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Progress {
            phase: phase?,
            done: self.done.load(Ordering::Relaxed),
            total: self.total.load(Ordering::Relaxed),
        })
    }
}
