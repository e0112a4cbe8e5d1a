//! `tern snapshot`.

use std::path::PathBuf;

use clap::Args;
use indicatif::ProgressBar;

use super::progress::follow;
use crate::api::snapshots::SnapshotAnswer;
use crate::api::{Info, State};
use crate::cli::print::say;
use crate::snapshot::report::{Request, Then};

const EXAMPLES: &str = "\
Examples:
  tern snapshot --api-socket vm.sock before-upgrade
  tern snapshot --api-socket vm.sock --stop tonight && tern restore tonight
  tern snapshot --api-socket vm.sock --track monday
  tern snapshot --api-socket vm.sock --track --base monday tuesday

The directory has state.json, which people and jq can read, and memory.bin, a sparse file. Disks are not copied: a guest
that goes on changes them, and then the snapshot is restored with copies made at that time (--pause, copy, tern resume).

A snapshot that others have as their base must stay: one that replaces it does not take its place for them.

Exit status: 0 the snapshot is complete and on the disk; 1 it is not there, and the guest does what it did before; 2 the
command line is wrong. A request that is broken off (Ctrl-C) is given up.";

/// Save a running guest into a directory.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Snapshot {
    /// Unix socket of the guest, as given to `tern run --api-socket`
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,

    /// Directory to make; it must not exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Write only what changed since this snapshot, which was taken or restored with --track
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,

    /// Track from now on what changes, so that this snapshot can be the base of the next
    #[arg(long)]
    track: bool,

    /// Leave the guest paused
    #[arg(long, conflicts_with = "stop")]
    pause: bool,

    /// End the guest; its `tern run` exits with 6
    #[arg(long)]
    stop: bool,

    /// If DIR is a snapshot, put this one in its place
    #[arg(long)]
    replace: bool,

    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Snapshot {
    /// Has the guest saved; returns the exit status.
    pub fn run(&self) -> anyhow::Result<u8> {
        let body = Request {
            directory: std::path::absolute(&self.directory)?,
            base: self.base.as_ref().map(std::path::absolute).transpose()?,
            track: self.track,
            replace: self.replace,
            then: match (self.pause, self.stop) {
                (true, _) => Then::Pause,
                (_, true) => Then::Stop,
                (false, false) => Then::Resume,
            },
        };
        let body = serde_json::to_vec(&body)?;
        let answer = follow(&self.api_socket, "/api/v1/snapshot", &body, show)?;
        if self.json {
            say!("{}", serde_json::to_string(&answer)?);
        } else {
            say!("{}", describe(&answer));
        }
        Ok(0)
    }
}

/// Shows how far the snapshot is now.
fn show(bar: &ProgressBar, info: &Info) {
    if let Some(progress) = &info.progress {
        bar.set_length(progress.total);
        bar.set_position(progress.done);
        bar.set_message(progress.phase.name());
    }
}

/// The report for people.
fn describe(answer: &SnapshotAnswer) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let ms = |us: u64| us as f64 / 1000.0;
    let report = &answer.report;
    let (bytes, pause) = (report.bytes, report.pause_us);
    let state = match answer.state {
        State::Ended => "the guest was ended",
        State::Paused => "the guest is paused",
        _ => "the guest goes on",
    };
    format!(
        "{}: {:.1} MiB of {:.0} MiB memory in {:.2} s; {state}\n\
         pause {:.1} ms: stop {:.1}, devices {:.1}, vCPUs {:.1}, {:.1} MiB of memory {:.1}",
        report.directory.display(),
        mib(bytes.written_running + bytes.written_paused),
        mib(bytes.memory),
        report.total_us as f64 / 1e6,
        ms(pause.total),
        ms(pause.stop),
        ms(pause.devices),
        ms(pause.vcpus),
        mib(bytes.written_paused),
        ms(pause.memory),
    )
}
