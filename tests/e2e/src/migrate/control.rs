//! What a person can ask for and be told: refusals, calling off, guests that do not converge, guests that are paused.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::{await_socket, move_as, move_to, receive};
use crate::load::{Guest, Load, TICK};
use crate::trial;
use crate::vm::Running;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("migrate::what_does_not_fit_is_refused_by_name", refused),
        trial("migrate::a_guest_that_writes_too_fast_stays", too_fast),
        trial("migrate::a_migration_is_called_off", called_off),
        trial("migrate::a_guest_that_arrives_obeys_its_source", arriving),
        trial("migrate::a_paused_guest_stays_paused", paused),
        trial(
            "migrate::a_moved_guest_is_saved_and_restored_and_moved",
            saved,
        ),
    ]
}

/// Control socket of a destination that [`waiting`] has made.
const THERE: &str = "there.sock";

/// A destination that listens, and its address.
fn waiting(load: &Load, options: &[&str]) -> Result<(Running, String)> {
    let path = load.path("move.sock");
    let address = format!("unix:{}", path.display());
    let mut there = receive(&address, &load.path(THERE), options)?;
    await_socket(&path, &mut there)?;
    Ok((there, address))
}

fn refused() -> Result<()> {
    let load = Load::of_disks(1, "")?.parameter("pfs=0").disk("")?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let control = &guest.control;
    let nobody = format!("unix:{}", load.path("nobody.sock").display());
    control.refuse(
        "migrate",
        &[&nobody],
        &["the guest stays here", "start `tern receive`"],
    )?;
    control.refuse("migrate", &["tcp:127.0.0.1:9"], &["--insecure"])?;
    control.refuse("migrate", &["file:x"], &["unix:PATH"])?;
    control.refuse("migrate", &[&nobody, "--verify"], &["--copy"])?;
    control.refuse("migrate", &[&nobody, "--connections", "2"], &["--copy"])?;
    let many = ["--copy", "--connections", "17", &nobody];
    control.refuse("migrate", &many, &["1..=16"])?;
    control.refuse("resolve", &["--run"], &["not in doubt"])?;
    control.refuse("migrate", &["--cancel"], &["no migration is under way"])?;
    // What needs no guest is said before one comes.
    let options = ["--disk", "disk0=/missing-0", "--disk", "pf0=/missing-1"];
    let end = receive(&nobody, Path::new("/missing-2/s"), &options)?.wait()?;
    end.expect_code(1)?;
    for part in ["disk0: /missing-0", "pf0: /missing-1", "/missing-2/s"] {
        ensure!(end.stderr.contains(part), "{end:?}");
    }
    let small = load.path("small");
    std::fs::write(&small, "")?;
    let disks = ["disk0", "disk7"].map(|name| format!("{name}={}", small.display()));
    let options = ["--disk", &disks[0], "--disk", &disks[1]];
    let (there, address) = waiting(&load, &options)?;
    let all = [
        "no disk called disk7",
        "has 0 bytes here and another size at the source",
        "the guest stays here",
    ];
    control.refuse("migrate", &[&address], &all)?;
    let end = there.wait()?;
    end.expect_code(1)?;
    ensure!(
        all[..2].iter().all(|part| end.stderr.contains(part)),
        "{end:?}"
    );
    guest.ticks(1)?;
    let mut guest = move_to(guest, load.directory(), 1, &[])?.guest;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

/// Memory that is written all the time, and a pause that is too short for it.
fn too_fast() -> Result<()> {
    let load = Load::new(2)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let (there, address) = waiting(&load, &[])?;
    let words = ["--copy", "--downtime", "21", "--timeout", "3", &address];
    let reasons = [
        "faster than it can be copied",
        "--downtime",
        "--on-timeout switch",
    ];
    let output = guest.control.run("migrate", &words)?;
    // On a host that is fast enough for it the guest is moved, which is no fault.
    if output.status.success() {
        guest.vm.wait()?;
        let mut moved = Guest::new(there, load.path(THERE));
        moved.ticks(1)?;
        return moved.enough().map(drop);
    }
    crate::control::refused(&output, &reasons)?;
    there.wait()?.expect_code(1)?;
    guest.ticks(2).context("after a migration that gave up")?;
    let moved = move_to(
        guest,
        load.directory(),
        1,
        &["--copy", "--timeout", "3", "--on-timeout", "switch"],
    )?;
    let mut guest = moved.guest;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

fn called_off() -> Result<()> {
    let load = Load::new(2)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let (there, address) = waiting(&load, &[])?;
    let mut events = std::process::Command::new("curl")
        .args(["--silent", "--no-buffer", "--unix-socket"])
        .arg(&guest.control.socket)
        .arg("http://localhost/api/v1/events")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("cannot run curl")?;
    let mut told = BufReader::new(events.stdout.take().context("no standard output")?);
    let mut first = String::new();
    told.read_line(&mut first)?;
    ensure!(first == "event: state\n", "{first}");
    // A destination that stands still keeps the migration where it is.
    there.signal(rustix::process::Signal::STOP)?;
    let words = ["--copy", address.as_str()];
    let moving = Running::start(guest.control.command("migrate", &words)?)?;
    guest.control.await_state("migrating")?;
    guest
        .control
        .refuse("snapshot", &["elsewhere"], &["being moved"])?;
    guest
        .control
        .refuse("migrate", &[&address], &["being moved"])?;
    guest.control.ask("migrate", &["--cancel"])?;
    crate::control::refused(
        &moving.wait()?.into(),
        &["the guest stays here", "called off"],
    )?;
    there.signal(rustix::process::Signal::CONT)?;
    ensure!(
        guest.control.state()? == "running",
        "{}",
        guest.control.state()?
    );
    guest.ticks(1)?;
    drop(there);
    guest.enough()?;
    // The end of the guest ended them.
    let mut text = String::new();
    told.read_to_string(&mut text)?;
    events.wait()?;
    let offer = r#"event: progress
data: {"migration":{"role":"source","to":"unix:"#;
    let over = "event: progress\ndata: {}\n";
    let (_, after) = text.split_once(offer).context(text.clone())?;
    ensure!(after.contains(over), "{text}");
    Ok(())
}

/// What is asked for at a destination before the guest is there is refused, and does not happen to it.
fn arriving() -> Result<()> {
    let load = Load::new(2)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let (there, address) = waiting(&load, &[])?;
    // It never fits a pause like that.
    let words = ["--copy", "--downtime", "1", "--timeout", "600", &address];
    let moving = Running::start(guest.control.command("migrate", &words)?)?;
    let socket = load.path(THERE);
    let arriving = crate::control::Control { socket };
    arriving.await_state("receiving")?;
    let elsewhere = load.path("elsewhere").display().to_string();
    for (verb, words) in [
        ("pause", &[][..]),
        ("resume", &[]),
        ("snapshot", &[elsewhere.as_str()]),
        ("migrate", &["unix:nobody.sock"]),
        ("shutdown", &[]),
    ] {
        arriving.refuse(verb, words, &["still arriving", "its source"])?;
    }
    guest.control.refuse("pause", &[], &["being moved"])?;
    guest.control.refuse("shutdown", &[], &["being moved"])?;
    ensure!(arriving.state()? == "receiving");
    guest.control.ask("migrate", &["--cancel"])?;
    crate::control::refused(
        &moving.wait()?.into(),
        &["the guest stays here", "called off"],
    )?;
    there.wait()?.expect_code(1)?;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

fn paused() -> Result<()> {
    let load = Load::new(1)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    guest.control.ask("pause", &[])?;
    let mut guest = move_as("paused", guest, load.directory(), 1, &[])?.guest;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(
        !guest.vm.console().contains(TICK),
        "it runs: {}",
        guest.vm.console()
    );
    guest.control.ask("resume", &[])?;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

fn saved() -> Result<()> {
    // Frames that wait in a switch are no part of what moves.
    let load = Load::with_everything(1)?.parameter("lost=192");
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let mut guest = move_to(guest, load.directory(), 1, &[])?.guest;
    guest.ticks(1)?;
    let mut guest = crate::snapshot::move_over(guest, &load.path("saved"), &[])?;
    guest.ticks(1)?;
    // Its memory is that of a file now.
    let mut guest = move_to(guest, load.directory(), 2, &[])?.guest;
    guest.ticks(1)?;
    guest.enough().map(drop)
}
