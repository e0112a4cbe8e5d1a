//! How commands that wait for a function learn that it came to rest: a service's virtqueue by an event that the I/O thread
//! watches, the monitor by a condition variable.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Wake;

/// See the [module documentation](self).
pub struct Wakeups {
    event: EventFd,
    /// How often a function came to rest while someone waited.
    count: Mutex<u64>,
    counted: Condvar,
}

impl Wakeups {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: EventFd::new(EFD_NONBLOCK)?,
            count: Mutex::new(0),
            counted: Condvar::new(),
        })
    }

    /// Signalled for each. Watched edge-triggered and never read.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// The count now, for [`Self::wait`].
    pub fn count(&self) -> u64 {
        *self.lock()
    }

    /// Waits until the count is no longer `seen`, or for as long as `patience`.
    pub fn wait(&self, seen: u64, patience: Duration) {
        let unchanged = |count: &mut u64| *count == seen;
        drop(
            self.counted
                .wait_timeout_while(self.lock(), patience, unchanged)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Wake for Wakeups {
    fn wake(&self) {
        *self.lock() += 1;
        self.counted.notify_all();
        // An eventfd refuses only when its counter is full, and then it is already signalled.
        let _ = self.event.write(1);
    }
}
