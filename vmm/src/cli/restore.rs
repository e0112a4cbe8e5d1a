//! `tern restore`.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, anyhow};
use clap::{Args, ValueEnum};

use super::overrides;
use super::process::{self, Origin, Process};
use crate::config::MachineSpec;
use crate::console::output::Output;
use crate::exit;
use crate::machine::functions::Backends;
use crate::machine::{Host, Machine};
use crate::signals::Signals;
use crate::snapshot::restore::{ClockChoice, Fit, Options, Source};

const EXAMPLES: &str = "\
Examples:
  tern restore tonight
  tern restore --api-socket vm.sock --disk disk0=copy-of-root.img before-upgrade
  tern restore --paused --api-socket a.sock --net net0=tap=tap7 template

To a guest it looks as if it had slept: its time of day is right, and timers that ran out meanwhile are due. With --clock
saved its clocks go on where they stopped. Memory is read from the snapshot as the guest touches it: DIR may be replaced or
removed meanwhile, but its files must not be changed in place. Of an incremental snapshot, what is newer than the oldest of
its bases is read first.";

/// See [`ClockChoice`].
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Clock {
    /// Jump to the present, as if the guest had slept
    Host,
    /// Go on where they stopped, as if no time had passed
    Saved,
}

/// Continue a guest from a snapshot.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", exit::TABLE))]
pub struct Restore {
    /// The snapshot
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Do not let the guest go on; `tern resume` does
    #[arg(long, requires = "api_socket")]
    paused: bool,

    /// Unix socket of the control API
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    #[command(flatten)]
    different: overrides::Options,

    /// Clocks of the guest
    #[arg(long, value_name = "CLOCK", default_value = "host")]
    clock: Clock,

    /// Read all of memory before the guest goes on
    #[arg(long)]
    prefault: bool,

    /// Track what changes from now on, so that this snapshot can be the base of the next
    #[arg(long)]
    track: bool,

    /// Run even where KVM only interprets guest code and is a thousand times too slow
    #[arg(long)]
    force: bool,
}

impl Restore {
    /// Runs the guest; returns the exit status.
    pub fn run(self) -> anyhow::Result<u8> {
        let process = Process::begin()?;
        let overrides = self.different.overrides()?;
        let force = self.force;
        // Trying the host takes about as long as reading the state.
        let host = thread::Builder::new()
            .name("host".to_owned())
            .spawn(move || Host::open(force))?;
        let source = Source::open(&self.directory, &overrides)?;
        let host = host.join().map_err(|_| anyhow!("trying the host failed"))?;
        let source = source.fit(host?)?;
        let options = Options {
            clock: match self.clock {
                Clock::Host => ClockChoice::Host,
                Clock::Saved => ClockChoice::Saved,
            },
            prefault: self.prefault,
            track: self.track,
        };
        let spec = source.spec().clone();
        let mut saved = Saved {
            source: Some(source),
            options,
            paused: self.paused,
        };
        process.host(spec, self.api_socket.as_deref(), &mut saved)
    }
}

/// A guest that goes on from a snapshot.
struct Saved {
    source: Option<Fit>,
    options: Options,
    paused: bool,
}

impl Origin for Saved {
    fn build(
        &mut self,
        _spec: MachineSpec,
        backends: Backends,
        output: Option<&Output>,
    ) -> anyhow::Result<Arc<Machine>> {
        let source = self.source.take().context("a snapshot is restored once")?;
        Ok(source.restore(backends, output, self.options)?)
    }

    fn start(&mut self, machine: &Machine, _signals: &mut Signals) -> anyhow::Result<()> {
        process::start(machine, self.paused)
    }
}
