//! Guests that are moved, and what they say of their clock.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::super::size::Mib;
use super::Plan;
use crate::process::Monitor;

/// How long anything may take. A bound on waiting, not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// How long a guest that runs may be silent.
pub const BEAT_PATIENCE: Duration = Duration::from_secs(60);
pub const CPUS: u32 = 2;
/// The longest pause that is asked for, in milliseconds.
pub const DOWNTIME_MS: u64 = 100;
const DISK: u64 = 16 << 20;
/// What a guest says of its clock.
const BEAT: &str = "tern-guest: beat ";

/// What a guest does meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    Idle,
    /// Writes to a working set.
    Writes,
}

/// One kind of guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    pub size: Mib,
    pub work: Work,
    pub vfs: u32,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let work = match self.work {
            Work::Idle => "idle",
            Work::Writes => "writes",
        };
        write!(f, "{}, {work}", self.size)?;
        match self.vfs {
            0 => Ok(()),
            vfs => write!(f, ", {vfs} VFs"),
        }
    }
}

/// How memory gets to the other process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    HandedOver,
    Copied,
}

impl How {
    pub const ALL: [Self; 2] = [Self::HandedOver, Self::Copied];

    pub fn name(self) -> &'static str {
        match self {
            Self::HandedOver => "handed over",
            Self::Copied => "copied",
        }
    }
}

/// Where guests are, and what is done with them.
pub struct Bench<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    pub directory: &'a Path,
    pub plan: &'a Plan,
}

impl Bench<'_> {
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// A disk that is all zeroes.
    pub fn disk(&self, name: &str) -> Result<PathBuf> {
        let disk = self.path(name);
        File::create(&disk)
            .and_then(|file| file.set_len(DISK))
            .with_context(|| disk.display().to_string())?;
        Ok(disk)
    }

    /// The guest's kernel command line.
    pub fn line(&self, case: Case) -> String {
        let plan = self.plan;
        let mut line = "console=ttyS0 quiet panic=-1 tern.run=".to_owned();
        if case.vfs > 0 {
            line += &format!("sriov-enable:n={},", case.vfs);
        }
        line += &format!("memory-touch:mib={},beat", plan.touched(case.size).0);
        if case.work == Work::Writes {
            line += &format!(":mib={}:rate={}", plan.dirty.0, plan.rate);
        }
        line
    }
}

/// A monitor that can move its guest to another process.
pub trait Mover {
    fn name(&self) -> &'static str;

    /// Boots a guest; any that there was is gone.
    fn boot(&mut self, bench: &Bench<'_>, case: Case) -> Result<()>;

    /// Moves it to a new process.
    fn go(&mut self, bench: &Bench<'_>, how: How) -> Result<Move>;

    /// Ends it.
    fn end(&mut self);
}

/// What one move came to. Times are in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Move {
    pub total_us: f64,
    pub pause_us: f64,
    pub parts: Option<Parts>,
    pub gap: Gap,
    pub cpu_us: f64,
    pub sent: Option<Sent>,
    /// Of sending as many bytes.
    pub plain_us: Option<f64>,
}

/// Parts of a pause, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    pub stop: f64,
    pub state: f64,
    pub send: f64,
    pub restore: f64,
    pub resume: f64,
}

/// The longest time between two looks of a guest at its clock, in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    pub before_us: f64,
    pub around_us: f64,
}

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    pub bytes: u64,
    /// Bytes in pages of the first round that were not all zero.
    pub not_zero: Option<u64>,
}

/// The longest gap that the guest sees in half a second from now on.
pub fn beat_before(monitor: &mut Monitor) -> Result<f64> {
    monitor.skip();
    // The first one may be after the boot.
    beat(monitor, PATIENCE)?;
    beat(monitor, BEAT_PATIENCE)
}

/// The longest gap that it has seen since it said so last, at another process.
pub fn beat_after(monitor: &mut Monitor) -> Result<f64> {
    // The one that tells may wake up before the one that sees.
    Ok(beat(monitor, BEAT_PATIENCE)?.max(beat(monitor, BEAT_PATIENCE)?))
}

fn beat(monitor: &mut Monitor, patience: Duration) -> Result<f64> {
    let (_, line) = monitor.next_line(BEAT, patience)?;
    longest(&line)
}

fn longest(line: &str) -> Result<f64> {
    let value = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix("longest_us="));
    let value = value.and_then(|value| value.parse().ok());
    value.with_context(|| format!("no time in {line:?}"))
}

/// Waits until a socket is there.
pub fn await_socket(path: &Path, monitor: &mut Monitor) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !path.exists() {
        if let Some(why) = monitor.obituary() {
            anyhow::bail!(why);
        }
        ensure!(Instant::now() < deadline, "{} is not there", path.display());
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Removes a file that may not be there.
pub fn remove(path: &Path) {
    let _ = fs::remove_file(path);
}

pub fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_read() {
        let line = "tern-guest: beat 7 longest_us=1234 pages=0\r";
        assert_eq!(longest(line).unwrap(), 1234.0);
        assert!(longest("tern-guest: beat 7").is_err());
    }
}
