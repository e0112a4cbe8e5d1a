//! Running other programs, and telling the user what takes time.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::workspace;

/// A step that may take longer than a second. It is announced when it begins, and its time is told if it did.
pub struct Step {
    what: String,
    began: Instant,
}

impl Step {
    pub fn begin(what: impl Into<String>) -> Self {
        let what = what.into();
        eprintln!("xtask: {what} …");
        Self {
            what,
            began: Instant::now(),
        }
    }

    pub fn done(self) {
        let took = self.began.elapsed();
        if took > Duration::from_secs(1) {
            eprintln!("xtask: {} took {:.1} s", self.what, took.as_secs_f64());
        }
    }
}

/// Runs `input` through a program.
pub fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    let mut stdin = child
        .stdin
        .take()
        .with_context(|| format!("{program} has no standard input"))?;
    let output = std::thread::scope(|scope| {
        // A program that refuses its input stops reading it; its message says why.
        scope.spawn(move || stdin.write_all(input).ok());
        child.wait_with_output()
    })
    .with_context(|| format!("cannot run {program}"))?;
    ensure!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(output.stdout)
}

/// What a program prints.
pub fn output(program: &str, arguments: &[&str]) -> Result<String> {
    Ok(String::from_utf8_lossy(&filter(program, arguments, &[])?).into_owned())
}

/// Runs a command to its end, quietly: what it prints goes to `target/xtask/LOG.log`, whose end is shown on failure.
pub fn logged(log: &str, command: &mut Command) -> Result<()> {
    let path = log_file(log)?;
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        let text = fs::read_to_string(&path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(15)..].join("\n  | ");
        bail!(
            "{program} failed ({status}); the whole log is {}\n  | {end}",
            path.display()
        );
    }
    Ok(())
}

/// Runs a command to its end with this process's streams.
pub fn visible(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    ensure!(status.success(), "{program} failed ({status})");
    Ok(())
}

/// Whether a program is installed.
pub fn installed(program: &str) -> bool {
    machine::qemu::is_program(OsStr::new(program))
        // Not in an ordinary user's PATH.
        || ["/usr/sbin", "/sbin"].iter().any(|dir| machine::qemu::is_program(OsStr::new(&format!("{dir}/{program}"))))
}

/// Path of a log file, in a directory that exists.
pub fn log_file(name: &str) -> Result<PathBuf> {
    let directory = workspace::target()?.join("xtask");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    Ok(directory.join(format!("{name}.log")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filter_passes_more_than_a_pipe_holds() {
        let input: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        assert_eq!(filter("cat", &[], &input).unwrap(), input);
    }

    #[test]
    fn filter_reports_what_the_program_said() {
        let error = filter("sh", &["-c", "echo no luck >&2; exit 3"], &[]).unwrap_err();
        assert_eq!(error.to_string(), "sh: no luck");
    }

    #[test]
    fn programs_are_looked_for() {
        assert!(installed("sh"));
        assert!(!installed("no-such-program-anywhere"));
    }
}
