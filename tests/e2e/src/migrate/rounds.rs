//! Guests under load that are moved from process to process, again and again, at moments nobody chose.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::tls::Authority;
use super::{Moved, move_to};
use crate::chance::{Chance, rounds};
use crate::load::{Guest, Load, TICK, expect_all_work};
use crate::trial;

/// How often, unless `TERN_ROUNDS` says it.
const ROUNDS: u32 = 3;
/// Copies memory. Emulated hosts are slow: with a shorter pause the guests would be slowed down all the time.
/// Every page is compared in the end.
pub const COPY: [&str; 4] = ["--copy", "--downtime", "500", "--verify"];
/// The same, over several connections.
const OVER_FOUR: [&str; 6] = [
    "--copy",
    "--downtime",
    "500",
    "--verify",
    "--connections",
    "4",
];
/// Longest time from one move to the next.
const APART: Duration = Duration::from_millis(2000);
/// Longest time from the start to the last of the moves that happen while the guest boots.
const BOOT: Duration = Duration::from_millis(12_000);
/// Frames that may wait in a switch or in a queue when a guest is moved, and are not part of what moves.
const LOST: u32 = 64;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("migrate::rounds_handed_over_under_load", || {
            under_load(by(&[]), Load::with_everything(2)?)
        }),
        trial("migrate::rounds_copied_under_load", || {
            under_load(by(&COPY), Load::with_everything(2)?)
        }),
        trial(
            "migrate::rounds_in_either_way_in_turns_with_packed_virtqueues",
            || {
                let in_turns = |guest: Guest, directory: &Path, number: u32| {
                    let options: &[&str] = if number.is_multiple_of(2) { &COPY } else { &[] };
                    move_to(guest, directory, number, options)
                };
                under_load(in_turns, Load::with_packed_rings(2)?)
            },
        ),
        trial("migrate::rounds_copied_under_load_with_linux_6_1", || {
            under_load(by(&COPY), Load::with_everything(2)?.linux_6_1())
        }),
        trial("migrate::rounds_copied_over_tls", || {
            let authority = Authority::new()?;
            let over_tls = |guest: Guest, directory: &Path, number: u32| {
                authority.move_to(guest, directory, number, &COPY[1..])
            };
            under_load(over_tls, Load::with_everything(2)?)
        }),
        trial("migrate::rounds_copied_over_four_connections", || {
            let authority = Authority::new()?;
            // Over TLS every other time.
            let over_four = |guest: Guest, directory: &Path, number: u32| {
                if number.is_multiple_of(2) {
                    authority.move_to(guest, directory, number, &OVER_FOUR[1..])
                } else {
                    move_to(guest, directory, number, &OVER_FOUR)
                }
            };
            under_load(over_four, Load::with_everything(2)?)
        }),
        trial("migrate::rounds_while_booting", || while_booting(&[])),
        trial("migrate::rounds_copied_while_booting", || {
            while_booting(&COPY)
        }),
    ]
}

/// Moves guests to Unix sockets.
fn by(options: &'static [&'static str]) -> impl Fn(Guest, &Path, u32) -> Result<Moved> {
    move |guest, directory, number| move_to(guest, directory, number, options)
}

fn under_load(carry: impl Fn(Guest, &Path, u32) -> Result<Moved>, load: Load) -> Result<()> {
    let rounds = rounds(ROUNDS)?;
    let load = load.parameter(&format!("lost={}", rounds * LOST));
    let mut chance = Chance::new();
    let mut guest = load.run()?;
    guest.ticks(2)?;
    for round in 1..=rounds {
        std::thread::sleep(chance.up_to(APART));
        let moved = carry(guest, load.directory(), round).with_context(|| chance.told(round))?;
        guest = moved.guest;
        guest
            .ticks(2)
            .with_context(|| format!("{}\nbefore:\n{}", chance.told(round), moved.before.stdout))?;
        ensure!(
            !guest.vm.console().contains("FAIL"),
            "{}: {}\n{}",
            chance.told(round),
            moved.answer,
            guest.vm.console()
        );
    }
    expect_all_work(&guest.enough()?)
}

/// The first moves find neither drivers nor devices. Then the guest comes up as ever, and nothing of its kernel's log is
/// about that.
fn while_booting(options: &[&str]) -> Result<()> {
    let rounds = rounds(ROUNDS)?;
    let load = Load::with_everything(2)?
        .parameter(&format!("lost={}", rounds * LOST))
        .and_then("dmesg-clean");
    let mut chance = Chance::new();
    let mut guest = load.run()?;
    let mut said = String::new();
    for round in 1..=rounds {
        std::thread::sleep(chance.up_to(BOOT / rounds));
        // A monitor that has just started has no socket yet.
        guest.awake()?;
        let moved = move_to(guest, load.directory(), round, options)
            .with_context(|| format!("{}\n{said}", chance.told(round)))?;
        guest = moved.guest;
        said += &moved.before.stdout;
    }
    guest
        .vm
        .wait_for(TICK, 0)
        .with_context(|| format!("{}\n{said}", chance.told(rounds)))?;
    guest.ticks(2)?;
    guest.enough().map(drop)
}
