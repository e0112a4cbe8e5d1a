//! The gate: whether a function may fetch from, use, or notify about its virtqueues.
//!
//! There is one gate per virtio function, and it is the only thing that stops a function. Everything that can stop
//! one (a reset, a driver that is not ready, Bus Master Enable, a paused VM, and every migration door) is a
//! [`Reasons`] bit. The gate is open when no bit is set.
//!
//! * Closing is a request: the bit is set at once, so nothing new is fetched, but what is in flight goes on until it
//!   is used and signalled, or with [`Reasons::RESET`] until it is let go. The stop is *acknowledged* when nothing is.
//! * A stop that waits has a [`Patience`]: first for requests to end by themselves, then, once those that storage has not
//!   begun were recalled, for those that it has. So no queue of requests, however long, keeps a function from stopping.
//! * Opening removes one bit. Removing the last one obliges the owner to look at every enabled ring again, since
//!   kicks that arrived in between were not remembered.
//!
//! In flight means: fetched from a ring and not yet returned to it. Each virtqueue knows its own; the gate counts
//! nothing. So a stop is acknowledged when its reason holds and nothing is in flight: no one has to remember that it was.
//! An administration command that waits for a member is at rest: it touches neither memory nor interrupts before its gate
//! is open and the member is where it should be. Only a reset, of the device or of the queue, ends it.
//!
//! A single virtqueue can be stopped and reset by itself as well; that is the queue's business.

use std::time::Duration;

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
        /// The transport lets the function neither reach memory nor send messages: Bus Master Enable is clear, its own or that
        /// of the function that manages it.
        const NO_DMA = 1 << 3;
        /// The monitor paused the VM.
        const PAUSED = 1 << 4;
        /// The driver suspended the device (SUSPEND; S1, B-41).
        const SUSPENDED = 1 << 5;
        /// The driver stopped the device (DEVICE_STOPPED; S2).
        const DEVICE_STOPPED = 1 << 6;
        /// The owner's driver in the guest set the mode to Stop.
        const GUEST_STOP = 1 << 7;
        /// The owner's driver in the guest set the mode to Freeze.
        const GUEST_FREEZE = 1 << 8;
        /// The monitor, as an owner driver, set the mode to Stop.
        const MONITOR_STOP = 1 << 9;
        /// The monitor, as an owner driver, set the mode to Freeze.
        const MONITOR_FREEZE = 1 << 10;
        /// The monitor's snapshot and migration engine set the mode to Stop.
        const ENGINE_STOP = 1 << 11;
        /// The monitor's snapshot and migration engine set the mode to Freeze.
        const ENGINE_FREEZE = 1 << 12;

        /// Mode Freeze, whoever set it: writes of the driver change nothing (S3-17).
        const FREEZE = Self::GUEST_FREEZE.bits() | Self::MONITOR_FREEZE.bits() | Self::ENGINE_FREEZE.bits();
        /// While one of these is acknowledged the device changes nothing by itself, not even its configuration (S1-14,
        /// S2-10, S3-14). What its backends have for it waits.
        const STILL = Self::PAUSED.bits() | Self::SUSPENDED.bits() | Self::DEVICE_STOPPED.bits()
            | Self::GUEST_STOP.bits() | Self::MONITOR_STOP.bits() | Self::ENGINE_STOP.bits() | Self::FREEZE.bits();
        /// What a device reset ends.
        const UNTIL_RESET = Self::BROKEN.bits() | Self::RESET.bits() | Self::SUSPENDED.bits()
            | Self::DEVICE_STOPPED.bits();
    }
}

/// Who gives orders to the members of a group: each has a mode of its own for every member, and records of its own, and a
/// member runs if all modes are Active. So a monitor that moves a VM neither sees nor disturbs what a driver in it, or a
/// person, has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Party {
    /// The owner's driver in the guest, through the administration virtqueue.
    Guest,
    /// The monitor, for the person who gives it administration commands.
    Monitor,
    /// The monitor's own snapshot and migration engine. What it does is over when a snapshot or a migration is, so that
    /// nothing of it is state.
    Engine,
}

impl Party {
    /// Every party.
    pub const ALL: [Self; 3] = [Self::Guest, Self::Monitor, Self::Engine];

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest",
            Self::Monitor => "monitor",
            Self::Engine => "engine",
        }
    }
}

/// The mode of a member, as the migration commands have it (S3-2 to S3-18).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Mode {
    /// It runs.
    #[default]
    Active = 0,
    /// It reaches neither memory nor interrupts; its registers work.
    Stop = 1,
    /// As in Stop, and its registers ignore writes: its context does not change.
    Freeze = 2,
}

impl Mode {
    /// The mode with this number on the wire.
    pub fn from_raw(raw: u8) -> Option<Self> {
        [Self::Active, Self::Stop, Self::Freeze]
            .into_iter()
            .find(|mode| *mode as u8 == raw)
    }

    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Stop => "stop",
            Self::Freeze => "freeze",
        }
    }
}

impl Reasons {
    /// What keeps a member in `mode` for `party`.
    pub fn of_mode(party: Party, mode: Mode) -> Self {
        match (party, mode) {
            (_, Mode::Active) => Self::empty(),
            (Party::Guest, Mode::Stop) => Self::GUEST_STOP,
            (Party::Guest, Mode::Freeze) => Self::GUEST_FREEZE,
            (Party::Monitor, Mode::Stop) => Self::MONITOR_STOP,
            (Party::Monitor, Mode::Freeze) => Self::MONITOR_FREEZE,
            (Party::Engine, Mode::Stop) => Self::ENGINE_STOP,
            (Party::Engine, Mode::Freeze) => Self::ENGINE_FREEZE,
        }
    }

    /// Every mode of `party` that is not Active.
    pub fn modes(party: Party) -> Self {
        Self::of_mode(party, Mode::Stop) | Self::of_mode(party, Mode::Freeze)
    }

    /// The mode these reasons are for `party`. There is no other record of it.
    pub fn mode(self, party: Party) -> Mode {
        [Mode::Freeze, Mode::Stop]
            .into_iter()
            .find(|mode| self.intersects(Self::of_mode(party, *mode)))
            .unwrap_or_default()
    }
}

/// How long a stop waits for requests in flight. Both count from the moment of the stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Until requests whose execution has not begun are recalled: they stay with the function as descriptors it owns, and
    /// are executed once and in order when it goes on. Never, if that is longer than `give_up_after`.
    pub recall_after: Duration,
    /// Until those that have begun are no longer waited for.
    pub give_up_after: Duration,
}

impl Patience {
    /// Recalls at once, so that only what storage works on now is waited for.
    pub const fn prompt(give_up_after: Duration) -> Self {
        Self {
            recall_after: Duration::ZERO,
            give_up_after,
        }
    }

    /// Recalls nothing, so that everything in flight is waited for.
    pub const fn complete(give_up_after: Duration) -> Self {
        Self {
            recall_after: Duration::MAX,
            give_up_after,
        }
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

    #[test]
    fn s3_2_a_mode_is_the_reasons_of_its_party() {
        for party in Party::ALL {
            assert_eq!(Reasons::empty().mode(party), Mode::Active);
            for mode in [Mode::Active, Mode::Stop, Mode::Freeze] {
                let reasons = Reasons::of_mode(party, mode) | Reasons::PAUSED;
                assert_eq!(reasons.mode(party), mode);
                for other in Party::ALL.into_iter().filter(|other| *other != party) {
                    assert_eq!(reasons.mode(other), Mode::Active);
                }
                assert_eq!(Mode::from_raw(mode as u8), Some(mode));
            }
        }
        assert_eq!((3..=255).find_map(Mode::from_raw), None);
    }

    #[test]
    fn s3_17_every_freeze_and_every_stop_keeps_a_device_still() {
        for party in Party::ALL {
            let [stop, freeze] =
                [Mode::Stop, Mode::Freeze].map(|mode| Reasons::of_mode(party, mode));
            assert!(Reasons::STILL.contains(stop | freeze));
            assert!(Reasons::FREEZE.contains(freeze) && !Reasons::FREEZE.intersects(stop));
        }
    }

    proptest! {
        /// Whatever the order, the gate is open exactly when every reason that was added has been removed.
        #[test]
        fn the_gate_is_the_set_of_its_reasons(steps in prop::collection::vec((any::<bool>(), 0u32..13), 0..64)) {
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
