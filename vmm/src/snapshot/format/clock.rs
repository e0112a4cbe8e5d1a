//! The guest's clock.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::Invalid;
use super::hex::Hex;
use super::version::Version;
use crate::kvm::state::ClockState;

/// The most nanoseconds of a clock: 292 years.
const MOST: u64 = i64::MAX as u64;

/// KVM's clock, which all vCPUs share, at the moment for which their time stamp counters are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Clock {
    /// Version of this section.
    pub version: Version<1>,
    /// Guest time in nanoseconds, of which zero is about the guest's start.
    pub guest_ns: Hex<u64>,
    /// The host's time of day at that moment, in nanoseconds since 1970.
    pub realtime_ns: Hex<u64>,
}

impl Clock {
    /// The JSON of a clock in `state`.
    pub fn of(state: &ClockState) -> Self {
        Self {
            version: Version::default(),
            guest_ns: Hex(state.clock),
            realtime_ns: Hex(state.realtime),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// Times that no clock shows.
    pub fn plain(&self) -> Result<ClockState, Invalid> {
        for (name, time) in [
            ("guest_ns", self.guest_ns),
            ("realtime_ns", self.realtime_ns),
        ] {
            if time.0 > MOST {
                let reason = format!("{time} is more than {MOST:#x}, which is 292 years");
                return Err(Invalid::at(name, reason));
            }
        }
        Ok(ClockState {
            clock: self.guest_ns.0,
            realtime: self.realtime_ns.0,
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A state.
    pub fn sample() -> ClockState {
        ClockState {
            clock: 12_345_678_901,
            realtime: 1_795_000_000_000_000_000,
        }
    }

    #[test]
    fn a_clock_is_the_same_after_json() {
        let text = serde_json::to_string(&Clock::of(&sample())).unwrap();
        let read: Clock = serde_json::from_str(&text).unwrap();
        assert_eq!(read.plain(), Ok(sample()));
    }

    #[test]
    fn times_that_no_clock_shows_are_refused_by_name() {
        let mut clock = Clock::of(&sample());
        clock.realtime_ns = Hex(1 << 63);
        assert_eq!(
            clock.plain().unwrap_err().to_string(),
            "realtime_ns: 0x8000000000000000 is more than 0x7fffffffffffffff, which is 292 years"
        );
    }
}
