//! A piece of guest RAM in this process, placed so that large pages can back it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

/// Bytes of a large page on x86-64.
pub const LARGE_PAGE: usize = 2 << 20;

/// `madvise`: reads pages in, as reading each would (Linux 5.14).
const MADV_POPULATE_READ: libc::c_int = 22;
/// `madvise`: makes large pages of small ones at once, whatever the host's policy says (Linux 6.1).
const MADV_COLLAPSE: libc::c_int = 25;

/// What is mapped.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    /// Zeroed memory of its own.
    Anonymous,
    /// A memfd from an offset on; what is written is written to it.
    Shared(&'a OwnedFd, u64),
    /// A file from an offset on; what is written stays here.
    Private(&'a File, u64),
}

/// Memory, readable and writable, whose address is a multiple of a large page. Unmapped when dropped. It is left out of
/// core dumps: what a guest has in its memory is nobody's business when the monitor crashes.
///
/// RAM ranges start at such multiples too, and only where the addresses agree can the hypervisor map a large page at
/// once instead of 512 small ones.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    len: usize,
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
    /// Maps `len` bytes of `source`, which has that many.
    pub(super) fn new(len: usize, source: Source<'_>) -> io::Result<Self> {
        let reserved_len = len
            .checked_add(LARGE_PAGE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let reserved = unsafe {
            libc::mmap(
                ptr::null_mut(),
                reserved_len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if reserved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let reserved = reserved.cast::<u8>();
        let mapping = Self {
            start: reserved.wrapping_add(reserved.align_offset(LARGE_PAGE)),
            len,
            reserved,
            reserved_len,
        };
        let (flags, fd, offset) = match source {
            Source::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
            Source::Shared(fd, offset) => (libc::MAP_SHARED, fd.as_raw_fd(), offset),
            Source::Private(file, offset) => (libc::MAP_PRIVATE, file.as_raw_fd(), offset),
        };
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        // SAFETY: what it replaces is part of the reservation made just now, which nobody else knows.
        let mapped = unsafe {
            libc::mmap(
                mapping.start.cast(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                offset,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // Hosts that leave the choice of large pages to programs give them for it; where they are switched off, small
        // ones do.
        let _ = mapping.advise(0, len, libc::MADV_HUGEPAGE);
        mapping.advise(0, len, libc::MADV_DONTDUMP)?;
        Ok(mapping)
    }

    /// Address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Number of large pages that lie wholly in `from..to` and are large pages now, made so if necessary.
    pub(super) fn collapse(&self, from: usize, to: usize) -> usize {
        let first = from.next_multiple_of(LARGE_PAGE);
        (first..to.min(self.len))
            .step_by(LARGE_PAGE)
            .take_while(|at| at + LARGE_PAGE <= to.min(self.len))
            .filter(|at| self.advise(*at, LARGE_PAGE, MADV_COLLAPSE).is_ok())
            .count()
    }

    /// Reads `from..to` in, without changing a byte of it.
    pub(super) fn populate(&self, from: usize, to: usize) -> io::Result<()> {
        loop {
            match self.advise(from, to - from, MADV_POPULATE_READ) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A kernel before 5.14: the pages come when they are touched.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                other => return other,
            }
        }
    }

    /// Advice that changes no contents.
    fn advise(&self, from: usize, len: usize, advice: libc::c_int) -> io::Result<()> {
        if from.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the range was just checked to be part of this mapping, and none of the kinds of advice used here
        // changes what is read from it.
        match unsafe { libc::madvise(self.start.wrapping_add(from).cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
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
            let mapping = Mapping::new(len, Source::Anonymous).unwrap();
            assert!(mapping.as_ptr().addr().is_multiple_of(LARGE_PAGE));
            // SAFETY: the last byte of a live, writable mapping.
            let last = unsafe { mapping.as_ptr().add(len - 1).read_volatile() };
            assert_eq!(last, 0, "{len}");
        }
    }

    #[test]
    fn a_length_that_overflows_is_an_error() {
        assert!(Mapping::new(usize::MAX - 4095, Source::Anonymous).is_err());
    }
}
