//! Interrupts of the machine in this process: a list.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::msi::{MsiBatch, MsiController, MsiMessage, MsiSink};

/// An interrupt that was delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The function, in the order in which functions asked for sinks.
    pub sink: usize,
    /// Its vector.
    pub vector: u16,
    /// The message, as the vector was programmed when it was delivered. `None` breaks the contract of
    /// [`MsiSink::fire`].
    pub message: Option<MsiMessage>,
}

/// Remembers what was delivered, in order. Clones share the list.
#[derive(Clone, Debug, Default)]
pub struct MockMsi {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    routes: Vec<Vec<Option<MsiMessage>>>,
    delivered: Vec<Delivery>,
}

impl MockMsi {
    /// Takes what was delivered since the last call.
    pub fn take(&self) -> Vec<Delivery> {
        std::mem::take(&mut self.lock().delivered)
    }

    /// The vectors that were delivered since the last call.
    pub fn take_vectors(&self) -> Vec<u16> {
        self.take().into_iter().map(|d| d.vector).collect()
    }

    /// Where `vector` of `sink` goes now.
    pub fn route(&self, sink: usize, vector: u16) -> Option<MsiMessage> {
        let state = self.lock();
        *state.routes.get(sink)?.get(usize::from(vector))?
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MsiController for MockMsi {
    fn sink(&self, vectors: u16) -> Arc<dyn MsiSink> {
        let mut state = self.lock();
        state.routes.push(vec![None; usize::from(vectors)]);
        Arc::new(Sink {
            msi: self.clone(),
            sink: state.routes.len() - 1,
        })
    }

    fn batch(&self) -> MsiBatch<'_> {
        MsiBatch::none()
    }
}

struct Sink {
    msi: MockMsi,
    sink: usize,
}

impl MsiSink for Sink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) {
        let mut state = self.msi.lock();
        let routes = state.routes.get_mut(self.sink);
        if let Some(slot) = routes.and_then(|r| r.get_mut(usize::from(vector))) {
            *slot = message;
        }
    }

    fn fire(&self, vector: u16) {
        let message = self.msi.route(self.sink, vector);
        self.msi.lock().delivered.push(Delivery {
            sink: self.sink,
            vector,
            message,
        });
    }
}
