//! Time: KVM's clock, which all vCPUs share, and their time stamp counters.
//!
//! A guest has both from the same source and compares them, so they are set together: KVM's clock first, and the counters
//! by as much as that has advanced since the snapshot.

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

impl ClockState {
    /// Reads the clock.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let data = get(vm)?;
        let told = data.flags & KVM_CLOCK_REALTIME != 0;
        Ok(Self {
            clock: data.clock,
            realtime: if told { data.realtime } else { now() },
        })
    }

    /// Sets the clock, and returns by how many nanoseconds the guest's time has advanced since it was saved.
    pub(super) fn restore(&self, vm: &VmFd, choice: ClockChoice) -> Result<u64, StateError> {
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
        Ok(get(vm)?.clock.saturating_sub(self.clock))
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

/// Gives each state the counter its vCPU had at one and the same moment: that of the first one's reading.
///
/// Counters differ by their offsets alone. Where KVM does not tell those, a difference is only how much later one was
/// read, and all are taken to be equal, as they are unless the guest itself set them apart.
pub(super) fn align(states: &mut [VcpuState], readings: &[TscReading]) {
    let Some(first) = readings.first() else {
        return;
    };
    for (state, reading) in states.iter_mut().zip(readings) {
        let apart = match (reading.offset, first.offset) {
            (Some(own), Some(first)) => own.wrapping_sub(first),
            _ => 0,
        };
        state.tsc = first.value.wrapping_add(apart);
    }
}

/// Sets the time stamp counters to what they were, advanced by `elapsed` nanoseconds.
pub(super) fn restore_tsc(
    vcpus: &[VcpuFd],
    states: &[VcpuState],
    elapsed: u64,
    khz: u32,
) -> Result<(), StateError> {
    let Some(first) = vcpus.first() else {
        return Ok(());
    };
    let advance = ticks(elapsed, khz);
    // One reading for all: equal counters get equal offsets, to the bit.
    let here = TscReading::take(first, 0)?;
    for (id, (vcpu, state)) in vcpus.iter().zip(states).enumerate() {
        let wanted = state.tsc.wrapping_add(advance);
        match here.offset {
            Some(offset) => {
                let host = here.value.wrapping_sub(offset);
                ioctl::set_tsc_offset(vcpu, wanted.wrapping_sub(host))
                    .map_err(|error| StateError::refused(id, "tsc", error))?;
            }
            // KVM makes counters equal that are written within a second.
            None => write_msr(vcpu, id, msrs::IA32_TSC, wanted)?,
        }
    }
    Ok(())
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
}
