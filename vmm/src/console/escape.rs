//! The escape sequences of the console: Ctrl-A, then one more key.

/// Ctrl-A.
const PREFIX: u8 = 1;

/// What is shown for Ctrl-A h.
pub const HELP: &str = "\n\
tern: Ctrl-A x      end the guest\n\
      Ctrl-A Ctrl-A send Ctrl-A to the guest\n\
      Ctrl-A h      show this help\n";

/// What was typed besides input for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// End the guest.
    Quit,
    /// Show [`HELP`].
    Help,
}

/// Separates commands from input. Remembers a prefix across calls.
#[derive(Debug, Default)]
pub struct Escape {
    prefixed: bool,
}

impl Escape {
    /// Appends to `input` what is for the guest; returns the commands among `typed`.
    ///
    /// A key that means nothing after the prefix goes to the guest, with the prefix before it.
    pub fn feed(&mut self, typed: &[u8], input: &mut Vec<u8>) -> Vec<Command> {
        let mut commands = Vec::new();
        for byte in typed {
            match (std::mem::take(&mut self.prefixed), *byte) {
                (false, PREFIX) => self.prefixed = true,
                (false, byte) | (true, byte @ PREFIX) => input.push(byte),
                (true, b'x' | b'X') => commands.push(Command::Quit),
                (true, b'h' | b'H' | b'?') => commands.push(Command::Help),
                (true, byte) => input.extend([PREFIX, byte]),
            }
        }
        commands
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_found_and_the_rest_passes() {
        type Case<'a> = (&'a [&'a [u8]], &'a [u8], &'a [Command]);
        let cases: [Case<'_>; 7] = [
            (&[b"abc"], b"abc", &[]),
            (&[b"a\x01xb"], b"ab", &[Command::Quit]),
            (&[b"\x01\x01"], b"\x01", &[]),
            (&[b"\x01", b"h"], b"", &[Command::Help]),
            (&[b"\x01c"], b"\x01c", &[]),
            (&[b"\x03\x04\x1c"], b"\x03\x04\x1c", &[]),
            (&[b"\x01\x01x"], b"\x01x", &[]),
        ];
        for (typed, input, commands) in cases {
            let (mut escape, mut got) = (Escape::default(), Vec::new());
            let found: Vec<_> = typed
                .iter()
                .flat_map(|part| escape.feed(part, &mut got))
                .collect();
            assert_eq!((&got[..], &found[..]), (input, commands), "{typed:?}");
        }
    }
}
