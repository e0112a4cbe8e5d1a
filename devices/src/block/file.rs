//! A disk in a raw image file or on a block device.

#![allow(unsafe_code)]

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, fallocate, fcntl_getfl, flock};
use rustix::io::Errno;

use super::BlockError;
use super::backend::Backend;
use super::request::SECTOR;
use crate::memory::{GuestRead, GuestWrite};

/// The most buffers the kernel takes in one call (IOV_MAX).
const IOV_MAX: usize = 1024;
/// Zeroes written at once where the file system cannot zero a range by itself.
const ZEROES: usize = 64 * 1024;

/// An image file or block device. Its lock, for itself if writable and for readers otherwise, is that of its open file
/// description: whoever is lent a descriptor has the lock as well, and it goes when the last of them is closed.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    len: u64,
    path: PathBuf,
    read_only: bool,
    lock: Mutex<Lock>,
}

/// How the lock of a file stands.
#[derive(Clone, Copy, Debug, Default)]
struct Lock {
    /// It was taken, or the file system has none.
    taken: bool,
    /// Another process was given the descriptor, and with it the lock.
    lent: bool,
    /// It was lent, and the other process may have given it back.
    stale: bool,
}

impl RawFile {
    /// Opens and locks `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let file = Self::open_unlocked(path, read_only)?;
        file.take_lock()?;
        Ok(file)
    }

    /// Opens `path`, whose lock somebody else may have; [`Self::take_lock`] before the first request.
    pub fn open_unlocked(path: &Path, read_only: bool) -> Result<Self, BlockError> {
        // Looked at before it is opened, since opening a pipe waits for its other end.
        match std::fs::metadata(path) {
            Ok(metadata) => check_kind(path, &metadata)?,
            Err(error) => return Err(open_error(path, read_only, error)),
        }
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|error| open_error(path, read_only, error))?;
        Self::new(file, path, read_only)
    }

    /// Takes a file that another process opened, with its lock. `path` only appears in messages: the file need not have
    /// this name, or any, where this process is.
    pub fn received(file: OwnedFd, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let file = File::from(file);
        let other = |source| BlockError::Other {
            path: path.into(),
            source,
        };
        let received = |what| BlockError::Received {
            path: path.into(),
            what,
        };
        let flags = fcntl_getfl(&file).map_err(|error| other(error.into()))?;
        // One of these reads as if it were open for reading.
        if flags.contains(OFlags::PATH) {
            return Err(received("is not open"));
        }
        check_kind(path, &file.metadata().map_err(other)?)?;
        match (read_only, flags & OFlags::ACCMODE) {
            (true, OFlags::RDONLY) | (false, OFlags::RDWR) => {}
            (true, _) => return Err(received("is not open for reading only, as `readonly` says")),
            (false, _) => return Err(received("is not open for reading and writing")),
        }
        // The one would move writes to the end, the other wants buffers aligned that a guest may place anywhere.
        if flags.intersects(OFlags::APPEND | OFlags::DIRECT) {
            return Err(received("is open with O_APPEND or O_DIRECT"));
        }
        let file = Self::new(file, path, read_only)?;
        // Whoever has the lock by this very description takes it once more without effect.
        file.take_lock()?;
        Ok(file)
    }

    fn new(mut file: File, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        // The length in the metadata of a block device is 0. All transfers say where, so that it does not matter to others
        // with this description that its offset moves.
        let len = file
            .seek(SeekFrom::End(0))
            .map_err(|source| BlockError::Other {
                path: path.into(),
                source,
            })?;
        if len == 0 {
            return Err(BlockError::Empty(path.into()));
        }
        if !len.is_multiple_of(SECTOR) {
            return Err(BlockError::Length {
                path: path.into(),
                len,
            });
        }
        Ok(Self {
            file,
            len,
            path: path.into(),
            read_only,
            lock: Mutex::default(),
        })
    }

    /// Takes the lock. True if it was not taken before.
    ///
    /// # Errors
    ///
    /// [`BlockError::InUse`] if somebody else has it.
    pub fn take_lock(&self) -> Result<bool, BlockError> {
        let mut state = self.lock();
        if state.taken && !state.stale {
            return Ok(false);
        }
        lock(&self.path, &self.file, self.read_only)?;
        let before = std::mem::replace(&mut state.taken, true);
        state.stale = false;
        Ok(!before)
    }

    /// Gives the lock back, if it was taken; the file stays open. Nothing may be in flight. Without effect on a file that
    /// was lent: its lock is that of the other process as well.
    pub fn release_lock(&self) {
        let mut state = self.lock();
        if !state.taken || state.lent {
            return;
        }
        if let Err(error) = flock(&self.file, FlockOperation::NonBlockingUnlock) {
            // One that has no locks, about which there was a warning.
            tracing::debug!(path = %self.path.display(), %error, "cannot unlock disk");
        }
        state.taken = false;
    }

    /// A second descriptor. Whoever has it has the lock, if this one has: to be told by [`Self::set_lent`].
    ///
    /// # Errors
    ///
    /// The host refused a descriptor.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.file.try_clone().map(OwnedFd::from)
    }

    /// Whether another process has a descriptor, or is about to get one.
    ///
    /// Whoever had one can have given the lock of both back, and to somebody else: once it is over, the lock has to be
    /// [taken](Self::take_lock) again, which has no effect if nobody did.
    pub fn set_lent(&self, lent: bool) {
        let mut state = self.lock();
        state.stale |= state.lent && !lent;
        state.lent = lent;
    }

    /// Has on the storage what was written.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    /// Whether another process has a descriptor.
    pub fn is_lent(&self) -> bool {
        self.lock().lent
    }

    fn lock(&self) -> MutexGuard<'_, Lock> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
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

fn check_kind(path: &Path, metadata: &Metadata) -> Result<(), BlockError> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(BlockError::Directory(path.into()));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(BlockError::Kind(path.into()));
    }
    Ok(())
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
