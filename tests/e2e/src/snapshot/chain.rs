//! Snapshots that hold only what changed since another.

use std::path::Path;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;

use super::{number, restore, save, text};
use crate::block::MIB;
use crate::load::{Load, expect_work};
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("snapshot::a_chain_of_three_restores_the_newest", chain),
        trial("snapshot::pages_that_became_zero_are_zero", zero),
    ]
}

/// Bytes a file takes on its disk.
fn taken(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(path.metadata()?.blocks() * 512)
}

fn chain() -> Result<()> {
    // Pages that become zero and others again are part of the load.
    let load = Load::new(2)?.parameter("mib=8");
    let at = |name: &str| load.path(name);
    let mut guest = load.run()?;
    guest.ticks(2)?;
    save(&guest, &at("first"), &["--track"])?;
    guest.ticks(3)?;
    let base = at("first");
    save(&guest, &at("second"), &["--track", "--base", text(&base)?])?;
    guest.ticks(3)?;
    // Changes since the first are known no more.
    let third = at("third");
    let words = [text(&third)?, "--base", text(&base)?];
    guest
        .control
        .refuse("snapshot", &words, &["first", "--track"])?;
    let base = at("second");
    save(&guest, &at("third"), &["--base", text(&base)?, "--stop"])?;
    guest.vm.wait()?.expect_code(super::STOPPED)?;

    let size = |name: &str| taken(&at(name).join("memory.bin"));
    let (first, second, third) = (size("first")?, size("second")?, size("third")?);
    ensure!(
        second < first / 2 && third < first / 2,
        "{first}, then {second} and {third} bytes"
    );
    // The newest, and after that each of the others.
    for name in ["third", "second", "first"] {
        let mut again = restore(&at(name), &at("again.sock"), &["--track"])?;
        again.ticks(2)?;
        if name == "third" {
            // A chain goes on in another process.
            let base = at("third");
            save(&again, &at("fourth"), &["--base", text(&base)?])?;
            let mut fourth = restore(&at("fourth"), &at("fourth.sock"), &[])?;
            fourth.ticks(2)?;
            expect_work(&fourth.enough()?, &["pages"])?;
        }
        expect_work(&again.enough()?, &["pages"])?;
    }
    Ok(())
}

/// A megabyte that held a pattern in the base is zero in the guest when the next is taken, and in the guest that is
/// restored from that.
fn zero() -> Result<()> {
    const ASKED: &str = "tern-guest: type a line";
    let load = Load::new(1)?.scenario("memory-zero:mib=16");
    let at = |name: &str| load.path(name);
    let mut guest = load.run()?;
    let from = guest.vm.wait_for(ASKED, 0)?;
    save(&guest, &at("first"), &["--track"])?;
    guest.vm.send(b"zero it\n")?;
    guest.vm.wait_for(ASKED, from)?;
    let base = at("first");
    let answer = save(&guest, &at("second"), &["--base", text(&base)?])?;
    // Not those that are zero.
    let written = |mode| number(&answer, &["bytes", mode]);
    let written = written("written_running")? + written("written_paused")?;
    ensure!(written < 12 * MIB, "{answer}");
    guest.vm.send(b"look\n")?;
    guest.vm.wait()?.expect_ok()?;

    let mut second = restore(&at("second"), &at("second.sock"), &[])?;
    second.vm.send(b"look\n")?;
    second.vm.wait()?.expect_ok()?;
    let mut first = restore(&at("first"), &at("first.sock"), &[])?;
    first.vm.send(b"zero it\n")?;
    first.vm.wait_for(ASKED, 0)?;
    first.vm.send(b"look\n")?;
    first.vm.wait()?.expect_ok()
}
