//! Cloud Hypervisor, told over its HTTP API.

use std::io::{BufRead, BufReader, PipeReader, pipe};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::json;

use super::super::http::request;
use super::guest::{
    Bench, CPUS, Case, DOWNTIME_MS, Gap, How, Move, Mover, PATIENCE, await_socket, beat_after,
    beat_before, us,
};
use crate::process::Monitor;

/// The program, and where its guest is.
pub struct CloudHypervisor {
    program: PathBuf,
    guest: Option<Process>,
    number: u32,
}

/// A process with or for a guest.
struct Process {
    monitor: Monitor,
    socket: PathBuf,
    /// What happens in it, and when that was heard.
    events: Receiver<(Instant, String)>,
}

impl Process {
    /// When this event was heard.
    fn event(&self, name: &str) -> Result<Instant> {
        loop {
            let (at, event) = self
                .events
                .recv_timeout(PATIENCE)
                .with_context(|| format!("waiting for the event {name}"))?;
            if event == name {
                return Ok(at);
            }
        }
    }
}

impl CloudHypervisor {
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            guest: None,
            number: 0,
        }
    }

    fn start(&mut self, bench: &Bench<'_>, arguments: &[String]) -> Result<Process> {
        self.number += 1;
        let socket = bench.path(&format!("ch-{}.sock", self.number));
        let (reader, writer) = pipe()?;
        // It is to have it as well.
        fcntl_setfd(&writer, FdFlags::empty())?;
        let mut command = Command::new(&self.program);
        command.arg("--api-socket");
        command.arg(format!("path={}", socket.display()));
        command.args(["--event-monitor", &format!("fd={}", writer.as_raw_fd())]);
        // What its filter lets its migration do depends on the C library that it was built with.
        command.args(["--seccomp", "false"]).args(arguments);
        let mut monitor = Monitor::interactive(command)?;
        drop(writer);
        let (tell, events) = mpsc::channel();
        thread::spawn(move || {
            for event in Events(BufReader::new(reader)) {
                // Nobody listens any more if the guest has moved on.
                let _ = tell.send((Instant::now(), event));
            }
        });
        await_socket(&socket, &mut monitor)?;
        Ok(Process {
            monitor,
            socket,
            events,
        })
    }
}

impl Mover for CloudHypervisor {
    fn name(&self) -> &'static str {
        "Cloud Hypervisor"
    }

    fn boot(&mut self, bench: &Bench<'_>, case: Case) -> Result<()> {
        self.end();
        let disk = bench.disk("ch.raw")?;
        let words = [
            ("--kernel", bench.kernel.display().to_string()),
            ("--initramfs", bench.initrd.display().to_string()),
            ("--cmdline", bench.line(case)),
            ("--cpus", format!("boot={CPUS}")),
            ("--memory", format!("size={},shared=on", case.size)),
            ("--disk", format!("path={},image_type=raw", disk.display())),
            ("--serial", "tty".to_owned()),
            ("--console", "off".to_owned()),
        ];
        let words = words.map(|(name, value)| [name.to_owned(), value]);
        self.guest = Some(self.start(bench, words.as_flattened())?);
        Ok(())
    }

    fn end(&mut self) {
        self.guest = None;
    }

    fn go(&mut self, bench: &Bench<'_>, how: How) -> Result<Move> {
        let mut source = self.guest.take().context("there is no guest")?;
        let before_us = beat_before(&mut source.monitor)?;
        let mut destination = self.start(bench, &[])?;
        let path = bench.path(&format!("ch-move-{}", self.number));
        let url = format!("unix:{}", path.display());
        let receive = json!({ "receiver_url": url });
        let mut send = json!({
            "destination_url": url,
            "local": how == How::HandedOver,
            "downtime_ms": DOWNTIME_MS,
            "timeout_s": PATIENCE.as_secs(),
        });
        if how == How::HandedOver {
            // Which is for copying.
            if let Some(fields) = send.as_object_mut() {
                fields.retain(|name, _| name.ends_with("url") || name == "local");
            }
        }
        let put = |socket: &PathBuf, what: &str, body| {
            let path = format!("/api/v1/vm.{what}");
            request(socket, "PUT", &path, Some(body), PATIENCE)
        };
        let there = destination.socket.clone();
        let moved = thread::scope(|scope| -> Result<_> {
            let received = scope.spawn(|| put(&there, "receive-migration", &receive));
            destination.event("migration-receive-ready")?;
            let cpu = source.monitor.cpu_time()? + destination.monitor.cpu_time()?;
            let begun = Instant::now();
            if let Err(error) = put(&source.socket, "send-migration", &send) {
                // The other one would wait on.
                return Err(error.context(destination.monitor.last_words()));
            }
            received.join().ok().context("a thread panicked")??;
            Ok((begun, cpu))
        });
        let (begun, cpu) = moved.with_context(|| source.monitor.last_words())?;
        let cpu = source.monitor.cpu_time()? + destination.monitor.cpu_time()? - cpu;
        let stopping = source.event("pausing")?;
        let resumed = destination.event("resumed")?;
        let around_us = beat_after(&mut destination.monitor)?;
        self.guest = Some(destination);
        Ok(Move {
            total_us: us(resumed - begun),
            pause_us: us(resumed - stopping),
            parts: None,
            gap: Gap {
                before_us,
                around_us,
            },
            cpu_us: us(cpu),
            sent: None,
            plain_us: None,
        })
    }
}

/// Names of events, which are JSON objects on several lines.
struct Events(BufReader<PipeReader>);

impl Iterator for Events {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut line = String::new();
        loop {
            line.clear();
            match self.0.read_line(&mut line) {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
            if let Some(name) = name(&line) {
                return Some(name.to_owned());
            }
        }
    }
}

fn name(line: &str) -> Option<&str> {
    let value = line.trim().strip_prefix("\"event\":")?;
    Some(value.trim().trim_end_matches(',').trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_have_names() {
        assert_eq!(name("  \"event\": \"pausing\",\n"), Some("pausing"));
        assert_eq!(name("  \"source\": \"vm\",\n"), None);
    }
}
