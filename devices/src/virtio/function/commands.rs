//! What a transport asks of a function that has commands where others have registers: they can wait, and they can fail.

use super::{Core, VirtioFunction};
use crate::gate::Reasons;
use crate::virtio::queue::{RingError, Virtqueue};
use crate::virtio::{QueueRegisters, Status, feature};

/// Why a virtqueue could not be changed or enabled. Nothing happened.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// There is no such virtqueue.
    #[error("there is no such virtqueue")]
    Missing,
    /// Not now: it is enabled, or a reset is under way, or the driver's writes have no effect.
    #[error("the virtqueue is enabled, or the device is suspended or being reset")]
    Busy,
    /// It cannot have this size.
    #[error("the virtqueue cannot have this size")]
    Size,
    /// Its ring cannot be used.
    #[error(transparent)]
    Ring(#[from] RingError),
}

impl VirtioFunction {
    /// All features it has, of which [`Self::offer_only`] may leave out some.
    pub fn all_features(&self) -> u64 {
        self.lock().all_features()
    }

    /// The features it offers its driver, and those the driver accepted.
    pub fn features(&self) -> (u64, u64) {
        let core = self.lock();
        (core.offered(), core.driver_features)
    }

    /// Its driver can stop single virtqueues and say where they go on, although it has no capability for that.
    pub(crate) fn let_queues_be_placed(&self) {
        self.lock().has_queue_status = true;
    }

    /// Offers drivers none but these features, from the next one on. False for a function that has a driver.
    #[must_use]
    pub fn offer_only(&self, features: u64) -> bool {
        let mut core = self.lock();
        let is_reset = core.status.is_empty() && !core.gate.reasons().contains(Reasons::RESET);
        if is_reset {
            core.allowed_features = features;
        }
        is_reset
    }

    /// The driver accepts `features`, all of them at once. False if some are not offered, or if it is too late.
    #[must_use]
    pub fn accept_features(&self, features: u64) -> bool {
        let mut core = self.lock();
        let open = !core.ignores_writes() && !core.status.contains(Status::FEATURES_OK);
        let offered = features & !core.offered() == 0;
        if open && offered {
            core.driver_features = features;
        }
        open && offered
    }

    /// True if the driver may reset a single virtqueue: it accepted that, and not its management device's driver (M25).
    pub fn resets_queues(&self) -> bool {
        self.lock().driver_features & feature::RING_RESET != 0
    }

    /// Changes the registers of virtqueue `index`.
    ///
    /// # Errors
    ///
    /// Why not. Nothing happened.
    pub fn set_queue(
        &self,
        index: u16,
        change: impl FnOnce(&mut QueueRegisters),
    ) -> Result<(), QueueError> {
        let mut core = self.lock();
        let queue = core.changeable(index)?;
        let mut new = *queue.registers();
        change(&mut new);
        if !queue.allows(new.size) {
            return Err(QueueError::Size);
        }
        *queue.registers_mut() = new;
        Ok(())
    }

    /// Enables virtqueue `index`.
    ///
    /// # Errors
    ///
    /// Why not. Nothing happened, and the device works on.
    pub fn try_enable_queue(&self, index: u16) -> Result<(), QueueError> {
        let mut core = self.lock();
        let event_index = core.event_index();
        if !core.changeable(index)?.begins_in_its_ring() {
            return Err(QueueError::Size);
        }
        let Core { queues, view, .. } = &mut *core;
        let queue = queues.get_mut(usize::from(index));
        queue
            .ok_or(QueueError::Missing)?
            .enable(view, event_index)?;
        self.kick(index);
        self.doorbells_changed();
        Ok(())
    }

    /// Virtqueue `index`, which is enabled, goes on if it was about to be disabled.
    ///
    /// # Errors
    ///
    /// It is being reset.
    pub fn go_on_with_queue(&self, index: u16) -> Result<(), QueueError> {
        let mut core = self.lock();
        let queue = core.queues.get_mut(usize::from(index));
        let queue = queue.ok_or(QueueError::Missing)?;
        if queue.is_resetting() {
            return Err(QueueError::Busy);
        }
        if queue.resume() {
            self.kick(index);
        }
        Ok(())
    }

    /// Disables virtqueue `index`, which then keeps its registers and its place. False while requests are in flight: whoever
    /// was to be [woken](Self::set_wake) is when it may have come to an end, and asks again.
    ///
    /// # Errors
    ///
    /// Nothing is in flight, and what the function has yet to do cannot be done now, since it is suspended, stopped or broken.
    /// The queue goes on when it does.
    pub fn disable_queue(&self, index: u16) -> Result<bool, QueueError> {
        /// What a driver ends, and not time.
        const STOPPED: Reasons = Reasons::SUSPENDED
            .union(Reasons::DEVICE_STOPPED)
            .union(Reasons::BROKEN)
            .union(Reasons::FREEZE);
        let mut core = self.lock();
        if !core.is_enabled(index) {
            return Ok(true);
        }
        let closed = core.ignores_writes();
        let stopped = core.gate.reasons().intersects(STOPPED);
        let queue = core.queues.get_mut(usize::from(index));
        let queue = queue.ok_or(QueueError::Missing)?;
        if closed || !queue.disable() {
            return Err(QueueError::Busy);
        }
        // One that gave up chains executes them first.
        self.kick(index);
        self.settle(&mut core);
        self.doorbells_changed();
        let queue = core.queues.get_mut(usize::from(index));
        match queue.filter(|queue| queue.is_enabled()) {
            None => Ok(true),
            Some(queue) if stopped && queue.is_drained() => {
                queue.resume();
                Err(QueueError::Busy)
            }
            Some(_) => {
                core.awaited = true;
                Ok(false)
            }
        }
    }

    /// Resets virtqueue `index`. False while requests are in flight, as with [`Self::disable_queue`].
    ///
    /// # Errors
    ///
    /// The driver's writes have no effect now.
    pub fn try_reset_queue(&self, index: u16) -> Result<bool, QueueError> {
        let mut core = self.lock();
        if core.ignores_writes() || core.gate.reasons().contains(Reasons::RESET) {
            return Err(QueueError::Busy);
        }
        let hidden = core.hides(index);
        let queue = core.queues.get_mut(usize::from(index));
        let queue = queue.filter(|_| !hidden).ok_or(QueueError::Missing)?;
        if !queue.is_enabled() {
            queue.reset_disabled();
            if let Some(interrupt) = self.interrupt.get() {
                interrupt.reset_queue(index);
            }
            return Ok(true);
        }
        queue.request_reset();
        self.settle(&mut core);
        self.doorbells_changed();
        let enabled = core.is_enabled(index);
        core.awaited |= enabled;
        Ok(!enabled)
    }

    /// Where virtqueue `index` is in its rings: the next available place and, of a packed one, the next used one.
    pub fn queue_position(&self, index: u16) -> Option<(u16, u16)> {
        self.lock().visible(index).map(|queue| queue.position())
    }

    /// Says where virtqueue `index` begins when it is enabled.
    ///
    /// # Errors
    ///
    /// Why not. Nothing happened.
    pub fn set_queue_position(
        &self,
        index: u16,
        available: u16,
        used: u16,
    ) -> Result<(), QueueError> {
        let mut core = self.lock();
        let queue = core.changeable(index)?;
        queue.set_next_available(available);
        queue.set_next_used(used);
        Ok(())
    }
}

impl Core {
    /// Virtqueue `index`, if its driver may change it now.
    fn changeable(&mut self, index: u16) -> Result<&mut Virtqueue, QueueError> {
        let closed = self.ignores_writes() || self.gate.reasons().contains(Reasons::RESET);
        let hidden = self.hides(index);
        let queue = self.queues.get_mut(usize::from(index));
        let queue = queue.filter(|_| !hidden).ok_or(QueueError::Missing)?;
        match closed || queue.is_enabled() {
            true => Err(QueueError::Busy),
            false => Ok(queue),
        }
    }
}
