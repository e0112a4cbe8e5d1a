//! The terminal of the real host while a session uses it.

use std::io;
use std::os::fd::AsFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::protocol::WindowSize;

/// Bytes that are typed to leave a session that answers to nothing else: Ctrl-], three times.
pub const ESCAPE: [u8; 3] = [0x1d; 3];

/// Size of the terminal behind `fd`.
#[must_use]
pub fn window_size(fd: impl AsFd) -> Option<WindowSize> {
    let size = tcgetwinsize(fd).ok()?;
    Some(WindowSize {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Standard input in raw mode, for as long as this lives.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches standard input to raw mode, so that every key goes to the machine.
    ///
    /// # Errors
    /// If standard input is not a terminal.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Flush drops what was typed for the machine and not read: it must not reach the shell.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
    }
}

/// Finds [`ESCAPE`] in what is typed, also when it comes in pieces.
#[derive(Debug, Default)]
pub struct EscapeWatch {
    seen: usize,
}

impl EscapeWatch {
    /// Whether the escape is complete after `typed`.
    pub fn feed(&mut self, typed: &[u8]) -> bool {
        for &byte in typed {
            self.seen = if byte == ESCAPE[0] { self.seen + 1 } else { 0 };
            if self.seen == ESCAPE.len() {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_is_found_in_pieces_and_not_in_other_text() {
        let mut watch = EscapeWatch::default();
        assert!(!watch.feed(b"\x1d\x1da\x1d"));
        assert!(!watch.feed(b"\x1d"));
        assert!(watch.feed(b"\x1d"));
    }
}
