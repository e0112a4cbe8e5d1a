//! A tap of the host as a port of a switch: what connects the functions on the switch with the world.

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::link::Link;
use super::offload;
use super::{SwitchPort, Tap};

/// Frames carried at a time, so that other functions of the I/O thread get their turn.
const BATCH: usize = 256;

/// Carries frames between a port and a tap, to be added to an [`IoThread`](crate::io::IoThread).
///
/// Both ends take every offload, so that no frame is changed on the way. A frame the host does not take is dropped and
/// counted at the tap.
pub struct Uplink {
    port: SwitchPort,
    tap: Tap,
}

impl Uplink {
    /// Plugs `tap` into `port`.
    pub fn new(mut port: SwitchPort, mut tap: Tap) -> Self {
        port.up(offload::ALL);
        tap.up(offload::ALL);
        Self { port, tap }
    }

    fn feed_host(&mut self) {
        for _ in 0..BATCH {
            let Some(frame) = self.port.peek() else {
                return;
            };
            let len = frame.len();
            self.tap.write(frame);
            self.port.delivered(len);
            self.port.consume();
        }
        // Watched edge-triggered: the rest needs an event of its own.
        self.port.wake();
    }

    fn feed_switch(&mut self) {
        for _ in 0..BATCH {
            let Some(frame) = self.tap.peek() else {
                break;
            };
            self.port.inject(frame);
            self.tap.consume();
        }
        self.port.flush();
    }
}

impl MutEventSubscriber for Uplink {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.tap.event_fd() {
            self.feed_switch();
        } else {
            self.feed_host();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        for (fd, set) in [
            (self.port.event_fd(), edges),
            (self.tap.event_fd(), EventSet::IN),
        ] {
            if let Err(error) = ops.add(Events::new_raw(fd, set)) {
                tracing::error!(tap = self.tap.name(), ?error, "cannot watch an uplink");
            }
        }
    }
}
