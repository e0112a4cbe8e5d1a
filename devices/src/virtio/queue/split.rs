//! A split virtqueue's rings (virtio 1.4, "Split Virtqueues"): where the function is in them, and who wants to be notified.
//!
//! Their mechanics (available and used ring, event index) are the `virtio-queue` crate's; this module adds
//! `VIRTQ_AVAIL_F_NO_INTERRUPT`, checked chains, and errors instead of silence.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::{QueueRegisters, RingError};
use crate::memory::View;
use crate::virtio::chain::{Chain, Head, Table};

/// Bit 0 of the available ring's flags: the driver wants no interrupt (only without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Byte offset of `idx` in the used ring.
const USED_INDEX: u64 = 2;

/// The rings of an enabled queue.
#[derive(Debug)]
pub(super) struct SplitRing {
    queue: Queue,
    /// The device found the ring empty at this available index, and the driver was not yet asked for a kick. What
    /// was put back since then does not count as news.
    starved: Option<u16>,
}

impl SplitRing {
    /// The rings that `registers` describe, at index 0, if all of them is guest memory.
    pub fn new(max_size: u16, registers: &QueueRegisters, view: &View) -> Result<Self, RingError> {
        let size = u64::from(registers.size);
        let area = |area, address: u64, align: u64, len: u64| {
            let usable = address.is_multiple_of(align)
                && address != 0
                && view.contains(GuestAddress(address), len as usize);
            usable
                .then_some(GuestAddress(address))
                .ok_or(RingError::Area { area, address })
        };
        let table = registers.descriptor_area;
        let descriptors = area("descriptor table", table, 16, 16 * size)?;
        let available = area("available ring", registers.driver_area, 2, 6 + 2 * size)?;
        let used = area("used ring", registers.device_area, 4, 6 + 8 * size)?;
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
        is_ours: impl FnOnce(Head) -> bool,
    ) -> Result<Option<Chain>, RingError> {
        let next = self
            .queue
            .iter(&**view)
            .map_err(RingError::Available)?
            .next();
        let Some(head) = next.map(|found| Head(found.head_index())) else {
            self.starved = Some(self.queue.next_avail());
            return Ok(None);
        };
        if is_ours(head) {
            return Err(RingError::Again(head.0));
        }
        let chain = self.chain(view, head)?;
        self.starved = None;
        Ok(Some(chain))
    }

    /// Fetches a chain that the function has not given back, once more.
    pub fn again(&mut self, view: &View, head: Head) -> Result<Chain, RingError> {
        let chain = self.chain(view, head)?.fetched_again();
        self.starved = None;
        Ok(chain)
    }

    fn chain(&self, view: &View, head: Head) -> Result<Chain, RingError> {
        let table = Table {
            start: GuestAddress(self.queue.desc_table()),
            len: self.queue.size(),
        };
        Ok(Chain::parse(view, table, head)?)
    }

    /// The chain that was fetched last is as if it had not been.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Returns a chain to the driver with `len` bytes written.
    pub fn push(&mut self, view: &View, head: Head, len: u32) -> Result<(), RingError> {
        let added = self.queue.add_used(&**view, head.0, len);
        added.map_err(RingError::Used)
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
        let wanted = self.queue.needs_notification(&**view);
        let wanted = wanted.map_err(RingError::Available)?;
        if self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags: u16 = view
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
            .map(u16::from_le)?;
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }
}
