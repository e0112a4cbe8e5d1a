//! Guests that are moved while drivers in them are in the middle of something.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use super::rounds::COPY;
use super::{move_as, move_to};
use crate::block::checksum;
use crate::chance::Chance;
use crate::load::{Guest, Load};
use crate::snapshot::members::{ASKED, freeze, held, thaw};
use crate::trial;
use crate::vm::Outcome;

/// What becomes of each virtual function of one owner.
const STATES: [&str; 7] = [
    "freeze",
    "stop",
    "suspend-v1.4",
    "device-stop",
    "queue",
    "masked",
    "by-hand",
];
/// The one that is stopped by hand: the last.
const BY_HAND: u16 = STATES.len() as u16;
/// What it takes for all of them.
const DOORS: &str = ",suspend=v1.4,device-stop,device-state-cap";
/// One move of each kind.
const MOVES: [(u32, &[&str]); 2] = [(1, &[]), (2, &COPY)];
/// How often a guest is paused until a command waits in it, and the longest time between.
const LOOKS: u32 = 50;
const APART: Duration = Duration::from_millis(100);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("migrate::vfs_in_every_state_stay_in_it_and_go_on", states),
        trial(
            "migrate::a_command_that_waits_for_its_member_is_done_there",
            waits,
        ),
        trial(
            "migrate::an_owner_driver_in_the_guest_goes_on_where_it_was",
            || {
                // With half of a context read, or written.
                held("freeze", "", 3, |guest, directory, number| {
                    let options: &[&str] = if number.is_multiple_of(2) { &COPY } else { &[] };
                    Ok(move_to(guest, directory, number, options)?.guest)
                })
            },
        ),
    ]
}

/// Each virtual function is stopped in another way, with requests begun, or has an interrupt pending that is masked. None
/// does anything until its driver lets it go on; then all requests are done, and the interrupt comes, once.
fn states() -> Result<()> {
    let scenario = format!("vf-states:ways={},dmesg-clean", STATES.join("+"));
    let load = Load::of_many_disks(2, BY_HAND, DOORS)?.scenario(&scenario);
    let mut guest = load.run()?;
    guest.vm.wait_for(ASKED, 0)?;
    freeze(&guest, BY_HAND)?;
    for (number, options) in MOVES {
        guest = move_to(guest, load.directory(), number, options)?.guest;
    }
    guest.vm.send(b"look\n")?;
    guest.vm.wait_for(ASKED, 0)?;
    thaw(&guest, BY_HAND)?;
    guest.vm.send(b"go on\n")?;
    expect_disks(&guest.vm.wait()?, "vf-states", &load, BY_HAND)
}

/// The owner's driver stops a virtual function that has much to do: the command waits, and nothing else happens, until that is
/// done or taken back. So it is found in a guest that is paused, and moved with it.
fn waits() -> Result<()> {
    let load = Load::of_disks(2, ",drain-ms=5000")?.scenario("vf-waits,dmesg-clean");
    let mut guest = load.run()?;
    guest.vm.wait_for("tern-guest: stops begin", 0)?;
    let mut chance = Chance::new();
    for (number, options) in MOVES {
        pause_in_a_wait(&guest, &load, &mut chance).with_context(|| chance.told(number))?;
        guest = move_as("paused", guest, load.directory(), number, options)?.guest;
        ensure!(is_waiting(&guest, &load)?, "the command was lost");
        guest.control.ask("resume", &[])?;
    }
    guest.vm.send(b"enough\n")?;
    expect_disks(&guest.vm.wait()?, "vf-waits", &load, 1)
}

/// Pauses a guest at a moment when a command waits in it.
fn pause_in_a_wait(guest: &Guest, load: &Load, chance: &mut Chance) -> Result<()> {
    for _ in 0..LOOKS {
        std::thread::sleep(chance.up_to(APART));
        guest.control.ask("pause", &[])?;
        if is_waiting(guest, load)? {
            return Ok(());
        }
        guest.control.ask("resume", &[])?;
    }
    bail!("no command waits\n{}", guest.vm.console())
}

/// Whether a command waits for its member in a guest that is paused. Only a snapshot says that.
fn is_waiting(guest: &Guest, load: &Load) -> Result<bool> {
    let directory = load.path("look");
    let name = directory.to_str().context("a path")?;
    guest.control.ask("snapshot", &[name, "--pause"])?;
    let state = std::fs::read(directory.join("state.json"))?;
    std::fs::remove_dir_all(&directory)?;
    Ok(has(&serde_json::from_slice(&state)?, "transition"))
}

/// Whether there is a member of this name anywhere.
fn has(value: &Value, name: &str) -> bool {
    match value {
        Value::Object(members) => {
            members.contains_key(name) || members.values().any(|one| has(one, name))
        }
        Value::Array(all) => all.iter().any(|one| has(one, name)),
        _ => false,
    }
}

/// Fails unless the scenario succeeded, and the disks of the first `members` have what it wrote.
fn expect_disks(outcome: &Outcome, scenario: &str, load: &Load, members: u16) -> Result<()> {
    outcome.expect_ok()?;
    let written = outcome.value(scenario, "crc32")?;
    for member in 1..=members {
        let there = checksum(&load.path(&format!("pf0-vf{member}.raw")), 1)?;
        ensure!(
            written == format!("{there:08x}"),
            "member {member} has crc32={there:08x} instead of {written}"
        );
    }
    Ok(())
}
