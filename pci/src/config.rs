//! Configuration space: declared registers, what a guest may change of them, and the lists of capabilities.
//!
//! A block of registers (a header, a capability) is declared as a list of [`Register`]s with masks that say, bit by
//! bit, what a guest's write does. [`ConfigBuilder`] lays blocks out and links them; [`ConfigSpace`] is the result: it
//! knows the masks and nothing else. What a write *means* is decided by the function that owns the space, from the
//! [`Written`] it gets back.

use std::sync::Arc;

use crate::topology::CONFIG_SPACE_SIZE;

/// First byte of extended configuration space (PCIe Base, 7.6).
const EXTENDED: u16 = 0x100;
/// First byte after the standard header, where capabilities may stand.
const FIRST_CAPABILITY: u16 = 0x40;
/// Capabilities Pointer, at the same offset in both header types.
const CAPABILITIES_POINTER: u16 = 0x34;
/// Status register, at the same offset in both header types.
const STATUS: u16 = 0x06;
/// Status bit: there is a capability list.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// One register of a block, and what each of its bits does. Bits in no mask are read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Byte offset in its block.
    at: u16,
    /// Bytes: 1, 2 or 4.
    width: u8,
    reset: u32,
    writable: u32,
    clear_by_one: u32,
    trigger: u32,
}

impl Register {
    const fn new(at: u16, width: u8) -> Self {
        Self {
            at,
            width,
            reset: 0,
            writable: 0,
            clear_by_one: 0,
            trigger: 0,
        }
    }

    /// An 8-bit register at byte `at` of its block; all bits read-only 0.
    pub const fn byte(at: u16) -> Self {
        Self::new(at, 1)
    }

    /// A 16-bit register at byte `at` of its block; all bits read-only 0.
    pub const fn word(at: u16) -> Self {
        Self::new(at, 2)
    }

    /// A 32-bit register at byte `at` of its block; all bits read-only 0.
    pub const fn dword(at: u16) -> Self {
        Self::new(at, 4)
    }

    /// The value after reset.
    pub const fn reset(mut self, value: u32) -> Self {
        self.reset = value;
        self
    }

    /// Bits a guest can set and clear (RW).
    pub const fn writable(mut self, mask: u32) -> Self {
        self.writable = mask;
        self
    }

    /// Bits that a guest clears by writing 1 (RW1C).
    pub const fn clear_by_one(mut self, mask: u32) -> Self {
        self.clear_by_one = mask;
        self
    }

    /// Bits that always read 0 and do something when 1 is written, such as Initiate FLR.
    pub const fn trigger(mut self, mask: u32) -> Self {
        self.trigger = mask;
        self
    }
}

/// A block of registers: a header or a capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Length in bytes, with the ID and link at its start.
    pub len: u16,
    /// Its registers, without the ID and link. Bytes of no register read 0.
    pub registers: Vec<Register>,
}

/// Why a configuration space cannot be laid out. A mistake of the program, not of a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Capabilities do not fit before 0x100, or extended ones before 0x1000.
    #[error("capability {id:#x} of {len} bytes does not fit into configuration space")]
    Full {
        /// Its capability ID.
        id: u16,
        /// Its length.
        len: u16,
    },
}

/// Why a saved configuration space was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigStateError {
    /// It is of a function with other registers.
    #[error("configuration space has {saved} bytes, that of this function {own}")]
    Length {
        /// Bytes in the state.
        saved: usize,
        /// Bytes of this function.
        own: usize,
    },
    /// A byte differs in bits that no guest can change.
    #[error(
        "configuration space byte {offset:#x} is {saved:#04x}, and {own:#04x} in this function; they differ in bits \
         that no guest can change"
    )]
    Byte {
        /// Byte offset in configuration space.
        offset: u16,
        /// The byte in the state.
        saved: u8,
        /// The byte of this function.
        own: u8,
    },
}

/// What the bytes of a space are after reset, and what writes do to them. Shared by equal functions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Masks {
    reset: Vec<u8>,
    writable: Vec<u8>,
    clear_by_one: Vec<u8>,
    trigger: Vec<u8>,
}

/// Lays out a configuration space.
#[derive(Debug)]
pub struct ConfigBuilder {
    masks: Masks,
    /// Where the offset of the next capability goes.
    link: u16,
    next: u16,
    extended_link: Option<u16>,
    extended_next: u16,
}

impl ConfigBuilder {
    /// Starts with a header block of 64 bytes (type 0 or 1).
    pub fn new(header: &Block) -> Self {
        let mut builder = Self {
            masks: Masks::default(),
            link: CAPABILITIES_POINTER,
            next: FIRST_CAPABILITY,
            extended_link: None,
            extended_next: EXTENDED,
        };
        // The first dword of extended space always exists: 0 says that there is no extended capability.
        builder.grow(EXTENDED + 4);
        builder.place(0, header);
        builder
    }

    /// Adds a capability; returns its byte offset in configuration space.
    pub fn capability(&mut self, id: u8, block: &Block) -> Result<u16, ConfigError> {
        let at = self.next;
        let end = at.saturating_add(block.len).next_multiple_of(4);
        if end > EXTENDED {
            return Err(ConfigError::Full {
                id: id.into(),
                len: block.len,
            });
        }
        self.place(at, block);
        self.set(at, &[id, 0]);
        self.set(self.link, &[at as u8]);
        if self.link == CAPABILITIES_POINTER {
            let status = Register::word(STATUS).reset(STATUS_CAPABILITIES.into());
            self.or_reset(&status);
        }
        self.link = at + 1;
        self.next = end;
        Ok(at)
    }

    /// Adds an extended capability; returns its byte offset in configuration space.
    pub fn extended(&mut self, id: u16, version: u8, block: &Block) -> Result<u16, ConfigError> {
        let at = self.extended_next;
        let end = at.saturating_add(block.len).next_multiple_of(4);
        if u64::from(end) > CONFIG_SPACE_SIZE {
            return Err(ConfigError::Full { id, len: block.len });
        }
        self.grow(end);
        self.place(at, block);
        // Header: ID in bits 15:0, version in 19:16, offset of the next in 31:20 (PCIe Base, 7.6.3).
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.set(at, &header.to_le_bytes());
        if let Some(link) = self.extended_link {
            let next = Register::dword(link).reset(u32::from(at) << 20);
            self.or_reset(&next);
        }
        self.extended_link = Some(at);
        self.extended_next = end;
        Ok(at)
    }

    /// The finished space, in its reset state.
    pub fn build(self) -> ConfigSpace {
        ConfigSpace {
            bytes: self.masks.reset.clone(),
            masks: Arc::new(self.masks),
        }
    }

    fn grow(&mut self, len: u16) {
        let len = usize::from(len).max(self.masks.reset.len());
        let masks = &mut self.masks;
        for bytes in [
            &mut masks.reset,
            &mut masks.writable,
            &mut masks.clear_by_one,
            &mut masks.trigger,
        ] {
            bytes.resize(len, 0);
        }
    }

    fn place(&mut self, at: u16, block: &Block) {
        for register in &block.registers {
            debug_assert!(
                register.at + u16::from(register.width) <= block.len,
                "register outside its block"
            );
            let offset = usize::from(at + register.at);
            let width = usize::from(register.width);
            for (bytes, value) in [
                (&mut self.masks.reset, register.reset),
                (&mut self.masks.writable, register.writable),
                (&mut self.masks.clear_by_one, register.clear_by_one),
                (&mut self.masks.trigger, register.trigger),
            ] {
                store(bytes, offset, &value.to_le_bytes()[..width]);
            }
        }
    }

    fn set(&mut self, at: u16, value: &[u8]) {
        store(&mut self.masks.reset, at.into(), value);
    }

    fn or_reset(&mut self, register: &Register) {
        let bytes = register.reset.to_le_bytes();
        let range = self.masks.reset.iter_mut().skip(register.at.into());
        for (to, from) in range.zip(&bytes[..register.width.into()]) {
            *to |= from;
        }
    }
}

fn store(bytes: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in bytes.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// The configuration space of one function. See the [module documentation](self).
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    /// As long as there are registers; the rest of the 4096 bytes reads 0.
    bytes: Vec<u8>,
    masks: Arc<Masks>,
}

/// What a guest's write to configuration space covered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    at: u16,
    len: u16,
    /// Trigger bits that were written as 1, byte by byte from `at`.
    triggered: [u8; 8],
}

impl Written {
    /// True if the write covered any byte of `at..at + len`.
    pub fn touches(&self, at: u16, len: u16) -> bool {
        self.at < at.saturating_add(len) && at < self.at.saturating_add(self.len)
    }

    /// The trigger bits of the 16-bit register at `at` that were written as 1.
    pub fn triggered(&self, at: u16) -> u16 {
        let byte = |at: u16| {
            at.checked_sub(self.at)
                .and_then(|i| self.triggered.get(usize::from(i)))
                .copied()
                .unwrap_or(0)
        };
        u16::from_le_bytes([byte(at), byte(at.saturating_add(1))])
    }
}

impl ConfigSpace {
    /// Fills `data` from `offset` on. Unimplemented registers, and bytes beyond 4096, read 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        let from = self.bytes.get(usize::from(offset)..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(from) {
            *to = *from;
        }
    }

    /// A guest's write of up to 8 bytes at `offset`, as far as the masks let it through. Longer writes are ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Written {
        let mut written = Written::default();
        if data.len() > written.triggered.len() {
            return written;
        }
        written.at = offset;
        written.len = data.len() as u16;
        for (i, value) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            let Some(byte) = self.bytes.get_mut(at) else {
                break;
            };
            let mask = |bytes: &[u8]| bytes.get(at).copied().unwrap_or(0);
            let writable = mask(&self.masks.writable);
            *byte = *byte & !writable | value & writable;
            *byte &= !(value & mask(&self.masks.clear_by_one));
            if let Some(fired) = written.triggered.get_mut(i) {
                *fired = value & mask(&self.masks.trigger);
            }
        }
        written
    }

    /// Every register back to its reset value.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.masks.reset);
    }

    /// Saved form: every byte there are registers for.
    pub fn save(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    /// This space with the registers of `saved`, or the first byte of it that no guest could have made of this space
    /// after reset. Whether several registers make sense together is for their function to check.
    ///
    /// Bits that a guest can only clear may be 1 if they are 1 after reset.
    pub fn restored(&self, saved: &[u8]) -> Result<Self, ConfigStateError> {
        let masks = &self.masks;
        if saved.len() != self.bytes.len() {
            return Err(ConfigStateError::Length {
                saved: saved.len(),
                own: self.bytes.len(),
            });
        }
        let own = self.bytes.iter().zip(&masks.reset);
        let can_change = masks.writable.iter().zip(&masks.clear_by_one);
        let bytes = saved.iter().zip(own.zip(can_change)).enumerate();
        for (offset, (saved, ((own, reset), (writable, clear_by_one)))) in bytes {
            let different = (saved ^ own) & !(writable | clear_by_one);
            let set = saved & clear_by_one & !(writable | reset);
            if different | set != 0 {
                return Err(ConfigStateError::Byte {
                    offset: offset as u16,
                    saved: *saved,
                    own: *own,
                });
            }
        }
        Ok(Self {
            bytes: saved.to_vec(),
            masks: Arc::clone(masks),
        })
    }

    /// The 8-bit register at `at`.
    pub fn byte(&self, at: u16) -> u8 {
        u8::from_le_bytes(self.array(at))
    }

    /// The 16-bit register at `at`.
    pub fn word(&self, at: u16) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    /// The 32-bit register at `at`.
    pub fn dword(&self, at: u16) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    /// The function itself changes the 8-bit register at `at`, whatever its masks.
    pub fn set_byte(&mut self, at: u16, value: u8) {
        store(&mut self.bytes, at.into(), &value.to_le_bytes());
    }

    /// The function itself changes the 16-bit register at `at`, whatever its masks.
    pub fn set_word(&mut self, at: u16, value: u16) {
        store(&mut self.bytes, at.into(), &value.to_le_bytes());
    }

    /// The function itself changes the 32-bit register at `at`, whatever its masks.
    pub fn set_dword(&mut self, at: u16, value: u32) {
        store(&mut self.bytes, at.into(), &value.to_le_bytes());
    }

    /// Changes the 8-bit register at `at` now and for every reset to come.
    pub fn hardwire_byte(&mut self, at: u16, value: u8) {
        store(
            &mut Arc::make_mut(&mut self.masks).reset,
            at.into(),
            &[value],
        );
        self.set_byte(at, value);
    }

    /// The bits of byte `at` that no guest write can change.
    pub fn read_only_bits(&self, at: u16) -> u8 {
        let mask = |bytes: &[u8]| bytes.get(usize::from(at)).copied().unwrap_or(0);
        !(mask(&self.masks.writable) | mask(&self.masks.clear_by_one))
    }

    fn array<const N: usize>(&self, at: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(at, &mut bytes);
        bytes
    }
}

#[cfg(test)]
mod tests;
