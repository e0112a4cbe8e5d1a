//! A monitor being measured: when its guest said something, and what memory it needs for itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a guest may take to its first line. A bound on waiting, not a measurement.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running monitor; killed when dropped.
pub struct Monitor {
    child: Child,
    /// From just before the process was made to the line that was waited for.
    pub took: Duration,
    /// The lines before that one.
    pub said: String,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended on its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Monitor {
    /// Starts `command` and waits until a line of its standard output contains `marker`.
    pub fn start(command: Command, marker: &'static str) -> Result<Self> {
        Self::start_within(command, marker, PATIENCE)
    }

    /// The same, with another bound on waiting.
    pub fn start_within(
        mut command: Command,
        marker: &'static str,
        patience: Duration,
    ) -> Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let (found, seen) = mpsc::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(stdout).split(b'\n');
            let mut text = String::new();
            for line in lines.by_ref().map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                if line.contains(marker) {
                    // Nobody listens any more only if the time was up.
                    let _ = found.send(Ok((Instant::now(), std::mem::take(&mut text))));
                    break;
                }
                text.push_str(&line);
                text.push('\n');
            }
            let _ = found.send(Err(text));
            // Goes on reading, so that the guest never waits for its console.
            lines.for_each(drop);
        });
        let errors = std::thread::spawn(move || {
            let lines = BufReader::new(stderr).lines();
            lines.map_while(Result::ok).collect::<Vec<_>>().join("\n")
        });
        let mut monitor = Self {
            child,
            took: Duration::ZERO,
            said: String::new(),
        };
        match seen.recv_timeout(patience) {
            Ok(Ok((at, said))) => {
                monitor.took = at - began;
                monitor.said = said;
                Ok(monitor)
            }
            Ok(Err(said)) => {
                drop(monitor);
                let errors = errors.join().unwrap_or_default();
                bail!("the monitor ended before {marker:?}\n{said}{errors}")
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                bail!("no {marker:?} within {patience:?}")
            }
        }
    }

    /// Resident KiB of the process that are not guest RAM.
    ///
    /// Guest RAM is every mapping of at least `guest_ram_kib` / 2: no monitor maps that much for anything else.
    pub fn own_kib(&self, guest_ram_kib: u64) -> Result<u64> {
        let path = format!("/proc/{}/smaps", self.child.id());
        let smaps = fs::read_to_string(&path).context(path)?;
        own_kib(&smaps, guest_ram_kib).context("smaps is not as expected")
    }
}

fn own_kib(smaps: &str, guest_ram_kib: u64) -> Option<u64> {
    let mut own = 0;
    let mut size = 0;
    let mut mappings = 0;
    for line in smaps.lines() {
        let value = |line: &str| line.split_whitespace().nth(1)?.parse::<u64>().ok();
        if line.starts_with("Size:") {
            size = value(line)?;
        } else if line.starts_with("Rss:") {
            mappings += 1;
            if size < guest_ram_kib / 2 {
                own += value(line)?;
            }
        }
    }
    (mappings > 0).then_some(own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_left_out() {
        let smaps = "\
7f00-7f10 rw-s 0 00:01 12 /memfd:ram
Size:             262144 kB
Rss:              100000 kB
5500-5501 r-xp 0 08:01 34 /usr/bin/monitor
Size:               4096 kB
Rss:                1024 kB
7ffe-7fff rw-p 0 00:00 0 [stack]
Size:                132 kB
Rss:                  16 kB
";
        assert_eq!(own_kib(smaps, 262_144), Some(1040));
        assert_eq!(own_kib("", 262_144), None);
    }
}
