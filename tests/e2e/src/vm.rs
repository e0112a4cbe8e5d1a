//! A `tern` process with a test guest in it, and what its console said.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long any guest may take before the test gives up on it. A bound on waiting: an emulated host that shares its
/// processor with another, and that with a second test, is slow, and a hang must still end.
pub const PATIENCE: Duration = Duration::from_secs(400);

/// Path of the monitor under test.
pub fn tern() -> Result<PathBuf> {
    Ok(std::env::var_os("TERN")
        .context("TERN must name the tern binary")?
        .into())
}

/// A file of the test image.
pub fn image(name: &str) -> Result<PathBuf> {
    let dir =
        std::env::var_os("TERN_IMAGES").context("TERN_IMAGES must name the image directory")?;
    let path = Path::new(&dir).join(name);
    ensure!(
        path.exists(),
        "{} is missing: run `cargo xtask image`",
        path.display()
    );
    Ok(path)
}

/// A `tern run` command line being put together.
pub struct Vm {
    kernel: &'static str,
    series: &'static str,
    scenario: String,
    parameters: &'static str,
    arguments: Vec<OsString>,
    patience: Duration,
}

impl Vm {
    /// Debian's 6.12 kernel, and a guest that runs `scenario`.
    pub fn new(scenario: impl Into<String>) -> Self {
        Self {
            kernel: "vmlinuz-6.12",
            series: "6.12",
            scenario: scenario.into(),
            parameters: "",
            arguments: Vec::new(),
            patience: PATIENCE,
        }
    }

    /// Boots `kernel`, of the series (6.12, 6.1) whose modules the initramfs must hold.
    pub fn kernel(mut self, kernel: &'static str, series: &'static str) -> Self {
        (self.kernel, self.series) = (kernel, series);
        self
    }

    /// Gives the kernel more parameters.
    pub fn parameters(mut self, parameters: &'static str) -> Self {
        self.parameters = parameters;
        self
    }

    /// Waits so long for the end: for a guest that sleeps longer than [`PATIENCE`] all in all.
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Adds command-line arguments.
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The command, without its standard streams.
    pub fn command(&self) -> Result<Command> {
        let mut command = Command::new(tern()?);
        command
            .arg("run")
            .arg("--kernel")
            .arg(image(self.kernel)?)
            .arg("--initrd")
            .arg(image(&format!("initramfs-{}.cpio", self.series))?)
            .arg("--cmdline")
            .arg(format!(
                "console=ttyS0 quiet panic=-1 {} tern.run={}",
                self.parameters, self.scenario
            ))
            .args(&self.arguments);
        Ok(command)
    }

    /// Starts the guest with its console on pipes.
    pub fn spawn(&self) -> Result<Running> {
        Running::start(self.command()?)
    }

    /// Runs the guest to its end, without input.
    pub fn run(&self) -> Result<Outcome> {
        let mut running = self.spawn()?;
        running.close_input();
        running.wait_for_end(self.patience)
    }

    /// Runs the guest to its end and expects it to power off with no scenario failed.
    pub fn run_ok(&self) -> Result<Outcome> {
        let outcome = self.run()?;
        outcome.expect_ok()?;
        Ok(outcome)
    }
}

/// Runs a command to its end, without input; fails if that does not come.
pub fn output(command: Command) -> Result<Output> {
    let mut running = Running::start(command)?;
    running.close_input();
    Ok(running.wait()?.into())
}

impl From<Outcome> for Output {
    fn from(outcome: Outcome) -> Self {
        Self {
            status: outcome.status,
            stdout: outcome.stdout.into_bytes(),
            stderr: outcome.stderr.into_bytes(),
        }
    }
}

/// A running process whose output is collected.
pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    stdout: Collector,
    stderr: Collector,
}

impl Running {
    /// Starts `command` with all three streams on pipes.
    pub fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let stdout = Collector::new(child.stdout.take().context("no stdout")?);
        let stderr = Collector::new(child.stderr.take().context("no stderr")?);
        Ok(Self {
            input: child.stdin.take(),
            child,
            stdout,
            stderr,
        })
    }

    /// Types `bytes` into the console.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.input.as_mut().context("input is closed")?;
        input.write_all(bytes)?;
        input.flush()?;
        Ok(())
    }

    /// Closes standard input.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Waits until the console shows `text` at or after byte `from`; returns the position after it.
    pub fn wait_for(&mut self, text: &str, from: usize) -> Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.stdout.text();
            if let Some(at) = seen.get(from..).and_then(|rest| rest.find(text)) {
                return Ok(from + at + text.len());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "tern ended ({status}) before the console showed {text:?}\n{seen}\n{}",
                    self.stderr.text()
                );
            }
            ensure!(
                Instant::now() < deadline,
                "the console did not show {text:?}\n{seen}\n{}",
                self.stderr.text()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Fails if the process has ended.
    pub fn expect_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!(
                "tern ended ({status})\n{}\n{}",
                self.stdout.text(),
                self.stderr.text()
            );
        }
        Ok(())
    }

    /// Everything the console showed so far.
    pub fn console(&self) -> String {
        self.stdout.text()
    }

    /// Sends a signal to the monitor.
    pub fn signal(&self, signal: rustix::process::Signal) -> Result<()> {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).context("pid")?;
        rustix::process::kill_process(pid, signal)?;
        Ok(())
    }

    /// Waits for the end of the process.
    pub fn wait(self) -> Result<Outcome> {
        self.wait_for_end(PATIENCE)
    }

    /// Waits for the end of the process, so long at most.
    pub fn wait_for_end(mut self, patience: Duration) -> Result<Outcome> {
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!(
                    "no end after {patience:?}\n{}\n{}",
                    self.stdout.text(),
                    self.stderr.text()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        Ok(Outcome {
            status,
            stdout: self.stdout.finish(),
            stderr: self.stderr.finish(),
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A test that failed leaves no guest behind; one that ended already refuses to be killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads a stream on a thread of its own, so that the process never blocks on a full pipe.
struct Collector {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: Option<JoinHandle<()>>,
}

impl Collector {
    fn new(mut stream: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut buffer) {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(buffer.get(..n).unwrap_or_default());
            }
        });
        Self {
            bytes,
            thread: Some(thread),
        }
    }

    fn text(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn finish(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            // The reader cannot panic, and its result is the buffer.
            let _ = thread.join();
        }
        self.text()
    }
}

/// How a process ended, and everything it said.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// The exit status as a shell shows it.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails unless the status is `code`.
    pub fn expect_code(&self, code: i32) -> Result<()> {
        ensure!(
            self.code() == code,
            "exit status {} instead of {code}\n{}\n{}",
            self.code(),
            self.stdout,
            self.stderr
        );
        Ok(())
    }

    /// Fails unless the guest powered off, ran at least one scenario, and none failed.
    pub fn expect_ok(&self) -> Result<()> {
        self.expect_code(0)?;
        ensure!(
            self.stdout.contains("tern-guest: ok ") && !self.stdout.contains("tern-guest: FAIL"),
            "the guest's scenario failed\n{}\n{}",
            self.stdout,
            self.stderr
        );
        Ok(())
    }

    /// The value of `key=` in the line `tern-guest: ok SCENARIO …`.
    pub fn value(&self, scenario: &str, key: &str) -> Result<String> {
        let prefix = format!("tern-guest: ok {scenario} ");
        self.stdout
            .lines()
            .filter_map(|line| line.trim_end().split_once(&prefix))
            .flat_map(|(_, rest)| rest.split_whitespace())
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .map(str::to_owned)
            .with_context(|| format!("no {key}= from {scenario}\n{}", self.stdout))
    }

    /// [`Self::value`] as a number.
    pub fn number(&self, scenario: &str, key: &str) -> Result<u64> {
        let value = self.value(scenario, key)?;
        value
            .parse()
            .with_context(|| format!("{scenario} {key}={value} is not a number"))
    }
}
