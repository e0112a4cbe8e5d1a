//! Mapped memory: a BAR, or pages that are shared with a device.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{Ordering, fence};

use rustix::io::{Errno, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mlock, mmap, mmap_anonymous, munmap};

/// A mapping of a file or of nothing. The other side may change what is in it at any time, so every access is volatile.
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is plain memory that no thread has a reference into.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file`, shared.
    pub fn of_file(file: impl AsFd, len: usize) -> Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so that no other mapping is touched.
        let start = unsafe { mmap(null_mut(), len, protection, MapFlags::SHARED, file, 0)? };
        Self::at(start, len)
    }

    /// Maps `len` bytes of zeroes that stay in memory, page by page.
    pub fn locked(len: usize) -> Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the place, so that no other mapping is touched.
        let start = unsafe { mmap_anonymous(null_mut(), len, protection, MapFlags::PRIVATE)? };
        let mapping = Self::at(start, len)?;
        // SAFETY: all are about this mapping, whose contents they keep.
        unsafe {
            // A huge page put together later would be somewhere else, and so would be a copy for a child.
            madvise(start, len, Advice::LinuxNoHugepage)?;
            madvise(start, len, Advice::LinuxDontFork)?;
            mlock(start, len)?;
        }
        Ok(mapping)
    }

    fn at(start: *mut c_void, len: usize) -> Result<Self> {
        let start = NonNull::new(start.cast()).ok_or(Errno::FAULT)?;
        Ok(Self { start, len })
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address in this process.
    pub fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    /// Where `T` is at `offset`, if all of it is inside and aligned.
    fn place<T>(&self, offset: usize) -> Option<*mut T> {
        let inside = offset.checked_add(size_of::<T>())? <= self.len;
        let address = self.start.as_ptr().wrapping_add(offset).cast::<T>();
        (inside && address.is_aligned()).then_some(address)
    }

    fn get<T>(&self, offset: usize) -> Option<T> {
        let place = self.place::<T>(offset)?;
        // SAFETY: `place` is inside the mapping and aligned; T is an integer in all uses, for which any bits are valid.
        Some(unsafe { place.read_volatile() })
    }

    fn set<T>(&self, offset: usize, value: T) -> Option<()> {
        let place = self.place::<T>(offset)?;
        // SAFETY: `place` is inside the mapping and aligned, and nobody has a reference to what is there.
        unsafe { place.write_volatile(value) };
        Some(())
    }

    /// Reads; as one access if the length is 1, 2, 4 or 8 and the place aligned. What is not there reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        match data.len() {
            2 => copy(data, self.get::<u16>(offset).map(u16::to_ne_bytes)),
            4 => copy(data, self.get::<u32>(offset).map(u32::to_ne_bytes)),
            8 => copy(data, self.get::<u64>(offset).map(u64::to_ne_bytes)),
            _ => None,
        }
        .unwrap_or_else(|| {
            for (at, byte) in data.iter_mut().enumerate() {
                *byte = self.get(offset.saturating_add(at)).unwrap_or(0xff);
            }
        });
    }

    /// Writes, likewise. What is not there is lost.
    pub fn write(&self, offset: usize, data: &[u8]) {
        let whole = match *data {
            [a, b] => self.set(offset, u16::from_ne_bytes([a, b])),
            [a, b, c, d] => self.set(offset, u32::from_ne_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.set(offset, u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
            }
            _ => None,
        };
        whole.unwrap_or_else(|| {
            for (at, byte) in data.iter().enumerate() {
                // Beyond the end it is lost.
                let _ = self.set(offset.saturating_add(at), *byte);
            }
        });
    }

    /// Reads 16 bits; later reads are not moved before it.
    pub fn load(&self, offset: usize) -> u16 {
        let value = self.get(offset).unwrap_or(u16::MAX);
        fence(Ordering::Acquire);
        value
    }

    /// Writes 16 bits after all earlier writes.
    pub fn store(&self, offset: usize, value: u16) {
        fence(Ordering::Release);
        // Beyond the end it is lost.
        let _ = self.set(offset, value);
    }
}

/// Copies a value that was read at once.
fn copy<const N: usize>(data: &mut [u8], value: Option<[u8; N]>) -> Option<()> {
    data.copy_from_slice(&value?);
    Some(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping is ours, and nothing refers into it any more.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        // It cannot fail for a mapping that exists.
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_of_every_width_and_place() {
        let mapping = Mapping::locked(4096).unwrap();
        mapping.write(16, &[1, 2, 3, 4, 5, 6, 7, 8]);
        for (offset, len) in [
            (16, 1),
            (16, 2),
            (16, 4),
            (16, 8),
            (17, 2),
            (18, 4),
            (17, 5),
        ] {
            let mut data = vec![0xee; len];
            mapping.read(offset, &mut data);
            let expected: Vec<u8> = (1..=8).skip(offset - 16).take(len).collect();
            assert_eq!(data, expected, "{len} at {offset}");
        }
        mapping.store(20, 0x0908);
        assert_eq!(mapping.load(20).to_le_bytes(), [8, 9]);
    }

    #[test]
    fn beyond_the_end_there_are_ones() {
        let mapping = Mapping::locked(4096).unwrap();
        let mut data = [0; 4];
        mapping.write(4094, &[1, 2, 3, 4]);
        mapping.read(4094, &mut data);
        assert_eq!(data, [1, 2, 0xff, 0xff]);
        mapping.read(usize::MAX, &mut data[..2]);
        assert_eq!(data[..2], [0xff, 0xff]);
        assert_eq!(mapping.load(4096), 0xffff);
    }
}
