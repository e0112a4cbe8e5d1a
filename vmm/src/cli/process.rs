//! The process around a guest: signals, console, control API and exit status, however the guest came to be.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::pipe::PipeFlags;

use crate::api::server::Server;
use crate::api::socket::{Socket, remove_bound};
use crate::config::MachineSpec;
use crate::config::check::{console_file, keep_made, remove_made};
use crate::console::output::{Loss, Output};
use crate::console::{self, Target, terminal};
use crate::exit::{self, Outcome};
use crate::limits;
use crate::machine::functions::Backends;
use crate::machine::provider::Provider;
use crate::machine::run::Sink;
use crate::machine::{Machine, TransitionError, run};
use crate::signals::{Signals, Watch};
use crate::vcpu::ControlError;

/// How long the reader of the console may take for the rest before those who listen to the API are told of the end.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// Where a guest comes from.
pub trait Origin {
    /// Gives devices their files.
    fn provider(&mut self) -> Provider {
        Provider::by_name()
    }

    /// Makes a machine of `spec`.
    fn build(
        &mut self,
        spec: MachineSpec,
        backends: Backends,
        output: Option<&Output>,
    ) -> anyhow::Result<Arc<Machine>>;

    /// Waits for the guest, for one that comes from elsewhere. A signal ends the process meanwhile.
    fn arrive(&mut self, _machine: &Arc<Machine>) -> anyhow::Result<()> {
        Ok(())
    }

    /// Starts the machine. Nobody else takes `signals` meanwhile.
    fn start(&mut self, machine: &Machine, signals: &mut Signals) -> anyhow::Result<()>;
}

/// Starts `machine`. One that ended before is no error: it says itself how.
pub fn start(machine: &Machine, paused: bool) -> anyhow::Result<()> {
    match machine.start(paused) {
        Err(TransitionError::Control(ControlError::Ended)) | Ok(()) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A process that is to run a guest.
pub struct Process {
    watch: Watch,
}

impl Process {
    /// Makes room for descriptors and takes signals over. To be called before anything else: threads inherit the mask.
    pub fn begin() -> anyhow::Result<Self> {
        limits::reserve();
        let signals = Signals::block()?;
        // What follows may take long: a kernel on a slow network, memory the host has to find first.
        let watch = signals.watch(end_set_up)?;
        Ok(Self { watch })
    }

    /// Opens what `spec` names, has `origin` make a machine of it, runs that to its end and returns the exit status.
    pub fn host(
        self,
        spec: MachineSpec,
        api_socket: Option<&Path>,
        origin: &mut dyn Origin,
    ) -> anyhow::Result<u8> {
        limits::check(&spec)?;
        let socket = match api_socket {
            Some(path) => Some(Socket::bind(path)?),
            None => None,
        };
        let file = console_file(&spec.console, &spec.boot_files())?;
        let loss = Loss::default();
        let place = spec.console.place();
        let output = match (&spec.console, file) {
            (Target::Stdio, _) => Some(Output::spawn(console::stdout()?, &place, &loss)?),
            (_, Some(file)) => Some(Output::spawn(file, &place, &loss)?),
            (_, None) => None,
        };
        // A virtio console on standard input gets it through a pipe, so that the escape sequences still work.
        let (input, sink) = match (&spec.console, &spec.virtio_console) {
            (Target::Stdio, _) => (None, Some(Sink::Serial)),
            (_, Some(Target::Stdio)) => {
                let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                rustix::io::ioctl_fionbio(&write, true)?;
                (Some(read), Some(Sink::Pipe(write)))
            }
            _ => (None, None),
        };
        let backends = Backends::open_from(&spec, origin.provider(), input, &loss)?;
        let machine = origin.build(spec, backends, output.as_ref())?;
        let server = match socket {
            Some(socket) => Some(Server::start(socket, Arc::clone(&machine))?),
            None => None,
        };
        if let Err(error) = origin.arrive(&machine) {
            // Somebody ended it meanwhile.
            let Some(outcome) = machine.outcome() else {
                return Err(error);
            };
            eprintln!("tern: {outcome}, before the guest was here");
            return Ok(outcome.status());
        }
        keep_made();
        let mut signals = self.watch.finish()?;
        let outcome = run::run(&machine, &mut signals, sink, |machine, signals| {
            origin.start(machine, signals)
        });
        // What follows waits for threads, which may hang together with a disk. Another signal then ends the process
        // at once, so that nothing may be left to do that outlives it.
        remove_bound();
        signals.release()?;
        let outcome = outcome?;
        if let Some(output) = &output {
            output.flush(LAST_WORDS);
        }
        machine.wait_for_leaving();
        let outcome = if machine.migration.in_doubt() {
            Outcome::InDoubt(outcome.to_string())
        } else {
            outcome
        };
        if let Some(server) = server {
            server.announce(&outcome.clone().with_loss(loss.reason()));
        }
        drop(machine);
        drop(output);
        let outcome = outcome.with_loss(loss.reason());
        let status = outcome.status();
        if status != exit::POWER_OFF {
            eprintln!("tern: {outcome}");
        }
        Ok(status)
    }
}

/// Ends the process on a signal before there is a guest that could be ended in order.
fn end_set_up(signal: i32) {
    terminal::restore();
    remove_bound();
    remove_made();
    let outcome = Outcome::Signal(signal);
    eprintln!("tern: {outcome}, before the guest was set up");
    exit::now(outcome.status());
}
