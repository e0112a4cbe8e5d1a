//! The command: started with pipes or a terminal, fed, and waited for.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use machine::protocol::{Frame, Start, WindowSize, read_frame};
use rustix::process::{Pid, Signal, WaitOptions};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::streams::{Input, Port, pump_output};
use crate::{Context, Result};

/// How long output is waited for once the command has ended: what it left in the background may hold a stream open.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Runs the command to its end and returns its exit status, 128 + n for signal n.
pub fn run(start: Start, port: &Arc<Port>, reader: File) -> Result<i32> {
    let terminal = start.terminal.map(Terminal::open).transpose()?;
    let mut command = command(&start)?;
    for (stream, on_terminal) in start.on_terminal.into_iter().enumerate() {
        let stdio = match &terminal {
            Some(terminal) if on_terminal => Stdio::from(terminal.command_side()?),
            _ => Stdio::piped(),
        };
        match stream {
            0 => command.stdin(stdio),
            1 => command.stdout(stdio),
            _ => command.stderr(stdio),
        };
    }
    if start.on_terminal[0] {
        new_session(&mut command);
    } else {
        // Not a session, whose leader would be given the next terminal it opens, and a SIGHUP with its end.
        command.process_group(0);
    }
    let mut child = command
        .spawn()
        .context(|| format!("cannot run {}", start.argv[0].to_string_lossy()))?;
    // The command's ends of the terminal are in `command`: without this the terminal would never be closed.
    drop(command);
    let leader = Pid::from_child(&child);

    let mut outputs = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push(pump_output(
            port,
            File::from(OwnedFd::from(stdout)),
            Frame::Stdout,
        ));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push(pump_output(
            port,
            File::from(OwnedFd::from(stderr)),
            Frame::Stderr,
        ));
    }
    let (input, resize) = attach(port, &mut child, terminal, &mut outputs)?;
    thread::spawn(move || obey(reader, input, leader, resize.as_ref()));

    let status = wait_for(leader)?;
    let deadline = Instant::now() + LAST_WORDS;
    while outputs.iter().any(|pump| !pump.is_finished()) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    Ok(status)
}

fn command(start: &Start) -> Result<Command> {
    let (program, arguments) = start.argv.split_first().ok_or("there is no command")?;
    std::env::set_current_dir(&start.cwd)
        .context(|| format!("cannot enter {}", start.cwd.display()))?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(start.env.iter().cloned());
    Ok(command)
}

/// Connects standard input, and output that is a terminal.
fn attach(
    port: &Arc<Port>,
    child: &mut Child,
    terminal: Option<Terminal>,
    outputs: &mut Vec<thread::JoinHandle<()>>,
) -> Result<(Option<Input>, Option<OwnedFd>)> {
    let Some(terminal) = terminal else {
        let input = child
            .stdin
            .take()
            .map(|stdin| Input::new(port, File::from(OwnedFd::from(stdin))));
        return Ok((input, None));
    };
    let copy = || {
        terminal
            .ours
            .try_clone()
            .context(|| "sharing the terminal".into())
    };
    outputs.push(pump_output(port, File::from(copy()?), Frame::Stdout));
    let input = Input::new(port, File::from(copy()?));
    Ok((Some(input), Some(copy()?)))
}

/// Acts on frames until the host is gone.
fn obey(mut reader: File, input: Option<Input>, leader: Pid, terminal: Option<&OwnedFd>) {
    let mut input = input;
    while let Ok(frame) = read_frame(&mut reader) {
        match frame {
            Frame::Stdin(bytes) => {
                if let Some(input) = &input {
                    input.put(bytes);
                }
            }
            // The pipe is closed when the writer has emptied its queue.
            Frame::StdinEnd => drop(input.take()),
            Frame::Resize(size) => {
                if let Some(terminal) = terminal {
                    // The kernel tells the command itself.
                    let _ = tcsetwinsize(terminal, winsize(size));
                }
            }
            Frame::Signal(number) => {
                if let Some(signal) = Signal::from_named_raw(number) {
                    // The command leads a group of its own; it may have just ended.
                    let _ = rustix::process::kill_process_group(leader, signal);
                }
            }
            _ => {}
        }
    }
}

/// Waits for the command, and for every orphan that ends meanwhile, as PID 1 has to.
fn wait_for(leader: Pid) -> Result<i32> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == leader => {
                return Ok(match (status.exit_status(), status.terminating_signal()) {
                    (Some(status), _) => status,
                    (None, Some(signal)) => 128 + signal,
                    (None, None) => continue,
                });
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("waiting for the command: {error}")),
        }
    }
}

/// Makes the command the leader of a session with its standard input as controlling terminal.
#[allow(unsafe_code)]
fn new_session(command: &mut Command) {
    let hook = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec the hook makes two system calls; it neither allocates nor locks.
    unsafe { command.pre_exec(hook) };
}

/// A pseudo-terminal, by the side that is ours.
struct Terminal {
    ours: OwnedFd,
}

impl Terminal {
    fn open(size: WindowSize) -> Result<Self> {
        let doing = || "opening a terminal".to_owned();
        let ours =
            rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
                .context(doing)?;
        rustix::pty::grantpt(&ours).context(doing)?;
        rustix::pty::unlockpt(&ours).context(doing)?;
        tcsetwinsize(&ours, winsize(size)).context(doing)?;
        Ok(Self { ours })
    }

    fn command_side(&self) -> Result<OwnedFd> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        rustix::pty::ioctl_tiocgptpeer(self.ours.as_fd(), flags)
            .context(|| "opening a terminal".into())
    }
}

fn winsize(size: WindowSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
