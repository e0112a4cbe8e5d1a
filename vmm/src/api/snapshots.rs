//! What the API takes and says about snapshots.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::State;

/// Body of `PUT /api/v1/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
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

/// Answer to `PUT /api/v1/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotReport {
    /// The directory.
    pub directory: PathBuf,
    /// What names this snapshot.
    pub id: String,
    /// What the guest does now.
    pub state: State,
    /// How much was written.
    pub bytes: SnapshotBytes,
    /// How long nothing of the guest happened, in microseconds, and what took the time.
    pub pause_us: SnapshotPause,
    /// How long all of it took, in microseconds.
    pub total_us: u64,
}

/// Sizes of a snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotBytes {
    /// Guest memory.
    pub memory: u64,
    /// Of that, written while the guest ran.
    pub written_running: u64,
    /// Of that, written while nothing of it happened.
    pub written_paused: u64,
    /// The file of guest memory takes so much of the disk.
    pub allocated: u64,
    /// The state of everything else.
    pub state: u64,
}

/// Parts of a pause, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPause {
    /// All of it; 0 for a guest that was paused already.
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
    /// What is being done: `memory`, `pause`, `digest` or `sync`.
    pub phase: String,
    /// Bytes done in this phase.
    pub done: u64,
    /// Bytes there are in this phase; 0 if unknown.
    pub total: u64,
}
