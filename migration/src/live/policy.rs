//! When to stop the guest.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a migration may cost the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest pause that is planned for. Less than a few tens of milliseconds count as these.
    pub downtime: Duration,
    /// How long memory is copied at most while the guest runs.
    pub timeout: Duration,
    /// What to do then.
    pub on_timeout: OnTimeout,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(100),
            timeout: Duration::from_secs(300),
            on_timeout: OnTimeout::Cancel,
        }
    }
}

/// What to do with a guest that writes faster than its memory can be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTimeout {
    /// It stays.
    #[default]
    Cancel,
    /// It is moved with a longer pause.
    Switch,
}

/// What one round of copying did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Pages it was asked to copy.
    pub pages: u64,
    /// Bytes it sent.
    pub bytes: u64,
    /// How long it took until all of them had arrived.
    pub time: Duration,
    /// Bytes in pages that were written meanwhile.
    pub written: u64,
    /// How long memory has been copied in all.
    pub elapsed: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Stop the guest: the rest takes no longer than it may.
    Stop,
    /// Copy what was written, with the guest slowed down by so many percent.
    Again {
        /// 0 to 99.
        slow_down: u8,
    },
    /// It does not converge and time is up.
    GiveUp,
}

/// Time that a pause takes beside copying, in a guess: devices, vCPUs, both ways of the connection.
const FIXED: Duration = Duration::from_millis(20);
/// The shortest pause there is any sense in waiting for: a guest that wrote next to nothing has no shorter one.
const SHORTEST: Duration = Duration::from_millis(25);
/// How much the guest is slowed down, one step after the other, in percent.
const STEPS: [u8; 7] = [20, 40, 60, 80, 90, 95, 99];
/// A round converges if less than this many percent of what it copied was written meanwhile.
const CONVERGES: u64 = 60;

/// Decides after each round. See [`Limits`].
#[derive(Clone, Debug)]
pub struct Policy {
    limits: Limits,
    /// How many of [`STEPS`] were taken.
    steps: usize,
    /// Bytes a second that arrived in the last round of some size, or in a smaller one that was faster.
    rate: f64,
}

impl Policy {
    /// With these limits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            steps: 0,
            rate: 0.0,
        }
    }

    /// How much the guest is slowed down now, in percent.
    pub fn slow_down(&self) -> u8 {
        let last = self.steps.checked_sub(1).and_then(|step| STEPS.get(step));
        last.copied().unwrap_or_default()
    }

    /// How long the guest would stand still if it was stopped now, with `written` bytes to copy.
    pub fn predicted(&self, written: u64) -> Duration {
        if written == 0 {
            return FIXED;
        }
        let seconds = written as f64 / self.rate.max(1.0);
        FIXED + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX / 2)
    }

    /// What to do after `round`.
    pub fn after(&mut self, round: &Round) -> Decision {
        let seconds = round.time.as_secs_f64().max(1e-6);
        let rate = round.bytes as f64 / seconds;
        // Small rounds say more about latency than about the rate, unless there was nothing better: a first round may have
        // looked at much and sent little.
        if round.bytes >= 1 << 20 || rate > self.rate {
            self.rate = rate;
        }
        if self.predicted(round.written) <= self.limits.downtime.max(SHORTEST) {
            return Decision::Stop;
        }
        if round.elapsed >= self.limits.timeout {
            return match self.limits.on_timeout {
                OnTimeout::Cancel => Decision::GiveUp,
                OnTimeout::Switch => Decision::Stop,
            };
        }
        let copied = round.pages.saturating_mul(crate::layout::PAGE_SIZE);
        if round.written > copied / 100 * CONVERGES {
            self.steps = STEPS.len().min(self.steps + 1);
        }
        Decision::Again {
            slow_down: self.slow_down(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn round(copied: u64, seconds: f64, written: u64, elapsed: u64) -> Round {
        Round {
            pages: copied / 4096,
            bytes: copied,
            time: Duration::from_secs_f64(seconds),
            written,
            elapsed: Duration::from_secs(elapsed),
        }
    }

    #[test]
    fn a_guest_is_stopped_when_the_rest_fits_the_pause() {
        let mut policy = Policy::new(Limits::default());
        // 100 MiB a second: 8 MiB take 80 ms, and what comes on top.
        let again = Decision::Again { slow_down: 0 };
        assert_eq!(policy.after(&round(100 * MIB, 1.0, 9 * MIB, 1)), again);
        assert_eq!(
            policy.after(&round(9 * MIB, 0.09, 7 * MIB, 1)),
            Decision::Stop
        );
        let mut idle = Policy::new(Limits::default());
        assert_eq!(idle.after(&round(MIB, 1.0, 0, 1)), Decision::Stop);
    }

    #[test]
    fn a_guest_that_writes_too_fast_is_slowed_down_in_bounded_steps() {
        let mut policy = Policy::new(Limits::default());
        let mut seen = Vec::new();
        for _ in 0..9 {
            match policy.after(&round(100 * MIB, 1.0, 100 * MIB, 9)) {
                Decision::Again { slow_down } => seen.push(slow_down),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen, [20, 40, 60, 80, 90, 95, 99, 99, 99]);
    }

    #[test]
    fn a_pause_shorter_than_any_there_can_be_is_not_waited_for() {
        for (downtime, written, decision) in [
            (0, 0, Decision::Stop),
            (0, 4096, Decision::Stop),
            (0, 8 * MIB, Decision::Again { slow_down: 0 }),
            (19, 0, Decision::Stop),
        ] {
            let mut policy = Policy::new(Limits {
                downtime: Duration::from_millis(downtime),
                ..Limits::default()
            });
            let round = round(100 * MIB, 1.0, written, 1);
            assert_eq!(policy.after(&round), decision, "{downtime} ms, {written}");
        }
    }

    #[test]
    fn a_small_round_that_was_faster_is_believed() {
        // Most of a first round went into looking at empty memory.
        let mut policy = Policy::new(Limits::default());
        let first = policy.after(&round(MIB / 2, 10.0, MIB / 2, 10));
        assert!(matches!(first, Decision::Again { .. }));
        let second = policy.after(&round(MIB / 2, 0.005, MIB / 2, 10));
        assert_eq!(second, Decision::Stop);
    }

    #[test]
    fn patience_ends_as_was_asked_for() {
        let fast = round(100 * MIB, 1.0, 100 * MIB, 300);
        let mut cancel = Policy::new(Limits::default());
        assert_eq!(cancel.after(&fast), Decision::GiveUp);
        let mut switch = Policy::new(Limits {
            on_timeout: OnTimeout::Switch,
            ..Limits::default()
        });
        assert_eq!(switch.after(&fast), Decision::Stop);
    }

    #[test]
    fn a_tiny_round_does_not_spoil_the_rate() {
        let mut policy = Policy::new(Limits::default());
        policy.after(&round(100 * MIB, 1.0, 20 * MIB, 1));
        policy.after(&round(4096, 1.0, 20 * MIB, 1));
        assert!(policy.predicted(10 * MIB) < Duration::from_millis(200));
    }
}
