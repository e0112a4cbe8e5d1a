//! Options for what is to be different in a machine that a guest goes on in.

use clap::Args;

use crate::console::Target;
use crate::snapshot::overrides::{DiskOverride, NetOverride, Overrides};

/// See [`Overrides`].
#[derive(Debug, Args)]
pub struct Options {
    /// Another file for a disk; may be repeated. NAME is that of `tern info`: disk0, pf0, or pf0-vf%d for all virtual
    /// functions, with %d in PATH
    #[arg(long, value_name = "NAME=PATH")]
    disk: Vec<DiskOverride>,

    /// Another end for a network interface; may be repeated: net0=tap=TAP, net0=switch=NAME, pf0=uplink-tap=TAP
    #[arg(long, value_name = "NAME=END")]
    net: Vec<NetOverride>,

    /// Serial console: stdio, file=PATH or none [default: as it was]
    #[arg(long, value_name = "TARGET")]
    console: Option<Target>,

    /// Virtio console: stdio, file=PATH or none [default: as it was]
    #[arg(long, value_name = "TARGET")]
    virtio_console: Option<Target>,
}

impl From<Options> for Overrides {
    fn from(options: Options) -> Self {
        Self {
            disks: options.disk,
            nets: options.net,
            console: options.console,
            virtio_console: options.virtio_console,
        }
    }
}
