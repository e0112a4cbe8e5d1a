//! What a migration came to.

use serde::{Deserialize, Serialize};

use crate::wire::message::Memory;

/// What a migration came to, as its source saw it. Times are in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Identifies the migration.
    pub session: String,
    /// How memory got there.
    pub how: Memory,
    /// From the first byte until the guest ran at the destination.
    pub total_us: u64,
    /// From the offer until the destination had built the machine.
    pub build_us: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Rounds of copying while the guest ran.
    pub rounds: Vec<Round>,
    /// How long nothing of the guest happened.
    pub pause_us: Pause,
    /// Bytes in the pages that were sent while it stood still.
    pub paused_bytes: u64,
}

/// One round of copying while the guest ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Round {
    /// Number, from 1 on.
    pub number: u32,
    /// Pages to look at.
    pub pages: u64,
    /// Pages that were sent.
    pub data: u64,
    /// Pages that were all zero.
    pub zero: u64,
    /// Time until all had arrived.
    pub time_us: u64,
    /// Pages that the guest wrote meanwhile.
    pub written: u64,
    /// How much the guest was slowed down, in percent.
    pub slow_down: u8,
    /// The pause if the guest had been stopped after it.
    pub predicted_us: u64,
}

/// Parts of a pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pause {
    /// All of it: from the request to stop until the destination said that the guest runs.
    pub total: u64,
    /// vCPUs left the guest and devices came to rest.
    pub stop: u64,
    /// The state of devices and vCPUs was read.
    pub state: u64,
    /// The last pages and the state were sent.
    pub send: u64,
    /// Checksums of all memory were sent, while the destination compared. Zero if that was not asked for.
    pub verify: u64,
    /// The destination restored and verified everything, as it says.
    pub restore: u64,
    /// The destination took locks and had the guest run, as it says.
    pub resume: u64,
}
