//! `tern run`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::process::{self, Origin, Process};
use crate::boot::load::Prepared;
use crate::config::{Config, Disk, MAX_CPUS, MachineSpec, Manager, MemoryBacking, Net, Pf};
use crate::console::Target;
use crate::console::output::Output;
use crate::exit;
use crate::kvm::model::CpuModel;
use crate::machine::functions::Backends;
use crate::machine::hardware::fresh_ram;
use crate::machine::{Hardware, Host, Machine};
use crate::signals::Signals;

const EXAMPLES: &str = "\
Examples:
  tern run --kernel vmlinuz --initrd initrd.img
  tern run --kernel vmlinuz --initrd initrd.img --cpus 2 --memory 1G \\
           --disk path=root.img --net tap=tap0 --cmdline 'console=ttyS0 root=/dev/vda1'
  tern run --kernel vmlinuz --initrd initrd.img --pf net,vfs=4 --pf block,vfs=2,path=pf.raw,vf-path=vf%d.raw
  tern run --config guest.json --api-socket /run/guest.sock

The console is raw on a terminal: every key goes to the guest, Ctrl-C too. Ctrl-A x ends the guest.";

/// Boot a Linux guest and run it until it ends.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", exit::TABLE))]
pub struct Run {
    /// Kernel: a bzImage as distributions ship it (vmlinuz), or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,

    /// Initial RAM disk
    #[arg(long, value_name = "PATH")]
    initrd: Option<PathBuf>,

    /// Kernel command line [default: "console=ttyS0 panic=-1"]
    #[arg(long, value_name = "STR", allow_hyphen_values = true)]
    cmdline: Option<String>,

    /// Number of vCPUs, 1 to 254 [default: 1]
    #[arg(long, value_name = "N", value_parser = cpus, allow_hyphen_values = true)]
    cpus: Option<u32>,

    /// Memory, 64M to 256G [default: 256M]
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true)]
    memory: Option<String>,

    /// What that memory is kept in [default: memfd with --api-socket, since such a guest can be moved; else anonymous]
    #[arg(long, value_name = "BACKING")]
    memory_backing: Option<MemoryBacking>,

    /// Disk from a raw image or block device; may be repeated:
    /// path=PATH[,readonly][,serial=ID][,queues=N][,bus=root|port][,packed][,DOORS]. With packed, drivers may choose packed
    /// virtqueues. DOORS are what a driver can stop the device with, none by default: suspend=v5 (feature 42) or
    /// suspend=v1.4 (feature 43), device-stop[=BIT] (a feature from 44 to 49, by default 44), device-state-cap (the
    /// capability that stops single virtqueues)
    #[arg(long, value_name = "DISK")]
    disk: Vec<Disk>,

    /// Network interface; may be repeated: tap=NAME|switch=NAME[,mac=MAC][,bus=root|port][,packed][,DOORS].
    /// Interfaces on a switch of the same name are connected with each other inside this process
    #[arg(long, value_name = "NET")]
    net: Vec<Net>,

    /// SR-IOV physical function that owns N virtual functions; may be repeated:
    /// net,vfs=N[,switch=NAME][,uplink-tap=NAME][,mac=MAC], all of them on one switch, or
    /// block,vfs=N,path=PATH,vf-path=PATH[,readonly], where %d in vf-path is the number of the virtual function (1 to
    /// N). Both take [,strict-admin][,admin=draft|v1.4][,drain-ms=N][,passthrough][,packed][,DOORS]. admin=draft, the default, has
    /// the commands that move virtual functions; one that is to stop takes back what it has not begun after drain-ms [500].
    /// With passthrough the monitor keeps the physical function, and the guest has the virtual ones as plain devices. DOORS
    /// are for the virtual functions: a physical function that stopped could not execute commands
    #[arg(long, value_name = "PF")]
    pf: Vec<Pf>,

    /// Management device that makes up to N managed devices for its driver, by commands on its transport virtqueue; may be
    /// repeated: net,devices=N[,switch=NAME][,mac=MAC] or block,devices=N,path=PATH[,readonly], where %d in path is 0 for
    /// the management device and 1 to N for its devices. Both take [,wire=aligned|packed] (the layout of commands),
    /// [,queue-feature=BIT] [45], [,devices-feature=BIT] [46], [,packed], and for the managed devices
    /// [,suspend=v5|v1.4][,device-stop[=BIT]]
    #[arg(long, value_name = "MANAGER")]
    manager: Vec<Manager>,

    /// Give the guest an entropy device [default]
    #[arg(long, conflicts_with = "no_rng")]
    rng: bool,

    /// Give the guest no entropy device
    #[arg(long)]
    no_rng: bool,

    /// Serial console (ttyS0): stdio, file=PATH or none [default: stdio]
    #[arg(long, value_name = "TARGET")]
    console: Option<Target>,

    /// Virtio console (hvc0): stdio, file=PATH or none [default: none]
    #[arg(long, value_name = "TARGET")]
    virtio_console: Option<Target>,

    /// Unix socket of the control API
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    /// Read the configuration from a JSON file; options given here win; disks, interfaces and physical
    /// functions are added
    #[arg(long, value_name = "FILE.json")]
    config: Option<PathBuf>,

    /// Do not let the guest begin; `tern resume` does
    #[arg(long, requires = "api_socket")]
    paused: bool,

    /// Run even where KVM only interprets guest code and is a thousand times too slow
    #[arg(long)]
    force: bool,
}

impl Run {
    fn config(&mut self) -> Config {
        Config {
            kernel: self.kernel.take(),
            initrd: self.initrd.take(),
            cmdline: self.cmdline.take(),
            cpus: self.cpus,
            memory: self.memory.take(),
            memory_backing: self.memory_backing,
            disks: std::mem::take(&mut self.disk),
            nets: std::mem::take(&mut self.net),
            pfs: std::mem::take(&mut self.pf),
            managers: std::mem::take(&mut self.manager),
            rng: match (self.rng, self.no_rng) {
                (true, _) => Some(true),
                (_, true) => Some(false),
                (false, false) => None,
            },
            console: self.console.take(),
            virtio_console: self.virtio_console.take(),
            api_socket: self.api_socket.take(),
        }
    }

    /// Runs the guest; returns the exit status.
    pub fn run(mut self) -> anyhow::Result<u8> {
        let process = Process::begin()?;
        let base = match &self.config {
            Some(path) => Config::from_file(path)?,
            None => Config::default(),
        };
        let config = base.overlaid(self.config());
        let api_socket = config.api_socket.clone();
        let memory_backing = config.memory_backing();
        let spec = config.resolve()?;
        let mut boot = Boot {
            memory_backing,
            force: self.force,
            paused: self.paused,
        };
        process.host(spec, api_socket.as_deref(), &mut boot)
    }
}

/// A guest that boots.
struct Boot {
    memory_backing: MemoryBacking,
    force: bool,
    paused: bool,
}

impl Origin for Boot {
    fn build(
        &mut self,
        spec: MachineSpec,
        backends: Backends,
        output: Option<&Output>,
    ) -> anyhow::Result<Arc<Machine>> {
        let kernel = Prepared::open(spec.memory, &spec.boot)?;
        let ram = fresh_ram(spec.memory, self.memory_backing)?;
        let host = Host::open(self.force)?;
        let model = CpuModel::new(host.cpu(), spec.cpus);
        let hardware = Hardware::create(host, spec, model, ram, backends, output)?;
        hardware.boot(kernel)?;
        Ok(hardware.finish())
    }

    fn start(&mut self, machine: &Machine, _signals: &mut Signals) -> anyhow::Result<()> {
        process::start(machine, self.paused)
    }
}

/// Reads a number of vCPUs.
fn cpus(text: &str) -> Result<u32, String> {
    let number = text.parse().ok();
    number
        .filter(|n| (1..=MAX_CPUS.into()).contains(n))
        .ok_or_else(|| format!("a guest has between 1 and {MAX_CPUS} vCPUs"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_vcpus_no_guest_can_have_are_refused_with_the_range() {
        assert_eq!((cpus("1"), cpus("254")), (Ok(1), Ok(254)));
        for text in ["0", "255", "-1", "abc", "1.5", "", "99999999999"] {
            assert!(
                cpus(text).unwrap_err().contains("between 1 and 254"),
                "{text}"
            );
        }
    }
}
