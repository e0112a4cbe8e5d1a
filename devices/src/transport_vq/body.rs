//! Command-out-data and command-in-data: fields one after the other, in either layout.

use super::envelope::{Error, Wire};

/// Reads fields.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a> {
    wire: Wire,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Body<'a> {
    /// From the beginning of `bytes`.
    pub fn new(wire: Wire, bytes: &'a [u8]) -> Self {
        Self { wire, bytes, at: 0 }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let at = place(self.wire, self.at, N);
        let bytes = self.bytes.get(at..at + N).ok_or(Error::Length)?;
        self.at = at + N;
        bytes.try_into().map_err(|_| Error::Length)
    }

    /// The next field, of one byte.
    pub fn u8(&mut self) -> Result<u8, Error> {
        self.take::<1>().map(u8::from_le_bytes)
    }

    /// The next field, of two bytes.
    pub fn u16(&mut self) -> Result<u16, Error> {
        self.take().map(u16::from_le_bytes)
    }

    /// The next field, of four bytes.
    pub fn u32(&mut self) -> Result<u32, Error> {
        self.take().map(u32::from_le_bytes)
    }

    /// The next field, of eight bytes.
    pub fn u64(&mut self) -> Result<u64, Error> {
        self.take().map(u64::from_le_bytes)
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

/// Writes fields.
#[derive(Clone, Debug)]
pub struct Fields {
    wire: Wire,
    bytes: Vec<u8>,
}

impl Fields {
    /// None yet.
    pub fn new(wire: Wire) -> Self {
        Self {
            wire,
            bytes: Vec::new(),
        }
    }

    fn put(&mut self, field: &[u8]) -> &mut Self {
        let at = place(self.wire, self.bytes.len(), field.len());
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(field);
        self
    }

    /// A field of one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.put(&[value])
    }

    /// A field of two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// A field of four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// A field of eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.put(&value.to_le_bytes())
    }

    /// Bytes that are no fields.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// What was written.
    pub fn bytes(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Where a field of `len` bytes is that comes after `at` bytes.
fn place(wire: Wire, at: usize, len: usize) -> usize {
    match wire {
        Wire::Aligned => at.next_multiple_of(len),
        Wire::Packed => at,
    }
}
