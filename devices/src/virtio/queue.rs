//! One virtqueue: the registers a transport shows, and the ring once the queue is enabled.
//!
//! Ring mechanics (descriptor walking, used ring, event index) are the `virtio-queue` crate's; this module adds what
//! it leaves out: the MSI-X vector, reset as a process, `VIRTQ_AVAIL_F_NO_INTERRUPT`, and errors instead of silence.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::chain::{Chain, ChainError, Head};
use crate::memory::View;

/// The MSI-X vector value that means "no interrupt" (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// Bit 0 of the available ring's flags: the driver wants no interrupt (only without EVENT_IDX).
const AVAIL_NO_INTERRUPT: u16 = 1;

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
    /// Chains that were fetched and not yet returned. The only count of them.
    in_flight: u32,
    /// Chains were used since the driver was last notified.
    unsignalled: bool,
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
            in_flight: 0,
            unsignalled: false,
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

    /// Index of the next available-ring entry the device will fetch; 0 while disabled.
    pub fn next_available(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::next_avail)
    }

    /// Index of the next used-ring entry the device will write; 0 while disabled.
    pub fn next_used(&self) -> u16 {
        self.ring.as_ref().map_or(0, QueueT::next_used)
    }

    /// Starts the ring at index 0 with the addresses in the registers.
    pub(super) fn enable(&mut self, view: &View, event_index: bool) -> Result<(), RingError> {
        let size = u64::from(self.registers.size);
        let area = |area, address: u64, align: u64, len: u64| {
            let usable = address.is_multiple_of(align)
                && address != 0
                && view.contains(GuestAddress(address), len as usize);
            usable
                .then_some(GuestAddress(address))
                .ok_or(RingError::Area { area, address })
        };
        let descriptors = area(
            "descriptor table",
            self.registers.descriptor_area,
            16,
            16 * size,
        )?;
        let available = area(
            "available ring",
            self.registers.driver_area,
            2,
            6 + 2 * size,
        )?;
        let used = area("used ring", self.registers.device_area, 4, 6 + 8 * size)?;
        let mut ring = Queue::new(self.max_size).map_err(RingError::Available)?;
        ring.try_set_size(self.registers.size)
            .and_then(|()| ring.try_set_desc_table_address(descriptors))
            .and_then(|()| ring.try_set_avail_ring_address(available))
            .and_then(|()| ring.try_set_used_ring_address(used))
            .map_err(RingError::Available)?;
        ring.set_event_idx(event_index);
        ring.set_ready(true);
        self.ring = Some(ring);
        Ok(())
    }

    pub(super) fn set_event_index(&mut self, enabled: bool) {
        if let Some(ring) = &mut self.ring {
            ring.set_event_idx(enabled);
        }
    }

    /// Asks for a reset of this queue; [`Self::finish_reset`] completes it once nothing is in flight.
    pub(super) fn request_reset(&mut self) {
        self.resetting = self.ring.is_some();
    }

    /// Completes a requested reset if nothing is in flight. The registers return to their defaults.
    pub(super) fn finish_reset(&mut self) -> bool {
        let ready = self.resetting && self.is_drained();
        if ready {
            *self = Self::new(self.max_size);
        }
        ready
    }

    /// Fetches the next available chain. `None` if the ring is empty or the queue disabled.
    pub(super) fn pop(&mut self, view: &View) -> Result<Option<Chain>, RingError> {
        if self.resetting {
            return Ok(None);
        }
        let Some(ring) = &mut self.ring else {
            return Ok(None);
        };
        let next = ring.iter(&**view).map_err(RingError::Available)?.next();
        match next {
            Some(descriptors) => {
                let chain = Chain::parse(view, descriptors)?;
                self.in_flight += 1;
                self.starved = None;
                Ok(Some(chain))
            }
            None => {
                self.starved = Some(ring.next_avail());
                Ok(None)
            }
        }
    }

    /// Takes back the chain that was popped last, as if it had not been fetched.
    pub(super) fn unpop(&mut self) {
        if self.leave()
            && let Some(ring) = &mut self.ring
        {
            ring.go_to_previous_position();
        }
    }

    /// True if every chain that was fetched was returned.
    pub(super) fn is_drained(&self) -> bool {
        self.in_flight == 0
    }

    /// A chain is no longer in flight. False if none was: the device returns what it does not have.
    fn leave(&mut self) -> bool {
        debug_assert!(self.in_flight > 0, "a chain left that was never fetched");
        let left = self.in_flight.checked_sub(1);
        self.in_flight = left.unwrap_or(0);
        left.is_some()
    }

    /// Lets go of a chain without the driver hearing of it.
    pub(super) fn forget(&mut self) {
        self.leave();
    }

    /// Returns a chain to the driver with `len` bytes written.
    pub(super) fn push(&mut self, view: &View, head: Head, len: u32) -> Result<(), RingError> {
        if !self.leave() {
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
        self.starved.is_some() && !self.resetting
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

fn default_registers(max_size: u16) -> QueueRegisters {
    QueueRegisters {
        size: max_size,
        vector: NO_VECTOR,
        descriptor_area: 0,
        driver_area: 0,
        device_area: 0,
    }
}
