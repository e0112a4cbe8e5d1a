//! The contract between the virtio core and a device.

use std::os::fd::RawFd;

use super::DeviceType;
use super::chain::{Chain, Ticket};
use super::queue::{RingError, Virtqueue};
use crate::gate::{Gate, Reasons};
use crate::memory::View;
use crate::state::{DeviceState, Unsavable};

/// Where a device stands with a queue after it worked on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The ring is empty: the device wants a kick when the driver adds to it.
    Exhausted,
    /// Chains were left on the ring until the backend has something (a frame, a key): a kick is of no use.
    Waiting,
}

/// A descriptor of a backend that the I/O thread watches for input.
///
/// Watched edge-triggered: a device that is called for it reads until the descriptor has no more, or until the ring
/// has no room, in which case the next kick of that queue carries on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The descriptor; open for as long as the device lives.
    pub fd: RawFd,
    /// Handed back to [`VirtioDevice::on_event`].
    pub token: u16,
}

/// A virtio device: what is particular to its type.
///
/// The core calls every method with the function's lock held, from a vCPU thread (configuration, activation, reset)
/// or from the I/O thread (queues, events). None may block: work that takes time goes to a thread of the device's
/// own, which announces its result through a [`Source`].
///
/// Order: any number of configuration accesses; `activate` at DRIVER_OK; then `process` and `on_event` in any order;
/// `call_off` when a reset was asked for and `reset` once nothing is in flight; and so on from the start. A saved state
/// is `reset`, `restore_config`, `activate` if its driver was ready, and `restore_state`.
pub trait VirtioDevice: Send {
    /// The device type.
    fn device_type(&self) -> DeviceType;

    /// The feature bits of this device type that it offers (bits 0 to 23 and 50 to 63).
    fn features(&self) -> u64;

    /// The largest size of each virtqueue; its length is the number of queues. Each a power of two up to 32768.
    fn queue_sizes(&self) -> Vec<u16>;

    /// The device configuration as the driver reads it. Its length never changes.
    fn config(&self) -> &[u8];

    /// Takes a write of the driver within the device configuration. Read-only fields ignore it.
    fn write_config(&mut self, offset: usize, data: &[u8]);

    /// The driver is ready and accepted `features`.
    fn activate(&mut self, features: u64);

    /// Back to the state after construction. Nothing is in flight.
    fn reset(&mut self);

    /// The driver asked for a reset: requests that can still be called off are, and their chains go back through `io`.
    /// What has to run to its end comes back later, and the reset waits for it.
    fn call_off(&mut self, _io: &mut Io<'_>) {}

    /// The function is to stop, for whatever reason but a reset, and waited long enough for what is in flight: requests
    /// whose execution has not begun are given up through [`Io::recall`], and will be fetched once more. What has begun
    /// has to end.
    fn recall(&mut self, _io: &mut Io<'_>) {}

    /// True if the device can have `config`, which is of the length of its own, as its configuration, with a driver that
    /// accepted `features`.
    fn accepts_config(&self, config: &[u8], _features: u64) -> bool {
        config == self.config()
    }

    /// Takes a configuration that it accepts. Called after `reset`.
    fn restore_config(&mut self, _config: &[u8]) {}

    /// State of its own, apart from its queues and its configuration. Nothing is in flight.
    ///
    /// # Errors
    ///
    /// Why there is state that it cannot give away.
    fn save_state(&self) -> Result<DeviceState, Unsavable>;

    /// Whether it can have `state`, which comes from outside.
    ///
    /// # Errors
    ///
    /// What is wrong with it: another type, or a size out of bounds.
    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str>;

    /// Takes a state that it accepts.
    fn restore_state(&mut self, state: &DeviceState);

    /// Works on `queue`, because of a kick or because the gate opened.
    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError>;

    /// The machine is at another place of its networks: a driver that can announce itself there is asked to. Nothing for a
    /// device that is in no network. Never called while the device is to be still.
    fn request_announcement(&mut self, _io: &mut Io<'_>) {}

    /// Descriptors the I/O thread watches for this device.
    fn sources(&self) -> Vec<Source>;

    /// The source with this token became readable. Called also while the gate is closed, so that results of
    /// requests in flight get back to the driver.
    fn on_event(&mut self, token: u16, io: &mut Io<'_>) -> Result<(), RingError>;
}

/// A device's way to its rings and to guest memory, for the length of one call.
///
/// Fetching is only possible while the gate is open; returning what was fetched is always possible.
pub struct Io<'a> {
    pub(super) view: &'a View,
    pub(super) queues: &'a mut [Virtqueue],
    pub(super) gate: &'a Gate,
    /// Chains that may still be fetched in this call, so that one busy queue cannot starve the others.
    pub(super) budget: u32,
    /// Set when the budget ran out with chains left.
    pub(super) more: bool,
    pub(super) config: ConfigChange,
}

/// What happened to the device configuration in one call. The later of two includes the earlier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum ConfigChange {
    /// Nothing.
    #[default]
    None,
    /// The driver changed it with a request, whose completion tells it so.
    Requested,
    /// It changed, and the driver does not know.
    Unexpected,
}

impl<'a> Io<'a> {
    /// The function's view of guest memory.
    pub fn memory(&self) -> &'a View {
        self.view
    }

    /// The size the driver chose for `queue`: the most chains it can have made available at once.
    pub fn queue_size(&self, queue: u16) -> u16 {
        self.queues
            .get(usize::from(queue))
            .map_or(0, |ring| ring.registers().size)
    }

    /// Fetches the next chain of `queue`. `None` if there is none or the gate is closed.
    ///
    /// The chain must be returned with [`Self::push`], now or later, or put back at once with [`Self::unpop`].
    pub fn pop(&mut self, queue: u16) -> Result<Option<Chain>, RingError> {
        if !self.gate.is_open() {
            return Ok(None);
        }
        if self.budget == 0 {
            self.more = true;
            return Ok(None);
        }
        let Some(ring) = self.queues.get_mut(usize::from(queue)) else {
            return Ok(None);
        };
        let chain = ring.pop(self.view)?;
        if chain.is_some() {
            self.budget -= 1;
        }
        Ok(chain)
    }

    /// Puts back the chain that was fetched last from `queue`. Several are put back in the reverse order.
    pub fn unpop(&mut self, queue: u16, chain: Chain) {
        if let Some(ring) = self.queues.get_mut(usize::from(queue)) {
            ring.unpop(&chain);
        }
    }

    /// Gives up a chain of `queue` whose execution has not begun. It stays the function's, and is fetched once more when
    /// that may run again. Several are given up in the reverse order of their fetching.
    pub fn recall(&mut self, queue: u16, chain: Chain) {
        if let Some(ring) = self.queues.get_mut(usize::from(queue)) {
            ring.recall(&chain);
        }
    }

    /// True while a reset waits for what is in flight. Chains go back unseen, and nothing may be written to them: the
    /// driver may have given their memory to someone else.
    pub fn is_resetting(&self) -> bool {
        self.gate.reasons().contains(Reasons::RESET)
    }

    /// Returns a chain of `queue` to the driver, with `len` bytes written to it. While [`Self::is_resetting`] it only
    /// ceases to be in flight.
    pub fn push(&mut self, queue: u16, ticket: Ticket, len: u32) -> Result<(), RingError> {
        self.push_all(queue, std::iter::once((ticket, len)))
    }

    /// Returns several at once: the driver sees all of them or none.
    pub fn push_all(
        &mut self,
        queue: u16,
        used: impl Iterator<Item = (Ticket, u32)>,
    ) -> Result<(), RingError> {
        let resetting = self.is_resetting();
        let Some(ring) = self.queues.get_mut(usize::from(queue)) else {
            return Ok(());
        };
        if resetting {
            used.for_each(|(ticket, _)| ring.forget(ticket));
            return Ok(());
        }
        ring.push(self.view, used)
    }

    /// A chain of `queue` ceases to be in flight, because its queue or the device is being reset. The driver hears nothing of
    /// it: in the used ring it would look like an answer.
    pub(crate) fn forget(&mut self, queue: u16, ticket: Ticket) {
        if let Some(ring) = self.queues.get_mut(usize::from(queue)) {
            ring.forget(ticket);
        }
    }

    /// Ends the turn, although chains may be left: the queue has another one soon.
    pub(crate) fn go_on_later(&mut self) {
        self.more = true;
    }

    /// The device configuration changed: the driver is told, now or when the gate opens.
    pub fn config_changed(&mut self) {
        self.config = ConfigChange::Unexpected;
    }

    /// The driver changed the device configuration with a request. That has a new generation, as with every change, but no
    /// notification.
    pub fn config_changed_on_request(&mut self) {
        self.config = self.config.max(ConfigChange::Requested);
    }
}
