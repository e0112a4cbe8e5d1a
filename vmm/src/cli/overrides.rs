//! Options for what is to be different in a machine that a guest goes on in.

use clap::Args;

use crate::config::ConfigError;
use crate::console::Target;
use crate::snapshot::overrides::{DiskOverride, NetOverride, Overrides};

/// See [`Overrides`].
#[derive(Debug, Args)]
pub struct Options {
    /// Another file for a disk; may be repeated. NAME is that of `tern info`: disk0, pf0, or with %d in PATH pf0-vf%d for all
    /// virtual functions, manager0-%d for a management device and all that it manages
    #[arg(long, value_name = "NAME=PATH")]
    disk: Vec<DiskOverride>,

    /// Another end for a network interface; may be repeated: net0=tap=TAP, net0=switch=NAME, pf0=uplink-tap=TAP,
    /// manager0=switch=NAME
    #[arg(long, value_name = "NAME=END")]
    net: Vec<NetOverride>,

    /// Serial console: stdio, file=PATH or none [default: as it was]
    #[arg(long, value_name = "TARGET")]
    console: Option<Target>,

    /// Virtio console: stdio, file=PATH or none [default: as it was]
    #[arg(long, value_name = "TARGET")]
    virtio_console: Option<Target>,
}

impl Options {
    /// The same for the machine; refused if they contradict each other.
    pub fn overrides(self) -> Result<Overrides, ConfigError> {
        let overrides = Overrides {
            disks: self.disk,
            nets: self.net,
            console: self.console,
            virtio_console: self.virtio_console,
        };
        overrides.check_contradictions()?;
        Ok(overrides)
    }
}
