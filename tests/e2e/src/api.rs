//! The control API, driven by `curl` and by `tern` itself.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;
use tempfile::TempDir;

use crate::trial;
use crate::vm::{Running, Vm, tern};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("api::info_pause_resume_and_shutdown_through_tern", by_tern),
        trial("api::curl_speaks_it", by_curl),
        trial("api::the_socket_is_private_and_unique", socket),
        trial("api::a_stale_socket_is_taken_over", stale),
        trial(
            "api::sigterm_ends_the_monitor_and_removes_the_socket",
            sigterm,
        ),
    ]
}

struct Guest {
    vm: Running,
    socket: PathBuf,
    _dir: TempDir,
}

fn guest() -> Result<Guest> {
    let dir = tempfile::tempdir()?;
    let socket = dir.path().join("api.sock");
    let mut vm = Vm::new("hang")
        .args(["--api-socket".as_ref(), socket.as_os_str()])
        .spawn()?;
    vm.wait_for("tern-guest: tick", 0)?;
    Ok(Guest {
        vm,
        socket,
        _dir: dir,
    })
}

fn client(verb: &str, socket: &Path) -> Result<Output> {
    Command::new(tern()?)
        .args([verb, "--json", "--api-socket"])
        .arg(socket)
        .output()
        .context("cannot run tern")
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
    // Whatever was on its way to the console arrives; after that the guest is silent.
    std::thread::sleep(Duration::from_millis(500));
    let silent = vm.console().len();
    std::thread::sleep(Duration::from_secs(4));
    ensure!(vm.console().len() == silent, "a paused guest printed");
    succeeds("pause", &socket)?;
    succeeds("resume", &socket)?;
    ticks(&mut vm)?;
    succeeds("shutdown", &socket)?;
    vm.wait()?.expect_code(0)?;
    ensure!(!socket.exists(), "the socket outlived its owner");
    Ok(())
}

fn curl(socket: &Path, method: &str, path: &str) -> Result<(u16, Value)> {
    let output = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--write-out",
            "\n%{http_code}",
            "--request",
            method,
        ])
        .arg("--unix-socket")
        .arg(socket)
        .arg(format!("http://localhost{path}"))
        .output()
        .context("cannot run curl")?;
    let text = String::from_utf8(output.stdout)?;
    let (body, code) = text.rsplit_once('\n').context("no status from curl")?;
    let body = match body.trim() {
        "" => Value::Null,
        json => serde_json::from_str(json).with_context(|| json.to_owned())?,
    };
    Ok((code.parse()?, body))
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
