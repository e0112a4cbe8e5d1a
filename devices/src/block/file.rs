//! A disk in a raw image file or on a block device.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use rustix::io::Errno;

use super::BlockError;
use super::backend::Backend;
use super::request::SECTOR;
use crate::memory::{GuestRead, GuestWrite};

/// The most buffers the kernel takes in one call (IOV_MAX).
const IOV_MAX: usize = 1024;
/// Zeroes written at once where the file system cannot zero a range by itself.
const ZEROES: usize = 64 * 1024;

/// An image file or block device, locked for as long as it is open: for itself if writable, for readers otherwise.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    len: u64,
}

impl RawFile {
    /// Opens and locks `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let other = |source| BlockError::Other {
            path: path.into(),
            source,
        };
        // Looked at before it is opened, since opening a pipe waits for its other end.
        let kind = match std::fs::metadata(path) {
            Ok(metadata) => metadata.file_type(),
            Err(error) => return Err(open_error(path, read_only, error)),
        };
        if kind.is_dir() {
            return Err(BlockError::Directory(path.into()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::Kind(path.into()));
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| open_error(path, read_only, error))?;
        lock(path, &file, read_only)?;
        // The length in the metadata of a block device is 0.
        let len = file.seek(SeekFrom::End(0)).map_err(other)?;
        if len == 0 {
            return Err(BlockError::Empty(path.into()));
        }
        if !len.is_multiple_of(SECTOR) {
            return Err(BlockError::Length {
                path: path.into(),
                len,
            });
        }
        Ok(Self { file, len })
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = vec![0; ZEROES.min(usize::try_from(len).unwrap_or(ZEROES))];
        while len > 0 {
            let n = len.min(zeroes.len() as u64);
            let piece = zeroes.get(..n as usize).unwrap_or_default();
            self.file.write_all_at(piece, offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }

    /// Asks the file system to change how `offset..offset + len` is stored. False if it cannot.
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        let flags = flags | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => {
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

pub(super) fn open_error(path: &Path, read_only: bool, error: io::Error) -> BlockError {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT | Errno::NOTDIR) => BlockError::Missing(path.into()),
        Some(Errno::ACCESS | Errno::PERM) if read_only => BlockError::NotReadable(path.into()),
        Some(Errno::ACCESS | Errno::PERM | Errno::ROFS) => BlockError::NotWritable(path.into()),
        _ => BlockError::Other {
            path: path.into(),
            source: error,
        },
    }
}

fn lock(path: &Path, file: &File, read_only: bool) -> Result<(), BlockError> {
    let operation = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    match flock(file, operation) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(BlockError::InUse(path.into())),
        // A file system without locks. Refusing it would help nobody.
        Err(error) => {
            tracing::warn!(path = %path.display(), %error,
                "cannot lock disk; make sure that no other VM uses it");
            Ok(())
        }
    }
}

impl Backend for RawFile {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        let mut iovecs: Vec<_> = buffers.iter().map(GuestWrite::iovec).collect();
        transfer(offset, &mut iovecs, |iovecs, offset| {
            // SAFETY: the vectors point into guest memory that `buffers` keeps mapped for the length of this call,
            // and their count is at most IOV_MAX. Guest memory is shared with the guest, so any bytes may be
            // written to it at any time.
            unsafe {
                libc::preadv64(
                    self.file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset,
                )
            }
        })
    }

    fn write(&self, offset: u64, buffers: &[GuestRead<'_>]) -> io::Result<()> {
        let mut iovecs: Vec<_> = buffers.iter().map(GuestRead::iovec).collect();
        transfer(offset, &mut iovecs, |iovecs, offset| {
            // SAFETY: as in `read`; the kernel only reads from the vectors.
            unsafe {
                libc::pwritev64(
                    self.file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                    offset,
                )
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        // A file system that cannot give the space back keeps it; the hint was heard.
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)
            .map(|_| ())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0
            || unmap && self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)?
            || self.allocate(FallocateFlags::ZERO_RANGE, offset, len)?
        {
            return Ok(());
        }
        self.write_zero_bytes(offset, len)
    }
}

/// Moves all of `iovecs` with as many calls of `call` as it takes.
fn transfer(
    offset: u64,
    iovecs: &mut [libc::iovec],
    call: impl Fn(&[libc::iovec], i64) -> isize,
) -> io::Result<()> {
    let mut at = i64::try_from(offset).map_err(io::Error::other)?;
    let mut rest = iovecs;
    while !rest.is_empty() {
        let batch = rest.get(..rest.len().min(IOV_MAX)).unwrap_or_default();
        let moved = match call(batch, at) {
            // The file ends before the disk does: somebody shortened it.
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => match usize::try_from(n) {
                Ok(n) => n,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            },
        };
        at += moved as i64;
        rest = advance(rest, moved);
    }
    Ok(())
}

/// What is left of `iovecs` after `n` bytes.
fn advance(iovecs: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    let mut done = 0;
    for iovec in iovecs.iter() {
        if n < iovec.iov_len {
            break;
        }
        n -= iovec.iov_len;
        done += 1;
    }
    let rest = iovecs.get_mut(done..).unwrap_or_default();
    if let Some(first) = rest.first_mut() {
        first.iov_base = first.iov_base.wrapping_byte_add(n);
        first.iov_len -= n;
    }
    rest
}
