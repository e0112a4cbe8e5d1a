//! A piece of guest RAM in this process, placed so that large pages can back it.

use std::io;
use std::ptr;

/// Bytes of a large page on x86-64.
const LARGE_PAGE: usize = 2 << 20;

/// Private anonymous memory, readable, writable and zeroed, whose address is a multiple of a large page. Unmapped when
/// dropped.
///
/// RAM ranges start at such multiples too, and only where the addresses agree can the hypervisor map a large page at
/// once instead of 512 small ones.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    /// The address space it was cut out of.
    reserved: *mut u8,
    reserved_len: usize,
}

// SAFETY: the mapping belongs to this value alone, and its address may be used from any thread; what is read and
// written through it is the business of vm-memory's volatile accesses.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` itself only hands out the address.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes.
    pub fn new(len: usize) -> io::Result<Self> {
        let reserved_len = len
            .checked_add(LARGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = reserved.cast::<u8>();
        let start = reserved.wrapping_add(reserved.align_offset(LARGE_PAGE));
        // SAFETY: advice about part of the mapping made just now; it changes no contents. Hosts that leave the choice
        // of large pages to programs give them for it; where they are switched off, small ones do.
        unsafe { libc::madvise(start.cast(), len, libc::MADV_HUGEPAGE) };
        Ok(Self {
            start,
            reserved,
            reserved_len,
        })
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the reservation, with the mapping in it, is ours; whoever uses its address keeps the owner of this
        // value alive.
        unsafe { libc::munmap(self.reserved.cast(), self.reserved_len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_aligned_and_zeroed_to_its_end() {
        for len in [4096, LARGE_PAGE, 3 * LARGE_PAGE + 4096] {
            let mapping = Mapping::new(len).unwrap();
            assert!(mapping.as_ptr().addr().is_multiple_of(LARGE_PAGE));
            // SAFETY: the last byte of a live, writable mapping.
            let last = unsafe { mapping.as_ptr().add(len - 1).read_volatile() };
            assert_eq!(last, 0, "{len}");
        }
    }

    #[test]
    fn a_length_that_overflows_is_an_error() {
        assert!(Mapping::new(usize::MAX - 4095).is_err());
    }
}
