//! The control API, driven by `curl` and by `tern` itself.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::control::Control;
use crate::trial;
use crate::vm::{PATIENCE, Running, Vm};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("api::info_pause_resume_and_shutdown_through_tern", by_tern),
        trial(
            "api::a_guest_does_not_mistake_a_pause_for_a_hang",
            long_pause,
        ),
        trial("api::a_stopped_monitor_goes_on_where_it_was", stopped),
        trial("api::curl_speaks_it", by_curl),
        trial("api::the_socket_is_private_and_unique", socket),
        trial("api::a_stale_socket_is_taken_over", stale),
        trial(
            "api::sigterm_ends_the_monitor_and_removes_the_socket",
            sigterm,
        ),
    ]
}

/// A guest whose watchdog is told to bark at processors that do not schedule for this many seconds, twice.
const WATCHDOG: u64 = 5;

struct Guest {
    vm: Running,
    socket: PathBuf,
    _dir: TempDir,
}

fn guest() -> Result<Guest> {
    run(Vm::new("hang"))
}

/// A running guest that ticks.
fn run(vm: Vm) -> Result<Guest> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("api.sock");
    let mut vm = vm
        .args(["--api-socket".as_ref(), socket.as_os_str()])
        .spawn()?;
    vm.wait_for("tern-guest: tick", 0)?;
    Ok(Guest {
        vm,
        socket,
        _dir: dir,
    })
}

fn control(socket: &Path) -> Control {
    Control {
        socket: socket.to_owned(),
    }
}

fn client(verb: &str, socket: &Path) -> Result<Output> {
    control(socket).run(verb, &[])
}

fn succeeds(verb: &str, socket: &Path) -> Result<Value> {
    let output = client(verb, socket)?;
    ensure!(
        output.status.success(),
        "tern {verb}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    if output.stdout.is_empty() {
        return Ok(Value::Null);
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// True if the guest's clock ticks: two further ticks appear.
fn ticks(vm: &mut Running) -> Result<()> {
    let from = vm.console().len();
    let next = vm.wait_for("tern-guest: tick", from)?;
    vm.wait_for("tern-guest: tick", next).map(drop)
}

/// True if the guest, which ticks every second, comes to say nothing for four. What was on its way to the console when
/// it was paused may take its time.
fn falls_silent(vm: &mut Running) -> Result<()> {
    const SILENCE: Duration = Duration::from_secs(4);
    let deadline = Instant::now() + PATIENCE;
    loop {
        let said = vm.console().len();
        std::thread::sleep(SILENCE);
        if vm.console().len() == said {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "a paused guest goes on printing");
    }
}

fn by_tern() -> Result<()> {
    let Guest {
        mut vm,
        socket,
        _dir,
    } = guest()?;
    let info = succeeds("info", &socket)?;
    ensure!(info["state"] == "running", "{info}");
    succeeds("pause", &socket)?;
    ensure!(succeeds("info", &socket)?["state"] == "paused");
    falls_silent(&mut vm)?;
    succeeds("pause", &socket)?;
    succeeds("resume", &socket)?;
    ticks(&mut vm)?;
    succeeds("shutdown", &socket)?;
    vm.wait()?.expect_code(0)?;
    ensure!(!socket.exists(), "the socket outlived its owner");
    Ok(())
}

/// Longer than its watchdog has patience for. KVM tells the guest that it was paused.
fn long_pause() -> Result<()> {
    let scenario = format!("clock:threshold={WATCHDOG},dmesg-clean");
    let Guest {
        mut vm,
        socket,
        _dir,
    } = run(Vm::new(scenario).args(["--cpus", "2"]))?;
    succeeds("pause", &socket)?;
    std::thread::sleep(Duration::from_secs(3 * WATCHDOG));
    succeeds("resume", &socket)?;
    ticks(&mut vm)?;
    vm.send(b"enough\n")?;
    vm.wait()?.expect_ok()
}

/// SIGSTOP cannot be handled, so that nobody tells the guest: it takes up where it was if its watchdog is patient.
fn stopped() -> Result<()> {
    let Guest {
        mut vm,
        socket,
        _dir,
    } = run(Vm::new("clock,dmesg-clean").args(["--cpus", "2"]))?;
    vm.signal(rustix::process::Signal::STOP)?;
    falls_silent(&mut vm)?;
    vm.signal(rustix::process::Signal::CONT)?;
    ticks(&mut vm)?;
    ensure!(succeeds("info", &socket)?["state"] == "running");
    vm.send(b"enough\n")?;
    vm.wait()?.expect_ok()
}

fn curl(socket: &Path, method: &str, path: &str) -> Result<(u16, Value)> {
    control(socket).curl(method, path, None)
}

fn by_curl() -> Result<()> {
    let Guest { vm, socket, _dir } = guest()?;
    let (code, info) = curl(&socket, "GET", "/api/v1/info")?;
    ensure!(code == 200 && info["state"] == "running", "{code} {info}");
    let (code, document) = curl(&socket, "GET", "/openapi.json")?;
    ensure!(
        code == 200 && document["openapi"].is_string(),
        "{code} {document}"
    );
    let (code, error) = curl(&socket, "GET", "/api/v1/nothing-here")?;
    ensure!(code == 404 && error["error"].is_string(), "{code} {error}");
    let (code, _) = curl(&socket, "GET", "/api/v1/pause")?;
    ensure!(code == 405, "GET on an action: {code}");
    for action in ["pause", "resume", "shutdown"] {
        let (code, body) = curl(&socket, "PUT", &format!("/api/v1/{action}"))?;
        ensure!((200..300).contains(&code), "{action}: {code} {body}");
    }
    vm.wait()?.expect_code(0)
}

fn socket() -> Result<()> {
    let Guest { vm, socket, _dir } = guest()?;
    let mode = std::fs::metadata(&socket)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "socket mode {mode:o}");
    let second = Vm::new("boot")
        .args(["--api-socket".as_ref(), socket.as_os_str()])
        .run()?;
    second.expect_code(1)?;
    ensure!(second.stderr.contains("api.sock"), "{}", second.stderr);
    succeeds("info", &socket).context("the first guest lost its socket")?;
    drop(vm);
    Ok(())
}

/// What a killed monitor leaves behind does not stop the next one.
fn stale() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let stale = dir.path().join("stale.sock");
    drop(UnixListener::bind(&stale)?);
    ensure!(stale.exists());
    Vm::new("boot")
        .args(["--api-socket".as_ref(), stale.as_os_str()])
        .run_ok()?;
    ensure!(!stale.exists(), "the socket outlived its owner");
    Ok(())
}

fn sigterm() -> Result<()> {
    let Guest { vm, socket, _dir } = guest()?;
    vm.signal(rustix::process::Signal::TERM)?;
    let outcome = vm.wait()?;
    ensure!(outcome.code() != 0, "{outcome:?}");
    ensure!(!socket.exists(), "the socket outlived its owner");
    Ok(())
}
