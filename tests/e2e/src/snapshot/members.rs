//! Owners and members that are stopped, and drivers of them that are in the middle of something.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::move_over;
use crate::block::checksum;
use crate::load::{Guest, Load, expect_work};
use crate::trial;

/// The guest waits for a line on its console.
pub const ASKED: &str = "tern-guest: type a line";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("snapshot::a_frozen_vf_stays_frozen_and_goes_on", frozen),
        trial(
            "snapshot::a_suspended_vf_stays_suspended_and_goes_on",
            || held("suspend-v1.4", ",suspend=v1.4", 1, over),
        ),
        trial(
            "snapshot::a_stopped_queue_stays_stopped_and_goes_on",
            || held("queue", ",device-state-cap", 1, over),
        ),
        trial(
            "snapshot::an_owner_driver_in_the_guest_goes_on_where_it_was",
            || held("freeze", "", 3, over),
        ),
    ]
}

/// A disk that is frozen by hand while the guest uses it. (Linux complains of cards whose queues stand still.)
fn frozen() -> Result<()> {
    let load = Load::of_disks(2, "")?.parameter("vfs=2");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    freeze(&guest, 2)?;
    let mut guest = move_over(guest, &load.path("snapshot"), &[])?;
    guest.ticks(2)?;
    let info = guest.control.ask("info", &[])?;
    let members = &info["owners"][0]["members"];
    ensure!(members[0]["monitor_mode"] == "active", "{members}");
    thaw(&guest, 2)?;
    guest.ticks(2)?;
    expect_work(&guest.enough()?, &["blocks"])
}

/// Freezes a member of `pf0` by hand, and leaves half of a context for it in the monitor's session.
pub fn freeze(guest: &Guest, member: u16) -> Result<()> {
    let words = [&format!("pf0-vf{member}"), "mode", "freeze"];
    guest.control.ask("admin", &words)?;
    let number = member.to_string();
    let half = [
        "pf0", "raw", "--opcode", "11", "--group", "1", "--member", &number, "--data", "0100",
    ];
    guest.control.ask("admin", &half).map(drop)
}

/// Fails unless the member is frozen and the half is still there; drops that, and lets the member go on.
pub fn thaw(guest: &Guest, member: u16) -> Result<()> {
    let info = guest.control.ask("info", &[])?;
    let members = &info["owners"][0]["members"];
    let mode = &members[usize::from(member) - 1]["monitor_mode"];
    ensure!(*mode == "freeze", "{members}");
    let name = format!("pf0-vf{member}");
    let words = [&name, "mode", "active"];
    guest
        .control
        .refuse("admin", &words, &["context discard"])?;
    guest.control.ask("admin", &[&name, "context", "discard"])?;
    guest.control.ask("admin", &words).map(drop)
}

fn over(guest: Guest, directory: &Path, number: u32) -> Result<Guest> {
    move_over(guest, &directory.join(format!("hold-{number}")), &[])
}

/// A driver in the guest has stopped its function, and waits for us before it looks whether it still is. Each time it
/// waits `carry` moves the guest, which finds nothing wrong.
pub fn held(
    way: &str,
    doors: &str,
    holds: u32,
    carry: impl Fn(Guest, &Path, u32) -> Result<Guest>,
) -> Result<()> {
    let load =
        Load::of_disks(2, doors)?.scenario(&format!("vf-stop:way={way}:hold=yes,dmesg-clean"));
    let mut guest = load.run()?;
    guest.vm.wait_for(ASKED, 0)?;
    for hold in 0..holds {
        guest = carry(guest, load.directory(), hold).with_context(|| format!("hold {hold}"))?;
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
