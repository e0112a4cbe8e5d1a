//! Interrupts of a managed device (M18, M20, M21): each virtqueue and the configuration has a message of its own, which can be
//! enabled and masked. Nothing has a vector number.
//!
//! A disabled message is dropped, a masked one is remembered as one pending bit and sent when it is unmasked.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::msi::{MsiMessage, MsiSink, MsiVectors, Phase};
use crate::virtio::{Cause, Interrupt, NO_VECTOR};

/// What the driver set up for one cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The message.
    pub message: MsiMessage,
    /// It is sent.
    pub enabled: bool,
    /// It is held back.
    pub masked: bool,
}

impl Default for Entry {
    /// After a reset it is disabled (S4-24).
    fn default() -> Self {
        Self {
            message: MsiMessage {
                address: 0,
                data: 0,
            },
            enabled: false,
            masked: false,
        }
    }
}

impl Entry {
    fn phase(&self) -> Phase {
        match (self.enabled, self.masked) {
            (false, _) => Phase::Off,
            (true, true) => Phase::Masked,
            (true, false) => Phase::Live,
        }
    }
}

/// The interrupts of one managed device. See the [module documentation](self).
///
/// Locks: `entries`, then one vector.
pub struct Interrupts {
    /// Of the configuration, then of each virtqueue.
    entries: Mutex<Vec<Entry>>,
    vectors: MsiVectors,
}

impl Interrupts {
    /// How many messages a device with so many virtqueues has.
    pub fn count(queues: u16) -> u16 {
        queues.saturating_add(1)
    }

    /// Those of a device with `queues` virtqueues, sent through `sink`. All are disabled.
    pub fn new(queues: u16, sink: Arc<dyn MsiSink>) -> Self {
        let count = Self::count(queues);
        Self {
            entries: Mutex::new(vec![Entry::default(); count.into()]),
            vectors: MsiVectors::new(count, sink),
        }
    }

    /// What was set up for `cause`, and whether a message waits behind its mask. `None` of a virtqueue that is not there.
    pub fn get(&self, cause: Cause) -> Option<(Entry, bool)> {
        let slot = slot(cause);
        let entry = self.entries().get(usize::from(slot)).copied()?;
        Some((entry, self.vectors.is_pending(slot)))
    }

    /// Changes what is set up for `cause`. True if a message is owed, which is to be delivered when the device may send it.
    #[must_use]
    pub fn change(&self, cause: Cause, change: impl FnOnce(&mut Entry)) -> bool {
        let mut entries = self.entries();
        let slot = slot(cause);
        let Some(entry) = entries.get_mut(usize::from(slot)) else {
            return false;
        };
        change(entry);
        self.vectors.set(slot, entry.message, entry.phase())
    }

    /// Takes what a saved state has for `cause`.
    pub fn restore(&self, cause: Cause, entry: Entry, pending: bool) {
        if pending {
            self.vectors.restore_pending(slot(cause));
        }
        let _later = self.change(cause, |own| *own = entry);
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The number of its vector.
fn slot(cause: Cause) -> u16 {
    match cause {
        Cause::Config => 0,
        Cause::Queue(index) => Interrupts::count(index),
    }
}

impl Interrupt for Interrupts {
    fn signal(&self, cause: Cause) {
        self.vectors.signal(slot(cause));
    }

    fn deliver_pending(&self) {
        self.vectors.deliver_pending();
    }

    fn reset(&self) {
        let mut entries = self.entries();
        for (slot, entry) in (0..).zip(entries.iter_mut()) {
            *entry = Entry::default();
            // What is disabled is not pending.
            let _none = self.vectors.set(slot, entry.message, entry.phase());
        }
    }

    fn reset_queue(&self, queue: u16) {
        let _none = self.change(Cause::Queue(queue), |entry| *entry = Entry::default());
    }

    fn vectors(&self) -> u16 {
        0
    }

    fn vector(&self, _cause: Cause) -> u16 {
        NO_VECTOR
    }

    /// They are saved and restored by [`saved`](super::saved), not by number.
    fn assign(&self, _config: u16, _queues: &mut dyn Iterator<Item = u16>) {}
}
