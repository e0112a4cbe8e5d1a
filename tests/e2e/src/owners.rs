//! Owners and members through the control API, while the guest's own driver uses them.

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::block::MIB;
use crate::control::Control;
use crate::trial;
use crate::vm::{Running, Vm};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("owners::info_follows_the_guest", info),
        trial("owners::commands_have_a_session_of_their_own", commands),
        trial(
            "owners::the_monitor_drives_an_owner_it_keeps",
            passed_through,
        ),
        trial("owners::traffic_of_vfs_goes_on_after_a_pause", pause),
    ]
}

/// A running guest with a control socket.
struct Guest {
    vm: Running,
    socket: PathBuf,
    _directory: TempDir,
}

impl Guest {
    fn start(vm: Vm) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("api.sock");
        let vm = vm
            .args(["--api-socket".as_ref(), socket.as_os_str()])
            .spawn()?;
        Ok(Self {
            vm,
            socket,
            _directory: directory,
        })
    }

    /// `tern VERB --json --api-socket … WORDS…`
    fn tern(&self, verb: &str, words: &[&str]) -> Result<Output> {
        let socket = self.socket.clone();
        Control { socket }.run(verb, words)
    }

    /// The same, expecting success.
    fn ask(&self, verb: &str, words: &[&str]) -> Result<Value> {
        let output = self.tern(verb, words)?;
        ensure!(output.status.success(), "tern {verb} {words:?}: {output:?}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

fn info() -> Result<()> {
    // The guest goes on when it is told to.
    let vm = Vm::new("sriov-enable:n=3,console-echo,sriov-disable,hang").args([
        "--cpus",
        "2",
        "--pf",
        "net,vfs=4",
    ]);
    let mut guest = Guest::start(vm)?;
    guest.vm.wait_for("tern-guest: type a line", 0)?;
    let answer = guest.ask("info", &[])?;
    let owner = &answer["owners"][0];
    ensure!(
        owner["name"] == "pf0" && owner["device"] == "net",
        "{owner}"
    );
    ensure!(owner["total_members"] == 4 && owner["existing_members"] == 3);
    let members = owner["members"].as_array().context("members")?;
    ensure!(
        members.len() == 3 && owner["function"]["live"] == true,
        "{owner}"
    );
    for (number, member) in (1..).zip(members) {
        let place = format!("01:00.{number}");
        ensure!(member["id"] == number && member["live"] == true, "{member}");
        let at = member["place"].as_str().unwrap_or_default();
        ensure!(at.ends_with(&place), "{at} instead of {place}");
    }
    guest.vm.send(b"go on\n")?;
    guest.vm.wait_for("tern-guest: ok sriov-disable", 0)?;
    let answer = guest.ask("info", &[])?;
    ensure!(answer["owners"][0]["existing_members"] == 0, "{answer}");
    Ok(())
}

fn commands() -> Result<()> {
    let vm = Vm::new("sriov-enable:n=2,hang").args(["--cpus", "2", "--pf", "net,vfs=4"]);
    let mut guest = Guest::start(vm)?;
    guest.vm.wait_for("tern-guest: tick", 0)?;
    for group in ["self", "sriov"] {
        let answer = guest.ask("admin", &["pf0", "list-query", "--group", group])?;
        ensure!(answer["status"] == 0, "{answer}");
    }
    let raw = |opcode, group, data| {
        guest.tern(
            "admin",
            &[
                "pf0", "raw", "--opcode", opcode, "--group", group, "--data", data,
            ],
        )
    };
    // The monitor gives LIST_QUERY up, for itself.
    ensure!(raw("1", "0", "0200000000000000")?.status.success());
    let refused = raw("0", "0", "")?;
    ensure!(!refused.status.success(), "{refused:?}");
    let answer: Value = serde_json::from_slice(&refused.stdout)?;
    ensure!(
        answer["status"] == 22 && answer["qualifier"] == 2,
        "{answer}"
    );
    let no_group: Value = serde_json::from_slice(&raw("0", "0x77", "")?.stdout)?;
    ensure!(no_group["qualifier"] == 4, "{no_group}");
    let nobody = guest.tern("admin", &["pf7", "list-query"])?;
    let said = String::from_utf8_lossy(&nobody.stderr);
    ensure!(!nobody.status.success() && said.contains("pf0"), "{said}");
    Ok(())
}

/// The guest has the members; the owner answers the monitor.
fn passed_through() -> Result<()> {
    let vm = Vm::new("net-ping:a=eth0:b=eth1:mib=1,hang").args([
        "--cpus",
        "2",
        "--pf",
        "net,vfs=2,passthrough",
    ]);
    let mut guest = Guest::start(vm)?;
    guest.vm.wait_for("tern-guest: tick", 0)?;
    let answer = guest.ask("admin", &["pf0", "list-query", "--group", "sriov"])?;
    ensure!(answer["status"] == 0, "{answer}");
    let answer = guest.ask("info", &[])?;
    let owner = &answer["owners"][0];
    ensure!(
        owner["passthrough"] == true && owner["existing_members"] == 2,
        "{owner}"
    );
    ensure!(owner["function"].is_null(), "{owner}");
    let members = owner["members"].as_array().context("members")?;
    ensure!(
        members.len() == 2 && members.iter().all(|member| member["live"] == true),
        "{owner}"
    );
    let ports = owner["switch"].as_array().context("ports")?;
    let moved = |port: &&Value| {
        ["rx_bytes", "tx_bytes"]
            .iter()
            .all(|count| port["stats"][count].as_u64() >= Some(MIB))
    };
    ensure!(ports.iter().filter(moved).count() == 2, "{owner}");
    Ok(())
}

/// Pauses in the middle of what VFs send each other, which lasts until the guest is told: nothing of it is lost,
/// checksums tell.
fn pause() -> Result<()> {
    const PAUSES: usize = 5;
    let vm = Vm::new("sriov-enable:n=3,sriov-traffic:n=3,dmesg-clean").args([
        "--cpus",
        "2",
        "--pf",
        "net,vfs=3",
    ]);
    let mut guest = Guest::start(vm)?;
    guest.vm.wait_for("tern-guest: traffic ", 0)?;
    for _ in 0..PAUSES {
        guest.ask("pause", &[])?;
        let answer = guest.ask("info", &[])?;
        let stopped = answer["owners"][0]["function"]["stopped_by"].to_string();
        ensure!(stopped.contains("PAUSED"), "{answer}");
        std::thread::sleep(Duration::from_millis(300));
        let from = guest.vm.console().len();
        guest.ask("resume", &[])?;
        // The first may have been under way to the console; the second has been moved after the pause.
        let from = guest.vm.wait_for("tern-guest: traffic ", from)?;
        guest.vm.wait_for("tern-guest: traffic ", from)?;
    }
    guest.vm.send(b"enough\n")?;
    let outcome = guest.vm.wait()?;
    outcome.expect_ok()?;
    ensure!(outcome.number("sriov-traffic", "turns")? > PAUSES as u64);
    Ok(())
}
