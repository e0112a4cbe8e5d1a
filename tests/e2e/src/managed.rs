//! Managed devices: a driver in the guest makes them through the transport virtqueues of two management devices.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::block::checksum;
use crate::load::{Guest, Load};
use crate::migrate::move_to;
use crate::migrate::rounds::COPY;
use crate::snapshot::members::ASKED;
use crate::snapshot::move_over;
use crate::trial;
use crate::vm::Outcome;

/// Managed devices that the guest makes: network devices, and disks.
const CARDS: u16 = 2;
const DISKS: u16 = 1;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("managed::devices_are_made_and_made_anew", || {
            made("wire=aligned:packed=yes", "wire=aligned,packed")
        }),
        trial("managed::devices_are_made_in_the_packed_layout", || {
            made("wire=packed", "wire=packed")
        }),
        trial("managed::devices_go_on_after_a_snapshot_and_moves", moved),
    ]
}

/// A guest with management devices that have `more` options, and its scenario with these parameters.
fn load(parameters: &str, more: &str) -> Result<Load> {
    let load = Load::new(1)?.files("managed", DISKS)?;
    let path = load.path("managed%d.raw").display().to_string();
    Ok(load
        .options([
            "--manager".into(),
            format!("net,devices={CARDS},{more}"),
            "--manager".into(),
            format!("block,devices={DISKS},path={path},{more}"),
        ])
        .scenario(&format!("managed:{parameters},dmesg-clean")))
}

fn made(parameters: &str, more: &str) -> Result<()> {
    let load = load(parameters, more)?;
    expect(&load.run()?.vm.wait()?, &load)
}

/// Saved and restored, handed over, and copied.
fn moved() -> Result<()> {
    let load = load("packed=yes:holds=3", "packed")?;
    let mut guest = load.run()?;
    guest.vm.wait_for(ASKED, 0)?;
    expect_devices(&guest)?;
    guest = move_over(guest, &load.path("snapshot"), &[])?;
    go_on(&mut guest)?;
    for (number, options) in [(1, &[][..]), (2, &COPY[..])] {
        guest = move_to(guest, load.directory(), number, options)?.guest;
        expect_devices(&guest)?;
        match number {
            1 => go_on(&mut guest)?,
            _ => guest.vm.send(b"go on\n")?,
        }
    }
    expect(&guest.vm.wait()?, &load)
}

/// Lets the guest work until it asks again.
fn go_on(guest: &mut Guest) -> Result<()> {
    let from = guest.vm.console().len();
    guest.vm.send(b"go on\n")?;
    guest.vm.wait_for(ASKED, from).map(drop)
}

/// Fails unless `tern info` shows the devices that the guest has made.
fn expect_devices(guest: &Guest) -> Result<()> {
    let info = guest.control.ask("info", &[])?;
    let packed = &info["managers"][1]["devices"][0]["uses_packed"];
    ensure!(*packed == true, "{info}");
    for (manager, count) in [(0, CARDS), (1, DISKS)] {
        let manager = &info["managers"][manager];
        let devices = manager["devices"].as_array();
        let devices = devices.with_context(|| format!("no devices: {info}"))?;
        let live = |device: &Value| device["live"] == true && device["id"].as_u64() > Some(0);
        ensure!(
            devices.len() == usize::from(count) && devices.iter().all(live),
            "{manager}"
        );
        ensure!(manager["total_devices"] == count, "{manager}");
        let id = devices[0]["id"].to_string();
        let name = manager["name"].as_str().context("a name")?;
        expect_commands(guest, name, &id)?;
    }
    Ok(())
}

/// Fails unless a person can send commands to the device of this id, but none that makes or destroys one.
fn expect_commands(guest: &Guest, manager: &str, id: &str) -> Result<()> {
    let managed = |class, command, device| {
        let numbers = ["--class", class, "--command", command, "--device", device];
        [&[manager, "managed"][..], &numbers].concat()
    };
    let status = guest.control.ask("admin", &managed("4", "1", id))?;
    ensure!(status["error"] == 0 && status["data"] == "0f", "{status}");
    for (class, command, device, said) in [
        ("2", "1", id, "made and destroyed by the driver"),
        ("2", "0", "0", "made and destroyed by the driver"),
        ("11", "0", id, "class 11 has no command 0"),
    ] {
        let words = managed(class, command, device);
        guest.control.refuse("admin", &words, &[said])?;
    }
    let nobody = guest.control.run("admin", &managed("4", "1", "99"))?;
    ensure!(nobody.status.code() == Some(1), "{nobody:?}");
    let answer: Value = serde_json::from_slice(&nobody.stdout)?;
    ensure!(answer["error"] == 2, "{answer}");
    Ok(())
}

/// Fails unless the scenario succeeded, and the disk has what it wrote.
fn expect(outcome: &Outcome, load: &Load) -> Result<()> {
    outcome.expect_ok()?;
    let written = outcome.value("managed", "crc32")?;
    let there = checksum(&load.path("managed1.raw"), 1)?;
    ensure!(
        written == format!("{there:08x}"),
        "the disk has crc32={there:08x} instead of {written}"
    );
    ensure!(
        outcome.number("managed", "left")? == 0,
        "{}",
        outcome.stdout
    );
    Ok(())
}
