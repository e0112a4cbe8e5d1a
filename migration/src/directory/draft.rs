//! The directory a snapshot is written to until it is whole.
//!
//! It stands beside what it will become, is called `.tern-snapshot-PID-RANDOM`, and is locked (`flock`) while its writer
//! lives. A writer that is killed leaves it; the next one that writes beside it removes it, if nobody has it locked and
//! there is no process with that number.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, CWD, Dir, FlockOperation, Mode, OFlags, flock, fstat, fstatvfs, mkdirat, openat,
    statat, unlinkat,
};
use rustix::io::Errno;
use rustix::process::{Pid, geteuid, test_kill_process};

use super::{FILES, FileId};
use crate::error::WriteError;
use crate::id;

/// What names of drafts begin with.
const PREFIX: &str = ".tern-snapshot-";

/// To open a directory, itself and not what a link leads to.
const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A directory that is removed when it is dropped, unless it was kept.
#[derive(Debug)]
pub(crate) struct Draft {
    /// What it will become, for messages.
    target: PathBuf,
    /// The directory it stands in.
    parent: OwnedFd,
    name: OsString,
    /// Itself, locked.
    directory: OwnedFd,
    kept: AtomicBool,
}

impl Draft {
    /// Makes one in `parent`, for `target`.
    pub fn make(parent: OwnedFd, target: &Path) -> Result<Self, WriteError> {
        let failed = |source: io::Error| WriteError::Io {
            what: "make a directory beside",
            path: target.into(),
            source,
        };
        for _ in 0..16 {
            let mut random = [0; 8];
            id::fill(&mut random).map_err(failed)?;
            let (pid, random) = (std::process::id(), u64::from_ne_bytes(random));
            let name = format!("{PREFIX}{pid}-{random:016x}");
            if let Some(directory) = make_locked(&parent, &name).map_err(|e| failed(e.into()))? {
                return Ok(Self {
                    target: target.into(),
                    parent,
                    name: name.into(),
                    directory,
                    kept: AtomicBool::new(false),
                });
            }
        }
        Err(failed(io::ErrorKind::AlreadyExists.into()))
    }

    /// What it will become.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The directory it stands in.
    pub fn parent(&self) -> &OwnedFd {
        &self.parent
    }

    /// Its name in there.
    pub fn name(&self) -> &OsString {
        &self.name
    }

    /// Itself.
    pub fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Creates a file in it, for nobody else.
    pub fn create(&self, name: &'static str) -> Result<File, WriteError> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.directory, name, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(|source| self.write_error(&self.directory, name, source.into(), 0))
    }

    /// The error of writing to `file`, called `name`, which may take `needed` bytes in all.
    pub fn write_error(
        &self,
        file: impl AsFd,
        name: &str,
        source: io::Error,
        needed: u64,
    ) -> WriteError {
        let path = self.target.join(name);
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT) => WriteError::NoSpace {
                path,
                needed,
                free: fstatvfs(file)
                    .map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))
                    .unwrap_or_default(),
            },
            _ => WriteError::Io {
                what: "write",
                path,
                source,
            },
        }
    }

    /// It is no draft any more: what its name stands for now is not removed.
    pub fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed)
            && let Err(error) = remove(&self.parent, &self.name, &self.directory)
        {
            tracing::warn!(target = %self.target.display(), name = %self.name.display(), %error,
                "cannot remove what was written of a snapshot");
        }
    }
}

/// A new directory, locked. None if there is one already, or somebody took it for a leftover before it was locked.
fn make_locked(parent: &OwnedFd, name: &str) -> rustix::io::Result<Option<OwnedFd>> {
    match mkdirat(parent, name, Mode::RWXU) {
        Ok(()) => {}
        Err(Errno::EXIST) => return Ok(None),
        Err(error) => return Err(error),
    }
    let directory = match openat(parent, name, DIRECTORY, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    if !lock(&directory) {
        return Ok(None);
    }
    let itself = fstat(&directory)?;
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(there) if FileId::of(&there) == FileId::of(&itself) => {}
        Ok(_) | Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error),
    }
    // Somebody else's, put there in between.
    if itself.st_uid != geteuid().as_raw() || itself.st_mode & 0o077 != 0 {
        return Err(Errno::ACCESS);
    }
    Ok(Some(directory))
}

/// False if somebody else has it locked. On a file system without locks nobody has.
fn lock(directory: &OwnedFd) -> bool {
    !matches!(
        flock(directory, FlockOperation::NonBlockingLockExclusive),
        Err(Errno::WOULDBLOCK)
    )
}

/// Removes the snapshot, or part of one, that is called `name` in `parent`, and nothing else.
pub(crate) fn remove(
    parent: &OwnedFd,
    name: &OsString,
    directory: &OwnedFd,
) -> rustix::io::Result<()> {
    for file in FILES {
        match unlinkat(directory, file, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(error),
        }
    }
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Removes a snapshot that was just exchanged for a draft and has its name.
pub(crate) fn remove_replaced(parent: &OwnedFd, name: &OsString) -> rustix::io::Result<()> {
    let directory = openat(parent, name, DIRECTORY, Mode::empty())?;
    remove(parent, name, &directory)
}

/// Removes from `parent` the drafts of writers that are gone. What cannot be removed stays.
pub(crate) fn sweep(parent: &OwnedFd) {
    let Ok(entries) = Dir::read_from(parent) else {
        return;
    };
    for entry in entries.flatten() {
        let Some(pid) = pid_of(entry.file_name().to_bytes()) else {
            continue;
        };
        // A process of another container may have this number; its lock tells.
        let alive = Pid::from_raw(pid)
            .is_none_or(|pid| !matches!(test_kill_process(pid), Err(Errno::SRCH)));
        if alive {
            continue;
        }
        let Ok(directory) = openat(parent, entry.file_name(), DIRECTORY, Mode::empty()) else {
            continue;
        };
        let ours = fstat(&directory).is_ok_and(|stat| stat.st_uid == geteuid().as_raw());
        if !ours || !lock(&directory) {
            continue;
        }
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        match remove(parent, &name, &directory) {
            Ok(()) => tracing::debug!(name = %name.display(), "removed what a killed writer left"),
            Err(error) => tracing::warn!(name = %name.display(), %error,
                "cannot remove what a killed writer left"),
        }
    }
}

/// The number in the name of a draft.
fn pid_of(name: &[u8]) -> Option<i32> {
    let rest = std::str::from_utf8(name).ok()?.strip_prefix(PREFIX)?;
    let (pid, random) = rest.split_once('-')?;
    let well_formed = random.len() == 16
        && random.bytes().all(|b| b.is_ascii_hexdigit())
        && pid.bytes().all(|b| b.is_ascii_digit());
    pid.parse().ok().filter(|pid| well_formed && *pid > 0)
}

/// Opens the directory that `target` is to be made in, and says what it will be called there.
pub(crate) fn open_parent(target: &Path) -> Result<(OwnedFd, PathBuf, OsString), WriteError> {
    let name = target.file_name();
    let name = name.ok_or_else(|| WriteError::Name(target.into()))?;
    let parent = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let failed = |source| WriteError::Io {
        what: "open",
        path: parent.into(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat(CWD, parent, flags, Mode::empty()).map_err(|e| failed(e.into()))?;
    let absolute = parent.canonicalize().map_err(failed)?;
    Ok((directory, absolute, name.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_drafts_have_a_number() {
        assert_eq!(pid_of(b".tern-snapshot-17-0123456789abcdef"), Some(17));
        for name in [
            "tern-snapshot-17-0123456789abcdef",
            ".tern-snapshot-17",
            ".tern-snapshot-17-0123456789abcde",
            ".tern-snapshot-17-0123456789abcdeg",
            ".tern-snapshot-0-0123456789abcdef",
            ".tern-snapshot--1-0123456789abcdef",
            ".tern-snapshot-+1-0123456789abcdef",
            ".tern-snapshot-99999999999-0123456789abcdef",
        ] {
            assert_eq!(pid_of(name.as_bytes()), None, "{name}");
        }
        assert_eq!(pid_of(b".tern-snapshot-17-\xff123456789abcde"), None);
    }
}
