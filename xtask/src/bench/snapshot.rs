//! `cargo xtask bench snapshot`: what it takes to save a guest, to save what it changed since, and to go on from there.
//!
//! | module | what it does |
//! |---|---|
//! | [`copy`] | the plain `write` that a snapshot is compared with |
//! | [`figures`] | what was measured, as tables |
//! | [`guest`] | guests that are saved and restored |
//! | [`inside`] | the measurement, where `/dev/kvm` performs |
//! | [`peers`] | other monitors, for ratios |

mod copy;
mod figures;
mod guest;
mod inside;
mod peers;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

pub use self::inside::Inside;
use super::host::{about, peer_arguments};
use super::size::Mib;
use crate::image::{self, Kernel};
use crate::{kvm, workspace};

/// Memory of guest, initial file tree and monitor besides what the guest is told to touch, in MiB; generous.
const GUEST_ITSELF: u64 = 192;
/// Memory of the machine itself and of what is in its page cache, in MiB.
const MACHINE_ITSELF: u64 = 1024;

const MEASURED: &str = "\
Each guest has 2 vCPUs, a disk, a network interface and Debian's kernel. When it has booted it writes to every page of a
part of its memory, and is idle. In each round, after one that does not count:

  full         tern snapshot: total time, pause and its parts, what its files take. As a ratio, the time of plain writes of
               the same data, from a buffer to the same file system, and of syncing them. A snapshot finds out besides
               which pages are zero, and has a digest.
  incremental  tern snapshot --base, after the guest has written to every page of --dirty: the same figures.
  restore      tern restore of a guest that was saved between two ticks, of which the next is due at once; with and without
               --prefault. From exec until the control API says that the guest runs, and until its first line is complete.
               The files and their holes are in the page cache: what brings them there is told apart.

With peers, full snapshots and restores of theirs as ratios, of a guest that touched as much and has no devices: the requests
to pause, save and resume, after which neither digest nor disk is waited for; and from exec until the answer that it runs.

Files are in /dev/shm, which is memory. Where /dev/kvm is usable, --directory can name one on a disk. The emulated host is
given as much memory as the sizes need.";

/// `cargo xtask bench snapshot`: snapshots and restores of guests of several sizes
#[derive(Debug, Args)]
#[command(after_help = MEASURED)]
pub struct Snapshot {
    #[command(flatten)]
    plan: Plan,
    #[command(flatten)]
    peers: Peers,
    /// Guest kernel
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    #[command(flatten)]
    machine: kvm::Options,
}

/// What is measured.
#[derive(Clone, Debug, PartialEq, Args)]
struct Plan {
    /// Memory of the guests
    #[arg(
        long,
        value_name = "SIZE,…",
        value_delimiter = ',',
        default_value = "256M,1G,4G"
    )]
    sizes: Vec<Mib>,
    /// How many snapshots, and restores, each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=40))]
    rounds: u32,
    /// How much of its memory each guest touches
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=75))]
    touch: u64,
    /// How much the guest writes before each incremental snapshot
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    dirty: Mib,
    /// Where the snapshots are made
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    directory: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Monitors to compare with.
#[derive(Clone, Debug, PartialEq, Args)]
struct Peers {
    /// A Firecracker to compare with
    #[arg(long, value_name = "PATH")]
    firecracker: Option<PathBuf>,
    /// A Cloud Hypervisor to compare with
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
}

impl Plan {
    /// The command line that means the same.
    fn arguments(&self) -> Vec<OsString> {
        let sizes: Vec<String> = self.sizes.iter().map(Mib::to_string).collect();
        let mut arguments: Vec<OsString> = vec!["--directory".into(), (&self.directory).into()];
        for (name, value) in [
            ("--sizes", sizes.join(",")),
            ("--rounds", self.rounds.to_string()),
            ("--touch", self.touch.to_string()),
            ("--dirty", self.dirty.to_string()),
        ] {
            arguments.extend([name.into(), value.into()]);
        }
        if self.json {
            arguments.push("--json".into());
        }
        arguments
    }

    /// What a guest of this size touches.
    fn touched(&self, size: Mib) -> Mib {
        Mib(size.0 * self.touch / 100)
    }

    /// MiB of memory that a machine needs whose files are memory as well, of which they may have one half.
    fn machine_mib(&self) -> u64 {
        let needed = self.sizes.iter().map(|&size| {
            let guest = self.touched(size).0 + GUEST_ITSELF;
            // Of a full one and its copy; of a chain; of one whose holes were read, which fills them.
            let chain = (u64::from(self.rounds) + 2) * (self.dirty.0 + 16);
            let files = (2 * guest).max(guest + chain).max(size.0 + GUEST_ITSELF);
            2 * files
        });
        needed.max().unwrap_or_default() + MACHINE_ITSELF
    }
}

impl Snapshot {
    pub fn run(mut self) -> Result<i32> {
        let peers = peer_arguments(&[
            ("--firecracker", &self.peers.firecracker),
            ("--cloud-hypervisor", &self.peers.cloud_hypervisor),
        ])?;
        let tern = workspace::release_binary("vmm", "tern")?;
        let guests = image::guests(&[self.kernel], false)?;
        let guest = guests.into_values().next().context("no guest image")?;
        let mut command: Vec<OsString> = vec![
            std::env::current_exe().context("where is xtask?")?.into(),
            "bench".into(),
            "snapshot-inside".into(),
        ];
        command.extend(self.plan.arguments());
        command.extend(peers);
        for (name, value) in [
            ("--about", about(&guest.kernel)?.into()),
            ("--tern", tern.into_os_string()),
            ("--kernel", guest.vmlinuz.into()),
            ("--elf-kernel", guest.vmlinux.into()),
            ("--initrd", guest.initramfs.into()),
        ] {
            command.extend([name.into(), value]);
        }
        self.machine.memory = self.machine.memory.max(self.plan.machine_mib());
        let status = kvm::run(&self.machine, &command)?;
        if status == kvm::NO_SESSION || status == kvm::TIMED_OUT {
            eprintln!(
                "xtask: the machine, with {} of memory, ended before the bench did; the lines above have what was measured",
                Mib(self.machine.memory)
            );
        }
        Ok(status)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        plan: Plan,
    }

    fn parse(words: &[&str]) -> Result<Plan, clap::Error> {
        let line = ["bench"].iter().chain(words);
        Line::try_parse_from(line).map(|line| line.plan)
    }

    #[test]
    fn arguments_mean_the_plan_they_come_from() {
        let asked = "--sizes 128M,2G --rounds 3 --touch 10 --dirty 8M --directory /d --json";
        for words in [asked, ""] {
            let words: Vec<&str> = words.split_whitespace().collect();
            let plan = parse(&words).unwrap();
            let arguments = plan.arguments();
            let again: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
            assert_eq!(parse(&again).unwrap(), plan);
        }
        for bad in [
            "--sizes 1G,",
            "--rounds 0",
            "--rounds 41",
            "--touch 76",
            "--dirty 32",
        ] {
            let words: Vec<&str> = bad.split_whitespace().collect();
            assert!(parse(&words).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_largest_guest_says_what_the_machine_needs() {
        let needed = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            parse(&words).unwrap().machine_mib()
        };
        // Twice a copy of half of it.
        let of_half = 1024 + 4 * (2048 + 192);
        assert_eq!(needed(""), of_half);
        assert_eq!(needed("--sizes 4G,256M"), of_half);
        // One whose holes were filled.
        assert_eq!(needed("--sizes 4G --touch 25"), 1024 + 2 * (4096 + 192));
        // A long chain.
        let chain = 128 + 192 + 42 * 48;
        assert_eq!(needed("--sizes 256M --rounds 40"), 1024 + 2 * chain);
    }
}
