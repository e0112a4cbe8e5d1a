//! MSI-X: the vector table, the pending bits, and delivery (PCIe Base, 6.1.4 and 7.7.2).
//!
//! A vector is *off* while MSI-X is disabled, *masked* while its own mask or the function mask is set, and *live*
//! otherwise. A signal is dropped while off, remembered as one pending bit while masked, and delivered while live.
//! The sink has a route for exactly the live vectors.
//!
//! What was remembered is owed when its vector becomes live, but delivered by [`Msix::deliver_pending`] only: whether the
//! function may send anything is not known here. Until then the pending bit stays.
//!
//! Locks: `control`, then one vector. A signal takes the lock of its vector only, so it waits at most for the route
//! change of that same vector.

pub mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::msi::{MsiMessage, MsiSink};

/// Bytes of one table entry: address (0), upper address (4), data (8), vector control (12).
pub const ENTRY_SIZE: u64 = 16;
/// Bytes of the unit the pending bits come in.
const PBA_UNIT: u64 = 8;
/// Vector Control: the vector is masked. The other bits read 0.
const VECTOR_MASKED: u32 = 1;

/// Number of vectors of a function, 1 to 2048.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VectorCount(u16);

impl VectorCount {
    /// `count` vectors, if a function can have that many.
    pub const fn new(count: u16) -> Option<Self> {
        if count >= 1 && count <= 2048 {
            Some(Self(count))
        } else {
            None
        }
    }

    /// The number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// Bytes of the table.
    pub const fn table_len(self) -> u64 {
        self.0 as u64 * ENTRY_SIZE
    }

    /// Bytes of the pending bit array.
    pub const fn pba_len(self) -> u64 {
        (self.0 as u64).div_ceil(64) * PBA_UNIT
    }
}

/// The two switches in the capability's Message Control.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// MSI-X Enable.
    pub enabled: bool,
    /// Function Mask: every vector counts as masked.
    pub function_mask: bool,
}

/// One table entry, as the guest programmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Message address; a multiple of 4.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Mask bit of Vector Control.
    pub masked: bool,
}

impl Default for Entry {
    /// After reset a vector is masked.
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            masked: true,
        }
    }
}

impl Entry {
    /// The 32-bit register at byte `at` of the entry.
    fn register(&self, at: u64) -> u32 {
        match at {
            0 => self.address as u32,
            4 => (self.address >> 32) as u32,
            8 => self.data,
            _ => u32::from(self.masked) * VECTOR_MASKED,
        }
    }

    fn set_register(&mut self, at: u64, value: u32) {
        match at {
            0 => self.address = self.address & !0xffff_ffff | u64::from(value & !3),
            4 => self.address = self.address & 0xffff_ffff | u64::from(value) << 32,
            8 => self.data = value,
            _ => self.masked = value & VECTOR_MASKED != 0,
        }
    }

    fn message(&self) -> MsiMessage {
        MsiMessage {
            address: self.address,
            data: self.data,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Off,
    Masked,
    Live,
}

#[derive(Debug, Default)]
struct Vector {
    entry: Entry,
    pending: bool,
    phase: Phase,
    /// What the sink was told last.
    route: Option<MsiMessage>,
}

/// The vectors of one function. See the [module documentation](self).
pub struct Msix {
    control: Mutex<Control>,
    vectors: Vec<Mutex<Vector>>,
    sink: Arc<dyn MsiSink>,
}

impl Msix {
    /// `vectors` vectors in their reset state, delivered through `sink`.
    pub fn new(vectors: VectorCount, sink: Arc<dyn MsiSink>) -> Self {
        Self {
            control: Mutex::default(),
            vectors: (0..vectors.0).map(|_| Mutex::default()).collect(),
            sink,
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Never true; a function without vectors has no MSI-X.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The function wants its driver's attention on `vector`. From any thread; numbers out of range are ignored.
    pub fn signal(&self, vector: u16) {
        let Some(slot) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        let mut state = lock(slot);
        match state.phase {
            Phase::Off => {}
            Phase::Masked => state.pending = true,
            Phase::Live => self.fire(vector, &mut state),
        }
    }

    /// Message Control was written. True if messages are owed.
    #[must_use = "messages that are owed are to be delivered when the function may send them"]
    pub fn set_control(&self, new: Control) -> bool {
        let mut control = lock(&self.control);
        if *control == new {
            return false;
        }
        *control = new;
        let vectors = self.vectors.iter().enumerate();
        vectors.fold(false, |owed, (index, slot)| {
            self.settle(index as u16, &mut lock(slot), new) || owed
        })
    }

    /// Delivers the messages that are owed: those of live vectors whose pending bit is set.
    pub fn deliver_pending(&self) {
        for (index, slot) in self.vectors.iter().enumerate() {
            let mut state = lock(slot);
            if state.owed() {
                self.fire(index as u16, &mut state);
            }
        }
    }

    /// Clears all pending bits.
    pub fn forget_pending(&self) {
        for slot in &self.vectors {
            lock(slot).pending = false;
        }
    }

    fn fire(&self, index: u16, state: &mut Vector) {
        state.pending = false;
        self.sink.fire(index);
    }

    /// Everything as after power-on: disabled, masked, nothing pending.
    pub fn reset(&self) {
        let mut control = lock(&self.control);
        *control = Control::default();
        for (index, slot) in self.vectors.iter().enumerate() {
            let mut state = lock(slot);
            state.entry = Entry::default();
            state.pending = false;
            let _nothing_owed = self.settle(index as u16, &mut state, *control);
        }
    }

    /// Reads the table at byte `offset`. Any size and alignment; bytes beyond the table read 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        fill_from_dwords(offset, data, |at| {
            self.slot(at)
                .map(|(_, slot)| lock(slot).entry.register(at % ENTRY_SIZE))
        });
    }

    /// Writes the table at byte `offset`: 4 bytes at a multiple of 4, or 8 bytes at a multiple of 8, which take
    /// effect together. Software must use nothing else (PCIe Base, 6.1.4.2); other writes are ignored.
    /// True if a message is owed.
    #[must_use = "a message that is owed is to be delivered when the function may send it"]
    pub fn write_table(&self, offset: u64, data: &[u8]) -> bool {
        let (low, high) = match *data {
            [a, b, c, d] => (u32::from_le_bytes([a, b, c, d]), None),
            [a, b, c, d, e, f, g, h] => (
                u32::from_le_bytes([a, b, c, d]),
                Some(u32::from_le_bytes([e, f, g, h])),
            ),
            _ => return false,
        };
        if !offset.is_multiple_of(data.len() as u64) {
            return false;
        }
        let Some((index, slot)) = self.slot(offset) else {
            return false;
        };
        let control = lock(&self.control);
        let mut state = lock(slot);
        let at = offset % ENTRY_SIZE;
        state.entry.set_register(at, low);
        if let Some(high) = high {
            state.entry.set_register(at + 4, high);
        }
        self.settle(index, &mut state, *control)
    }

    /// Reads the pending bits at byte `offset`. Any size and alignment; bytes beyond the array read 0.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        fill_from_dwords(offset, data, |at| {
            let first = usize::try_from(at.checked_mul(8)?).ok()?;
            let vectors = self.vectors.get(first..)?;
            let bits = vectors.iter().take(32).enumerate();
            Some(bits.fold(0, |word, (bit, slot)| {
                word | u32::from(lock(slot).pending) << bit
            }))
        });
    }

    /// The entry a byte of the table belongs to.
    fn slot(&self, offset: u64) -> Option<(u16, &Mutex<Vector>)> {
        let index = usize::try_from(offset / ENTRY_SIZE).ok()?;
        Some((index as u16, self.vectors.get(index)?))
    }

    /// After a change of entry or control: the phase, the route, and what was pending. True if a message is owed.
    fn settle(&self, index: u16, state: &mut Vector, control: Control) -> bool {
        state.phase = match control {
            Control { enabled: false, .. } => Phase::Off,
            Control { function_mask, .. } if function_mask || state.entry.masked => Phase::Masked,
            _ => Phase::Live,
        };
        let route = (state.phase == Phase::Live).then(|| state.entry.message());
        if state.route != route {
            state.route = route;
            self.sink.set_route(index, route);
        }
        state.pending &= state.phase != Phase::Off;
        state.owed()
    }
}

impl Vector {
    fn owed(&self) -> bool {
        self.phase == Phase::Live && self.pending
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Fills `data` with the bytes from `offset` on of an array of little-endian dwords; absent ones read 0.
fn fill_from_dwords(offset: u64, data: &mut [u8], dword: impl Fn(u64) -> Option<u32>) {
    let mut current = None;
    for (i, byte) in data.iter_mut().enumerate() {
        let at = offset.saturating_add(i as u64);
        let aligned = at & !3;
        let value = match current {
            Some((start, value)) if start == aligned => value,
            _ => dword(aligned).unwrap_or(0),
        };
        current = Some((aligned, value));
        *byte = value.to_le_bytes()[(at & 3) as usize];
    }
}

#[cfg(test)]
mod tests;
