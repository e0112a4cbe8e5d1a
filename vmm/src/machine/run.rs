//! The main loop: carries input to the console, and waits for the guest's end or a signal.

use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd;

use super::Machine;
use crate::console::escape::{self, Command, Escape};
use crate::console::terminal::RawMode;
use crate::exit::Outcome;
use crate::signals::{Signal, Signals};

/// Bytes read from standard input at a time.
const CHUNK: usize = 256;
/// How soon input is offered again to a port that took none and will not say when it can: one in loopback mode.
const RETRY: Duration = Duration::from_millis(20);

/// Where standard input goes.
#[derive(Debug)]
pub enum Sink {
    /// To the serial port.
    Serial,
    /// Into a non-blocking pipe, from which a virtio console reads.
    Pipe(OwnedFd),
}

/// Input on its way from standard input to a console.
struct Input {
    sink: Option<Sink>,
    /// Read and not yet taken by the pipe. What is for the serial port is the machine's.
    pending: Vec<u8>,
    /// The serial port has not taken all it was offered.
    waits: bool,
    /// Standard input can be read on.
    open: bool,
    /// On a terminal: finds the escape sequences.
    escape: Option<Escape>,
}

/// Runs the machine until it ends, and says how.
///
/// Standard input goes to `sink`; if it is a terminal it is put into raw mode until the return. Without a sink it is
/// left alone. `start` starts the machine, or says why there is nothing to run.
pub fn run(
    machine: &Machine,
    signals: &mut Signals,
    sink: Option<Sink>,
    start: impl FnOnce(&Machine, &mut Signals) -> anyhow::Result<()>,
) -> anyhow::Result<Outcome> {
    let raw = match sink {
        Some(_) => RawMode::enter()?,
        None => None,
    };
    let terminal = raw.is_some();
    if terminal {
        notice("tern: Ctrl-A x ends the guest, Ctrl-A h shows help\n");
    }
    let mut input = Input {
        pending: Vec::new(),
        waits: false,
        open: sink.is_some(),
        sink,
        escape: terminal.then(Escape::default),
    };
    start(machine, signals)?;
    loop {
        let ready = wait(machine, signals, &input)?;
        if ready.ended {
            break;
        }
        while let Some(signal) = signals.take() {
            match signal {
                Signal::End(number) => machine.finish(Outcome::Signal(number)),
                // A shell may have changed the mode of the terminal in between.
                Signal::Continued => {
                    if let Some(raw) = &raw {
                        raw.reenter()?;
                    }
                }
            }
        }
        if ready.revived {
            machine.register_doorbells();
        }
        if ready.stdin && !machine.migration.is_leaving_still() {
            input.read(machine);
        }
        if ready.hungry {
            let _ = machine.serial.hungry().read();
        }
        input.offer(machine);
    }
    drop(raw);
    Ok(machine
        .outcome()
        .unwrap_or(Outcome::Stopped("the end of the process")))
}

/// Which of the things waited for happened.
#[derive(Default)]
struct Ready {
    ended: bool,
    hungry: bool,
    revived: bool,
    stdin: bool,
}

fn wait(machine: &Machine, signals: &Signals, input: &Input) -> io::Result<Ready> {
    let stdin = io::stdin();
    let mut fds = vec![
        PollFd::from_borrowed_fd(borrow(machine.control.ended()), PollFlags::IN),
        PollFd::from_borrowed_fd(borrow(machine.serial.hungry()), PollFlags::IN),
        PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(borrow(machine.functions.revived()), PollFlags::IN),
    ];
    // What is typed while the guest is given away is for whoever has the terminal then.
    let given_away = machine.migration.is_leaving_still();
    if input.wants_more() && !given_away {
        fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
    }
    let retry = Timespec {
        tv_sec: 0,
        tv_nsec: RETRY.subsec_nanos().into(),
    };
    let again = input.waits || !input.pending.is_empty() || given_away;
    let timeout = again.then_some(&retry);
    match poll(&mut fds, timeout) {
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(Ready::default()),
        Err(e) => return Err(e.into()),
    }
    let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok(Ready {
        ended: ready(0),
        hungry: ready(1),
        revived: ready(3),
        stdin: ready(4),
    })
}

#[allow(unsafe_code)]
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `event` lives, which the lifetime of the result says.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

impl Input {
    /// More is read only when everything before it was taken: a guest that does not read holds the sender back.
    fn wants_more(&self) -> bool {
        self.open && !self.waits && self.pending.is_empty()
    }

    fn read(&mut self, machine: &Machine) {
        let mut chunk = [0; CHUNK];
        let count = match rustix::io::read(rustix::stdio::stdin(), &mut chunk) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return,
            // The terminal went away, or another process group has it now.
            Err(_) => 0,
        };
        if count == 0 {
            self.open = false;
            if let Some(Sink::Pipe(_)) = self.sink {
                self.sink = None;
            }
            return;
        }
        let typed = chunk.get(..count).unwrap_or_default();
        let Some(escape) = &mut self.escape else {
            self.pending.extend_from_slice(typed);
            return;
        };
        for command in escape.feed(typed, &mut self.pending) {
            match command {
                Command::Quit => machine.finish(Outcome::Stopped("Ctrl-A x on the console")),
                Command::Help => notice(escape::HELP),
            }
        }
    }

    fn offer(&mut self, machine: &Machine) {
        if let Some(Sink::Serial) = self.sink {
            machine.type_in(&std::mem::take(&mut self.pending));
            self.waits = machine.offer_input();
            return;
        }
        if self.pending.is_empty() {
            return;
        }
        let taken = match &self.sink {
            Some(Sink::Pipe(pipe)) => match rustix::io::write(pipe, &self.pending) {
                Ok(taken) => taken,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => 0,
                // Nobody reads any more.
                Err(_) => self.pending.len(),
            },
            Some(Sink::Serial) | None => self.pending.len(),
        };
        self.pending.drain(..taken.min(self.pending.len()));
    }
}

/// For the person at the terminal. That it cannot be shown is no reason to end a guest.
fn notice(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}
