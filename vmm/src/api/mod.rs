//! The control API: HTTP/1.1 with JSON over a Unix socket.
//!
//! | module | what it does |
//! |---|---|
//! | [`client`] | what `tern info`, `pause`, `resume`, `shutdown` and `admin` are made of |
//! | `errors` | every error in JSON |
//! | [`migrations`] | what it takes and says about migrations |
//! | [`owners`] | SR-IOV owners, their members, administration commands |
//! | [`routes`] | the requests and their answers |
//! | [`server`] | a thread that serves them |
//! | [`snapshots`] | what it takes and says about snapshots |
//! | [`socket`] | the socket: one owner, readable by nobody else, gone at the end |
//! | `states` | every change of what the guest does, told to those who listen |
//!
//! The document of the API is `resources/openapi.json`; the server hands it out at `/openapi.json`.

pub mod client;
mod errors;
pub mod managers;
pub mod migrations;
pub mod owners;
pub mod routes;
pub mod server;
pub mod snapshots;
pub mod socket;
mod states;

use migration::live::Attempt;
use serde::{Deserialize, Serialize};

use crate::snapshot::report::Progress;
use crate::{machine, migrate};

/// The OpenAPI document.
pub const OPENAPI: &str = include_str!("../../../resources/openapi.json");

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Is complete and was not started yet.
    Created,
    /// Runs.
    Running,
    /// Is paused.
    Paused,
    /// Runs, for most of the time, while a snapshot is taken.
    Saving,
    /// Runs, for most of the time, while it is moved to another process.
    Migrating,
    /// Stands still: it was given to another process, and whether it runs there is not known.
    InDoubt,
    /// Arrives from another process.
    Receiving,
    /// Has ended; the process is about to exit.
    Ended,
}

impl From<machine::State> for State {
    fn from(state: machine::State) -> Self {
        match state {
            machine::State::Created => Self::Created,
            machine::State::Running => Self::Running,
            machine::State::Paused => Self::Paused,
            machine::State::Saving => Self::Saving,
            machine::State::Migrating => Self::Migrating,
            machine::State::InDoubt => Self::InDoubt,
            machine::State::Receiving => Self::Receiving,
            machine::State::Ended => Self::Ended,
        }
    }
}

/// Answer to `GET /api/v1/info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Version of tern.
    pub version: String,
    /// Process id of the monitor.
    pub pid: u32,
    /// What the guest does.
    pub state: State,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Bytes of guest memory.
    pub memory: u64,
    /// Path of the kernel.
    pub kernel: String,
    /// Kernel command line.
    pub cmdline: String,
    /// Virtio devices that are neither SR-IOV owners nor management devices, nor belong to these.
    pub devices: Vec<Device>,
    /// SR-IOV owners with their members.
    pub owners: Vec<owners::Owner>,
    /// Management devices with their managed devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub managers: Vec<managers::Manager>,
    /// How far the snapshot is that is being taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// How the migration stands that is under way, or in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<migrate::monitor::Status>,
}

/// A virtio device of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name in messages.
    pub name: String,
    /// Its place on the PCI bus, as in `00:01.0`.
    pub place: String,
    /// Number of virtqueues.
    pub queues: u16,
    /// A driver uses it.
    pub live: bool,
    /// Why it is stopped; empty while it runs.
    pub stopped_by: Vec<String>,
    /// What its driver can stop it with, as options write it.
    pub doors: Vec<String>,
    /// Its driver may choose packed rings.
    pub packed: bool,
    /// It did.
    #[serde(default)]
    pub uses_packed: bool,
}

/// Answer to the requests that change what the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// What the guest does now.
    pub state: State,
}

/// Body of `PUT /api/v1/shutdown`; may be left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shutdown {
    /// Milliseconds after which a guest that still runs is ended; 0 ends it at once. Without it, a guest that ignores
    /// its power button goes on running.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub force_after_ms: Option<u64>,
}

/// Answer to a request that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Why.
    pub error: String,
    /// How far a migration came that was begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<Box<Attempt>>,
}

impl Failure {
    /// Of something else than a migration.
    pub fn new(error: impl ToString) -> Self {
        Self {
            error: error.to_string(),
            attempt: None,
        }
    }
}

/// What `GET /api/v1/events` tells in events of type `progress`, as in [`Info`]: whenever it has changed, and empty when
/// it is over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderWay {
    /// How far the snapshot is that is being taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
    /// How the migration stands that is under way, or in doubt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<migrate::monitor::Status>,
}

/// What `GET /api/v1/events` tells in events of type `state`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What the guest does now.
    pub state: State,
    /// How it ended, if it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<String>,
    /// The exit status of the process, if the guest has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_status: Option<u8>,
}

#[cfg(test)]
mod tests;
