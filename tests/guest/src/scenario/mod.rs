//! The scenarios, by name.

mod beat;
mod block;
mod boot;
mod clock;
mod console;
mod demo;
mod entropy;
mod fork;
mod managed;
mod memory;
mod net;
mod pci;
mod rings;
mod sriov;
mod steady;

use std::fmt;
use std::thread;
use std::time::Duration;

use rustix::system::RebootCommand;

use crate::cmdline::Request;
use crate::{Context, Failure, Result, power, say};

/// What a scenario found out, printed after its name as ` key=value` pairs. Values have no spaces.
#[derive(Debug, Default)]
pub struct Found(Vec<(&'static str, String)>);

impl Found {
    fn with(mut self, key: &'static str, value: impl fmt::Display) -> Self {
        self.0
            .push((key, value.to_string().replace(char::is_whitespace, "_")));
        self
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0
            .iter()
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.as_str())
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|(key, value)| write!(f, " {key}={value}"))
    }
}

type Run = fn(&Request) -> Result<Found>;

/// Name, parameters, what runs. The README says what each does.
const SCENARIOS: [(&str, &[&str], Run); 41] = [
    ("boot", &[], boot::run),
    ("pci", &[], pci::run),
    ("poweroff", &[], |_| power::end(RebootCommand::PowerOff)),
    ("reset", &[], |_| power::end(RebootCommand::Restart)),
    ("panic", &[], panic),
    ("hang", &[], hang),
    ("sleep", &["seconds"], sleep),
    ("clock", &["threshold"], clock::run),
    ("block-info", &["dev"], block::info),
    ("block-write", &["dev", "seed", "mib"], block::write),
    ("block-verify", &["dev", "seed", "mib"], block::verify),
    ("block-readonly", &["dev"], block::read_only),
    ("block-discard", &["dev"], block::discard),
    ("net-ping", &["a", "b", "mib"], net::ping),
    (
        "net-tap",
        &["dev", "addr", "prefix", "peer", "port"],
        net::tap,
    ),
    ("net-rate", &["a", "b", "mib", "rounds"], net::rate),
    ("packed", &["devices"], rings::packed),
    ("entropy", &[], entropy::run),
    ("console-echo", &[], console::echo),
    ("hvc-echo", &["dev"], console::hvc_echo),
    ("shell", &[], console::shell),
    ("memory-touch", &["mib"], memory::touch),
    ("memory-zero", &["mib"], memory::zero),
    ("beat", &["mib", "rate"], beat::run),
    ("vm-fork", &[], fork::run),
    ("demo", &["disks", "networks"], demo::run),
    ("sriov-enable", &["pf", "n", "drivers"], sriov::enable),
    ("sriov-disable", &["pf"], sriov::disable),
    ("sriov-rounds", &["pf", "n", "rounds"], sriov::rounds),
    ("sriov-ping", &["pf", "n", "mib"], sriov::ping),
    ("sriov-traffic", &["pf", "n"], sriov::traffic),
    ("sriov-block", &["pf", "n", "mib"], sriov::block),
    ("flr-io", &["pf", "n", "rounds"], sriov::flr_io),
    ("flr-pf", &["pf", "n", "rounds"], sriov::flr_pf),
    ("admin-user", &["pf", "n", "strict"], sriov::admin_user),
    ("vf-stop", &["pf", "way", "hold"], sriov::vf_stop),
    ("vf-states", &["pf", "ways"], sriov::vf_states),
    ("vf-waits", &["pf"], sriov::vf_waits),
    (
        "steady",
        &[
            "mib", "disks", "nets", "vfs", "pfs", "lost", "stall", "seconds",
        ],
        steady::run,
    ),
    ("managed", &["wire", "packed", "holds"], managed::run),
    ("dmesg-clean", &[], sriov::dmesg_clean),
];

/// Runs one scenario.
pub fn run(request: &Request) -> Result<Found> {
    let Some((_, known, run)) = SCENARIOS.iter().find(|(name, _, _)| *name == request.name) else {
        let names: Vec<&str> = SCENARIOS.iter().map(|(name, _, _)| *name).collect();
        return Err(Failure(format!(
            "unknown scenario; there are {}",
            names.join(" ")
        )));
    };
    if let Some(key) = request.unknown_parameter(known) {
        return Err(Failure(format!(
            "unknown parameter {key}; it has {}",
            known.join(" ")
        )));
    }
    run(request)
}

/// Has the kernel panic.
fn panic(_: &Request) -> Result<Found> {
    say("panic requested");
    std::fs::write("/proc/sysrq-trigger", "c").context("/proc/sysrq-trigger")?;
    Err(Failure("the kernel did not panic".into()))
}

/// Ticks every second until something outside ends the guest, or its power button is pressed.
fn hang(_: &Request) -> Result<Found> {
    for tick in 1u64.. {
        say(format_args!("tick {tick}"));
        thread::sleep(Duration::from_secs(1));
    }
    Ok(Found::default())
}

/// Does nothing for a while.
fn sleep(request: &Request) -> Result<Found> {
    thread::sleep(Duration::from_secs(request.number("seconds", 1)?));
    Ok(Found::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> = SCENARIOS.iter().map(|(name, _, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), SCENARIOS.len());
    }

    #[test]
    fn what_is_unknown_is_refused() {
        let asked = |line: &str| {
            run(&crate::cmdline::scenarios(line).unwrap()[0])
                .unwrap_err()
                .to_string()
        };
        assert!(asked("tern.run=dance").starts_with("unknown scenario; there are boot "));
        assert_eq!(
            asked("tern.run=block-info:seed=1"),
            "unknown parameter seed; it has dev"
        );
    }

    #[test]
    fn values_are_single_words() {
        let found = Found::default().with("serial", "a b\n").with("bytes", 3);
        assert_eq!(found.to_string(), " serial=a_b_ bytes=3");
    }
}
