//! The administration virtqueue: one command per chain, executed and used in order (B-7).
//!
//! A command that has to wait for a member stays in flight, and those behind it on the ring.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::envelope::{Outcome, REPLY_HEADER_LEN, REQUEST_HEADER_LEN, Reply};
use super::owner::Owner;
use super::session::Session;
use crate::gate::Party;
use crate::virtio::{Chain, Io, Progress, RingError};

/// Entries of the queue. Linux gives a result one descriptor per page and waits for ever if they do not fit, so this
/// is generous (D4); longer lists go through indirect tables.
pub const QUEUE_SIZE: u16 = 256;

/// Bytes of command-specific data that are looked at, and of a command-specific result that are made. The longest that
/// make sense are those of a device context, which has 134 KiB with 256 queues. What is longer is ignored (B-8), but for a
/// context: of that, nothing may get lost.
pub const MAX_DATA: usize = 1 << 20;

/// Bytes of commands and answers after which others get their turn.
const TURN: usize = 1 << 20;

/// Capacity that is kept for the next command.
const KEPT: usize = 16 << 10;

/// The guest driver's way to an owner: its end of the queue, and its session.
pub struct AdminQueue {
    owner: Arc<Owner>,
    session: Session,
    /// The command that is being executed. Kept for its capacity.
    request: Vec<u8>,
    /// The chain of the command in `request`, if it waits for a member.
    waiting: Option<Chain>,
    /// Runs out when a command that waits is to be looked at, although no member came to rest.
    timer: TimerFd,
}

impl AdminQueue {
    /// A queue for `owner`, with nothing negotiated.
    pub fn new(owner: Arc<Owner>) -> io::Result<Self> {
        Ok(Self {
            owner,
            session: Session::new(Party::Guest),
            request: Vec::new(),
            waiting: None,
            timer: TimerFd::new()?,
        })
    }

    /// What its driver negotiated.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The same, to put another in its place.
    pub(super) fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Descriptors that become readable when [`Self::resume`] is to be called. Watched edge-triggered and never read.
    pub(crate) fn wake_fds(&self) -> [RawFd; 2] {
        [self.owner.wakeups().fd(), self.timer.as_raw_fd()]
    }

    /// The device was reset: nothing is negotiated any more (B-4).
    pub(crate) fn reset(&mut self) {
        self.waiting = None;
        self.owner.forget(&mut self.session);
    }

    /// The command that waits is not waited for any more, because of a reset of the device or of queue `index`.
    pub(crate) fn call_off(&mut self, index: u16, io: &mut Io<'_>) {
        // A restored one may not have been executed anew yet.
        self.owner.abandon(&mut self.session);
        if let Some(chain) = self.waiting.take() {
            io.forget(index, chain.head());
        }
    }

    /// True while a command waits for a member.
    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Looks after the command that waits, and if it is done, those behind it.
    pub(crate) fn resume(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        match self.waiting {
            Some(_) => self.process(index, io).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Executes the commands on queue `index`.
    pub(crate) fn process(&mut self, index: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        if let Some(chain) = self.waiting.take()
            && !self.attempt(index, chain, io)?
        {
            return Ok(Progress::Waiting);
        }
        let mut moved = 0;
        while moved < TURN {
            let Some(chain) = io.pop(index)? else {
                return Ok(Progress::Exhausted);
            };
            // What a command costs is what it reads and what it may write.
            moved = usize::try_from(chain.readable_len() + chain.writable_len())
                .map_or(TURN, |len| len.saturating_add(moved));
            if let Err(error) = self.fetch(&chain, io) {
                // The chain goes back even if its buffers could not be reached: none is ever dropped (E13).
                io.push(index, chain.head(), 0)?;
                return Err(error);
            }
            if !self.attempt(index, chain, io)? {
                return Ok(Progress::Waiting);
            }
        }
        io.go_on_later();
        Ok(Progress::Exhausted)
    }

    /// Reads the command in `chain`.
    fn fetch(&mut self, chain: &Chain, io: &Io<'_>) -> Result<(), RingError> {
        // One byte more tells a context that is too long from one that is not.
        let most = REQUEST_HEADER_LEN + MAX_DATA + 1;
        let len = usize::try_from(chain.readable_len()).map_or(most, |len| len.min(most));
        // All of it is overwritten, so that only what is longer than the command before has to be cleared.
        self.request.resize(len, 0);
        self.request.shrink_to(KEPT);
        chain.read(io.memory(), 0, &mut self.request)?;
        Ok(())
    }

    /// Executes the command that was read, and returns `chain` with its answer. False if it waits.
    fn attempt(&mut self, index: u16, chain: Chain, io: &mut Io<'_>) -> Result<bool, RingError> {
        let most = REPLY_HEADER_LEN + MAX_DATA;
        let room = usize::try_from(chain.writable_len()).map_or(most, |len| len.min(most));
        match self.owner.execute(&mut self.session, &self.request, room) {
            Outcome::Done(reply) => {
                let written = answer(&reply, &chain, io);
                io.push(index, chain.head(), *written.as_ref().unwrap_or(&0))?;
                written?;
                Ok(true)
            }
            Outcome::Later => {
                self.waiting = Some(chain);
                self.set_timer();
                Ok(false)
            }
        }
    }

    fn set_timer(&mut self) {
        let Some(at) = self.session.wait_until() else {
            return;
        };
        // Zero would disarm it.
        let pause = at.saturating_duration_since(Instant::now());
        let pause = pause.max(Duration::from_nanos(1));
        if let Err(error) = self.timer.reset(pause, None) {
            // The command still ends when its member comes to rest.
            tracing::warn!(%error, "cannot set the timer of an administration virtqueue");
        }
    }
}

/// Writes as much of the answer as fits; returns how many bytes that was.
fn answer(reply: &Reply, chain: &Chain, io: &Io<'_>) -> Result<u32, RingError> {
    if io.is_resetting() {
        return Ok(0);
    }
    let written = chain.write(io.memory(), 0, &reply.encode())?;
    // An answer is far shorter than 4 GiB.
    Ok(written as u32)
}
