//! Writes a snapshot that is there whole or not at all.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, OFlags, RenameFlags, fsync, renameat, renameat_with, statat};
use rustix::io::Errno;

use super::draft::{self, Draft};
use super::{FILES, FileId, MAX_STATE, Reader, STATE};
use crate::error::{ReadError, WriteError};
use crate::layout::RamLayout;
use crate::memory::header::MAX_PATH;
use crate::memory::{BaseName, Bases, Finished, Image, MemoryWriter};

/// What to do if there is something of the name of the new snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Fail.
    Refuse,
    /// Replace it, if it is a snapshot and nothing else.
    Replace,
}

/// A snapshot that is being written. Nothing is visible of it, and it leaves nothing, until it is committed.
#[derive(Debug)]
pub struct Writer {
    draft: Arc<Draft>,
    /// The directory it will be in, absolute and without links.
    parent: PathBuf,
    name: OsString,
    existing: Existing,
}

/// A snapshot that is on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Where it is: absolute, and without links.
    pub path: PathBuf,
    /// Whether another one was there before.
    pub replaced: bool,
    /// Bytes that its files take on disk.
    pub disk_bytes: u64,
}

impl Writer {
    /// Begins to write the snapshot that will be at `target`.
    ///
    /// Removes what killed writers left beside it.
    pub fn create(target: &Path, existing: Existing) -> Result<Self, WriteError> {
        let (directory, parent, name) = draft::open_parent(target)?;
        draft::sweep(&directory);
        let draft = Draft::make(directory, target)?;
        let writer = Self {
            draft: Arc::new(draft),
            parent,
            name,
            existing,
        };
        // Once more when it is committed; but then somebody has waited for it.
        writer.existing()?;
        Ok(writer)
    }

    /// What is there by its name, if it may be replaced.
    fn existing(&self) -> Result<Option<FileId>, WriteError> {
        let target = self.draft.target();
        match statat(self.draft.parent(), &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.failed("examine", error)),
            Ok(_) if self.existing == Existing::Refuse => {
                return Err(WriteError::Exists(target.into()));
            }
            Ok(_) => {}
        }
        let refused = |why: String| WriteError::NotASnapshot {
            path: target.into(),
            why,
        };
        let name = Path::new(&self.name);
        let old = Reader::open_at(self.draft.parent(), name, target.into(), OFlags::NOFOLLOW)
            .and_then(|old| old.header().map(|_| old))
            .map_err(|e| refused(e.to_string()))?;
        let entries = Dir::read_from(old.directory()).map_err(|e| self.failed("list", e))?;
        for entry in entries {
            let entry = entry.map_err(|e| self.failed("list", e))?;
            let name = entry.file_name().to_bytes();
            let known = FILES.iter().any(|file| file.as_bytes() == name);
            if !known && name != b"." && name != b".." {
                let name = String::from_utf8_lossy(name);
                return Err(refused(format!("it contains {name:?}")));
            }
        }
        let identity = old.identity().map_err(|e| refused(e.to_string()))?;
        Ok(Some(identity))
    }

    fn failed(&self, what: &'static str, error: Errno) -> WriteError {
        WriteError::Io {
            what,
            path: self.draft.target().into(),
            source: error.into(),
        }
    }

    /// Begins to write the memory of a guest whose RAM is `layout`: all of it, or what changed since the snapshot at
    /// `base`, which with all its own bases must belong to the caller.
    pub fn memory(
        &self,
        layout: &RamLayout,
        base: Option<&Path>,
    ) -> Result<MemoryWriter, WriteError> {
        let Some(path) = base else {
            return MemoryWriter::create(Arc::clone(&self.draft), layout, None, Vec::new());
        };
        let failed = |e| WriteError::Base(Box::new(e));
        let reader = Reader::open(path).map_err(failed)?;
        reader.belongs_to_caller().map_err(failed)?;
        let image = Image::open(&reader, None, Bases::Follow).map_err(failed)?;
        if image.layout() != layout {
            let memory = path.join(super::MEMORY);
            return Err(failed(ReadError::OtherLayout(memory)));
        }
        let needs: Vec<_> = image.layers().iter().map(|layer| layer.identity).collect();
        self.spares(self.existing()?, &needs)?;
        let absolute = path.canonicalize().map_err(|source| {
            failed(ReadError::Io {
                what: "find",
                path: path.into(),
                source,
            })
        })?;
        let relative = relative(&self.parent.join(&self.name), &absolute);
        if relative.as_os_str().as_bytes().len() > MAX_PATH {
            return Err(WriteError::BasePath(relative));
        }
        let base = BaseName {
            id: image.id(),
            path: relative,
        };
        let base = Some((base, image.header().depth));
        MemoryWriter::create(Arc::clone(&self.draft), layout, base, needs)
    }

    /// Fails if `existing` is one of those that the new snapshot needs.
    fn spares(&self, existing: Option<FileId>, needs: &[FileId]) -> Result<(), WriteError> {
        match existing {
            Some(old) if needs.contains(&old) => {
                Err(WriteError::ReplacesBase(self.draft.target().into()))
            }
            _ => Ok(()),
        }
    }

    /// Puts the snapshot in its place, with `state` as its `state.json`. Everything is on disk when this returns.
    ///
    /// Until it returns, what was there before still is: at every moment one of the two is there, and whole. Only if
    /// the directory they are in cannot be synced the new one stays although this fails.
    pub fn commit(self, state: &[u8], memory: Finished) -> Result<Committed, WriteError> {
        if !Arc::ptr_eq(&self.draft, &memory.draft) {
            return Err(WriteError::OtherMemory);
        }
        if state.len() as u64 > MAX_STATE {
            return Err(WriteError::StateTooLong(state.len() as u64));
        }
        let mut file = self.draft.create(STATE)?;
        file.write_all(state)
            .map_err(|e| self.draft.write_error(&file, STATE, e, state.len() as u64))?;
        let mut disk_bytes = 0;
        for file in memory.files.iter().chain([&file]) {
            let synced = file.sync_all().and_then(|()| file.metadata());
            let metadata = synced.map_err(|e| {
                self.draft
                    .write_error(file, "", e, memory.header.data_pages * crate::PAGE_SIZE)
            })?;
            disk_bytes += metadata.blocks() * 512;
        }
        fsync(self.draft.directory()).map_err(|e| self.failed("sync", e))?;
        let replaced = self.rename(&memory)?;
        self.draft.keep();
        fsync(self.draft.parent()).map_err(|e| self.failed("sync the directory of", e))?;
        if replaced
            && let Err(error) = draft::remove_replaced(self.draft.parent(), self.draft.name())
        {
            tracing::warn!(name = %self.draft.name().display(), %error,
                "cannot remove the snapshot that was replaced");
        }
        Ok(Committed {
            path: self.parent.join(&self.name),
            replaced,
            disk_bytes,
        })
    }

    /// Gives the draft its name. True if something else had it, which has the draft's now.
    fn rename(&self, memory: &Finished) -> Result<bool, WriteError> {
        let (parent, from) = (self.draft.parent(), self.draft.name());
        let move_to = |flags| renameat_with(parent, from, parent, &self.name, flags);
        if let Some(old) = self.existing()? {
            self.spares(Some(old), &memory.needs)?;
            return match move_to(RenameFlags::EXCHANGE) {
                Ok(()) => Ok(true),
                Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                    Err(WriteError::CannotReplace(self.draft.target().into()))
                }
                Err(error) => Err(self.failed("rename to", error)),
            };
        }
        let outcome = match move_to(RenameFlags::NOREPLACE) {
            // A file system that cannot say it. A directory replaces an empty one at most.
            Err(Errno::INVAL | Errno::NOSYS) => renameat(parent, from, parent, &self.name),
            outcome => outcome,
        };
        match outcome {
            Ok(()) => Ok(false),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {
                Err(WriteError::Exists(self.draft.target().into()))
            }
            Err(error) => Err(self.failed("rename to", error)),
        }
    }
}

/// The path that leads from directory `from` to `to`, both absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let mut from = from.components().peekable();
    let mut to = to.components().peekable();
    while let (Some(a), Some(b)) = (from.peek(), to.peek())
        && a == b
    {
        from.next();
        to.next();
    }
    let up = from.map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(to).collect();
    if path.as_os_str().is_empty() {
        return PathBuf::from(".");
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_found_from_the_snapshot() {
        for (from, to, path) in [
            ("/a/new", "/a/old", "../old"),
            ("/a/new", "/b/c/old", "../../b/c/old"),
            ("/a/b/new", "/a", "../.."),
            ("/a", "/a/old", "old"),
            ("/a", "/a", "."),
        ] {
            assert_eq!(relative(from.as_ref(), to.as_ref()), Path::new(path));
        }
    }
}
