//! `cargo xtask demo`: from nothing to a guest under tern that is saved, restored, and moved.

mod inside;

use std::ffi::OsString;

use anyhow::{Context, Result};
use clap::Args;

pub use self::inside::Inside;
use crate::image::{self, Kernel};
use crate::kvm;
use crate::workspace;

const SHOWN: &str = "\
A guest with a disk, two network interfaces, and a card that owns two virtual functions shows what it finds. Then, under a
load that checks every byte, packet and register it has: it is saved and restored; it is copied to another process while it
runs; and it is handed over to one more. A second guest has management devices: its driver makes two network cards and a disk
by commands, and is moved with them. Exit status 0 says that all of this happened and that the guests found nothing wrong.";

/// `cargo xtask demo`
#[derive(Debug, Args)]
#[command(after_help = SHOWN)]
pub struct Demo {
    /// Give a shell in the guest instead of all that; its end ends the guest
    #[arg(long)]
    shell: bool,
    /// Boot this kernel
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    #[command(flatten)]
    machine: kvm::Options,
}

/// Runs `"$@" --disk path=FILE` with a file that is gone afterwards. It is made where the command runs: an emulated
/// host cannot write elsewhere.
const WITH_DISK: &str = r#"
disk=$(mktemp /tmp/tern-demo.XXXXXX) || exit
trap 'rm -f "$disk"' EXIT
truncate -s 64M "$disk" || exit
"$@" --disk "path=$disk,serial=TERN-DEMO"
"#;

impl Demo {
    pub fn run(self) -> Result<i32> {
        let tern = workspace::release_binary("vmm", "tern")?;
        let guests = image::guests(&[self.kernel], false)?;
        let guest = guests.into_values().next().context("no guest image")?;
        let mut command: Vec<OsString> = if self.shell {
            ["sh", "-c", WITH_DISK, "sh"].map(OsString::from).to_vec()
        } else {
            let xtask = std::env::current_exe().context("where is xtask?")?;
            vec![xtask.into(), "demo-inside".into(), "--tern".into()]
        };
        command.push(tern.into());
        if self.shell {
            command.push("run".into());
        }
        let mut option = |name: &str, value: OsString| command.extend([name.into(), value]);
        option("--kernel", guest.vmlinuz.into());
        option("--initrd", guest.initramfs.into());
        if self.shell {
            let line = "console=ttyS0 quiet panic=-1 tern.shell";
            for (name, value) in [
                ("--cmdline", line),
                ("--cpus", "2"),
                ("--memory", "512M"),
                ("--net", "switch=lan"),
                ("--net", "switch=lan"),
            ] {
                option(name, value.into());
            }
        }
        kvm::run(&self.machine, &command)
    }
}
