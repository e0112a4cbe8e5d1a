//! The receiving end: one type for each stage, so that nothing can be done twice or too early.
//!
//! ```text
//! Incoming::accept ─► Offered ── accept ─► Receiving ── receive ─► Prepared ── commit ─► Committed ── running
//!                        └─ refuse
//! ```

mod memory;

use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::commit::{Destination, DestinationAction, DestinationEvent};
use super::guest::{DestinationGuest, GuestError};
use super::page_connections::{Awaited, Joining, PageConnections};
use super::verify::{Comparing, Difference};
use crate::layout::RamLayout;
use crate::wire::connection::{Named, Section};
use crate::wire::message::{MAX_CONNECTIONS, Memory, Outcome, PROTOCOL, Purpose, VERSION};
use crate::wire::{Connection, Message, Received, WireError};
use memory::Come;

/// The most sections of an offer or of a state.
const MAX_SECTIONS: usize = 64;
/// The most bytes that all sections of an offer, or of a state, have together.
const MAX_SECTION_BYTES: usize = 256 << 20;
/// The most descriptors of an offer: memory, and every disk and tap there can be.
const MAX_DESCRIPTORS: usize = 4096;

/// Why no guest arrived.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The connection.
    #[error("{during}: {source}")]
    Wire {
        /// What was waited for.
        during: &'static str,
        /// What failed.
        source: WireError,
    },
    /// The source called it off.
    #[error("{during}: the source keeps the guest: {reason}")]
    Cancelled {
        /// What was waited for.
        during: &'static str,
        /// Why.
        reason: String,
    },
    /// This side cannot go on.
    #[error("{during}: {source}")]
    Guest {
        /// What was done.
        during: &'static str,
        /// What failed.
        source: GuestError,
    },
    /// A page arrived damaged and was not sent again.
    #[error("memory: page {0} was damaged on its way")]
    Torn(u64),
    /// Memory was compared, and is not that of the source: pages were written that the source did not know of, or changed
    /// here.
    #[error(
        "memory: pages that differ from those of the source: {}; the first is page {}, at guest address {:#x}",
        .0.pages, .0.first, .0.address
    )]
    Differs(Difference),
    /// Not a source of a migration.
    #[error("whoever connected does not want to move a guest: {0}")]
    Stranger(String),
    /// The source has given up this connection and asked what became of the guest.
    #[error("{during}: the source has given up this connection")]
    GivenUp {
        /// What was waited for.
        during: &'static str,
    },
}

impl Failure {
    /// Tells the source, unless it knows or does not listen.
    fn tell(&self, connection: &mut Connection) {
        if !matches!(self, Self::Cancelled { .. } | Self::GivenUp { .. }) {
            let _ = connection.send(&Message::refuse(vec![self.to_string()]));
            // The source hangs up when it has read that.
            let _ = connection.receive_within(Duration::from_millis(200));
        }
    }
}

/// What this destination knows of one migration; shared with whoever answers questions about it.
#[derive(Clone, Debug)]
pub struct Decision(Arc<(Mutex<Decided>, Condvar)>);

#[derive(Debug)]
struct Decided {
    session: String,
    state: Destination,
    /// The source knows the outcome.
    known: bool,
    awaited: Awaited,
}

impl Decision {
    fn new(session: String) -> Self {
        let decided = Decided {
            session,
            state: Destination::Receiving,
            known: false,
            awaited: Awaited::default(),
        };
        Self(Arc::new((Mutex::new(decided), Condvar::new())))
    }

    fn lock(&self) -> MutexGuard<'_, Decided> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn on(&self, event: DestinationEvent) -> DestinationAction {
        let mut decided = self.lock();
        let (state, action) = decided.state.on(event);
        decided.state = state;
        self.0.1.notify_all();
        action
    }

    /// The guest as this side sees it.
    pub fn state(&self) -> Destination {
        self.lock().state
    }

    /// Answers a source that asks about `session`. From then on, nothing that was not decided before will be.
    pub fn asked(&self, session: &str) -> Outcome {
        if self.lock().session != session {
            return Outcome::Unknown;
        }
        match self.on(DestinationEvent::Asked) {
            DestinationAction::Answer(outcome) => outcome,
            _ => Outcome::Unknown,
        }
    }

    /// Takes a page connection, if it is one of this migration that is waited for. Otherwise refuses it, and returns why.
    pub fn join(&self, joining: Box<Joining>) -> Result<(), String> {
        let mut decided = self.lock();
        let outcome = if decided.session == joining.session() {
            decided.awaited.join(joining)
        } else {
            Err((joining, "no guest of that session arrives here".to_owned()))
        };
        drop(decided);
        outcome.map_err(|(joining, reason)| {
            joining.refuse(reason.clone());
            reason
        })
    }

    /// The page connections, if all have come.
    fn page_connections(&self) -> Option<PageConnections> {
        let awaited = &mut self.lock().awaited;
        awaited.are_there().then(|| awaited.take())
    }

    /// Whether the source has learnt the outcome.
    pub fn is_known(&self) -> bool {
        self.lock().known
    }

    /// The source has learnt the outcome.
    pub fn told(&self) {
        self.lock().known = true;
        self.0.1.notify_all();
    }

    /// Waits until the source has learnt the outcome, `limit` at most. True if it has.
    pub fn wait_until_told(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        let mut decided = self.lock();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if decided.known || left.is_zero() {
                return decided.known;
            }
            decided = self
                .0
                .1
                .wait_timeout(decided, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Somebody who connected.
pub enum Incoming {
    /// A source that offers a guest.
    Offer(Box<Offered>),
    /// A source that asks what became of the guest of a session.
    Question {
        /// Which session.
        session: String,
        /// Where the answer goes.
        connection: Connection,
    },
    /// A source that wants to send pages over this connection as well.
    Pages(Box<Joining>),
}

impl Incoming {
    /// Hears what somebody wants who connected. `program` is told to them.
    pub fn accept(mut connection: Connection, program: &str) -> Result<Self, Failure> {
        let during = "hello";
        let wire = |source| Failure::Wire { during, source };
        let hello = connection.message("hello").map_err(wire)?;
        let Message::Hello {
            protocol,
            oldest,
            newest,
            purpose,
            session,
        } = hello
        else {
            return Err(Failure::Stranger(format!(
                "its first message is {}",
                hello.name()
            )));
        };
        if protocol != PROTOCOL {
            return Err(Failure::Stranger(format!("it speaks {protocol:?}")));
        }
        if session.len() > 64 {
            return Err(Failure::Stranger("its session has no id".to_owned()));
        }
        if purpose == Purpose::Outcome {
            return Ok(Self::Question {
                session,
                connection,
            });
        }
        if !(oldest..=newest).contains(&VERSION) {
            let reason = format!(
                "this tern speaks version {VERSION} of the migration protocol, the source versions {oldest} to {newest}"
            );
            let _ = connection.send(&Message::refuse(vec![reason.clone()]));
            return Err(Failure::Stranger(reason));
        }
        if let Purpose::Pages { connection: number } = purpose {
            let joining = Joining::new(session, number, connection, program);
            return Ok(Self::Pages(Box::new(joining)));
        }
        let welcome = Message::Welcome {
            version: VERSION,
            program: program.to_owned(),
        };
        connection.send(&welcome).map_err(wire)?;
        let mut offered = Offered {
            decision: Decision::new(session),
            sections: Sections::default(),
            descriptors: Vec::new(),
            memory: Vec::new(),
            how: Memory::Copy,
            verify: false,
            connection,
        };
        match offered.receive() {
            Ok(()) => Ok(Self::Offer(Box::new(offered))),
            Err(failure) => {
                failure.tell(&mut offered.connection);
                Err(failure)
            }
        }
    }
}

/// Answers a source that asks about a migration.
pub fn answer(mut connection: Connection, outcome: Outcome) -> Result<(), WireError> {
    connection.send(&Message::Outcome { outcome })?;
    match connection.message("bye")? {
        Message::Bye => Ok(()),
        other => Err(WireError::Unexpected {
            found: other.name().to_owned(),
            expected: "bye",
        }),
    }
}

fn called_off(during: &'static str) -> Failure {
    Failure::Guest {
        during,
        source: "called off here".into(),
    }
}

/// What comes next; `None` if `watch`, which is asked now and then while nothing comes, says `Break`.
fn next(
    connection: &mut Connection,
    watch: &mut dyn FnMut() -> ControlFlow<()>,
) -> Result<Option<Received>, WireError> {
    const LOOK: Duration = Duration::from_millis(50);
    let silence = connection.silence();
    let mut heard = Instant::now();
    loop {
        let before = connection.received();
        match connection.receive_within(LOOK)? {
            Some(received) => return Ok(Some(received)),
            None if watch().is_break() => return Ok(None),
            None if connection.received() != before => heard = Instant::now(),
            None if heard.elapsed() > silence => return Err(WireError::Silent(silence)),
            None => {}
        }
    }
}

/// Sections that arrived, bounded in number and size.
#[derive(Debug, Default)]
struct Sections {
    list: Vec<Section>,
    bytes: usize,
}

impl Sections {
    fn add(&mut self, section: Section) -> Result<(), WireError> {
        let malformed = |why: String| WireError::malformed(crate::wire::Kind::Section, why);
        if self.list.iter().any(|one| one.name == section.name) {
            return Err(malformed(format!("section {} came twice", section.name)));
        }
        self.bytes += section.bytes.len();
        if self.list.len() >= MAX_SECTIONS || self.bytes > MAX_SECTION_BYTES {
            return Err(malformed("there are too many of them".to_owned()));
        }
        self.list.push(section);
        Ok(())
    }
}

/// A guest that is offered, and that nothing was built for yet.
pub struct Offered {
    connection: Connection,
    decision: Decision,
    sections: Sections,
    descriptors: Vec<Named>,
    memory: Vec<(u64, u64)>,
    how: Memory,
    verify: bool,
}

impl Offered {
    fn receive(&mut self) -> Result<(), Failure> {
        let during = "offer";
        let wire = |source| Failure::Wire { during, source };
        loop {
            match self.connection.receive().map_err(wire)? {
                Received::Section(section) => self.sections.add(section).map_err(wire)?,
                Received::Descriptors(mut some) => {
                    self.descriptors.append(&mut some);
                    if self.descriptors.len() > MAX_DESCRIPTORS {
                        let why = "there are too many of them";
                        let kind = crate::wire::Kind::Descriptors;
                        return Err(wire(WireError::malformed(kind, why)));
                    }
                }
                Received::Message(Message::Offer {
                    memory,
                    how,
                    verify,
                    connections,
                }) => {
                    self.memory = memory
                        .iter()
                        .map(|range| (range.start, range.len))
                        .collect();
                    // Whoever builds the machine need not look again.
                    RamLayout::new(self.memory.iter().copied())
                        .map_err(|e| wire(WireError::malformed(crate::wire::Kind::Message, e)))?;
                    let malformed =
                        |why: String| wire(WireError::malformed(crate::wire::Kind::Message, why));
                    if verify && how != Memory::Copy {
                        let why = "memory that is not copied is not verified";
                        return Err(malformed(why.to_owned()));
                    }
                    let most = if how == Memory::Copy {
                        MAX_CONNECTIONS
                    } else {
                        1
                    };
                    if !(1..=most).contains(&connections) {
                        let why = format!("{connections} connections; there are 1 to {most}");
                        return Err(malformed(why));
                    }
                    (self.how, self.verify) = (how, verify);
                    self.decision.lock().awaited = Awaited::of(connections);
                    return Ok(());
                }
                Received::Message(Message::Cancel { reason }) => {
                    return Err(Failure::Cancelled { during, reason });
                }
                other => {
                    return Err(wire(WireError::Unexpected {
                        found: other.name(),
                        expected: "offer",
                    }));
                }
            }
        }
    }

    /// Its sections.
    pub fn sections(&mut self) -> Vec<Section> {
        std::mem::take(&mut self.sections.list)
    }

    /// The files that were handed over.
    pub fn descriptors(&mut self) -> Vec<Named> {
        std::mem::take(&mut self.descriptors)
    }

    /// Its RAM ranges: first address and length of each.
    pub fn memory(&self) -> &[(u64, u64)] {
        &self.memory
    }

    /// How its memory gets here.
    pub fn how(&self) -> Memory {
        self.how
    }

    /// What is known of the migration, for whoever answers questions.
    pub fn decision(&self) -> Decision {
        self.decision.clone()
    }

    /// Refuses the guest, with everything that does not fit.
    pub fn refuse(mut self, reasons: Vec<String>) {
        self.decision.on(DestinationEvent::Failed);
        let _ = self.connection.send(&Message::refuse(reasons));
        // The source hangs up when it has read that.
        let _ = self.connection.receive_within(Duration::from_secs(1));
    }

    /// Takes the guest: the machine is built.
    pub fn accept(mut self) -> Result<Receiving, Failure> {
        self.connection
            .send(&Message::Accept)
            .map_err(|source| Failure::Wire {
                during: "offer",
                source,
            })?;
        Ok(Receiving {
            connection: self.connection,
            decision: self.decision,
            memory: self.memory,
            how: self.how,
            verify: self.verify,
            pages: PageConnections::default(),
        })
    }
}

/// A machine whose guest is on its way.
pub struct Receiving {
    connection: Connection,
    decision: Decision,
    memory: Vec<(u64, u64)>,
    how: Memory,
    verify: bool,
    pages: PageConnections,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrived {
    /// The round that is arriving, from 1 on.
    pub round: u32,
    /// Pages that arrived in all.
    pub pages: u64,
}

impl Receiving {
    /// Receives memory and state, and has `guest` restore and verify it. `progress` is told how far it is, also while
    /// nothing comes; with `Break` the guest is refused.
    pub fn receive<G: DestinationGuest>(
        mut self,
        guest: &mut G,
        progress: &mut dyn FnMut(Arrived) -> ControlFlow<()>,
    ) -> Result<Prepared, Failure> {
        let outcome = self.all(guest, progress);
        match outcome {
            Ok(restore_us) => Ok(Prepared {
                connection: self.connection,
                decision: self.decision,
                pages: self.pages,
                restore_us,
            }),
            Err(failure) => {
                self.decision.on(DestinationEvent::Failed);
                let unused = self.decision.lock().awaited.take();
                drop(unused);
                failure.tell(&mut self.connection);
                Err(failure)
            }
        }
    }

    fn all<G: DestinationGuest>(
        &mut self,
        guest: &mut G,
        progress: &mut dyn FnMut(Arrived) -> ControlFlow<()>,
    ) -> Result<u64, Failure> {
        let layout: RamLayout = crate::GuestPages::layout(guest.memory()).clone();
        let ranges = layout.ranges().iter().map(|range| (range.start, range.len));
        if !ranges.eq(self.memory.iter().copied()) {
            // Pages are numbered by the ranges: they would get into the wrong places, intact.
            return Err(Failure::Guest {
                during: "memory",
                source: "the machine was built with other RAM than the source has".into(),
            });
        }
        let mut come = Come::new(&layout);
        let mut first = self.await_page_connections(progress)?;
        let mut received = loop {
            let received = self.round(first.take(), guest.memory(), &mut come, progress)?;
            let Received::Message(Message::Round { number }) = received else {
                break received;
            };
            let during = "memory";
            // What came during the rounds is what was read while the guest ran.
            for section in std::mem::take(&mut come.sections).list {
                guest
                    .early(section)
                    .map_err(|source| Failure::Guest { during, source })?;
            }
            self.connection
                .send(&Message::Arrived { number })
                .map_err(|source| Failure::Wire { during, source })?;
        };
        // Once it is compared, nothing of memory comes any more.
        let mut comparing = Comparing::default();
        loop {
            let during = "state";
            let wire = |source| Failure::Wire { during, source };
            match received {
                Received::Section(section) => come.sections.add(section).map_err(wire)?,
                Received::Sums(body) if self.verify => {
                    comparing.sums(guest.memory(), &body).map_err(wire)?;
                }
                Received::Message(Message::Complete) => break,
                Received::Message(Message::Cancel { reason }) => {
                    return Err(Failure::Cancelled { during, reason });
                }
                other => {
                    return Err(wire(WireError::Unexpected {
                        found: other.name(),
                        expected: "state",
                    }));
                }
            }
            let next = next(&mut self.connection, &mut || progress(come.arrived));
            received = next.map_err(wire)?.ok_or_else(|| called_off(during))?;
        }
        if let Some(page) = come.arriving.first_torn() {
            return Err(Failure::Torn(page));
        }
        // Before anything is restored, which may write to it.
        if self.verify
            && let Some(difference) = comparing.finish(guest.memory())
        {
            return Err(Failure::Differs(difference));
        }
        let begun = Instant::now();
        guest
            .restore(come.sections.list)
            .map_err(|source| Failure::Guest {
                during: "restore",
                source,
            })?;
        let restore_us = micros(begun.elapsed());
        match self.decision.on(DestinationEvent::Restored) {
            DestinationAction::Prepared => {}
            _ => return Err(Failure::GivenUp { during: "restore" }),
        }
        self.connection
            .send(&Message::Prepared)
            .map_err(|source| Failure::Wire {
                during: "restore",
                source,
            })?;
        Ok(restore_us)
    }
}

/// A guest that is restored and waits for the source to give it away.
pub struct Prepared {
    connection: Connection,
    decision: Decision,
    /// Nothing comes over them any more. To close them takes time that a guest does not have that stands still.
    pages: PageConnections,
    restore_us: u64,
}

impl Prepared {
    /// What is known of the migration, for whoever answers questions.
    pub fn decision(&self) -> Decision {
        self.decision.clone()
    }

    /// Waits for the commit. `take` takes what only one process may hold; if it cannot, it lets go of all that it took, and
    /// the source keeps the guest. While it does, nobody who asks is answered.
    ///
    /// After `Ok`, the guest is this process's, and nobody else's. `watch` is asked now and then; with `Break` the guest is
    /// refused.
    pub fn commit(
        mut self,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
        take: impl FnOnce() -> Result<(), GuestError>,
    ) -> Result<Committed, Failure> {
        let during = "commit";
        let outcome = match self.wait(watch) {
            Ok(None) => Err(called_off(during)),
            Ok(Some(Message::Commit)) => {
                let begun = Instant::now();
                self.decide(take).map(|()| begun)
            }
            Ok(Some(Message::Cancel { reason })) => Err(Failure::Cancelled { during, reason }),
            Ok(Some(other)) => Err(Failure::Wire {
                during,
                source: WireError::Unexpected {
                    found: other.name().to_owned(),
                    expected: "commit",
                },
            }),
            Err(source) => Err(Failure::Wire { during, source }),
        };
        match outcome {
            Ok(begun) => Ok(Committed {
                connection: self.connection,
                decision: self.decision,
                _pages: self.pages,
                restore_us: self.restore_us,
                begun,
            }),
            Err(failure) => {
                self.decision.on(DestinationEvent::Failed);
                if let Failure::Guest { .. } = failure {
                    let _ = self
                        .connection
                        .send(&Message::refuse(vec![failure.to_string()]));
                    let _ = self.connection.receive_within(Duration::from_secs(1));
                }
                Err(failure)
            }
        }
    }

    /// The next message; `None` if it was called off here.
    fn wait(
        &mut self,
        watch: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Result<Option<Message>, WireError> {
        match next(&mut self.connection, watch)? {
            None => Ok(None),
            Some(Received::Message(message)) => Ok(Some(message)),
            Some(other) => Err(WireError::Unexpected {
                found: other.name(),
                expected: "commit",
            }),
        }
    }

    fn decide(&self, take: impl FnOnce() -> Result<(), GuestError>) -> Result<(), Failure> {
        let during = "commit";
        // With the lock held: nobody is told that it was discarded once this was decided, and the other way round.
        let mut decided = self.decision.lock();
        if decided.state != Destination::Prepared {
            return Err(Failure::GivenUp { during });
        }
        take().map_err(|source| Failure::Guest { during, source })?;
        let (state, action) = decided.state.on(DestinationEvent::Commit);
        decided.state = state;
        debug_assert_eq!(action, DestinationAction::Run);
        Ok(())
    }
}

/// A guest that is this process's and is about to run.
pub struct Committed {
    connection: Connection,
    decision: Decision,
    /// Closed when the guest runs.
    _pages: PageConnections,
    restore_us: u64,
    begun: Instant,
}

impl Committed {
    /// Tells the source that the guest runs. False if that cannot be said; then the source will ask.
    pub fn tell(&mut self) -> bool {
        let message = Message::Running {
            resume_us: micros(self.begun.elapsed()),
            restore_us: self.restore_us,
        };
        self.connection.send(&message).is_ok()
    }

    /// Waits until the source has heard that. False if it may not have; then it will ask.
    pub fn await_bye(mut self) -> bool {
        let heard = self.connection.message("bye");
        let known = matches!(heard, Ok(Message::Bye));
        if known {
            self.decision.told();
        }
        known
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
