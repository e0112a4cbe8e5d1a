//! A monitor that runs: what its guest said and when, and what memory and processor time it needs.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a guest may take to its first line. A bound on waiting, not a measurement.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running monitor; killed when dropped.
pub struct Monitor {
    child: Child,
    input: Option<ChildStdin>,
    /// Every line of its standard output, and when it was complete.
    lines: Receiver<(Instant, String)>,
    errors: Option<JoinHandle<String>>,
    /// Just before the process was made.
    pub began: Instant,
    /// From then to the line that was waited for first.
    pub took: Duration,
    /// The lines that were passed over.
    pub said: String,
    /// What is printed before each line that is read, if they are to be seen.
    pub shown: Option<&'static str>,
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Monitor {
    /// Starts `command` and waits until a line of its standard output contains `marker`.
    pub fn start(command: Command, marker: &str) -> Result<Self> {
        Self::start_within(command, marker, PATIENCE)
    }

    /// The same, with another bound on waiting.
    pub fn start_within(mut command: Command, marker: &str, patience: Duration) -> Result<Self> {
        command.stdin(Stdio::null());
        let mut monitor = Self::spawn(command)?;
        monitor.took = monitor.wait_for(marker, patience)? - monitor.began;
        Ok(monitor)
    }

    /// Starts `command` so that lines can be typed on its standard input.
    pub fn interactive(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped());
        Self::spawn(command)
    }

    fn spawn(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let began = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run {}", command.get_program().display()))?;
        let stdout = child.stdout.take().context("no standard output")?;
        let stderr = child.stderr.take().context("no standard error")?;
        let (tell, lines) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).split(b'\n');
            for line in lines.map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                // Reads on when nobody listens any more, so that the guest never waits for its console.
                let _ = tell.send((Instant::now(), line));
            }
        });
        let errors = thread::spawn(move || {
            let lines = BufReader::new(stderr).lines();
            lines.map_while(Result::ok).collect::<Vec<_>>().join("\n")
        });
        Ok(Self {
            input: child.stdin.take(),
            child,
            lines,
            errors: Some(errors),
            began,
            took: Duration::ZERO,
            said: String::new(),
            shown: None,
        })
    }

    /// Waits for a line that contains `marker`, after the last that was waited for; when it was complete.
    pub fn wait_for(&mut self, marker: &str, patience: Duration) -> Result<Instant> {
        self.next_line(marker, patience).map(|(at, _)| at)
    }

    /// The same; also the line.
    pub fn next_line(&mut self, marker: &str, patience: Duration) -> Result<(Instant, String)> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = self.lines.recv_timeout(left);
            if let (Ok((_, line)), Some(before)) = (&next, self.shown) {
                println!("{before}{}", line.trim_end());
            }
            match next {
                Ok((at, line)) if line.contains(marker) => return Ok((at, line)),
                Ok((_, line)) => {
                    self.said.push_str(&line);
                    self.said.push('\n');
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the monitor ended before {marker:?}\n{}", self.last_words())
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {marker:?} within {patience:?}\n{}", self.said)
                }
            }
        }
    }

    /// Passes over the lines that are there.
    pub fn skip(&mut self) {
        while let Ok((_, line)) = self.lines.try_recv() {
            self.said.push_str(&line);
            self.said.push('\n');
        }
    }

    /// User and system time of the process so far, in steps of 10 ms; also if it has ended, until that was looked at.
    pub fn cpu_time(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.child.id());
        let stat = fs::read_to_string(&path).context(path)?;
        cpu_time(&stat).with_context(|| stat)
    }

    /// Types a line on the console.
    pub fn type_line(&mut self, line: &str) -> Result<()> {
        let input = self.input.as_mut().context("its console has no input")?;
        writeln!(input, "{line}").context("typing on the console")
    }

    /// Waits for the end of the process.
    pub fn wait_for_end(&mut self, patience: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            thread::sleep(Duration::from_millis(5));
        }
        bail!("the monitor does not end within {patience:?}")
    }

    /// How the process ended and what it said, if it has ended.
    pub fn obituary(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        Some(format!(
            "the monitor ended ({status})\n{}",
            self.last_words()
        ))
    }

    /// Ends the process; what was said that nobody waited for.
    pub fn last_words(&mut self) -> String {
        self.kill();
        let mut words = std::mem::take(&mut self.said);
        while let Ok((_, line)) = self.lines.recv() {
            words.push_str(&line);
            words.push('\n');
        }
        if let Some(errors) = self.errors.take() {
            words.push_str(&errors.join().unwrap_or_default());
        }
        words
    }

    fn kill(&mut self) {
        // It may have ended on its own.
        let _ = self.child.kill();
        let _ = self.child.wait();
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

/// Processor time from `/proc/PID/stat`, whose unit is 10 ms for every x86 kernel.
fn cpu_time(stat: &str) -> Option<Duration> {
    // The name before it may have spaces.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(Duration::from_millis((ticks()? + ticks()?) * 10))
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

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

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

    #[test]
    fn processor_time_is_read() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 600 0 0 0 12 30 0 0 20 0 3 0 5 9 1";
        assert_eq!(cpu_time(stat), Some(Duration::from_millis(420)));
        assert_eq!(cpu_time("7 (a) S 1"), None);
        let monitor = Monitor::interactive(shell("exit 0")).unwrap();
        assert!(monitor.cpu_time().unwrap() < PATIENCE);
    }

    #[test]
    fn lines_are_waited_for_in_their_order() {
        let script = "echo a; echo ready; read line; echo got $line; exec sleep 60";
        let mut monitor = Monitor::interactive(shell(script)).unwrap();
        let ready = monitor.wait_for("ready", PATIENCE).unwrap();
        monitor.type_line("x").unwrap();
        let got = monitor.wait_for("got x", PATIENCE).unwrap();
        assert!(monitor.began <= ready && ready <= got);
        assert_eq!(monitor.said, "a\n");
        assert_eq!(monitor.obituary(), None);
        let error = monitor.wait_for("more", Duration::from_millis(10));
        assert!(error.unwrap_err().to_string().starts_with("no \"more\""));
    }

    #[test]
    fn a_monitor_that_ends_is_quoted() {
        let script = "echo said; echo why >&2; exit 3";
        let error = Monitor::start(shell(script), "ready").map(drop);
        let error = error.unwrap_err().to_string();
        assert_eq!(error, "the monitor ended before \"ready\"\nsaid\nwhy");
        let mut monitor = Monitor::interactive(shell(script)).unwrap();
        assert_eq!(monitor.wait_for_end(PATIENCE).unwrap().code(), Some(3));
        let obituary = monitor.obituary().unwrap();
        assert!(obituary.ends_with("said\nwhy"), "{obituary}");
    }
}
