//! A monitor that is killed while it writes a snapshot.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::{restore, save, text};
use crate::load::{Load, expect_work};
use crate::trial;
use crate::vm::Running;

/// How often.
const KILLS: u32 = 4;

pub fn trials() -> Vec<Trial> {
    vec![trial(
        "snapshot::a_monitor_that_is_killed_leaves_the_one_before",
        killed,
    )]
}

/// Each time after another part of the time that the first took.
fn killed() -> Result<()> {
    let load = Load::new(1)?;
    let directory = load.path("snapshot");
    let socket = load.path("api.sock");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    let began = Instant::now();
    save(&guest, &directory, &["--stop"])?;
    let whole = began.elapsed();
    guest.vm.wait()?;
    let mut killed = 0;
    for kill in 0..KILLS {
        let mut guest = restore(&directory, &socket, &[])?;
        guest.ticks(1)?;
        let words = [text(&directory)?, "--replace"];
        let client = Running::start(guest.control.command("snapshot", &words)?)?;
        std::thread::sleep(whole.mul_f64(f64::from(2 * kill + 1) / f64::from(2 * KILLS)));
        guest.vm.signal(rustix::process::Signal::KILL)?;
        let outcome = client.wait()?;
        killed += u32::from(outcome.code() != 0);
        guest.vm.wait()?.expect_code(128 + 9)?;
    }
    ensure!(
        killed > 0,
        "every snapshot was taken before the monitor was killed"
    );
    // What a killed monitor left over is no snapshot, and in nobody's way.
    let mut guest = restore(&directory, &socket, &["--prefault"])?;
    guest.ticks(2)?;
    save(&guest, &directory, &["--replace"])?;
    for entry in std::fs::read_dir(load.directory())? {
        let name = entry?.file_name();
        ensure!(
            name == "snapshot" || name == "api.sock",
            "{} is left",
            name.display()
        );
    }
    expect_work(&guest.enough().context("the one before")?, &["pages"])?;
    let mut guest = restore(&directory, &socket, &[])?;
    std::thread::sleep(Duration::from_millis(10));
    guest.ticks(1)?;
    guest.enough().map(drop)
}
