//! Other monitors that save and restore a guest of the same size.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use super::super::http;
use super::super::size::Mib;
use super::super::spread::Spread;
use super::Peers;
use super::guest::{Bench, CPUS, LOOK, PATIENCE, TICKS, text};
use crate::process::Monitor;

/// What a peer took, from all rounds.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub monitor: &'static str,
    /// From the request to pause until the answer that it goes on: a peer's guest stands still all the time.
    pub total_us: Spread,
    /// From exec until the control API says that the guest runs.
    pub restore_us: Spread,
}

/// A monitor's own way.
trait Peer {
    fn name(&self) -> &'static str;
    fn run(&self, bench: &Bench<'_>, size: Mib, socket: &Path) -> Result<Command>;
    fn save(&self, socket: &Path, directory: &Path) -> Result<()>;
    /// Starts a process that restores it, and returns when it is said to run.
    fn restore(&self, socket: &Path, directory: &Path) -> Result<Monitor>;
}

/// Measures each peer that was given.
pub fn measure(bench: &Bench<'_>, size: Mib, peers: &Peers) -> Result<Vec<Figures>> {
    let mut all: Vec<Box<dyn Peer>> = Vec::new();
    if let Some(path) = &peers.firecracker {
        all.push(Box::new(Firecracker(path.clone())));
    }
    if let Some(path) = &peers.cloud_hypervisor {
        all.push(Box::new(CloudHypervisor(path.clone())));
    }
    let figures = all.iter().map(|peer| {
        let doing = || peer.name();
        measure_one(bench, size, peer.as_ref()).with_context(doing)
    });
    figures.collect()
}

fn measure_one(bench: &Bench<'_>, size: Mib, peer: &dyn Peer) -> Result<Figures> {
    let rounds = bench.plan.rounds;
    let progress = |what: &str, round: u32, took: Duration| {
        eprintln!(
            "xtask: {size}: {} {what} {round} of {rounds}: {:.0} ms",
            peer.name(),
            took.as_secs_f64() * 1e3
        );
    };
    let socket = bench.path("peer.sock");
    let directory = bench.path("peer");
    let mut monitor = Monitor::interactive(peer.run(bench, size, &socket)?)?;
    monitor.wait_for(TICKS, PATIENCE)?;
    let mut saves = Vec::new();
    for round in 0..=rounds {
        if round > 0 {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir(&directory)?;
        let begun = Instant::now();
        peer.save(&socket, &directory)
            .with_context(|| monitor.obituary().unwrap_or_default())?;
        saves.push(begun.elapsed());
        progress("full", round, begun.elapsed());
    }
    drop(monitor);
    let mut restores = Vec::new();
    for round in 0..=rounds {
        // One that was killed leaves it.
        if socket.exists() {
            fs::remove_file(&socket)?;
        }
        let begun = Instant::now();
        let mut monitor = peer.restore(&socket, &directory)?;
        restores.push(begun.elapsed());
        progress("restore", round, begun.elapsed());
        monitor.wait_for(TICKS, PATIENCE)?;
    }
    fs::remove_file(&socket)?;
    fs::remove_dir_all(&directory)?;
    let us = |times: &[Duration]| Spread::of(times.iter().map(|time| time.as_secs_f64() * 1e6));
    Ok(Figures {
        monitor: peer.name(),
        total_us: us(&saves[1..])?,
        restore_us: us(&restores[1..])?,
    })
}

/// The same as tern's guests have, and then it ticks.
fn line(bench: &Bench<'_>, size: Mib) -> String {
    let touched = bench.plan.touched(size).0;
    format!("console=ttyS0 quiet panic=-1 tern.run=memory-touch:mib={touched},hang")
}

fn ask(socket: &Path, method: &str, path: &str, body: &Value) -> Result<Value> {
    let body = Some(body).filter(|body| !body.is_null());
    http::request(socket, method, path, body, PATIENCE)
}

/// Waits until a socket is there.
fn await_socket(socket: &Path, monitor: &mut Monitor) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        if let Some(why) = monitor.obituary() {
            anyhow::bail!(why);
        }
        ensure!(
            Instant::now() < deadline,
            "{} is not there",
            socket.display()
        );
        std::thread::sleep(LOOK);
    }
    Ok(())
}

struct Firecracker(PathBuf);

impl Peer for Firecracker {
    fn name(&self) -> &'static str {
        "Firecracker"
    }

    fn run(&self, bench: &Bench<'_>, size: Mib, socket: &Path) -> Result<Command> {
        let config = bench.path("firecracker.json");
        let told = json!({
            "boot-source": {
                // Not all versions take another.
                "kernel_image_path": bench.elf_kernel,
                "initrd_path": bench.initrd,
                "boot_args": line(bench, size),
            },
            "drives": [],
            "machine-config": { "vcpu_count": CPUS, "mem_size_mib": size.0 },
        });
        fs::write(&config, told.to_string())?;
        let mut command = Command::new(&self.0);
        command.arg("--api-sock").arg(socket);
        command.arg("--config-file").arg(config);
        Ok(command)
    }

    fn save(&self, socket: &Path, directory: &Path) -> Result<()> {
        let state = |state: &str| ask(socket, "PATCH", "/vm", &json!({ "state": state }));
        state("Paused")?;
        let body = json!({
            "snapshot_type": "Full",
            "snapshot_path": directory.join("state"),
            "mem_file_path": directory.join("memory"),
        });
        ask(socket, "PUT", "/snapshot/create", &body)?;
        state("Resumed")?;
        Ok(())
    }

    fn restore(&self, socket: &Path, directory: &Path) -> Result<Monitor> {
        let mut command = Command::new(&self.0);
        command.arg("--api-sock").arg(socket);
        let mut monitor = Monitor::interactive(command)?;
        await_socket(socket, &mut monitor)?;
        let body = json!({
            "snapshot_path": directory.join("state"),
            "mem_backend": { "backend_type": "File", "backend_path": directory.join("memory") },
            "resume_vm": true,
        });
        ask(socket, "PUT", "/snapshot/load", &body)
            .with_context(|| monitor.obituary().unwrap_or_default())?;
        Ok(monitor)
    }
}

struct CloudHypervisor(PathBuf);

impl Peer for CloudHypervisor {
    fn name(&self) -> &'static str {
        "Cloud Hypervisor"
    }

    fn run(&self, bench: &Bench<'_>, size: Mib, socket: &Path) -> Result<Command> {
        let mut command = Command::new(&self.0);
        command.args(["--api-socket", &format!("path={}", text(socket)?)]);
        command.arg("--kernel").arg(bench.kernel);
        command.arg("--initramfs").arg(bench.initrd);
        command.args(["--cmdline", &line(bench, size)]);
        command.args(["--cpus", &format!("boot={CPUS}")]);
        command.args(["--memory", &format!("size={size}")]);
        command.args(["--serial", "tty", "--console", "off"]);
        Ok(command)
    }

    fn save(&self, socket: &Path, directory: &Path) -> Result<()> {
        ask(socket, "PUT", "/api/v1/vm.pause", &Value::Null)?;
        let url = format!("file://{}", text(directory)?);
        let body = json!({ "destination_url": url });
        ask(socket, "PUT", "/api/v1/vm.snapshot", &body)?;
        ask(socket, "PUT", "/api/v1/vm.resume", &Value::Null)?;
        Ok(())
    }

    fn restore(&self, socket: &Path, directory: &Path) -> Result<Monitor> {
        let mut command = Command::new(&self.0);
        command.args(["--api-socket", &format!("path={}", text(socket)?)]);
        let source = format!("source_url=file://{},resume=true", text(directory)?);
        command.args(["--restore", &source]);
        let mut monitor = Monitor::interactive(command)?;
        await_socket(socket, &mut monitor)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let info = ask(socket, "GET", "/api/v1/vm.info", &Value::Null);
            if info.is_ok_and(|info| info["state"] == "Running") {
                return Ok(monitor);
            }
            if let Some(why) = monitor.obituary() {
                anyhow::bail!(why);
            }
            ensure!(Instant::now() < deadline, "it does not run");
            std::thread::sleep(LOOK);
        }
    }
}
