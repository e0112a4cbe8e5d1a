//! Snapshots that are not taken, and not restored: what was asked for is named, and nothing is left behind.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::{restoring, save, text};
use crate::control::{is_absent, refused};
use crate::load::{Guest, Load};
use crate::trial;
use crate::vm::{Running, output};

pub fn trials() -> Vec<Trial> {
    vec![
        trial(
            "snapshot::what_cannot_be_written_leaves_the_guest_running",
            taking,
        ),
        trial("snapshot::one_is_taken_at_a_time", at_a_time),
        trial(
            "snapshot::what_was_tampered_with_is_refused_by_name",
            restoring_tampered,
        ),
        trial("snapshot::disks_that_do_not_fit_are_refused_by_name", disks),
    ]
}

/// Directories a guest cannot be saved in.
fn taking() -> Result<()> {
    let load = Load::new(1)?;
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let at = |name: &str| load.path(name);
    let existing = at("existing");
    fs::create_dir(&existing)?;
    fs::write(existing.join("letter"), "kept")?;
    let fifo = at("fifo");
    command(&["mkfifo", text(&fifo)?])?;
    let file = at("file");
    File::create(&file)?;
    let other = at("other");
    fs::create_dir(&other)?;
    // With room for a part of a snapshot.
    let small = Mounted::new(&at("small"), "size=8M")?;
    let read_only = Mounted::new(&at("read-only"), "ro")?;
    for (directory, options, parts) in [
        (existing.clone(), &[][..], &["existing", "replaced"][..]),
        // Something that is no snapshot is not replaced by one.
        (existing.clone(), &["--replace"][..], &["existing"][..]),
        (fifo.clone(), &[][..], &["fifo"][..]),
        (fifo, &["--replace"][..], &["fifo"][..]),
        (file, &[][..], &["file"][..]),
        (at("missing/snapshot"), &[][..], &["missing"][..]),
        (at("new"), &["--base", text(&other)?][..], &["other"][..]),
        (
            at("new"),
            &["--base", text(&at("nowhere"))?][..],
            &["nowhere"][..],
        ),
        (read_only.0.join("new"), &[][..], &["read-only"][..]),
        (small.0.join("new"), &[][..], &["small"][..]),
    ] {
        let words = [&[text(&directory)?], options].concat();
        guest.control.refuse("snapshot", &words, parts)?;
        ensure!(guest.control.state()? == "running");
        guest.ticks(1)?;
    }
    ensure!(fs::read_to_string(existing.join("letter"))? == "kept");
    ensure!(is_absent(&at("new")) && is_absent(&at("missing")));
    let left: Vec<_> = fs::read_dir(&small.0)?.collect();
    ensure!(left.is_empty(), "{left:?}");
    // And then it is.
    save(&guest, &at("new"), &[])?;
    guest.enough().map(drop)
}

fn command(words: &[&str]) -> Result<()> {
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments);
    let output = output(command)?;
    ensure!(output.status.success(), "{words:?}: {output:?}");
    Ok(())
}

/// A file system of its own, for as long as this lives.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: &Path, options: &str) -> Result<Self> {
        fs::create_dir(at)?;
        command(&[
            "mount",
            "-t",
            "tmpfs",
            "-o",
            options,
            "tern-test",
            text(at)?,
        ])?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What stays mounted ends with the machine.
        let _ = command(&["umount", &self.0.to_string_lossy()]);
    }
}

/// While one is taken there is no other, and no pause.
fn at_a_time() -> Result<()> {
    let load = Load::new(1)?
        .options(["--memory", "512M"])
        .parameter("mib=256");
    let mut guest = load.run()?;
    guest.ticks(3)?;
    let (first, second) = (load.path("first"), load.path("second"));
    let mut client = Running::start(guest.control.command("snapshot", &[text(&first)?])?)?;
    client.close_input();
    await_saving(&guest)?;
    guest
        .control
        .refuse("snapshot", &[text(&second)?], &["snapshot"])?;
    guest.control.refuse("pause", &[], &["snapshot"])?;
    let (code, answer) = guest.control.curl("PUT", "/api/v1/pause", None)?;
    ensure!(code == 409, "{code} {answer}");
    client.wait()?.expect_code(0)?;
    ensure!(guest.control.state()? == "running" && is_absent(&second));
    guest.ticks(1)?;
    guest.enough().map(drop)
}

/// Waits until a snapshot is being taken, which says how far it got.
fn await_saving(guest: &Guest) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let info = guest.control.ask("info", &[])?;
        if info["state"] == "saving" && info["progress"]["phase"].is_string() {
            return Ok(());
        }
        ensure!(
            Instant::now() < deadline,
            "nobody ever saw the snapshot: {info}"
        );
    }
}

/// What is done to a copy of a snapshot.
type Damage = fn(&Path) -> Result<()>;

/// One snapshot, and copies of it of which something is wrong. No monitor runs a guest that was changed.
fn restoring_tampered() -> Result<()> {
    let load = Load::new(1)?;
    let mut guest = load.run()?;
    guest.ticks(2)?;
    let good = load.path("good");
    save(&guest, &good, &["--stop"])?;
    guest.vm.wait()?;
    for (number, (filter, parts)) in [
        (".version = 2", &["version", "2"][..]),
        (".format = \"else\"", &["format"]),
        (".surprise = 1", &["surprise"]),
        (".memory.surprise = 1", &["surprise"]),
        ("del(.vcpus)", &["vcpus"]),
        (".vcpus = \"none\"", &["vcpus"]),
        (".id |= (explode | reverse | implode)", &["memory.bin"]),
        (
            ".memory.digest |= (explode | reverse | implode)",
            &["memory.bin"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let bad = load.path(&format!("bad-{number}"));
        let state = copy(&good, &bad)?;
        let mut jq = Command::new("jq");
        jq.args([filter, text(&good.join("state.json"))?]);
        let output = output(jq)?;
        ensure!(output.status.success(), "{output:?}");
        fs::write(&state, output.stdout)?;
        refuses(&load, &bad, parts, &[]).with_context(|| filter.to_owned())?;
        fs::remove_dir_all(&bad)?;
    }
    let bad = load.path("bad");
    let damages: [(&str, Damage, &[&str]); 5] = [
        (
            "memory that is cut",
            |at| shorten(&at.join("memory.bin")),
            &["memory.bin"],
        ),
        (
            "no memory",
            |at| Ok(fs::remove_file(at.join("memory.bin"))?),
            &["memory.bin"],
        ),
        (
            "no state",
            |at| Ok(fs::remove_file(at.join("state.json"))?),
            &["state.json"],
        ),
        (
            "half a state",
            |at| shorten(&at.join("state.json")),
            &["state.json"],
        ),
        ("nothing", |at| Ok(fs::remove_dir_all(at)?), &["bad"]),
    ];
    for (what, damage, parts) in damages {
        copy(&good, &bad)?;
        damage(&bad)?;
        refuses(&load, &bad, parts, &[]).context(what)?;
        if !is_absent(&bad) {
            fs::remove_dir_all(&bad)?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<PathBuf> {
    command(&["cp", "-a", "--sparse=always", text(from)?, text(to)?])?;
    Ok(to.join("state.json"))
}

/// Takes the second half away.
fn shorten(path: &Path) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    file.set_len(file.metadata()?.len() / 2)?;
    Ok(())
}

/// No guest is restored, in so many words.
fn refuses(load: &Load, directory: &Path, parts: &[&str], options: &[&str]) -> Result<()> {
    let socket = load.path("refused.sock");
    let output = output(restoring(directory, &socket, options)?)?;
    refused(&output, parts)?;
    ensure!(output.stdout.is_empty(), "{output:?}");
    ensure!(is_absent(&socket), "the socket outlived its owner");
    Ok(())
}

fn disks() -> Result<()> {
    let load = Load::new(1)?.disk("")?;
    let mut guest = load.run()?;
    guest.ticks(3)?;
    let directory = load.path("snapshot");
    save(&guest, &directory, &["--stop"])?;
    guest.vm.wait()?;
    let (disk, moved) = (load.path("disk0.raw"), load.path("moved.raw"));

    fs::rename(&disk, &moved)?;
    refuses(&load, &directory, &["disk0", "disk0.raw"], &[])?;
    // It is the same wherever it is.
    let here = format!("disk0={}", moved.display());
    let mut guest = super::restore(&directory, &load.path("moved.sock"), &["--disk", &here])?;
    guest.ticks(1)?;
    // And nobody else's meanwhile.
    refuses(&load, &directory, &["moved.raw"], &["--disk", &here])?;
    guest.enough()?;

    // What has been written since is not what the guest knows.
    fs::rename(&moved, &disk)?;
    refuses(
        &load,
        &directory,
        &["disk0", "written to since", "--disk"],
        &[],
    )?;
    refuses(
        &load,
        &directory,
        &["disk7", "disk0"],
        &["--disk", "disk7=/dev/null"],
    )?;
    // A disk of another size is none that the guest knows, whoever says so.
    File::options().write(true).open(&disk)?.set_len(1 << 20)?;
    refuses(&load, &directory, &["disk0", "1048576 bytes"], &[])?;
    let named = format!("disk0={}", disk.display());
    refuses(&load, &directory, &["disk0"], &["--disk", &named])?;
    // Files that others could have put there lead nowhere.
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
    refuses(&load, &directory, &["disk0", "--disk"], &[])
}
