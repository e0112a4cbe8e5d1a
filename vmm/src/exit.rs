//! How a run of a guest ends, and what the process tells its parent about it.

use std::fmt;

/// The guest powered itself off.
pub const POWER_OFF: u8 = 0;
/// The host could not set the guest up: a missing file, a forbidden device, a refused allocation.
pub const SETUP: u8 = 1;
/// The command line or the configuration file is wrong.
pub const USAGE: u8 = 2;
/// The guest asked for a reset, or crashed so hard that the processor reset itself (triple fault).
pub const RESET: u8 = 3;
/// The guest's kernel panicked and said so through the panic device.
pub const PANIC: u8 = 4;
/// KVM could not go on running a vCPU.
pub const KVM_FAILURE: u8 = 5;
/// The guest was ended from outside: the escape sequence of the console, or a forced shutdown over the API.
pub const STOPPED: u8 = 6;

/// The guest powered itself off, but some of its console output was lost: a full disk, or a reader that went away.
pub const OUTPUT_LOST: u8 = 7;

/// The guest was moved to another process, and runs there.
pub const MOVED: u8 = 8;

/// The process ended while it was not known whether the guest it had given away runs elsewhere; also the answer of
/// `tern migrate` in that case.
pub const IN_DOUBT: u8 = 9;

/// `tern inspect A B` found that the two differ. No run ends like this.
pub const DIFFERENT: u8 = 10;

/// The table of exit statuses, as `tern run --help` prints it.
pub const TABLE: &str = "\
Exit status:
  0      the guest powered itself off
  1      the host could not set the guest up (missing file, forbidden device, unusable /dev/kvm, ...)
  2      the command line or the configuration file is wrong
  3      the guest asked for a reset, or triple-faulted
  4      the guest's kernel panicked and reported it through the panic device (Linux: module pvpanic-mmio;
         a guest without it that reboots on panic, as with panic=-1, ends with 3)
  5      KVM could not go on running a vCPU
  6      the guest was ended from outside: Ctrl-A x on the console, a forced shutdown over the API, or
         a snapshot that was to end it
  7      the guest powered itself off, but console output was lost (full disk, reader gone, ...); a warning
         said so when it began
  8      the guest was moved to another process, and runs there
  9      the guest was given to another process, and it was not known whether it runs there
  128+N  the process was ended by signal N";

/// Ends the process at once, whatever its other threads do: nothing is dropped and nothing waited for.
#[allow(unsafe_code)]
pub fn now(status: u8) -> ! {
    // SAFETY: no preconditions.
    unsafe { libc::_exit(status.into()) }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// See [`POWER_OFF`].
    PowerOff,
    /// See [`RESET`]; true if the processor reset itself.
    Reset {
        /// The vCPU hit a triple fault: no guest software asked for this.
        triple_fault: bool,
    },
    /// See [`PANIC`].
    Panic,
    /// See [`KVM_FAILURE`]: what KVM said, with the registers of the vCPU.
    KvmFailure(String),
    /// See [`STOPPED`]: who ended it.
    Stopped(&'static str),
    /// A signal ended the process.
    Signal(i32),
    /// See [`OUTPUT_LOST`]: which console, and why.
    OutputLost(String),
    /// See [`MOVED`]: where to.
    Moved(String),
    /// See [`IN_DOUBT`]: what ended the process.
    InDoubt(String),
}

impl Outcome {
    /// The outcome of a run whose guest ended like this and that lost console output for the reason `loss`, if it did.
    /// An end that is no success stays what it is.
    pub fn with_loss(self, loss: Option<&str>) -> Self {
        match (self, loss) {
            (Self::PowerOff, Some(reason)) => Self::OutputLost(reason.to_owned()),
            (outcome, _) => outcome,
        }
    }

    /// The exit status of the process.
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff => POWER_OFF,
            Self::Reset { .. } => RESET,
            Self::Panic => PANIC,
            Self::KvmFailure(_) => KVM_FAILURE,
            Self::Stopped(_) => STOPPED,
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(u8::MAX),
            Self::OutputLost(_) => OUTPUT_LOST,
            Self::Moved(_) => MOVED,
            Self::InDoubt(_) => IN_DOUBT,
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::Reset {
                triple_fault: false,
            } => f.write_str("the guest asked for a reset"),
            Self::Reset { triple_fault: true } => {
                f.write_str("the guest triple-faulted, which resets the processor")
            }
            Self::Panic => f.write_str("the guest's kernel panicked"),
            Self::KvmFailure(what) => f.write_str(what),
            Self::Moved(to) => write!(f, "the guest was moved to {to}, and runs there"),
            Self::InDoubt(what) => write!(
                f,
                "{what}, while it was not known whether the guest runs in the process it was given to"
            ),
            Self::Stopped(who) => write!(f, "the guest was ended by {who}"),
            Self::Signal(number) => write!(f, "ended by signal {number}"),
            Self::OutputLost(what) => {
                write!(
                    f,
                    "the guest powered off, but console output was lost: {what}"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_a_status_of_its_own() {
        let outcomes = [
            Outcome::PowerOff,
            Outcome::Reset {
                triple_fault: false,
            },
            Outcome::Panic,
            Outcome::KvmFailure(String::new()),
            Outcome::Stopped("x"),
            Outcome::Signal(15),
            Outcome::OutputLost(String::new()),
            Outcome::Moved(String::new()),
            Outcome::InDoubt(String::new()),
        ];
        let mut all: Vec<u8> = outcomes.iter().map(Outcome::status).collect();
        all.extend([SETUP, USAGE, DIFFERENT]);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 143]);
    }

    #[test]
    fn lost_output_spoils_success_alone() {
        let lost = Outcome::OutputLost("why".to_owned());
        assert_eq!(Outcome::PowerOff.with_loss(Some("why")), lost);
        assert_eq!(Outcome::PowerOff.with_loss(None), Outcome::PowerOff);
        assert_eq!(Outcome::Panic.with_loss(Some("why")), Outcome::Panic);
    }

    #[test]
    fn the_table_names_every_status() {
        for status in POWER_OFF..=IN_DOUBT {
            assert!(TABLE.contains(&format!("\n  {status}  ")), "{status}");
        }
    }
}
