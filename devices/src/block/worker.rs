//! The thread of a disk: takes requests in order, one at a time, and announces completions through an event.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vm_memory::bitmap::Bitmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::Backend;
use super::request::{DATA_OUT, Request, Status};
use crate::memory::View;
use crate::virtio::Chain;

const STACK_BYTES: usize = 128 * 1024;

/// A request on its way through the worker.
#[derive(Debug)]
pub struct Job {
    /// The queue it came from.
    pub queue: u16,
    /// Its chain, which goes back to that queue.
    pub chain: Chain,
    /// What to do.
    pub request: Request,
    /// The driver cannot flush, so that writes must be durable when they complete.
    pub write_through: bool,
}

/// A request the worker is done with.
#[derive(Debug)]
pub struct Done {
    /// The queue the chain goes back to.
    pub queue: u16,
    /// The chain.
    pub chain: Chain,
    /// The answer.
    pub status: Status,
}

struct Shared {
    state: Mutex<State>,
    submitted: Condvar,
    completed: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    /// The thread waits on `submitted`.
    idle: bool,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The event that announces completions. It outlives the thread, so that it can be watched before there is one.
pub fn completion_event() -> io::Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK).map(Arc::new)
}

/// A disk's thread. Ends when dropped, after the request it is working on; those behind it are dropped.
pub struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts the thread. `view` is the guest memory that chains point into.
    pub fn spawn(
        backend: Arc<dyn Backend>,
        view: View,
        completed: Arc<EventFd>,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            submitted: Condvar::new(),
            completed,
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK_BYTES)
            .spawn(move || run(&theirs, &*backend, &view))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Hands over all of `jobs`.
    pub fn submit(&self, jobs: &mut Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let mut state = self.shared.lock();
        state.jobs.extend(jobs.drain(..));
        let wake = std::mem::take(&mut state.idle);
        drop(state);
        if wake {
            self.shared.submitted.notify_one();
        }
    }

    /// Takes what was completed since the last call.
    pub fn completions(&self) -> Vec<Done> {
        std::mem::take(&mut self.shared.lock().done)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        state.jobs.clear();
        drop(state);
        self.shared.submitted.notify_one();
        if let Some(thread) = self.thread.take() {
            // A panic on the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, backend: &dyn Backend, view: &View) {
    loop {
        let mut state = shared.lock();
        let job = loop {
            if state.stop {
                return;
            }
            match state.jobs.pop_front() {
                Some(job) => break job,
                None => state.idle = true,
            }
            state = shared
                .submitted
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        let status = match perform(&job, backend, view) {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(request = ?job.request, %error, "disk request failed");
                Status::IoErr
            }
        };
        let mut state = shared.lock();
        // The device takes all completions at once, so only the first of a batch needs a signal. The event is
        // watched edge-triggered and never read.
        let first = state.done.is_empty();
        state.done.push(Done {
            queue: job.queue,
            chain: job.chain,
            status,
        });
        drop(state);
        if first {
            let _ = shared.completed.write(1);
        }
    }
}

fn perform(job: &Job, backend: &dyn Backend, view: &View) -> io::Result<()> {
    match &job.request {
        Request::Read(range) => {
            let slices = job
                .chain
                .writable_slices(view, 0, range.end - range.start)
                .map_err(io::Error::other)?;
            let outcome = backend.read(range.start, &slices);
            // After the write, and also if it failed half-way: a page marked too early could be sent before its
            // new content is there.
            for slice in &slices {
                slice.bitmap().mark_dirty(0, slice.len());
            }
            outcome
        }
        Request::Write(range) => {
            let slices = job
                .chain
                .readable_slices(view, DATA_OUT, range.end - range.start)
                .map_err(io::Error::other)?;
            backend.write(range.start, &slices)?;
            settle(job, backend)
        }
        Request::Flush => backend.flush(),
        Request::Discard(ranges) => ranges
            .iter()
            .try_for_each(|range| backend.discard(range.start, range.end - range.start)),
        Request::WriteZeroes(ranges) => {
            for (range, unmap) in ranges {
                backend.write_zeroes(range.start, range.end - range.start, *unmap)?;
            }
            settle(job, backend)
        }
        // Answered by the device itself.
        Request::GetId => Ok(()),
    }
}

fn settle(job: &Job, backend: &dyn Backend) -> io::Result<()> {
    if job.write_through {
        backend.flush()
    } else {
        Ok(())
    }
}
