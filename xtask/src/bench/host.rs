//! The host that figures come from, and what is on it.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::tools;

/// The name that the emulated host has.
const EMULATED: &str = "tern-machine";

/// Whether this runs in the emulated host, in words.
pub fn here() -> &'static str {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim_end() {
        EMULATED => "in the emulated host, good for ratios only",
        _ => "on this host itself",
    }
}

/// Day, processor and load of this host, and the guest's kernel.
pub fn about(kernel: &str) -> Result<String> {
    let day = tools::output("date", &["-u", "+%F"])?;
    let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
    let cpuinfo = read("/proc/cpuinfo")?;
    let processor = processor(&cpuinfo).context("/proc/cpuinfo names no model")?;
    let load = read("/proc/loadavg")?;
    let load = load.split_whitespace().next().unwrap_or("?");
    let cores = std::thread::available_parallelism()?;
    Ok(format!(
        "{}; {cores} cores of an {processor}, load average {load} at the beginning; guests with {kernel}",
        day.trim_end()
    ))
}

/// The model of the first processor.
fn processor(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))?;
    Some(line.split_once(':')?.1.trim())
}

/// Options that name monitors to compare with, from any directory.
pub fn peer_arguments(peers: &[(&str, &Option<PathBuf>)]) -> Result<Vec<OsString>> {
    let mut arguments = Vec::new();
    for (name, path) in peers {
        if let Some(path) = path {
            let path = path
                .canonicalize()
                .with_context(|| format!("{name} {}", path.display()))?;
            arguments.extend([name.into(), path.into()]);
        }
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_named_from_the_root() {
        let arguments = peer_arguments(&[("--a", &Some("/bin/../bin/sh".into())), ("--b", &None)]);
        let arguments = arguments.unwrap();
        assert_eq!((arguments.len(), &arguments[0]), (2, &"--a".into()));
        assert!(!arguments[1].to_string_lossy().contains(".."));
        assert!(peer_arguments(&[("--a", &Some("/no/such".into()))]).is_err());
    }

    #[test]
    fn the_processor_is_named() {
        let cpuinfo =
            "processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC 7B13\nmodel name\t: other\n";
        assert_eq!(processor(cpuinfo), Some("AMD EPYC 7B13"));
        assert_eq!(processor("processor: 0\n"), None);
    }
}
