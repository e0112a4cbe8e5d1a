//! MSI-X: the vector table, the pending bits, and delivery (PCIe Base, 6.1.4 and 7.7.2).
//!
//! A vector is *off* while MSI-X is disabled, *masked* while its own mask or the function mask is set, and *live*
//! otherwise. What that means is in [`MsiVectors`].
//!
//! Locks: `table`, then one vector. A signal takes the lock of its vector only, so it waits at most for the route
//! change of that same vector.

pub mod state;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::msi::{MsiMessage, MsiSink, MsiVectors, Phase};

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

/// What the guest programmed.
struct Table {
    control: Control,
    entries: Vec<Entry>,
}

impl Table {
    /// The entry a byte of the table belongs to.
    fn entry(&mut self, offset: u64) -> Option<(u16, &mut Entry)> {
        let index = usize::try_from(offset / ENTRY_SIZE).ok()?;
        Some((index as u16, self.entries.get_mut(index)?))
    }
}

/// The vectors of one function. See the [module documentation](self).
pub struct Msix {
    table: Mutex<Table>,
    vectors: MsiVectors,
}

impl Msix {
    /// `vectors` vectors in their reset state, delivered through `sink`.
    pub fn new(vectors: VectorCount, sink: Arc<dyn MsiSink>) -> Self {
        Self {
            table: Mutex::new(Table {
                control: Control::default(),
                entries: vec![Entry::default(); vectors.0.into()],
            }),
            vectors: MsiVectors::new(vectors.0, sink),
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> u16 {
        self.vectors.len()
    }

    /// Never true; a function without vectors has no MSI-X.
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// The function wants its driver's attention on `vector`. From any thread; numbers out of range are ignored.
    pub fn signal(&self, vector: u16) {
        self.vectors.signal(vector);
    }

    /// Message Control was written. True if messages are owed.
    #[must_use = "messages that are owed are to be delivered when the function may send them"]
    pub fn set_control(&self, new: Control) -> bool {
        let mut table = self.table();
        if table.control == new {
            return false;
        }
        table.control = new;
        self.settle_all(&table)
    }

    /// Delivers the messages that are owed: those of live vectors whose pending bit is set.
    pub fn deliver_pending(&self) {
        self.vectors.deliver_pending();
    }

    /// Clears all pending bits.
    pub fn forget_pending(&self) {
        self.vectors.forget_pending();
    }

    /// Everything as after power-on: disabled, masked, nothing pending.
    pub fn reset(&self) {
        let mut table = self.table();
        table.control = Control::default();
        table.entries.fill(Entry::default());
        // Disabled vectors have nothing pending.
        let _nothing_owed = self.settle_all(&table);
    }

    /// Reads the table at byte `offset`. Any size and alignment; bytes beyond the table read 0.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let mut table = self.table();
        fill_from_dwords(offset, data, |at| {
            let (_, entry) = table.entry(at)?;
            Some(entry.register(at % ENTRY_SIZE))
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
        let mut table = self.table();
        let control = table.control;
        let Some((index, entry)) = table.entry(offset) else {
            return false;
        };
        let at = offset % ENTRY_SIZE;
        entry.set_register(at, low);
        if let Some(high) = high {
            entry.set_register(at + 4, high);
        }
        self.settle(index, entry, control)
    }

    /// Reads the pending bits at byte `offset`. Any size and alignment; bytes beyond the array read 0.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        fill_from_dwords(offset, data, |at| {
            let first = u16::try_from(at.checked_mul(8)?).ok()?;
            let bits = (first..self.len()).take(32).zip(0..);
            Some(bits.fold(0, |word, (vector, bit)| {
                word | u32::from(self.vectors.is_pending(vector)) << bit
            }))
        });
    }

    /// After a change of entry or control. True if a message is owed.
    fn settle(&self, index: u16, entry: &Entry, control: Control) -> bool {
        let phase = match control {
            Control { enabled: false, .. } => Phase::Off,
            Control { function_mask, .. } if function_mask || entry.masked => Phase::Masked,
            _ => Phase::Live,
        };
        self.vectors.set(index, entry.message(), phase)
    }

    fn settle_all(&self, table: &Table) -> bool {
        let entries = (0..).zip(&table.entries);
        entries.fold(false, |owed, (index, entry)| {
            self.settle(index, entry, table.control) || owed
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fills `data` with the bytes from `offset` on of an array of little-endian dwords; absent ones read 0.
fn fill_from_dwords(offset: u64, data: &mut [u8], mut dword: impl FnMut(u64) -> Option<u32>) {
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
