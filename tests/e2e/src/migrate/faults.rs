//! Faults at every stage of a migration: exactly one process runs the guest afterwards, or none and the source says so.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

use super::MOVED;
use super::proxy::{Fault, Point, Proxy};
use crate::load::{Guest, Load, TICK};
use crate::trial;
use crate::vm::{PATIENCE, Running, tern};

/// `tern migrate` that could not find out what became of the guest; also the end of a process in that state.
const IN_DOUBT: i32 = 9;
/// Disks, and no more: what is behind a path is opened by both processes.
const CPUS: u32 = 2;

pub fn trials() -> Vec<Trial> {
    vec![
        trial(
            "migrate::a_cut_before_the_commit_leaves_the_guest_here",
            || {
                stays(&[
                    (Point::Message("hello"), Fault::CutAfter),
                    (Point::Message("offer"), Fault::CutBefore),
                    (Point::Message("accept"), Fault::CutBefore),
                    (Point::Pages, Fault::CutBefore),
                    (Point::Pages, Fault::Flip),
                    (Point::Message("round"), Fault::Twice),
                    (Point::Message("complete"), Fault::CutBefore),
                    (Point::Message("prepared"), Fault::CutBefore),
                    (Point::Message("commit"), Fault::CutBefore),
                ])
            },
        ),
        trial("migrate::a_peer_that_falls_silent_is_noticed", || {
            stays(&[
                (Point::Pages, Fault::Silence),
                (Point::Message("prepared"), Fault::Silence),
            ])
        }),
        trial(
            "migrate::a_destination_that_is_killed_leaves_the_guest_here",
            killed,
        ),
        trial(
            "migrate::a_source_that_is_killed_leaves_no_guest_there",
            source_killed,
        ),
        trial("migrate::a_cut_after_the_commit_is_asked_about", asked),
        trial(
            "migrate::a_guest_in_doubt_stands_still_until_somebody_says",
            doubt,
        ),
    ]
}

/// A guest with disks.
fn load() -> Result<Load> {
    Load::of_disks(CPUS, "")?.parameter("pfs=0").disk("")
}

/// A destination at a port of its own.
struct Destination {
    vm: Running,
    port: u16,
}

/// Over TCP a destination follows no path of the source: it has to be told.
fn destination(load: &Load, socket: &Path) -> Result<Destination> {
    // Nobody else takes ports here.
    let port = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let address = format!("tcp:127.0.0.1:{port}");
    let mut command = Command::new(tern()?);
    command
        .args(["receive", &address, "--insecure", "--api-socket"])
        .arg(socket);
    for (name, file) in [
        ("disk0", "disk0.raw"),
        ("pf0", "pf0.raw"),
        ("pf0-vf%d", "pf0-vf%d.raw"),
    ] {
        let file = load.path(file);
        command.args(["--disk", &format!("{name}={}", file.display())]);
    }
    Ok(Destination {
        vm: Running::start(command)?,
        port,
    })
}

/// Has a guest moved through a proxy; `tern migrate` itself.
fn moving(guest: &Guest, proxy: &Proxy) -> Result<Running> {
    let words = ["--insecure", "--json", &proxy.address];
    Running::start(guest.control.command("migrate", &words)?)
}

/// Its exit status and what it said.
fn outcome(moving: Running) -> Result<(i32, String)> {
    let outcome = moving.wait()?;
    Ok((outcome.code(), outcome.stderr + &outcome.stdout))
}

/// Each of these faults leaves the guest where it is, and the destination ends. Then it is moved after all.
fn stays(faults: &[(Point, Fault)]) -> Result<()> {
    let load = load()?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    for (number, (point, fault)) in faults.iter().enumerate() {
        let doing = || format!("{fault:?} at {point:?}");
        let there = destination(&load, &load.path(&format!("there-{number}.sock")))?;
        await_port(there.port)?;
        let proxy = Proxy::start(there.port, *point, *fault)?;
        let (code, said) = outcome(moving(&guest, &proxy)?).with_context(doing)?;
        ensure!(
            proxy.happened() && code == 1 && said.contains("the guest stays here"),
            "{}: {code} {said}",
            doing()
        );
        guest.ticks(1).with_context(doing)?;
        // Without an offer there was no guest, and the next one may come.
        let waits = matches!(point, Point::Message("hello" | "offer"));
        if waits {
            there.vm.signal(Signal::TERM)?;
        }
        let end = there.vm.wait().with_context(doing)?;
        let expected = if waits { 143 } else { 1 };
        ensure!(
            end.code() == expected && !end.stdout.contains(TICK),
            "{}: {end:?}",
            doing()
        );
    }
    finish(guest, &load)
}

/// A second attempt works, and nothing of the guest is lost.
fn finish(guest: Guest, load: &Load) -> Result<()> {
    let moved = super::move_to(guest, load.directory(), 1000, &[])?;
    let mut guest = moved.guest;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

fn await_port(port: u16) -> Result<()> {
    let wanted = format!(":{port:04X} 00000000:0000 0A");
    let deadline = std::time::Instant::now() + PATIENCE;
    // Looked at and not connected to: a connection would be taken for a peer.
    while !std::fs::read_to_string("/proc/net/tcp")?.contains(&wanted) {
        ensure!(
            std::time::Instant::now() < deadline,
            "nobody listens at {port}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn killed() -> Result<()> {
    let load = load()?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let points = [
        Point::Message("accept"),
        Point::Pages,
        Point::Message("complete"),
        Point::Message("prepared"),
    ];
    for (number, point) in points.into_iter().enumerate() {
        let doing = || format!("killed at {point:?}");
        let there = destination(&load, &load.path(&format!("there-{number}.sock")))?;
        await_port(there.port)?;
        let proxy = Proxy::start(there.port, point, Fault::Tell)?;
        let child = moving(&guest, &proxy)?;
        let held = proxy.wait(PATIENCE).with_context(doing)?;
        there.vm.signal(Signal::KILL)?;
        there.vm.wait()?;
        drop(held);
        let (code, said) = outcome(child)?;
        // A message that was on its way may still arrive: then nobody can say more than that it was sent.
        let kept = code == 1 && said.contains("the guest stays here");
        let in_doubt = code == IN_DOUBT && point == Point::Message("prepared");
        ensure!(kept || in_doubt, "{}: {code} {said}", doing());
        if in_doubt {
            guest.control.ask("resolve", &["--run"])?;
        }
        guest.ticks(1).with_context(doing)?;
    }
    finish(guest, &load)
}

fn source_killed() -> Result<()> {
    let load = load()?;
    for point in [Point::Pages, Point::Message("prepared")] {
        let mut guest = load.run()?;
        guest.ticks(1)?;
        let there = destination(&load, &load.path("there.sock"))?;
        await_port(there.port)?;
        let proxy = Proxy::start(there.port, point, Fault::Tell)?;
        let child = moving(&guest, &proxy)?;
        let held = proxy.wait(PATIENCE)?;
        guest.vm.signal(Signal::KILL)?;
        guest.vm.wait()?;
        drop(held);
        outcome(child)?;
        let end = there.vm.wait()?;
        ensure!(
            end.code() == 1 && !end.stdout.contains(TICK),
            "{point:?}: {end:?}"
        );
    }
    // Locks are free again.
    let mut guest = load.run()?;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

/// The answer to the commit is lost: the source asks on a new connection and learns that the guest runs there.
fn asked() -> Result<()> {
    let load = load()?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let socket = load.path("there.sock");
    let there = destination(&load, &socket)?;
    await_port(there.port)?;
    let proxy = Proxy::start(there.port, Point::Message("running"), Fault::CutBefore)?;
    let (code, said) = outcome(moving(&guest, &proxy)?)?;
    ensure!(code == 0, "{code} {said}");
    guest.vm.wait()?.expect_code(MOVED)?;
    let mut guest = Guest::new(there.vm, socket);
    guest.awake()?;
    guest.ticks(1)?;
    guest.enough().map(drop)
}

/// The destination is gone right after it was told to run the guest.
fn doubt() -> Result<()> {
    let load = load()?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    for resolution in ["--run", "--discard"] {
        let there = destination(&load, &load.path("there.sock"))?;
        await_port(there.port)?;
        let proxy = Proxy::start(there.port, Point::Message("commit"), Fault::Tell)?;
        let child = moving(&guest, &proxy)?;
        let held = proxy.wait(PATIENCE)?;
        there.vm.signal(Signal::KILL)?;
        there.vm.wait()?;
        drop(held);
        let (code, said) = outcome(child)?;
        ensure!(
            code == IN_DOUBT && said.contains("tern resolve --run"),
            "{code} {said}"
        );
        ensure!(
            guest.control.state()? == "in_doubt",
            "{}",
            guest.control.state()?
        );
        guest
            .control
            .refuse("resume", &[], &["given to another process", "tern resolve"])?;
        // Nothing of it happens here.
        let before = guest.vm.console().len();
        std::thread::sleep(Duration::from_secs(3));
        ensure!(
            !guest.vm.console()[before..].contains(TICK),
            "it runs in doubt"
        );
        match resolution {
            "--run" => {
                // Whoever says so may be wrong: another process has a disk.
                let disk = File::open(load.path("disk0.raw"))?;
                flock(&disk, FlockOperation::NonBlockingLockExclusive)?;
                let reasons = ["stands still", "disk0", "tern resume"];
                guest.control.refuse("resolve", &[resolution], &reasons)?;
                drop(disk);
                guest.control.ask("resume", &[])?;
                guest.ticks(1)?;
            }
            "--discard" => {
                guest.control.ask("resolve", &[resolution])?;
                guest.vm.wait()?.expect_code(MOVED)?;
                return Ok(());
            }
            other => bail!("{other}"),
        }
    }
    Ok(())
}
