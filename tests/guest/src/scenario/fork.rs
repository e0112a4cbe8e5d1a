//! `vm-fork`: random numbers of a guest that may have become two.

use std::fs;
use std::thread;
use std::time::Duration;

use super::{Found, console};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::{Context, Result, say};

/// Each read is another.
const RANDOM: &str = "/proc/sys/kernel/random/uuid";
/// What the kernel says when its machine has got another generation id.
const RESEEDED: &str = "crng reseeded due to virtual machine fork";
const TICK: Duration = Duration::from_millis(500);

/// Ticks with a random number until `enough` is typed on the console, and tells how often the kernel has heard that its
/// machine is a copy.
pub fn run(_: &Request) -> Result<Found> {
    let log = Mark::now()?;
    let enough = console::watch_for("enough")?;
    let mut ticks = 0u64;
    while !enough() {
        thread::sleep(TICK);
        ticks += 1;
        // In this order: a number that is told together with a reseed was drawn after it.
        let reseeds = log.count(RESEEDED)?;
        let uuid = fs::read_to_string(RANDOM).context(RANDOM)?;
        say(format_args!(
            "tick {ticks} reseeds={reseeds} uuid={}",
            uuid.trim()
        ));
    }
    Ok(Found::default()
        .with("ticks", ticks)
        .with("reseeds", log.count(RESEEDED)?))
}
