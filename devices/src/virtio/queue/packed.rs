//! A packed virtqueue's ring (virtio 1.4, "Packed Virtqueues"): where the function is in it, and who wants to be notified.
//!
//! There is one ring of descriptors, which the driver fills and the device overwrites:
//!
//! ```text
//!        used                available
//!         ▼                      ▼
//! ─┬─────┬─────┬─────┬─────┬─────┬─────┬─
//!  │ used│ the function has  ... │ the driver's
//! ─┴─────┴─────┴─────┴─────┴─────┴─────┴─
//! ```
//!
//! A chain takes as many places as it has descriptors, or one with an indirect table. A device that returns chains in
//! another order than it got them writes used descriptors over those of chains that are still in flight. What is needed to
//! fetch such a chain again therefore stays with the function as its [`Descriptors`].

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::packed::Descriptor;
use vm_memory::GuestAddress;

use super::{QueueRegisters, RingError, area};
use crate::memory::View;
use crate::state::{OwnedBuffer, OwnedChain, OwnedKind};
use crate::virtio::chain::{Buffers, Chain, ChainError, Draft, Ticket};

/// Descriptor flag: the wrap counter of the driver when it made the descriptor available.
const AVAIL: u16 = 1 << 7;
/// Descriptor flag: the wrap counter of the device when it used the descriptor.
const USED: u16 = 1 << 15;
/// Descriptor flag of a used descriptor: something was written to its buffers.
const WRITTEN: u16 = 1 << 1;
/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;
/// Byte offset of length, buffer id and flags in a descriptor, which are read and written at once.
const TAIL: u64 = 8;

/// Event suppression flag: notify of everything.
const EVENTS_ENABLE: u16 = 0;
/// Event suppression flag: notify of nothing.
const EVENTS_DISABLE: u16 = 1;
/// Event suppression flag: notify of the descriptor at a position.
const EVENTS_AT: u16 = 2;
/// Bits of the flag.
const EVENTS_MASK: u16 = 3;

/// A place in a packed ring: the offset of a descriptor, and the wrap counter in its round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position(u16);

impl Position {
    /// Where a ring starts.
    pub const START: Self = Self(Self::WRAP);

    const WRAP: u16 = 1 << 15;

    /// The position with this encoding: the offset in bits 0 to 14, the wrap counter in bit 15.
    pub fn from_raw(raw: u16) -> Self {
        Self(raw)
    }

    /// Its encoding.
    pub fn raw(self) -> u16 {
        self.0
    }

    /// Offset of the descriptor.
    pub fn offset(self) -> u16 {
        self.0 & !Self::WRAP
    }

    /// The wrap counter.
    pub fn wrap(self) -> bool {
        self.0 & Self::WRAP != 0
    }

    /// The place among the `2 * size` there are, in the order in which they come.
    fn place(self, size: u16) -> u32 {
        let round = if self.wrap() { 0 } else { u32::from(size) };
        u32::from(self.offset()) + round
    }

    /// The position `by` places further on, in a ring of `size`. Neither `by` nor the offset is beyond the ring.
    pub(super) fn ahead(self, by: u16, size: u16) -> Self {
        // The sum of two that are at most 32768 each.
        let offset = u32::from(self.offset()) + u32::from(by);
        match offset.checked_sub(size.into()) {
            Some(offset) => Self(offset as u16 | (self.0 & Self::WRAP ^ Self::WRAP)),
            None => Self(offset as u16 | self.0 & Self::WRAP),
        }
    }

    /// The position `by` places before it.
    pub(super) fn back(self, by: u16, size: u16) -> Self {
        // That is as many further on in the round before, whose wrap counter is the other one.
        Self(self.0 ^ Self::WRAP).ahead(size.saturating_sub(by), size)
    }

    /// How many places there are from here to `later`.
    pub fn distance(self, later: Self, size: u16) -> u32 {
        let whole = 2 * u32::from(size);
        let (from, to) = (self.place(size), later.place(size));
        // Of a ring without descriptors, which there is none of, nothing could be said.
        (to + whole)
            .wrapping_sub(from)
            .checked_rem(whole)
            .unwrap_or(0)
    }
}

/// What it takes to fetch a chain of a packed ring again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Descriptors {
    /// The descriptors were in the ring, and may be overwritten: these are their buffers.
    Direct(Buffers),
    /// An indirect table, which stays as it is until the chain is used.
    Indirect(Table),
}

impl Descriptors {
    /// Those of `chain`, which comes from a saved state.
    pub fn restored(chain: &OwnedChain, view: &View) -> Result<Self, ChainError> {
        let mut draft = Draft::default();
        for buffer in &chain.buffers {
            let (start, len) = (GuestAddress(buffer.address), buffer.len);
            match (buffer.kind, chain.buffers.len()) {
                (OwnedKind::Table, 1) => {
                    let table = Table::new(start, len).ok_or(ChainError::Endless)?;
                    return Ok(Self::Indirect(table));
                }
                (OwnedKind::Table, _) => return Err(ChainError::Endless),
                (OwnedKind::Readable, _) => draft.add(view, start, len, false)?,
                (OwnedKind::Writable, _) => draft.add(view, start, len, true)?,
            }
        }
        Ok(Self::Direct(draft.finish()))
    }

    /// The chain with this `ticket` as it is saved.
    pub fn save(&self, ticket: Ticket) -> OwnedChain {
        let buffers = match self {
            Self::Direct(buffers) => {
                let buffers = buffers.iter().map(|(start, len, is_writable)| OwnedBuffer {
                    address: start.0,
                    len,
                    kind: match is_writable {
                        true => OwnedKind::Writable,
                        false => OwnedKind::Readable,
                    },
                });
                buffers.collect()
            }
            Self::Indirect(table) => vec![OwnedBuffer {
                address: table.start.0,
                len: table.entries * DESCRIPTOR,
                kind: OwnedKind::Table,
            }],
        };
        OwnedChain {
            id: ticket.id,
            descriptors: ticket.slots,
            buffers,
        }
    }
}

/// An indirect table. Its descriptors follow each other, whatever they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    start: GuestAddress,
    /// At most 65535.
    entries: u32,
}

impl Table {
    /// The one of `len` bytes, if that is a number of descriptors that a table can have. It may be longer than the ring (D4).
    fn new(start: GuestAddress, len: u32) -> Option<Self> {
        let entries = len / DESCRIPTOR;
        let fits = len.is_multiple_of(DESCRIPTOR) && u16::try_from(entries).is_ok_and(|n| n > 0);
        fits.then_some(Self { start, entries })
    }

    fn take_apart(self, view: &View, draft: &mut Draft) -> Result<(), ChainError> {
        draft.clear();
        for index in 0..self.entries {
            let at = self.start.0.checked_add(u64::from(index * DESCRIPTOR));
            let descriptor = at.and_then(|at| view.read_obj::<Descriptor>(GuestAddress(at)).ok());
            let descriptor = descriptor.filter(|entry| !entry.refers_to_indirect_table());
            let descriptor = descriptor.ok_or(ChainError::Endless)?;
            let (start, len) = (descriptor.addr(), descriptor.len());
            draft.add(view, start, len, descriptor.is_write_only())?;
        }
        Ok(())
    }
}

/// The ring of an enabled queue.
#[derive(Debug)]
pub(super) struct PackedRing {
    descriptors: GuestAddress,
    driver_events: GuestAddress,
    device_events: GuestAddress,
    size: u16,
    event_index: bool,
    /// The descriptor that is fetched next.
    available: Position,
    /// The descriptor that is used next.
    used: Position,
    /// Places used since the driver was last notified, or chose not to be.
    unsignalled: u32,
    /// The device found no descriptor here, and the driver was not yet asked for a kick. What was put back since then does
    /// not count as news.
    starved: Option<Position>,
    draft: Draft,
}

impl PackedRing {
    /// The ring that `registers` describe, at its start, if all of it is guest memory.
    pub fn new(registers: &QueueRegisters, view: &View) -> Result<Self, RingError> {
        let (ring, len) = (registers.descriptor_area, 16 * u64::from(registers.size));
        let (driver, device) = (registers.driver_area, registers.device_area);
        Ok(Self {
            descriptors: area(view, "descriptor ring", ring, 16, len)?,
            driver_events: area(view, "driver event suppression", driver, 4, 4)?,
            device_events: area(view, "device event suppression", device, 4, 4)?,
            size: registers.size,
            event_index: false,
            available: Position::START,
            used: Position::START,
            unsignalled: 0,
            starved: None,
            draft: Draft::default(),
        })
    }

    /// Whether positions of events say when to notify.
    pub fn set_event_index(&mut self, enabled: bool) {
        self.event_index = enabled;
    }

    /// The descriptor that is fetched next.
    pub fn next_available(&self) -> Position {
        self.available
    }

    /// The descriptor that is used next.
    pub fn next_used(&self) -> Position {
        self.used
    }

    /// Goes on at these positions. Between them are chains that the function has.
    pub fn go_to(&mut self, available: Position, used: Position) -> Result<(), RingError> {
        for position in [available, used] {
            if position.offset() >= self.size {
                return Err(RingError::Position(position.raw()));
            }
        }
        if used.distance(available, self.size) > self.size.into() {
            return Err(RingError::Position(available.raw()));
        }
        (self.available, self.used) = (available, used);
        Ok(())
    }

    fn at(&self, position: Position) -> GuestAddress {
        let offset = u64::from(position.offset()) * u64::from(DESCRIPTOR);
        // The ring was found to be guest memory.
        GuestAddress(self.descriptors.0.wrapping_add(offset))
    }

    /// True if the driver made the descriptor at `position` available.
    fn is_available(&self, view: &View, position: Position) -> Result<bool, RingError> {
        let tail = GuestAddress(self.at(position).0.wrapping_add(TAIL));
        let tail: u64 = view.load(tail, Ordering::Acquire)?;
        let flags = (u64::from_le(tail) >> 48) as u16;
        let wrap = position.wrap();
        Ok((flags & AVAIL != 0) == wrap && (flags & USED != 0) != wrap)
    }

    /// Fetches the next available chain, unless it is one that `is_ours` says the function has.
    pub fn next(
        &mut self,
        view: &View,
        is_ours: impl FnOnce(u16) -> bool,
    ) -> Result<Option<(Chain, Descriptors)>, RingError> {
        let start = self.available;
        if !self.is_available(view, start)? {
            self.starved = Some(start);
            return Ok(None);
        }
        self.draft.clear();
        // Places that the function has are not the driver's to fill.
        let free = u32::from(self.size) - self.used.distance(start, self.size);
        let mut table = None;
        let mut at = start;
        let mut slots = 0;
        let id = loop {
            // A chain that is longer than its ring is not one.
            if u32::from(slots) >= free {
                return Err(ChainError::Endless.into());
            }
            let descriptor: Descriptor = view.read_obj(self.at(at))?;
            slots += 1;
            at = at.ahead(1, self.size);
            let (start, len) = (descriptor.addr(), descriptor.len());
            if descriptor.refers_to_indirect_table() {
                // It is a chain by itself.
                let alone = slots == 1 && !descriptor.has_next();
                let found = Table::new(start, len).filter(|_| alone);
                table = Some(found.ok_or(ChainError::Endless)?);
                break descriptor.id();
            }
            self.draft
                .add(view, start, len, descriptor.is_write_only())?;
            if !descriptor.has_next() {
                break descriptor.id();
            }
        };
        if is_ours(id) {
            return Err(RingError::Again(id));
        }
        if let Some(table) = table {
            table.take_apart(view, &mut self.draft)?;
        }
        let buffers = self.draft.finish();
        let descriptors = match table {
            Some(table) => Descriptors::Indirect(table),
            None => Descriptors::Direct(buffers.clone()),
        };
        self.available = at;
        self.starved = None;
        Ok(Some((
            Chain::new(Ticket { id, slots }, buffers),
            descriptors,
        )))
    }

    /// Fetches a chain that the function has not given back, once more.
    pub fn again(
        &mut self,
        view: &View,
        ticket: Ticket,
        descriptors: &Descriptors,
    ) -> Result<Chain, RingError> {
        let buffers = match descriptors {
            Descriptors::Direct(buffers) => buffers.clone(),
            Descriptors::Indirect(table) => {
                table.take_apart(view, &mut self.draft)?;
                self.draft.finish()
            }
        };
        self.starved = None;
        Ok(Chain::new(ticket, buffers).fetched_again())
    }

    /// The chain that was fetched last is as if it had not been.
    pub fn put_back(&mut self, ticket: Ticket) {
        self.available = self.available.back(ticket.slots, self.size);
    }

    /// Returns chains to the driver, with so many bytes written. It sees all of them or none.
    pub fn push(
        &mut self,
        view: &View,
        mut used: impl Iterator<Item = (Ticket, u32)>,
    ) -> Result<(), RingError> {
        let Some(first) = used.next() else {
            return Ok(());
        };
        let start = self.used;
        let mut end = start.ahead(first.0.slots, self.size);
        let mut slots = u32::from(first.0.slots);
        for (ticket, len) in used {
            self.write_used(view, end, ticket, len)?;
            end = end.ahead(ticket.slots, self.size);
            slots += u32::from(ticket.slots);
        }
        // A driver looks at one after the other.
        self.write_used(view, start, first.0, first.1)?;
        self.used = end;
        self.unsignalled = self.unsignalled.saturating_add(slots);
        Ok(())
    }

    fn write_used(
        &self,
        view: &View,
        at: Position,
        ticket: Ticket,
        len: u32,
    ) -> Result<(), RingError> {
        let wrap = if at.wrap() { AVAIL | USED } else { 0 };
        let flags = wrap | if len > 0 { WRITTEN } else { 0 };
        let tail = u64::from(len) | u64::from(ticket.id) << 32 | u64::from(flags) << 48;
        let at = GuestAddress(self.at(at).0.wrapping_add(TAIL));
        // All at once: the driver sees length and id with the flags or not at all.
        view.store(tail.to_le(), at, Ordering::Release)?;
        Ok(())
    }

    /// Tells the driver not to kick.
    pub fn disable_kicks(&mut self, view: &View) -> Result<(), RingError> {
        self.starved = None;
        // With events, a driver that passed the position does not kick before it passes it again. Before the first of them it
        // may kick in vain.
        if !self.event_index {
            self.set_events(view, 0, EVENTS_DISABLE)?;
        }
        Ok(())
    }

    /// True if the device found the ring empty since kicks were last asked for, or declined.
    pub fn is_starved(&self) -> bool {
        self.starved.is_some()
    }

    /// Asks for a kick when the next chain is made available. True if one already is: one the device has not seen,
    /// since those it saw and put back are waiting for more.
    pub fn enable_kicks(&mut self, view: &View) -> Result<bool, RingError> {
        let seen = self.starved.take().unwrap_or(self.available);
        match self.event_index {
            true => self.set_events(view, seen.raw(), EVENTS_AT)?,
            false => self.set_events(view, 0, EVENTS_ENABLE)?,
        }
        // The driver writes its descriptors before it looks at this, the device the other way round: one of them sees.
        fence(Ordering::SeqCst);
        self.is_available(view, seen)
    }

    fn set_events(&self, view: &View, position: u16, flags: u16) -> Result<(), RingError> {
        let events = u32::from(position) | u32::from(flags) << 16;
        view.store(events.to_le(), self.device_events, Ordering::Release)?;
        Ok(())
    }

    /// Whether the driver wants to hear of what was used since it was last asked this.
    pub fn wants_signal(&mut self, view: &View) -> Result<bool, RingError> {
        fence(Ordering::SeqCst);
        let events: u32 = view.load(self.driver_events, Ordering::Relaxed)?;
        let events = u32::from_le(events);
        let (position, flags) = (events as u16, (events >> 16) as u16);
        let used = std::mem::take(&mut self.unsignalled);
        Ok(match flags & EVENTS_MASK {
            EVENTS_DISABLE => false,
            EVENTS_AT if self.event_index => {
                // Wanted if it is among the places that were used.
                let since = Position(position).distance(self.used, self.size);
                (1..=used).contains(&since) || used >= 2 * u32::from(self.size)
            }
            _ => true,
        })
    }
}
