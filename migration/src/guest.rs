//! Guest RAM as this crate reaches it: by raw addresses, while the guest changes it.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::checksum;
use crate::layout::{PAGE_SIZE, RamLayout};

/// Guest RAM mapped into this process.
///
/// Implemented by whoever owns the mappings. Bytes are written from it, and read into it, without being copied between.
///
/// # Safety
///
/// For each range of [`layout`](Self::layout), [`host_address`](Self::host_address) is the address of a mapping of its
/// length, aligned to a page, readable, and writable if it is passed to something that fills it, for as long as the
/// value lives. Nothing but volatile accesses and system calls may reach that memory: the guest and other threads may
/// change it at any time.
pub unsafe trait GuestPages: Sync {
    /// The RAM ranges.
    fn layout(&self) -> &RamLayout;

    /// Address of the first byte of range number `range`, which the layout has.
    fn host_address(&self, range: usize) -> *mut u8;

    /// The next piece of range number `range`, from byte `from` of it on, in which anything but zeroes may be. What
    /// is outside of such pieces is taken to be zero and not looked at.
    ///
    /// Looking at memory that was never touched can be expensive: implement it if there is a cheaper way to know. A piece
    /// may end before that ends.
    fn occupied(&self, range: usize, from: u64) -> Option<Range<u64>> {
        let len = self.layout().ranges().get(range)?.len;
        (from < len).then_some(from..len)
    }

    /// At least half of `piece` of range number `range`, which is as long as a large page and aligned like one, is about
    /// to be filled: the moment to give it one.
    fn enlarge(&self, _range: usize, _piece: Range<u64>) {}
}

/// A piece of guest RAM: whole pages of one range.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'g, G: ?Sized> {
    guest: &'g G,
    range: usize,
    offset: u64,
    len: u64,
}

impl<'g, G: GuestPages + ?Sized> Piece<'g, G> {
    /// `len` bytes at `offset` of range number `range`, if the guest has them. All are whole pages.
    pub fn new(guest: &'g G, range: usize, offset: u64, len: u64) -> Option<Self> {
        let there = guest.layout().ranges().get(range)?.len;
        let aligned = offset.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE);
        let fits = offset.checked_add(len).is_some_and(|end| end <= there);
        (aligned && fits).then_some(Self {
            guest,
            range,
            offset,
            len,
        })
    }

    /// The part from byte `from` on, `len` bytes long.
    pub fn part(&self, from: u64, len: u64) -> Option<Self> {
        let inside = from.checked_add(len).is_some_and(|end| end <= self.len);
        Self::new(self.guest, self.range, self.offset + from, len).filter(|_| inside)
    }

    /// Number of its range.
    pub fn range(&self) -> usize {
        self.range
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Offset in its range of its byte number `offset`.
    pub fn at(&self, offset: u64) -> u64 {
        self.offset + offset
    }

    fn address(&self) -> *mut u8 {
        self.guest
            .host_address(self.range)
            .wrapping_add(self.offset as usize)
    }

    /// True if all bytes of the page at `offset` are zero at the moment. False if there is no such page.
    pub fn is_zero(&self, offset: u64) -> bool {
        if offset
            .checked_add(PAGE_SIZE)
            .is_none_or(|end| end > self.len)
        {
            return false;
        }
        let words = self.address().wrapping_add(offset as usize).cast::<u64>();
        (0..PAGE_SIZE as usize / 64).all(|line| {
            let mut any = 0;
            for word in 0..8 {
                // SAFETY: within a page of the range, which the trait's implementor promises to be mapped and aligned;
                // volatile, since the guest may write it meanwhile.
                any |= unsafe { words.add(line * 8 + word).read_volatile() };
            }
            any == 0
        })
    }

    /// Its memory as the kernel takes it in vectored system calls. Valid as long as the guest's mappings.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.address().cast(),
            iov_len: self.len as usize,
        }
    }

    /// XXH64 of the page at `offset`, as it is at the moment; `None` if there is no such page.
    ///
    /// A page that is written meanwhile gives the checksum of something that never was.
    pub fn checksum(&self, offset: u64) -> Option<u64> {
        let end = offset.checked_add(PAGE_SIZE)?;
        if end > self.len {
            return None;
        }
        let words = self.address().wrapping_add(offset as usize).cast::<u64>();
        Some(checksum::of_page(|index| {
            // SAFETY: within a page of the range, which the trait's implementor promises to be mapped and aligned;
            // volatile, since the guest may write it meanwhile.
            u64::from_le(unsafe { words.add(index).read_volatile() })
        }))
    }

    /// Writes it to `file` at `at`.
    pub fn write_to(&self, file: &File, at: u64) -> io::Result<()> {
        self.transfer(at, |address, len, at| {
            // SAFETY: `address..address + len` lies within a mapping that lives as long as `self.guest`. The kernel
            // copies from it, whatever the guest does there meanwhile.
            unsafe { libc::pwrite64(file.as_raw_fd(), address.cast(), len, at) }
        })
    }

    /// Fills it from `file` at `at`.
    pub fn read_from(&self, file: &File, at: u64) -> io::Result<()> {
        self.transfer(at, |address, len, at| {
            // SAFETY: as in `write_to`; whoever passed the guest to be filled promised that it is writable.
            unsafe { libc::pread64(file.as_raw_fd(), address.cast(), len, at) }
        })
    }

    fn transfer(&self, at: u64, call: impl Fn(*mut u8, usize, i64) -> isize) -> io::Result<()> {
        let mut done = 0;
        while done < self.len {
            let address = self.address().wrapping_add(done as usize);
            let at = i64::try_from(at + done).map_err(io::Error::other)?;
            match call(address, (self.len - done) as usize, at) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n if n > 0 => done += n as u64,
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes each page zero that is not. One that is zero is only read.
    pub fn clear(&self) {
        for offset in (0..self.len).step_by(PAGE_SIZE as usize) {
            if self.is_zero(offset) {
                continue;
            }
            let words = self.address().wrapping_add(offset as usize).cast::<u64>();
            for word in 0..PAGE_SIZE as usize / 8 {
                // SAFETY: within a page of the range, mapped and aligned, and writable as whoever passed the guest to be
                // filled promised.
                unsafe { words.add(word).write_volatile(0) };
            }
        }
    }
}
