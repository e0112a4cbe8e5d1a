//! The state all vCPUs share: running, paused, ended and why.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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

/// State of the machine as its vCPUs see it. See the [module documentation](super).
#[derive(Debug)]
pub struct Control {
    /// A copy of `Inner::state`, which every entry into the guest reads without a lock.
    state: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
    ended: EventFd,
    vcpus: usize,
}

#[derive(Debug)]
struct Inner {
    state: RunState,
    outcome: Option<Outcome>,
    /// vCPU threads that can be kicked.
    threads: Vec<kick::Thread>,
    /// vCPU threads that wait for the end of the pause.
    parked: usize,
}

impl Control {
    /// State of a machine with `vcpus` vCPUs. It starts paused.
    pub fn new(vcpus: usize) -> io::Result<Self> {
        Ok(Self {
            state: AtomicU8::new(RunState::Paused as u8),
            inner: Mutex::new(Inner {
                state: RunState::Paused,
                outcome: None,
                threads: Vec::new(),
                parked: 0,
            }),
            changed: Condvar::new(),
            ended: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
            vcpus,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
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

    fn set(&self, inner: &mut Inner, state: RunState) {
        inner.state = state;
        self.state.store(state as u8, Ordering::Release);
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
        while inner.state == RunState::Paused && inner.parked < self.vcpus {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let vcpus = self.vcpus - inner.parked;
                if ran {
                    self.set(&mut inner, RunState::Running);
                }
                return Err(ControlError::Stuck { vcpus, patience });
            }
            inner = self
                .changed
                .wait_timeout(inner, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        match inner.state {
            RunState::Ended => Err(ControlError::Ended),
            RunState::Paused | RunState::Running => Ok(()),
        }
    }

    /// Lets all vCPUs run. No effect on a running machine.
    pub fn resume(&self) -> Result<(), ControlError> {
        let mut inner = self.lock();
        match inner.state {
            RunState::Ended => Err(ControlError::Ended),
            RunState::Paused | RunState::Running => {
                self.set(&mut inner, RunState::Running);
                Ok(())
            }
        }
    }

    /// Registers the calling thread as a vCPU's until the result is dropped.
    pub fn enter(&self) -> Membership<'_> {
        let thread = kick::Thread::current();
        self.lock().threads.push(thread);
        Membership {
            control: self,
            thread,
        }
    }

    /// Waits as long as the machine is paused. For vCPU threads.
    pub fn park_while_paused(&self) {
        let mut inner = self.lock();
        if inner.state != RunState::Paused {
            return;
        }
        inner.parked += 1;
        self.changed.notify_all();
        while inner.state == RunState::Paused {
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked -= 1;
    }
}

/// While it lives, its thread is kicked when the state changes.
#[derive(Debug)]
pub struct Membership<'a> {
    control: &'a Control,
    thread: kick::Thread,
}

impl Drop for Membership<'_> {
    fn drop(&mut self) {
        // Under the lock, so that no thread is kicked after it has gone.
        self.control.lock().threads.retain(|t| *t != self.thread);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    const LONG: Duration = Duration::from_secs(60);

    /// Threads that do what vCPU threads do, with sleeping in place of the guest.
    fn vcpus(control: &Arc<Control>, count: usize) -> Vec<std::thread::JoinHandle<u32>> {
        kick::install().unwrap();
        (0..count)
            .map(|_| {
                let control = Arc::clone(control);
                std::thread::spawn(move || {
                    let _membership = control.enter();
                    let mut rounds = 0;
                    loop {
                        match control.state() {
                            RunState::Running => {
                                rounds += 1;
                                std::thread::sleep(Duration::from_millis(1));
                            }
                            RunState::Paused => control.park_while_paused(),
                            RunState::Ended => return rounds,
                        }
                    }
                })
            })
            .collect()
    }

    #[test]
    fn the_first_outcome_counts() {
        let control = Control::new(0).unwrap();
        control.finish(Outcome::Panic);
        control.finish(Outcome::PowerOff);
        assert_eq!(control.outcome(), Some(Outcome::Panic));
        assert_eq!(control.ended().read().unwrap(), 1);
    }

    #[test]
    fn a_machine_is_paused_when_all_vcpus_are_out() {
        let control = Arc::new(Control::new(3).unwrap());
        let threads = vcpus(&control, 3);
        for _ in 0..20 {
            control.resume().unwrap();
            control.pause(LONG).unwrap();
            assert_eq!(control.lock().parked, 3);
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
        let control = Arc::new(Control::new(3).unwrap());
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
        let control = Arc::new(Control::new(1).unwrap());
        control.resume().unwrap();
        let other = Arc::clone(&control);
        let pausing = std::thread::spawn(move || other.pause(LONG));
        control.finish(Outcome::Panic);
        assert_eq!(pausing.join().unwrap(), Err(ControlError::Ended));
        assert_eq!(control.resume(), Err(ControlError::Ended));
    }
}
