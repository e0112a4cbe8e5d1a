//! `boot`: what the kernel sees of the machine.

use std::fs;

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Failure, Result};

pub fn run(_: &Request) -> Result<Found> {
    Ok(Found::default()
        .with("cpus", online_cpus()?)
        .with("mem_kib", meminfo("MemTotal")?)
        .with(
            "release",
            rustix::system::uname().release().to_string_lossy(),
        ))
}

/// How many CPUs are online.
pub fn online_cpus() -> Result<usize> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online").context("online CPUs")?;
    count(list.trim()).ok_or_else(|| Failure(format!("a strange list of CPUs: {list}")))
}

/// The length of a list like `0-3,5`.
fn count(list: &str) -> Option<usize> {
    let mut total = 0;
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        total += last
            .parse::<usize>()
            .ok()?
            .checked_sub(first.parse().ok()?)?
            + 1;
    }
    Some(total)
}

/// A line of `/proc/meminfo`, in KiB.
pub fn meminfo(key: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    meminfo_value(&text, key).ok_or_else(|| Failure(format!("/proc/meminfo has no {key}")))
}

fn meminfo_value(text: &str, key: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        for (list, expected) in [
            ("0", Some(1)),
            ("0-3", Some(4)),
            ("0-1,4,6-7", Some(5)),
            ("", None),
            ("3-1", None),
        ] {
            assert_eq!(count(list), expected, "{list}");
        }
    }

    #[test]
    fn meminfo_lines_are_found_by_their_whole_name() {
        let text = "MemTotalX: 1 kB\nMemTotal:      2048 kB\nMemFree: 5 kB\n";
        assert_eq!(meminfo_value(text, "MemTotal"), Some(2048));
        assert_eq!(meminfo_value(text, "Mem"), None);
    }
}
