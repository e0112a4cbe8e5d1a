//! The interrupt vectors of one function: what mask and pending bit do, for every transport that has such vectors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{MsiMessage, MsiSink};

/// What becomes of a signal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    /// It is dropped: the vector is disabled.
    #[default]
    Off,
    /// It is remembered, as one pending bit: the vector is masked.
    Masked,
    /// It is delivered.
    Live,
}

#[derive(Debug, Default)]
struct Vector {
    phase: Phase,
    pending: bool,
    /// What the sink was told last.
    route: Option<MsiMessage>,
}

/// Vectors, each *off*, *masked* or *live* ([`Phase`]). The sink has a route for exactly the live ones.
///
/// What was remembered is owed when its vector becomes live, but delivered by [`Self::deliver_pending`] only: whether the
/// function may send anything is not known here. Until then the pending bit stays.
///
/// Each vector has a lock of its own, so that a signal waits at most for the route change of that same vector.
pub struct MsiVectors {
    vectors: Vec<Mutex<Vector>>,
    sink: Arc<dyn MsiSink>,
}

impl MsiVectors {
    /// `count` vectors that are off, delivered through `sink`, which has as many.
    pub fn new(count: u16, sink: Arc<dyn MsiSink>) -> Self {
        Self {
            vectors: (0..count).map(|_| Mutex::default()).collect(),
            sink,
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The function wants its driver's attention on `vector`. From any thread; numbers out of range are ignored.
    pub fn signal(&self, vector: u16) {
        let Some(mut state) = self.vector(vector) else {
            return;
        };
        match state.phase {
            Phase::Off => {}
            Phase::Masked => state.pending = true,
            Phase::Live => self.fire(vector, &mut state),
        }
    }

    /// `vector` sends `message` from now on, as far as `phase` lets it. True if a message is owed.
    #[must_use = "a message that is owed is to be delivered when the function may send it"]
    pub fn set(&self, vector: u16, message: MsiMessage, phase: Phase) -> bool {
        let Some(mut state) = self.vector(vector) else {
            return false;
        };
        state.phase = phase;
        let route = (phase == Phase::Live).then_some(message);
        if state.route != route {
            state.route = route;
            self.sink.set_route(vector, route);
        }
        state.pending &= phase != Phase::Off;
        state.owed()
    }

    /// Delivers the messages that are owed: those of live vectors whose pending bit is set.
    pub fn deliver_pending(&self) {
        for (index, slot) in (0..).zip(&self.vectors) {
            let mut state = lock(slot);
            if state.owed() {
                self.fire(index, &mut state);
            }
        }
    }

    /// Clears all pending bits.
    pub fn forget_pending(&self) {
        for slot in &self.vectors {
            lock(slot).pending = false;
        }
    }

    /// The pending bit of `vector`.
    pub fn is_pending(&self, vector: u16) -> bool {
        self.vector(vector).is_some_and(|state| state.pending)
    }

    /// Sets the pending bit of `vector`, as it was in a saved state; [`Self::set`] takes the rest of that afterwards.
    pub fn restore_pending(&self, vector: u16) {
        if let Some(mut state) = self.vector(vector) {
            state.pending = true;
        }
    }

    fn vector(&self, vector: u16) -> Option<MutexGuard<'_, Vector>> {
        self.vectors.get(usize::from(vector)).map(lock)
    }

    fn fire(&self, index: u16, state: &mut Vector) {
        state.pending = false;
        self.sink.fire(index);
    }
}

impl Vector {
    fn owed(&self) -> bool {
        self.phase == Phase::Live && self.pending
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
