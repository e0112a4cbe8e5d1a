//! Init of the test guest: one static binary, driven by the kernel command line.
//!
//! It says that it runs, mounts what a system needs, loads the modules of the image, runs the scenarios that
//! `tern.run=` names, and powers the guest off, or resets it if one of them failed. What it finds goes to the console as lines that begin with
//! `tern-guest:`; see the README for all of them.

mod cmdline;
mod host;
mod kernel_log;
mod netlink;
mod pattern;
mod power;
mod scenario;
mod setup;
mod sys;
mod user;

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::process::ExitCode;

use rustix::system::RebootCommand;
use rustix::time::{ClockId, clock_gettime};

/// Why a scenario failed, in words for the one who reads the console.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

type Result<T> = std::result::Result<T, Failure>;

/// Puts what was being done in front of an error.
trait Context<T> {
    fn context(self, doing: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Failure(format!("{doing}: {error}")))
    }
}

/// Fails with this message unless the condition holds.
fn check(condition: bool, message: impl FnOnce() -> String) -> Result<()> {
    if condition {
        Ok(())
    } else {
        Err(Failure(message()))
    }
}

/// Prints one line, in one write, so that lines of several threads and of the kernel do not mix.
fn say(line: impl fmt::Display) {
    let mut text = format!("tern-guest: {line}").replace('\n', " ");
    text.push('\n');
    let mut console = io::stdout().lock();
    // A console that cannot be written to leaves nothing to say it on.
    let _ = console
        .write_all(text.as_bytes())
        .and_then(|()| console.flush());
}

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        eprintln!(
            "This is the init of tern's test guest, to be run by a kernel. See tests/guest/README.md."
        );
        return ExitCode::FAILURE;
    }
    // Before anything that could fail or take time: whoever measures a boot waits for this line.
    let now = clock_gettime(ClockId::Boottime);
    say(format_args!(
        "init uptime={}.{:03}",
        now.tv_sec,
        now.tv_nsec / 1_000_000
    ));
    let failed = match start() {
        Ok(failed) => failed,
        Err(why) => {
            say(format_args!("FAIL init {why}"));
            true
        }
    };
    // A monitor tells a reset from a power-off by its exit status: whoever reads only that learns of the failure too.
    let (status, how) = if failed {
        ("failed", RebootCommand::Restart)
    } else {
        ("ok", RebootCommand::PowerOff)
    };
    say(format_args!("done status={status}"));
    power::end(how)
}

/// Runs everything that was asked for; true if something of it failed.
fn start() -> Result<bool> {
    setup::mount_all()?;
    setup::load_modules()?;
    power::watch_button();
    let line = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    let scenarios = cmdline::scenarios(&line)?;
    for scenario in &scenarios {
        match scenario::run(scenario) {
            Ok(found) => say(format_args!("ok {}{found}", scenario.name)),
            Err(why) => {
                // What follows may rest on what just failed.
                say(format_args!("FAIL {} {why}", scenario.name));
                return Ok(true);
            }
        }
    }
    Ok(false)
}
