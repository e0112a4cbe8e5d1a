//! The sending end.

mod end;

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

pub use end::{End, Phase, Progress, Reason};

use super::commit::{Source, SourceAction, SourceEvent};
use super::guest::{GuestError, SourceGuest};
use super::page_connections::{self, PageConnections};
use super::pages::{Round, Sent};
use super::policy::{self, Decision, Limits, Policy};
use super::report::{self, Attempt, Pause, Report};
use super::verify;
use crate::guest::GuestPages;
use crate::id::SnapshotId;
use crate::layout::PAGE_SIZE;
use crate::pages::PageSet;
use crate::wire::message::{Memory, Outcome, Purpose, VERSION};
use crate::wire::{Connection, Message, Received, WireError};

/// How long a destination is listened to that does not take what it is sent.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long the guest may stand still while nothing but signs of life comes, in periods of silence: before the commit,
/// when it goes on here after that, and after it, when the destination is asked.
const STILL_SILENCES: u32 = 6;
const NOTHING: &str = "nothing but signs of life";

/// How a guest is moved.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How memory gets there.
    pub how: Memory,
    /// The connection passes open files.
    pub files: bool,
    /// The destination compares all of memory with that of the source before the guest is given away. Only for a guest whose
    /// memory is copied. The pause is as long as that takes.
    pub verify: bool,
    /// How many connections memory is copied over, from 1 to [`MAX_CONNECTIONS`](crate::wire::message::MAX_CONNECTIONS). Memory
    /// that is not copied takes one.
    pub connections: u32,
    /// What it may cost the guest.
    pub limits: Limits,
    /// How often a lost destination is asked what became of the guest, and how long between.
    pub ask: (u32, Duration),
}

/// Moves `guest`. `connect` reaches the destination, again if it has to be asked what became of the guest. `watch` is told
/// how far it is, and calls it off with `Break`, which counts until the commit.
pub fn migrate<G: SourceGuest>(
    guest: &mut G,
    connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    options: &Options,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> End {
    attempt(guest, connect, options, watch).0
}

/// The same, with how far it came, whatever the end.
pub fn attempt<G: SourceGuest>(
    guest: &mut G,
    connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    options: &Options,
    watch: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> (End, Attempt) {
    let session = SnapshotId::random();
    let mut run = Run {
        guest,
        options,
        watch,
        progress: Progress {
            phase: Phase::Connect,
            round: 0,
            done: 0,
            total: 0,
            slow_down: 0,
            predicted_us: None,
        },
        state: Source::Moving,
        pages: PageConnections::default(),
        begun: Instant::now(),
        paused: None,
        report: Report {
            session: session
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            how: options.how,
            total_us: 0,
            build_us: 0,
            bytes: 0,
            rounds: Vec::new(),
            pause_us: Pause::default(),
            paused_bytes: 0,
        },
    };
    let end = match session {
        Ok(session) => run.carry_out(session, connect),
        Err(error) => End::Kept(run.wire(error.into())),
    };
    let attempt = Attempt {
        phase: run.progress.phase,
        report: run.report,
    };
    (end, attempt)
}

struct Run<'a, G> {
    guest: &'a mut G,
    options: &'a Options,
    watch: &'a mut dyn FnMut(Progress) -> ControlFlow<()>,
    progress: Progress,
    state: Source,
    pages: PageConnections,
    begun: Instant,
    /// When the guest was asked to stop, if it was.
    paused: Option<Instant>,
    report: Report,
}

impl<G: SourceGuest> Run<'_, G> {
    /// All of it, from the first connection on.
    fn carry_out(
        &mut self,
        session: SnapshotId,
        connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    ) -> End {
        let outcome = match connect() {
            Ok(mut connection) => {
                let outcome = self.all(&mut connection, session, connect);
                self.report.bytes = self.bytes_sent(&connection);
                if let Err(reason) = &outcome
                    && self.state == Source::Moving
                {
                    // So that the other side need not guess. It has hung up if that is the reason.
                    let _ = connection.send(&Message::cancel(reason));
                }
                outcome
            }
            Err(source) => Err(self.wire(source)),
        };
        match outcome {
            Ok(()) => End::Moved(Box::new(self.report.clone())),
            Err(reason) => self.settle(reason, session, connect),
        }
    }

    /// Takes down how long it took until now, and the pause if there was one.
    fn conclude(&mut self) {
        self.report.total_us = micros(self.begun.elapsed());
        if let Some(paused) = self.paused {
            self.report.pause_us.end(micros(paused.elapsed()));
        }
    }

    fn wire(&self, source: WireError) -> Reason {
        Reason::Wire {
            phase: self.progress.phase,
            source,
        }
    }

    fn failed(&self, source: GuestError) -> Reason {
        Reason::Guest {
            phase: self.progress.phase,
            source,
        }
    }

    /// Tells of the progress; an error if it was called off.
    fn begin(&mut self, phase: Phase) -> Result<(), Reason> {
        self.progress.phase = phase;
        (self.progress.done, self.progress.total) = (0, 0);
        self.look()
    }

    fn look(&mut self) -> Result<(), Reason> {
        match (self.watch)(self.progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Reason::Cancelled(self.progress.phase)),
        }
    }

    /// The answer of the destination. A refusal is an error, whatever was expected.
    fn answer(
        &mut self,
        connection: &mut Connection,
        expected: &'static str,
    ) -> Result<Message, Reason> {
        const LOOK: Duration = Duration::from_millis(100);
        // Keep-alive frames come all the time: not a byte for longer than that is too long.
        let silence = connection.silence();
        let still = matches!(self.progress.phase, Phase::Restore | Phase::Commit);
        let begun = Instant::now();
        let mut heard = begun;
        loop {
            let before = connection.received();
            match connection.receive_within(LOOK) {
                Ok(Some(Received::Message(Message::Refuse { reasons }))) => {
                    return Err(Reason::Refused {
                        phase: self.progress.phase,
                        reasons,
                    });
                }
                Ok(Some(Received::Message(message))) => return Ok(message),
                Ok(Some(other)) => {
                    return Err(self.wire(WireError::Unexpected {
                        found: other.name(),
                        expected,
                    }));
                }
                Ok(None) if heard.elapsed() > silence => {
                    return Err(self.wire(WireError::Silent(silence)));
                }
                Ok(None) if still && begun.elapsed() > silence * STILL_SILENCES => {
                    return Err(self.wire(WireError::Unexpected {
                        found: NOTHING.to_owned(),
                        expected,
                    }));
                }
                // Whoever waits too long can call it off. Nobody calls off what was committed.
                Ok(None) if self.state == Source::Moving => self.look()?,
                Ok(None) => {}
                Err(error) => return Err(self.wire(error)),
            }
            if connection.received() != before {
                heard = Instant::now();
            }
        }
    }

    fn unexpected(&self, found: &Message, expected: &'static str) -> Reason {
        self.wire(WireError::Unexpected {
            found: found.name().to_owned(),
            expected,
        })
    }

    /// An error that the connection gave while something was sent: a destination that has refused says why.
    fn sent<T>(
        &mut self,
        connection: &mut Connection,
        outcome: Result<T, WireError>,
    ) -> Result<T, Reason> {
        let error = match outcome {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        let begun = Instant::now();
        while error.is_lost()
            && begun.elapsed() < LAST_WORDS
            && let Ok(Some(received)) = connection.receive_within(LAST_WORDS)
        {
            if let Received::Message(Message::Refuse { reasons }) = received {
                return Err(Reason::Refused {
                    phase: self.progress.phase,
                    reasons,
                });
            }
        }
        Err(self.wire(error))
    }

    fn all(
        &mut self,
        connection: &mut Connection,
        session: SnapshotId,
        connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    ) -> Result<(), Reason> {
        self.look()?;
        let outcome = connection.send(&Message::hello(Purpose::Migrate, session));
        self.sent(connection, outcome)?;
        match self.answer(connection, "welcome")? {
            Message::Welcome { version, .. } if version == VERSION => {}
            Message::Welcome { version, .. } => return Err(Reason::Version(version)),
            other => return Err(self.unexpected(&other, "welcome")),
        }
        self.offer(connection)?;
        self.connect_more(connection, session, connect)?;
        let last = match self.options.how {
            Memory::Copy => Some(self.copy(connection)?),
            Memory::Handoff => None,
        };
        self.hand_over(connection, last)
    }

    fn offer(&mut self, connection: &mut Connection) -> Result<(), Reason> {
        self.begin(Phase::Offer)?;
        let begun = Instant::now();
        let sections = self.guest.offer().map_err(|e| self.failed(e))?;
        for section in &sections {
            let outcome = connection.send_section(section);
            self.sent(connection, outcome)?;
        }
        if self.options.files {
            let all = self.guest.descriptors().map_err(|e| self.failed(e))?;
            let outcome = connection.send_descriptors(&all);
            self.sent(connection, outcome)?;
        }
        let layout = self.guest.memory().layout().clone();
        let (how, verify, connections) = (self.options.how, self.verifies(), self.connections());
        let outcome = connection.send(&Message::offer(&layout, how, verify, connections));
        self.sent(connection, outcome)?;
        match self.answer(connection, "accept")? {
            Message::Accept => {}
            other => return Err(self.unexpected(&other, "accept")),
        }
        self.report.build_us = micros(begun.elapsed());
        Ok(())
    }

    /// How many connections memory goes over.
    fn connections(&self) -> u32 {
        match self.options.how {
            Memory::Copy => self.options.connections,
            Memory::Handoff => 1,
        }
    }

    /// Opens the page connections.
    fn connect_more(
        &mut self,
        connection: &mut Connection,
        session: SnapshotId,
        connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    ) -> Result<(), Reason> {
        for number in page_connections::FIRST..=self.connections() {
            self.begin(Phase::Connect)?;
            let opened = page_connections::open(number, session, connect);
            match self.sent(connection, opened)? {
                (one, Message::Welcome { .. }) => self.pages.push(one),
                (_, Message::Refuse { reasons }) => {
                    let reasons = reasons.iter();
                    return Err(Reason::Refused {
                        phase: self.progress.phase,
                        reasons: reasons
                            .map(|reason| format!("connection {number}: {reason}"))
                            .collect(),
                    });
                }
                (_, other) => return Err(self.unexpected(&other, "welcome")),
            }
        }
        Ok(())
    }

    /// Bytes sent so far, over all connections.
    fn bytes_sent(&self, connection: &Connection) -> u64 {
        connection.bytes_sent() + self.pages.bytes_sent()
    }

    /// Copies memory until the rest fits a pause; returns the pages that are left.
    fn copy(&mut self, connection: &mut Connection) -> Result<PageSet, Reason> {
        self.begin(Phase::Memory)?;
        let begun = Instant::now();
        self.guest.track().map_err(|e| self.failed(e))?;
        let mut policy = Policy::new(self.options.limits);
        let mut next = self.guest.written().map_err(|e| self.failed(e))?;
        for number in 1.. {
            let started = Instant::now();
            let pages = next.count();
            let slow_down = self.progress.slow_down;
            self.progress.round = number;
            self.progress.total = pages * PAGE_SIZE;
            let before = self.bytes_sent(connection);
            let kind = if number == 1 {
                Round::First
            } else {
                Round::Later
            };
            let end = Message::Round { number };
            let sent = self.send(connection, &next, kind, &end)?;
            if number == 1 {
                let early = self.guest.early().map_err(|e| self.failed(e))?;
                for section in &early {
                    let outcome = connection.send_section(section);
                    self.sent(connection, outcome)?;
                }
            }
            let outcome = connection.send(&end);
            self.sent(connection, outcome)?;
            match self.answer(connection, "arrived")? {
                Message::Arrived { number: arrived } if arrived == number => {}
                other => return Err(self.unexpected(&other, "arrived")),
            }
            let time = started.elapsed();
            next = self.guest.written().map_err(|e| self.failed(e))?;
            let written = next.count() * PAGE_SIZE;
            let decision = policy.after(&policy::Round {
                pages,
                bytes: self.bytes_sent(connection) - before,
                time,
                written,
                elapsed: begun.elapsed(),
            });
            let predicted = policy.predicted(written);
            self.progress.predicted_us = Some(micros(predicted));
            self.report.rounds.push(report::Round {
                number,
                pages,
                data: sent.data,
                zero: sent.zero,
                time_us: micros(time),
                written: next.count(),
                slow_down,
                predicted_us: micros(predicted),
            });
            match decision {
                Decision::Stop => break,
                Decision::Again { slow_down } => {
                    if slow_down != self.progress.slow_down {
                        self.guest.slow_down(slow_down);
                        self.progress.slow_down = slow_down;
                    }
                }
                Decision::GiveUp => {
                    return Err(Reason::Timeout {
                        elapsed: begun.elapsed(),
                        slow_down,
                        written: written >> 20,
                        predicted,
                        allowed: self.options.limits.downtime,
                    });
                }
            }
        }
        Ok(next)
    }

    /// Sends `pages` over all connections, and says over the page connections that these were all, with `end`.
    fn send(
        &mut self,
        connection: &mut Connection,
        pages: &PageSet,
        round: Round,
        end: &Message,
    ) -> Result<Sent, Reason> {
        let mut others = std::mem::take(&mut self.pages);
        let outcome =
            self.watched(|memory, tick| others.send(connection, memory, pages, round, end, tick));
        self.pages = others;
        outcome.and_then(|outcome| self.sent(connection, outcome))
    }

    /// Has `work` go through memory, and tells of the progress it makes in pages; an error if it was called off.
    fn watched<T>(
        &mut self,
        work: impl FnOnce(
            &G::Memory,
            &mut dyn FnMut(u64) -> Result<(), WireError>,
        ) -> Result<T, WireError>,
    ) -> Result<Result<T, WireError>, Reason> {
        let mut called_off = false;
        let (progress, watch) = (&mut self.progress, &mut self.watch);
        let outcome = work(self.guest.memory(), &mut |done| {
            progress.done = done * PAGE_SIZE;
            match watch(*progress) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => {
                    called_off = true;
                    Err(WireError::Closed)
                }
            }
        });
        if called_off {
            return Err(Reason::Cancelled(self.progress.phase));
        }
        Ok(outcome)
    }

    /// Memory is compared: handed over, it is the same.
    fn verifies(&self) -> bool {
        self.options.verify && self.options.how == Memory::Copy
    }

    /// Sends checksums of all of memory, none of which is written any more.
    fn verify(&mut self, connection: &mut Connection) -> Result<(), Reason> {
        self.begin(Phase::Verify)?;
        self.progress.total = self.guest.memory().layout().bytes();
        self.watched(|memory, tick| verify::send(connection, memory, tick))
            .and_then(|outcome| self.sent(connection, outcome))
    }

    /// Stops the guest and gives it away. `left` are pages to be copied.
    fn hand_over(
        &mut self,
        connection: &mut Connection,
        left: Option<PageSet>,
    ) -> Result<(), Reason> {
        self.begin(Phase::Pause)?;
        let mut lap = Instant::now();
        self.paused = Some(lap);
        let clock = |lap: &mut Instant| micros(std::mem::replace(lap, Instant::now()).elapsed());
        self.guest.stop().map_err(|e| self.failed(e))?;
        self.report.pause_us.stop = clock(&mut lap);
        let sections = self.guest.state().map_err(|e| self.failed(e))?;
        self.report.pause_us.state = clock(&mut lap);
        let before = self.bytes_sent(connection);
        if let Some(mut left) = left {
            left.union_with(&self.guest.written().map_err(|e| self.failed(e))?);
            self.progress.total = left.count() * PAGE_SIZE;
            self.send(connection, &left, Round::Later, &Message::Complete)?;
        }
        for section in &sections {
            let outcome = connection.send_section(section);
            self.sent(connection, outcome)?;
        }
        self.report.paused_bytes = self.bytes_sent(connection) - before;
        self.report.pause_us.send = clock(&mut lap);
        if self.verifies() {
            self.verify(connection)?;
            self.report.pause_us.verify = clock(&mut lap);
        }
        let outcome = connection.send(&Message::Complete);
        self.sent(connection, outcome)?;
        self.begin(Phase::Restore)?;
        match self.answer(connection, "prepared")? {
            Message::Prepared => {}
            other => return Err(self.unexpected(&other, "prepared")),
        }
        // The last moment at which it can be called off.
        self.begin(Phase::Commit)?;
        let (state, action) = self.state.on(SourceEvent::Prepared);
        debug_assert_eq!(action, SourceAction::Commit);
        self.state = state;
        self.guest.release();
        connection
            .send(&Message::Commit)
            .map_err(|e| self.wire(e))?;
        match self.answer(connection, "running")? {
            Message::Running {
                resume_us,
                restore_us,
            } => {
                self.report.pause_us.resume = resume_us;
                self.report.pause_us.restore = restore_us;
            }
            other => return Err(self.unexpected(&other, "running")),
        }
        self.state = self.state.on(SourceEvent::Running).0;
        self.conclude();
        // That nobody will ask. If it is lost, the destination keeps an answer ready for nothing.
        let _ = connection.send(&Message::Bye);
        Ok(())
    }

    /// After a failure: the guest goes on here, unless it may have been given away.
    fn settle(
        &mut self,
        reason: Reason,
        session: SnapshotId,
        connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    ) -> End {
        let event = match &reason {
            Reason::Refused { .. } => SourceEvent::Refused,
            Reason::Wire { .. } => SourceEvent::Lost,
            _ => SourceEvent::Failed,
        };
        let (state, mut action) = self.state.on(event);
        self.state = state;
        let mut asked = String::new();
        let (times, apart) = self.options.ask;
        for attempt in 0..times {
            if action != SourceAction::Ask {
                break;
            }
            if attempt > 0 {
                std::thread::sleep(apart);
            }
            match ask(connect, session) {
                Ok(outcome) => {
                    asked = match outcome {
                        Outcome::Unknown => {
                            "whoever answers there knows nothing of this migration".to_owned()
                        }
                        Outcome::Running | Outcome::Discarded => String::new(),
                    };
                    let (state, next) = self.state.on(SourceEvent::Outcome(outcome));
                    self.state = state;
                    if next != SourceAction::Nothing {
                        action = next;
                    }
                }
                Err(error) => asked = format!("the destination cannot be asked: {error}"),
            }
        }
        match action {
            SourceAction::Resume => {
                let resumed = self.guest.resume();
                self.conclude();
                match resumed {
                    Ok(()) => End::Kept(reason),
                    Err(error) => End::Lost { reason, error },
                }
            }
            SourceAction::End => {
                self.conclude();
                End::Moved(Box::new(self.report.clone()))
            }
            SourceAction::Ask | SourceAction::Nothing | SourceAction::Commit => {
                self.conclude();
                End::InDoubt {
                    session,
                    reason,
                    asked,
                }
            }
        }
    }
}

/// Asks the destination what became of the guest of `session`.
pub fn ask(
    connect: &mut dyn FnMut() -> Result<Connection, WireError>,
    session: SnapshotId,
) -> Result<Outcome, WireError> {
    let mut connection = connect()?;
    connection.send(&Message::hello(Purpose::Outcome, session))?;
    let found = match connection.receive_within(connection.silence())? {
        Some(Received::Message(Message::Outcome { outcome })) => {
            let _ = connection.send(&Message::Bye);
            return Ok(outcome);
        }
        Some(other) => other.name(),
        None => NOTHING.to_owned(),
    };
    Err(WireError::Unexpected {
        found,
        expected: "outcome",
    })
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
