//! Guests under load that are moved from process to process, again and again, at moments nobody chose.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::move_over;
use crate::chance::Chance;
use crate::load::{Guest, Load, TICK, expect_all_work};
use crate::trial;

/// How often, unless `TERN_ROUNDS` says it.
const ROUNDS: u32 = 5;
/// Frames that may wait in a switch or in a queue when a guest is saved, and are not part of what is saved.
const LOST: u32 = 64;
/// Longest time from one generation to the next.
const APART: Duration = Duration::from_millis(3000);
/// Longest time from the start to the first of the generations that are saved while the guest boots.
const BOOT: Duration = Duration::from_millis(12000);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("snapshot::rounds_under_load", || {
            rounds(Load::with_everything(2)?)
        }),
        trial(
            "snapshot::rounds_under_load_with_linux_6_1_and_packed_virtqueues",
            || rounds(Load::with_packed_rings(2)?.linux_6_1()),
        ),
        trial("snapshot::rounds_while_booting", || booting(|load| load)),
        trial("snapshot::rounds_while_linux_6_1_boots", || {
            booting(Load::linux_6_1)
        }),
    ]
}

/// Each generation is made from the one before.
fn rounds(load: Load) -> Result<()> {
    let rounds = crate::chance::rounds(ROUNDS)?;
    let load = load.parameter(&format!("lost={}", rounds * LOST));
    let mut chance = Chance::new();
    let mut guest = load.run()?;
    guest.ticks(2)?;
    for round in 1..=rounds {
        guest = step(guest, &load, round, chance.up_to(APART))?;
        guest.ticks(2).with_context(|| chance.told(round))?;
        // What the one before said, and what the one before that left.
        ensure!(
            !guest.vm.console().contains("FAIL"),
            "{}",
            guest.vm.console()
        );
    }
    expect_all_work(&guest.enough()?)
}

/// The first generations know neither drivers nor devices. Then the guest comes up as ever, and nothing of its kernel's log
/// is about that.
fn booting(adjust: impl FnOnce(Load) -> Load) -> Result<()> {
    let rounds = crate::chance::rounds(ROUNDS)?;
    let lost = format!("lost={}", rounds * LOST);
    let load = adjust(
        Load::with_everything(2)?
            .parameter(&lost)
            .and_then("dmesg-clean"),
    );
    let mut chance = Chance::new();
    let mut guest = load.run()?;
    // Until then a monitor has nothing to save.
    guest.awake()?;
    for round in 1..=rounds {
        let pause = chance.up_to(BOOT / rounds);
        guest = step(guest, &load, round, pause).with_context(|| chance.told(round))?;
    }
    guest
        .vm
        .wait_for(TICK, 0)
        .with_context(|| chance.told(rounds))?;
    guest.ticks(2).with_context(|| chance.told(rounds))?;
    guest
        .enough()
        .map(drop)
        .with_context(|| chance.told(rounds))
}

/// After a while, the guest in another process.
fn step(guest: Guest, load: &Load, round: u32, pause: Duration) -> Result<Guest> {
    std::thread::sleep(pause);
    let directory = load.path(&format!("generation-{round}"));
    let doing = || format!("generation {round}, after {pause:?}");
    let next = move_over(guest, &directory, &[]).with_context(doing)?;
    // Memory is read from it for as long as the guest lives; the one before is needed no more.
    if let Some(before) = round.checked_sub(1).filter(|before| *before > 0) {
        std::fs::remove_dir_all(load.path(&format!("generation-{before}")))?;
    }
    Ok(next)
}
