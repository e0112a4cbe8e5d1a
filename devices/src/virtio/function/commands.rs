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
        core.changeable(index)?;
        let Core { queues, view, .. } = &mut *core;
        let queue = queues.get_mut(usize::from(index));
        queue
            .ok_or(QueueError::Missing)?
            .enable(view, event_index)?;
        self.kick(index);
        self.revive();
        Ok(())
    }

    /// Disables virtqueue `index`, which then keeps its registers and its place. False while requests are in flight: whoever
    /// was to be [woken](Self::set_wake) is when it may have come to an end, and asks again.
    #[must_use]
    pub fn disable_queue(&self, index: u16) -> bool {
        let mut core = self.lock();
        if let Some(queue) = core.queues.get_mut(usize::from(index))
            && queue.disable()
        {
            // One that gave up chains executes them first.
            self.kick(index);
        }
        self.settle(&mut core);
        self.revive();
        let enabled = core.is_enabled(index);
        core.awaited |= enabled;
        !enabled
    }

    /// True once virtqueue `index` is not being reset. Whoever was to be [woken](Self::set_wake) is when it may be so.
    #[must_use]
    pub fn queue_was_reset(&self, index: u16) -> bool {
        let mut core = self.lock();
        let resetting = core
            .visible(index)
            .is_some_and(|queue| queue.is_resetting());
        core.awaited |= resetting;
        self.revive();
        !resetting
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
