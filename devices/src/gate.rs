//! The gate: whether a function may fetch from, use, or notify about its virtqueues.
//!
//! There is one gate per virtio function, and it is the only thing that stops a function. Everything that can stop
//! one (a reset, a driver that is not ready, Bus Master Enable, a paused VM, and every migration door) is a
//! [`Reasons`] bit. The gate is open when no bit is set.
//!
//! * Closing is a request: the bit is set at once, so nothing new is fetched, but what is in flight goes on until it
//!   is used and signalled, or with [`Reasons::RESET`] until it is let go. The stop is *acknowledged* when nothing is.
//! * Opening removes one bit. Removing the last one obliges the owner to look at every enabled ring again, since
//!   kicks that arrived in between were not remembered.
//!
//! In flight means: fetched from a ring and not yet returned to it. Each virtqueue counts its own; the gate counts
//! nothing.

use bitflags::bitflags;

bitflags! {
    /// Why a function is stopped. Any subset may hold at once, in any order.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Reasons: u32 {
        /// The driver has not set DRIVER_OK since the last reset.
        const NO_DRIVER = 1 << 0;
        /// The device found its rings unusable and asked for a reset (DEVICE_NEEDS_RESET).
        const BROKEN = 1 << 1;
        /// A device reset (status 0, FLR) waits for what is in flight, which completes unseen: the driver may use its
        /// memory for something else by now.
        const RESET = 1 << 2;
        /// Bus Master Enable is clear: the function may neither reach memory nor send MSI.
        const BUS_MASTER = 1 << 3;
        /// The monitor paused the VM.
        const PAUSED = 1 << 4;
    }
}

/// The set of reasons. See the [module documentation](self).
#[derive(Debug)]
pub struct Gate {
    reasons: Reasons,
}

impl Gate {
    /// A gate closed for `reasons`.
    pub fn closed_for(reasons: Reasons) -> Self {
        Self { reasons }
    }

    /// Adds `reason`.
    pub fn close(&mut self, reason: Reasons) {
        self.reasons |= reason;
    }

    /// Removes `reason`. True if that opened the gate: the caller then re-scans every enabled ring.
    #[must_use = "rings must be scanned again when the gate opens, or kicks are lost"]
    pub fn open(&mut self, reason: Reasons) -> bool {
        let was_closed = !self.is_open();
        self.reasons -= reason;
        was_closed && self.is_open()
    }

    /// True if the function may fetch new requests.
    pub fn is_open(&self) -> bool {
        self.reasons.is_empty()
    }

    /// What keeps the gate closed.
    pub fn reasons(&self) -> Reasons {
        self.reasons
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_last_reason_removed_opens() {
        let mut gate = Gate::closed_for(Reasons::NO_DRIVER | Reasons::PAUSED);
        assert!(!gate.open(Reasons::NO_DRIVER));
        assert!(gate.open(Reasons::PAUSED));
        assert!(gate.is_open());
    }

    #[test]
    fn removing_a_reason_from_an_open_gate_opens_nothing() {
        let mut gate = Gate::closed_for(Reasons::empty());
        assert!(!gate.open(Reasons::PAUSED));
    }

    proptest! {
        /// Whatever the order, the gate is open exactly when every reason that was added has been removed.
        #[test]
        fn the_gate_is_the_set_of_its_reasons(steps in prop::collection::vec((any::<bool>(), 0u32..5), 0..64)) {
            let mut gate = Gate::closed_for(Reasons::empty());
            let mut model = std::collections::BTreeSet::new();
            for (close, bit) in steps {
                let reason = Reasons::from_bits_truncate(1 << bit);
                let was_open = model.is_empty();
                if close {
                    model.insert(bit);
                    gate.close(reason);
                } else {
                    model.remove(&bit);
                    prop_assert_eq!(gate.open(reason), !was_open && model.is_empty());
                }
                prop_assert_eq!(gate.is_open(), model.is_empty());
            }
        }
    }
}
