//! Guest memory lent to the kernel, for scatter-gather I/O.

// Here alone guest memory is reached by its raw address: see clippy.toml.
#![allow(clippy::disallowed_methods)]

use vm_memory::VolatileSlice;
use vm_memory::bitmap::{Bitmap, RefSlice};

use super::ViewBitmap;

/// Contiguous guest memory of a [`View`](super::View).
pub(crate) type GuestSlice<'v> = VolatileSlice<'v, RefSlice<'v, ViewBitmap>>;

/// Contiguous guest memory that a device reads.
#[derive(Debug)]
pub struct GuestRead<'v>(GuestSlice<'v>);

impl<'v> GuestRead<'v> {
    pub(crate) fn new(slice: GuestSlice<'v>) -> Self {
        Self(slice)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies to `out` what there is room for; returns how much that is.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        self.0.copy_to(out)
    }

    /// The same memory for a system call that reads it. Valid as long as `self`.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.0.ptr_guard().as_ptr().cast_mut().cast(),
            iov_len: self.0.len(),
        }
    }
}

/// Contiguous guest memory that a device writes.
///
/// Whoever writes through a raw address bypasses the dirty bitmap. Therefore such an address is only to be had from this
/// type, which marks all of its pages when it is dropped: that is after the write, also after one that failed half-way,
/// since a page marked too early could be sent before its new content is there. Keep it until the write is over, and
/// drop it before the driver is told.
#[derive(Debug)]
#[must_use = "keep it until the write is over: dropping it marks the pages"]
pub struct GuestWrite<'v>(GuestSlice<'v>);

impl<'v> GuestWrite<'v> {
    pub(crate) fn new(slice: GuestSlice<'v>) -> Self {
        Self(slice)
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True if there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies what there is room for from `bytes`.
    pub fn copy_from(&self, bytes: &[u8]) {
        self.0.copy_from(bytes);
    }

    /// The same memory for a system call that writes it. Valid as long as `self`.
    pub fn iovec(&self) -> libc::iovec {
        libc::iovec {
            iov_base: self.0.ptr_guard_mut().as_ptr().cast(),
            iov_len: self.0.len(),
        }
    }
}

impl Drop for GuestWrite<'_> {
    fn drop(&mut self) {
        self.0.bitmap().mark_dirty(0, self.0.len());
    }
}
