//! What a migration came to.

use serde::{Deserialize, Serialize};

use super::source::Phase;
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

/// A pause and its parts, which add up to it.
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
    /// The rest: messages were on their way, or an end waited for the other.
    pub wait: u64,
}

/// One part of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its name, that of the member of [`Pause`].
    pub name: &'static str,
    /// What happened.
    pub what: &'static str,
    /// How long it took, in microseconds.
    pub us: u64,
    /// The same in tenths of a millisecond, rounded so that the parts add up to the rounded pause.
    pub tenths: u64,
}

impl Pause {
    /// It is over, or given up, after `total` microseconds. What the destination says of its own parts is believed as far as
    /// there was time for it.
    pub fn end(&mut self, total: u64) {
        let mut left = total;
        for part in [
            &mut self.stop,
            &mut self.state,
            &mut self.send,
            &mut self.verify,
            &mut self.restore,
            &mut self.resume,
        ] {
            *part = (*part).min(left);
            left -= *part;
        }
        self.total = total;
        self.wait = left;
    }

    /// Its parts, in their order.
    pub fn parts(&self) -> [Part; 7] {
        let mut sum = 0_u64;
        let tenths = |us: u64| us.saturating_add(50) / 100;
        [
            ("stop", "vCPUs and devices come to rest", self.stop),
            ("state", "state is read", self.state),
            ("send", "last pages and state are sent", self.send),
            ("verify", "all of memory is compared", self.verify),
            (
                "restore",
                "the destination restores and verifies",
                self.restore,
            ),
            ("resume", "the destination resumes", self.resume),
            ("wait", "messages, and waiting", self.wait),
        ]
        .map(|(name, what, us)| {
            let before = tenths(sum);
            sum = sum.saturating_add(us);
            Part {
                name,
                what,
                us,
                tenths: tenths(sum) - before,
            }
        })
    }
}

/// How far a migration came, also one that failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What was being done last.
    pub phase: Phase,
    /// What it came to until then. Of the pause, the parts that were over; the last one that was not is in `wait`.
    pub report: Report,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_pause_add_up_however_they_are_rounded() {
        for (total, restore) in [(60_049, 10_149), (11_234, 149), (300, 0), (0, 7)] {
            let mut pause = Pause {
                stop: 49,
                state: 149,
                send: 51,
                restore,
                resume: 49,
                ..Pause::default()
            };
            pause.end(total);
            let parts = pause.parts();
            assert_eq!(parts.iter().map(|part| part.us).sum::<u64>(), total);
            let tenths: u64 = parts.iter().map(|part| part.tenths).sum();
            assert_eq!(tenths, (total + 50) / 100);
        }
    }

    #[test]
    fn a_destination_cannot_have_taken_longer_than_there_was_time() {
        let mut pause = Pause {
            stop: 10,
            restore: u64::MAX,
            resume: u64::MAX,
            ..Pause::default()
        };
        pause.end(100);
        assert_eq!((pause.restore, pause.resume, pause.wait), (90, 0, 0));
        // One that came over the network in a report.
        let parts = Pause {
            stop: u64::MAX,
            wait: u64::MAX,
            ..pause
        }
        .parts();
        assert_eq!(parts[6].name, "wait");
    }
}
