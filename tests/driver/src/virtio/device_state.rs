//! The device-state structure: stopping one virtqueue, and where it goes on.

use std::time::Duration;

use super::{Transport, TransportError, structure};
use crate::access::{Function, FunctionExt, Region, Register};

/// How long a queue may take to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// Registers of the structure.
pub mod state {
    use crate::access::Register;

    /// The queue the others are of.
    pub const QUEUE_SELECT: Register<u16> = Register::at(0);
    /// The available-ring entry a stopped queue goes on with.
    pub const LAST_AVAIL_IDX: Register<u16> = Register::at(2);
    /// 1 while the queue runs.
    pub const QUEUE_STATUS: Register<u8> = Register::at(4);
}

/// The device-state structure of a device that has one.
#[derive(Clone, Copy, Debug)]
pub struct DeviceState<'a, F> {
    function: &'a F,
    region: Region,
}

impl<F: Function> Transport<F> {
    /// The device-state structure, if there is one.
    pub fn device_state(&self) -> Option<DeviceState<'_, F>> {
        let mut all = self.structures().iter();
        let found = all.find(|s| s.kind == structure::DEVICE_STATE && s.region.bar < 6)?;
        Some(DeviceState {
            function: self.function(),
            region: found.region,
        })
    }
}

impl<F: Function> DeviceState<'_, F> {
    /// Where it is.
    pub fn region(&self) -> Region {
        self.region
    }

    /// Reads a register.
    pub fn get<T: crate::access::Word>(&self, register: Register<T>) -> T {
        self.function.get(self.region, register)
    }

    /// Writes a register.
    pub fn set<T: crate::access::Word>(&self, register: Register<T>, value: T) {
        self.function.set(self.region, register, value);
    }

    /// True while `queue` runs.
    pub fn runs(&self, queue: u16) -> bool {
        self.set(state::QUEUE_SELECT, queue);
        self.get(state::QUEUE_STATUS) == 1
    }

    /// The available-ring entry that `queue`, which is stopped, goes on with.
    pub fn index(&self, queue: u16) -> u16 {
        self.set(state::QUEUE_SELECT, queue);
        self.get(state::LAST_AVAIL_IDX)
    }

    /// Sets it.
    pub fn set_index(&self, queue: u16, index: u16) {
        self.set(state::QUEUE_SELECT, queue);
        self.set(state::LAST_AVAIL_IDX, index);
    }

    /// Asks `queue` to stop, or to go on, without waiting.
    pub fn run(&self, queue: u16, run: bool) {
        self.set(state::QUEUE_SELECT, queue);
        self.set(state::QUEUE_STATUS, run.into());
    }

    /// Stops `queue` and waits until it has.
    pub fn stop(&self, queue: u16) -> Result<(), TransportError> {
        self.run(queue, false);
        let done = self.function.wait_until(PATIENCE, || !self.runs(queue));
        done.then_some(())
            .ok_or(TransportError::Timeout("the stop of a queue"))
    }

    /// Lets `queue` go on.
    pub fn start(&self, queue: u16) {
        self.run(queue, true);
    }
}
