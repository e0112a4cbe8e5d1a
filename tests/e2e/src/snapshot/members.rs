//! Owners and members that are stopped, and drivers of them that are in the middle of something.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use super::move_over;
use crate::block::checksum;
use crate::load::{Guest, Load};
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

fn modes(guest: &Guest) -> Result<Value> {
    let info = guest.control.ask("info", &[])?;
    Ok(info["owners"][1]["members"].clone())
}

/// A disk and a card that are frozen by hand while the guest uses them.
fn frozen() -> Result<()> {
    // Their threads stand still for as long.
    let load = Load::with_everything(2)?.parameter("lost=64");
    let mut guest = load.run()?;
    guest.ticks(3)?;
    for member in ["pf0-vf1", "pf1-vf2"] {
        guest.control.ask("admin", &[member, "mode", "freeze"])?;
    }
    // Half of a context, for the monitor's session.
    let half = [
        "pf1", "raw", "--opcode", "11", "--group", "1", "--member", "2",
    ];
    guest
        .control
        .ask("admin", &[&half[..], &["--data", "0100"]].concat())?;
    let directory = load.path("snapshot");
    let mut guest = move_over(guest, &directory, &[])?;
    guest.ticks(2)?;
    let members = modes(&guest)?;
    ensure!(members[0]["monitor_mode"] == "active", "{members}");
    ensure!(members[1]["monitor_mode"] == "freeze", "{members}");
    // So is the half.
    guest.control.refuse(
        "admin",
        &["pf1-vf2", "mode", "active"],
        &["context discard"],
    )?;
    guest
        .control
        .ask("admin", &["pf1-vf2", "context", "discard"])?;
    for member in ["pf0-vf1", "pf1-vf2"] {
        guest.control.ask("admin", &[member, "mode", "active"])?;
    }
    guest.ticks(3)?;
    guest.enough().map(drop)
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
