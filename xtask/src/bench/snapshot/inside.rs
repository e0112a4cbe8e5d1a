//! The measurement, where `/dev/kvm` performs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::super::host::here;
use super::super::size::Mib;
use super::figures::{self, Figures, Restores, Saves, Taken};
use super::guest::{Bench, CPUS, Guest, Report, taken, text};
use super::{Peers, Plan, copy, peers};

const MEMORY: &str = "memory.bin";

/// The measurement itself.
#[derive(Debug, Args)]
pub struct Inside {
    #[command(flatten)]
    plan: Plan,
    #[command(flatten)]
    peers: Peers,
    /// Day and machine
    #[arg(long)]
    about: String,
    #[arg(long)]
    tern: PathBuf,
    #[arg(long)]
    kernel: PathBuf,
    /// The same as an ELF image
    #[arg(long)]
    elf_kernel: PathBuf,
    #[arg(long)]
    initrd: PathBuf,
}

impl Inside {
    /// Measures one size after the other. One that fails is told with the others' figures.
    pub fn run(self) -> Result<i32> {
        let rounds = self.plan.rounds;
        let (mut all, mut failed) = (Vec::new(), Vec::new());
        for &size in &self.plan.sizes {
            match self.in_scratch(size) {
                Ok(figures) => all.push(figures),
                Err(error) => {
                    eprintln!("xtask: {size}: {error:#}");
                    failed.push(size.to_string());
                }
            }
        }
        if self.plan.json {
            println!("{}", serde_json::to_string_pretty(&all)?);
        } else if !all.is_empty() {
            println!(
                "{}, {CPUS} vCPUs, a disk and a network interface; {}; files in {} ({}); medians of {rounds} (range)",
                self.about,
                here(),
                self.plan.directory.display(),
                file_system(&self.plan.directory)?,
            );
            figures::print(&all);
        }
        if failed.is_empty() {
            return Ok(0);
        }
        eprintln!(
            "xtask: no figures for guests of {}: the reasons are above",
            failed.join(", ")
        );
        Ok(1)
    }

    /// Measures guests of one size in a directory that is gone afterwards.
    fn in_scratch(&self, size: Mib) -> Result<Figures> {
        let name = format!("tern-bench-{}-{size}", std::process::id());
        let directory = self.plan.directory.join(name);
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let bench = Bench {
            tern: &self.tern,
            kernel: &self.kernel,
            elf_kernel: &self.elf_kernel,
            initrd: &self.initrd,
            directory: &directory,
            plan: &self.plan,
        };
        let figures = measure(&bench, size, &self.peers);
        fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
        figures
    }
}

/// All figures of one guest. Of everything there is one round first that does not count: it brings files into the page
/// cache, and memory to the machine.
fn measure(bench: &Bench, size: Mib, others: &Peers) -> Result<Figures> {
    let plan = bench.plan;
    eprintln!(
        "xtask: {size}: booting, and touching {}",
        plan.touched(size)
    );
    let mut guest = bench.boot(size)?;
    let (full, after_pause) = full(bench, size, &mut guest).context("full snapshots")?;
    let incremental = incremental(bench, size, &mut guest).context("incremental snapshots")?;
    let saved = bench.path("saved");
    guest
        .end(&saved)
        .context("the snapshot that is to be restored")?;
    let ([lazy, eager], first) = restores(bench, size, &saved).context("restoring")?;
    fs::remove_dir_all(&saved)?;
    Ok(Figures {
        guest_mib: size,
        touched_mib: plan.touched(size),
        dirtied_mib: plan.dirty,
        full,
        full_after_pause: after_pause,
        incremental,
        restore: lazy,
        restore_prefault: eager,
        first_prefault_us: first,
        peers: peers::measure(bench, size, others)?,
    })
}

/// Also what part of the total time came after the pause, in the round that does not count.
fn full(bench: &Bench, size: Mib, guest: &mut Guest<'_>) -> Result<(Saves, f64)> {
    let directory = bench.path("full");
    let mut all = Vec::new();
    let mut after_pause = 0.0;
    for round in 0..=bench.plan.rounds {
        let report;
        if round == 0 {
            (report, after_pause) = guest.save_watched(&directory)?;
        } else {
            report = guest.save(&directory, &[])?;
        }
        let taken = compare(bench, &directory, report)?;
        progress(bench, size, round, "full", &taken);
        all.push(taken);
        fs::remove_dir_all(&directory)?;
    }
    Ok((Saves::of(&all[1..])?, after_pause))
}

/// A chain, whose files are removed in the end.
fn incremental(bench: &Bench, size: Mib, guest: &mut Guest<'_>) -> Result<Saves> {
    let mut chain = vec![bench.path("base")];
    guest.save(&chain[0], &["--track"])?;
    let mut all = Vec::new();
    for round in 0..=bench.plan.rounds {
        let directory = bench.path(&format!("incremental-{round}"));
        guest.dirty()?;
        guest.settle(round == bench.plan.rounds)?;
        let base = chain.last().context("a chain without a base")?;
        let report = guest.save(&directory, &["--track", "--base", text(base)?])?;
        let taken = compare(bench, &directory, report)?;
        progress(bench, size, round, "incremental", &taken);
        all.push(taken);
        chain.push(directory);
    }
    for directory in &chain {
        fs::remove_dir_all(directory)?;
    }
    Saves::of(&all[1..])
}

/// What a snapshot takes on its file system, and how long it takes to write its data alone.
fn compare(bench: &Bench, directory: &Path, report: Report) -> Result<Taken> {
    let on_disk = taken(directory)?;
    let copy = bench.path("copy");
    let plain = copy::data(&directory.join(MEMORY), &copy)?;
    fs::remove_file(&copy)?;
    Ok(Taken {
        report,
        on_disk,
        plain_us: plain.took.as_secs_f64() * 1e6,
    })
}

/// On demand, and with all memory first. Also the microseconds until a guest ran whose memory was read for the first time:
/// tmpfs then finds memory for every hole of the file, and the rounds that count read that.
fn restores(bench: &Bench, size: Mib, saved: &Path) -> Result<([Restores; 2], f64)> {
    let mut all = [Vec::new(), Vec::new()];
    for round in 0..=bench.plan.rounds {
        for (prefault, all) in [false, true].into_iter().zip(&mut all) {
            let restored = bench.restore(saved, prefault)?;
            eprintln!(
                "xtask: {size}: restore {round} of {}{}: running after {:.0} ms, first line after {:.0} ms",
                bench.plan.rounds,
                if prefault { ", --prefault" } else { "" },
                restored.running.as_secs_f64() * 1e3,
                restored.output.as_secs_f64() * 1e3,
            );
            all.push(restored);
        }
    }
    let [lazy, eager] = all;
    let first = eager[0].running.as_secs_f64() * 1e6;
    let both = [Restores::of(&lazy[1..])?, Restores::of(&eager[1..])?];
    Ok((both, first))
}

fn progress(bench: &Bench, size: Mib, round: u32, kind: &str, taken: &Taken) {
    let mib = |bytes: u64| bytes as f64 / Mib(1).bytes() as f64;
    eprintln!(
        "xtask: {size}: {kind} {round} of {}: {:.0} ms, pause {:.1} ms, {:.1} MiB; plain write {:.0} ms",
        bench.plan.rounds,
        taken.report.total_us as f64 / 1e3,
        taken.report.pause_us.total as f64 / 1e3,
        mib(taken.on_disk),
        taken.plain_us / 1e3,
    );
}

/// What kind of file system a directory is in.
fn file_system(directory: &Path) -> Result<String> {
    let found = rustix::fs::statfs(directory).with_context(|| directory.display().to_string())?;
    Ok(name(found.f_type as u64))
}

/// Names of `linux/magic.h`, and numbers of others.
fn name(magic: u64) -> String {
    match magic {
        0x0102_1994 => "tmpfs".into(),
        0xef53 => "ext4".into(),
        0x5846_5342 => "xfs".into(),
        0x9123_683e => "btrfs".into(),
        0x794c_7630 => "overlay".into(),
        0x0102_1997 => "9p".into(),
        other => format!("file system {other:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_have_names() {
        assert_eq!(name(0x0102_1994), "tmpfs");
        assert_eq!(name(0x1234), "file system 0x1234");
        assert!(file_system(Path::new("/proc")).is_ok());
        assert!(file_system(Path::new("/no/such")).is_err());
    }
}
