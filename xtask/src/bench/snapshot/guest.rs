//! Guests that are saved and restored.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::super::size::Mib;
use super::Plan;
use crate::process::Monitor;
use crate::tools;

/// What the guest says when it waits for a line, when it has written what it was to write, and when nothing is left to do.
const ASKS: &str = "tern-guest: type a line";
const TOUCHED: &str = "tern-guest: ok memory-touch";
pub const TICKS: &str = "tern-guest: tick";
/// The time between two ticks.
const TICK: Duration = Duration::from_secs(1);
/// How long anything may take. A bound on waiting, not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(1800);
/// How often is asked whether a guest runs.
pub const LOOK: Duration = Duration::from_millis(1);
pub const CPUS: u32 = 2;
const DISK: u64 = 16 << 20;
/// Exit status of a monitor whose guest was to end with its snapshot.
const STOPPED: i32 = 6;

/// What `tern snapshot --json` says.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Report {
    pub bytes: Bytes,
    pub pause_us: Pause,
    pub total_us: u64,
}

/// Bytes that were written.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Bytes {
    pub written_running: u64,
    pub written_paused: u64,
}

/// Parts of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Pause {
    pub total: u64,
    pub stop: u64,
    pub devices: u64,
    pub vcpus: u64,
    pub memory: u64,
}

/// How soon a restored guest went on.
#[derive(Clone, Copy, Debug)]
pub struct Restored {
    /// From exec until the control API says that it runs.
    pub running: Duration,
    /// From exec to its first line.
    pub output: Duration,
}

/// Where guests are made and saved.
pub struct Bench<'a> {
    pub tern: &'a Path,
    pub kernel: &'a Path,
    /// The same as an ELF image.
    pub elf_kernel: &'a Path,
    pub initrd: &'a Path,
    pub directory: &'a Path,
    pub plan: &'a Plan,
}

impl Bench<'_> {
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Boots a guest of this size that has touched its memory and waits to be told to write.
    pub fn boot(&self, size: Mib) -> Result<Guest<'_>> {
        let disk = self.path("disk.raw");
        File::create(&disk)
            .and_then(|file| file.set_len(DISK))
            .with_context(|| disk.display().to_string())?;
        let socket = self.path("api.sock");
        let scenarios = scenarios(self.plan.touched(size), self.plan.dirty, self.plan.rounds);
        let mut command = Command::new(self.tern);
        command.arg("run").arg("--kernel").arg(self.kernel);
        command.arg("--initrd").arg(self.initrd);
        let line = format!("console=ttyS0 quiet panic=-1 tern.run={scenarios}");
        command.args(["--cmdline", &line, "--cpus", &CPUS.to_string()]);
        command.args(["--memory", &size.to_string(), "--net", "switch=bench"]);
        command.args(["--disk", &format!("path={}", disk.display())]);
        command.arg("--api-socket").arg(&socket);
        let mut monitor = Monitor::interactive(command)?;
        monitor.wait_for(ASKS, PATIENCE)?;
        Ok(Guest {
            bench: self,
            monitor,
            socket,
        })
    }

    /// Goes on from a snapshot of a guest that ticks, until it does.
    pub fn restore(&self, directory: &Path, prefault: bool) -> Result<Restored> {
        let socket = self.path("restored.sock");
        let mut command = Command::new(self.tern);
        command.arg("restore").arg(directory);
        command.arg("--api-socket").arg(&socket);
        if prefault {
            command.arg("--prefault");
        }
        let mut monitor = Monitor::interactive(command)?;
        let ended = AtomicBool::new(false);
        let (output, running) = thread::scope(|scope| {
            let running = scope.spawn(|| running_since(&socket, &ended));
            let output = monitor.wait_for(TICKS, PATIENCE);
            ended.store(output.is_err(), Relaxed);
            (output, running.join())
        });
        let output = output?;
        let running = running.ok().flatten();
        let running = running.context("the API never said that the guest runs")?;
        Ok(Restored {
            running: running - monitor.began,
            output: output - monitor.began,
        })
    }
}

/// What a guest does: it touches memory; each time a line is typed it writes the same amount again; then it ticks. One round
/// does not count.
fn scenarios(touched: Mib, dirty: Mib, rounds: u32) -> String {
    let touch = |size: Mib| format!("memory-touch:mib={}", size.0);
    let round = format!("console-echo,{},", touch(dirty));
    let rounds = round.repeat(rounds as usize + 1);
    format!("{},{rounds}hang", touch(touched))
}

/// A guest that runs.
pub struct Guest<'a> {
    bench: &'a Bench<'a>,
    monitor: Monitor,
    socket: PathBuf,
}

impl Guest<'_> {
    /// Takes a snapshot.
    pub fn save(&mut self, directory: &Path, options: &[&str]) -> Result<Report> {
        self.ask(directory, options)
            .map_err(|error| match self.monitor.obituary() {
                Some(why) => error.context(why),
                None => error,
            })
    }

    /// Takes a snapshot, and asks all the time how far it is, which costs some: also the part of the total time, from 0 to 1,
    /// that was left when memory was written and the pause was over.
    pub fn save_watched(&mut self, directory: &Path) -> Result<(Report, f64)> {
        let ended = AtomicBool::new(false);
        let socket = self.socket.clone();
        let begun = Instant::now();
        let (report, after) = thread::scope(|scope| {
            let after = scope.spawn(|| after_pause(&socket, &ended));
            let report = self.save(directory, &[]);
            ended.store(true, Relaxed);
            (report, after.join())
        });
        let all = begun.elapsed().as_secs_f64();
        // A snapshot that was too quick to be seen has nothing left then.
        let left = after.ok().flatten();
        let left = left.map_or(0.0, |at| all - (at - begun).as_secs_f64());
        Ok((report?, left / all))
    }

    fn ask(&self, directory: &Path, options: &[&str]) -> Result<Report> {
        let tern = text(self.bench.tern)?;
        let words = ["snapshot", "--json", "--api-socket", text(&self.socket)?];
        let words = [&words, options, &[text(directory)?]].concat();
        let said = tools::output(tern, &words)?;
        serde_json::from_str(&said).with_context(|| said)
    }

    /// Has it write to its memory, and waits until it has.
    pub fn dirty(&mut self) -> Result<()> {
        self.monitor.type_line("more")?;
        self.monitor.wait_for(TOUCHED, PATIENCE)?;
        Ok(())
    }

    /// Waits until it asks for the next line, or ticks if none is left.
    pub fn settle(&mut self, last: bool) -> Result<()> {
        self.monitor
            .wait_for(if last { TICKS } else { ASKS }, PATIENCE)?;
        Ok(())
    }

    /// Saves it while it ticks, and ends it. When this returns, the next tick is overdue.
    pub fn end(mut self, directory: &Path) -> Result<()> {
        self.save(directory, &["--stop"])?;
        let saved = Instant::now();
        let status = self.monitor.wait_for_end(PATIENCE)?;
        ensure!(
            status.code() == Some(STOPPED),
            "tern run ended with {status}"
        );
        thread::sleep((TICK + TICK / 5).saturating_sub(saved.elapsed()));
        Ok(())
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is no text", path.display()))
}

/// Bytes that the files of a directory take on their file system.
pub fn taken(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        bytes += entry?.metadata()?.blocks() * 512;
    }
    Ok(bytes)
}

/// Asks the control API until the guest runs; when that was. None if it is told that the monitor has ended.
fn running_since(socket: &Path, ended: &AtomicBool) -> Option<Instant> {
    seen(socket, ended, |info| info.state == "running")
}

/// Asks the control API until a snapshot has its pause behind it; when that was.
fn after_pause(socket: &Path, ended: &AtomicBool) -> Option<Instant> {
    let after = |phase: &str| matches!(phase, "digest" | "sync");
    seen(socket, ended, |info| {
        info.progress.is_some_and(|p| after(&p.phase))
    })
}

/// When an answer was seen that is as wanted.
fn seen(socket: &Path, ended: &AtomicBool, wanted: impl Fn(Info) -> bool) -> Option<Instant> {
    while !ended.load(Relaxed) {
        // At first there is no socket, and then for a while nobody who answers.
        if ask_info(socket).is_ok_and(&wanted) {
            return Some(Instant::now());
        }
        thread::sleep(LOOK);
    }
    None
}

/// What the control API says about a guest.
#[derive(Debug, PartialEq, Deserialize)]
struct Info {
    state: String,
    progress: Option<Progress>,
}

/// How far a snapshot is.
#[derive(Debug, PartialEq, Deserialize)]
struct Progress {
    phase: String,
}

fn ask_info(socket: &Path) -> Result<Info> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /api/v1/info HTTP/1.1\r\nHost: tern\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    info(&String::from_utf8(answer)?)
}

/// What an answer of the API says.
fn info(answer: &str) -> Result<Info> {
    let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP")?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{head}");
    }
    Ok(serde_json::from_str(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let said = r#"{"state":"running","directory":"/d","id":"00","bytes":{"memory":268435456,"written_running":7,
            "written_paused":4096,"state":9},"pause_us":{"total":10,"stop":1,"devices":2,"vcpus":3,"memory":4},
            "total_us":99}"#;
        let report: Report = serde_json::from_str(said).unwrap();
        assert_eq!(
            report,
            Report {
                bytes: Bytes {
                    written_running: 7,
                    written_paused: 4096
                },
                pause_us: Pause {
                    total: 10,
                    stop: 1,
                    devices: 2,
                    vcpus: 3,
                    memory: 4
                },
                total_us: 99
            }
        );
        assert!(serde_json::from_str::<Report>("{}").is_err());
    }

    #[test]
    fn states_are_read() {
        let answer = |head: &str, body: &str| info(&format!("{head}\r\nx: y\r\n\r\n{body}"));
        let ok = "HTTP/1.1 200 OK";
        let body = r#"{"version":"0","state":"running","cpus":2}"#;
        let running = answer(ok, body).unwrap();
        assert_eq!(
            (running.state.as_str(), running.progress),
            ("running", None)
        );
        let body = r#"{"state":"saving","progress":{"phase":"digest","done":1,"total":2}}"#;
        let saving = answer(ok, body).unwrap().progress.unwrap();
        assert_eq!(saving.phase, "digest");
        assert!(answer("HTTP/1.1 500 No", body).is_err());
        assert!(answer(ok, "{}").is_err());
        assert!(info("").is_err());
    }

    #[test]
    fn a_guest_has_a_scenario_for_each_round_and_one_more() {
        assert_eq!(
            scenarios(Mib(128), Mib(32), 1),
            "memory-touch:mib=128,console-echo,memory-touch:mib=32,console-echo,memory-touch:mib=32,hang"
        );
        // As long as a kernel command line may be.
        assert!(scenarios(Mib(65536), Mib(1024), 40).len() < 1900);
    }
}
