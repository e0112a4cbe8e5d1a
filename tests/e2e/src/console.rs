//! Serial and virtio consoles: input, files, terminals.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

use crate::trial;
use crate::vm::{PATIENCE, Vm};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("console::typed_lines_reach_the_guest", echo),
        trial("console::virtio_console_echoes", hvc),
        trial("console::output_goes_to_a_file", file),
        trial(
            "console::the_escape_sequence_quits_and_restores_the_terminal",
            escape,
        ),
    ]
}

fn echo() -> Result<()> {
    let mut vm = Vm::new("console-echo").spawn()?;
    vm.wait_for("tern-guest: type", 0)?;
    vm.send(b"the quick brown fox\n")?;
    let outcome = vm.wait()?;
    outcome.expect_ok()?;
    ensure!(
        outcome.stdout.contains("line=the quick brown fox"),
        "{}",
        outcome.stdout
    );
    Ok(())
}

fn hvc() -> Result<()> {
    let mut vm = Vm::new("hvc-echo")
        .args(["--console", "none", "--virtio-console", "stdio"])
        .spawn()?;
    vm.wait_for("tern-guest: type", 0)?;
    vm.send(b"over virtio\n")?;
    let outcome = vm.wait()?;
    outcome.expect_code(0)?;
    ensure!(
        outcome.stdout.contains("line=over virtio"),
        "{}",
        outcome.stdout
    );
    Ok(())
}

fn file() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("console.log");
    let outcome = Vm::new("boot")
        .args(["--console", &format!("file={}", path.display())])
        .run()?;
    outcome.expect_code(0)?;
    ensure!(outcome.stdout.is_empty(), "{}", outcome.stdout);
    let text = std::fs::read_to_string(&path)?;
    ensure!(text.contains("tern-guest: ok boot"), "{text}");
    Ok(())
}

/// Ctrl-A x, typed into a real terminal.
fn escape() -> Result<()> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let terminal = || -> Result<File> {
        Ok(File::options()
            .read(true)
            .write(true)
            .open(name.to_str().context("pty name")?)?)
    };
    let slave = terminal()?;
    let before = tcgetattr(&slave)?.local_modes;
    ensure!(before.contains(LocalModes::ICANON | LocalModes::ECHO));
    // A session of its own, with the terminal as its controlling one, as a shell in a window has it.
    let tern = Vm::new("hang").command()?;
    let mut child = Command::new("setsid")
        .args(["--ctty", "--wait"])
        .arg(tern.get_program())
        .args(tern.get_args())
        .stdin(Stdio::from(OwnedFd::from(terminal()?)))
        .stdout(Stdio::from(OwnedFd::from(terminal()?)))
        .stderr(Stdio::from(OwnedFd::from(terminal()?)))
        .spawn()?;
    let mut screen = File::from(master);
    let mut seen = String::new();
    let mut buffer = [0; 1024];
    while !seen.contains("tern-guest: tick") {
        let n = screen.read(&mut buffer)?;
        seen.push_str(&String::from_utf8_lossy(
            buffer.get(..n).unwrap_or_default(),
        ));
    }
    ensure!(
        !tcgetattr(&slave)?.local_modes.contains(LocalModes::ICANON),
        "the terminal is not raw while the guest runs"
    );
    screen.write_all(b"\x01x")?;
    let deadline = Instant::now() + PATIENCE;
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        // The other end of a terminal that is closed reads as an error.
        let _ = screen.read_to_end(&mut rest);
    });
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill()?;
                child.wait()?;
                anyhow::bail!("Ctrl-A x did not end tern");
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    ensure!(
        tcgetattr(&slave)?.local_modes == before,
        "the terminal was not restored"
    );
    ensure!(!status.success(), "quitting a guest is not a power-off");
    drop(slave);
    ensure!(reader.join().is_ok());
    Ok(())
}
