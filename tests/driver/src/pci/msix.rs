//! MSI-X: the capability, the vector table and the pending bits.

use super::{CapabilityLoop, find_capability, id};
use crate::access::{Function, FunctionExt, Region, Register};

/// In Message Control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// In Message Control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;

/// One entry of the vector table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorEntry {
    /// Where the message is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
    /// The vector is masked.
    pub masked: bool,
}

/// A function's MSI-X capability. Holds only what the capability says, no copy of any state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiX {
    /// Where the capability is in configuration space.
    pub offset: u16,
    /// Number of vectors.
    pub vectors: u16,
    /// The vector table: 16 bytes per vector.
    pub table: Region,
    /// The pending bits: one per vector, in 64-bit words.
    pub pending: Region,
}

impl MsiX {
    /// Finds the capability.
    pub fn find(function: &impl Function) -> Result<Option<Self>, CapabilityLoop> {
        let Some(cap) = find_capability(function, id::MSIX)? else {
            return Ok(None);
        };
        let vectors = (function.config::<u16>(cap.offset + 2) & 0x7ff) + 1;
        let region = |at: u16, len: u64| {
            let value: u32 = function.config(cap.offset + at);
            Region {
                bar: (value & 7) as u8,
                offset: u64::from(value & !7),
                len,
            }
        };
        Ok(Some(Self {
            offset: cap.offset,
            vectors,
            table: region(4, 16 * u64::from(vectors)),
            pending: region(8, 8 * u64::from(vectors).div_ceil(64)),
        }))
    }

    /// Message Control.
    pub fn control(&self, function: &impl Function) -> u16 {
        function.config(self.offset + 2)
    }

    /// Turns MSI-X and the mask of the whole function on or off.
    pub fn set_control(&self, function: &impl Function, enable: bool, mask_all: bool) {
        let bits = if enable { ENABLE } else { 0 } | if mask_all { FUNCTION_MASK } else { 0 };
        let kept = self.control(function) & !(ENABLE | FUNCTION_MASK);
        function.set_config(self.offset + 2, kept | bits);
    }

    /// True if MSI-X is on.
    pub fn is_enabled(&self, function: &impl Function) -> bool {
        self.control(function) & ENABLE != 0
    }

    /// True if all vectors are masked.
    pub fn is_masked(&self, function: &impl Function) -> bool {
        self.control(function) & FUNCTION_MASK != 0
    }

    /// Reads the entry of `vector`.
    pub fn entry(&self, function: &impl Function, vector: u16) -> VectorEntry {
        let [low, high, data, control] = Self::words(vector).map(|r| function.get(self.table, r));
        VectorEntry {
            address: u64::from(high) << 32 | u64::from(low),
            data,
            masked: control & 1 != 0,
        }
    }

    /// Programs the entry of `vector`: masked first, then address and data, then the mask it is to have.
    pub fn set_entry(&self, function: &impl Function, vector: u16, entry: VectorEntry) {
        let [low, high, data, control] = Self::words(vector);
        function.set(self.table, control, 1);
        function.set(self.table, low, entry.address as u32);
        function.set(self.table, high, (entry.address >> 32) as u32);
        function.set(self.table, data, entry.data);
        if !entry.masked {
            function.set(self.table, control, 0);
        }
    }

    /// Masks or unmasks `vector`.
    pub fn mask(&self, function: &impl Function, vector: u16, masked: bool) {
        let [.., control] = Self::words(vector);
        function.set(self.table, control, u32::from(masked));
    }

    /// True if an interrupt of `vector` waits for it to be unmasked.
    pub fn is_pending(&self, function: &impl Function, vector: u16) -> bool {
        let word = Register::<u64>::at(8 * u64::from(vector / 64));
        function.get(self.pending, word) >> (vector % 64) & 1 != 0
    }

    /// The four words of an entry: address low, address high, data, vector control.
    fn words(vector: u16) -> [Register<u32>; 4] {
        let at = 16 * u64::from(vector);
        [0, 4, 8, 12].map(|word| Register::at(at + word))
    }
}
