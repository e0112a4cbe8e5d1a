//! Live migration: guests under load that go on in another process.
//!
//! `TERN_ROUNDS` and `TERN_SEED` are those of the snapshot tests:
//!
//! ```sh
//! TERN_ROUNDS=50 cargo xtask test --e2e --timeout 7200 migrate::rounds
//! ```

mod announce;
mod control;
mod faults;
mod proxy;
pub mod rounds;
mod states;
mod tls;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::load::Guest;
use crate::vm::{Outcome, PATIENCE, Running, tern};

/// `tern run` whose guest was moved away.
const MOVED: i32 = 8;

pub fn trials() -> Vec<Trial> {
    [
        rounds::trials(),
        states::trials(),
        control::trials(),
        announce::trials(),
        faults::trials(),
        tls::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `tern receive` at the address, with the guest's console and a control socket.
fn receive(address: &str, socket: &Path, options: &[&str]) -> Result<Running> {
    let mut command = Command::new(tern()?);
    command
        .args(["receive", address, "--api-socket"])
        .arg(socket)
        .args(options);
    Running::start(command)
}

/// Waits until somebody listens at a Unix socket.
fn await_socket(path: &Path, process: &mut Running) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        process.expect_alive()?;
        ensure!(Instant::now() < deadline, "{} is not there", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A guest that was moved.
pub struct Moved {
    pub guest: Guest,
    /// How its former process ended.
    before: Outcome,
    /// What `tern migrate --json` said.
    answer: Value,
}

/// Moves a guest into a new process, whose files are in `directory`. `number` makes their names.
pub fn move_to(guest: Guest, directory: &Path, number: u32, options: &[&str]) -> Result<Moved> {
    move_as("running", guest, directory, number, options)
}

/// The same with a guest that is in this state.
fn move_as(
    state: &str,
    guest: Guest,
    directory: &Path,
    number: u32,
    options: &[&str],
) -> Result<Moved> {
    let path = directory.join(format!("move-{number}.sock"));
    let address = format!("unix:{}", path.display());
    let socket = directory.join(format!("api-{number}.sock"));
    let mut next = receive(&address, &socket, &[])?;
    await_socket(&path, &mut next)?;
    let words = [&[address.as_str()], options].concat();
    move_into(state, guest, next, socket, &words)
}

/// Moves a guest that is in this state into the process `next`, whose control socket is `socket`, with these words of
/// `tern migrate`.
fn move_into(
    state: &str,
    guest: Guest,
    next: Running,
    socket: PathBuf,
    words: &[&str],
) -> Result<Moved> {
    let answer = guest.control.ask("migrate", words).with_context(|| {
        format!(
            "the source says\n{}\nthe destination says\n{}",
            guest.vm.console(),
            next.console()
        )
    })?;
    let before = guest.vm.wait()?;
    before.expect_code(MOVED)?;
    ensure!(!before.stdout.contains("FAIL"), "{}", before.stdout);
    let mut guest = Guest::new(next, socket);
    guest.await_state(state).context("after the move")?;
    Ok(Moved {
        guest,
        before,
        answer,
    })
}
