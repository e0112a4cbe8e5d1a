//! One command, run in the emulated host as if it ran here.
//!
//! Threads: one reads frames and writes the standard streams of this process, one reads standard input, one waits for
//! signals, one keeps the end of the machine's console. The caller's thread owns QEMU and decides; a stream that
//! blocks can therefore never keep a signal or the time limit from taking effect.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGHUP, SIGINT, SIGPIPE, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::protocol::{CHUNK, Frame, STDIN_WINDOW, Start, WindowSize, read_frame, write_frame};
use crate::qemu::EmulatedHost;
use crate::tty::{EscapeWatch, RawMode, window_size};

/// How long a command may take to end after a signal was passed to it, before the machine is switched off.
const GRACE: Duration = Duration::from_secs(3);
/// How often the machine gets an interrupt from outside. QEMU sets and clears requests of interrupts from two threads without
/// a lock where SVM is emulated, and so loses one now and then: that of the one-shot timer stays pending in the local APIC, and
/// a CPU that spins in a guest never leaves it. Any other interrupt has the APIC raise both.
const NUDGE: Duration = Duration::from_millis(500);
/// How long a machine may say nothing, not even that it is there, before it is called dead.
const SILENCE: Duration = Duration::from_secs(120);
/// How much of the machine's console is kept to explain a failure.
const CONSOLE_KEPT: usize = 16 * 1024;

/// How a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The command ended with this status (128 + n for signal n).
    Exited(i32),
    /// A signal to this process, or the escape typed at the terminal, ended the session.
    Interrupted(i32),
    /// The time limit ended the session; the last the machine wrote to its console.
    TimedOut(ConsoleTail),
}

/// Why a session could not be held.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// QEMU could not be started.
    #[error("cannot start {program}")]
    Spawn {
        /// What was to be started.
        program: String,
        /// Why not.
        source: io::Error,
    },
    /// The command could not be run; the text comes from the machine.
    #[error("{0}")]
    Command(String),
    /// The machine went away or talked nonsense.
    #[error("the emulated host is gone: {reason}{console}")]
    Lost {
        /// How that was noticed.
        reason: String,
        /// The last it wrote to its console.
        console: ConsoleTail,
    },
    /// Signals or the terminal could not be set up.
    #[error("cannot set up the session")]
    Setup(#[source] io::Error),
}

/// The end of the machine's console, printed below an error.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConsoleTail(String);

impl fmt::Display for ConsoleTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.0.lines().filter(|line| !line.trim().is_empty()) {
            write!(f, "\n  | {}", line.trim_end())?;
        }
        Ok(())
    }
}

/// What a session is asked to do.
#[derive(Debug, Clone)]
pub struct Request {
    /// The command. Its terminal fields and shares are filled in by [`run`].
    pub start: Start,
    /// From the start of QEMU to the end of the command.
    pub time_limit: Option<Duration>,
    /// Copy the machine's console to standard error.
    pub show_console: bool,
}

enum Event {
    Ready,
    Exit(i32),
    Failed(String),
    Lost(String),
    Signal(i32),
    Escape,
}

/// Starts `host`, runs the command with this process's standard streams, and switches the host off.
///
/// # Errors
/// If there was no session: see [`Error`]. A command that ran and failed is an [`Outcome`].
pub fn run(host: &EmulatedHost, request: &Request) -> Result<Outcome, Error> {
    let deadline = request.time_limit.map(|limit| Instant::now() + limit);
    let (events, inbox) = mpsc::channel();
    // Before QEMU starts, so that no signal can end this process and leave it to the kernel to clean up.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGWINCH]).map_err(Error::Setup)?;
    let signal_events = events.clone();
    let signal_handle = signals.handle();
    thread::spawn(move || {
        signals
            .forever()
            .all(|signal| signal_events.send(Event::Signal(signal)).is_ok())
    });

    let mut qemu = host.start().map_err(|source| Error::Spawn {
        program: host.qemu.display().to_string(),
        source,
    })?;
    let console = Arc::new(Mutex::new(VecDeque::new()));
    let Some((control, serial)) = qemu.take_sockets() else {
        return Err(Error::Setup(io::ErrorKind::NotConnected.into()));
    };
    keep_tail(serial, &console, request.show_console);
    if let Some(stderr) = qemu.take_stderr() {
        keep_tail(stderr, &console, request.show_console);
    }
    let credit = Arc::new(Credit::default());
    let reader = control.try_clone().map_err(Error::Setup)?;
    let reader_credit = Arc::clone(&credit);
    let reader_events = events.clone();
    let heard = Arc::new(Mutex::new(Heard::At(Instant::now())));
    let reader_heard = Arc::clone(&heard);
    thread::spawn(move || read_frames(reader, &reader_credit, &reader_heard, &reader_events));

    let interactive = io::stdin().is_terminal();
    let mut start = request.start.clone();
    start.shares.clone_from(&host.shares);
    start.terminal = interactive.then(|| {
        window_size(io::stdin()).unwrap_or(WindowSize {
            rows: 24,
            columns: 80,
        })
    });
    start.on_terminal = [
        interactive,
        interactive && io::stdout().is_terminal(),
        interactive && io::stderr().is_terminal(),
    ];
    let session = Session {
        writer: Arc::new(Mutex::new(control)),
        events,
        credit,
        heard,
        interactive,
    };
    let ended = session.conduct(start, &inbox, deadline);
    signal_handle.close();
    let own_end = qemu.ended();
    // The machine has written back what it shares; nothing in it is worth an orderly shutdown.
    drop(qemu);
    match ended {
        Ok(Outcome::TimedOut(_)) => Ok(Outcome::TimedOut(tail(&console))),
        Err(Error::Lost { reason, .. }) => Err(Error::Lost {
            reason: match own_end {
                Some(status) if !status.success() => format!("{reason} (QEMU: {status})"),
                _ => reason,
            },
            console: tail(&console),
        }),
        ended => ended,
    }
}

struct Session {
    writer: Arc<Mutex<UnixStream>>,
    events: Sender<Event>,
    credit: Arc<Credit>,
    heard: Arc<Mutex<Heard>>,
    interactive: bool,
}

impl Session {
    /// From the first frame to the last.
    fn conduct(
        &self,
        start: Start,
        inbox: &Receiver<Event>,
        deadline: Option<Instant>,
    ) -> Result<Outcome, Error> {
        let mut start = Some(start);
        let mut raw_mode = None;
        let mut interrupted: Option<(i32, Instant)> = None;
        let mut nudge = None;
        loop {
            let silent = lock(&self.heard).until();
            let until = [deadline, interrupted.map(|(_, until)| until), silent, nudge]
                .into_iter()
                .flatten()
                .min();
            match receive(inbox, until) {
                Some(Event::Ready) => {
                    let Some(start) = start.take() else { continue };
                    self.send(&Frame::Start(Box::new(start)))?;
                    nudge = Some(Instant::now() + NUDGE);
                    if self.interactive {
                        raw_mode = Some(RawMode::enter().map_err(Error::Setup)?);
                    }
                    self.forward_stdin();
                }
                Some(Event::Exit(status)) => {
                    drop(raw_mode);
                    return Ok(interrupted.map_or(Outcome::Exited(status), |(signal, _)| {
                        Outcome::Interrupted(signal)
                    }));
                }
                Some(Event::Failed(why)) => return Err(Error::Command(why)),
                Some(Event::Lost(reason)) => {
                    return Err(Error::Lost {
                        reason,
                        console: ConsoleTail::default(),
                    });
                }
                Some(Event::Signal(SIGWINCH)) => {
                    if let Some(size) = window_size(io::stdin()) {
                        self.send(&Frame::Resize(size))?;
                    }
                }
                Some(Event::Escape) => return Ok(Outcome::Interrupted(SIGINT)),
                Some(Event::Signal(SIGPIPE)) if interrupted.is_some() => {}
                Some(Event::Signal(signal)) => {
                    // The first one is for the command; it need not wait for a machine that is still starting.
                    if interrupted.is_some() || start.is_some() {
                        return Ok(Outcome::Interrupted(signal));
                    }
                    self.send(&Frame::Signal(signal))?;
                    interrupted = Some((signal, Instant::now() + GRACE));
                }
                None => {
                    let now = Instant::now();
                    match interrupted {
                        Some((signal, until)) if until <= now => {
                            return Ok(Outcome::Interrupted(signal));
                        }
                        _ if deadline.is_some_and(|deadline| deadline <= now) => {
                            return Ok(Outcome::TimedOut(ConsoleTail::default()));
                        }
                        // It may have been heard of since.
                        _ if lock(&self.heard).until().is_some_and(|until| until <= now) => {
                            return Err(Error::Lost {
                                reason: format!("it has said nothing for {} s", SILENCE.as_secs()),
                                console: ConsoleTail::default(),
                            });
                        }
                        _ => {}
                    }
                    if nudge.is_some_and(|at| at <= now) {
                        self.send(&Frame::Nudge)?;
                        nudge = Some(now + NUDGE);
                    }
                }
            }
        }
    }

    fn send(&self, frame: &Frame) -> Result<(), Error> {
        let sent = write_frame(&mut *lock(&self.writer), frame);
        sent.map_err(|e| Error::Lost {
            reason: e.to_string(),
            console: ConsoleTail::default(),
        })
    }

    fn forward_stdin(&self) {
        let writer = Arc::clone(&self.writer);
        let credit = Arc::clone(&self.credit);
        let events = self.events.clone();
        let interactive = self.interactive;
        thread::spawn(move || {
            let mut escape = EscapeWatch::default();
            let mut buffer = vec![0; CHUNK];
            loop {
                let frame = match io::stdin().read(&mut buffer) {
                    Ok(0) => Frame::StdinEnd,
                    Ok(n) => Frame::Stdin(buffer[..n].to_vec()),
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => Frame::StdinEnd,
                };
                if let Frame::Stdin(bytes) = &frame {
                    if interactive && escape.feed(bytes) {
                        let _ = events.send(Event::Escape);
                        return;
                    }
                    credit.take(bytes.len());
                }
                // An error here is the end of the machine, which the reading thread reports.
                if write_frame(&mut *lock(&writer), &frame).is_err() || frame == Frame::StdinEnd {
                    return;
                }
            }
        });
    }
}

/// The next event, or nothing once `until` has passed.
fn receive(inbox: &Receiver<Event>, until: Option<Instant>) -> Option<Event> {
    let gone = || Event::Lost("all of its threads have ended".into());
    match until {
        None => Some(inbox.recv().unwrap_or_else(|_| gone())),
        Some(until) => match inbox.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(gone()),
        },
    }
}

/// When the machine was last heard of.
enum Heard {
    At(Instant),
    /// Now: what it said is being written.
    Now,
}

impl Heard {
    /// When its silence is too long.
    fn until(&self) -> Option<Instant> {
        match self {
            Self::At(at) => Some(*at + SILENCE),
            Self::Now => None,
        }
    }
}

/// Reads frames until the last one, writing output where it belongs.
fn read_frames(
    mut reader: UnixStream,
    credit: &Credit,
    heard: &Mutex<Heard>,
    events: &Sender<Event>,
) {
    loop {
        *lock(heard) = Heard::At(Instant::now());
        let frame = read_frame(&mut reader);
        *lock(heard) = Heard::Now;
        let event = match frame {
            Ok(Frame::Stdout(bytes)) => {
                if let Err(e) = put(&mut io::stdout().lock(), &bytes)
                    && e.kind() == io::ErrorKind::BrokenPipe
                {
                    // Nobody reads on (`… | head`): the command is to end as it would in a pipe of its own.
                    let _ = events.send(Event::Signal(SIGPIPE));
                }
                continue;
            }
            Ok(Frame::Stderr(bytes)) => {
                // There is nowhere left to complain to.
                let _ = put(&mut io::stderr().lock(), &bytes);
                continue;
            }
            Ok(Frame::Credit(bytes)) => {
                credit.give(bytes as usize);
                continue;
            }
            Ok(Frame::Alive) => continue,
            Ok(Frame::Ready) => Event::Ready,
            Ok(Frame::Exit(status)) => Event::Exit(status),
            Ok(Frame::Failed(why)) => Event::Failed(why),
            Ok(other) => Event::Lost(format!("it sent {other:?}")),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Event::Lost("it switched itself off".into())
            }
            Err(e) => Event::Lost(e.to_string()),
        };
        let last = !matches!(event, Event::Ready);
        if events.send(event).is_err() || last {
            return;
        }
    }
}

fn put(stream: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    stream.flush()
}

/// Keeps the end of what `source` writes, for [`tail`].
fn keep_tail(mut source: impl Read + Send + 'static, kept: &Arc<Mutex<VecDeque<u8>>>, show: bool) {
    let kept = Arc::clone(kept);
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = source.read(&mut buffer) {
            if show {
                let _ = put(&mut io::stderr().lock(), &buffer[..n]);
            }
            let mut kept = lock(&kept);
            kept.extend(&buffer[..n]);
            let excess = kept.len().saturating_sub(CONSOLE_KEPT);
            kept.drain(..excess);
        }
    });
}

fn tail(kept: &Mutex<VecDeque<u8>>) -> ConsoleTail {
    // The thread that keeps it may be about to read the last words.
    thread::sleep(Duration::from_millis(50));
    let bytes: Vec<u8> = lock(kept).iter().copied().collect();
    ConsoleTail(telling_part(&String::from_utf8_lossy(&bytes)))
}

/// Where the kernel began to complain, or else the end.
fn telling_part(text: &str) -> String {
    const LINES: usize = 25;
    const COMPLAINTS: [&str; 4] = ["BUG:", "Oops", "Kernel panic", "machine-init:"];
    let lines: Vec<&str> = text.lines().collect();
    let complains = |line: &&str| COMPLAINTS.iter().any(|complaint| line.contains(complaint));
    let from = lines
        .iter()
        .position(complains)
        .unwrap_or(lines.len().saturating_sub(LINES));
    lines[from..]
        .iter()
        .take(LINES)
        .copied()
        .collect::<Vec<_>>()
        .join("\n")
}

/// A panic in a thread that held the lock is no reason to lose the session: the data are bytes and counters.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many bytes of standard input may still be sent.
struct Credit {
    bytes: Mutex<usize>,
    given: Condvar,
}

impl Default for Credit {
    fn default() -> Self {
        Self {
            bytes: Mutex::new(STDIN_WINDOW),
            given: Condvar::new(),
        }
    }
}

impl Credit {
    fn give(&self, more: usize) {
        *lock(&self.bytes) += more;
        self.given.notify_all();
    }

    /// Waits until `bytes` may be sent.
    fn take(&self, bytes: usize) {
        let mut credit = lock(&self.bytes);
        while *credit < bytes {
            credit = self
                .given
                .wait(credit)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *credit -= bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_makes_the_sender_wait() {
        let credit = Arc::new(Credit::default());
        credit.take(STDIN_WINDOW);
        let other = Arc::clone(&credit);
        let waiting = thread::spawn(move || other.take(10));
        credit.give(9);
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        credit.give(1);
        waiting.join().unwrap();
    }

    #[test]
    fn a_machine_that_falls_silent_is_lost() {
        let long_ago = Instant::now().checked_sub(SILENCE).unwrap();
        let conduct = |heard: Heard, deadline: Option<Instant>| {
            let (events, inbox) = mpsc::channel();
            let session = Session {
                writer: Arc::new(Mutex::new(UnixStream::pair().unwrap().0)),
                events,
                credit: Arc::default(),
                heard: Arc::new(Mutex::new(heard)),
                interactive: false,
            };
            session.conduct(start(), &inbox, deadline)
        };
        let error = conduct(Heard::At(long_ago), None).unwrap_err();
        assert!(error.to_string().contains("said nothing for 120 s"));
        // It is not to blame for a reader of its output that takes long.
        let soon = Instant::now() + Duration::from_millis(5);
        let ended = conduct(Heard::Now, Some(soon)).unwrap();
        assert_eq!(ended, Outcome::TimedOut(ConsoleTail::default()));
    }

    #[test]
    fn a_machine_that_runs_a_command_is_nudged() {
        let (ours, mut machine) = UnixStream::pair().unwrap();
        let (events, inbox) = mpsc::channel();
        events.send(Event::Ready).unwrap();
        let session = Session {
            writer: Arc::new(Mutex::new(ours)),
            events: events.clone(),
            credit: Arc::default(),
            heard: Arc::new(Mutex::new(Heard::Now)),
            interactive: false,
        };
        let conducting = thread::spawn(move || session.conduct(start(), &inbox, None));
        assert!(matches!(read_frame(&mut machine), Ok(Frame::Start(_))));
        let mut nudges = 0;
        while nudges < 2 {
            // Standard input comes as well, from wherever the test has it.
            nudges += u32::from(read_frame(&mut machine).unwrap() == Frame::Nudge);
        }
        events.send(Event::Exit(0)).unwrap();
        let ended = conducting.join().unwrap().unwrap();
        assert_eq!(ended, Outcome::Exited(0));
    }

    fn start() -> Start {
        Start {
            argv: vec!["true".into()],
            env: Vec::new(),
            cwd: "/".into(),
            terminal: None,
            on_terminal: [false; 3],
            shares: Vec::new(),
        }
    }

    #[test]
    fn the_last_of_the_console_is_kept() {
        let kept = Arc::new(Mutex::new(VecDeque::new()));
        let mut text = vec![b'x'; 2 * CONSOLE_KEPT];
        text.extend_from_slice(b"\nBUG: it broke\n\n");
        keep_tail(io::Cursor::new(text), &kept, false);
        let deadline = Instant::now() + Duration::from_secs(5);
        while !tail(&kept).to_string().ends_with("\n  | BUG: it broke") {
            assert!(Instant::now() < deadline, "{}", tail(&kept));
        }
        assert_eq!(lock(&kept).len(), CONSOLE_KEPT);
    }

    #[test]
    fn a_complaint_of_the_kernel_is_shown_from_its_first_line() {
        let trace = "x\n".repeat(100);
        assert_eq!(
            telling_part(&format!("a\nOops: int3\n{trace}"))
                .lines()
                .next(),
            Some("Oops: int3")
        );
        assert_eq!(telling_part(&format!("a\n{trace}")).lines().count(), 25);
        assert_eq!(telling_part(""), "");
    }

    #[test]
    fn a_host_that_cannot_be_started_is_an_error() {
        let host = EmulatedHost {
            qemu: "/no/such/qemu".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cpus: 1,
            memory_mib: 64,
            shares: Vec::new(),
        };
        let request = Request {
            start: start(),
            time_limit: None,
            show_console: false,
        };
        let error = run(&host, &request).unwrap_err();
        assert_eq!(error.to_string(), "cannot start /no/such/qemu");
    }
}
