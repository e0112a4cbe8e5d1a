//! What the bytes of guest RAM are kept in.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{FlockOperation, MemfdFlags, SealFlags, flock, memfd_create};
use rustix::fs::{fcntl_add_seals, fcntl_get_seals, ftruncate};
use rustix::io::Errno;

use super::mapping::Source;
use super::{MemoryError, PAGE_SIZE, RamRange};

/// What the bytes of guest RAM are kept in.
///
/// | backing | large pages | can be given to another process | pages that were never touched |
/// |---|---|---|---|
/// | anonymous | by `MADV_HUGEPAGE`, as they are touched | no | cost nothing |
/// | memfd | by [`GuestRam::enlarge`](super::GuestRam::enlarge) or, once touched, [`GuestRam::collapse`](super::GuestRam::collapse) | yes | cost nothing until they are *read* through the mapping |
/// | file | none | no | are read from the file when touched |
#[derive(Debug)]
pub enum Backing {
    /// Anonymous private memory.
    Anonymous,
    /// A memfd, mapped shared, with the ranges packed one after the other. See [`Backing::memfd`].
    ///
    /// One that came from another process must be sealed against shrinking, as ours are: whoever kept a descriptor of it
    /// could otherwise take pages away under a running guest.
    Memfd(OwnedFd),
    /// A file, mapped privately: the guest starts with its contents, and what the guest writes never reaches it.
    ///
    /// The file is locked for readers (`flock`) as long as the RAM exists. Nothing but that lock keeps others from
    /// shortening it: a page that is gone when the guest touches it ends the process (SIGBUS) or the guest (`EFAULT`
    /// from `KVM_RUN`).
    File {
        /// Open for reading.
        file: File,
        /// Offset of each RAM range in the file, in bytes; multiples of [`PAGE_SIZE`].
        offsets: Vec<u64>,
    },
}

impl Backing {
    /// A new memfd of `bytes`, which can neither shrink nor grow.
    pub fn memfd(bytes: u64) -> Result<Self, MemoryError> {
        let failed = |source: Errno| MemoryError::Allocate {
            bytes,
            source: source.into(),
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Hosts may insist on memory that cannot be executed as a program; kernels before 6.3 do not know the flag.
        let fd = match memfd_create(c"tern-guest-ram", flags | MemfdFlags::NOEXEC_SEAL) {
            Err(Errno::INVAL) => memfd_create(c"tern-guest-ram", flags),
            other => other,
        }
        .map_err(failed)?;
        ftruncate(&fd, bytes).map_err(failed)?;
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(failed)?;
        Ok(Self::Memfd(fd))
    }

    /// Checks that there is a byte for each one of `ranges`, and locks what needs a lock.
    pub(super) fn prepare(&self, ranges: &[RamRange]) -> Result<(), MemoryError> {
        match self {
            Self::Anonymous => Ok(()),
            Self::Memfd(fd) => {
                let seals = fcntl_get_seals(fd).map_err(|e| failed("read the seals", e.into()))?;
                if !seals.contains(SealFlags::SHRINK) {
                    return Err(MemoryError::NotSealed);
                }
                let needed = ranges.iter().map(|range| range.len as u64).sum();
                let len = rustix::fs::fstat(fd)
                    .map_err(|e| failed("read the length", e.into()))?
                    .st_size as u64;
                long_enough(len, needed)
            }
            Self::File { file, offsets } => {
                if offsets.len() != ranges.len() {
                    return Err(MemoryError::Offsets(offsets.len(), ranges.len()));
                }
                // Before the length is looked at, so that it stays what it is.
                lock(file)?;
                let metadata = file.metadata().map_err(|e| failed("read the length", e))?;
                if !metadata.is_file() {
                    return Err(MemoryError::NotAFile);
                }
                for (offset, range) in offsets.iter().zip(ranges) {
                    if !offset.is_multiple_of(PAGE_SIZE as u64) {
                        return Err(MemoryError::Offset(*offset));
                    }
                    let end = offset.checked_add(range.len as u64);
                    long_enough(metadata.len(), end.ok_or(MemoryError::Offset(*offset))?)?;
                }
                Ok(())
            }
        }
    }

    /// What to map for each of `ranges`, in their order.
    pub(super) fn sources<'a>(
        &'a self,
        ranges: &'a [RamRange],
    ) -> impl Iterator<Item = Source<'a>> {
        let mut packed = 0;
        ranges.iter().enumerate().map(move |(index, range)| {
            let at = packed;
            packed += range.len as u64;
            match self {
                Self::Anonymous => Source::Anonymous,
                Self::Memfd(fd) => Source::Shared(fd, at),
                Self::File { file, offsets } => {
                    Source::Private(file, offsets.get(index).copied().unwrap_or_default())
                }
            }
        })
    }

    /// Flags of a mapping of it, as `mmap` takes them.
    pub(super) fn map_flags(&self) -> libc::c_int {
        match self {
            Self::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            Self::Memfd(_) => libc::MAP_SHARED | libc::MAP_NORESERVE,
            Self::File { .. } => libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        }
    }
}

fn failed(what: &'static str, source: io::Error) -> MemoryError {
    MemoryError::File { what, source }
}

fn long_enough(len: u64, needed: u64) -> Result<(), MemoryError> {
    if len < needed {
        return Err(MemoryError::TooShort { len, needed });
    }
    Ok(())
}

fn lock(file: &File) -> Result<(), MemoryError> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(MemoryError::InUse),
        // A file system without locks. Refusing it would help nobody.
        Err(error) => {
            tracing::warn!(%error, "cannot lock memory file; make sure that nobody changes it while the VM runs");
            Ok(())
        }
    }
}
