//! Raw mode of the terminal, and the way back.
//!
//! In raw mode every key goes to the guest, Ctrl-C included. The mode belongs to the terminal and outlives the process,
//! so it is undone on every way out that a process can take part in: [`restore`] is called by [`RawMode`] when it is
//! dropped, by the panic hook of the command line (release builds abort on panic and drop nothing), by the handler of
//! signals that mean a crash ([`crate::signals::on_crash`]) and before every exit of the process. Undoing it twice is
//! harmless.

#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::termios::{self, OptionalActions, OutputModes, Termios};

/// The mode before ours, and ours.
struct Modes {
    before: Termios,
    raw: Termios,
}

/// The modes, while ours is in force. No lock, because signal handlers read it; what it points to is never changed and
/// never freed.
static MODES: AtomicPtr<Modes> = AtomicPtr::new(null_mut());

/// Raw mode of standard input; undone when dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode if standard input is a terminal and this process is not in its background.
    pub fn enter() -> io::Result<Option<Self>> {
        if !is_terminal_of_ours() {
            return Ok(None);
        }
        let mode = Self(());
        mode.set()?;
        Ok(Some(mode))
    }

    /// Enters raw mode again after others may have changed the mode: a shell, while this process was stopped. What is
    /// restored in the end stays what was there before [`Self::enter`]. No effect in the background.
    pub fn reenter(&self) -> io::Result<()> {
        if is_terminal_of_ours() {
            self.set()?;
        }
        Ok(())
    }

    fn set(&self) -> io::Result<()> {
        let stdin = rustix::stdio::stdin();
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Our own messages still get their carriage returns.
        raw.output_modes |= OutputModes::OPOST;
        // Saved first: if we die in between, the mode is restored to what it is.
        if MODES.load(Ordering::Acquire).is_null() {
            let modes = Box::new(Modes {
                before,
                raw: raw.clone(),
            });
            MODES.store(Box::into_raw(modes), Ordering::Release);
        }
        Ok(termios::tcsetattr(stdin, OptionalActions::Now, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// True if standard input is a terminal that listens to this process.
fn is_terminal_of_ours() -> bool {
    let stdin = rustix::stdio::stdin();
    termios::isatty(stdin) && !is_background()
}

/// True if another process group has the terminal. A terminal that does not control this process, as after `setsid` or
/// in a container, has no background.
fn is_background() -> bool {
    match termios::tcgetpgrp(rustix::stdio::stdin()) {
        Ok(group) => group != rustix::process::getpgrp(),
        Err(rustix::io::Errno::NOTTY) => false,
        Err(_) => true,
    }
}

/// Brings the terminal back to the mode it had before [`RawMode::enter`].
///
/// In the background that is done only if the mode is still ours: otherwise somebody has taken care of it, and a program
/// in the foreground may have set its own. Allocates nothing and takes no lock: callable in a signal handler.
pub fn restore() {
    let saved = MODES.load(Ordering::Acquire);
    // SAFETY: null or from `Box::into_raw` in `RawMode::set`; such a value is never freed nor changed.
    let Some(modes) = (unsafe { saved.as_ref() }) else {
        return;
    };
    let stdin = rustix::stdio::stdin();
    let ours = || termios::tcgetattr(stdin).is_ok_and(|now| is_same(&now, &modes.raw));
    if !is_background() || ours() {
        without_sigttou(|| {
            let _ = termios::tcsetattr(stdin, OptionalActions::Now, &modes.before);
        });
    }
    // Only now: who dies on another thread in the meantime restores it once more.
    let _ = MODES.compare_exchange(saved, null_mut(), Ordering::AcqRel, Ordering::Relaxed);
}

fn is_same(one: &Termios, other: &Termios) -> bool {
    let flags = |mode: &Termios| {
        (
            mode.input_modes,
            mode.output_modes,
            mode.control_modes,
            mode.local_modes,
        )
    };
    flags(one) == flags(other)
}

/// Does `what` with SIGTTOU blocked, so that setting the terminal from the background is done instead of stopping us.
fn without_sigttou(what: impl FnOnce()) {
    let mut block = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: `block` is initialised by sigemptyset before its first use, `before` by the first pthread_sigmask before
    // the second; both live through all calls, which are safe in signal handlers.
    unsafe {
        libc::sigemptyset(block.as_mut_ptr());
        libc::sigaddset(block.as_mut_ptr(), libc::SIGTTOU);
        if libc::pthread_sigmask(libc::SIG_BLOCK, block.as_ptr(), before.as_mut_ptr()) != 0 {
            return what();
        }
        what();
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Command, Stdio};

    /// Tells the test that it is the process on the terminal.
    const ON_TERMINAL: &str = "TERN_TEST_ON_TERMINAL";

    fn local_modes() -> LocalModes {
        let mode = termios::tcgetattr(rustix::stdio::stdin()).unwrap();
        mode.local_modes & (LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn set_local_modes(modes: LocalModes) {
        let mut mode = termios::tcgetattr(rustix::stdio::stdin()).unwrap();
        mode.local_modes = modes;
        termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &mode).unwrap();
    }

    /// Makes the terminal on standard input the one of a new session, and this process its foreground.
    fn take_terminal() {
        rustix::process::setsid().unwrap();
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).unwrap();
    }

    fn give_foreground_to(group: rustix::process::Pid) {
        without_sigttou(|| termios::tcsetpgrp(rustix::stdio::stdin(), group).unwrap());
    }

    fn raw_mode_is_entered_again_and_undone() {
        take_terminal();
        let before = LocalModes::ICANON | LocalModes::ISIG;
        set_local_modes(before);

        let raw = RawMode::enter().unwrap().unwrap();
        assert_eq!(local_modes(), LocalModes::empty());
        // What a shell does when a job stops, and the job when it continues, twice.
        for _ in 0..2 {
            set_local_modes(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            raw.reenter().unwrap();
            assert_eq!(local_modes(), LocalModes::empty());
        }
        drop(raw);
        assert_eq!(local_modes(), before);
        restore();
        assert_eq!(local_modes(), before);
    }

    fn the_background_restores_what_is_its_own_and_does_not_stop() {
        take_terminal();
        let before = local_modes();
        let mut other = Command::new("sleep")
            .arg("60")
            .process_group(0)
            .spawn()
            .unwrap();
        let other_group = rustix::process::Pid::from_child(&other);
        for theirs in [None, Some(LocalModes::ECHO)] {
            let raw = RawMode::enter().unwrap().unwrap();
            give_foreground_to(other_group);
            assert!(RawMode::enter().unwrap().is_none());
            if let Some(modes) = theirs {
                without_sigttou(|| set_local_modes(modes));
            }
            drop(raw);
            assert_eq!(local_modes(), theirs.unwrap_or(before));
            give_foreground_to(rustix::process::getpgrp());
        }
        other.kill().unwrap();
        other.wait().unwrap();
    }

    /// Without a controlling terminal, which is no obstacle either.
    fn raw_mode_is_left_by_a_crash() {
        rustix::process::setsid().unwrap();
        crate::signals::on_crash(restore);
        let _raw = RawMode::enter().unwrap().unwrap();
        assert_eq!(local_modes(), LocalModes::empty());
        match std::env::var(ON_TERMINAL).unwrap().as_str() {
            "abort" => std::process::abort(),
            // SAFETY: no preconditions.
            "sent" => unsafe { libc::raise(libc::SIGSEGV) },
            // SAFETY: none; nothing is there, so that the processor refuses.
            _ => unsafe { std::ptr::with_exposed_provenance::<i32>(64).read_volatile() },
        };
    }

    /// Runs the test `name` in another process, on a terminal, and returns the terminal and how it ended.
    fn run_on_terminal(name: &str, how: &str) -> (std::os::fd::OwnedFd, std::process::Output) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(
            slave.as_c_str(),
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args([&format!("console::terminal::tests::{name}"), "--exact"])
            .env(ON_TERMINAL, how)
            .stdin(Stdio::from(slave))
            .output()
            .unwrap();
        (master, output)
    }

    /// Has a test run itself on a terminal, where it is `there`.
    fn passes_on_terminal(name: &str, there: fn()) {
        if std::env::var_os(ON_TERMINAL).is_some() {
            return there();
        }
        let (_terminal, output) = run_on_terminal(name, "");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("1 passed"), "{said}");
    }

    #[test]
    fn raw_mode_can_be_entered_again_and_is_undone_once() {
        passes_on_terminal(
            "raw_mode_can_be_entered_again_and_is_undone_once",
            raw_mode_is_entered_again_and_undone,
        );
    }

    #[test]
    fn a_process_in_the_background_restores_its_own_mode_only() {
        passes_on_terminal(
            "a_process_in_the_background_restores_its_own_mode_only",
            the_background_restores_what_is_its_own_and_does_not_stop,
        );
    }

    #[test]
    fn a_crash_restores_the_terminal_and_stays_a_crash() {
        if std::env::var_os(ON_TERMINAL).is_some() {
            return raw_mode_is_left_by_a_crash();
        }
        for (how, signal) in [
            ("abort", libc::SIGABRT),
            ("sent", libc::SIGSEGV),
            ("fault", libc::SIGSEGV),
        ] {
            let name = "a_crash_restores_the_terminal_and_stays_a_crash";
            let (terminal, output) = run_on_terminal(name, how);
            assert_eq!(output.status.signal(), Some(signal), "{output:?}");
            let mode = termios::tcgetattr(&terminal).unwrap().local_modes;
            assert!(
                mode.contains(LocalModes::ICANON | LocalModes::ECHO),
                "{how}"
            );
        }
    }
}
