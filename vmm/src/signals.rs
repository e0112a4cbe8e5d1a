//! Signals as something the main loop can wait for.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd};
use std::ptr::null_mut;

/// The signals that end the process in order, with the terminal restored and nothing left behind.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// The ending signals, and SIGCONT, as a descriptor.
#[derive(Debug)]
pub struct Signals {
    file: File,
}

/// What arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The process is to end.
    End(i32),
    /// The process was stopped and continues: the terminal may have changed in between.
    Continued,
}

impl Signals {
    /// Blocks the signals in this thread and all threads it will start. Must be called before any is started.
    pub fn block() -> io::Result<Self> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is initialised by sigemptyset before its first use, and lives through all calls.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::sigaddset(set.as_mut_ptr(), libc::SIGCONT);
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// Lets the ending signals do what they do by default, which is to end the process: from now on nobody waits for
    /// them. Those that have arrived by now are forgotten. Must be called in the thread that called [`Self::block`].
    pub fn release(mut self) -> io::Result<()> {
        while self.take().is_some() {}
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is initialised by sigemptyset before its first use, and lives through all calls.
        let error = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), null_mut())
        };
        match error {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// The next signal that arrived, if any.
    pub fn take(&mut self) -> Option<Signal> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        self.file.read_exact(&mut info).ok()?;
        let number = info.first_chunk().map(|n| u32::from_ne_bytes(*n))? as i32;
        Some(if number == libc::SIGCONT {
            Signal::Continued
        } else {
            Signal::End(number)
        })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether this thread blocks `signal`.
    fn is_blocked(signal: i32) -> bool {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `set` is initialised by pthread_sigmask before it is looked at.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), set.as_mut_ptr());
            libc::sigismember(set.as_ptr(), signal) == 1
        }
    }

    /// Sends `signal` to this thread.
    fn raise(signal: i32) {
        // SAFETY: no preconditions.
        assert_eq!(unsafe { libc::raise(signal) }, 0);
    }

    /// A thread of its own has a signal mask of its own.
    fn in_a_thread(test: fn()) {
        std::thread::spawn(test).join().unwrap();
    }

    #[test]
    fn signals_are_taken_and_not_delivered() {
        in_a_thread(|| {
            let mut signals = Signals::block().unwrap();
            assert_eq!(signals.take(), None);
            raise(libc::SIGTERM);
            assert_eq!(signals.take(), Some(Signal::End(libc::SIGTERM)));
            raise(libc::SIGCONT);
            assert_eq!(signals.take(), Some(Signal::Continued));
            assert_eq!(signals.take(), None);
        });
    }

    #[test]
    fn after_the_release_signals_end_the_process_and_earlier_ones_do_not() {
        in_a_thread(|| {
            let signals = Signals::block().unwrap();
            assert!(ENDING.into_iter().all(is_blocked));
            raise(libc::SIGTERM);
            raise(libc::SIGINT);
            signals.release().unwrap();
            assert!(!ENDING.into_iter().any(is_blocked));
        });
    }
}
