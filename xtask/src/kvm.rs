//! `cargo xtask kvm`: a command where `/dev/kvm` is usable.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use machine::probe::{self, Verdict};
use machine::protocol::{Share, Start};
use machine::qemu::{EmulatedHost, die_with_parent};
use machine::session::{self, Outcome, Request};

use crate::packages;
use crate::{emulator, image};

/// Exit status when the time limit was reached, as `timeout` has it.
pub const TIMED_OUT: i32 = 124;
/// Exit status when there was no session.
pub const NO_SESSION: i32 = 125;

/// CPUs of an emulated host.
const CPUS: u32 = 2;

/// Variables that mean the same inside. Others, credentials among them, stay outside unless `--env` names them.
const PASSED_ON: [&str; 10] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "TERM",
    "COLORTERM",
    "NO_COLOR",
    "LANG",
    "TZ",
];
const PASSED_ON_PREFIXES: [&str; 4] = ["RUST_", "CARGO_", "TERN_", "LC_"];

/// Where to run, and for how long.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// End the command after this many seconds, with exit status 124
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// CPUs of the emulated host; 2 if not said otherwise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=32))]
    pub cpus: Option<u32>,
    /// Memory of the emulated host; files that are written there count
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = mebibytes)]
    pub memory: u64,
    /// Use the emulated host even where /dev/kvm is usable
    #[arg(long)]
    pub force_emulated: bool,
    /// Make this directory writable in the emulated host, at the same path; the rest of the tree is not
    #[arg(long = "share", value_name = "DIR")]
    pub shares: Vec<PathBuf>,
    /// Pass a variable of the environment on, or set it
    #[arg(long = "env", value_name = "NAME[=VALUE]")]
    pub variables: Vec<OsString>,
    /// Show the console of the emulated host
    #[arg(long)]
    pub console: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            timeout: None,
            cpus: None,
            memory: 4096,
            force_emulated: false,
            shares: Vec::new(),
            variables: Vec::new(),
            console: false,
        }
    }
}

impl Options {
    /// The command line that means the same.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> =
            vec!["--memory".into(), format!("{}M", self.memory).into()];
        let mut option =
            |name: &str, value: OsString| arguments.extend([OsString::from(name), value]);
        if let Some(seconds) = self.timeout {
            option("--timeout", seconds.to_string().into());
        }
        if let Some(cpus) = self.cpus {
            option("--cpus", cpus.to_string().into());
        }
        for share in &self.shares {
            option("--share", share.into());
        }
        for variable in &self.variables {
            option("--env", variable.clone());
        }
        for (set, name) in [
            (self.force_emulated, "--force-emulated"),
            (self.console, "--console"),
        ] {
            if set {
                arguments.push(name.into());
            }
        }
        arguments
    }
}

/// `cargo xtask kvm`
#[derive(Debug, Args)]
pub struct Kvm {
    #[command(flatten)]
    options: Options,
    /// Only say what /dev/kvm does, with exit status 0 if that is enough
    #[arg(long)]
    probe: bool,
    /// What to run
    #[arg(last = true, required_unless_present = "probe", value_name = "COMMAND")]
    command: Vec<OsString>,
}

impl Kvm {
    pub fn run(self) -> Result<i32> {
        if self.probe {
            let verdict = probe::measure();
            println!("{verdict}");
            return Ok(i32::from(!verdict.usable()));
        }
        run(&self.options, &self.command)
    }
}

/// Runs `command` where `/dev/kvm` is usable, and returns its exit status.
pub fn run(options: &Options, command: &[OsString]) -> Result<i32> {
    if options.force_emulated {
        eprintln!("xtask: using the emulated host, as asked");
        return emulated(options, command);
    }
    match probe::measure() {
        verdict @ Verdict::Usable { .. } => {
            eprintln!("xtask: using this host: {verdict}");
            direct(options, command)
        }
        verdict => {
            eprintln!("xtask: using the emulated host: {verdict}");
            emulated(options, command)
        }
    }
}

/// Runs the command here. Without a time limit there is no reason for this process to stay.
fn direct(options: &Options, command: &[OsString]) -> Result<i32> {
    let (program, arguments) = command.split_first().context("there is no command")?;
    let doing = || format!("cannot run {}", program.display());
    let mut command = Command::new(program);
    command.args(arguments);
    for variable in &options.variables {
        if let Some((name, value)) = split_variable(variable) {
            command.env(name, value);
        }
    }
    let Some(limit) = options.timeout else {
        return Err(command.exec()).with_context(doing);
    };
    die_with_parent(&mut command);
    // A group of its own, so that the time limit ends all of it; but a background group cannot read a terminal.
    let own_group = !std::io::stdin().is_terminal();
    if own_group {
        command.process_group(0);
    }
    let mut child = command.spawn().with_context(doing)?;
    let deadline = Instant::now() + Duration::from_secs(limit);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or_default()));
        }
        if Instant::now() >= deadline {
            if own_group {
                // It may end on its own between the look above and this.
                let group = rustix::process::Pid::from_child(&child);
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            child.kill()?;
            child.wait()?;
            return Ok(report_time_limit(limit));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn emulated(options: &Options, command: &[OsString]) -> Result<i32> {
    emulator::ensure()?;
    let image = image::machine()?;
    let host = EmulatedHost {
        qemu: packages::QEMU.name.into(),
        kernel: image.vmlinux,
        initramfs: image.initramfs,
        cpus: options.cpus.unwrap_or(CPUS),
        memory_mib: options.memory,
        shares: shares(&options.shares)?,
    };
    let start = Start {
        argv: command.to_vec(),
        env: environment(env::vars_os(), &options.variables),
        cwd: env::current_dir().context("there is no current directory")?,
        // Filled in by the session.
        terminal: None,
        on_terminal: [false; 3],
        shares: Vec::new(),
    };
    let time_limit = options.timeout.map(Duration::from_secs);
    match session::run(
        &host,
        &Request {
            start,
            time_limit,
            show_console: options.console,
        },
    ) {
        Ok(Outcome::Exited(status)) => Ok(status),
        Ok(Outcome::Interrupted(signal)) => {
            eprintln!("xtask: interrupted; the emulated host is switched off");
            Ok(128 + signal)
        }
        Ok(Outcome::TimedOut(console)) => {
            let console = console.to_string();
            if !console.is_empty() {
                eprintln!("xtask: the emulated host's console ends with{console}");
            }
            Ok(report_time_limit(options.timeout.unwrap_or_default()))
        }
        // Not a failure of the command, and therefore none of its exit statuses.
        Err(session::Error::Command(why)) => {
            eprintln!("xtask: {why}");
            Ok(NO_SESSION)
        }
        Err(error) => {
            eprintln!("xtask: {:#}", anyhow::Error::from(error));
            Ok(NO_SESSION)
        }
    }
}

fn report_time_limit(seconds: u64) -> i32 {
    eprintln!("xtask: the time limit of {seconds} s is over; the command was ended");
    TIMED_OUT
}

fn shares(directories: &[PathBuf]) -> Result<Vec<Share>> {
    let share = |(index, path): (usize, &PathBuf)| {
        let path = path
            .canonicalize()
            .with_context(|| format!("cannot share {}", path.display()))?;
        ensure!(
            path.is_dir(),
            "cannot share {}: it is not a directory",
            path.display()
        );
        Ok(Share {
            tag: format!("share{index}"),
            path,
        })
    };
    directories.iter().enumerate().map(share).collect()
}

fn environment(
    ours: impl Iterator<Item = (OsString, OsString)>,
    extra: &[OsString],
) -> Vec<(OsString, OsString)> {
    let mut variables: BTreeMap<OsString, OsString> =
        ours.filter(|(name, _)| passed_on(name)).collect();
    variables.extend(extra.iter().filter_map(|variable| split_variable(variable)));
    variables.into_iter().collect()
}

fn passed_on(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    // CARGO_REGISTRY_TOKEN and its like.
    let secret = name.contains("TOKEN") || name.contains("CREDENTIAL") || name.contains("SECRET");
    !secret
        && (PASSED_ON.contains(&&*name)
            || PASSED_ON_PREFIXES
                .iter()
                .any(|prefix| name.starts_with(prefix)))
}

/// `NAME=VALUE`, or `NAME` with the value it has here, if it has one.
fn split_variable(variable: &OsStr) -> Option<(OsString, OsString)> {
    let bytes = variable.as_bytes();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) => Some((
            OsStr::from_bytes(&bytes[..at]).into(),
            OsStr::from_bytes(&bytes[at + 1..]).into(),
        )),
        None => env::var_os(variable).map(|value| (variable.to_owned(), value)),
    }
}

/// `512M` or `4G`, in mebibytes.
fn mebibytes(text: &str) -> Result<u64> {
    let (digits, factor) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], 1),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 1024),
        _ => bail!("{text} has no unit: write 512M or 4G"),
    };
    let size = digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(factor));
    size.filter(|size| (256..=1 << 20).contains(size))
        .with_context(|| format!("{text} is not between 256M and 1024G"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(mebibytes("512M").unwrap(), 512);
        assert_eq!(mebibytes("4G").unwrap(), 4096);
        for bad in [
            "",
            "4",
            "G",
            "1M",
            "-1G",
            "9999999999999999999G",
            "4T",
            "2000G",
        ] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn arguments_mean_the_options_they_come_from() {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        let options = Options {
            timeout: Some(9),
            cpus: Some(3),
            memory: 512,
            force_emulated: true,
            shares: vec!["/a".into(), "/b".into()],
            variables: vec!["A=1".into(), "B".into()],
            console: true,
        };
        for options in [options, Options::default()] {
            let line = [OsString::from("kvm")]
                .into_iter()
                .chain(options.arguments());
            let parsed = <Line as clap::Parser>::try_parse_from(line).unwrap();
            assert_eq!(format!("{:?}", parsed.options), format!("{options:?}"));
        }
    }

    #[test]
    fn environment_is_chosen() {
        let ours = [
            ("PATH", "/bin"),
            ("AWS_SECRET", "x"),
            ("CARGO_REGISTRY_TOKEN", "x"),
            ("RUST_LOG", "debug"),
        ]
        .map(|(name, value)| (name.into(), value.into()));
        let extra = [
            "A=b=c".into(),
            "RUST_LOG=trace".into(),
            "NO_SUCH_VARIABLE_HERE".into(),
        ];
        let expected = [("A", "b=c"), ("PATH", "/bin"), ("RUST_LOG", "trace")]
            .map(|(name, value)| (OsString::from(name), OsString::from(value)));
        assert_eq!(environment(ours.into_iter(), &extra), expected);
    }

    #[test]
    fn shares_must_be_directories() {
        assert!(shares(&["/no/such/directory".into()]).is_err());
        assert!(shares(&["/etc/passwd".into()]).is_err());
        let shared = shares(&["/".into(), "/usr/".into()]).unwrap();
        assert_eq!(
            shared[1],
            Share {
                tag: "share1".into(),
                path: "/usr".into()
            }
        );
    }
}
