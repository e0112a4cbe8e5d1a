//! The split virtqueue, from the driver's side (virtio 1.4, "Split Virtqueues").

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use crate::access::{Dma, DmaExt};

/// Bits of a descriptor's flags.
pub mod descriptor_flag {
    /// The chain goes on at `next`.
    pub const NEXT: u16 = 1;
    /// The device writes the buffer; otherwise it reads it.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Bits of the available ring's flags.
pub mod avail_flag {
    /// The driver wants no interrupt.
    pub const NO_INTERRUPT: u16 = 1;
}

/// Bits of the used ring's flags.
pub mod used_flag {
    /// The device wants no notification.
    pub const NO_NOTIFY: u16 = 1;
}

/// A descriptor as it stands in its table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Address of the buffer.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// See [`descriptor_flag`].
    pub flags: u16,
    /// The next descriptor of the chain.
    pub next: u16,
}

impl Descriptor {
    /// Bytes a descriptor takes.
    pub const SIZE: u64 = 16;

    /// Writes it to `address`.
    pub fn store(&self, dma: &impl Dma, address: u64) {
        let mut bytes = [0; 16];
        let fields: [&[u8]; 4] = [
            &self.address.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.next.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.concat()) {
            *to = from;
        }
        dma.write(address, &bytes);
    }
}

/// A buffer a driver offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Its address.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

impl Buffer {
    /// A buffer the device reads.
    pub const fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: false,
        }
    }

    /// A buffer the device writes.
    pub const fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            writable: true,
        }
    }
}

/// Where a queue is, and how many entries it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
}

impl Layout {
    /// Takes memory for a queue of `size` entries.
    pub fn allocate(dma: &impl Dma, size: u16) -> Option<Self> {
        let n = usize::from(size);
        Some(Self {
            size,
            descriptors: dma.allocate(16 * n, 16)?,
            available: dma.allocate(6 + 2 * n, 2)?,
            used: dma.allocate(6 + 8 * n, 4)?,
        })
    }

    /// Address of descriptor `index`.
    pub fn descriptor(&self, index: u16) -> u64 {
        self.descriptors
            .wrapping_add(Descriptor::SIZE * u64::from(index))
    }

    /// Address of the available ring's flags.
    pub fn avail_flags(&self) -> u64 {
        self.available
    }

    /// Address of the available ring's index.
    pub fn avail_index(&self) -> u64 {
        self.available.wrapping_add(2)
    }

    /// Address of the available ring's entry for `index`, which may be beyond the size.
    pub fn avail_entry(&self, index: u16) -> u64 {
        let slot = index % self.size.max(1);
        self.available.wrapping_add(4 + 2 * u64::from(slot))
    }

    /// Address of the index at which the driver wants an interrupt.
    pub fn used_event(&self) -> u64 {
        self.available.wrapping_add(4 + 2 * u64::from(self.size))
    }

    /// Address of the used ring's flags.
    pub fn used_flags(&self) -> u64 {
        self.used
    }

    /// Address of the used ring's index.
    pub fn used_index(&self) -> u64 {
        self.used.wrapping_add(2)
    }

    /// Address of the used ring's entry for `index`, which may be beyond the size.
    pub fn used_entry(&self, index: u16) -> u64 {
        let slot = index % self.size.max(1);
        self.used.wrapping_add(4 + 8 * u64::from(slot))
    }

    /// Address of the index at which the device wants a notification.
    pub fn avail_event(&self) -> u64 {
        self.used.wrapping_add(4 + 8 * u64::from(self.size))
    }
}

/// A chain that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The descriptor it started with.
    pub head: u16,
    /// Bytes the device wrote.
    pub len: u32,
}

/// What can go wrong with a queue, split or packed. The last three are a device that breaks the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// There are not enough free descriptors.
    #[error("no free descriptor")]
    Full,
    /// There is no memory for an indirect table.
    #[error("no memory for an indirect table")]
    NoMemory,
    /// A chain needs at least one buffer.
    #[error("a chain has no buffers")]
    Empty,
    /// The device returned a chain that it does not have.
    #[error("device used chain {0}, which is not in flight")]
    NotInFlight(u32),
    /// The device says it wrote more than it was given.
    #[error("device wrote {len} bytes to chain {head}, which has room for {room}")]
    TooLong {
        /// The chain.
        head: u16,
        /// What the device says.
        len: u32,
        /// Writable bytes of the chain.
        room: u64,
    },
    /// The device says it used more chains than are in flight.
    #[error("used index {index} is {ahead} ahead with {in_flight} chains in flight")]
    IndexJump {
        /// The device's index.
        index: u16,
        /// How far it is ahead of ours.
        ahead: u16,
        /// Chains in flight.
        in_flight: u16,
    },
}

#[derive(Debug)]
struct InFlight {
    /// Descriptors of the table to give back.
    descriptors: Vec<u16>,
    /// Writable bytes.
    room: u64,
    /// The indirect table, if it has one.
    table: Option<(u64, usize)>,
}

/// A split virtqueue. Adds chains, takes them back, and checks what the device says about them.
#[derive(Debug)]
pub struct SplitQueue<D> {
    dma: D,
    layout: Layout,
    event_index: bool,
    free: Vec<u16>,
    in_flight: BTreeMap<u16, InFlight>,
    /// Entries written to the available ring; published up to `published`.
    added: u16,
    published: u16,
    taken: u16,
    /// Indirect tables to use again: address and bytes.
    tables: Vec<(u64, usize)>,
}

impl<D: Dma> SplitQueue<D> {
    /// A new queue of `size` entries. `event_index` says whether VIRTIO_F_EVENT_IDX was negotiated. `None` if there
    /// is no memory for it.
    pub fn new(dma: D, size: u16, event_index: bool) -> Option<Self> {
        let layout = Layout::allocate(&dma, size)?;
        Some(Self {
            dma,
            layout,
            event_index,
            free: (0..size).rev().collect(),
            in_flight: BTreeMap::new(),
            added: 0,
            published: 0,
            taken: 0,
            tables: Vec::new(),
        })
    }

    /// Goes on at `index` of both rings, as if as many chains had come and gone. The queue has not been used yet.
    pub fn start_at(&mut self, index: u16) {
        self.dma.store(self.layout.avail_index(), index);
        self.dma.store(self.layout.used_index(), index);
        self.want_interrupt_at(index);
        (self.added, self.published, self.taken) = (index, index, index);
    }

    /// Where the queue is, for programming the device and for raw access.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Chains added and not yet taken back.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Entries published so far, modulo 65536.
    pub fn available(&self) -> u16 {
        self.published
    }

    /// Adds a chain of descriptors from the table. The device does not see it before [`Self::publish`].
    pub fn add(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        if buffers.is_empty() {
            return Err(QueueError::Empty);
        }
        if self.free.len() < buffers.len() {
            return Err(QueueError::Full);
        }
        let descriptors = self.free.split_off(self.free.len() - buffers.len());
        let table = self.layout.descriptors;
        self.chain(table, &descriptors, buffers);
        self.enter(descriptors, buffers, None)
    }

    /// Adds a chain as one descriptor that points to a table of its own.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        if buffers.is_empty() {
            return Err(QueueError::Empty);
        }
        if self.free.is_empty() {
            return Err(QueueError::Full);
        }
        let bytes = buffers.len() * Descriptor::SIZE as usize;
        let spare = self.tables.iter().position(|(_, room)| *room >= bytes);
        let (table, room) = match spare {
            Some(at) => self.tables.swap_remove(at),
            None => (
                self.dma.allocate(bytes, 16).ok_or(QueueError::NoMemory)?,
                bytes,
            ),
        };
        let order: Vec<u16> = (0..buffers.len() as u16).collect();
        self.chain(table, &order, buffers);
        let descriptors: Vec<u16> = self.free.pop().into_iter().collect();
        for index in &descriptors {
            let descriptor = Descriptor {
                address: table,
                len: bytes as u32,
                flags: descriptor_flag::INDIRECT,
                next: 0,
            };
            descriptor.store(&self.dma, self.layout.descriptor(*index));
        }
        self.enter(descriptors, buffers, Some((table, room)))
    }

    /// Writes `buffers` as a chain into `table`, at the indices in `order`.
    fn chain(&self, table: u64, order: &[u16], buffers: &[Buffer]) {
        for (at, (index, buffer)) in order.iter().zip(buffers).enumerate() {
            let next = order.get(at + 1);
            let mut flags = 0;
            if next.is_some() {
                flags |= descriptor_flag::NEXT;
            }
            if buffer.writable {
                flags |= descriptor_flag::WRITE;
            }
            let descriptor = Descriptor {
                address: buffer.address,
                len: buffer.len,
                flags,
                next: next.copied().unwrap_or_default(),
            };
            descriptor.store(&self.dma, table + Descriptor::SIZE * u64::from(*index));
        }
    }

    fn enter(
        &mut self,
        descriptors: Vec<u16>,
        buffers: &[Buffer],
        table: Option<(u64, usize)>,
    ) -> Result<u16, QueueError> {
        let head = *descriptors.first().ok_or(QueueError::Empty)?;
        let writable = buffers.iter().filter(|b| b.writable);
        let room = writable.map(|b| u64::from(b.len)).sum();
        let chain = InFlight {
            descriptors,
            room,
            table,
        };
        self.in_flight.insert(head, chain);
        self.dma.set(self.layout.avail_entry(self.added), head);
        self.added = self.added.wrapping_add(1);
        Ok(head)
    }

    /// Shows the device what was added. True if it wants to be notified of it.
    #[must_use = "a device that wants a notification and gets none does not look"]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        self.dma.store(self.layout.avail_index(), self.added);
        self.published = self.added;
        // The index must be visible before the device's wish is read, or both sides may wait for each other.
        fence(Ordering::SeqCst);
        if self.event_index {
            let event = self.dma.load(self.layout.avail_event());
            passed(event, self.published, old)
        } else {
            self.dma.load(self.layout.used_flags()) & used_flag::NO_NOTIFY == 0
        }
    }

    /// Takes back a chain, if the device used one.
    pub fn take(&mut self) -> Result<Option<Used>, QueueError> {
        let index = self.dma.load(self.layout.used_index());
        let ahead = index.wrapping_sub(self.taken);
        let in_flight = self.in_flight.len() as u16;
        if ahead > in_flight {
            return Err(QueueError::IndexJump {
                index,
                ahead,
                in_flight,
            });
        }
        if ahead == 0 {
            return Ok(None);
        }
        let entry = self.layout.used_entry(self.taken);
        let id: u32 = self.dma.get(entry);
        let len: u32 = self.dma.get(entry + 4);
        let (head, chain) = u16::try_from(id)
            .ok()
            .and_then(|head| Some((head, self.in_flight.remove(&head)?)))
            .ok_or(QueueError::NotInFlight(id))?;
        self.taken = self.taken.wrapping_add(1);
        self.free.extend(chain.descriptors);
        self.tables.extend(chain.table);
        if u64::from(len) > chain.room {
            return Err(QueueError::TooLong {
                head,
                len,
                room: chain.room,
            });
        }
        Ok(Some(Used { head, len }))
    }

    /// Asks the device to interrupt for every chain, or for none. With the event index "none" means: at the index
    /// that is as far away as can be.
    pub fn want_interrupts(&mut self, wanted: bool) {
        if self.event_index {
            let at = if wanted {
                self.taken
            } else {
                self.taken.wrapping_sub(1)
            };
            self.want_interrupt_at(at);
        } else {
            let flags = if wanted { 0 } else { avail_flag::NO_INTERRUPT };
            self.dma.store(self.layout.avail_flags(), flags);
        }
        fence(Ordering::SeqCst);
    }

    /// Asks for an interrupt when the device has written the used entry `index` (event index only).
    pub fn want_interrupt_at(&mut self, index: u16) {
        self.dma.store(self.layout.used_event(), index);
    }

    /// Forgets everything and zeroes the rings, for use after a reset of the queue or the device.
    pub fn clear(&mut self) {
        let n = usize::from(self.layout.size);
        self.dma.write(self.layout.descriptors, &vec![0; 16 * n]);
        self.dma.write(self.layout.available, &vec![0; 6 + 2 * n]);
        self.dma.write(self.layout.used, &vec![0; 6 + 8 * n]);
        self.free = (0..self.layout.size).rev().collect();
        let chains = std::mem::take(&mut self.in_flight);
        self.tables
            .extend(chains.into_values().filter_map(|c| c.table));
        (self.added, self.published, self.taken) = (0, 0, 0);
    }
}

/// True if going from `old` to `new` passes `event`: the rule of the event index.
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_passed_when_it_lies_in_what_was_added() {
        for (event, new, old, expected) in [
            (0, 1, 0, true),
            (1, 1, 0, false),
            (0, 0, 0, false),
            (0xffff, 1, 0xfffe, true),
            (5, 4, 0, false),
            (3, 4, 0, true),
        ] {
            assert_eq!(passed(event, new, old), expected, "{event} {new} {old}");
        }
    }
}
