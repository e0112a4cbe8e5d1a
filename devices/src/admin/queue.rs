//! The administration virtqueue: one command per chain, executed and used in order (B-7).

use std::sync::Arc;

use super::envelope::REQUEST_HEADER_LEN;
use super::owner::Owner;
use super::session::Session;
use crate::virtio::{Chain, Io, Progress, RingError};

/// Entries of the queue. Linux gives a result one descriptor per page and waits for ever if they do not fit, so this
/// is generous (D4); longer lists go through indirect tables.
pub const QUEUE_SIZE: u16 = 256;

/// Bytes of command-specific data that are looked at: those of the longest there can be, the array of LIST_USE with a bit
/// for each of the 65536 opcodes. The rest is ignored (B-8).
pub const MAX_DATA: usize = 8 << 10;

/// The guest driver's way to an owner: its end of the queue, and its session.
pub struct AdminQueue {
    owner: Arc<Owner>,
    session: Session,
    /// The command that is being executed. Kept for its capacity.
    request: Vec<u8>,
}

impl AdminQueue {
    /// A queue for `owner`, with nothing negotiated.
    pub fn new(owner: Arc<Owner>) -> Self {
        Self {
            owner,
            session: Session::default(),
            request: Vec::new(),
        }
    }

    /// What its driver negotiated.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The device was reset: nothing is negotiated any more (B-4).
    pub(crate) fn reset(&mut self) {
        self.session = Session::default();
    }

    /// Executes the commands on queue `index`.
    pub(crate) fn process(&mut self, index: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(chain) = io.pop(index)? {
            let written = self.answer(&chain, io);
            // The chain goes back even if its buffers could not be reached: none is ever dropped (E13).
            io.push(index, chain.head(), *written.as_ref().unwrap_or(&0))?;
            written?;
        }
        Ok(Progress::Exhausted)
    }

    /// Executes the command in `chain` and writes as much of the answer as fits; returns how many bytes that was.
    fn answer(&mut self, chain: &Chain, io: &Io<'_>) -> Result<u32, RingError> {
        let most = REQUEST_HEADER_LEN + MAX_DATA;
        let len = usize::try_from(chain.readable_len()).map_or(most, |len| len.min(most));
        // All of it is overwritten, so that only what is longer than the command before has to be cleared.
        self.request.resize(len, 0);
        chain.read(io.memory(), 0, &mut self.request)?;
        let reply = self.owner.execute(&mut self.session, &self.request);
        let written = chain.write(io.memory(), 0, &reply.encode())?;
        // An answer is far shorter than 4 GiB.
        Ok(written as u32)
    }
}
