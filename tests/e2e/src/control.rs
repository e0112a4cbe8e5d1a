//! `tern` as a client of a running guest.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::vm::tern;

/// The socket of a guest.
#[derive(Debug, Clone)]
pub struct Control {
    pub socket: PathBuf,
}

impl Control {
    /// `tern VERB --api-socket SOCKET WORDS…`, to be run.
    pub fn command(&self, verb: &str, words: &[&str]) -> Result<Command> {
        let mut command = Command::new(tern()?);
        command
            .arg(verb)
            .arg("--api-socket")
            .arg(&self.socket)
            .args(words)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// The same, with `--json`, run to its end.
    pub fn run(&self, verb: &str, words: &[&str]) -> Result<Output> {
        let mut command = self.command(verb, words)?;
        command.arg("--json").output().context("cannot run tern")
    }

    /// The same, expecting success: what it answers.
    pub fn ask(&self, verb: &str, words: &[&str]) -> Result<Value> {
        answer(&self.run(verb, words)?).with_context(|| format!("tern {verb} {words:?}"))
    }
}

/// What a command that succeeded wrote, as JSON.
pub fn answer(output: &Output) -> Result<Value> {
    ensure!(output.status.success(), "{}", shown(output));
    if output.stdout.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&output.stdout).with_context(|| shown(output))
}

fn shown(output: &Output) -> String {
    format!(
        "{}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}
