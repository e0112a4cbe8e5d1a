//! The threads of disks. A disk's requests are taken in order, one at a time, and announced through an event when they
//! are done; the disks of one pool take turns on its threads.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::backend::Backend;
use super::request::{DATA_OUT, Request, Status};
use crate::memory::View;
use crate::virtio::{Chain, Warnings};

const STACK_BYTES: usize = 128 * 1024;
/// Requests of one disk before the next disk has its turn.
const TURN: usize = 16;

/// How long a disk or a pool that goes waits for a request that is being worked on. Storage that takes longer may never
/// answer, and must not keep the process from ending.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a pool that goes looks whether its threads have ended.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// A request on its way through a thread.
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

/// Threads that any number of disks share. They start when there is work for them, up to a limit, and end with the last
/// clone of this and the last disk that uses it.
#[derive(Clone)]
pub struct Pool(Arc<Threads>);

struct Threads {
    line: Arc<Line>,
    limit: usize,
    started: Mutex<Vec<JoinHandle<()>>>,
}

/// Disks that wait for a thread, and threads that wait for a disk.
#[derive(Default)]
struct Line {
    state: Mutex<LineState>,
    changed: Condvar,
}

#[derive(Default)]
struct LineState {
    disks: VecDeque<Arc<Shared>>,
    idle: usize,
    stop: bool,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk whose turn it is; `None` when the pool ends.
    fn next(&self) -> Option<Arc<Shared>> {
        let mut state = self.lock();
        loop {
            if state.stop {
                return None;
            }
            if let Some(disk) = state.disks.pop_front() {
                return Some(disk);
            }
            state.idle += 1;
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    /// True if there are fewer idle threads than disks that wait for one.
    fn push(&self, disk: Arc<Shared>) -> bool {
        let mut state = self.lock();
        state.disks.push_back(disk);
        let short = state.idle < state.disks.len();
        drop(state);
        self.changed.notify_one();
        short
    }
}

impl Pool {
    /// A pool of at most `limit` threads, and at least one.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Threads {
            line: Arc::default(),
            limit: limit.max(1),
            started: Mutex::default(),
        }))
    }

    /// Starts another thread, if that is allowed. An error only if there is none at all.
    fn grow(&self) -> io::Result<()> {
        let started = self.0.started.lock();
        let mut started = started.unwrap_or_else(PoisonError::into_inner);
        if started.len() >= self.0.limit {
            return Ok(());
        }
        let line = Arc::clone(&self.0.line);
        let spawned = std::thread::Builder::new()
            .name("disk".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                while let Some(disk) = line.next() {
                    if disk.turn() {
                        line.push(disk);
                    }
                }
            });
        match spawned {
            Ok(thread) => started.push(thread),
            Err(error) if started.is_empty() => return Err(error),
            Err(error) => tracing::debug!(%error, "cannot start another thread for disks"),
        }
        Ok(())
    }

    fn has_threads(&self) -> bool {
        let started = self.0.started.lock();
        !started.unwrap_or_else(PoisonError::into_inner).is_empty()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.line.lock().stop = true;
        self.line.changed.notify_all();
        let deadline = Instant::now() + PATIENCE;
        let started = self.started.get_mut();
        for thread in started.unwrap_or_else(PoisonError::into_inner).drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(LOOK_EVERY);
            }
            // One that does not end is left alone: all it uses is kept by it.
            if thread.is_finished() {
                // A panic on the thread was reported when it happened.
                let _ = thread.join();
            }
        }
    }
}

/// A disk, as the threads see it. Refers to no pool: a thread must not be the one that ends it.
struct Shared {
    backend: Arc<dyn Backend>,
    view: View,
    state: Mutex<State>,
    /// The request that was being worked on when the disk went is done.
    rested: Condvar,
    completed: Arc<EventFd>,
    /// About requests that failed.
    warnings: Warnings,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    /// In the line, or on a thread.
    scheduled: bool,
    /// A thread works on a request.
    busy: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Works on some requests. True if the disk wants another turn.
    fn turn(&self) -> bool {
        let mut state = self.lock();
        for _ in 0..TURN {
            let Some(job) = state.jobs.pop_front() else {
                state.scheduled = false;
                return false;
            };
            state.busy = true;
            drop(state);
            let status = match perform(&job, &*self.backend, &self.view) {
                Ok(()) => Status::Ok,
                Err(error) => {
                    if let Some(count) = self.warnings.another() {
                        tracing::warn!(request = ?job.request, %error, count, "disk request failed");
                    }
                    Status::IoErr
                }
            };
            state = self.lock();
            state.busy = false;
            // The device takes all completions at once, so only the first of a batch needs a signal. The event is
            // watched edge-triggered and never read.
            let first = state.done.is_empty();
            state.done.push(Done {
                queue: job.queue,
                chain: job.chain,
                status,
            });
            drop(state);
            self.rested.notify_one();
            if first {
                let _ = self.completed.write(1);
            }
            state = self.lock();
        }
        true
    }
}

/// The event that announces completions. It can be watched before there is a worker.
pub fn completion_event() -> io::Result<Arc<EventFd>> {
    EventFd::new(EFD_NONBLOCK).map(Arc::new)
}

/// A disk's place in a pool. Dropping it waits for the request that is being worked on, though not for long; those
/// behind it are dropped.
pub struct Worker {
    shared: Arc<Shared>,
    pool: Pool,
}

impl Worker {
    /// A place in `pool`. `view` is the guest memory that chains point into.
    pub fn new(backend: Arc<dyn Backend>, view: View, completed: Arc<EventFd>, pool: Pool) -> Self {
        let shared = Arc::new(Shared {
            backend,
            view,
            state: Mutex::default(),
            rested: Condvar::new(),
            completed,
            warnings: Warnings::default(),
        });
        Self { shared, pool }
    }

    /// Hands over all of `jobs`, or none if there is no thread for them.
    pub fn submit(&self, jobs: &mut Vec<Job>) -> io::Result<()> {
        if jobs.is_empty() {
            return Ok(());
        }
        if !self.pool.has_threads() {
            self.pool.grow()?;
        }
        let mut state = self.shared.lock();
        state.jobs.extend(jobs.drain(..));
        let waiting = std::mem::replace(&mut state.scheduled, true);
        drop(state);
        if !waiting && self.pool.0.line.push(Arc::clone(&self.shared)) {
            self.pool.grow()?;
        }
        Ok(())
    }

    /// Takes back every request but the one that is being worked on: those that wait, which fail, and those that were
    /// completed since the last call.
    pub fn call_off(&self) -> Vec<Done> {
        let mut state = self.shared.lock();
        let mut done = std::mem::take(&mut state.done);
        let failed = state.jobs.drain(..).map(|job| Done {
            queue: job.queue,
            chain: job.chain,
            status: Status::IoErr,
        });
        done.extend(failed);
        done
    }

    /// Takes back the requests that wait, unbegun, in the order in which they were submitted.
    pub fn recall(&self) -> VecDeque<Job> {
        std::mem::take(&mut self.shared.lock().jobs)
    }

    /// Takes what was completed since the last call.
    pub fn completions(&self) -> Vec<Done> {
        std::mem::take(&mut self.shared.lock().done)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.jobs.clear();
        let rested = self
            .shared
            .rested
            .wait_timeout_while(state, PATIENCE, |state| state.busy);
        let (state, _) = rested.unwrap_or_else(PoisonError::into_inner);
        if state.busy {
            tracing::warn!("storage of a disk does not answer; its last request is abandoned");
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
            backend.read(range.start, &slices)
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
