//! What a function needs from the machine to interrupt the guest: message-signalled interrupts.
//!
//! The machine implements these two traits (with an interrupt route and an irqfd per vector, under KVM); tests
//! implement them with a list. Nothing here knows how a message reaches a vCPU.

mod vectors;

use std::sync::Arc;

pub use vectors::{MsiVectors, Phase};

/// A memory write that is an interrupt: the address and data the guest programmed into a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Guest physical address of the write; a multiple of 4.
    pub address: u64,
    /// The 32 bits written there, little-endian.
    pub data: u32,
}

/// The interrupt vectors of one function.
///
/// A function owns its sink and calls it from vCPU threads ([`MsiSink::set_route`], on a table write), from the I/O thread (the
/// same, on a command), and from any
/// thread that completes I/O ([`MsiSink::fire`]). For one vector the calls never overlap: the function serialises
/// them, and calls `fire` only between a `set_route` with a message and the next one without. Calls for different
/// vectors do overlap. Neither may call back into the function.
pub trait MsiSink: Send + Sync {
    /// Says where `vector` (from 0, below the count the sink was made for) goes from now on. `None` when the vector
    /// is masked or MSI-X is disabled. May block for the time of a system call.
    fn set_route(&self, vector: u16, message: Option<MsiMessage>);

    /// Delivers `vector` once, to where its route says. Must not block.
    fn fire(&self, vector: u16);
}

/// Where functions get their interrupt vectors.
pub trait MsiController: Send + Sync {
    /// A sink for `vectors` vectors (1 to 2048), none of which has a route yet. Dropping the sink gives them back.
    fn sink(&self, vectors: u16) -> Arc<dyn MsiSink>;

    /// Collects the routes that its sinks are told of until the answer is dropped, and sets them up together then:
    /// where each change costs as much as there are routes, that is for whoever makes many. Interrupts that are fired
    /// meanwhile are delivered, if at a higher price. Batches may be open several at a time; the last to end counts.
    fn batch(&self) -> MsiBatch<'_>;
}

/// A batch that is open; see [`MsiController::batch`].
#[must_use = "a batch ends when this is dropped"]
pub struct MsiBatch<'a>(Option<Box<dyn FnOnce() + 'a>>);

impl<'a> MsiBatch<'a> {
    /// A batch whose end is `end`.
    pub fn until(end: impl FnOnce() + 'a) -> Self {
        Self(Some(Box::new(end)))
    }

    /// Of a controller that sets up every route at once.
    pub fn none() -> Self {
        Self(None)
    }
}

impl Drop for MsiBatch<'_> {
    fn drop(&mut self) {
        if let Some(end) = self.0.take() {
            end();
        }
    }
}
