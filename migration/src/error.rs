//! Why a snapshot could not be written or read.

use std::io;
use std::path::PathBuf;

use crate::directory::MAX_STATE;
use crate::id::SnapshotId;
use crate::memory::header::HeaderError;
use crate::pages::BadPageSet;

/// Why a snapshot could not be written. Nothing of it is left then, and what was there before still is.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The file system or the quota is full.
    #[error(
        "no space left for {}: up to {} are needed in all, {} are free now; \
         make room or choose another file system",
        path.display(), size(*needed), size(*free)
    )]
    NoSpace {
        /// The file being written.
        path: PathBuf,
        /// Bytes that this file may take in all.
        needed: u64,
        /// Bytes that the file system says it has.
        free: u64,
    },
    /// Something is there already.
    #[error("{} exists; choose another name, or have it replaced (--replace)", .0.display())]
    Exists(PathBuf),
    /// What is to be replaced is no snapshot.
    #[error("{} is not replaced, since it is no snapshot: {why}; remove it first", path.display())]
    NotASnapshot {
        /// What is to be replaced.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A path has no last component to create.
    #[error("{} cannot be the name of a snapshot", .0.display())]
    Name(PathBuf),
    /// The file system cannot exchange two directories.
    #[error("the file system of {} cannot replace a snapshot at once; write it to a new name", .0.display())]
    CannotReplace(PathBuf),
    /// The base of an incremental snapshot cannot be read.
    #[error("the base of the snapshot cannot be used")]
    Base(#[source] Box<ReadError>),
    /// What is to be replaced is what the new snapshot is based on.
    #[error("{} cannot be replaced: the new snapshot needs it as a base", .0.display())]
    ReplacesBase(PathBuf),
    /// A chain of bases got too long.
    #[error("the base has {0} bases itself, and a chain cannot be longer; write a full snapshot")]
    TooDeep(u32),
    /// The path from a snapshot to its base does not fit into the file.
    #[error("the path from the snapshot to its base, {}, is too long", .0.display())]
    BasePath(PathBuf),
    /// The memory that is passed is not laid out as the memory file.
    #[error("guest RAM has another layout than the snapshot being written")]
    Layout,
    /// The description of the VM is longer than any that is read.
    #[error("the state of the VM has {0} bytes; more than {MAX_STATE} are not read again")]
    StateTooLong(u64),
    /// Pages were never written.
    #[error("{0} pages of guest RAM were not written")]
    Incomplete(u64),
    /// A pass failed before, so that nobody knows what the file contains.
    #[error("an earlier part of the snapshot failed")]
    Failed,
    /// The memory belongs to another snapshot.
    #[error("the memory is that of another snapshot")]
    OtherMemory,
    /// The progress callback wanted it to end.
    #[error("the snapshot was given up")]
    Cancelled,
}

/// Why a snapshot was refused.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// There is no such file or directory.
    #[error("{} does not exist; a snapshot is a directory with state.json and memory.bin", .0.display())]
    Missing(PathBuf),
    /// It is something else than a directory.
    #[error("{} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// It is something else than a regular file.
    #[error("{} is {kind}, not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A file is longer than any of its kind.
    #[error("{} has {len} bytes; more than {max} are not read", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        len: u64,
        /// Bytes it may have.
        max: u64,
    },
    /// A file does not have the length it says.
    #[error("{} has {len} bytes instead of {expected}; it is damaged", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        len: u64,
        /// Bytes it should have.
        expected: u64,
    },
    /// The end of a memory file is not that of one.
    #[error("{}: {source}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: HeaderError,
    },
    /// A memory map contradicts the RAM.
    #[error("{}: {source}", path.display())]
    Map {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BadPageSet,
    },
    /// A memory map has another number of pages than the memory file says, or stands where there should be none.
    #[error("{} does not belong to the memory file beside it", .0.display())]
    OtherMap(PathBuf),
    /// A memory file is that of another snapshot.
    #[error("{} is that of snapshot {found}, not of {expected}", path.display())]
    OtherSnapshot {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        found: SnapshotId,
        /// Whose it should be.
        expected: SnapshotId,
    },
    /// A memory file is that of a guest with other RAM.
    #[error("{} is that of a guest with other RAM ranges", .0.display())]
    OtherLayout(PathBuf),
    /// A memory file has another digest than is expected.
    #[error("{} has another digest than the snapshot it belongs to", .0.display())]
    OtherDigest(PathBuf),
    /// The contents do not have the digest they should have.
    #[error("the contents of {} were changed: their digest is not the one that was written", .0.display())]
    Changed(PathBuf),
    /// An incremental snapshot, and bases are not wanted.
    #[error("{} has a base, {}, which has to be given by name", path.display(), base.display())]
    HasBase {
        /// The memory file.
        path: PathBuf,
        /// Where it says that its base is.
        base: PathBuf,
    },
    /// None of the bases that were named is the one.
    #[error("snapshot {id}, the base of {}, is none of those that were named", path.display())]
    NoBase {
        /// The memory file.
        path: PathBuf,
        /// Its base.
        id: SnapshotId,
    },
    /// A chain of bases contradicts itself about its length.
    #[error("{}: its chain of bases is not as long as it says", .0.display())]
    Depth(PathBuf),
    /// Whoever reads it does not own it, or others may change it.
    #[error("{} {why}, so that what it says is not trusted", path.display())]
    Untrusted {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody is writing the file.
    #[error("{} is being written by another process", .0.display())]
    InUse(PathBuf),
    /// There is no page with that number.
    #[error("guest RAM has no page {0}")]
    NoPage(u64),
    /// The memory to fill is not laid out as the memory file.
    #[error("guest RAM has another layout than the snapshot being read")]
    Layout,
    /// The progress callback wanted it to end.
    #[error("reading the snapshot was given up")]
    Cancelled,
}

/// `bytes` for people.
fn size(bytes: u64) -> String {
    match bytes >> 20 {
        0 => format!("{} KiB", bytes.div_ceil(1024)),
        mib => format!("{mib} MiB"),
    }
}
