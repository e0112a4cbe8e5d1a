//! Snapshots: guests that go on, and go on again in another process.
//!
//! `TERN_ROUNDS` is how often the guests of `snapshot::rounds…` are saved and restored, which is few times unless it is set:
//!
//! ```sh
//! TERN_ROUNDS=50 cargo xtask test --e2e --timeout 7200 snapshot::rounds
//! ```

mod chain;
mod copies;
mod kill;
pub mod members;
mod reading;
mod refused;
mod rounds;
mod states;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::load::Guest;
use crate::vm::{Running, output, tern};

/// `tern run` whose guest was stopped by its snapshot.
const STOPPED: i32 = 6;

pub fn trials() -> Vec<Trial> {
    [
        states::trials(),
        rounds::trials(),
        members::trials(),
        copies::trials(),
        chain::trials(),
        reading::trials(),
        refused::trials(),
        kill::trials(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A path as an argument.
fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is no text")
}

/// Has a guest saved in this directory; what `tern snapshot --json` says.
fn save(guest: &Guest, directory: &Path, options: &[&str]) -> Result<Value> {
    let words = [&[text(directory)?], options].concat();
    let answer = guest.control.ask("snapshot", &words);
    let answer = answer.with_context(|| format!("the console says\n{}", guest.vm.console()))?;
    matches_the_schema(&directory.join("state.json"))?;
    Ok(answer)
}

/// Fails unless the schema in the tree describes the state in `file`.
fn matches_the_schema(file: &Path) -> Result<()> {
    const SCHEMA: &str = include_str!("../../../../resources/snapshot.schema.json");
    let validator = jsonschema::validator_for(&serde_json::from_str(SCHEMA)?)?;
    let state = serde_json::from_slice(&std::fs::read(file)?)?;
    let errors: Vec<_> = validator
        .iter_errors(&state)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    ensure!(errors.is_empty(), "{}: {errors:?}", file.display());
    Ok(())
}

/// `tern restore`, to be run.
fn restoring(directory: &Path, socket: &Path, options: &[&str]) -> Result<Command> {
    let mut command = Command::new(tern()?);
    command
        .arg("restore")
        .arg(directory)
        .arg("--api-socket")
        .arg(socket)
        .args(options);
    Ok(command)
}

/// Restores the guest of this directory in a new process.
fn restore(directory: &Path, socket: &Path, options: &[&str]) -> Result<Guest> {
    let vm = Running::start(restoring(directory, socket, options)?)?;
    Ok(Guest::new(vm, socket.to_owned()))
}

/// Saves a guest, which ends, and restores it in a new process with the same socket. The snapshot is gone afterwards
/// unless it is kept.
pub fn move_over(guest: Guest, directory: &Path, options: &[&str]) -> Result<Guest> {
    let socket = guest.control.socket.clone();
    save(&guest, directory, &["--stop"])?;
    let end = guest.vm.wait()?;
    end.expect_code(STOPPED)?;
    ensure!(!end.stdout.contains("FAIL"), "{}", end.stdout);
    let mut next = restore(directory, &socket, options)?;
    next.awake().context("after its restore")?;
    Ok(next)
}

/// Has `jq` evaluate this.
fn jq(file: &Path, filter: &str) -> Result<Value> {
    let mut command = Command::new("jq");
    command.arg("--compact-output").arg(filter).arg(file);
    crate::control::answer(&output(command)?).with_context(|| format!("jq {filter}"))
}

/// A number in an answer, by its names from the outside in.
fn number(answer: &Value, names: &[&str]) -> Result<u64> {
    let found = names.iter().try_fold(answer, |value, name| value.get(name));
    found
        .and_then(Value::as_u64)
        .with_context(|| format!("no number {} in {answer}", names.join(".")))
}
