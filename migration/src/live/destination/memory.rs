//! Memory on its way in: pages over all connections of a migration, round after round.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{Arrived, Failure, Receiving, Sections, called_off, next};
use crate::guest::GuestPages;
use crate::layout::RamLayout;
use crate::live::page_connections::Others;
use crate::live::pages::Arriving;
use crate::wire::message::Memory;
use crate::wire::{Connection, Message, Received, WireError};

/// How long a source has time to say why it has closed a page connection.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What has come so far.
pub(super) struct Come {
    pub(super) arriving: Arriving,
    pub(super) arrived: Arrived,
    /// Those of this round.
    pub(super) sections: Sections,
}

impl Come {
    /// Nothing.
    pub(super) fn new(layout: &RamLayout) -> Self {
        Self {
            arriving: Arriving::new(layout),
            arrived: Arrived::default(),
            sections: Sections::default(),
        }
    }
}

impl Receiving {
    /// Waits for the page connections that were announced. What comes over the main one after them may be there already.
    pub(super) fn await_page_connections(
        &mut self,
        progress: &mut dyn FnMut(Arrived) -> ControlFlow<()>,
    ) -> Result<Option<Received>, Failure> {
        let during = "connect";
        let wire = |source| Failure::Wire { during, source };
        let decision = &self.decision;
        let mut there = decision.page_connections();
        let mut first = None;
        if there.is_none() {
            let next = next(&mut self.connection, &mut || {
                there = decision.page_connections();
                if there.is_some() {
                    return ControlFlow::Break(());
                }
                progress(Arrived::default())
            });
            first = next.map_err(wire)?;
            // The last one may have come just before that.
            there = there.or_else(|| decision.page_connections());
        }
        match (there, first) {
            (Some(pages), first) => {
                self.pages = pages;
                Ok(first)
            }
            (None, None) => Err(called_off(during)),
            (None, Some(Received::Message(Message::Cancel { reason }))) => {
                Err(Failure::Cancelled { during, reason })
            }
            (None, Some(other)) => Err(wire(WireError::Unexpected {
                found: other.name(),
                expected: "the connections that were announced",
            })),
        }
    }

    /// Receives pages over all connections, and sections over the main one, until that is over and all of the pages have come.
    /// Returns what said so: the end of a round, or what comes after the last pages. `first` has come already.
    pub(super) fn round<M: GuestPages + ?Sized>(
        &mut self,
        first: Option<Received>,
        memory: &M,
        come: &mut Come,
        progress: &mut dyn FnMut(Arrived) -> ControlFlow<()>,
    ) -> Result<Received, Failure> {
        let arriving = come.arriving.clone();
        let mut main = Main {
            connection: &mut self.connection,
            copies: self.how == Memory::Copy,
            verify: self.verify,
            come,
            progress,
        };
        self.pages.receive(memory, &arriving, |others| {
            let end = main.receive(first, memory, others)?;
            main.wait(&end, others)?;
            Ok(end)
        })
    }
}

/// The main connection in a round.
struct Main<'a> {
    connection: &'a mut Connection,
    copies: bool,
    verify: bool,
    come: &'a mut Come,
    progress: &'a mut dyn FnMut(Arrived) -> ControlFlow<()>,
}

impl Main<'_> {
    fn during(&self) -> &'static str {
        if self.copies && self.come.sections.list.is_empty() {
            "memory"
        } else {
            "state"
        }
    }

    fn wire(&self, source: WireError) -> Failure {
        Failure::Wire {
            during: self.during(),
            source,
        }
    }

    fn unexpected(&self, found: String) -> Failure {
        self.wire(WireError::Unexpected {
            found,
            expected: "pages or state",
        })
    }

    /// Tells how far it is; an error if it is called off.
    fn tell(&mut self) -> Result<(), Failure> {
        self.come.arrived.pages = self.come.arriving.pages();
        match (self.progress)(self.come.arrived) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(called_off(self.during())),
        }
    }

    /// Receives until something ends the round.
    fn receive<M: GuestPages + ?Sized>(
        &mut self,
        mut first: Option<Received>,
        memory: &M,
        others: &mut Others<Message>,
    ) -> Result<Received, Failure> {
        loop {
            let received = match first.take() {
                Some(received) => received,
                None => self.next(others)?,
            };
            match received {
                Received::Pages(body) if self.copies => {
                    let arriving = &mut self.come.arriving;
                    let outcome = arriving.data(self.connection, memory, &body);
                    outcome.map_err(|e| self.wire(e))?;
                }
                Received::Zeroes(body) if self.copies => {
                    let outcome = self.come.arriving.zeroes(memory, &body);
                    outcome.map_err(|e| self.wire(e))?;
                }
                Received::Section(section) => {
                    let outcome = self.come.sections.add(section);
                    outcome.map_err(|e| self.wire(e))?;
                }
                Received::Message(Message::Round { number }) if self.copies => {
                    if number != self.come.arrived.round + 1 {
                        return Err(self.unexpected(format!("round {number}")));
                    }
                    self.come.arrived.round = number;
                    return Ok(Received::Message(Message::Round { number }));
                }
                Received::Message(Message::Cancel { reason }) => {
                    let during = self.during();
                    return Err(Failure::Cancelled { during, reason });
                }
                Received::Sums(body) if self.verify => return Ok(Received::Sums(body)),
                Received::Message(Message::Complete) => return Ok(received),
                other => return Err(self.unexpected(other.name())),
            }
            others.check().map_err(|e| self.lost(e))?;
            // Something comes all the time.
            if self.copies {
                self.tell()?;
            }
        }
    }

    /// What comes next.
    fn next(&mut self, others: &mut Others<Message>) -> Result<Received, Failure> {
        let mut failed = None;
        let mut arrived = self.come.arrived;
        let arriving = &self.come.arriving;
        let progress = &mut self.progress;
        let received = next(self.connection, &mut || {
            if let Err(error) = others.check() {
                failed = Some(error);
                return ControlFlow::Break(());
            }
            arrived.pages = arriving.pages();
            progress(arrived)
        });
        match (received, failed) {
            (_, Some(error)) => Err(self.lost(error)),
            (Ok(Some(received)), None) => Ok(received),
            (Ok(None), None) => Err(called_off(self.during())),
            (Err(error), None) => Err(self.wire(error)),
        }
    }

    /// Waits until the pages before `end` have come over the other connections as well.
    fn wait(&mut self, end: &Received, others: &mut Others<Message>) -> Result<(), Failure> {
        while !others.wait().map_err(|e| self.lost(e))? {
            self.tell()?;
        }
        let expected = match end {
            Received::Message(round @ Message::Round { .. }) => round,
            _ => &Message::Complete,
        };
        for (number, end) in others.ended() {
            if end != *expected {
                let error = WireError::Unexpected {
                    found: end.name().to_owned(),
                    expected: "the end of the pages that the main connection says",
                };
                return Err(self.wire(error.of(number)));
            }
        }
        Ok(())
    }

    /// A page connection has failed, with `error`; perhaps since the source has given it up, which it says.
    fn lost(&mut self, error: WireError) -> Failure {
        let during = self.during();
        let deadline = Instant::now() + LAST_WORDS;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connection.receive_within(left) {
                Ok(Some(Received::Message(Message::Cancel { reason }))) => {
                    return Failure::Cancelled { during, reason };
                }
                // What follows is pages, not frames.
                Ok(Some(Received::Pages(_))) | Err(_) => break,
                Ok(_) if left.is_zero() => break,
                Ok(_) => {}
            }
        }
        self.wire(error)
    }
}
