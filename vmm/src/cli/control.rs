//! `tern info`, `pause`, `resume` and `shutdown`: clients of a running guest.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;

use super::info;
use crate::api::client::{ClientError, request};
use crate::api::{Info, Shutdown, State, Status};
use crate::cli::print::say;

/// How often a guest that shuts down is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Longest time that can be given: a year.
const MAX_SECONDS: u64 = 366 * 24 * 60 * 60;

const STATUS: &str = "\
Exit status: 0 it is so; 1 it is not, and why is said: there is no guest at the socket, or somebody else has it for himself; 2 the
command line is wrong.";
const ENDED: &str = "\
Exit status: 0 the guest has ended; 1 it still runs, or there is no guest at the socket; 2 the command line is wrong.";

/// The guest that is meant, and how to answer.
#[derive(Debug, Args)]
#[command(after_help = STATUS)]
pub struct Guest {
    /// Unix socket of the guest, as given to `tern run --api-socket`
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,

    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Guest {
    fn change(&self, what: &str) -> anyhow::Result<u8> {
        let target = format!("/api/v1/{what}");
        let status: Status = request(&self.api_socket, "PUT", &target, b"")?;
        self.answer(status)
    }

    fn answer(&self, status: Status) -> anyhow::Result<u8> {
        if self.json {
            say!("{}", serde_json::to_string(&status)?);
        }
        Ok(0)
    }

    /// Says what the guest is made of.
    pub fn info(&self) -> anyhow::Result<u8> {
        let info: Info = request(&self.api_socket, "GET", "/api/v1/info", b"")?;
        if self.json {
            say!("{}", serde_json::to_string(&info)?);
        } else {
            say!("{}", info::describe(&info));
        }
        Ok(0)
    }

    /// Stops the guest.
    pub fn pause(&self) -> anyhow::Result<u8> {
        self.change("pause")
    }

    /// Lets it run.
    pub fn resume(&self) -> anyhow::Result<u8> {
        self.change("resume")
    }
}

/// `tern shutdown`.
#[derive(Debug, Args)]
#[command(after_help = ENDED)]
pub struct ShutdownArgs {
    #[command(flatten)]
    guest: Guest,

    /// End the guest if it still runs after so many seconds; 0 ends it at once
    #[arg(long, value_name = "SECONDS", value_parser = seconds, allow_hyphen_values = true)]
    force_after: Option<u64>,

    /// Give up waiting for the end of the guest after so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds, allow_hyphen_values = true)]
    timeout: u64,
}

/// Reads a number of seconds.
fn seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|n| *n <= MAX_SECONDS);
    seconds.ok_or_else(|| format!("write a whole number of seconds from 0 to {MAX_SECONDS}"))
}

impl ShutdownArgs {
    /// Asks the guest to shut down and waits until it has.
    pub fn run(&self) -> anyhow::Result<u8> {
        let socket = &self.guest.api_socket;
        let body = serde_json::to_vec(&Shutdown {
            force_after_ms: self.force_after.map(|s| s * 1000),
        })?;
        let _: Status = request(socket, "PUT", "/api/v1/shutdown", &body)?;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(self.timeout) {
            match request::<Info>(socket, "GET", "/api/v1/info", b"") {
                Ok(info) if info.state != State::Ended => std::thread::sleep(LOOK),
                Ok(_) | Err(ClientError::Connect { .. }) => {
                    return self.guest.answer(Status {
                        state: State::Ended,
                    });
                }
                // The process went away during the request; the next look will tell.
                Err(ClientError::Io(_) | ClientError::Malformed(_)) => std::thread::sleep(LOOK),
                Err(error) => return Err(error.into()),
            }
        }
        bail!(
            "the guest still runs after {} s; it may ignore its power button (Linux: module button, and something \
             that acts on it). --force-after 0 ends it",
            self.timeout
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_whole_and_no_more_than_a_year() {
        assert_eq!((seconds("0"), seconds("60")), (Ok(0), Ok(60)));
        for text in ["-1", "abc", "1.5", "", "31622401", "18446744073709551615"] {
            assert!(
                seconds(text).unwrap_err().contains("from 0 to 31622400"),
                "{text}"
            );
        }
    }
}
