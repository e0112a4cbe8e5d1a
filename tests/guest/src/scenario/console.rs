//! `console-echo`, `hvc-echo`, `shell`: the consoles, as somebody who types sees them.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, WaitOptions};
use rustix::termios::{Winsize, tcsetwinsize};

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Failure, Result, check, say, sys};

/// How long a device may take to appear.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reads a line from the console and tells what it was.
pub fn echo(_: &Request) -> Result<Found> {
    let line = ask()?;
    say(format_args!("console line={line}"));
    Ok(Found::default().with("bytes", line.len()))
}

/// Asks for a line on the console, and waits for it.
pub fn ask() -> Result<String> {
    say("type a line on the console");
    line_from(&mut BufReader::new(
        File::open("/dev/console").context("/dev/console")?,
    ))
}

/// Something that says whether a line has been typed on the console since.
pub fn watch() -> Result<impl Fn() -> bool> {
    let mut console = BufReader::new(File::open("/dev/console").context("/dev/console")?);
    let thread = thread::spawn(move || line_from(&mut console));
    Ok(move || thread.is_finished())
}

/// Something that says whether this line has been typed on the console since.
pub fn watch_for(line: &'static str) -> Result<impl Fn() -> bool> {
    let mut console = BufReader::new(File::open("/dev/console").context("/dev/console")?);
    let thread =
        thread::spawn(move || while line_from(&mut console).is_ok_and(|typed| typed != line) {});
    Ok(move || thread.is_finished())
}

/// The same as [`echo`] on a virtio console, with all the talk there too.
pub fn hvc_echo(request: &Request) -> Result<Found> {
    let device = Path::new("/dev").join(request.text("dev", "hvc0"));
    let shown = device.display().to_string();
    wait_for(&device)?;
    let mut out = File::options().write(true).open(&device).context(&shown)?;
    let mut input = BufReader::new(File::open(&device).context(&shown)?);
    writeln!(out, "tern-guest: type a line on {shown}").context(&shown)?;
    let line = line_from(&mut input)?;
    writeln!(out, "tern-guest: hvc line={line}").context(&shown)?;
    // What is still in the ring would be lost with the power.
    rustix::termios::tcdrain(&out).context(&shown)?;
    Ok(Found::default().with("bytes", line.len()))
}

fn line_from(input: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    input.read_line(&mut line).context("reading a line")?;
    check(!line.is_empty(), || "the console was closed".into())?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn wait_for(device: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !device.exists() {
        check(Instant::now() < deadline, || {
            format!("there is no {}", device.display())
        })?;
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A shell on the console, with job control. Its end is the end of the scenario.
pub fn shell(_: &Request) -> Result<Found> {
    let terminal = terminal();
    let open = || {
        let opened = File::options().read(true).write(true).open(&terminal);
        opened.context(terminal.display()).map(Stdio::from)
    };
    // A serial line does not know how large the screen behind it is.
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(File::open(&terminal).context(terminal.display())?, size)
        .context("window size")?;
    let mut command = Command::new("/bin/sh");
    // Its first argument with a dash in front would make it read profiles; there are none.
    command
        .args(["-i"])
        .env_clear()
        .envs([
            ("PATH", "/bin"),
            ("HOME", "/root"),
            ("TERM", "linux"),
            ("PS1", "tern-guest:\\w# "),
        ])
        .current_dir("/root")
        .stdin(open()?)
        .stdout(open()?)
        .stderr(open()?);
    sys::own_terminal(&mut command);
    let child = command.spawn().context("/bin/sh")?;
    let shell = Pid::from_child(&child);
    // Orphans come to init, and would stay as zombies.
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == shell => {
                return Ok(Found::default().with("status", status.exit_status().unwrap_or(-1)));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure(format!("waiting for the shell: {error}"))),
        }
    }
}

/// The device behind `/dev/console`, which itself cannot be a controlling terminal.
fn terminal() -> PathBuf {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    Path::new("/dev").join(active.split_whitespace().last().unwrap_or("console"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_lose_their_end_only() {
        assert_eq!(line_from(&mut &b" a b \r\nrest"[..]).unwrap(), " a b ");
        assert_eq!(line_from(&mut &b"\n"[..]).unwrap(), "");
        assert!(line_from(&mut &b""[..]).is_err());
    }
}
