//! `cargo xtask bench boot`: how long until a guest's init runs, and what the monitor costs besides its guest.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::median;
use crate::image::{self, Kernel};
use crate::process::Monitor;
use crate::{kvm, workspace};

/// The first thing the test guest's init says.
const MARKER: &str = "tern-guest: init ";
/// What every guest is told: a quiet kernel, and an init that stays.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 tern.run=hang";
const CPUS: u32 = 1;
const MEMORY_MIB: u64 = 256;

/// `cargo xtask bench boot`: same kernel, same initramfs, 1 vCPU, 256 MiB, monitors in turns
#[derive(Debug, Args)]
pub struct Boot {
    /// How often each monitor boots
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// A Cloud Hypervisor to compare with
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// A Firecracker to compare with
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// Guest kernel
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: kvm::Options,
}

impl Boot {
    pub fn run(self) -> Result<i32> {
        let tern = workspace::release_binary("vmm", "tern")?;
        let guests = image::guests(&[self.kernel], false)?;
        let guest = guests.into_values().next().context("no guest image")?;
        let mut command: Vec<OsString> = vec![
            std::env::current_exe().context("where is xtask?")?.into(),
            "bench".into(),
            "boot-inside".into(),
            "--rounds".into(),
            self.rounds.to_string().into(),
        ];
        let mut option = |name: &str, path: &Path| -> Result<()> {
            let path = path
                .canonicalize()
                .with_context(|| format!("{name} {}", path.display()))?;
            command.extend([name.into(), path.into()]);
            Ok(())
        };
        option("--tern", &tern)?;
        option("--kernel", &guest.vmlinuz)?;
        option("--initrd", &guest.initramfs)?;
        if let Some(path) = &self.cloud_hypervisor {
            option("--cloud-hypervisor", path)?;
        }
        if let Some(path) = &self.firecracker {
            option("--firecracker", path)?;
        }
        if self.json {
            command.push("--json".into());
        }
        kvm::run(&self.machine, &command)
    }
}

/// The measurement itself, where `/dev/kvm` performs.
#[derive(Debug, Args)]
pub struct Inside {
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    tern: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    cloud_hypervisor: Option<PathBuf>,
    #[arg(long)]
    firecracker: Option<PathBuf>,
    #[arg(long)]
    json: bool,
}

/// One monitor and what was measured of it.
struct Candidate {
    name: &'static str,
    command: Box<dyn Fn() -> Command>,
    seconds: Vec<f64>,
    own_kib: Vec<u64>,
}

#[derive(Serialize)]
struct Figures {
    monitor: &'static str,
    rounds: u32,
    boot_seconds_median: f64,
    boot_seconds_min: f64,
    boot_seconds_max: f64,
    own_memory_kib: u64,
    /// This project's median boot time divided by this monitor's.
    tern_boot_ratio: f64,
    /// This project's own memory divided by this monitor's.
    tern_memory_ratio: f64,
}

impl Inside {
    pub fn run(self) -> Result<i32> {
        let scratch = PathBuf::from(format!("/tmp/tern-bench-{}", std::process::id()));
        fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
        let result = self.measure(&scratch);
        fs::remove_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
        let figures = result?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            print(&figures);
        }
        Ok(0)
    }

    fn measure(&self, scratch: &Path) -> Result<Vec<Figures>> {
        let mut candidates = self.candidates(scratch)?;
        // One boot each that does not count: it brings kernel and binaries into the page cache.
        for round in 0..=self.rounds {
            for candidate in &mut candidates {
                eprintln!(
                    "xtask: round {round} of {}, {}",
                    self.rounds, candidate.name
                );
                let monitor = Monitor::start((candidate.command)(), MARKER)
                    .with_context(|| candidate.name)?;
                if round > 0 {
                    candidate.seconds.push(monitor.took.as_secs_f64());
                    candidate.own_kib.push(monitor.own_kib(MEMORY_MIB * 1024)?);
                }
            }
        }
        let middle = |candidate: &Candidate| {
            Some((median(&candidate.seconds)?, median(&candidate.own_kib)?))
        };
        let (tern_seconds, tern_kib) = candidates
            .first()
            .and_then(middle)
            .context("nothing was measured")?;
        candidates
            .iter()
            .map(|candidate| {
                let (seconds, own_kib) = middle(candidate).context("nothing was measured")?;
                let extreme = |pick: fn(f64, f64) -> f64| {
                    candidate.seconds.iter().copied().fold(seconds, pick)
                };
                Ok(Figures {
                    monitor: candidate.name,
                    rounds: self.rounds,
                    boot_seconds_median: seconds,
                    boot_seconds_min: extreme(f64::min),
                    boot_seconds_max: extreme(f64::max),
                    own_memory_kib: own_kib,
                    tern_boot_ratio: tern_seconds / seconds,
                    tern_memory_ratio: tern_kib as f64 / own_kib as f64,
                })
            })
            .collect()
    }

    /// What to compare, this project first.
    fn candidates(&self, scratch: &Path) -> Result<Vec<Candidate>> {
        let candidate = |name, command| Candidate {
            name,
            command,
            seconds: Vec::new(),
            own_kib: Vec::new(),
        };
        let (kernel, initrd) = (self.kernel.clone(), self.initrd.clone());
        let tern = self.tern.clone();
        let mut candidates = vec![candidate(
            "tern",
            Box::new(move || {
                let mut command = Command::new(&tern);
                command.arg("run").arg("--kernel").arg(&kernel);
                command.arg("--initrd").arg(&initrd);
                command.args(["--cmdline", CMDLINE, "--cpus", &CPUS.to_string()]);
                command.args(["--memory", &format!("{MEMORY_MIB}M")]);
                command
            }),
        )];
        if let Some(path) = self.cloud_hypervisor.clone() {
            let (kernel, initrd) = (self.kernel.clone(), self.initrd.clone());
            candidates.push(candidate(
                "cloud-hypervisor",
                Box::new(move || {
                    let mut command = Command::new(&path);
                    command.arg("--kernel").arg(&kernel);
                    command.arg("--initramfs").arg(&initrd);
                    command.args(["--cmdline", CMDLINE]);
                    command.args(["--cpus", &format!("boot={CPUS}")]);
                    command.args(["--memory", &format!("size={MEMORY_MIB}M")]);
                    command.args(["--serial", "tty", "--console", "off"]);
                    command
                }),
            ));
        }
        if let Some(path) = self.firecracker.clone() {
            let config = scratch.join("firecracker.json");
            let text = serde_json::json!({
                "boot-source": {
                    "kernel_image_path": self.kernel,
                    "initrd_path": self.initrd,
                    "boot_args": CMDLINE,
                },
                "drives": [],
                "machine-config": { "vcpu_count": CPUS, "mem_size_mib": MEMORY_MIB },
            });
            fs::write(&config, text.to_string()).with_context(|| config.display().to_string())?;
            candidates.push(candidate(
                "firecracker",
                Box::new(move || {
                    let mut command = Command::new(&path);
                    command.args(["--no-api", "--config-file"]).arg(&config);
                    command
                }),
            ));
        }
        ensure!(!candidates.is_empty());
        Ok(candidates)
    }
}

fn print(figures: &[Figures]) {
    println!(
        "{CPUS} vCPU, {MEMORY_MIB} MiB; median of {} boots",
        figures.first().map_or(0, |f| f.rounds)
    );
    println!(
        "{:<18} {:>10} {:>17} {:>12} {:>12} {:>14}",
        "monitor", "boot s", "min..max", "own MiB", "tern: boot", "tern: memory"
    );
    for f in figures {
        println!(
            "{:<18} {:>10.3} {:>17} {:>12.1} {:>12.2} {:>14.2}",
            f.monitor,
            f.boot_seconds_median,
            format!("{:.2}..{:.2}", f.boot_seconds_min, f.boot_seconds_max),
            f.own_memory_kib as f64 / 1024.0,
            f.tern_boot_ratio,
            f.tern_memory_ratio,
        );
    }
}
