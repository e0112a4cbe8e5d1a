//! Stopping a device and letting it go on: SUSPEND in both its forms, and DEVICE_STOPPED.

use super::{Transport, TransportError, common, status};
use crate::access::{Function, FunctionExt};
use std::time::Duration;

/// How long a device may take to stop, or to go on.
const PATIENCE: Duration = Duration::from_secs(30);

/// One way for a driver to stop its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// SUSPEND, fifth version: DRIVER_OK stays, and clearing SUSPEND resumes.
    SuspendV5,
    /// SUSPEND of virtio 1.4: the device takes DRIVER_OK away, and setting it again resumes.
    Suspend,
    /// DEVICE_STOPPED.
    DeviceStop,
}

impl Door {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::SuspendV5, Self::Suspend, Self::DeviceStop];

    /// The number of its feature; of DEVICE_STOPPED the usual one.
    pub const fn feature(self) -> u8 {
        match self {
            Self::SuspendV5 => 42,
            Self::Suspend => 43,
            Self::DeviceStop => 44,
        }
    }

    /// Its bit of the device status.
    pub const fn bit(self) -> u8 {
        match self {
            Self::SuspendV5 | Self::Suspend => status::SUSPEND,
            Self::DeviceStop => status::DEVICE_STOPPED,
        }
    }

    /// What a driver writes to stop a device whose status is `running`.
    pub const fn stop(self, running: u8) -> u8 {
        running | self.bit()
    }

    /// The status that tells that a device, whose status was `running`, has stopped.
    pub const fn stopped(self, running: u8) -> u8 {
        match self {
            Self::SuspendV5 | Self::DeviceStop => running | self.bit(),
            Self::Suspend => (running | self.bit()) & !status::DRIVER_OK,
        }
    }

    /// What a driver writes to let a device go on whose status is `stopped`.
    pub const fn resume(self, stopped: u8) -> u8 {
        match self {
            Self::SuspendV5 | Self::DeviceStop => stopped & !self.bit(),
            // Bits cannot be cleared.
            Self::Suspend => stopped | status::DRIVER_OK,
        }
    }

    /// The status that tells that a device, whose status was `stopped`, goes on.
    pub const fn running(self, stopped: u8) -> u8 {
        match self {
            Self::SuspendV5 | Self::DeviceStop => stopped & !self.bit(),
            Self::Suspend => (stopped & !self.bit()) | status::DRIVER_OK,
        }
    }
}

impl<F: Function> Transport<F> {
    /// Stops the device by `door`, and waits until its whole status is the one that says so.
    pub fn stop(&self, door: Door) -> Result<(), TransportError> {
        let running = self.status();
        self.set(common::DEVICE_STATUS, door.stop(running));
        self.reaches(door.stopped(running), "the stop")
    }

    /// Lets the device go on by `door`, and waits until its whole status is the one that says so.
    pub fn resume(&self, door: Door) -> Result<(), TransportError> {
        let stopped = self.status();
        self.set(common::DEVICE_STATUS, door.resume(stopped));
        self.reaches(door.running(stopped), "the resume")
    }

    /// Waits for the status `wanted`; a device that asks for a reset will not get there.
    fn reaches(&self, wanted: u8, what: &'static str) -> Result<(), TransportError> {
        let mut shown = self.status();
        let given_up = |shown| shown & !wanted & status::NEEDS_RESET != 0;
        self.function().wait_until(PATIENCE, || {
            shown = self.status();
            shown == wanted || given_up(shown)
        });
        match shown {
            shown if shown == wanted => Ok(()),
            shown if given_up(shown) => Err(TransportError::NeedsReset),
            _ => Err(TransportError::Timeout(what)),
        }
    }
}
