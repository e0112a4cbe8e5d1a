//! Virtual functions that are stopped and go on: by their drivers, by their owner's driver in the guest, and by hand.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Output;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::block::{MIB, checksum};
use crate::control::Control;
use crate::trial;
use crate::vm::Vm;

/// How often what is in use is moved.
const MOVES: u32 = 5;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("stops::a_suspended_vf_goes_on", || {
            stop("suspend-v5", ",suspend=v5", |vm| vm)
        }),
        trial("stops::a_vf_suspended_as_virtio_1_4_has_it_goes_on", || {
            stop("suspend-v1.4", ",suspend=v1.4", |vm| vm)
        }),
        trial("stops::a_stopped_vf_goes_on", || {
            stop("device-stop", ",device-stop", |vm| vm)
        }),
        trial("stops::a_stopped_queue_of_a_vf_goes_on", || {
            stop("queue", ",device-state-cap", |vm| vm)
        }),
        trial("stops::a_frozen_vf_goes_on_after_a_reset", || {
            stop("freeze", "", |vm| vm)
        }),
        trial(
            "stops::a_frozen_vf_goes_on_after_a_reset_with_linux_6_1",
            || stop("freeze", "", |vm| vm.kernel("vmlinuz-6.1", "6.1")),
        ),
        trial("stops::a_disk_is_frozen_and_given_back_by_hand", by_hand),
        trial("stops::a_disk_in_use_is_moved_again_and_again", || {
            let disks = Disks::new()?;
            let used = "sriov-block:n=2:mib=4,sriov-block:n=2:mib=4,sriov-block:n=2:mib=4";
            in_use(&disks.option(""), used)
        }),
        trial("stops::a_card_in_use_is_moved_again_and_again", || {
            in_use("net,vfs=2", "sriov-ping:n=2:mib=4")
        }),
    ]
}

/// The guest waits for a line on its console.
const ASKED: &str = "tern-guest: type a line";

/// Files of an owner and two members.
struct Disks {
    directory: TempDir,
}

impl Disks {
    fn new() -> Result<Self> {
        let disks = Self {
            directory: tempfile::tempdir()?,
        };
        for name in ["pf", "vf1", "vf2"] {
            let mut file = File::create(disks.path(name))?;
            file.write_all(name.as_bytes())?;
            file.set_len(4 * MIB)?;
        }
        Ok(disks)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.raw"))
    }

    /// The option that names them.
    fn option(&self, more: &str) -> String {
        let (pf, vf) = (self.path("pf"), self.path("vf%d"));
        format!(
            "block,vfs=2,path={},vf-path={}{more}",
            pf.display(),
            vf.display()
        )
    }
}

/// A driver in user space writes a MiB to its disk, and stops it or has it stopped all the time.
fn stop(way: &str, doors: &str, adjust: impl FnOnce(Vm) -> Vm) -> Result<()> {
    let disks = Disks::new()?;
    let vm = Vm::new(format!("vf-stop:way={way},dmesg-clean"))
        .args(["--cpus", "2", "--pf"])
        .args([disks.option(doors)]);
    let outcome = adjust(vm).run_ok()?;
    // A burst of eight pages, or two of them, before each.
    ensure!(outcome.number("vf-stop", "stops")? >= 16);
    ensure!(outcome.number("vf-stop", "sibling_mib")? >= 16);
    let there = format!("{:08x}", checksum(&disks.path("vf1"), 1)?);
    ensure!(
        outcome.value("vf-stop", "crc32")? == there,
        "what was written has crc32={there}"
    );
    Ok(())
}

/// The guest uses its disks with the stock driver, which notices nothing but a delay.
fn by_hand() -> Result<()> {
    let disks = Disks::new()?;
    let socket = disks.directory.path().join("api.sock");
    let file = disks.directory.path().join("vf1.ctx");
    let scenario = "sriov-enable:n=2,console-echo,sriov-block:n=2:mib=4,console-echo,sriov-disable";
    let mut vm = Vm::new(scenario)
        .args(["--cpus", "2", "--pf"])
        .args([disks.option("")])
        .args(["--api-socket".as_ref(), socket.as_os_str()])
        .spawn()?;
    let begun = vm.wait_for(ASKED, 0)?;

    let hand = Hand { socket: &socket };
    let name = file.to_str().context("a path")?;
    let mode = |expected: &str| -> Result<()> {
        let answer = hand.ask(&["pf0-vf1", "mode"])?;
        ensure!(answer["mode"] == expected, "{answer}");
        Ok(())
    };
    mode("active")?;
    // Contexts are for members that exist, and are written to frozen ones.
    hand.refuse(
        &["pf0-vf3", "mode"],
        "no virtual function is called pf0-vf3",
    )?;
    hand.refuse(&["pf0", "mode", "freeze"], "pf0 is an owner")?;
    hand.ask(&["pf0-vf1", "context", "read", name])?;
    hand.refuse(&["pf0-vf1", "context", "write", name], "mode freeze")?;
    hand.refuse(
        &["pf0-vf1", "context", "read", name],
        "pf0-vf1 context discard",
    )?;
    let before = std::fs::read(&file)?;

    hand.ask(&["pf0-vf1", "mode", "freeze"])?;
    mode("freeze")?;
    let info = hand.run("info", &[])?;
    let info: Value = serde_json::from_slice(&info.stdout)?;
    let members = &info["owners"][0]["members"];
    ensure!(members[0]["monitor_mode"] == "freeze" && members[0]["guest_mode"] == "active");
    ensure!(members[1]["monitor_mode"] == "active", "{members}");
    let size = hand.ask(&["pf0-vf1", "context", "size"])?;
    let read = hand.ask(&["pf0-vf1", "context", "read", name])?;
    ensure!(size["bytes"] == read["bytes"], "{size} {read}");
    let frozen = std::fs::read(&file)?;
    ensure!(read["bytes"] == frozen.len() && frozen.len() == before.len());
    let shown = hand.ask(&["pf0-vf1", "context", "show", name])?;
    let fields = shown["fields"].as_array().context("fields")?;
    let ring = fields.iter().find(|f| f["type"] == "VQ_SPLIT_RUNTIME_CFG");
    ensure!(ring.context("no ring")?["enabled"] == true, "{shown}");

    // What is no context leaves no trace.
    let broken = disks.directory.path().join("broken.ctx");
    std::fs::write(&broken, &frozen[..frozen.len() - 1])?;
    let broken = broken.to_str().context("a path")?;
    hand.refuse(
        &["pf0-vf1", "context", "write", broken],
        "is not a device context",
    )?;
    hand.ask(&["pf0-vf1", "context", "write", name])?;
    // Half of one more keeps the mode, until it is dropped.
    let half = &[
        "pf0", "raw", "--opcode", "11", "--group", "1", "--member", "1",
    ];
    hand.ask(&[&half[..], &["--data", "0100"]].concat())?;
    hand.refuse(&["pf0-vf1", "mode", "active"], "pf0-vf1 context discard")?;
    hand.ask(&["pf0-vf1", "context", "discard"])?;
    hand.ask(&["pf0-vf1", "context", "write", name])?;

    let range = "0x0+16M";
    hand.refuse(&["pf0-vf1", "records", "read", range], "records start")?;
    hand.ask(&[
        "pf0-vf1",
        "records",
        "start",
        "--page-size",
        "64K",
        "0x0+256M",
    ])?;
    hand.ask(&["pf0-vf1", "mode", "active"])?;
    mode("active")?;
    vm.send(b"go on\n")?;
    // It keeps its virtual functions until it is told to go on.
    vm.wait_for(ASKED, begun)?;
    let pages = hand.ask(&["pf0-vf1", "records", "read", "0x0+256M"])?;
    ensure!(!pages["pages"].as_array().context("pages")?.is_empty());
    hand.ask(&["pf0-vf1", "records", "stop"])?;
    vm.send(b"the end\n")?;
    vm.wait_for_end(crate::vm::PATIENCE)?.expect_ok()
}

/// While the guest uses both virtual functions with the stock driver, the first is frozen, and its context read and written
/// back, [`MOVES`] times; the first time before it has anything to do.
fn in_use(pf: &str, used: &str) -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("api.sock");
    let file = directory.path().join("vf1.ctx");
    let file = file.to_str().context("a path")?;
    let scenario = format!("sriov-enable:n=2,console-echo,{used},console-echo,dmesg-clean");
    let mut vm = Vm::new(scenario)
        .args(["--cpus", "2", "--pf", pf])
        .args(["--api-socket".as_ref(), socket.as_os_str()])
        .spawn()?;
    let begun = vm.wait_for(ASKED, 0)?;
    let hand = Hand { socket: &socket };
    for round in 0..MOVES {
        let mut once = || {
            hand.ask(&["pf0-vf1", "mode", "freeze"])?;
            if round == 0 {
                vm.send(b"go on\n")?;
            }
            hand.ask(&["pf0-vf1", "context", "read", file])?;
            hand.ask(&["pf0-vf1", "context", "write", file])?;
            hand.ask(&["pf0-vf1", "mode", "active"])
        };
        // A guest that ended in between says why.
        once().with_context(|| format!("in round {round}\n{}", vm.console()))?;
    }
    vm.wait_for(ASKED, begun)?;
    vm.send(b"the end\n")?;
    vm.wait_for_end(crate::vm::PATIENCE)?.expect_ok()
}

struct Hand<'a> {
    socket: &'a Path,
}

impl Hand<'_> {
    fn run(&self, verb: &str, words: &[&str]) -> Result<Output> {
        let socket = self.socket.to_owned();
        Control { socket }.run(verb, words)
    }

    /// `tern admin WORDS…`, which is to be done.
    fn ask(&self, words: &[&str]) -> Result<Value> {
        let output = self.run("admin", words)?;
        ensure!(output.status.success(), "{words:?}: {output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The same, which is to be refused with an error that says `part`.
    fn refuse(&self, words: &[&str], part: &str) -> Result<()> {
        let output = self.run("admin", words)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.code() == Some(1) && said.contains(part),
            "{words:?}: {output:?}"
        );
        Ok(())
    }
}
