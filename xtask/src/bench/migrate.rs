//! `cargo xtask bench migrate`: what it takes to move a guest from one process to another.
//!
//! | module | what it does |
//! |---|---|
//! | [`cloud_hypervisor`], [`qemu`], [`tern`] | how each monitor is told to move its guest |
//! | [`copy`] | the plain copy over a socket that memory is compared with |
//! | [`figures`] | what was measured, as tables |
//! | [`guest`] | guests, and what they say of their clock |
//! | [`inside`] | the measurement, where `/dev/kvm` performs |

mod cloud_hypervisor;
mod copy;
mod figures;
mod guest;
mod inside;
mod qemu;
mod tern;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

pub use self::inside::Inside;
use super::host::{about, peer_arguments};
use super::size::Mib;
use crate::image::{self, Kernel};
use crate::{kvm, workspace};

/// Memory of a monitor besides its guest's, in MiB; generous.
const MONITOR_ITSELF: u64 = 64;
/// Memory of the machine itself and of what is in its page cache, in MiB.
const MACHINE_ITSELF: u64 = 1024;

const MEASURED: &str = "\
Each guest has 2 vCPUs, a disk and Debian's kernel. When it has booted it writes to every page of a part of its memory. Then
it looks at its monotonic clock every millisecond, and is idle otherwise, or writes to --rate pages of --dirty each time. It
is moved from process to process over a unix: socket; the first move of each kind does not count. With --vfs it has, idle, an
owner with so many virtual functions as well, each bound to its driver.

  handed over  tern migrate. Cloud Hypervisor: local; QEMU: x-ignore-shared. Memory stays where it is.
  copied       tern migrate --copy, and the peers' ordinary way. As a ratio, the time of sending as many bytes through a
               socket of the same kind, from one buffer into another.

  total        from the request until the destination said that the guest runs. tern builds the machine in that time, and so
               does Cloud Hypervisor; QEMU has built it when it begins to listen.
  pause        tern: as it reports it, from the request to stop until the guest runs elsewhere, and its parts. Cloud
               Hypervisor: from its event `pausing` at the source to `resumed` at the destination, as they arrive. QEMU: from
               its event STOP at the source to RESUME at the destination, as it dates them.
  gap          the longest time between two looks of the guest at its clock around the move; in brackets that of the last half
               second before it. A monitor that stops the guest's clock for the pause hides it from the guest.
  sent         bytes sent; for each byte in pages that were not all zero in the first round of copying.
  CPU          user and system time of both processes during the move, their vCPUs included.

All are asked for a pause of 100 ms at most where memory is copied. QEMU has no limit of its bandwidth. Cloud
Hypervisor runs without its filter of system calls.";

/// `cargo xtask bench migrate`: guests that are moved, handed over and copied
#[derive(Debug, Args)]
#[command(after_help = MEASURED)]
pub struct Migrate {
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
        default_value = "256M"
    )]
    sizes: Vec<Mib>,
    /// How many moves each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=40))]
    rounds: u32,
    /// How much of its memory each guest touches
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=75))]
    touch: u64,
    /// The working set that a guest writes to
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    dirty: Mib,
    /// How many of its pages it writes to every millisecond
    #[arg(long, value_name = "PAGES", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=1000))]
    rate: u64,
    /// Also guests with so many virtual functions
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=64))]
    vfs: Vec<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Monitors to compare with.
#[derive(Clone, Debug, PartialEq, Args)]
struct Peers {
    /// A Cloud Hypervisor to compare with
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
    /// A QEMU (qemu-system-x86_64) to compare with
    #[arg(long, value_name = "PATH")]
    qemu: Option<PathBuf>,
}

impl Plan {
    /// The command line that means the same.
    fn arguments(&self) -> Vec<OsString> {
        let sizes: Vec<String> = self.sizes.iter().map(Mib::to_string).collect();
        let vfs: Vec<String> = self.vfs.iter().map(u32::to_string).collect();
        let mut arguments: Vec<OsString> = Vec::new();
        for (name, value) in [
            ("--sizes", sizes.join(",")),
            ("--rounds", self.rounds.to_string()),
            ("--touch", self.touch.to_string()),
            ("--dirty", self.dirty.to_string()),
            ("--rate", self.rate.to_string()),
            ("--vfs", vfs.join(",")),
        ] {
            if !value.is_empty() {
                arguments.extend([name.into(), value.into()]);
            }
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

    /// MiB of memory that a machine needs: both processes have all memory of the guest once it has been read. QEMU has it in
    /// files of a directory that may have one half.
    fn machine_mib(&self, files: bool) -> u64 {
        let largest = self.sizes.iter().max().map_or(0, |size| size.0);
        let both = 2 * (largest + MONITOR_ITSELF);
        let all = if files { 2 * both } else { both };
        all + MACHINE_ITSELF
    }
}

impl Migrate {
    pub fn run(mut self) -> Result<i32> {
        let peers = peer_arguments(&[
            ("--cloud-hypervisor", &self.peers.cloud_hypervisor),
            ("--qemu", &self.peers.qemu),
        ])?;
        let tern = workspace::release_binary("vmm", "tern")?;
        let guests = image::guests(&[self.kernel], false)?;
        let guest = guests.into_values().next().context("no guest image")?;
        let mut command: Vec<OsString> = vec![
            std::env::current_exe().context("where is xtask?")?.into(),
            "bench".into(),
            "migrate-inside".into(),
        ];
        command.extend(self.plan.arguments());
        command.extend(peers);
        for (name, value) in [
            ("--about", about(&guest.kernel)?.into()),
            ("--tern", tern.into_os_string()),
            ("--kernel", guest.vmlinuz.into()),
            ("--initrd", guest.initramfs.into()),
        ] {
            command.extend([name.into(), value]);
        }
        let needed = self.plan.machine_mib(self.peers.qemu.is_some());
        self.machine.memory = self.machine.memory.max(needed);
        kvm::run(&self.machine, &command)
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
        let asked =
            "--sizes 128M,2G --rounds 3 --touch 10 --dirty 8M --rate 4 --vfs 1,16,64 --json";
        for words in [asked, ""] {
            let words: Vec<&str> = words.split_whitespace().collect();
            let plan = parse(&words).unwrap();
            let arguments = plan.arguments();
            let again: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
            assert_eq!(parse(&again).unwrap(), plan);
        }
        for bad in [
            "--rounds 0",
            "--rate 0",
            "--vfs 65",
            "--vfs 0",
            "--dirty 32",
        ] {
            let words: Vec<&str> = bad.split_whitespace().collect();
            assert!(parse(&words).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_largest_guest_says_what_the_machine_needs() {
        let plan = parse(&["--sizes", "256M,4G"]).unwrap();
        assert_eq!(plan.machine_mib(false), 1024 + 2 * (4096 + 64));
        assert_eq!(plan.machine_mib(true), 1024 + 4 * (4096 + 64));
    }
}
