//! What the tests of this crate share.

use std::sync::{Arc, Mutex};

use crate::msi::{MsiController, MsiMessage, MsiSink};

/// What happened at a [`RecordingSink`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SinkEvent {
    Route(u16, Option<MsiMessage>),
    Fire(u16, Option<MsiMessage>),
}

/// Remembers routes and every event.
#[derive(Debug, Default)]
pub(crate) struct RecordingSink {
    pub(crate) state: Mutex<(Vec<Option<MsiMessage>>, Vec<SinkEvent>)>,
}

impl RecordingSink {
    /// Takes the events since the last call.
    pub(crate) fn take(&self) -> Vec<SinkEvent> {
        std::mem::take(&mut self.state.lock().unwrap().1)
    }

    /// The messages that were delivered since the last call, of any event.
    pub(crate) fn delivered(&self) -> Vec<MsiMessage> {
        self.take()
            .into_iter()
            .filter_map(|event| match event {
                SinkEvent::Fire(_, message) => message,
                SinkEvent::Route(..) => None,
            })
            .collect()
    }
}

impl MsiSink for RecordingSink {
    fn set_route(&self, vector: u16, message: Option<MsiMessage>) {
        let mut state = self.state.lock().unwrap();
        let slot = usize::from(vector);
        if state.0.len() <= slot {
            state.0.resize(slot + 1, None);
        }
        state.0[slot] = message;
        state.1.push(SinkEvent::Route(vector, message));
    }

    fn fire(&self, vector: u16) {
        let mut state = self.state.lock().unwrap();
        let route = state.0.get(usize::from(vector)).copied().flatten();
        state.1.push(SinkEvent::Fire(vector, route));
    }
}

/// Hands out one recording sink per function, in order.
#[derive(Debug, Default)]
pub(crate) struct RecordingController {
    pub(crate) sinks: Mutex<Vec<Arc<RecordingSink>>>,
}

impl MsiController for RecordingController {
    fn sink(&self, _vectors: u16) -> Arc<dyn MsiSink> {
        let sink = Arc::new(RecordingSink::default());
        self.sinks.lock().unwrap().push(Arc::clone(&sink));
        sink
    }
}
