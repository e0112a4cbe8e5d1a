//! Signals: those that end the process in order, as something to wait for, and those that mean a crash.
//!
//! | signals | what happens |
//! |---|---|
//! | every other that ends a process by default | taken from a descriptor: the guest ends, and the process in order |
//! | a crash: SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP, SIGSYS, SIGABRT | the terminal is restored, then the crash goes on |
//! | SIGPIPE, SIGXFSZ | ignored: errors of what is written to |
//! | SIGKILL, SIGSTOP | nobody can do anything about these |

#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::null_mut;
use std::sync::Once;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::SIGRTMIN;

/// The signals that end the process in order, with the terminal restored and nothing left behind; besides these, the
/// real-time signals.
const ENDING: [libc::c_int; 13] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    libc::SIGIO,
    libc::SIGPWR,
    libc::SIGSTKFLT,
];

/// The signals of a process that cannot go on.
const CRASHES: [libc::c_int; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGABRT,
];

/// Stack of the thread that watches during set-up.
const STACK: usize = 128 << 10;

/// All signals that end the process in order. The first real-time signal is not among them: it kicks vCPUs.
fn ending() -> impl Iterator<Item = libc::c_int> {
    ENDING.into_iter().chain(SIGRTMIN() + 1..=libc::SIGRTMAX())
}

/// A set of `signals`.
fn set_of(signals: impl Iterator<Item = libc::c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises `set`, before its first use.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

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
        // SAFETY: no preconditions.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let set = set_of(ending().chain([libc::SIGCONT]));
        // SAFETY: `set` is initialised and lives through both calls.
        let fd = unsafe {
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC)
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
        let set = set_of(ending());
        // SAFETY: `set` is initialised and lives through the call.
        match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, null_mut()) } {
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

    /// Calls `end` with the first ending signal, on a thread of its own, until [`Watch::finish`]: for the time in which
    /// nobody waits for signals, because work that can take long is done.
    ///
    /// A result that is dropped goes on watching until the end of the process.
    pub fn watch(mut self, end: impl FnOnce(i32) + Send + 'static) -> io::Result<Watch> {
        let done = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let told = done.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("signals".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                loop {
                    self.wait_or(&told)?;
                    while let Some(signal) = self.take() {
                        if let Signal::End(number) = signal {
                            end(number);
                            return Ok(self);
                        }
                    }
                    if told.read().is_ok() {
                        return Ok(self);
                    }
                }
            })?;
        Ok(Watch { thread, done })
    }

    /// Waits for a signal or `event`.
    fn wait_or(&self, event: &EventFd) -> io::Result<()> {
        // SAFETY: the descriptor is open as long as `event` lives, which is longer than the result is used.
        let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
        let mut fds =
            [self.file.as_fd(), event].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// See [`Signals::watch`].
#[derive(Debug)]
pub struct Watch {
    thread: JoinHandle<io::Result<Signals>>,
    done: EventFd,
}

impl Watch {
    /// Ends the watch. Signals that arrive from now on are for the caller to take.
    pub fn finish(self) -> io::Result<Signals> {
        self.done.write(1)?;
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that waits for signals ended")))
    }
}

/// What to do about each of [`CRASHES`] after [`on_crash`] did its part.
struct Crash {
    clean_up: UnsafeCell<fn()>,
    before: UnsafeCell<[MaybeUninit<libc::sigaction>; CRASHES.len()]>,
}

// SAFETY: written in `on_crash` alone, once, and an entry of `before` before the handler that reads it is installed.
unsafe impl Sync for Crash {}

static CRASH: Crash = Crash {
    clean_up: UnsafeCell::new(|| {}),
    before: UnsafeCell::new([const { MaybeUninit::uninit() }; CRASHES.len()]),
};

/// Has `clean_up` called when the process crashes, on whichever thread that is; the crash then takes its course.
///
/// `clean_up` runs in a signal handler, possibly in the middle of an allocation: it may do nothing but system calls.
/// The first call counts.
pub fn on_crash(clean_up: fn()) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: once, and before any handler is installed that reads it.
        unsafe { *CRASH.clean_up.get() = clean_up };
        for (index, signal) in CRASHES.into_iter().enumerate() {
            // SAFETY: all-zero is a valid sigaction; both pointers are to live values, of which `before` is written by
            // nobody else. A handler that runs between the two calls is that of another signal.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                // On the alternate stack: the stack may be what ran out.
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                let before = CRASH.before.get().cast::<libc::sigaction>().add(index);
                if libc::sigaction(signal, null_mut(), before) == 0 {
                    libc::sigaction(signal, &action, null_mut());
                }
            }
        }
    });
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: written before this handler was installed, and never again.
    unsafe { (*CRASH.clean_up.get())() };
    let Some(index) = CRASHES.iter().position(|s| *s == signal) else {
        return;
    };
    // SAFETY: the entry was written before this handler was installed; `info` is what the kernel passed, and
    // sigaction and raise may be called in handlers.
    unsafe {
        let before = CRASH.before.get().cast::<libc::sigaction>().add(index);
        if (*info).si_code > 0 {
            // The instruction is executed again after the return, and whoever was there before sees it.
            libc::sigaction(signal, before, null_mut());
        } else {
            // Sent: it does not come again by itself.
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
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
    use std::os::unix::thread::JoinHandleExt;

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
            assert!(ending().all(is_blocked));
            raise(libc::SIGTERM);
            raise(libc::SIGINT);
            signals.release().unwrap();
            assert!(!ending().any(is_blocked));
        });
    }

    #[test]
    fn the_kick_of_vcpus_and_the_stops_of_a_shell_end_nothing() {
        for signal in [SIGRTMIN(), libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU] {
            assert!(!ending().any(|s| s == signal), "{signal}");
        }
    }

    #[test]
    fn a_watch_ends_with_the_first_ending_signal_or_when_it_is_told() {
        in_a_thread(|| {
            let signals = Signals::block().unwrap();
            let quiet = signals.watch(|signal| panic!("{signal}")).unwrap();
            let signals = quiet.finish().unwrap();
            let (tell, told) = std::sync::mpsc::channel();
            let watch = signals.watch(move |signal| tell.send(signal).unwrap());
            let thread = watch.unwrap().thread;
            // SAFETY: the thread exists until it is joined.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGCONT) };
            // SAFETY: as above.
            unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
            assert_eq!(told.recv(), Ok(libc::SIGUSR1));
            thread.join().unwrap().unwrap();
        });
    }
}
