//! `cargo xtask bench vfs`: what virtual functions cost.
//!
//! Administration commands are measured on this host, in process; everything else where `/dev/kvm` performs, with the
//! stock driver in a stock guest. Memory is memory there too; times are good for ratios only.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::median;
use crate::image::{self, Kernel};
use crate::process::Monitor;
use crate::{kvm, tools, workspace};

/// What the guest says when all its scenarios have run.
const DONE: &str = "tern-guest: done status=ok";
/// What a guest says that waits for its end.
const WAITS: &str = "tern-guest: tick";
/// How long a guest may take. A bound on waiting, not a measurement.
const PATIENCE: Duration = Duration::from_secs(600);
const CPUS: u32 = 2;
const MEMORY_MIB: u64 = 512;
/// MiB of each transfer, and how many there are in each guest.
const TRANSFER_MIB: u32 = 32;
const TRANSFERS: u32 = 3;
const BRIDGE: &str = "ternbench";
const TAPS: [&str; 2] = ["ternbench0", "ternbench1"];

/// `cargo xtask bench vfs`: time to enable, memory, administration commands, and the switch
#[derive(Debug, Args)]
pub struct Vfs {
    /// How many guests each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Guest kernel
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    machine: kvm::Options,
}

impl Vfs {
    pub fn run(self) -> Result<i32> {
        let tern = workspace::release_binary("vmm", "tern")?;
        let admin = workspace::release_binary("bench", "admin-rate")?;
        let guests = image::guests(&[self.kernel], false)?;
        let guest = guests.into_values().next().context("no guest image")?;
        let program = admin.to_str().context("a strange path")?;
        let rates = tools::output(program, &[&self.rounds.to_string()])?;
        let mut command: Vec<OsString> = vec![
            std::env::current_exe().context("where is xtask?")?.into(),
            "bench".into(),
            "vfs-inside".into(),
            "--rounds".into(),
            self.rounds.to_string().into(),
            "--admin-rates".into(),
            rates
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(",")
                .into(),
        ];
        for (name, path) in [
            ("--tern", tern),
            ("--kernel", guest.vmlinuz),
            ("--initrd", guest.initramfs),
        ] {
            command.extend([name.into(), path.into()]);
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
    /// Commands per second, measured outside
    #[arg(long, value_delimiter = ',')]
    admin_rates: Vec<u64>,
    #[arg(long)]
    tern: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
    #[arg(long)]
    json: bool,
}

/// How long `echo N > sriov_numvfs` takes.
#[derive(Serialize)]
struct Enable {
    vfs: u32,
    /// Whether Linux also binds a driver to each.
    drivers: bool,
    milliseconds_median: u64,
    milliseconds_min: u64,
    milliseconds_max: u64,
}

/// Memory of the monitor for each virtual function but the first.
#[derive(Serialize)]
struct Memory {
    vfs: u32,
    drivers: bool,
    kib_with_one: u64,
    kib_with_all: u64,
    kib_per_vf: f64,
}

#[derive(Serialize)]
struct Figures {
    rounds: u32,
    enable: Vec<Enable>,
    memory: Vec<Memory>,
    admin_commands_per_second: u64,
    switch_mib_per_second: f64,
    bridge_mib_per_second: f64,
    /// Throughput of the switch divided by that of the bridge.
    switch_to_bridge_ratio: f64,
}

/// What is enabled how.
const ENABLED: [(u32, bool); 5] = [(1, false), (16, false), (255, false), (1, true), (16, true)];
/// How many are compared with one. The processors of the guest have no interrupt vectors for more than 64 drivers.
const REMEMBERED: [(u32, bool); 2] = [(255, false), (64, true)];

impl Inside {
    pub fn run(self) -> Result<i32> {
        let figures = self.measure()?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            print(&figures);
        }
        Ok(0)
    }

    fn measure(&self) -> Result<Figures> {
        let (switch, bridge) = self.transfers()?;
        let rate = |milliseconds: u64| f64::from(TRANSFER_MIB) * 1000.0 / milliseconds as f64;
        Ok(Figures {
            rounds: self.rounds,
            enable: self.enable()?,
            memory: REMEMBERED
                .iter()
                .map(|&(vfs, drivers)| self.memory(vfs, drivers))
                .collect::<Result<_>>()?,
            admin_commands_per_second: median(&self.admin_rates).context("no rates")?,
            switch_mib_per_second: rate(switch),
            bridge_mib_per_second: rate(bridge),
            switch_to_bridge_ratio: bridge as f64 / switch as f64,
        })
    }

    fn guest(&self, scenario: &str, devices: &[&str], marker: &'static str) -> Result<Monitor> {
        eprintln!("xtask: {} {scenario}", devices.join(" "));
        let mut command = Command::new(&self.tern);
        command.arg("run").arg("--kernel").arg(&self.kernel);
        command.arg("--initrd").arg(&self.initrd);
        let line = format!("console=ttyS0 quiet panic=-1 tern.run={scenario}");
        command.args(["--cmdline", &line, "--cpus", &CPUS.to_string()]);
        command.args(["--memory", &format!("{MEMORY_MIB}M")]);
        command.args(devices);
        Monitor::start_within(command, marker, PATIENCE).with_context(|| scenario.to_owned())
    }

    fn enable(&self) -> Result<Vec<Enable>> {
        let scenarios: Vec<_> = ENABLED
            .iter()
            .map(|&(vfs, drivers)| format!("{},sriov-disable", enabling(vfs, drivers)))
            .collect();
        let mut times: Vec<Vec<u64>> = vec![Vec::new(); ENABLED.len()];
        for _ in 0..self.rounds {
            let guest = self.guest(&scenarios.join(","), &["--pf", "net,vfs=255"], DONE)?;
            let found = values(&guest.said, "sriov-enable", "ms");
            ensure!(found.len() == ENABLED.len(), "{}", guest.said);
            for (times, text) in times.iter_mut().zip(found) {
                times.push(text.parse().with_context(|| text.to_owned())?);
            }
        }
        let figures = ENABLED.iter().zip(&times).map(|(&(vfs, drivers), times)| {
            Some(Enable {
                vfs,
                drivers,
                milliseconds_median: median(times)?,
                milliseconds_min: *times.iter().min()?,
                milliseconds_max: *times.iter().max()?,
            })
        });
        figures
            .collect::<Option<_>>()
            .context("nothing was measured")
    }

    fn memory(&self, vfs: u32, drivers: bool) -> Result<Memory> {
        let own = |vfs: u32| -> Result<u64> {
            let mut values = Vec::new();
            for _ in 0..self.rounds {
                let scenario = format!("{},hang", enabling(vfs, drivers));
                let guest = self.guest(&scenario, &["--pf", &format!("net,vfs={vfs}")], WAITS)?;
                values.push(guest.own_kib(MEMORY_MIB * 1024)?);
            }
            median(&values).context("nothing was measured")
        };
        let (one, all) = (own(1)?, own(vfs)?);
        Ok(Memory {
            vfs,
            drivers,
            kib_with_one: one,
            kib_with_all: all,
            kib_per_vf: (all as f64 - one as f64) / f64::from(vfs - 1),
        })
    }

    /// Milliseconds of a transfer between two virtual functions, and between two interfaces on taps of a bridge.
    fn transfers(&self) -> Result<(u64, u64)> {
        let rate = |a, b| format!("net-rate:a={a}:b={b}:mib={TRANSFER_MIB}:rounds={TRANSFERS}");
        let members = format!("{},{}", enabling(2, true), rate("eth1", "eth2"));
        let plain = rate("eth0", "eth1");
        let taps = TAPS.map(|tap| format!("tap={tap}"));
        let _bridge = Bridge::new()?;
        let (mut switch, mut bridge) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            let guest = self.guest(&members, &["--pf", "net,vfs=2"], DONE)?;
            switch.extend(transfer_times(&guest.said)?);
            let guest = self.guest(&plain, &["--net", &taps[0], "--net", &taps[1]], DONE)?;
            bridge.extend(transfer_times(&guest.said)?);
        }
        let middle = |times: &[u64]| median(times).filter(|ms| *ms > 0).context("no transfers");
        Ok((middle(&switch)?, middle(&bridge)?))
    }
}

fn enabling(vfs: u32, drivers: bool) -> String {
    let drivers = if drivers { "yes" } else { "no" };
    format!("sriov-enable:n={vfs}:drivers={drivers}")
}

/// The values of `key=` in the lines `tern-guest: ok SCENARIO …`.
fn values<'a>(said: &'a str, scenario: &str, key: &str) -> Vec<&'a str> {
    let prefix = format!("tern-guest: ok {scenario} ");
    said.lines()
        .filter_map(|line| line.trim_end().split_once(&prefix))
        .filter_map(|(_, rest)| {
            rest.split_whitespace()
                .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        })
        .collect()
}

fn transfer_times(said: &str) -> Result<Vec<u64>> {
    let found = values(said, "net-rate", "ms");
    let times = found.iter().flat_map(|times| times.split('+'));
    let times: Vec<u64> = times
        .map(|text| text.parse().with_context(|| text.to_owned()))
        .collect::<Result<_>>()?;
    ensure!(times.len() == TRANSFERS as usize, "{said}");
    Ok(times)
}

/// A bridge of this host with two taps; removed when dropped.
struct Bridge;

impl Bridge {
    fn new() -> Result<Self> {
        let ip = |line: String| {
            let words: Vec<&str> = line.split_whitespace().collect();
            tools::output("ip", &words).with_context(|| format!("ip {line}"))
        };
        ip(format!("link add name {BRIDGE} type bridge"))?;
        // From here on there is something to remove.
        let bridge = Self;
        for tap in TAPS {
            ip(format!("tuntap add dev {tap} mode tap"))?;
            ip(format!("link set {tap} master {BRIDGE} up"))?;
        }
        ip(format!("link set {BRIDGE} up"))?;
        Ok(bridge)
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        for link in TAPS.into_iter().chain([BRIDGE]) {
            // One that could not be made is not there.
            let _ = tools::output("ip", &["link", "del", link]);
        }
    }
}

fn print(figures: &Figures) {
    println!(
        "{CPUS} vCPUs, {MEMORY_MIB} MiB; medians of {} guests",
        figures.rounds
    );
    let drivers = |drivers| {
        if drivers {
            "with drivers"
        } else {
            "no drivers"
        }
    };
    for e in &figures.enable {
        println!(
            "enable {:>3} VFs, {:<12} {:>8} ms ({} to {})",
            e.vfs,
            drivers(e.drivers),
            e.milliseconds_median,
            e.milliseconds_min,
            e.milliseconds_max
        );
    }
    for m in &figures.memory {
        println!(
            "memory {:>3} VFs, {:<12} {:>8.1} KiB per VF ({} KiB with 1, {} KiB with {})",
            m.vfs,
            drivers(m.drivers),
            m.kib_per_vf,
            m.kib_with_one,
            m.kib_with_all,
            m.vfs
        );
    }
    println!(
        "administration commands          {:>8} per second, in process, on this host itself",
        figures.admin_commands_per_second
    );
    println!(
        "VF to VF over the switch         {:>8.1} MiB/s",
        figures.switch_mib_per_second
    );
    println!(
        "two taps on a bridge of the host {:>8.1} MiB/s",
        figures.bridge_mib_per_second
    );
    println!(
        "switch to bridge                 {:>8.2}",
        figures.switch_to_bridge_ratio
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_console() {
        let said = "\
[    1.0] noise
tern-guest: ok sriov-enable pf=0000:01:00.0 total=255 vfs=1 bound=0 ms=131
tern-guest: ok sriov-disable removed=1 ms=1040
tern-guest: ok sriov-enable pf=0000:01:00.0 total=255 vfs=16 bound=0 ms=170\r
tern-guest: ok net-rate bytes=1 rtt_us=80 ms=12+13+14
";
        assert_eq!(values(said, "sriov-enable", "ms"), ["131", "170"]);
        assert_eq!(values(said, "sriov-disable", "removed"), ["1"]);
        assert_eq!(transfer_times(said).unwrap(), [12, 13, 14]);
        assert!(transfer_times("").is_err());
    }
}
