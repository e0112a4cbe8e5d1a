//! A descriptor chain, taken from the ring as a whole and checked before a device sees it.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestRead, GuestWrite, View};

/// Index of the descriptor a chain starts with; names the chain in the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Head(pub u16);

/// Why a chain cannot be used. The driver broke the rules, so the device asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// The chain loops, leaves its table, is longer than 4 GiB, or its indirect table is malformed.
    #[error("descriptor chain does not end")]
    Endless,
    /// A device-readable descriptor follows a device-writable one.
    #[error("device-readable descriptor after a device-writable one")]
    Order,
    /// A buffer lies outside guest memory.
    #[error("buffer {start:#x}+{len:#x} is outside guest memory")]
    Unmapped {
        /// Guest physical address of the buffer.
        start: u64,
        /// Its length in bytes.
        len: u32,
    },
}

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// A descriptor table: that of a ring, or an indirect one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    /// Guest physical address.
    pub start: GuestAddress,
    /// Entries.
    pub len: u16,
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
}

/// One contiguous guest buffer; checked to be RAM when the chain was taken.
type Buffer = (GuestAddress, u32);

/// A checked descriptor chain: device-readable buffers, then device-writable ones.
///
/// The chain owns its list of buffers, so it can be handed to another thread while the guest scribbles over its
/// descriptor table. It must go back to the ring it came from (see [`Io::push`](super::Io::push)).
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    head: Head,
    again: bool,
    buffers: Vec<Buffer>,
    /// Number of device-readable buffers at the start of `buffers`.
    readable: usize,
}

impl Chain {
    /// Takes the chain that starts at `head` apart and checks all of it.
    pub(super) fn parse(view: &View, table: Table, head: Head) -> Result<Self, ChainError> {
        let mut buffers = Vec::new();
        let mut readable = 0;
        let mut total = 0u32;
        let mut walk = (table, head.0);
        let mut indirect = false;
        // A chain cannot be longer than its table: one that goes on has a loop.
        let mut left = table.len;
        loop {
            let descriptor = walk.0.entry(view, walk.1).filter(|_| left > 0);
            let descriptor = descriptor.ok_or(ChainError::Endless)?;
            left -= 1;
            if descriptor.refers_to_indirect_table() {
                let inner = Table::indirect(&descriptor).filter(|_| !indirect);
                let inner = inner.ok_or(ChainError::Endless)?;
                (walk, indirect, left) = ((inner, 0), true, inner.len);
                continue;
            }
            let (start, len) = (descriptor.addr(), descriptor.len());
            total = total.checked_add(len).ok_or(ChainError::Endless)?;
            if !descriptor.is_write_only() && readable != buffers.len() {
                return Err(ChainError::Order);
            }
            if len != 0 {
                if !view.contains(start, len as usize) {
                    let start = start.0;
                    return Err(ChainError::Unmapped { start, len });
                }
                buffers.push((start, len));
                if !descriptor.is_write_only() {
                    readable = buffers.len();
                }
            }
            if !descriptor.has_next() {
                break;
            }
            walk.1 = descriptor.next();
        }
        Ok(Self {
            head,
            again: false,
            buffers,
            readable,
        })
    }

    /// The same chain, fetched for the second time (see [`Virtqueue`](super::Virtqueue)).
    pub(super) fn fetched_again(mut self) -> Self {
        self.again = true;
        self
    }

    /// True for a chain that had been fetched before the function was stopped.
    pub(super) fn was_fetched_again(&self) -> bool {
        self.again
    }

    /// The chain's name in the used ring.
    pub fn head(&self) -> Head {
        self.head
    }

    /// Number of guest buffers it is made of: what it costs to hold on to it.
    pub fn buffer_count(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        total(self.readable())
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        total(self.writable())
    }

    fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Copies device-readable bytes from `offset` on into `out`; returns how many there were.
    pub fn read(
        &self,
        view: &View,
        offset: u64,
        out: &mut [u8],
    ) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (start, len) in pieces(self.readable(), offset, out.len() as u64) {
            let piece = out.get_mut(done..done + len).unwrap_or_default();
            view.read_slice(piece, start)?;
            done += len;
        }
        Ok(done)
    }

    /// Copies `data` into the device-writable bytes from `offset` on; returns how many bytes fitted.
    pub fn write(&self, view: &View, offset: u64, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (start, len) in pieces(self.writable(), offset, data.len() as u64) {
            let piece = data.get(done..done + len).unwrap_or_default();
            view.write_slice(piece, start)?;
            done += len;
        }
        Ok(done)
    }

    /// The device-readable bytes `offset..offset + len` as slices of guest memory, for scatter-gather I/O.
    pub fn readable_slices<'v>(
        &self,
        view: &'v View,
        offset: u64,
        len: u64,
    ) -> Result<Vec<GuestRead<'v>>, GuestMemoryError> {
        pieces(self.readable(), offset, len)
            .flat_map(|(start, len)| view.lend_to_read(start, len))
            .collect()
    }

    /// The device-writable bytes `offset..offset + len` as slices of guest memory, for scatter-gather I/O.
    ///
    /// Each marks its pages when it is dropped: see [`GuestWrite`].
    pub fn writable_slices<'v>(
        &self,
        view: &'v View,
        offset: u64,
        len: u64,
    ) -> Result<Vec<GuestWrite<'v>>, GuestMemoryError> {
        pieces(self.writable(), offset, len)
            .flat_map(|(start, len)| view.lend_to_write(start, len))
            .collect()
    }
}

fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|(_, len)| u64::from(*len)).sum()
}

/// The parts of `buffers` that make up bytes `offset..offset + len` of their concatenation.
fn pieces(
    buffers: &[Buffer],
    offset: u64,
    len: u64,
) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
    let end = offset.saturating_add(len);
    let mut at = 0u64;
    buffers.iter().filter_map(move |(start, size)| {
        let (from, to) = (at, at + u64::from(*size));
        at = to;
        let (first, last) = (from.max(offset), to.min(end));
        (first < last).then(|| {
            (
                GuestAddress(start.0 + (first - from)),
                (last - first) as usize,
            )
        })
    })
}
