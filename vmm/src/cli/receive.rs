//! `tern receive`.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;

use super::overrides;
use super::process::{Origin, Process};
use super::tls::{self, Tls};
use crate::config::MachineSpec;
use crate::console::output::Output;
use crate::exit;
use crate::machine::Machine;
use crate::machine::functions::Backends;
use crate::machine::provider::Provider;
use crate::migrate::address::Address;
use crate::migrate::destination::{ArrivedGuest, Candidate, Receiver};
use crate::signals::{Signal, Signals};
use crate::snapshot::overrides::Overrides;

const EXAMPLES: &str = "\
Examples:
  tern receive unix:move.sock --api-socket there.sock
  tern migrate --api-socket here.sock unix:move.sock

The machine is built when a guest is offered, with the options it had at its source; what is not the same here is said with
options. Over a unix: address, open disks and taps are handed over, and memory too unless the source copies it; a console on a
file is not: give another one with --console. Over tcp: with --insecure, no path of the source is followed: every disk and tap
is named with --disk and --net. Disks that are not handed over are locked here when the source has let go of them.

Nothing of the guest happens here before all of it has arrived and its source gives it away. If that fails, this process
ends with status 1, and the guest goes on at its source.";

/// Wait for a guest from another process and run it.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}\n\n{}", tls::EXAMPLE, exit::TABLE))]
pub struct Receive {
    /// Where to listen: unix:PATH, or tcp:HOST:PORT
    #[arg(value_name = "ADDR")]
    address: Address,

    /// Do not let the guest go on; `tern resume` does
    #[arg(long, requires = "api_socket")]
    paused: bool,

    /// Unix socket of the control API, from the moment the guest arrives
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,

    #[command(flatten)]
    different: overrides::Options,

    /// Accept a guest from a network that others can read and change
    #[arg(long)]
    insecure: bool,

    #[command(flatten)]
    tls: Tls,

    /// Run even where KVM only interprets guest code and is a thousand times too slow
    #[arg(long)]
    force: bool,
}

impl Receive {
    /// Runs the guest; returns the exit status.
    pub fn run(self) -> anyhow::Result<u8> {
        let process = Process::begin()?;
        let overrides: Overrides = self.different.into();
        let receiver = Receiver::bind(&self.address, self.tls.files().as_ref(), self.insecure)?;
        eprintln!("tern: waiting for a guest at {}", self.address);
        let candidate = receiver.wait(&overrides, self.force)?;
        let spec = candidate.spec().clone();
        let mut moved = Moved {
            candidate,
            arrived: None,
            paused: self.paused,
        };
        let outcome = process.host(spec, self.api_socket.as_deref(), &mut moved);
        if let Err(error) = &outcome {
            moved.candidate.refuse(error);
        }
        outcome
    }
}

/// A guest that comes from another process.
struct Moved {
    candidate: Candidate,
    arrived: Option<ArrivedGuest>,
    paused: bool,
}

impl Origin for Moved {
    fn provider(&mut self) -> Provider {
        self.candidate.provider()
    }

    fn build(
        &mut self,
        _spec: MachineSpec,
        backends: Backends,
        output: Option<&Output>,
    ) -> anyhow::Result<Arc<Machine>> {
        self.candidate.build(backends, output)
    }

    fn arrive(&mut self, machine: &Arc<Machine>) -> anyhow::Result<()> {
        self.arrived = Some(self.candidate.arrive(machine)?);
        Ok(())
    }

    fn start(&mut self, machine: &Machine, signals: &mut Signals) -> anyhow::Result<()> {
        let arrived = self.arrived.take().context("no guest has arrived")?;
        let mut ended = || match signals.take() {
            Some(Signal::End(_)) => ControlFlow::Break(()),
            Some(Signal::Continued) | None => ControlFlow::Continue(()),
        };
        arrived.start(machine, self.paused, &mut ended)
    }
}
