//! Owners and members that are stopped, and drivers of them that are in the middle of something.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::move_over;
use crate::block::checksum;
use crate::load::{Guest, Load, expect_work};
use crate::trial;

/// The guest waits for a line on its console.
const ASKED: &str = "tern-guest: type a line";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("snapshot::a_frozen_vf_stays_frozen_and_goes_on", frozen),
        trial(
            "snapshot::a_suspended_vf_stays_suspended_and_goes_on",
            || held("suspend-v1.4", ",suspend=v1.4", 1),
        ),
        trial(
            "snapshot::a_stopped_queue_stays_stopped_and_goes_on",
            || held("queue", ",device-state-cap", 1),
        ),
        trial(
            "snapshot::an_owner_driver_in_the_guest_goes_on_where_it_was",
            || held("freeze", "", 3),
        ),
    ]
}

/// A disk that is frozen by hand while the guest uses it. (Linux complains of cards whose queues stand still.)
fn frozen() -> Result<()> {
    let load = Load::of_disks(2, "")?.parameter("vfs=2");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    let admin = |guest: &Guest, words: &[&str]| guest.control.ask("admin", words);
    admin(&guest, &["pf0-vf2", "mode", "freeze"])?;
    // Half of a context, for the monitor's session.
    let half = [
        "--opcode", "11", "--group", "1", "--member", "2", "--data", "0100",
    ];
    admin(&guest, &[&["pf0", "raw"], &half[..]].concat())?;
    let mut guest = move_over(guest, &load.path("snapshot"), &[])?;
    guest.ticks(2)?;
    let info = guest.control.ask("info", &[])?;
    let members = &info["owners"][0]["members"];
    ensure!(members[0]["monitor_mode"] == "active", "{members}");
    ensure!(members[1]["monitor_mode"] == "freeze", "{members}");
    // The half is still there, too.
    let words = ["pf0-vf2", "mode", "active"];
    guest
        .control
        .refuse("admin", &words, &["context discard"])?;
    admin(&guest, &["pf0-vf2", "context", "discard"])?;
    admin(&guest, &words)?;
    guest.ticks(2)?;
    expect_work(&guest.enough()?, &["blocks"])
}

/// A driver in the guest has stopped its function, and waits for us before it looks whether it still is. Each time it
/// waits it is moved, and the guest finds nothing wrong.
fn held(way: &str, doors: &str, holds: usize) -> Result<()> {
    let load =
        Load::of_disks(2, doors)?.scenario(&format!("vf-stop:way={way}:hold=yes,dmesg-clean"));
    let mut guest = load.run()?;
    guest.vm.wait_for(ASKED, 0)?;
    for hold in 0..holds {
        let directory = load.path(&format!("hold-{hold}"));
        guest = move_over(guest, &directory, &[]).with_context(|| format!("hold {hold}"))?;
        guest.vm.send(b"go on\n")?;
        if hold + 1 < holds {
            guest.vm.wait_for(ASKED, 0)?;
        }
    }
    let outcome = guest.vm.wait()?;
    outcome.expect_ok()?;
    let there = format!("{:08x}", checksum(&load.path("pf0-vf1.raw"), 1)?);
    ensure!(
        outcome.value("vf-stop", "crc32")? == there,
        "what was written has crc32={there}"
    );
    Ok(())
}
