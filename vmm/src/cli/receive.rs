//! `tern receive`.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Args;

use super::overrides;
use super::process::{Origin, Process};
use super::tls::{self, Tls};
use crate::api::socket::Socket;
use crate::config::{ConfigError, MachineSpec};
use crate::console::output::Output;
use crate::errors::chain;
use crate::exit;
use crate::machine::functions::Backends;
use crate::machine::provider::Provider;
use crate::machine::{Host, Machine, State};
use crate::migrate::address::Address;
use crate::migrate::destination::{ArrivedGuest, Candidate, Receiver};
use crate::signals::{Signal, Signals};
use crate::snapshot::overrides::Overrides;

const EXAMPLES: &str = "\
Examples:
  tern receive unix:move.sock --api-socket there.sock
  tern migrate --api-socket here.sock unix:move.sock

The machine is built when a guest is offered, with the options it had at its source; what is not the same here is said with
options, whose files have to be there when the command starts. Over a unix: address, open disks and taps are handed over, and
memory too unless the source copies it; a console on a file is not: give another one with --console. Over tcp: with
--insecure, no path of the source is followed: every disk and tap is named with --disk and --net. Disks that are not handed
over are locked here when the source has let go of them.

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
        let overrides = self.different.overrides()?;
        let api_socket = self.api_socket.as_deref();
        check_sockets(&self.address, api_socket)?;
        let host = ready(api_socket, &overrides, self.force)?;
        let receiver = Receiver::bind(&self.address, self.tls.files().as_ref(), self.insecure)?;
        eprintln!("tern: waiting for a guest at {}", self.address);
        let candidate = receiver.wait(&overrides, host)?;
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

/// Refuses the same socket for guests and for the control API.
fn check_sockets(address: &Address, api_socket: Option<&Path>) -> Result<(), ConfigError> {
    let (Address::Unix(here), Some(api)) = (address, api_socket) else {
        return Ok(());
    };
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if absolute(here) != absolute(api) {
        return Ok(());
    }
    Err(ConfigError::Contradiction {
        first: address.to_string(),
        second: format!("--api-socket {}", api.display()),
        reason: "each needs a path of its own",
    })
}

/// Looks at everything that can be said before a guest comes: whoever gave a wrong path learns it now, and not the one who
/// moves a guest here some day. The error has all of it.
fn ready(api_socket: Option<&Path>, overrides: &Overrides, force: bool) -> anyhow::Result<Host> {
    let mut reasons = Vec::new();
    if let Some(Err(error)) = api_socket.map(Socket::check) {
        reasons.push(error.to_string());
    }
    reasons.extend(overrides.unusable());
    let host = match Host::open(force) {
        Ok(host) if reasons.is_empty() => return Ok(host),
        Ok(_) => None,
        Err(error) => Some(chain(&error)),
    };
    reasons.extend(host);
    bail!("no guest could run here:\n  {}", reasons.join("\n  "));
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
        arrived.start(machine, self.paused, &mut ended)?;
        match machine.state() {
            State::Paused => eprintln!("tern: the guest is here, and paused"),
            _ => eprintln!("tern: the guest is here"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_path_is_not_for_guests_and_for_the_api() {
        for (address, api, good) in [
            ("unix:a", Some("a"), false),
            ("unix:a", Some("./a"), false),
            ("unix:a", Some("b"), true),
            ("unix:a", None, true),
            ("tcp:h:1", Some("h"), true),
        ] {
            let address: Address = address.parse().unwrap();
            let checked = check_sockets(&address, api.map(Path::new));
            assert_eq!(checked.is_ok(), good, "{address} {api:?}");
        }
    }

    #[test]
    fn everything_that_is_wrong_here_is_said_before_a_guest_comes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let overrides = Overrides {
            disks: vec![
                format!("disk0={}", at("missing").display())
                    .parse()
                    .unwrap(),
            ],
            console: Some(format!("file={}", at("no/c").display()).parse().unwrap()),
            ..Overrides::default()
        };
        let error = ready(Some(&at("no/s")), &overrides, true).err().unwrap();
        let error = error.to_string();
        for part in ["--api-socket ", "--disk disk0: ", "--console: "] {
            assert!(error.contains(part), "{error}");
        }
    }
}
