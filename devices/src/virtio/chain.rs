//! A descriptor chain, taken from the ring as a whole and checked before a device sees it.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GuestRead, GuestWrite, View};

/// Names a chain that was fetched: with it the chain goes back to the ring it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// What the driver knows the chain by: the descriptor it starts with in a split ring, its buffer id in a packed one.
    pub(super) id: u16,
    /// Places in a packed ring that it takes; 1 in a split ring.
    pub(super) slots: u16,
}

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

/// One contiguous guest buffer; checked to be RAM when the chain was taken.
type Buffer = (GuestAddress, u32);

/// A checked descriptor chain: device-readable buffers, then device-writable ones.
///
/// The chain owns its list of buffers, so it can be handed to another thread while the guest scribbles over its
/// descriptor table. It must go back to the ring it came from (see [`Io::push`](super::Io::push)).
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    ticket: Ticket,
    again: bool,
    buffers: Buffers,
}

/// The buffers of a chain. Cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Buffers {
    all: List,
    /// Number of device-readable buffers at the start of `all`.
    readable: usize,
}

/// Buffers that need no allocation: those of a frame, or of a request with its header and its status.
const FEW: usize = 3;

/// A list of buffers. Equal ones have the same form.
#[derive(Clone, Debug, PartialEq, Eq)]
enum List {
    /// The first so many of these; the others are zero.
    Few([Buffer; FEW], usize),
    Many(Arc<[Buffer]>),
}

impl List {
    fn new(buffers: &[Buffer]) -> Self {
        let mut few = [(GuestAddress(0), 0); FEW];
        match few.get_mut(..buffers.len()) {
            Some(first) => {
                first.copy_from_slice(buffers);
                Self::Few(few, buffers.len())
            }
            None => Self::Many(buffers.into()),
        }
    }

    fn as_slice(&self) -> &[Buffer] {
        match self {
            Self::Few(few, len) => few.get(..*len).unwrap_or_default(),
            Self::Many(many) => many,
        }
    }
}

impl Buffers {
    /// Address and length of each, and whether the device may write to it.
    pub fn iter(&self) -> impl Iterator<Item = (GuestAddress, u32, bool)> + '_ {
        let all = self.all.as_slice().iter().enumerate();
        all.map(|(index, (start, len))| (*start, *len, index >= self.readable))
    }
}

/// Room for buffers that is kept for the next chain.
const KEPT: usize = 256;

/// Buffers of a chain that is being taken apart: each is checked as it comes. Used for one chain after the other.
#[derive(Debug, Default)]
pub(super) struct Draft {
    buffers: Vec<Buffer>,
    readable: usize,
    total: u32,
}

impl Draft {
    /// Begins with no buffers.
    pub fn clear(&mut self) {
        self.buffers.clear();
        self.buffers.shrink_to(KEPT);
        (self.readable, self.total) = (0, 0);
    }

    /// Adds what the next descriptor says. One without a length is no buffer.
    pub fn add(
        &mut self,
        view: &View,
        start: GuestAddress,
        len: u32,
        is_writable: bool,
    ) -> Result<(), ChainError> {
        let total = self.total.checked_add(len).ok_or(ChainError::Endless)?;
        if !is_writable && self.readable != self.buffers.len() {
            return Err(ChainError::Order);
        }
        if len == 0 {
            return Ok(());
        }
        if !view.contains(start, len as usize) {
            let start = start.0;
            return Err(ChainError::Unmapped { start, len });
        }
        self.total = total;
        self.buffers.push((start, len));
        if !is_writable {
            self.readable = self.buffers.len();
        }
        Ok(())
    }

    /// All that were added.
    pub fn finish(&self) -> Buffers {
        Buffers {
            all: List::new(&self.buffers),
            readable: self.readable,
        }
    }
}

impl Chain {
    /// The chain with these buffers, just fetched.
    pub(super) fn new(ticket: Ticket, buffers: Buffers) -> Self {
        Self {
            ticket,
            again: false,
            buffers,
        }
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

    /// What it goes back to its ring with.
    pub fn ticket(&self) -> Ticket {
        self.ticket
    }

    /// Number of guest buffers it is made of: what it costs to hold on to it.
    pub fn buffer_count(&self) -> usize {
        self.buffers.all.as_slice().len()
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
        let Buffers { all, readable } = &self.buffers;
        all.as_slice().get(..*readable).unwrap_or_default()
    }

    fn writable(&self) -> &[Buffer] {
        let Buffers { all, readable } = &self.buffers;
        all.as_slice().get(*readable..).unwrap_or_default()
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
