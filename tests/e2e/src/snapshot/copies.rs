//! Two guests from one snapshot.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::{restore, save};
use crate::load::{Load, TICK, expect_work};
use crate::trial;

/// Random numbers of each guest that are looked at.
const NUMBERS: usize = 4;

pub fn trials() -> Vec<Trial> {
    vec![
        trial(
            "snapshot::copies_of_a_guest_do_not_share_random_numbers",
            random,
        ),
        trial(
            "snapshot::copies_of_a_guest_share_a_disk_nobody_writes",
            shared,
        ),
    ]
}

/// The kernel hears that its machine is a copy, and draws other random numbers in each.
fn random() -> Result<()> {
    let load = Load::new(2)?.scenario("vm-fork,dmesg-clean");
    let directory = load.path("snapshot");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    save(&guest, &directory, &[])?;
    guest.ticks(NUMBERS)?;
    let mut consoles = Vec::new();
    let first = guest.enough()?;
    ensure!(first.number("vm-fork", "reseeds")? == 0, "{}", first.stdout);
    consoles.push(first.stdout);
    let start = |name: &str| restore(&directory, &load.path(name), &[]);
    // At the same time.
    let (mut a, mut b) = (start("a.sock")?, start("b.sock")?);
    let second = load.path("second");
    for guest in [&mut a, &mut b] {
        guest.vm.wait_for("reseeds=1", 0)?;
        guest.ticks(NUMBERS)?;
    }
    // A copy of a copy.
    save(&a, &second, &[])?;
    let mut c = restore(&second, &load.path("c.sock"), &[])?;
    c.vm.wait_for("reseeds=2", 0)?;
    c.ticks(NUMBERS)?;
    for (guest, reseeds) in [(a, 1), (b, 1), (c, 2)] {
        let outcome = guest.enough()?;
        ensure!(outcome.number("vm-fork", "reseeds")? == reseeds);
        let after = format!("reseeds={reseeds} ");
        let lines: Vec<&str> = outcome
            .stdout
            .lines()
            .filter(|line| line.contains(&after))
            .collect();
        consoles.push(lines.join("\n"));
    }
    let mut all = BTreeSet::new();
    for console in &consoles {
        let numbers = console.lines().filter_map(|line| {
            let line = line.trim_end();
            line.contains(TICK)
                .then(|| line.split_once("uuid="))
                .flatten()
        });
        let mut count = 0;
        for (_, number) in numbers {
            ensure!(
                all.insert(number.to_owned()),
                "{number} twice in\n{}",
                consoles.join("\n")
            );
            count += 1;
        }
        ensure!(count >= NUMBERS, "only {count} random numbers\n{console}");
    }
    Ok(())
}

/// Each of them has its own switches, and its own memory.
fn shared() -> Result<()> {
    let load = Load::new(1)?
        .disk(",readonly")?
        .interfaces()
        .parameter("lost=64");
    let directory = load.path("snapshot");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    save(&guest, &directory, &[])?;
    let start = |name: &str| {
        let mut guest = restore(&directory, &load.path(name), &[])?;
        guest.ticks(1)?;
        Ok::<_, anyhow::Error>(guest)
    };
    // While the one they come from runs.
    let guests = [guest, start("a.sock")?, start("b.sock")?];
    for (number, mut guest) in guests.into_iter().enumerate() {
        guest.ticks(2)?;
        let outcome = guest.enough().with_context(|| format!("guest {number}"))?;
        expect_work(&outcome, &["pages", "registers", "reads", "packets"])?;
    }
    Ok(())
}
