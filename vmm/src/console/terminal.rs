//! Raw mode of the terminal, and the way back.
//!
//! In raw mode every key goes to the guest, Ctrl-C included. The mode belongs to the terminal and outlives the process,
//! so it is undone on every way out: [`restore`] is called by [`RawMode`] when it is dropped, by the panic hook of the
//! command line (release builds abort on panic and drop nothing) and before every exit of the process. Undoing it twice is harmless.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::termios::{self, OptionalActions, OutputModes, Termios};

/// The mode before ours, while ours is in force.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode of standard input; undone when dropped.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Enters raw mode if standard input is a terminal and this process is in its foreground.
    pub fn enter() -> io::Result<Option<Self>> {
        if !is_foreground_terminal() {
            return Ok(None);
        }
        let mode = Self(());
        mode.set()?;
        Ok(Some(mode))
    }

    /// Enters raw mode again after others may have changed the mode: a shell, while this process was stopped. What is
    /// restored in the end stays what was there before [`Self::enter`]. No effect in the background.
    pub fn reenter(&self) -> io::Result<()> {
        if is_foreground_terminal() {
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
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        // Saved first: if we die in between, the mode is restored to what it is.
        saved.get_or_insert(before);
        Ok(termios::tcsetattr(stdin, OptionalActions::Now, &raw)?)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// True if standard input is a terminal that listens to this process.
fn is_foreground_terminal() -> bool {
    let stdin = rustix::stdio::stdin();
    termios::isatty(stdin)
        && termios::tcgetpgrp(stdin).is_ok_and(|group| group == rustix::process::getpgrp())
}

/// Brings the terminal back to the mode it had before [`RawMode::enter`].
pub fn restore() {
    let mut saved = match SAVED.try_lock() {
        Ok(saved) => saved,
        Err(std::sync::TryLockError::Poisoned(saved)) => saved.into_inner(),
        // Only a panic inside this module can see this; there is nothing to restore yet.
        Err(std::sync::TryLockError::WouldBlock) => return,
    };
    if let Some(mode) = saved.take() {
        let _ = termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &mode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::LocalModes;
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

    fn on_terminal() {
        // Without the session, this is a process in the background of nothing.
        assert!(RawMode::enter().unwrap().is_none());
        rustix::process::setsid().unwrap();
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).unwrap();
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

    /// Runs itself in another process, whose standard input is a terminal.
    #[test]
    fn raw_mode_can_be_entered_again_and_is_undone_once() {
        if std::env::var_os(ON_TERMINAL).is_some() {
            return on_terminal();
        }
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(
            name.as_c_str(),
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        )
        .unwrap();
        let this = "console::terminal::tests::raw_mode_can_be_entered_again_and_is_undone_once";
        let output = Command::new(std::env::current_exe().unwrap())
            .args([this, "--exact"])
            .env(ON_TERMINAL, "1")
            .stdin(Stdio::from(slave))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("1 passed"), "{said}");
    }
}
