//! A virtqueue of either kind.

use super::feature;
use super::packed::PackedQueue;
use super::ring::{Buffer, Layout, QueueError, SplitQueue, Used};
use crate::access::Dma;

/// A virtqueue of the kind that was negotiated.
#[derive(Debug)]
pub enum Queue<D> {
    /// Split rings.
    Split(SplitQueue<D>),
    /// A packed ring.
    Packed(PackedQueue<D>),
}

impl<D: Dma> Queue<D> {
    /// A new queue of `size` entries for a driver that accepted `features`. `None` if there is no memory for it.
    pub fn new(dma: D, size: u16, features: u64) -> Option<Self> {
        let event_index = features & feature::EVENT_IDX != 0;
        Some(match features & feature::RING_PACKED {
            0 => Self::Split(SplitQueue::new(dma, size, event_index)?),
            _ => Self::Packed(PackedQueue::new(dma, size, event_index)?),
        })
    }

    /// Its size and its three areas, as the registers have them.
    pub fn layout(&self) -> Layout {
        match self {
            Self::Split(queue) => *queue.layout(),
            Self::Packed(queue) => queue.layout().areas(),
        }
    }

    /// Chains added and not yet taken back.
    pub fn in_flight(&self) -> usize {
        match self {
            Self::Split(queue) => queue.in_flight(),
            Self::Packed(queue) => queue.in_flight(),
        }
    }

    /// Adds a chain; what it will be called when it comes back. The device does not see it before [`Self::publish`].
    pub fn add(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        match self {
            Self::Split(queue) => queue.add(buffers),
            Self::Packed(queue) => queue.add(buffers),
        }
    }

    /// Adds a chain as one descriptor that points to a table of its own.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        match self {
            Self::Split(queue) => queue.add_indirect(buffers),
            Self::Packed(queue) => queue.add_indirect(buffers),
        }
    }

    /// Shows the device what was added. True if it wants to be notified of it.
    #[must_use = "a device that wants a notification and gets none does not look"]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(queue) => queue.publish(),
            Self::Packed(queue) => queue.publish(),
        }
    }

    /// Takes back a chain, if the device used one.
    pub fn take(&mut self) -> Result<Option<Used>, QueueError> {
        match self {
            Self::Split(queue) => queue.take(),
            Self::Packed(queue) => queue.take(),
        }
    }

    /// Asks the device to interrupt for every chain, or for none.
    pub fn want_interrupts(&mut self, wanted: bool) {
        match self {
            Self::Split(queue) => queue.want_interrupts(wanted),
            Self::Packed(queue) => queue.want_interrupts(wanted),
        }
    }

    /// Forgets everything and zeroes the rings, for use after a reset of the queue or the device.
    pub fn clear(&mut self) {
        match self {
            Self::Split(queue) => queue.clear(),
            Self::Packed(queue) => queue.clear(),
        }
    }
}
