//! `cargo xtask test`: every test, from the quickest to the slowest.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use machine::probe;
use machine::qemu::die_with_parent;

use crate::image::{self, Kernel};
use crate::tools::{self, Step};
use crate::{fuzz, kvm, packages, workspace};

/// `cargo xtask test`
#[derive(Debug, Args)]
pub struct Test {
    /// Only the tests that need no guest
    #[arg(long, conflicts_with = "e2e")]
    native: bool,
    /// Only the end-to-end tests, with guests under tern
    #[arg(long)]
    e2e: bool,
    /// How long each fuzz target runs; 0 leaves them out
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    fuzz: u32,
    /// Only tests whose name contains this; leaves the fuzz targets out
    filter: Option<String>,
    #[command(flatten)]
    machine: kvm::Options,
}

/// How long the end-to-end tests of one module may take before something is called hung.
const END_TO_END_LIMIT: u64 = 35 * 60;
/// Memory of an emulated host for them: guests of 4 GiB, two at a time, of which few touch all they have.
const END_TO_END_MEMORY: u64 = 8 * 1024;
/// CPUs of an emulated host for them. QEMU has a thread for each, and with two that really run at the same time the
/// kernel of a host that runs SR-IOV guests has died of a corrupted stack within minutes. With one they take turns.
const END_TO_END_CPUS: u32 = 1;
/// How many emulated hosts there are at a time, on a machine with as many CPUs.
const END_TO_END_HOSTS: usize = 2;
/// The groups of unit tests that need privilege, and so a machine: those of taps, and of machines that hand taps over.
const TAPS: &str = "taps::";
const HANDED_OVER: &str = "handed-over::";
/// The groups that take longest.
const LONGEST: [&str; 3] = ["snapshot::", "migrate::", "sriov::"];
/// Tests that run at the same time in one host: most of the time some guest waits for its own kernel.
const END_TO_END_THREADS: &str = "--test-threads=2";

impl Test {
    pub fn run(self) -> Result<i32> {
        if !self.e2e {
            self.native()?;
            if self.fuzz > 0 && self.filter.is_none() {
                let step = Step::begin(format!("fuzzing, {} s per target", self.fuzz));
                fuzz::run(self.fuzz, &[])?;
                step.done();
            }
        }
        if self.native {
            Ok(0)
        } else {
            self.end_to_end()
        }
    }

    fn native(&self) -> Result<()> {
        let step = Step::begin("native tests");
        let mut command = workspace::cargo();
        if tools::installed("cargo-nextest") {
            command
                .args(["nextest", "run", "--workspace", "--no-tests", "pass"])
                .args(&self.filter);
            tools::visible(&mut command)?;
            // Which nextest leaves out.
            command = workspace::cargo();
            command
                .args(["test", "--quiet", "--workspace", "--doc"])
                .args(&self.filter);
        } else {
            command
                .args(["test", "--quiet", "--workspace"])
                .args(&self.filter);
        }
        tools::visible(&mut command)?;
        step.done();
        Ok(())
    }

    fn end_to_end(self) -> Result<i32> {
        packages::ensure(&packages::END_TO_END)?;
        let step = Step::begin("building tern and its end-to-end tests");
        let tern = workspace::release_binary("vmm", "tern")?;
        let tests = workspace::test_binary("e2e", "e2e")?;
        let of_devices = workspace::unit_tests("devices")?;
        let of_machines = workspace::unit_tests("vmm")?;
        step.done();
        image::guests(&Kernel::ALL, false)?;
        let groups = match self.filter {
            Some(filter) => vec![filter],
            None => {
                let mut groups = groups(&tests)?;
                groups.extend([TAPS.into(), HANDED_OVER.into()]);
                groups
            }
        };
        let step = Step::begin("end-to-end tests");
        let mut machine = self.machine;
        machine.cpus = machine.cpus.or(Some(END_TO_END_CPUS));
        machine.timeout = machine.timeout.or(Some(END_TO_END_LIMIT));
        machine.memory = machine.memory.max(END_TO_END_MEMORY);
        for (name, value) in [("TERN", tern), ("TERN_IMAGES", image::directory()?)] {
            let mut variable = OsString::from(name);
            variable.push("=");
            variable.push(value);
            machine.variables.push(variable);
        }
        let command = |group: &str| -> Vec<OsString> {
            let (program, filter) = match group {
                TAPS => (&of_devices, "--ignored"),
                HANDED_OVER => (&of_machines, "--ignored"),
                filter => (&tests, filter),
            };
            vec![
                program.clone().into(),
                END_TO_END_THREADS.into(),
                filter.into(),
            ]
        };
        let status = match groups.as_slice() {
            [group] => kvm::run(&machine, &command(group))?,
            _ => side_by_side(&machine, groups, command)?,
        };
        step.done();
        Ok(status)
    }
}

/// Runs each group in a session of its own, several sessions at a time where hosts are emulated; a second time if its host
/// died, which says nothing about the tests. Returns the highest of their statuses.
fn side_by_side(
    machine: &kvm::Options,
    groups: Vec<String>,
    command: impl Fn(&str) -> Vec<OsString> + Sync,
) -> Result<i32> {
    let workers = if !machine.force_emulated && probe::measure().usable() {
        1
    } else {
        thread::available_parallelism().map_or(1, |cpus| END_TO_END_HOSTS.min(cpus.get()))
    };
    let waiting = Mutex::new(VecDeque::from(groups));
    let worst = Mutex::new(0);
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.pop_front()
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while let Some(group) = next() {
                        let mut status = session(machine, &group, &command(&group))?;
                        if status == kvm::NO_SESSION {
                            eprintln!("xtask: the host of {group} died; once more in a new one");
                            status = session(machine, &group, &command(&group))?;
                        }
                        let mut worst = worst.lock().unwrap_or_else(PoisonError::into_inner);
                        *worst = status.max(*worst);
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| bail!("a session's thread panicked"))
        })
    })?;
    Ok(worst.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// `cargo xtask kvm` with these options. Results of tests are shown as they come, all else in one piece at the end.
fn session(machine: &kvm::Options, group: &str, command: &[OsString]) -> Result<i32> {
    let began = Instant::now();
    eprintln!("xtask: {group} begins");
    let mut session = Command::new(env::current_exe().context("where is xtask?")?);
    session
        .arg("kvm")
        .args(machine.arguments())
        .arg("--")
        .args(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    die_with_parent(&mut session);
    let mut session = session.spawn().context("cannot start a session")?;
    let mut errors = session.stderr.take().context("no standard error")?;
    let errors = thread::spawn(move || {
        let mut text = Vec::new();
        // What cannot be read has not been said.
        let _ = errors.read_to_end(&mut text);
        text
    });
    let mut text = Vec::new();
    let lines = BufReader::new(session.stdout.take().context("no standard output")?);
    for line in lines.split(b'\n') {
        let mut line = line?;
        line.push(b'\n');
        if line.starts_with(b"test ") && !line.starts_with(b"test result") {
            io::stdout().lock().write_all(&line)?;
        } else {
            text.extend(line);
        }
    }
    let status = session.wait()?;
    let status = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    let mut stdout = io::stdout().lock();
    stdout.write_all(&errors.join().unwrap_or_default())?;
    stdout.write_all(text.trim_ascii())?;
    writeln!(
        stdout,
        "\nxtask: {group} took {:.1} s, status {status}",
        began.elapsed().as_secs_f64()
    )?;
    Ok(status)
}

/// The modules of the end-to-end tests, as filters; no name of one ends with that of another. Each gets a machine of its
/// own, so that what one leaves behind is not there for the next.
fn groups(tests: &Path) -> Result<Vec<String>> {
    let mut list = Command::new(tests);
    list.arg("--list");
    let output = list.output().context("listing the end-to-end tests")?;
    let mut groups: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| Some(format!("{}::", line.split_once("::")?.0)))
        .collect();
    groups.dedup();
    ensure!(!groups.is_empty(), "there are no end-to-end tests");
    // The longest first, so that it is not what all wait for in the end.
    groups.sort_by_key(|group| !LONGEST.iter().any(|longest| group == longest));
    Ok(groups)
}
