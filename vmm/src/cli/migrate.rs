//! `tern migrate` and `tern resolve`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use migration::live::OnTimeout;
use migration::live::commit::Resolution;
use migration::live::report::Report;
use migration::wire::message::Memory;

use super::progress::follow;
use super::tls::{self, Tls};
use crate::api::client::{ClientError, request};
use crate::api::migrations::{CallOff, Resolve as ResolveRequest};
use crate::api::{Info, Status};
use crate::cli::print::say;
use crate::exit;
use crate::migrate::address::Address;
use crate::migrate::html::{self, Outcome, REPORT_BEGINS};
use crate::migrate::monitor::Status as Migration;
use crate::migrate::source::{
    Answer, CONNECTIONS, DEFAULT_CONNECTIONS, DOWNTIME_MS, DOWNTIMES_MS, Request, TIMEOUT_S,
    TIMEOUTS_S,
};
use crate::migrate::tls::Files;

const EXAMPLES: &str = "\
Examples:
  tern receive unix:move.sock --api-socket there.sock
  tern migrate --api-socket here.sock unix:move.sock
  tern migrate --api-socket here.sock --copy --downtime 50 --report moved.html unix:move.sock
  tern migrate --api-socket here.sock --cancel

Over a unix: address, memory, open disks and taps are handed over to the other process. With --copy, and over tcp:, memory is
copied while the guest runs, again and again what it has written, until the rest fits the pause; a guest that writes faster
is slowed down in steps. With --verify, the destination then compares every page with its checksum at the source, while the
guest stands still, and refuses the guest if one differs; the pause that --downtime plans for does not include that. Memory
that is handed over is the same memory: there is nothing to compare. With --connections, memory is copied over so many
connections at once, which several CPUs of either host fill and read; take more than one for a large guest, above all over
TLS, if both hosts have CPUs to spare.

Exit status: 0 the guest runs at the destination, and its `tern run` here ends with 8; 1 the guest goes on here, and why is
said; 2 the command line is wrong; 9 the guest was given away and whether it runs there is not known: see `tern resolve
--help`. A request that is broken off (Ctrl-C) is called off, as with --cancel.";

/// Move a running guest to another process.
#[derive(Debug, Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", tls::EXAMPLE))]
pub struct Migrate {
    /// Unix socket of the guest, as given to `tern run --api-socket`
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,

    /// Where `tern receive` listens: unix:PATH, or tcp:HOST:PORT
    #[arg(value_name = "ADDR", required_unless_present = "cancel")]
    to: Option<Address>,

    /// Copy memory although it could be handed over
    #[arg(long)]
    copy: bool,

    /// Have the destination compare all of memory before the guest is given away; the pause is as long as that takes
    #[arg(long)]
    verify: bool,

    /// How many connections to copy memory over, with a thread for each at either end
    #[arg(long, value_name = "N", default_value_t = DEFAULT_CONNECTIONS, value_parser = clap::value_parser!(u32).range(connections()))]
    connections: u32,

    /// Longest pause to plan for, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = DOWNTIME_MS, value_parser = clap::value_parser!(u64).range(DOWNTIMES_MS))]
    downtime: u64,

    /// How long to copy memory at most while the guest runs, in seconds
    #[arg(long, value_name = "S", default_value_t = TIMEOUT_S, value_parser = clap::value_parser!(u64).range(TIMEOUTS_S))]
    timeout: u64,

    /// What to do then: leave the guest here, or move it with a longer pause
    #[arg(long, value_name = "WHAT", default_value = "cancel")]
    on_timeout: WhenLate,

    /// Let the guest's memory cross a network that others can read and change
    #[arg(long)]
    insecure: bool,

    /// Write a report with pictures to this file, also if the guest stays or is in doubt
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,

    #[command(flatten)]
    tls: Tls,

    /// Call off the migration that is under way
    #[arg(long, conflicts_with = "to")]
    cancel: bool,

    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

/// [`CONNECTIONS`] as clap wants it.
fn connections() -> RangeInclusive<i64> {
    i64::from(*CONNECTIONS.start())..=i64::from(*CONNECTIONS.end())
}

/// See [`OnTimeout`].
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum WhenLate {
    /// The guest stays
    Cancel,
    /// It is moved with a longer pause
    Switch,
}

impl Migrate {
    /// Has the guest moved; returns the exit status.
    pub fn run(self) -> anyhow::Result<u8> {
        if self.cancel {
            let _: CallOff = request(&self.api_socket, "PUT", "/api/v1/migrate/cancel", b"")?;
            return Ok(0);
        }
        let to = self.to.context("an address is needed")?.absolute()?;
        let body = serde_json::to_vec(&Request {
            to: to.to_string(),
            copy: self.copy,
            verify: self.verify,
            connections: self.connections,
            downtime_ms: self.downtime,
            timeout_s: self.timeout,
            on_timeout: match self.on_timeout {
                WhenLate::Cancel => OnTimeout::Cancel,
                WhenLate::Switch => OnTimeout::Switch,
            },
            insecure: self.insecure,
            tls: self.tls.files().map(Files::absolute).transpose()?,
        })?;
        // Before anything happens: a guest that was moved is not moved back for it.
        let mut report_file = match &self.report {
            Some(path) => Some(
                ReportFile::create(path).with_context(|| format!("--report {}", path.display()))?,
            ),
            None => None,
        };
        let answer = follow(&self.api_socket, "/api/v1/migrate", &body, show);
        if let Err(ClientError::Refused(failure)) = &answer
            && let Some(attempt) = &failure.attempt
        {
            write_report(
                report_file.take(),
                &to,
                Outcome::Kept(&failure.error, attempt),
            );
        }
        let answer = answer?;
        if self.json {
            say!("{}", serde_json::to_string(&answer)?);
        }
        match answer {
            Answer::Moved { report } => {
                write_report(report_file, &to, Outcome::Moved(&report));
                if !self.json {
                    say!("{}", describe(&to, &report));
                }
                Ok(0)
            }
            Answer::InDoubt { reason, attempt } => {
                write_report(report_file, &to, Outcome::InDoubt(&reason, &attempt));
                eprintln!("tern: {reason}");
                Ok(exit::IN_DOUBT)
            }
        }
    }
}

/// Writes the report, if there is to be one. What became of the guest is no other for it.
fn write_report(file: Option<ReportFile>, to: &Address, outcome: Outcome<'_>) {
    if let Some(file) = file
        && let Err(error) = file.finish(&html::page(&to.to_string(), outcome))
    {
        eprintln!("tern: the report cannot be written: {error}");
    }
}

/// A file that is there when the report is, and replaces an older one only then.
struct ReportFile {
    path: PathBuf,
    part: PathBuf,
    file: File,
}

impl ReportFile {
    fn create(path: &Path) -> io::Result<Self> {
        if path.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if !may_replace(path)? {
            return Err(io::Error::other(
                "is there already, and is no report; give another name, or remove it",
            ));
        }
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part)?;
        let path = path.to_owned();
        Ok(Self { path, part, file })
    }

    fn finish(mut self, html: &str) -> io::Result<()> {
        self.file.write_all(html.as_bytes())?;
        fs::rename(&self.part, &self.path)
    }
}

/// True if nothing is lost with what is at `path`: nothing is there, or nothing in it, or an older report. It could be a disk.
fn may_replace(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    let mut begins = Vec::new();
    let len = REPORT_BEGINS.len() as u64;
    file.take(len).read_to_end(&mut begins)?;
    Ok(begins.is_empty() || begins == REPORT_BEGINS.as_bytes())
}

impl Drop for ReportFile {
    fn drop(&mut self) {
        // Unless it was renamed.
        let _ = fs::remove_file(&self.part);
    }
}

/// Shows how far the migration is now.
fn show(bar: &ProgressBar, info: &Info) {
    let Some(Migration::Source {
        phase,
        round,
        done,
        total,
        slow_down,
        ..
    }) = &info.migration
    else {
        return;
    };
    bar.set_length(*total);
    bar.set_position(*done);
    let mut message = phase.to_string();
    if *round > 1 {
        message += &format!(", round {round}");
    }
    if *slow_down > 0 {
        message += &format!(", guest slowed down by {slow_down} %");
    }
    bar.set_message(message);
}

/// The report for people.
fn describe(to: &Address, report: &Report) -> String {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let how = match report.how {
        Memory::Copy => format!(
            "{:.1} MiB copied in {} and the pause",
            mib(report.bytes),
            match report.rounds.len() {
                1 => "1 round".to_owned(),
                count => format!("{count} rounds"),
            }
        ),
        Memory::Handoff => "memory was handed over".to_owned(),
    };
    let parts = report.pause_us.parts();
    let total: u64 = parts.iter().map(|part| part.tenths).sum();
    let ms = |tenths: u64| tenths as f64 / 10.0;
    let parts = parts
        .iter()
        .filter(|part| part.name != "verify" || part.us > 0)
        .map(|part| match part.name {
            "send" => format!(
                "{:.1} MiB sent {:.1}",
                mib(report.paused_bytes),
                ms(part.tenths)
            ),
            name => format!("{name} {:.1}", ms(part.tenths)),
        });
    format!(
        "the guest runs at {to}: {how}, {:.2} s in all\npause {:.1} ms: {}",
        report.total_us as f64 / 1e6,
        ms(total),
        parts.collect::<Vec<_>>().join(", ")
    )
}

const DOUBT: &str = "\
A guest is in doubt if the connection was lost right after it had been given away: the other process runs it, or never will,
and could not be asked. This process keeps it, standing still, and goes on asking. If the other process cannot be reached any
more, somebody has to look. A guest that ran there, however briefly, has changed its disks, and its memory if that was handed
over: going on with it here destroys them, as running it twice does.

Exit status: 0 the doubt is over; 1 there was none, or the guest does not go on since another process has its disks; 2 the
command line is wrong.";

/// End a doubt after a migration whose connection was lost.
#[derive(Debug, Args)]
#[command(after_help = DOUBT)]
#[command(group(clap::ArgGroup::new("what").required(true)))]
pub struct Resolve {
    /// Unix socket of the guest, as given to `tern run --api-socket`
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,

    /// The guest did not run elsewhere and never will: let it go on here
    #[arg(long, group = "what")]
    run: bool,

    /// The guest runs elsewhere, or ran there: end it here
    #[arg(long, group = "what")]
    discard: bool,

    /// Answer in JSON
    #[arg(long)]
    json: bool,
}

impl Resolve {
    /// Ends the doubt; returns the exit status.
    pub fn run(&self) -> anyhow::Result<u8> {
        let resolution = if self.run {
            Resolution::Run
        } else {
            Resolution::Discard
        };
        let body = serde_json::to_vec(&ResolveRequest { resolution })?;
        let status: Status = request(&self.api_socket, "PUT", "/api/v1/resolve", &body)?;
        if self.json {
            say!("{}", serde_json::to_string(&status)?);
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use migration::live::report::Pause;

    use super::*;

    #[test]
    fn a_report_replaces_nothing_but_a_report() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let disk = [0xeb; 1024];
        fs::write(at("disk.raw"), disk).unwrap();
        let refused = ReportFile::create(&at("disk.raw")).err().unwrap();
        assert!(refused.to_string().contains("is no report"), "{refused}");
        assert_eq!(fs::read(at("disk.raw")).unwrap(), disk);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::write(at("empty"), "").unwrap();
        for (name, times) in [("new.html", 2), ("empty", 1)] {
            for _ in 0..times {
                let file = ReportFile::create(&at(name)).unwrap();
                let text = format!("{REPORT_BEGINS}…");
                file.finish(&text).unwrap();
                assert_eq!(fs::read_to_string(at(name)).unwrap(), text);
            }
        }
    }

    #[test]
    fn the_parts_of_the_pause_are_all_there_and_add_up() {
        let mut pause_us = Pause {
            stop: 1_049,
            state: 2_049,
            send: 3_049,
            restore: 4_049,
            resume: 5_049,
            ..Pause::default()
        };
        pause_us.end(20_051);
        let mut report = Report {
            session: String::new(),
            how: Memory::Handoff,
            total_us: 1_000_000,
            build_us: 0,
            bytes: 0,
            rounds: Vec::new(),
            pause_us,
            paused_bytes: 1 << 20,
        };
        let to: Address = "unix:a".parse().unwrap();
        let text = describe(&to, &report);
        let parts = "pause 20.1 ms: stop 1.0, state 2.1, 1.0 MiB sent 3.0, restore 4.1, resume 5.0, wait 4.9";
        assert!(text.ends_with(parts), "{text}");
        report.pause_us.verify = 1;
        assert!(describe(&to, &report).contains(", verify 0.0, "));
    }
}
