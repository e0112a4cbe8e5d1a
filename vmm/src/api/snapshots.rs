//! What the API answers about snapshots.

use serde::{Deserialize, Serialize};

use super::State;
use crate::snapshot::report::Report;

/// Answer to `PUT /api/v1/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotAnswer {
    /// What the guest does now.
    pub state: State,
    /// What was written.
    #[serde(flatten)]
    pub report: Report,
}
