//! `tern` as a client of a running guest.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::vm::{PATIENCE, output, tern};

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
        // Before words that take whatever follows.
        output(self.command(verb, &[&["--json"], words].concat())?)
    }

    /// The same, expecting success: what it answers.
    pub fn ask(&self, verb: &str, words: &[&str]) -> Result<Value> {
        answer(&self.run(verb, words)?).with_context(|| format!("tern {verb} {words:?}"))
    }

    /// The same, expecting a refusal that says all of this.
    pub fn refuse(&self, verb: &str, words: &[&str], parts: &[&str]) -> Result<()> {
        refused(&self.run(verb, words)?, parts).with_context(|| format!("tern {verb} {words:?}"))
    }

    /// What `tern info` calls the state of the guest.
    pub fn state(&self) -> Result<String> {
        let info = self.ask("info", &[])?;
        Ok(info["state"].as_str().context("no state")?.to_owned())
    }

    /// Waits until the guest is in this state.
    pub fn await_state(&self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        // At first there may be no socket yet.
        while !self.state().is_ok_and(|state| state == wanted) {
            ensure!(Instant::now() < deadline, "the guest is not {wanted}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Ok(())
    }

    /// One request over HTTP, by `curl`: status and body.
    pub fn curl(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value)> {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--write-out", "\n%{http_code}"])
            .args(["--request", method, "--unix-socket"])
            .arg(&self.socket);
        if let Some(body) = body {
            command.args(["--data", &body.to_string()]);
            command.args(["--header", "Content-Type: application/json"]);
        }
        command.arg(format!("http://localhost{path}"));
        let text = String::from_utf8(output(command)?.stdout)?;
        let (body, code) = text.rsplit_once('\n').context("no status from curl")?;
        let body = match body.trim() {
            "" => Value::Null,
            json => serde_json::from_str(json).with_context(|| json.to_owned())?,
        };
        Ok((code.parse()?, body))
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

/// Fails unless the command failed and said all of this, in one message.
pub fn refused(output: &Output, parts: &[&str]) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    ensure!(matches!(code, Some(1 | 2)), "{}", shown(output));
    for part in parts {
        ensure!(said.contains(part), "no {part:?} in {}", shown(output));
    }
    Ok(())
}

fn shown(output: &Output) -> String {
    format!(
        "{}: {} {}",
        output.status,
        String::from_utf8_lossy(&output.stdout).trim(),
        String::from_utf8_lossy(&output.stderr).trim()
    )
}

/// Whether there is nothing called like this.
pub fn is_absent(path: &Path) -> bool {
    path.symlink_metadata().is_err()
}
