//! The packed virtqueue, from the driver's side (virtio 1.4, "Packed Virtqueues").

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use super::ring::{Buffer, Layout, QueueError, Used, descriptor_flag};
use crate::access::{Dma, DmaExt};

/// Descriptor flag: the driver's wrap counter when it made the descriptor available.
const AVAIL: u16 = 1 << 7;
/// Descriptor flag: the device's wrap counter when it used the descriptor.
const USED: u16 = 1 << 15;

/// Values of the flags of an event suppression structure.
pub mod event_flag {
    /// Notify of everything.
    pub const ENABLE: u16 = 0;
    /// Notify of nothing.
    pub const DISABLE: u16 = 1;
    /// Notify of the descriptor at a position.
    pub const AT: u16 = 2;
}

/// Where a packed queue is, and how many entries it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedLayout {
    /// Entries.
    pub size: u16,
    /// Address of the descriptor ring.
    pub descriptors: u64,
    /// Address of the driver's event suppression structure.
    pub driver_events: u64,
    /// Address of the device's event suppression structure.
    pub device_events: u64,
}

impl PackedLayout {
    /// Takes memory for a queue of `size` entries.
    pub fn allocate(dma: &impl Dma, size: u16) -> Option<Self> {
        Some(Self {
            size,
            descriptors: dma.allocate(16 * usize::from(size), 16)?,
            driver_events: dma.allocate(4, 4)?,
            device_events: dma.allocate(4, 4)?,
        })
    }

    /// The areas in the places in which registers have them.
    pub fn areas(&self) -> Layout {
        Layout {
            size: self.size,
            descriptors: self.descriptors,
            available: self.driver_events,
            used: self.device_events,
        }
    }

    /// Address of descriptor `offset`.
    pub fn descriptor(&self, offset: u16) -> u64 {
        self.descriptors.wrapping_add(16 * u64::from(offset))
    }
}

/// A place in the ring: the offset of a descriptor, and the wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    offset: u16,
    wrap: bool,
}

impl Place {
    const START: Self = Self {
        offset: 0,
        wrap: true,
    };

    /// In bits 0 to 14 and 15.
    fn raw(self) -> u16 {
        self.offset | u16::from(self.wrap) << 15
    }

    fn ahead(self, by: u16, size: u16) -> Self {
        let offset = self.offset + by;
        match offset >= size {
            true => Self {
                offset: offset - size,
                wrap: !self.wrap,
            },
            false => Self { offset, ..self },
        }
    }
}

#[derive(Debug)]
struct InFlight {
    /// Descriptors of the ring that it takes.
    slots: u16,
    /// Writable bytes.
    room: u64,
}

/// A packed virtqueue. Adds chains, takes them back, and checks what the device says about them.
#[derive(Debug)]
pub struct PackedQueue<D> {
    dma: D,
    layout: PackedLayout,
    event_index: bool,
    /// Buffer ids that are not in use.
    ids: Vec<u16>,
    in_flight: BTreeMap<u16, InFlight>,
    /// Descriptors that are free.
    free: u16,
    /// Where the next chain goes.
    next: Place,
    /// The first chain that was not shown to the device, and the flags of its first descriptor.
    hidden: Option<(Place, u16)>,
    /// Descriptors that were added since the device was last shown what was.
    added: u16,
    /// Where the device uses the next chain.
    used: Place,
}

impl<D: Dma> PackedQueue<D> {
    /// A new queue of `size` entries. `event_index` says whether VIRTIO_F_EVENT_IDX was negotiated. `None` if there
    /// is no memory for it.
    pub fn new(dma: D, size: u16, event_index: bool) -> Option<Self> {
        let layout = PackedLayout::allocate(&dma, size)?;
        Some(Self {
            dma,
            layout,
            event_index,
            ids: (0..size).rev().collect(),
            in_flight: BTreeMap::new(),
            free: size,
            next: Place::START,
            hidden: None,
            added: 0,
            used: Place::START,
        })
    }

    /// Where the queue is, for programming the device and for raw access.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// Chains added and not yet taken back.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Where the next chain goes: offset in bits 0 to 14, wrap counter in bit 15.
    pub fn position(&self) -> u16 {
        self.next.raw()
    }

    /// Where the next used chain is expected, likewise.
    pub fn used_position(&self) -> u16 {
        self.used.raw()
    }

    /// Adds a chain of descriptors in the ring; its buffer id. The device does not see it before [`Self::publish`].
    pub fn add(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        let last = buffers.len().checked_sub(1).ok_or(QueueError::Empty)?;
        let entries = buffers.iter().enumerate().map(|(at, buffer)| {
            let next = if at < last { descriptor_flag::NEXT } else { 0 };
            let write = if buffer.writable {
                descriptor_flag::WRITE
            } else {
                0
            };
            (buffer.address, buffer.len, next | write)
        });
        self.enter(&entries.collect::<Vec<_>>(), buffers)
    }

    /// Adds a chain as one descriptor that points to a table of its own.
    pub fn add_indirect(&mut self, buffers: &[Buffer]) -> Result<u16, QueueError> {
        if buffers.is_empty() {
            return Err(QueueError::Empty);
        }
        let bytes = 16 * buffers.len();
        let table = self.dma.allocate(bytes, 16).ok_or(QueueError::NoMemory)?;
        for (at, buffer) in (0u64..).zip(buffers) {
            let flags = if buffer.writable {
                descriptor_flag::WRITE
            } else {
                0
            };
            self.store(table + 16 * at, (buffer.address, buffer.len, flags), 0);
        }
        let entry = (table, bytes as u32, descriptor_flag::INDIRECT);
        self.enter(&[entry], buffers)
    }

    /// Writes a descriptor but its flags, and then these.
    fn store(&self, at: u64, (address, len, flags): (u64, u32, u16), id: u16) {
        self.dma.set(at, address);
        self.dma.set(at + 8, len);
        self.dma.set(at + 12, id);
        self.dma.store(at + 14, flags);
    }

    fn enter(
        &mut self,
        entries: &[(u64, u32, u16)],
        buffers: &[Buffer],
    ) -> Result<u16, QueueError> {
        let slots = entries.len() as u16;
        if slots > self.free {
            return Err(QueueError::Full);
        }
        let id = self.ids.pop().ok_or(QueueError::Full)?;
        let size = self.layout.size;
        let start = self.next;
        for entry in entries {
            let (address, len, flags) = *entry;
            let flags = flags | if self.next.wrap { AVAIL } else { USED };
            // The device sees what was added since the last time when it sees the first of it.
            let shown = match self.hidden {
                None => {
                    self.hidden = Some((start, flags));
                    // As if it were used in the round before.
                    if self.next.wrap { 0 } else { AVAIL | USED }
                }
                Some(_) => flags,
            };
            self.store(
                self.layout.descriptor(self.next.offset),
                (address, len, shown),
                id,
            );
            self.next = self.next.ahead(1, size);
        }
        self.free -= slots;
        self.added += slots;
        let writable = buffers.iter().filter(|b| b.writable);
        let room = writable.map(|b| u64::from(b.len)).sum();
        self.in_flight.insert(id, InFlight { slots, room });
        Ok(id)
    }

    /// Shows the device what was added. True if it wants to be notified of it.
    #[must_use = "a device that wants a notification and gets none does not look"]
    pub fn publish(&mut self) -> bool {
        let Some((first, flags)) = self.hidden.take() else {
            return false;
        };
        self.dma
            .store(self.layout.descriptor(first.offset) + 14, flags);
        let added = std::mem::take(&mut self.added);
        // The flags must be visible before the device's wish is read, or both sides may wait for each other.
        fence(Ordering::SeqCst);
        let events: u32 = self.dma.get(self.layout.device_events);
        let (at, flags) = (events as u16, (events >> 16) as u16 & 3);
        match flags {
            event_flag::DISABLE => false,
            event_flag::AT if self.event_index => {
                let whole = 2 * u32::from(self.layout.size);
                let place = |raw: u16| {
                    let round = if raw >> 15 == 1 { 0 } else { whole / 2 };
                    u32::from(raw & 0x7fff) + round
                };
                let since = (place(self.next.raw()) + whole - place(at)) % whole;
                (1..=u32::from(added)).contains(&since)
            }
            _ => true,
        }
    }

    /// Takes back a chain, if the device used one.
    pub fn take(&mut self) -> Result<Option<Used>, QueueError> {
        let at = self.layout.descriptor(self.used.offset);
        let flags: u16 = self.dma.load(at + 14);
        let wrap = self.used.wrap;
        if (flags & AVAIL != 0) != wrap || (flags & USED != 0) != wrap {
            return Ok(None);
        }
        let len: u32 = self.dma.get(at + 8);
        let id: u16 = self.dma.get(at + 12);
        let chain = self.in_flight.remove(&id);
        let chain = chain.ok_or(QueueError::NotInFlight(id.into()))?;
        self.used = self.used.ahead(chain.slots, self.layout.size);
        self.free += chain.slots;
        self.ids.push(id);
        if u64::from(len) > chain.room {
            let room = chain.room;
            return Err(QueueError::TooLong {
                head: id,
                len,
                room,
            });
        }
        Ok(Some(Used { head: id, len }))
    }

    /// Asks the device to interrupt for every chain, or for none.
    pub fn want_interrupts(&mut self, wanted: bool) {
        match (wanted, self.event_index) {
            (true, true) => self.want(self.used.raw(), event_flag::AT),
            (true, false) => self.want(0, event_flag::ENABLE),
            (false, _) => self.want(0, event_flag::DISABLE),
        }
    }

    /// Asks for an interrupt when `ahead` more descriptors were used (event index only).
    pub fn want_interrupt_ahead(&mut self, ahead: u16) {
        let at = self.used.ahead(ahead, self.layout.size);
        self.want(at.raw(), event_flag::AT);
    }

    fn want(&self, at: u16, flags: u16) {
        let events = u32::from(at) | u32::from(flags) << 16;
        self.dma.set(self.layout.driver_events, events);
        fence(Ordering::SeqCst);
    }

    /// Forgets everything and zeroes the ring, for use after a reset of the queue or the device.
    pub fn clear(&mut self) {
        let size = self.layout.size;
        self.dma
            .write(self.layout.descriptors, &vec![0; 16 * usize::from(size)]);
        self.dma.write(self.layout.driver_events, &[0; 4]);
        self.dma.write(self.layout.device_events, &[0; 4]);
        self.ids = (0..size).rev().collect();
        self.in_flight.clear();
        self.free = size;
        (self.next, self.used) = (Place::START, Place::START);
        (self.hidden, self.added) = (None, 0);
    }
}
