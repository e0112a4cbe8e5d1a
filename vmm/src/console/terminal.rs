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
        let stdin = rustix::stdio::stdin();
        let before = termios::tcgetattr(stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        // Our own messages still get their carriage returns.
        raw.output_modes |= OutputModes::OPOST;
        let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
        // Saved first: if we die in between, the mode is restored to what it is.
        saved.get_or_insert(before);
        termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self(())))
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
