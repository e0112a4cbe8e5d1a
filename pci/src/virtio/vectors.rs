//! Which MSI-X vector each cause of interrupts has: the registers `config_msix_vector` and `queue_msix_vector`.

use std::sync::atomic::{AtomicU16, Ordering};

use devices::virtio::{Cause, Interrupt, NO_VECTOR};

use crate::msix::Msix;

/// The interrupts of a function: its causes, and its vectors.
pub struct Vectors {
    msix: Msix,
    /// The vector of the configuration, and those of all virtqueues. They change under the function's lock only.
    causes: Box<[AtomicU16]>,
}

impl Vectors {
    /// Those of a function with `queues` virtqueues. None interrupts.
    pub fn new(msix: Msix, queues: u16) -> Self {
        let causes = 1 + usize::from(queues);
        Self {
            msix,
            causes: (0..causes).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// The vectors.
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// The driver wants `vector` for `cause`; it gets none if there is no such vector (E4).
    pub fn set(&self, cause: Cause, vector: u64) {
        let there = u16::try_from(vector).ok().filter(|v| *v < self.msix.len());
        if let Some(slot) = self.slot(cause) {
            slot.store(there.unwrap_or(NO_VECTOR), Ordering::Relaxed);
        }
    }

    fn slot(&self, cause: Cause) -> Option<&AtomicU16> {
        let index = match cause {
            Cause::Config => 0,
            Cause::Queue(index) => 1 + usize::from(index),
        };
        self.causes.get(index)
    }
}

impl Interrupt for Vectors {
    fn signal(&self, cause: Cause) {
        // A table has no vector of this number.
        self.msix.signal(self.vector(cause));
    }

    fn deliver_pending(&self) {
        self.msix.deliver_pending();
    }

    fn reset(&self) {
        self.assign(NO_VECTOR, &mut std::iter::empty());
        self.msix.forget_pending();
    }

    fn reset_queue(&self, queue: u16) {
        self.set(Cause::Queue(queue), NO_VECTOR.into());
    }

    fn vectors(&self) -> u16 {
        self.msix.len()
    }

    fn vector(&self, cause: Cause) -> u16 {
        let slot = self.slot(cause);
        slot.map_or(NO_VECTOR, |slot| slot.load(Ordering::Relaxed))
    }

    fn assign(&self, config: u16, queues: &mut dyn Iterator<Item = u16>) {
        let vectors = std::iter::once(config).chain(queues);
        let vectors = vectors.chain(std::iter::repeat(NO_VECTOR));
        for (slot, vector) in self.causes.iter().zip(vectors) {
            slot.store(vector, Ordering::Relaxed);
        }
    }
}
