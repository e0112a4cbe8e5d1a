//! What commands say on standard output.
//!
//! `println!` ends the process if nobody reads that any more, with a status that says nothing of what was done before.

use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::atomic::{AtomicBool, Ordering};

/// Something could not be written, though somebody may want it.
static LOST: AtomicBool = AtomicBool::new(false);

/// Something was written.
static SAID: AtomicBool = AtomicBool::new(false);

/// A line on standard output, as with `println!`.
macro_rules! say {
    ($($part:tt)*) => {
        $crate::cli::print::line(format_args!($($part)*))
    };
}
pub(crate) use say;

/// Writes a line. What cannot be written is told on standard error, unless the reader has gone, who knows.
pub fn line(text: fmt::Arguments<'_>) {
    text_and(text, "\n");
}

/// Writes text that has its own line ends.
pub fn text(text: fmt::Arguments<'_>) {
    text_and(text, "");
}

fn text_and(text: fmt::Arguments<'_>, end: &str) {
    SAID.store(true, Ordering::Relaxed);
    let mut stdout = io::stdout().lock();
    let written = write!(stdout, "{text}{end}").and_then(|()| stdout.flush());
    if let Err(error) = written
        && error.kind() != ErrorKind::BrokenPipe
        && !LOST.swap(true, Ordering::Relaxed)
    {
        let _ = writeln!(
            io::stderr(),
            "tern: standard output cannot be written: {error}"
        );
    }
}

/// Whether something was written, or was to be.
pub fn has_said() -> bool {
    SAID.load(Ordering::Relaxed)
}

/// Whether something could not be written that somebody may want.
pub fn is_lost() -> bool {
    LOST.load(Ordering::Relaxed)
}
