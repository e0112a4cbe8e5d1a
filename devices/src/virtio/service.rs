//! Virtqueues that something else serves than the device, such as the administration virtqueue: one command per chain,
//! executed and used in order.
//!
//! A command that has to wait stays in flight, and those behind it on the ring. What a command is, and who executes it, is the
//! [`Service`]'s business; what a chain is, and when it may be fetched, that of the [`ServiceQueue`].

use std::any::Any;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use super::chain::Chain;
use super::device::{Io, Progress};
use super::queue::RingError;
use crate::state::Kept;

/// Bytes of commands and answers after which others get their turn.
const TURN: usize = 1 << 20;

/// Bytes that a command counts for if it has fewer.
const LEAST: usize = 4 << 10;

/// Capacity that is kept for the next command.
const KEPT: usize = 16 << 10;

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Executed {
    /// It is done; the device-writable part of its chain begins with these bytes, as far as they fit.
    Done(Vec<u8>),
    /// It waits: it is to be executed again, from the same bytes, when the service says so.
    Later,
}

/// Executes commands of the driver. Has a session with the driver, if it needs one, which a reset ends.
///
/// Called with the function's lock held, like a [device](super::VirtioDevice). None of it may block.
pub trait Service: Any + Send {
    /// What the virtqueue is called.
    fn name(&self) -> &'static str;

    /// The feature that is offered for it. The virtqueue is there for drivers that accepted it.
    fn feature(&self) -> u64;

    /// The largest size of the virtqueue.
    fn queue_size(&self) -> u16;

    /// The most bytes of a command, and of an answer. What is longer is not seen, and not made.
    fn limits(&self) -> (usize, usize);

    /// What the driver reads behind the device configuration. Its length never changes; what it says changes with commands,
    /// and with a reset.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// False if the service goes without an agreement on `features`, those that the driver accepts.
    fn agrees(&self, _features: u64) -> bool {
        true
    }

    /// The driver is ready and accepted `features`.
    fn activate(&mut self, _features: u64) {}

    /// Executes `command`, for which the driver left `room` bytes. Any bytes are a command, and any of them is answered.
    fn execute(&mut self, command: &[u8], room: usize) -> Executed;

    /// When the command that waits is to be executed again, even if [`Self::wake_fd`] was not signalled.
    fn wait_until(&self) -> Option<Instant>;

    /// Becomes readable when a command that waits is to be executed again. Watched edge-triggered and never read.
    fn wake_fd(&self) -> RawFd;

    /// The command that waits will not be executed again: what it began is undone, or goes on to its end by itself.
    fn abandon(&mut self);

    /// The driver asked for a reset of the device. What the service does besides commands ends with it, too:
    /// [`Self::is_at_rest`] says when. Until then the reset waits, and looks again whenever [`Self::wake_fd`] was signalled.
    fn begin_reset(&mut self) {}

    /// True if nothing that the service is responsible for is in flight.
    fn is_at_rest(&self) -> bool {
        true
    }

    /// The device was reset: the session is over.
    fn reset(&mut self);

    /// What it keeps besides its virtqueue.
    fn save(&self) -> Kept;

    /// Whether it can have what a saved state keeps, with a `driver` that is ready and accepted these features.
    ///
    /// # Errors
    ///
    /// What is wrong.
    fn check(&self, kept: &Kept, driver: Option<u64>) -> Result<(), String>;

    /// Takes what it accepts, after a reset.
    fn restore(&mut self, kept: &Kept);
}

/// A service, and its end of the virtqueue.
pub(super) struct ServiceQueue {
    service: Box<dyn Service>,
    /// The command that is being executed. Kept for its capacity.
    command: Vec<u8>,
    /// The chain of that command, if it waits.
    waiting: Option<Chain>,
    /// Runs out when a command that waits is to be executed again.
    timer: TimerFd,
}

impl ServiceQueue {
    pub fn new(service: Box<dyn Service>) -> io::Result<Self> {
        Ok(Self {
            service,
            command: Vec::new(),
            waiting: None,
            timer: TimerFd::new()?,
        })
    }

    pub fn service(&self) -> &dyn Service {
        &*self.service
    }

    pub fn service_mut(&mut self) -> &mut dyn Service {
        &mut *self.service
    }

    /// Descriptors that become readable when [`Self::resume`] is to be called. Watched edge-triggered and never read.
    pub fn wake_fds(&self) -> [RawFd; 2] {
        [self.service.wake_fd(), self.timer.as_raw_fd()]
    }

    /// The device was reset, and nothing is in flight.
    pub fn reset(&mut self) {
        self.waiting = None;
        self.service.reset();
    }

    /// The command that waits is not waited for any more, because of a reset of the device or of queue `index`.
    pub fn call_off(&mut self, index: u16, io: &mut Io<'_>) {
        // A restored one may not have been executed anew yet.
        self.service.abandon();
        if let Some(chain) = self.waiting.take() {
            io.forget(index, chain.ticket());
        }
    }

    /// True while a command waits. It is the only chain in flight then.
    pub fn is_waiting(&self) -> bool {
        self.waiting.is_some()
    }

    /// Looks after the command that waits, and if it is done, those behind it.
    pub fn resume(&mut self, index: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        match self.waiting {
            Some(_) => self.process(index, io).map(|_| ()),
            None => Ok(()),
        }
    }

    /// Executes the commands on queue `index`.
    pub fn process(&mut self, index: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
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
            // What a command costs is what it reads and what it may write, and a call to the host if it is short.
            moved = usize::try_from(chain.readable_len() + chain.writable_len())
                .map_or(TURN, |len| len.max(LEAST).saturating_add(moved));
            if let Err(error) = self.fetch(&chain, io) {
                // The chain goes back even if its buffers could not be reached: none is ever dropped (E13).
                io.push(index, chain.ticket(), 0)?;
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
        let (most, _) = self.service.limits();
        let len = usize::try_from(chain.readable_len()).map_or(most, |len| len.min(most));
        // All of it is overwritten, so that only what is longer than the command before has to be cleared.
        self.command.resize(len, 0);
        self.command.shrink_to(KEPT);
        chain.read(io.memory(), 0, &mut self.command)?;
        Ok(())
    }

    /// Executes the command that was read, and returns `chain` with its answer. False if it waits.
    fn attempt(&mut self, index: u16, chain: Chain, io: &mut Io<'_>) -> Result<bool, RingError> {
        let (_, most) = self.service.limits();
        let room = usize::try_from(chain.writable_len()).map_or(most, |len| len.min(most));
        let before = self.service.config().to_vec();
        let executed = self.service.execute(&self.command, room);
        if self.service.config() != before {
            io.config_changed_on_request();
        }
        match executed {
            Executed::Done(answer) => {
                let written = write(&answer, &chain, io);
                io.push(index, chain.ticket(), *written.as_ref().unwrap_or(&0))?;
                written?;
                Ok(true)
            }
            Executed::Later => {
                self.waiting = Some(chain);
                self.set_timer();
                Ok(false)
            }
        }
    }

    fn set_timer(&mut self) {
        let Some(at) = self.service.wait_until() else {
            return;
        };
        // Zero would disarm it.
        let pause = at.saturating_duration_since(Instant::now());
        let pause = pause.max(Duration::from_nanos(1));
        if let Err(error) = self.timer.reset(pause, None) {
            // The command still ends when its service is woken.
            let queue = self.service.name();
            tracing::warn!(%error, queue, "cannot set the timer of a virtqueue");
        }
    }
}

/// Writes as much of the answer as fits; returns how many bytes that was.
fn write(answer: &[u8], chain: &Chain, io: &Io<'_>) -> Result<u32, RingError> {
    if io.is_resetting() {
        return Ok(0);
    }
    let written = chain.write(io.memory(), 0, answer)?;
    // An answer is far shorter than 4 GiB.
    Ok(written as u32)
}
