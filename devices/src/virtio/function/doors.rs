//! The doors of a driver to the gate of its function: SUSPEND, DEVICE_STOPPED, and the stop of one virtqueue.
//!
//! None of them has a flag of its own. SUSPEND and DEVICE_STOPPED read 1 while their reason keeps the gate closed and
//! nothing is in flight; so a driver that polls sees the stop when it is complete, and one that changes its mind before
//! that takes the reason away again.

use super::{Core, VirtioFunction};
use crate::gate::Reasons;
use crate::virtio::Status;

/// Which SUSPEND a device offers. Both use the same bit of the device status, as different state machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suspend {
    /// VIRTIO_F_SUSPEND as feature 42, of the fifth version of the proposal: DRIVER_OK stays set, and the driver resumes
    /// by clearing SUSPEND (S1).
    V5,
    /// VIRTIO_F_SUSPEND as feature 43, of virtio 1.4: the device clears DRIVER_OK, and the driver resumes by setting it
    /// (B-41 to B-49).
    V1_4,
}

impl Suspend {
    /// The number of its feature bit.
    pub const fn feature(self) -> u8 {
        match self {
            Self::V5 => 42,
            Self::V1_4 => 43,
        }
    }

    /// Its name in declarations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V5 => "v5",
            Self::V1_4 => "v1.4",
        }
    }

    /// The one that is called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::V5, Self::V1_4]
            .into_iter()
            .find(|suspend| suspend.name() == name)
    }
}

/// The doors a function offers its driver. None of them by default: virtio 1.4 knows only one of them, and reserves the
/// feature bits of the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Doors {
    /// SUSPEND.
    pub suspend: Option<Suspend>,
    /// DEVICE_STOPPED, with the number of its feature bit (S2, G2-a).
    pub device_stop: Option<u8>,
    /// The device-state capability: `queue_status` and `last_avail_idx` (S0).
    pub queue_status: bool,
}

impl Doors {
    /// The feature number of DEVICE_STOPPED unless another is chosen: the first that virtio 1.4 leaves free.
    pub const DEVICE_STOP: u8 = 44;
    /// The feature numbers that DEVICE_STOPPED can have: those that virtio 1.4 reserves.
    pub const DEVICE_STOP_RANGE: std::ops::RangeInclusive<u8> = 44..=49;

    /// The feature bits that are offered for them.
    pub(super) fn features(self) -> u64 {
        let suspend = self.suspend.map(Suspend::feature);
        let bits = [suspend, self.device_stop];
        bits.into_iter().flatten().fold(0, |set, n| set | bit(n))
    }
}

/// The register of feature number `n`; none for one that cannot be.
const fn bit(n: u8) -> u64 {
    if n < 64 { 1 << n } else { 0 }
}

impl Core {
    /// The SUSPEND that the driver accepted.
    pub(super) fn suspend(&self) -> Option<Suspend> {
        let accepted = |suspend: &Suspend| self.driver_features & bit(suspend.feature()) != 0;
        self.doors.suspend.filter(accepted)
    }

    /// True if the driver accepted DEVICE_STOPPED.
    pub(super) fn can_stop(&self) -> bool {
        let accepted = |n| self.driver_features & bit(n) != 0;
        self.doors.device_stop.is_some_and(accepted)
    }

    /// True if `reason` is in force and nothing is in flight: the stop is acknowledged.
    pub(super) fn is_acknowledged(&self, reason: Reasons) -> bool {
        self.gate.reasons().intersects(reason) && self.drained()
    }

    /// The device status as the driver reads it.
    pub(super) fn shown_status(&self) -> Status {
        let mut status = self.status;
        if self.is_acknowledged(Reasons::SUSPENDED) {
            status |= Status::SUSPEND;
            if self.doors.suspend == Some(Suspend::V1_4) {
                status -= Status::DRIVER_OK;
            }
        }
        if self.is_acknowledged(Reasons::DEVICE_STOPPED) {
            status |= Status::DEVICE_STOPPED;
        }
        status
    }

    /// True while writes to registers other than the device status change nothing: in mode Freeze (S3-17), and while
    /// suspended (S1-13, B-44).
    pub(super) fn ignores_writes(&self) -> bool {
        self.gate.reasons().intersects(Reasons::FREEZE) || self.is_acknowledged(Reasons::SUSPENDED)
    }

    /// True while writes to the device configuration change nothing: also while DEVICE_STOPPED (S2-10).
    pub(super) fn ignores_config_writes(&self) -> bool {
        self.ignores_writes() || self.is_acknowledged(Reasons::DEVICE_STOPPED)
    }
}

impl VirtioFunction {
    /// What a write of `value` to the status of a live device does to the doors.
    pub(super) fn turn_doors(&self, core: &mut Core, value: Status) {
        match core.suspend() {
            // With FAILED, the driver gives up: there is nothing to suspend (G1-g).
            Some(_) if value.contains(Status::SUSPEND | Status::FAILED) => {}
            Some(Suspend::V5) => {
                self.turn(core, Reasons::SUSPENDED, value.contains(Status::SUSPEND));
            }
            // The driver cannot clear bits. While suspended, DRIVER_OK means go on, whatever SUSPEND says; otherwise
            // SUSPEND means stop (B-49).
            Some(Suspend::V1_4) => {
                if core.is_acknowledged(Reasons::SUSPENDED) {
                    if value.contains(Status::DRIVER_OK) {
                        self.turn(core, Reasons::SUSPENDED, false);
                    }
                } else if value.contains(Status::SUSPEND) {
                    self.turn(core, Reasons::SUSPENDED, true);
                }
            }
            None => {}
        }
        // Also while suspended as virtio 1.4 has it: the device is live behind its status, and stops are lifted in any order.
        if core.can_stop() {
            let stop = value.contains(Status::DEVICE_STOPPED);
            self.turn(core, Reasons::DEVICE_STOPPED, stop);
        }
    }

    fn turn(&self, core: &mut Core, reason: Reasons, stop: bool) {
        if stop {
            core.gate.close(reason);
        } else {
            self.open(core, reason);
        }
    }

    /// `queue_status` of queue `index`: true while it runs (S0-3 to S0-5). A queue that does not exist does not run.
    pub fn queue_runs(&self, index: u16) -> bool {
        let core = self.lock();
        core.visible(index).is_some_and(|queue| queue.is_running())
    }

    /// The driver writes `queue_status` of queue `index`. While it waits for a stop it can still change its mind (G0-e).
    pub fn run_queue(&self, index: u16, run: bool) {
        let mut core = self.lock();
        let core = &mut *core;
        if core.ignores_writes() || core.hides(index) {
            return;
        }
        let Some(queue) = core.queues.get_mut(usize::from(index)) else {
            return;
        };
        if !run {
            queue.stop();
        } else if queue.resume() {
            self.kick(index);
        }
    }

    /// `last_avail_idx` of queue `index`: where it goes on; 0 while it runs (S0-9, G0-f).
    pub fn next_available(&self, index: u16) -> u16 {
        let core = self.lock();
        let rests = core.visible(index).filter(|queue| !queue.is_running());
        rests.map_or(0, |queue| queue.next_available())
    }

    /// The driver writes `last_avail_idx` of queue `index`. Ignored while the queue runs (S0-8, S0-10, G0-f).
    pub fn set_next_available(&self, index: u16, next: u16) {
        let mut core = self.lock();
        if core.ignores_writes() || core.hides(index) {
            return;
        }
        if let Some(queue) = core.queues.get_mut(usize::from(index)) {
            queue.set_next_available(next);
        }
    }

    /// `last_used_off_wrap` of queue `index`: where a packed one is used next; 0 while it runs (G0-i).
    pub fn next_used(&self, index: u16) -> u16 {
        let core = self.lock();
        let rests = core.visible(index).filter(|queue| !queue.is_running());
        rests.map_or(0, |queue| queue.next_used())
    }

    /// The driver writes `last_used_off_wrap` of queue `index`. Ignored while the queue runs, and if it is not packed (G0-i).
    pub fn set_next_used(&self, index: u16, next: u16) {
        let mut core = self.lock();
        if core.ignores_writes() || core.hides(index) {
            return;
        }
        if let Some(queue) = core.queues.get_mut(usize::from(index)) {
            queue.set_next_used(next);
        }
    }
}
