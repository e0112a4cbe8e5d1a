//! A split virtqueue's rings (virtio 1.4, "Split Virtqueues"): where the function is in them, and who wants to be notified.
//!
//! The available ring, and which kicks the device wants, are the `virtio-queue` crate's. This module adds checked chains, used
//! ones that appear all at once, `VIRTQ_AVAIL_F_NO_INTERRUPT`, and errors instead of silence.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::{QueueRegisters, RingError, area};
use crate::memory::View;
use crate::virtio::chain::{Chain, ChainError, Draft, Ticket};

/// Bit 0 of the available ring's flags: the driver wants no interrupt (only without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Byte offset of the entries of the available ring, and bytes of one. `used_event` follows the last.
const AVAIL_ENTRIES: u64 = 4;
const AVAIL_ENTRY: u64 = 2;
/// Byte offset of `idx` in the used ring.
const USED_INDEX: u64 = 2;
/// Byte offset of the elements of the used ring, and bytes of one.
const USED_ELEMENTS: u64 = 4;
const USED_ELEMENT: u64 = 8;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// A descriptor table: that of the rings, or an indirect one.
#[derive(Clone, Copy, Debug)]
struct Table {
    /// Guest physical address.
    start: GuestAddress,
    /// Entries.
    len: u16,
}

impl Table {
    fn entry(self, view: &View, index: u16) -> Option<Descriptor> {
        let offset = u64::from(index) * u64::from(DESCRIPTOR);
        let at = self.start.0.checked_add(offset)?;
        let there = index < self.len;
        there.then(|| view.read_obj(GuestAddress(at)).ok())?
    }

    /// The table an indirect descriptor refers to. It may be longer than the ring (D4).
    fn indirect(descriptor: &Descriptor) -> Option<Self> {
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR);
        let len = u16::try_from(descriptor.len() / DESCRIPTOR).ok();
        Some(Self {
            start: descriptor.addr(),
            len: len.filter(|_| whole)?,
        })
    }

    /// Takes the chain that starts at `head` apart and checks all of it.
    fn take_apart(self, view: &View, head: u16, draft: &mut Draft) -> Result<(), ChainError> {
        draft.clear();
        let mut walk = (self, head);
        let mut indirect = false;
        // A chain cannot be longer than its table: one that goes on has a loop.
        let mut left = self.len;
        loop {
            let descriptor = walk.0.entry(view, walk.1).filter(|_| left > 0);
            let descriptor = descriptor.ok_or(ChainError::Endless)?;
            left -= 1;
            if descriptor.refers_to_indirect_table() {
                let inner = Self::indirect(&descriptor).filter(|_| !indirect);
                let inner = inner.ok_or(ChainError::Endless)?;
                (walk, indirect, left) = ((inner, 0), true, inner.len);
                continue;
            }
            let (start, len) = (descriptor.addr(), descriptor.len());
            draft.add(view, start, len, descriptor.is_write_only())?;
            if !descriptor.has_next() {
                return Ok(());
            }
            walk.1 = descriptor.next();
        }
    }
}

/// The rings of an enabled queue.
#[derive(Debug)]
pub(super) struct SplitRing {
    queue: Queue,
    draft: Draft,
    /// Chains used since the driver was last notified, or chose not to be.
    unsignalled: u16,
    /// The device found the ring empty at this available index, and the driver was not yet asked for a kick. What
    /// was put back since then does not count as news.
    starved: Option<u16>,
}

impl SplitRing {
    /// The rings that `registers` describe, at index 0, if all of them is guest memory.
    pub fn new(max_size: u16, registers: &QueueRegisters, view: &View) -> Result<Self, RingError> {
        let size = u64::from(registers.size);
        let table = registers.descriptor_area;
        let descriptors = area(view, "descriptor table", table, 16, 16 * size)?;
        let (available, used) = (registers.driver_area, registers.device_area);
        let available = area(view, "available ring", available, 2, 6 + 2 * size)?;
        let used = area(view, "used ring", used, 4, 6 + 8 * size)?;
        let mut queue = Queue::new(max_size).map_err(RingError::Available)?;
        queue
            .try_set_size(registers.size)
            .and_then(|()| queue.try_set_desc_table_address(descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(available))
            .and_then(|()| queue.try_set_used_ring_address(used))
            .map_err(RingError::Available)?;
        queue.set_ready(true);
        Ok(Self {
            queue,
            draft: Draft::default(),
            unsignalled: 0,
            starved: None,
        })
    }

    /// Whether indices of events say when to notify.
    pub fn set_event_index(&mut self, enabled: bool) {
        self.queue.set_event_idx(enabled);
    }

    /// Index in the available ring of the chain that is fetched next.
    pub fn next_available(&self) -> u16 {
        self.queue.next_avail()
    }

    /// Index in the used ring of the chain that is returned next.
    pub fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Goes on at these indices.
    pub fn go_to(&mut self, next_available: u16, next_used: u16) {
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_used);
    }

    /// Goes on at this index of the available ring. Where the function left the used ring is in that ring (G0-l).
    pub fn go_to_available(&mut self, view: &View, index: u16) -> Result<(), RingError> {
        let used = GuestAddress(self.queue.used_ring().wrapping_add(USED_INDEX));
        let used: u16 = view.load(used, Ordering::Acquire)?;
        self.go_to(index, u16::from_le(used));
        Ok(())
    }

    /// Fetches the next available chain, unless it is one that `is_ours` says the function has.
    pub fn next(
        &mut self,
        view: &View,
        is_ours: impl FnOnce(Ticket) -> bool,
    ) -> Result<Option<Chain>, RingError> {
        let next = self
            .queue
            .iter(&**view)
            .map_err(RingError::Available)?
            .next();
        let Some(head) = next.map(|found| found.head_index()) else {
            self.starved = Some(self.queue.next_avail());
            return Ok(None);
        };
        if is_ours(Self::ticket(head)) {
            return Err(RingError::Again(head));
        }
        self.chain(view, head).map(Some)
    }

    /// Fetches a chain that the function has not given back, once more.
    pub fn again(&mut self, view: &View, ticket: Ticket) -> Result<Chain, RingError> {
        Ok(self.chain(view, ticket.id)?.fetched_again())
    }

    /// What a chain that starts with descriptor `head` is called.
    pub fn ticket(head: u16) -> Ticket {
        Ticket { id: head, slots: 1 }
    }

    fn chain(&mut self, view: &View, head: u16) -> Result<Chain, RingError> {
        let table = Table {
            start: GuestAddress(self.queue.desc_table()),
            len: self.queue.size(),
        };
        table.take_apart(view, head, &mut self.draft)?;
        self.starved = None;
        Ok(Chain::new(Self::ticket(head), self.draft.finish()))
    }

    /// The chain that was fetched last is as if it had not been.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns chains to the driver, with so many bytes written. It sees all of them or none.
    pub fn push(
        &mut self,
        view: &View,
        used: impl Iterator<Item = (Ticket, u32)>,
    ) -> Result<(), RingError> {
        let ring = self.queue.used_ring();
        let size = self.queue.size();
        let mut next = self.queue.next_used();
        for (ticket, len) in used {
            // The size is a power of two, so that this is right beyond 65535, too.
            let slot = u64::from(next & (size - 1));
            let at = GuestAddress(ring.wrapping_add(USED_ELEMENTS + USED_ELEMENT * slot));
            let element = u64::from(ticket.id) | u64::from(len) << 32;
            view.write_obj(element.to_le(), at)?;
            next = next.wrapping_add(1);
            self.unsignalled = self.unsignalled.saturating_add(1);
        }
        let index = GuestAddress(ring.wrapping_add(USED_INDEX));
        view.store(next.to_le(), index, Ordering::Release)?;
        self.queue.set_next_used(next);
        Ok(())
    }

    /// Tells the driver not to kick.
    pub fn disable_kicks(&mut self, view: &View) -> Result<(), RingError> {
        self.starved = None;
        let disabled = self.queue.disable_notification(&**view);
        disabled.map_err(RingError::Used)
    }

    /// True if the device found the ring empty since kicks were last asked for, or declined.
    pub fn is_starved(&self) -> bool {
        self.starved.is_some()
    }

    /// Asks for a kick when the next chain is made available. True if one already is: one the device has not seen,
    /// since those it saw and put back are waiting for more.
    pub fn enable_kicks(&mut self, view: &View) -> Result<bool, RingError> {
        let next = self.queue.next_avail();
        let seen = self.starved.take().unwrap_or(next);
        self.queue.set_next_avail(seen);
        let outcome = self.queue.enable_notification(&**view);
        self.queue.set_next_avail(next);
        outcome.map_err(RingError::Used)
    }

    /// Whether the driver wants to hear of what was used since it was last asked this.
    pub fn wants_signal(&mut self, view: &View) -> Result<bool, RingError> {
        let used = std::mem::take(&mut self.unsignalled);
        // The used index is written before this is read; the driver does it the other way round.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        if !self.queue.event_idx_enabled() {
            let flags: u16 = view
                .load(GuestAddress(available), Ordering::Relaxed)
                .map(u16::from_le)?;
            return Ok(flags & AVAIL_NO_INTERRUPT == 0);
        }
        let at = AVAIL_ENTRIES + AVAIL_ENTRY * u64::from(self.queue.size());
        let event = GuestAddress(available.wrapping_add(at));
        let event: u16 = view.load(event, Ordering::Relaxed).map(u16::from_le)?;
        // Wanted if the entry is among those that were used.
        let since = self.queue.next_used().wrapping_sub(event);
        Ok(used > 0 && since.wrapping_sub(1) < used)
    }
}
