//! Opens a snapshot that may be anything.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, openat, statat};
use rustix::io::Errno;
use rustix::process::geteuid;

use super::{MAP, MAX_STATE, MEMORY, STATE};
use crate::error::ReadError;
use crate::memory::header::{HEADER_LEN, Header, HeaderError};
use crate::pages::PageSet;

/// What makes two names the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// The directory of a snapshot, and its files, which stay these whatever becomes of their names.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    directory: OwnedFd,
    state: File,
    memory: File,
    map: Option<File>,
}

impl Reader {
    /// Opens the snapshot at `path`.
    ///
    /// `path` may be a symbolic link. What stands for a file in it must be a regular file: anything else is refused
    /// without being opened.
    pub fn open(path: &Path) -> Result<Self, ReadError> {
        Self::open_at(CWD, path, path.into(), OFlags::empty())
    }

    /// Opens the snapshot at `path`, which is relative to this one's directory.
    pub(crate) fn open_beside(&self, path: &Path) -> Result<Self, ReadError> {
        let shown = self.path.join(path);
        Self::open_at(&self.directory, path, shown, OFlags::empty())
    }

    pub(super) fn open_at(
        parent: impl std::os::fd::AsFd,
        path: &Path,
        shown: PathBuf,
        flags: OFlags,
    ) -> Result<Self, ReadError> {
        let flags = flags | OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match openat(parent, path, flags, Mode::empty()) {
            Ok(directory) => directory,
            Err(Errno::NOENT) => return Err(ReadError::Missing(shown)),
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(ReadError::NotADirectory(shown)),
            Err(error) => return Err(failed("open", &shown)(error.into())),
        };
        let required = |name| {
            let file = regular(&directory, name, &shown)?;
            file.ok_or_else(|| ReadError::Missing(shown.join(name)))
        };
        Ok(Self {
            state: required(STATE)?,
            memory: required(MEMORY)?,
            map: regular(&directory, MAP, &shown)?,
            directory,
            path: shown,
        })
    }

    pub(crate) fn try_clone(&self) -> Result<Self, ReadError> {
        let failed = failed("open", &self.path);
        Ok(Self {
            path: self.path.clone(),
            directory: self.directory.try_clone().map_err(&failed)?,
            state: self.state.try_clone().map_err(&failed)?,
            memory: self.memory.try_clone().map_err(&failed)?,
            map: self
                .map
                .as_ref()
                .map(File::try_clone)
                .transpose()
                .map_err(failed)?,
        })
    }

    /// The directory, as it was named.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn directory(&self) -> &OwnedFd {
        &self.directory
    }

    /// Which directory it is.
    pub fn identity(&self) -> Result<FileId, ReadError> {
        let stat = fstat(&self.directory).map_err(|e| failed("examine", &self.path)(e.into()))?;
        Ok(FileId::of(&stat))
    }

    /// Whether the directory and all its files belong to who runs this process, and nobody else may write them. If not,
    /// what the snapshot says (paths, above all) is somebody else's word.
    pub fn belongs_to_caller(&self) -> Result<(), ReadError> {
        let files = [(STATE, &self.state), (MEMORY, &self.memory)];
        let map = self.map.as_ref().map(|map| (MAP, map));
        owned(&self.directory, &self.path)?;
        for (name, file) in files.into_iter().chain(map) {
            owned(file, &self.path.join(name))?;
        }
        Ok(())
    }

    /// The contents of `state.json`, at most [`MAX_STATE`] bytes.
    pub fn state(&self) -> Result<Vec<u8>, ReadError> {
        let path = self.path.join(STATE);
        let failed = failed("read", &path);
        let len = self.state.metadata().map_err(&failed)?.len();
        let mut bytes = Vec::new();
        if len <= MAX_STATE {
            let mut file = At(&self.state, 0).take(MAX_STATE + 1);
            file.read_to_end(&mut bytes).map_err(&failed)?;
        }
        // It may have grown.
        let len = len.max(bytes.len() as u64);
        if len > MAX_STATE {
            let max = MAX_STATE;
            return Err(ReadError::TooLong { path, len, max });
        }
        Ok(bytes)
    }

    /// What `memory.bin` says about itself. Its length is what it says.
    pub fn header(&self) -> Result<Header, ReadError> {
        let path = self.path.join(MEMORY);
        let failed = failed("read", &path);
        let len = self.memory.metadata().map_err(&failed)?.len();
        let refused = |source| ReadError::Header {
            path: path.clone(),
            source,
        };
        let at = len.checked_sub(HEADER_LEN);
        let at = at.ok_or_else(|| refused(HeaderError::Magic))?;
        let mut bytes = [0; HEADER_LEN as usize];
        let outcome = self.memory.read_exact_at(&mut bytes, at);
        outcome.map_err(&failed)?;
        let header = Header::decode(&bytes).map_err(refused)?;
        let expected = header.layout.bytes() + HEADER_LEN;
        if len != expected {
            return Err(ReadError::Length {
                path,
                len,
                expected,
            });
        }
        Ok(header)
    }

    /// The pages that `memory.bin`, whose header is `header`, has, unless it has all.
    pub(crate) fn map(&self, header: &Header) -> Result<Option<PageSet>, ReadError> {
        let path = self.path.join(MAP);
        let (file, needed) = match (&self.map, &header.base) {
            (Some(map), Some(_)) => (map, PageSet::byte_len(&header.layout)),
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(ReadError::Missing(path)),
            (Some(_), None) => return Err(ReadError::OtherMap(path)),
        };
        let failed = failed("read", &path);
        let (len, expected) = (file.metadata().map_err(&failed)?.len(), needed as u64);
        if len != expected {
            return Err(ReadError::Length {
                path,
                len,
                expected,
            });
        }
        let mut bytes = vec![0; needed];
        file.read_exact_at(&mut bytes, 0).map_err(&failed)?;
        let set = match PageSet::from_bytes(&header.layout, &bytes) {
            Ok(set) => set,
            Err(source) => return Err(ReadError::Map { path, source }),
        };
        if set.count() != header.pages {
            return Err(ReadError::OtherMap(path));
        }
        Ok(Some(set))
    }

    pub(crate) fn memory(&self) -> Result<File, ReadError> {
        let path = self.path.join(MEMORY);
        self.memory.try_clone().map_err(failed("open", &path))
    }
}

fn failed(what: &'static str, path: &Path) -> impl Fn(io::Error) -> ReadError + use<> {
    let path = path.to_path_buf();
    move |source| ReadError::Io {
        what,
        path: path.clone(),
        source,
    }
}

/// Opens `name` in `directory`, if it is there, without waiting for anything.
fn regular(
    directory: &OwnedFd,
    name: &'static str,
    shown: &Path,
) -> Result<Option<File>, ReadError> {
    let path = shown.join(name);
    let failed = failed("open", &path);
    let refused = |kind| ReadError::NotRegular {
        path: path.clone(),
        kind,
    };
    // Before it is opened: that can have effects on what is no file.
    let before = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(failed(error.into())),
    };
    if let Some(kind) = kind(&before) {
        return Err(refused(kind));
    }
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat(directory, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::LOOP) => return Err(refused("a symbolic link")),
        Err(error) => return Err(failed(error.into())),
    };
    let itself = fstat(&file).map_err(|e| failed(e.into()))?;
    match kind(&itself) {
        Some(kind) => Err(refused(kind)),
        None => Ok(Some(file.into())),
    }
}

/// What it is, if it is no regular file.
fn kind(stat: &Stat) -> Option<&'static str> {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => None,
        FileType::Directory => Some("a directory"),
        FileType::Symlink => Some("a symbolic link"),
        FileType::Fifo => Some("a FIFO"),
        FileType::Socket => Some("a socket"),
        FileType::CharacterDevice | FileType::BlockDevice => Some("a device"),
        FileType::Unknown => Some("something unknown"),
    }
}

fn owned(file: impl std::os::fd::AsFd, path: &Path) -> Result<(), ReadError> {
    let stat = fstat(file).map_err(|e| failed("examine", path)(e.into()))?;
    let why = if stat.st_uid != geteuid().as_raw() {
        format!("belongs to user {}", stat.st_uid)
    } else if stat.st_mode & 0o022 != 0 {
        format!("can be written by others (mode {:o})", stat.st_mode & 0o777)
    } else {
        return Ok(());
    };
    Err(ReadError::Untrusted {
        path: path.into(),
        why,
    })
}

/// A file from a place on; its own place in the file does not change.
struct At<'f>(&'f File, u64);

impl Read for At<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read_at(out, self.1)?;
        self.1 += n as u64;
        Ok(n)
    }
}
