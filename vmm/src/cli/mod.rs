//! The command line of `tern`.

pub mod admin;
pub mod control;
mod failure;
mod info;
mod inspect;
mod migrate;
mod overrides;
pub(crate) mod print;
pub(crate) mod process;
mod progress;
mod receive;
mod restore;
pub mod run;
mod snapshot;
mod tls;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use self::print::say;
use crate::api::socket;
use crate::console::terminal;
use crate::errors::chain;
use crate::{doctor, exit, signals};

#[derive(Debug, Parser)]
#[command(
    name = "tern",
    version,
    about = "A small KVM virtual machine monitor",
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a Linux guest and run it until it ends
    Run(Box<run::Run>),
    /// Show what a running guest is made of and what it does
    Info(control::Guest),
    /// Stop a running guest and its devices; answers when nothing of it happens any more
    Pause(control::Guest),
    /// Let a paused guest run
    Resume(control::Guest),
    /// Save a running guest into a directory
    Snapshot(snapshot::Snapshot),
    /// Continue a guest from a snapshot
    Restore(Box<restore::Restore>),
    /// Wait for a guest from another process and run it
    Receive(Box<receive::Receive>),
    /// Move a running guest to another process
    Migrate(migrate::Migrate),
    /// End a doubt after a migration whose connection was lost
    Resolve(migrate::Resolve),
    /// Press the guest's power button and wait until it has powered off
    Shutdown(control::ShutdownArgs),
    /// Send administration commands to an SR-IOV owner of a running guest, or stop, save, restore and watch one of its
    /// virtual functions with them; or commands to a management device
    Admin(admin::Admin),
    /// Show what is in a snapshot, or what differs between two
    Inspect(inspect::Inspect),
    /// Say whether this host can run guests, and if not, why and what to do
    Doctor(Doctor),
}

/// `tern doctor`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 this host can run guests; 1 it cannot; 2 the command line is wrong."
)]
struct Doctor {
    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    fn run(&self) -> anyhow::Result<u8> {
        let report = doctor::examine();
        if self.json {
            say!("{}", serde_json::to_string(&report)?);
        } else {
            say!("{report}");
        }
        Ok(if report.usable { 0 } else { exit::SETUP })
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let json = failure::wants_json(std::env::args_os());
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help is no failure.
            if json && error.use_stderr() {
                failure::say_usage(&error);
            }
            error.exit();
        }
    };
    // A guest's output is no answer.
    let runs = matches!(
        cli.command,
        Command::Run(_) | Command::Restore(_) | Command::Receive(_)
    );
    logging();
    clean_up_on_panic();
    signals::on_crash(terminal::restore);
    let tells = matches!(
        cli.command,
        Command::Info(_) | Command::Inspect(_) | Command::Doctor(_)
    );
    let result = match cli.command {
        Command::Run(command) => command.run(),
        Command::Info(guest) => guest.info(),
        Command::Pause(guest) => guest.pause(),
        Command::Resume(guest) => guest.resume(),
        Command::Snapshot(command) => command.run(),
        Command::Restore(command) => command.run(),
        Command::Receive(command) => command.run(),
        Command::Migrate(command) => command.run(),
        Command::Resolve(command) => command.run(),
        Command::Shutdown(command) => command.run(),
        Command::Admin(command) => command.run(),
        Command::Inspect(command) => command.run(),
        Command::Doctor(command) => command.run(),
    };
    terminal::restore();
    match result {
        // Of a command that only tells, nothing is left.
        Ok(0) if tells && print::is_lost() => ExitCode::from(exit::SETUP),
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("tern: {}", chain(error.as_ref()));
            let usage = error.downcast_ref::<crate::config::ConfigError>().is_some();
            let status = if usage { exit::USAGE } else { exit::SETUP };
            if json && !runs {
                failure::say_why(&error, status);
            }
            ExitCode::from(status)
        }
    }
}

/// Release builds abort on a panic and drop nothing: what outlives the process is put in order here.
fn clean_up_on_panic() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        terminal::restore();
        socket::remove_bound();
        previous(info);
    }));
}

/// Logs go to standard error; `TERN_LOG` chooses, as in `TERN_LOG=debug` or `TERN_LOG=vmm=trace`.
fn logging() {
    let colours = std::io::stderr().is_terminal();
    let Ok(filter) = std::env::var("TERN_LOG") else {
        let _ = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_writer(std::io::stderr)
            .with_ansi(colours)
            .with_target(false)
            .without_time()
            .try_init();
        return;
    };
    let _ = tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .try_init();
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
