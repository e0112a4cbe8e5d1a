//! The state all vCPUs share: running, paused, ended and why; and jobs for the threads of paused vCPUs.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::kick;
use crate::exit::Outcome;

/// What the vCPUs are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RunState {
    /// Run guest code.
    Running = 0,
    /// Wait outside of the guest.
    Paused = 1,
    /// Return from the thread.
    Ended = 2,
}

/// Why a state cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The guest has ended.
    #[error("the guest has ended")]
    Ended,
    /// The guest runs, or goes on running, so that its vCPUs are not to be touched.
    #[error("the guest runs; pause it first")]
    Running,
    /// A vCPU's thread did not start, or has not come out of the guest yet.
    #[error("the thread of vCPU {0} does not wait for the end of a pause")]
    NotStarted(usize),
    /// There is no such vCPU.
    #[error("there is no vCPU {0}")]
    NoSuchVcpu(usize),
    /// vCPUs did not come out of the guest in time.
    #[error(
        "{vcpus} of the guest's vCPUs did not come to rest within {} s, and the guest goes on running; the host's kernel \
         or a disk may be stuck (see `dmesg`)",
        patience.as_secs_f32()
    )]
    Stuck {
        /// How many.
        vcpus: usize,
        /// How long was waited.
        patience: Duration,
    },
}

/// How long a job waits for a vCPU's thread that is starting.
const START: Duration = Duration::from_secs(5);

/// What a vCPU's thread is to do with its vCPU while it is parked.
type Job<V> = Box<dyn FnOnce(&mut V) + Send>;

/// State of the machine as its vCPUs see it. See the [module documentation](super).
///
/// `V` is what a thread owns of its vCPU.
#[derive(Debug)]
pub struct Control<V = VcpuFd> {
    /// A copy of `Inner::state`, which every entry into the guest reads without a lock.
    state: AtomicU8,
    /// A copy of whether `Inner::holds` is above 0, for the same purpose.
    held: AtomicBool,
    inner: Mutex<Inner<V>>,
    pub(super) changed: Condvar,
    ended: EventFd,
    vcpus: usize,
}

#[derive(Debug)]
pub(super) struct Inner<V> {
    pub(super) state: RunState,
    /// How many want the vCPUs of a running machine to stand still for now.
    pub(super) holds: usize,
    outcome: Option<Outcome>,
    /// vCPU threads that can be kicked.
    threads: Vec<kick::Thread>,
    /// One for each vCPU.
    slots: Vec<Slot<V>>,
}

/// What concerns one vCPU.
struct Slot<V> {
    /// Its thread waits for the end of the pause.
    parked: bool,
    /// Its thread performs a job.
    busy: bool,
    jobs: VecDeque<Job<V>>,
}

impl<V> Default for Slot<V> {
    fn default() -> Self {
        Self {
            parked: false,
            busy: false,
            jobs: VecDeque::new(),
        }
    }
}

impl<V> fmt::Debug for Slot<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("parked", &self.parked)
            .field("busy", &self.busy)
            .field("jobs", &self.jobs.len())
            .finish()
    }
}

impl<V> Inner<V> {
    fn parked(&self) -> usize {
        self.slots.iter().filter(|slot| slot.parked).count()
    }
}

impl Control {
    /// State of a machine with `vcpus` vCPUs. It starts paused.
    pub fn new(vcpus: usize) -> io::Result<Self> {
        Self::of(vcpus)
    }
}

impl<V> Control<V> {
    /// As [`Control::new`], for threads that own something else.
    pub fn of(vcpus: usize) -> io::Result<Self> {
        Ok(Self {
            state: AtomicU8::new(RunState::Paused as u8),
            held: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                state: RunState::Paused,
                holds: 0,
                outcome: None,
                threads: Vec::new(),
                slots: (0..vcpus).map(|_| Slot::default()).collect(),
            }),
            changed: Condvar::new(),
            ended: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            vcpus,
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the vCPUs are to do now.
    pub fn state(&self) -> RunState {
        match self.state.load(Ordering::Acquire) {
            0 => RunState::Running,
            1 => RunState::Paused,
            _ => RunState::Ended,
        }
    }

    fn set(&self, inner: &mut Inner<V>, state: RunState) {
        inner.state = state;
        if state != RunState::Paused {
            // Whoever waits for them learns it by that.
            for slot in &mut inner.slots {
                slot.jobs.clear();
            }
        }
        self.state.store(state as u8, Ordering::Release);
        self.changed.notify_all();
    }

    /// Takes all vCPUs out of the guest for a while; does not wait until they are out.
    pub(super) fn hold(&self, inner: &mut Inner<V>) {
        inner.holds += 1;
        self.held.store(true, Ordering::Release);
        for thread in &inner.threads {
            thread.kick();
        }
    }

    /// Ends one [hold](Self::hold).
    pub(super) fn release(&self, inner: &mut Inner<V>) {
        inner.holds = inner.holds.saturating_sub(1);
        self.held.store(inner.holds > 0, Ordering::Release);
        self.changed.notify_all();
    }

    /// Ends the guest. The first outcome counts. Returns at once; callable from any thread, also a vCPU's.
    pub fn finish(&self, outcome: Outcome) {
        let mut inner = self.lock();
        if inner.outcome.is_some() {
            return;
        }
        inner.outcome = Some(outcome);
        self.set(&mut inner, RunState::Ended);
        for thread in &inner.threads {
            thread.kick();
        }
        // Cannot fail: the counter is not full.
        let _ = self.ended.write(1);
    }

    /// How the guest ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.lock().outcome.clone()
    }

    /// Readable from the moment the guest has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// Takes all vCPUs out of the guest and waits until they are out. No effect on a paused machine.
    ///
    /// A kicked vCPU leaves the guest in microseconds, but it can hang in the host's kernel or in an access to a device
    /// that waits. If one is not out within `patience`, a machine that ran goes on running.
    pub fn pause(&self, patience: Duration) -> Result<(), ControlError> {
        let deadline = Instant::now() + patience;
        let mut inner = self.lock();
        let ran = inner.state == RunState::Running;
        if ran {
            self.set(&mut inner, RunState::Paused);
            for thread in &inner.threads {
                thread.kick();
            }
        }
        while inner.state == RunState::Paused && inner.parked() < self.vcpus {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let vcpus = self.vcpus - inner.parked();
                if ran {
                    self.set(&mut inner, RunState::Running);
                }
                return Err(ControlError::Stuck { vcpus, patience });
            }
            inner = self.wait_at_most(inner, left);
        }
        match inner.state {
            RunState::Ended => Err(ControlError::Ended),
            RunState::Paused | RunState::Running => Ok(()),
        }
    }

    pub(super) fn wait_at_most<'a>(
        &self,
        inner: MutexGuard<'a, Inner<V>>,
        limit: Duration,
    ) -> MutexGuard<'a, Inner<V>> {
        self.changed
            .wait_timeout(inner, limit)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    pub(super) fn wait<'a>(&self, inner: MutexGuard<'a, Inner<V>>) -> MutexGuard<'a, Inner<V>> {
        self.changed
            .wait(inner)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets all vCPUs run. No effect on a running machine.
    ///
    /// Jobs that have begun are waited for, so that no vCPU runs while another one is looked at; others are called off.
    pub fn resume(&self) -> Result<(), ControlError> {
        let mut inner = self.lock();
        while inner.state == RunState::Paused && inner.slots.iter().any(|slot| slot.busy) {
            inner = self.wait(inner);
        }
        match inner.state {
            RunState::Ended => Err(ControlError::Ended),
            RunState::Paused | RunState::Running => {
                self.set(&mut inner, RunState::Running);
                Ok(())
            }
        }
    }

    /// Has the thread of vCPU `id` run `job` on its vCPU, and returns the result. For a machine that is paused, also one
    /// that never ran. Not to be called from a job.
    ///
    /// The vCPU is at rest: the access of its last exit is complete.
    pub fn on_vcpu<R: Send + 'static>(
        &self,
        id: usize,
        job: impl FnOnce(&mut V) -> R + Send + 'static,
    ) -> Result<R, ControlError> {
        let result = self.submit(id, job)?;
        self.result(&result)
    }

    /// Has the threads of all vCPUs run `job` at the same time, each on its own; it is given the vCPU's number. Returns
    /// the results in the order of the vCPUs. See [`Self::on_vcpu`].
    pub fn on_all<R: Send + 'static>(
        &self,
        job: impl Fn(usize, &mut V) -> R + Send + Sync + 'static,
    ) -> Result<Vec<R>, ControlError> {
        let job = Arc::new(job);
        let submitted: Result<Vec<_>, _> = (0..self.vcpus)
            .map(|id| {
                let job = Arc::clone(&job);
                self.submit(id, move |vcpu| job(id, vcpu))
            })
            .collect();
        submitted?.iter().map(|one| self.result(one)).collect()
    }

    fn submit<R: Send + 'static>(
        &self,
        id: usize,
        job: impl FnOnce(&mut V) -> R + Send + 'static,
    ) -> Result<Receiver<R>, ControlError> {
        let deadline = Instant::now() + START;
        let (sender, receiver) = sync_channel(1);
        let job: Job<V> = Box::new(move |vcpu| {
            // Fails only if nobody waits any more.
            let _ = sender.send(job(vcpu));
        });
        let mut inner = self.lock();
        loop {
            self.check_paused(&inner)?;
            let slot = inner
                .slots
                .get_mut(id)
                .ok_or(ControlError::NoSuchVcpu(id))?;
            if slot.parked {
                slot.jobs.push_back(job);
                self.changed.notify_all();
                return Ok(receiver);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ControlError::NotStarted(id));
            }
            inner = self.wait_at_most(inner, left);
        }
    }

    /// Waits for the end of a job. It may have been called off.
    fn result<R>(&self, job: &Receiver<R>) -> Result<R, ControlError> {
        job.recv().or_else(|_| {
            self.check_paused(&self.lock())?;
            // Paused again in between, or the thread is gone.
            Err(ControlError::Running)
        })
    }

    fn check_paused(&self, inner: &Inner<V>) -> Result<(), ControlError> {
        match inner.state {
            RunState::Paused => Ok(()),
            RunState::Running => Err(ControlError::Running),
            RunState::Ended => Err(ControlError::Ended),
        }
    }

    /// Registers the calling thread as a vCPU's until the result is dropped.
    pub fn enter(&self) -> Membership<'_, V> {
        let thread = kick::Thread::current();
        self.lock().threads.push(thread);
        Membership {
            control: self,
            thread,
        }
    }

    /// Waits while the vCPUs of a running machine are to stand still. For vCPU threads, before every entry into the guest.
    pub fn stand_still(&self) {
        if !self.held.load(Ordering::Acquire) {
            return;
        }
        let mut inner = self.lock();
        while inner.holds > 0 && inner.state == RunState::Running {
            inner = self.wait(inner);
        }
    }

    /// Waits as long as the machine is paused, and meanwhile runs the jobs that come for vCPU `id`. For vCPU threads.
    pub fn park_while_paused(&self, id: usize, vcpu: &mut V) {
        let mut inner = self.lock();
        while inner.state == RunState::Paused {
            let Some(slot) = inner.slots.get_mut(id) else {
                return;
            };
            if let Some(job) = slot.jobs.pop_front() {
                slot.busy = true;
                drop(inner);
                job(vcpu);
                inner = self.lock();
                if let Some(slot) = inner.slots.get_mut(id) {
                    slot.busy = false;
                }
                self.changed.notify_all();
                continue;
            }
            if !slot.parked {
                slot.parked = true;
                self.changed.notify_all();
            }
            inner = self.wait(inner);
        }
        if let Some(slot) = inner.slots.get_mut(id) {
            slot.parked = false;
        }
    }
}

/// While it lives, its thread is kicked when the state changes.
#[derive(Debug)]
pub struct Membership<'a, V = VcpuFd> {
    control: &'a Control<V>,
    thread: kick::Thread,
}

impl<V> Drop for Membership<'_, V> {
    fn drop(&mut self) {
        // Under the lock, so that no thread is kicked after it has gone.
        self.control.lock().threads.retain(|t| *t != self.thread);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const LONG: Duration = Duration::from_secs(60);

    /// Threads that do what vCPU threads do, with sleeping in place of the guest.
    ///
    /// What each owns is a number: how often it was in the guest.
    pub(crate) fn vcpus(
        control: &Arc<Control<u32>>,
        count: usize,
    ) -> Vec<std::thread::JoinHandle<u32>> {
        kick::install().unwrap();
        (0..count)
            .map(|id| {
                let control = Arc::clone(control);
                std::thread::spawn(move || {
                    let _membership = control.enter();
                    let mut rounds = 0;
                    loop {
                        control.stand_still();
                        match control.state() {
                            RunState::Running => {
                                rounds += 1;
                                std::thread::sleep(Duration::from_millis(1));
                            }
                            RunState::Paused => control.park_while_paused(id, &mut rounds),
                            RunState::Ended => return rounds,
                        }
                    }
                })
            })
            .collect()
    }

    #[test]
    fn the_first_outcome_counts() {
        let control = Control::<u32>::of(0).unwrap();
        control.finish(Outcome::Panic);
        control.finish(Outcome::PowerOff);
        assert_eq!(control.outcome(), Some(Outcome::Panic));
        assert_eq!(control.ended().read().unwrap(), 1);
    }

    #[test]
    fn a_machine_is_paused_when_all_vcpus_are_out() {
        let control = Arc::new(Control::<u32>::of(3).unwrap());
        let threads = vcpus(&control, 3);
        for _ in 0..20 {
            control.resume().unwrap();
            control.pause(LONG).unwrap();
            assert_eq!(control.lock().parked(), 3);
        }
        control.resume().unwrap();
        control.finish(Outcome::PowerOff);
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(control.lock().threads.is_empty());
    }

    #[test]
    fn a_vcpu_that_does_not_come_out_ends_the_pause_and_the_machine_runs_on() {
        let control = Arc::new(Control::<u32>::of(3).unwrap());
        let threads = vcpus(&control, 2);
        control.resume().unwrap();
        let patience = Duration::from_millis(50);
        let stuck = ControlError::Stuck { vcpus: 1, patience };
        assert_eq!(control.pause(patience), Err(stuck));
        assert_eq!(control.state(), RunState::Running);
        control.finish(Outcome::PowerOff);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn pausing_ends_when_the_guest_does() {
        let control = Arc::new(Control::<u32>::of(1).unwrap());
        control.resume().unwrap();
        let other = Arc::clone(&control);
        let pausing = std::thread::spawn(move || other.pause(LONG));
        control.finish(Outcome::Panic);
        assert_eq!(pausing.join().unwrap(), Err(ControlError::Ended));
        assert_eq!(control.resume(), Err(ControlError::Ended));
    }

    pub(crate) fn end(control: &Control<u32>, threads: Vec<std::thread::JoinHandle<u32>>) {
        control.finish(Outcome::PowerOff);
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn jobs_run_on_the_vcpus_of_a_machine_that_never_ran() {
        let control = Arc::new(Control::<u32>::of(3).unwrap());
        let early = Arc::clone(&control);
        // Before there is a thread.
        let waiting = std::thread::spawn(move || early.on_vcpu(1, |rounds| *rounds));
        let threads = vcpus(&control, 3);
        assert_eq!(waiting.join().unwrap(), Ok(0));
        control
            .on_all(|id, rounds| *rounds += 1000 * id as u32)
            .unwrap();
        assert_eq!(control.on_all(|_, rounds| *rounds), Ok(vec![0, 1000, 2000]));
        assert_eq!(control.on_vcpu(3, |_| ()), Err(ControlError::NoSuchVcpu(3)));
        end(&control, threads);
    }

    #[test]
    fn jobs_run_on_the_threads_of_their_vcpus_while_all_are_out() {
        let control = Arc::new(Control::<u32>::of(2).unwrap());
        let threads = vcpus(&control, 2);
        for _ in 0..20 {
            control.resume().unwrap();
            control.pause(LONG).unwrap();
            let before = control.on_all(|_, rounds| *rounds).unwrap();
            let ran_on = control.on_all(|_, _| std::thread::current().id()).unwrap();
            let expected: Vec<_> = threads.iter().map(|t| t.thread().id()).collect();
            assert_eq!(ran_on, expected);
            assert_eq!(control.on_all(|_, rounds| *rounds), Ok(before));
        }
        end(&control, threads);
    }

    #[test]
    fn a_machine_that_runs_or_ended_takes_no_jobs() {
        let control = Arc::new(Control::<u32>::of(1).unwrap());
        let threads = vcpus(&control, 1);
        control.resume().unwrap();
        assert_eq!(control.on_vcpu(0, |_| ()), Err(ControlError::Running));
        assert_eq!(control.on_all(|_, _| ()), Err(ControlError::Running));
        end(&control, threads);
        assert_eq!(control.on_vcpu(0, |_| ()), Err(ControlError::Ended));
    }

    #[test]
    fn resuming_waits_for_the_job_that_began_and_calls_off_the_next() {
        let control = Arc::new(Control::<u32>::of(2).unwrap());
        let threads = vcpus(&control, 2);
        control.pause(LONG).unwrap();
        let (began, has_begun) = sync_channel(0);
        let (finish, may_finish) = sync_channel::<()>(0);
        let job = move |_: &mut u32| {
            began.send(()).unwrap();
            may_finish.recv().unwrap();
        };
        let first = Arc::clone(&control);
        let first = std::thread::spawn(move || first.on_vcpu(0, job));
        has_begun.recv().unwrap();
        let next = control.submit(0, |_| ()).unwrap();

        let resuming = Arc::clone(&control);
        let resuming = std::thread::spawn(move || resuming.resume());
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(control.state(), RunState::Paused);
        // Only now may it end, and be followed by the other or not.
        finish.send(()).unwrap();
        assert_eq!(first.join().unwrap(), Ok(()));
        assert_eq!(resuming.join().unwrap(), Ok(()));
        let next = control.result(&next);
        assert!(
            matches!(next, Ok(()) | Err(ControlError::Running)),
            "{next:?}"
        );
        end(&control, threads);
    }

    #[test]
    fn the_end_of_the_guest_calls_jobs_off() {
        let control = Arc::new(Control::<u32>::of(1).unwrap());
        let threads = vcpus(&control, 1);
        control.pause(LONG).unwrap();
        let (finish, may_finish) = sync_channel::<()>(0);
        let (began, has_begun) = sync_channel(0);
        let job = move |_: &mut u32| {
            began.send(()).unwrap();
            may_finish.recv().unwrap();
        };
        let first = control.submit(0, job).unwrap();
        has_begun.recv().unwrap();
        let next = control.submit(0, |_| ()).unwrap();
        control.finish(Outcome::PowerOff);
        finish.send(()).unwrap();
        assert_eq!(control.result(&first), Ok(()));
        assert_eq!(control.result(&next), Err(ControlError::Ended));
        end(&control, threads);
    }
}
