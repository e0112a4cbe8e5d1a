//! `cargo xtask demo`: from nothing to a guest under tern.

use std::ffi::OsString;

use anyhow::Result;
use clap::Args;

use crate::image::{self, Kernel};
use crate::kvm;
use crate::workspace;

/// `cargo xtask demo`
#[derive(Debug, Args)]
pub struct Demo {
    /// Give a shell in the guest instead of the tour; its end ends the guest
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
        let mut command: Vec<OsString> = ["sh", "-c", WITH_DISK, "sh"].map(OsString::from).to_vec();
        command.push(tern.into());
        command.push("run".into());
        let mut option = |name: &str, value: OsString| command.extend([name.into(), value]);
        for guest in guests.into_values() {
            option("--kernel", guest.vmlinuz.into());
            option("--initrd", guest.initramfs.into());
        }
        let scenario = if self.shell {
            "tern.shell"
        } else {
            "tern.run=demo:disks=1:networks=2"
        };
        option(
            "--cmdline",
            format!("console=ttyS0 quiet panic=-1 {scenario}").into(),
        );
        option("--cpus", "2".into());
        option("--memory", "512M".into());
        option("--net", "switch=lan".into());
        option("--net", "switch=lan".into());
        kvm::run(&self.machine, &command)
    }
}
