//! The measurement, where `/dev/kvm` performs.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::super::host::here;
use super::cloud_hypervisor::CloudHypervisor;
use super::figures::{self, Figures};
use super::guest::{Bench, CPUS, Case, How, Move, Mover, Work};
use super::qemu::Qemu;
use super::tern::Tern;
use super::{Peers, Plan};

/// Sockets, disks and memory that is a file.
const DIRECTORY: &str = "/dev/shm";

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
    #[arg(long)]
    initrd: PathBuf,
}

impl Inside {
    /// Measures one kind of guest after the other. One that fails is told with the others' figures.
    pub fn run(self) -> Result<i32> {
        let directory = Path::new(DIRECTORY).join(format!("tern-bench-{}", std::process::id()));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let (all, failed) = self.measure(&directory);
        fs::remove_dir_all(&directory).with_context(|| directory.display().to_string())?;
        if self.plan.json {
            println!("{}", serde_json::to_string_pretty(&all)?);
        } else if !all.is_empty() {
            let plan = &self.plan;
            println!(
                "{}, {CPUS} vCPUs and a disk, {} % of memory touched; {}; medians of {} (range); writes are to {} at {} pages \
                 per ms",
                self.about,
                plan.touch,
                here(),
                plan.rounds,
                plan.dirty,
                plan.rate
            );
            figures::print(&all);
        }
        Ok(i32::from(failed))
    }

    /// All figures, and whether some are missing.
    fn measure(&self, directory: &Path) -> (Vec<Figures>, bool) {
        let bench = Bench {
            kernel: &self.kernel,
            initrd: &self.initrd,
            directory,
            plan: &self.plan,
        };
        let (mut all, mut failed) = (Vec::new(), false);
        let tern = Tern::new(self.tern.clone());
        let name = tern.name();
        let mut movers: Vec<Box<dyn Mover>> = vec![Box::new(tern)];
        if let Some(path) = &self.peers.cloud_hypervisor {
            movers.push(Box::new(CloudHypervisor::new(path.clone())));
        }
        if let Some(path) = &self.peers.qemu {
            movers.push(Box::new(Qemu::new(path.clone())));
        }
        for case in cases(&self.plan) {
            for mover in &mut movers {
                // The peers have no such functions.
                if case.vfs > 0 && mover.name() != name {
                    continue;
                }
                match moves(&bench, mover.as_mut(), case) {
                    Ok(figures) => all.extend(figures),
                    Err(error) => {
                        eprintln!("xtask: {}, {case}: {error:#}", mover.name());
                        failed = true;
                    }
                }
                mover.end();
            }
        }
        figures::compare(&mut all, name);
        (all, failed)
    }
}

/// The kinds of guests.
fn cases(plan: &Plan) -> Vec<Case> {
    let mut cases = Vec::new();
    for &size in &plan.sizes {
        let case = |work, vfs| Case { size, work, vfs };
        cases.extend([case(Work::Idle, 0), case(Work::Writes, 0)]);
        cases.extend(plan.vfs.iter().map(|&vfs| case(Work::Idle, vfs)));
    }
    cases
}

/// Moves one guest in both ways in turns. Of each the first does not count: it brings files into the page cache, and memory
/// to the machine.
fn moves(bench: &Bench<'_>, mover: &mut dyn Mover, case: Case) -> Result<Vec<Figures>> {
    let rounds = bench.plan.rounds;
    eprintln!("xtask: {}, {case}: booting", mover.name());
    mover.boot(bench, case)?;
    let mut all: [Vec<Move>; 2] = [Vec::new(), Vec::new()];
    for round in 0..=rounds {
        for (how, all) in How::ALL.into_iter().zip(&mut all) {
            let moved = mover.go(bench, how).with_context(|| how.name())?;
            eprintln!(
                "xtask: {}, {case}: {} {round} of {rounds}: {:.0} ms, pause {:.1} ms, the guest saw {:.1} ms",
                mover.name(),
                how.name(),
                moved.total_us / 1e3,
                moved.pause_us / 1e3,
                moved.gap.around_us / 1e3,
            );
            if round > 0 {
                all.push(moved);
            }
        }
    }
    let figures = How::ALL.into_iter().zip(&all);
    figures
        .map(|(how, moves)| Figures::of(mover.name(), how, case, moves))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::super::size::Mib;
    use super::*;

    #[test]
    fn each_size_is_idle_and_busy_and_has_functions() {
        let plan = Plan {
            sizes: vec![Mib(256), Mib(1024)],
            rounds: 1,
            touch: 50,
            dirty: Mib(32),
            rate: 2,
            vfs: vec![16],
            json: false,
        };
        let cases = cases(&plan);
        assert_eq!(cases.len(), 6);
        assert_eq!(cases[5].vfs, 16);
        assert_eq!(cases[1].work, Work::Writes);
    }
}
