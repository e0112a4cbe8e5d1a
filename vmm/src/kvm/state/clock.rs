//! Time: KVM's clock, which all vCPUs share, and their time stamp counters.
//!
//! A guest has both from the same source and compares them: Linux calls a counter unstable that is a fraction of a
//! millisecond off. So they are saved as they were at one moment, and set together, KVM's clock first, and the counters by as
//! much as that has advanced since. What happens in between, for as long as a busy host likes, is part of the sum.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::{VcpuFd, VmFd};

use super::vcpu::{TscReading, VcpuState, write_msr};
use super::{StateError, ioctl};
use crate::kvm::msrs;

/// What happens to a guest's clocks in a restore.
///
/// From the restore on they run, also while the machine is paused, as during any pause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockChoice {
    /// The time between snapshot and restore has passed for the guest: its time of day is right, and what it waited for
    /// that long is due.
    #[default]
    Host,
    /// No time has passed for the guest: its clocks go on where they stopped, and its time of day is behind.
    Saved,
}

/// KVM's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockState {
    /// Nanoseconds of guest time.
    pub clock: u64,
    /// The host's time of day at that moment, in nanoseconds since 1970.
    pub realtime: u64,
}

/// Something that changes as time goes by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample<T> {
    /// What it was.
    pub(super) value: T,
    /// When.
    pub(super) at: Instant,
}

impl<T> Sample<T> {
    /// How often something is read at most to find out when.
    const TRIES: u32 = 16;
    /// So long may a read take that tells when well enough.
    const GOOD: Duration = Duration::from_micros(10);

    /// Reads until it is known well when that was: of all tries the quickest.
    pub(super) fn take<E>(mut read: impl FnMut() -> Result<T, E>) -> Result<Self, E> {
        let mut once = || {
            let before = Instant::now();
            let value = read()?;
            let took = before.elapsed();
            let at = before + took / 2;
            Ok((took, Self { value, at }))
        };
        let (mut best, mut sample) = once()?;
        for _ in 1..Self::TRIES {
            if best <= Self::GOOD {
                break;
            }
            let (took, again) = once()?;
            if took < best {
                (best, sample) = (took, again);
            }
        }
        Ok(sample)
    }
}

impl ClockState {
    /// Reads the clock.
    pub(super) fn save(vm: &VmFd) -> Result<Sample<Self>, StateError> {
        Sample::take(|| {
            let data = get(vm)?;
            let told = data.flags & KVM_CLOCK_REALTIME != 0;
            Ok(Self {
                clock: data.clock,
                realtime: if told { data.realtime } else { now() },
            })
        })
    }

    /// Sets the clock, and returns by how many nanoseconds the guest's time has advanced since it was saved.
    pub(super) fn restore(
        &self,
        vm: &VmFd,
        choice: ClockChoice,
    ) -> Result<Sample<u64>, StateError> {
        let passed = match choice {
            ClockChoice::Saved => 0,
            // A host whose time of day is behind sets nobody back.
            ClockChoice::Host => now().saturating_sub(self.realtime),
        };
        let data = kvm_clock_data {
            clock: self.clock.saturating_add(passed),
            ..Default::default()
        };
        vm.set_clock(&data).map_err(|error| StateError::Refused {
            path: "clock".to_owned(),
            source: error.into(),
        })?;
        Sample::take(|| Ok(get(vm)?.clock.saturating_sub(self.clock)))
    }
}

fn get(vm: &VmFd) -> Result<kvm_clock_data, StateError> {
    vm.get_clock().map_err(|error| StateError::ReadVm {
        what: "the clock",
        source: error.into(),
    })
}

/// The host's time of day, in nanoseconds since 1970.
fn now() -> u64 {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed();
    since.map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// Gives each state the counter its vCPU had at one and the same `moment`.
///
/// Counters differ by their offsets alone. Where KVM does not tell those, a difference is only how much later one was
/// read, and all are taken to be equal, as they are unless the guest itself set them apart.
pub(super) fn align(states: &mut [VcpuState], readings: &[TscReading], moment: Instant, khz: u32) {
    let Some(first) = readings.first() else {
        return;
    };
    let counter = shifted(first.counter, moment, khz);
    for (state, reading) in states.iter_mut().zip(readings) {
        let apart = match (reading.offset, first.offset) {
            (Some(own), Some(first)) => own.wrapping_sub(first),
            _ => 0,
        };
        state.tsc = counter.wrapping_add(apart);
    }
}

/// Sets the time stamp counters to what they were, advanced by what has `elapsed`, in nanoseconds, and goes on to.
pub(super) fn restore_tsc(
    vcpus: &[VcpuFd],
    states: &[VcpuState],
    elapsed: Sample<u64>,
    khz: u32,
) -> Result<(), StateError> {
    let Some(first) = vcpus.first() else {
        return Ok(());
    };
    // One reading for all: equal counters get equal offsets, to the bit.
    let here = TscReading::take(first, 0)?;
    for (id, (vcpu, state)) in vcpus.iter().zip(states).enumerate() {
        let then = Sample {
            value: state.tsc.wrapping_add(ticks(elapsed.value, khz)),
            at: elapsed.at,
        };
        match here.offset {
            Some(offset) => {
                let host = here.counter.value.wrapping_sub(offset);
                let wanted = shifted(then, here.counter.at, khz);
                ioctl::set_tsc_offset(vcpu, wanted.wrapping_sub(host))
                    .map_err(|error| StateError::refused(id, "tsc", error))?;
            }
            // KVM makes counters equal that are written within a second.
            None => {
                let wanted = shifted(then, Instant::now(), khz);
                write_msr(vcpu, id, msrs::IA32_TSC, wanted)?;
            }
        }
    }
    Ok(())
}

/// What a counter that was read once is at another moment.
fn shifted(counter: Sample<u64>, at: Instant, khz: u32) -> u64 {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    let later = ticks(nanoseconds(at.saturating_duration_since(counter.at)), khz);
    let earlier = ticks(nanoseconds(counter.at.saturating_duration_since(at)), khz);
    counter.value.wrapping_add(later).wrapping_sub(earlier)
}

/// Ticks of a counter of this frequency in so many nanoseconds.
fn ticks(nanoseconds: u64, khz: u32) -> u64 {
    (u128::from(nanoseconds) * u128::from(khz) / 1_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_advances_by_its_frequency() {
        assert_eq!(ticks(1_000_000_000, 2_596_142), 2_596_142_000);
        assert_eq!(ticks(1, 2_000_000), 2);
        assert_eq!(ticks(u64::MAX, 1_000_000), u64::MAX);
    }

    #[test]
    fn a_counter_is_known_before_and_after_it_was_read() {
        let at = Instant::now() + Duration::from_secs(1);
        let counter = Sample { value: 5_000, at };
        for (moment, expected) in [
            (at, 5_000),
            (at + Duration::from_micros(3), 11_000),
            (at - Duration::from_micros(2), 1_000),
        ] {
            assert_eq!(shifted(counter, moment, 2_000_000), expected);
        }
    }

    #[test]
    fn of_several_reads_the_quickest_counts() {
        let mut naps = [3, 2, 0, 5]
            .map(|ms| Duration::from_millis(10 * ms))
            .into_iter();
        let mut count = 0;
        let sample = Sample::take(|| {
            std::thread::sleep(naps.next().unwrap_or(Duration::from_millis(30)));
            count += 1;
            Ok::<_, ()>(count)
        });
        assert_eq!(sample.unwrap().value, 3);
    }
}
