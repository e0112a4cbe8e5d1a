//! One virtqueue: the registers a transport shows, and the ring once the queue is enabled.
//!
//! Ring mechanics (available and used ring, event index) are the `virtio-queue` crate's; this module adds what it
//! leaves out: the MSI-X vector, reset and stop as processes, which chains are in flight,
//! `VIRTQ_AVAIL_F_NO_INTERRUPT`, and errors instead of silence.
//!
//! A chain that was fetched is in flight until it is returned, or until its device gives it up unbegun. In that case the
//! function still owns it: it is fetched once more before any other.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError, Head, Table};
use crate::memory::View;
use crate::state::QueueState;

/// The MSI-X vector value that means "no interrupt" (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// Bit 0 of the available ring's flags: the driver wants no interrupt (only without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;
/// Byte offset of `idx` in the used ring.
const USED_INDEX: u64 = 2;

/// Why a ring cannot be used. Each is the driver's doing, and answered with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A ring area is misaligned or outside guest memory.
    #[error("{area} at {address:#x} is misaligned or outside guest memory")]
    Area {
        /// "descriptor table", "available ring" or "used ring".
        area: &'static str,
        /// The guest physical address the driver gave.
        address: u64,
    },
    /// The available index is further ahead than the ring is long, or the ring cannot be reached.
    #[error("available ring is unusable: {0}")]
    Available(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("used ring is unusable: {0}")]
    Used(virtio_queue::Error),
    /// A chain is made available while the device still has it.
    #[error("descriptor {0} is made available again before it was used")]
    Again(u16),
    /// A chain is malformed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A buffer could not be reached although its chain was checked.
    #[error("buffer is unusable: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The request itself breaks its device's format so badly that there is nowhere to put an error.
    #[error("{0}")]
    Request(&'static str),
}

/// What a driver reads and writes of one queue in the common configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueRegisters {
    /// Entries; a power of two once the queue is enabled.
    pub size: u16,
    /// MSI-X vector, or [`NO_VECTOR`].
    pub vector: u16,
    /// Guest physical address of the descriptor table.
    pub descriptor_area: u64,
    /// Guest physical address of the available ring.
    pub driver_area: u64,
    /// Guest physical address of the used ring.
    pub device_area: u64,
}

/// A virtqueue. See the [module documentation](self).
#[derive(Debug)]
pub struct Virtqueue {
    max_size: u16,
    registers: QueueRegisters,
    /// Present while the queue is enabled.
    ring: Option<Queue>,
    /// The driver asked for a reset of this queue and requests are still in flight.
    resetting: bool,
    /// The driver stopped this queue, by `queue_status` (S0).
    stopped: bool,
    /// Where the driver wants the queue to start, or to go on after a stop: an index in the available ring (S0-10).
    start: Option<u16>,
    /// Heads of the chains that were fetched and not yet returned, in order. The only record of them.
    in_flight: VecDeque<u16>,
    /// Heads of the chains that were fetched and given up, in order.
    owned: VecDeque<u16>,
    /// Chains were used since the driver was last notified.
    unsignalled: bool,
    /// The queue comes from a saved state, which does not tell whether the driver was notified of everything.
    owes_signal: bool,
    /// The device found the ring empty at this available index, and the driver was not yet asked for a kick. What
    /// was put back since then does not count as news.
    starved: Option<u16>,
}

impl Virtqueue {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            registers: default_registers(max_size),
            ring: None,
            resetting: false,
            stopped: false,
            start: None,
            in_flight: VecDeque::new(),
            owned: VecDeque::new(),
            unsignalled: false,
            owes_signal: false,
            starved: None,
        }
    }

    /// The largest size the driver may choose.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The registers as the driver sees them.
    pub fn registers(&self) -> &QueueRegisters {
        &self.registers
    }

    /// The registers, for a driver's write. The vector may change at any time; the rest only takes effect, and
    /// should only be written, while the queue is disabled.
    pub(super) fn registers_mut(&mut self) -> &mut QueueRegisters {
        &mut self.registers
    }

    /// True from `queue_enable` until the queue or the device is reset.
    pub fn is_enabled(&self) -> bool {
        self.ring.is_some()
    }

    /// True while a reset of this queue waits for requests in flight.
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// True while the queue may be worked on, as far as it is concerned. One that is to stop still has to do what it was
    /// given back.
    pub(super) fn is_usable(&self) -> bool {
        self.ring.is_some() && !self.resetting && !(self.stopped && self.owned.is_empty())
    }

    /// `queue_status`: false if the queue is disabled, or stopped with nothing in flight (S0-4, S0-5). Chains that were
    /// given up are none the driver may do without: `last_avail_idx` is beyond them.
    pub fn is_running(&self) -> bool {
        let stands = self.stopped && self.is_drained() && self.owned.is_empty();
        self.ring.is_some() && !stands
    }

    /// `last_avail_idx` of a queue that does not run: the available-ring entry that is fetched next (S0-9).
    pub fn next_available(&self) -> u16 {
        let ring = || self.ring.as_ref().map_or(0, QueueT::next_avail);
        self.start.unwrap_or_else(ring)
    }

    /// The driver sets `last_avail_idx` of a queue that does not run (S0-8, G0-g).
    pub(super) fn set_next_available(&mut self, index: u16) {
        if !self.is_running() {
            self.start = Some(index);
        }
    }

    /// The driver writes 0 to `queue_status`. Nothing happens while the queue is disabled (S0-6).
    pub(super) fn stop(&mut self) {
        self.stopped = self.ring.is_some();
    }

    /// The driver writes 1 to `queue_status`. True if the queue goes on.
    pub(super) fn resume(&mut self) -> bool {
        std::mem::take(&mut self.stopped)
    }

    /// Moves to the index the driver set, if it did. Where it left the used ring is in that ring (G0-l), which may not be
    /// looked at before the queue is worked on.
    fn go_to_start(&mut self, view: &View) -> Result<(), RingError> {
        if let (Some(ring), Some(start)) = (&mut self.ring, self.start.take()) {
            let used = GuestAddress(ring.used_ring().wrapping_add(USED_INDEX));
            let used: u16 = view.load(used, Ordering::Acquire)?;
            ring.set_next_avail(start);
            ring.set_next_used(u16::from_le(used));
        }
        Ok(())
    }

    /// Starts the ring with the addresses in the registers, at index 0 or where the driver said.
    pub(super) fn enable(&mut self, view: &View, event_index: bool) -> Result<(), RingError> {
        self.ring = Some(make_ring(self.max_size, &self.registers, view)?);
        self.set_event_index(event_index);
        Ok(())
    }

    /// What moves with this queue. Chains in flight are the function's, as those it gave up.
    pub(super) fn save(&self) -> QueueState {
        let registers = self.registers;
        QueueState {
            size: registers.size,
            vector: registers.vector,
            descriptor_area: registers.descriptor_area,
            driver_area: registers.driver_area,
            device_area: registers.device_area,
            enabled: self.is_enabled(),
            stopped: self.stopped,
            next_available: self.next_available(),
            next_used: self.ring.as_ref().map_or(0, QueueT::next_used),
            restarts: self.start.is_some(),
            owned: self.in_flight.iter().chain(&self.owned).copied().collect(),
        }
    }

    /// A queue in the state `saved`. Event suppression is left for [`Self::set_event_index`].
    pub(super) fn restored(
        max_size: u16,
        saved: &QueueState,
        view: &View,
    ) -> Result<Self, RingError> {
        let mut queue = Self::new(max_size);
        queue.registers = QueueRegisters {
            size: saved.size,
            vector: saved.vector,
            descriptor_area: saved.descriptor_area,
            driver_area: saved.driver_area,
            device_area: saved.device_area,
        };
        if saved.enabled {
            let mut ring = make_ring(max_size, &queue.registers, view)?;
            ring.set_next_avail(saved.next_available);
            ring.set_next_used(saved.next_used);
            queue.ring = Some(ring);
            queue.stopped = saved.stopped;
            queue.owned = saved.owned.iter().copied().collect();
        }
        queue.start = Some(saved.next_available).filter(|_| saved.restarts);
        Ok(queue)
    }

    pub(super) fn set_event_index(&mut self, enabled: bool) {
        if let Some(ring) = &mut self.ring {
            ring.set_event_idx(enabled);
        }
    }

    /// The driver may not have been notified of everything that was used: it is notified once more.
    pub(super) fn signal_again(&mut self) {
        self.owes_signal = self.ring.is_some();
    }

    /// True if the driver was not notified of everything that was used, or perhaps not.
    pub(super) fn is_unsignalled(&self) -> bool {
        self.unsignalled || self.owes_signal
    }

    /// The driver was notified of everything that was used, but not if this `owes` it that.
    pub(super) fn set_unsignalled(&mut self, owes: bool) {
        self.unsignalled = false;
        self.owes_signal = owes && self.ring.is_some();
    }

    /// Asks for a reset of this queue; [`Self::finish_reset`] completes it once nothing is in flight.
    pub(super) fn request_reset(&mut self) {
        self.resetting = self.ring.is_some();
        self.start = None;
    }

    /// Completes a requested reset if nothing is in flight. The registers return to their defaults.
    pub(super) fn finish_reset(&mut self) -> bool {
        let ready = self.resetting && self.is_drained();
        if ready {
            *self = Self::new(self.max_size);
        }
        ready
    }

    /// Fetches the next chain: one the function still owns, or the next available one. `None` if there is neither, or the
    /// queue may not be worked on.
    pub(super) fn pop(&mut self, view: &View) -> Result<Option<Chain>, RingError> {
        if !self.is_usable() {
            return Ok(None);
        }
        self.go_to_start(view)?;
        let Some(ring) = &mut self.ring else {
            return Ok(None);
        };
        let table = Table {
            start: GuestAddress(ring.desc_table()),
            len: ring.size(),
        };
        let chain = match self.owned.front() {
            Some(head) => {
                let chain = Chain::parse(view, table, Head(*head))?.fetched_again();
                self.owned.pop_front();
                chain
            }
            None if self.stopped => return Ok(None),
            None => match ring.iter(&**view).map_err(RingError::Available)?.next() {
                Some(found) => {
                    let head = found.head_index();
                    if self.in_flight.contains(&head) {
                        return Err(RingError::Again(head));
                    }
                    Chain::parse(view, table, Head(head))?
                }
                None => {
                    self.starved = Some(ring.next_avail());
                    return Ok(None);
                }
            },
        };
        self.in_flight.push_back(chain.head().0);
        self.starved = None;
        Ok(Some(chain))
    }

    /// Takes back the chain that was popped last, as if it had not been fetched.
    pub(super) fn unpop(&mut self, chain: &Chain) {
        if !self.leave(chain.head()) {
            return;
        }
        if chain.was_fetched_again() {
            self.owned.push_front(chain.head().0);
        } else if let Some(ring) = &mut self.ring {
            ring.go_to_previous_position();
        }
    }

    /// The device gives up a chain whose execution has not begun; it stays the function's.
    pub(super) fn recall(&mut self, chain: &Chain) {
        if self.leave(chain.head()) {
            self.owned.push_front(chain.head().0);
        }
    }

    /// True if chains were fetched that the device is to execute anew.
    pub(super) fn owns_chains(&self) -> bool {
        !self.owned.is_empty()
    }

    /// True if no chain is in flight.
    pub(super) fn is_drained(&self) -> bool {
        self.in_flight.is_empty()
    }

    /// A chain is no longer in flight. False if it was not: the device returns what it does not have.
    fn leave(&mut self, head: Head) -> bool {
        // Devices that work in order, as most do, return the first.
        let found = self.in_flight.iter().position(|h| *h == head.0);
        debug_assert!(found.is_some(), "a chain left that was never fetched");
        found.and_then(|at| self.in_flight.remove(at)).is_some()
    }

    /// Lets go of a chain without the driver hearing of it.
    pub(super) fn forget(&mut self, head: Head) {
        self.leave(head);
    }

    /// Returns a chain to the driver with `len` bytes written.
    pub(super) fn push(&mut self, view: &View, head: Head, len: u32) -> Result<(), RingError> {
        if !self.leave(head) {
            return Ok(());
        }
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        ring.add_used(&**view, head.0, len)
            .map_err(RingError::Used)?;
        self.unsignalled = true;
        Ok(())
    }

    /// Tells the driver not to kick while the ring is being worked on.
    pub(super) fn disable_kicks(&mut self, view: &View) -> Result<(), RingError> {
        self.starved = None;
        match &mut self.ring {
            Some(ring) => ring.disable_notification(&**view).map_err(RingError::Used),
            None => Ok(()),
        }
    }

    /// True if the device found the ring empty since kicks were last asked for, or declined.
    pub(super) fn is_starved(&self) -> bool {
        self.starved.is_some() && self.is_usable()
    }

    /// Asks for a kick when the next chain is made available. True if one already is: one the device has not seen,
    /// since those it saw and put back are waiting for more.
    pub(super) fn enable_kicks(&mut self, view: &View) -> Result<bool, RingError> {
        let seen = self.starved.take();
        let Some(ring) = &mut self.ring else {
            return Ok(false);
        };
        let next = ring.next_avail();
        ring.set_next_avail(seen.unwrap_or(next));
        let outcome = ring.enable_notification(&**view);
        ring.set_next_avail(next);
        outcome.map_err(RingError::Used)
    }

    /// True if chains were used since the last call and the driver wants to hear of it.
    pub(super) fn take_signal(&mut self, view: &View) -> Result<bool, RingError> {
        if std::mem::take(&mut self.owes_signal) {
            self.unsignalled = false;
            return Ok(self.ring.is_some());
        }
        if !std::mem::take(&mut self.unsignalled) {
            return Ok(false);
        }
        let Some(ring) = &mut self.ring else {
            return Ok(false);
        };
        let wanted = ring
            .needs_notification(&**view)
            .map_err(RingError::Available)?;
        if ring.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags: u16 = view
            .load(GuestAddress(ring.avail_ring()), Ordering::Relaxed)
            .map(u16::from_le)?;
        Ok(flags & AVAIL_NO_INTERRUPT == 0)
    }
}

/// The ring that `registers` describe, at index 0, if all of it is guest memory.
fn make_ring(max_size: u16, registers: &QueueRegisters, view: &View) -> Result<Queue, RingError> {
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
    let mut ring = Queue::new(max_size).map_err(RingError::Available)?;
    ring.try_set_size(registers.size)
        .and_then(|()| ring.try_set_desc_table_address(descriptors))
        .and_then(|()| ring.try_set_avail_ring_address(available))
        .and_then(|()| ring.try_set_used_ring_address(used))
        .map_err(RingError::Available)?;
    ring.set_ready(true);
    Ok(ring)
}

fn default_registers(max_size: u16) -> QueueRegisters {
    QueueRegisters {
        size: max_size,
        vector: NO_VECTOR,
        descriptor_area: 0,
        driver_area: 0,
        device_area: 0,
    }
}
