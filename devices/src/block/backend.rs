//! Where a disk keeps its bytes.

use std::io;

use crate::memory::{GuestRead, GuestWrite};

/// Storage behind a disk.
///
/// Called from the disk's worker thread, where it may take its time. The device has checked every range against
/// [`Self::len`]; offsets and lengths are in bytes and multiples of 512. Any error fails the request
/// (VIRTIO_BLK_S_IOERR) and nothing else.
///
/// What [`Self::read`] writes to guest memory is marked by the type of its buffers.
pub trait Backend: Send + Sync {
    /// Capacity in bytes; a multiple of 512 that never changes.
    fn len(&self) -> u64;

    /// True for a disk without a single sector.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills all of `buffers`, in order, from `offset` on.
    fn read(&self, offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()>;

    /// Writes all of `buffers`, in order, from `offset` on.
    fn write(&self, offset: u64, buffers: &[GuestRead<'_>]) -> io::Result<()>;

    /// Makes every completed write survive a power failure.
    fn flush(&self) -> io::Result<()>;

    /// The driver no longer needs `offset..offset + len`. A hint: the range may read as anything afterwards.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes `offset..offset + len` read as zeroes. With `unmap` its space may be given back.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
}
