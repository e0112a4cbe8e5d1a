//! Page connections: what carries pages beside the main connection of a migration that copies memory.
//!
//! ```text
//! main          hello … accept │ pages, sections, round 1 │ pages, sections, round 2 │ … │ last pages, state, complete │ …
//! connection 2    hello, welcome │ pages, round 1           │ pages, round 2           │ … │ last pages, complete
//! connection 3    hello, welcome │ pages, round 1           │ pages, round 2           │ … │ last pages, complete
//! ```
//!
//! Each has a thread at either end while pages are sent. The threads take pages from what all connections have to send, and
//! end with the round: the destination reads nothing of a round before all connections have brought all of the one before,
//! so that no page is overwritten by an older one.
//!
//! If one fails, all end, and are closed if they do not; the main connection is left to say why.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::pages::{self, Arriving, CHUNK, Pending, Round, Sent};
use crate::guest::GuestPages;
use crate::id::SnapshotId;
use crate::layout::PAGE_SIZE;
use crate::pages::PageSet;
use crate::wire::message::{Purpose, VERSION};
use crate::wire::{Connection, Message, Received, WireError};

/// Number of the first one. That of the main connection is 1.
pub const FIRST: u32 = 2;
/// How often a thread that waits for the others looks whether it is to go on.
const LOOK: Duration = Duration::from_millis(50);
/// Stack of a thread that sends or receives pages.
const STACK: usize = 256 << 10;
/// How long somebody who is refused has time to read why, and one who was given up to end.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How many keep-alive frames are read at a time: no destination holds up a round with them.
const HEARD: u32 = 100_000;

/// The page connections of one end, in the order of their numbers.
#[derive(Debug, Default)]
pub struct PageConnections(Vec<Connection>);

impl PageConnections {
    /// Takes the next one.
    pub fn push(&mut self, connection: Connection) {
        self.0.push(connection);
    }

    /// Bytes sent so far.
    pub fn bytes_sent(&self) -> u64 {
        self.0.iter().map(Connection::bytes_sent).sum()
    }

    /// Sends `pages` of `guest` over `main` and all of these, and then `end` over these. `tick` is called now and then, with
    /// the number of pages dealt with; it may end it.
    pub fn send<G: GuestPages + ?Sized>(
        &mut self,
        main: &mut Connection,
        guest: &G,
        pages: &PageSet,
        round: Round,
        end: &Message,
        tick: &mut dyn FnMut(u64) -> Result<(), WireError>,
    ) -> Result<Sent, WireError> {
        let pending = Pending::new(guest, pages, round);
        // A thread for less than a piece of memory would take longer than the pages do.
        let chunks = usize::try_from(pages.count() / (CHUNK / PAGE_SIZE)).unwrap_or(usize::MAX);
        let threads = chunks.min(self.0.len());
        let (busy, idle) = self.0.split_at_mut(threads);
        for (number, connection) in (FIRST..).skip(threads).zip(idle) {
            let outcome = hear(connection).and_then(|()| connection.send(end));
            outcome.map_err(|error| error.of(number))?;
        }
        with_each(
            busy.iter_mut().map(|connection| (connection, ())),
            |connection, ()| {
                hear(connection)?;
                let sent = pages::send(connection, &pending, || Ok(()))?;
                connection.send(end)?;
                Ok(sent)
            },
            |others| {
                let mut here = || {
                    let mut sent = pages::send(main, &pending, || {
                        others.check()?;
                        tick(pending.done())
                    })?;
                    while !others.wait()? {
                        tick(pending.done())?;
                    }
                    for (_, other) in others.ended() {
                        sent += other;
                    }
                    tick(pending.done())?;
                    Ok(sent)
                };
                let outcome = here();
                if outcome.is_err() {
                    // The other ones are closed only if they are stuck: the destination would take that for what went wrong.
                    pending.give_up();
                    others.let_end();
                }
                outcome
            },
        )
    }

    /// Receives pages of `guest` over all of these until each has come to its end, while `here` does so over the main
    /// connection.
    pub fn receive<G: GuestPages + ?Sized, R, E>(
        &mut self,
        guest: &G,
        arriving: &Arriving,
        here: impl FnOnce(&mut Others<Message>) -> Result<R, E>,
    ) -> Result<R, E> {
        with_each(
            self.0.iter_mut().map(|one| (one, arriving.clone())),
            |connection, mut arriving| {
                loop {
                    match connection.receive()? {
                        Received::Pages(body) => arriving.data(connection, guest, &body)?,
                        Received::Zeroes(body) => arriving.zeroes(guest, &body)?,
                        Received::Message(end @ (Message::Round { .. } | Message::Complete)) => {
                            return Ok(end);
                        }
                        other => {
                            return Err(WireError::Unexpected {
                                found: other.name(),
                                expected: "pages",
                            });
                        }
                    }
                }
            },
            here,
        )
    }
}

impl Drop for PageConnections {
    fn drop(&mut self) {
        // At once: each may take a moment to end.
        for connection in &self.0 {
            connection.closer().close();
        }
    }
}

/// Opens a page connection to where `connect` leads, and returns it with what the destination says to it.
pub fn open(
    number: u32,
    session: SnapshotId,
    connect: &mut dyn FnMut() -> Result<Connection, WireError>,
) -> Result<(Connection, Message), WireError> {
    let mut open = || {
        let mut connection = connect()?;
        let purpose = Purpose::Pages { connection: number };
        connection.send(&Message::hello(purpose, session))?;
        match connection.receive_within(connection.silence())? {
            Some(Received::Message(message)) => Ok((connection, message)),
            other => Err(WireError::Unexpected {
                found: other.map_or("nothing".to_owned(), |other| other.name()),
                expected: "welcome",
            }),
        }
    };
    open().map_err(|error| error.of(number))
}

/// Reads what a destination has said over a page connection, which is that it is alive.
fn hear(connection: &mut Connection) -> Result<(), WireError> {
    for _ in 0..HEARD {
        let before = connection.received();
        match connection.receive_within(Duration::ZERO)? {
            None if connection.received() == before => return Ok(()),
            None => {}
            Some(other) => {
                return Err(WireError::Unexpected {
                    found: other.name(),
                    expected: "nothing",
                });
            }
        }
    }
    Ok(())
}

/// What the threads of page connections come to.
pub struct Others<T> {
    told: Receiver<(u32, Result<T, WireError>)>,
    busy: usize,
    ended: Vec<(u32, T)>,
}

impl<T> Others<T> {
    fn note(&mut self, (number, outcome): (u32, Result<T, WireError>)) -> Result<(), WireError> {
        self.busy -= 1;
        self.ended
            .push((number, outcome.map_err(|error| error.of(number))?));
        Ok(())
    }

    /// An error if one has failed, which is told once.
    pub fn check(&mut self) -> Result<(), WireError> {
        while let Ok(told) = self.told.try_recv() {
            self.note(told)?;
        }
        Ok(())
    }

    /// Waits for a moment until all have ended. True if they have.
    pub fn wait(&mut self) -> Result<bool, WireError> {
        while self.busy > 0 {
            match self.told.recv_timeout(LOOK) {
                Ok(told) => self.note(told)?,
                Err(RecvTimeoutError::Timeout) => return Ok(false),
                Err(RecvTimeoutError::Disconnected) => return Err(WireError::Closed),
            }
        }
        Ok(true)
    }

    /// Waits for a moment until all have ended, whatever comes of it.
    fn let_end(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        while self.busy > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.told.recv_timeout(left).is_err() {
                return;
            }
            self.busy -= 1;
        }
    }

    /// Number of those that have ended, with what came of them.
    pub fn ended(&mut self) -> impl Iterator<Item = (u32, T)> {
        self.ended.drain(..)
    }
}

/// Has a thread do `work` on each of `connections`, while `here` goes on in this one. If that fails, which it has to if one of
/// them does, they are closed.
fn with_each<'c, A: Send, T: Send, R, E>(
    connections: impl Iterator<Item = (&'c mut Connection, A)>,
    work: impl Fn(&mut Connection, A) -> Result<T, WireError> + Sync,
    here: impl FnOnce(&mut Others<T>) -> Result<R, E>,
) -> Result<R, E> {
    std::thread::scope(|scope| {
        let (tell, told) = channel();
        let mut closers = Vec::new();
        for (number, (connection, with)) in (FIRST..).zip(connections) {
            closers.push(connection.closer());
            let (work, telling) = (&work, tell.clone());
            let spawned = Builder::new()
                .name(format!("pages {number}"))
                .stack_size(STACK)
                .spawn_scoped(scope, move || {
                    // Nobody listens any more once one has failed.
                    let _ = telling.send((number, work(connection, with)));
                });
            if let Err(error) = spawned {
                let _ = tell.send((number, Err(error.into())));
            }
        }
        drop(tell);
        let mut others = Others {
            told,
            busy: closers.len(),
            ended: Vec::new(),
        };
        let outcome = here(&mut others);
        if outcome.is_err() {
            closers.iter().for_each(|closer| closer.close());
        }
        outcome
    })
}

/// Somebody who wants to send pages of a guest that was offered over another connection.
pub struct Joining {
    session: String,
    number: u32,
    connection: Connection,
    program: String,
}

impl Joining {
    pub(super) fn new(session: String, number: u32, connection: Connection, program: &str) -> Self {
        Self {
            session,
            number,
            connection,
            program: program.to_owned(),
        }
    }

    /// The session they name.
    pub fn session(&self) -> &str {
        &self.session
    }

    /// Says why they may not.
    pub fn refuse(mut self, reason: String) {
        let _ = self.connection.send(&Message::refuse(vec![reason]));
        // They hang up when they have read that.
        let _ = self.connection.receive_within(LAST_WORDS);
    }
}

/// The page connections that a destination waits for.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// Number of the last one; none are expected if it is less than [`FIRST`].
    last: u32,
    came: BTreeMap<u32, Connection>,
}

impl Awaited {
    /// Those of a guest whose memory comes over `connections`, the main one included.
    pub fn of(connections: u32) -> Self {
        Self {
            last: connections,
            came: BTreeMap::new(),
        }
    }

    /// Takes one and says so, or hands it back with a reason.
    pub fn join(&mut self, joining: Box<Joining>) -> Result<(), (Box<Joining>, String)> {
        let number = joining.number;
        if !(FIRST..=self.last).contains(&number) {
            let reason = format!("connection {number} is none that is waited for here");
            return Err((joining, reason));
        }
        if self.came.contains_key(&number) {
            return Err((joining, format!("connection {number} is there already")));
        }
        let Joining {
            mut connection,
            program,
            ..
        } = *joining;
        // With the lock held: it is here before the source, which then sends pages, knows that it is.
        let version = VERSION;
        let welcome = Message::Welcome { version, program };
        if connection.send(&welcome).is_ok() {
            connection.take_only_pages();
            self.came.insert(number, connection);
        }
        Ok(())
    }

    /// True if all have come.
    pub fn are_there(&self) -> bool {
        self.came.len() as u64 == u64::from((self.last + 1).saturating_sub(FIRST))
    }

    /// Takes those that have come. No more are waited for.
    pub fn take(&mut self) -> PageConnections {
        self.last = 0;
        PageConnections(std::mem::take(&mut self.came).into_values().collect())
    }
}
