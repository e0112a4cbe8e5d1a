//! Writes a memory file in passes.

use std::fs::File;
use std::io::{self, Write};
use std::ops::{ControlFlow, Range};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::digest::{self, DigestError};
use super::header::{BaseName, HEADER_LEN, Header};
use super::{Digest, MAX_CHAIN};
use crate::directory::{self, Draft, FileId};
use crate::error::WriteError;
use crate::guest::{GuestPages, Piece};
use crate::id::SnapshotId;
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;
use crate::{OnProgress, Progress};

/// Bytes looked at, and written, at once: they are in the processor's cache when they are written.
const STEP: u64 = 1 << 20;
/// Bytes after which the file system is told to begin with them.
const WRITEBACK: u64 = 32 << 20;
/// Zeroes written at once where the file system cannot make holes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// What the guest does during a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It runs: the pass may take its time, and writes what it can to disk already.
    Running,
    /// It waits for the pass to end.
    Paused,
}

/// What a pass did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    /// Pages it was asked to write.
    pub pages: u64,
    /// Pages it wrote; the others were all zero.
    pub data_pages: u64,
}

/// Writes `memory.bin` of a snapshot, and `memory.map` of an incremental one.
///
/// Made by [`Writer::memory`](crate::Writer::memory). The passes are told which pages to write, in any order and as often
/// as wanted; a page is in the end what it was when it was written last. One that is all zero becomes a hole, also when
/// an earlier pass had written it. Whoever lets the guest run during a pass clears its dirty mark before the pass and
/// writes the page again if it is marked afterwards.
///
/// A pass that fails leaves it useless: drop it, and put all pages back that were taken for it from the log.
#[derive(Debug)]
pub struct MemoryWriter {
    draft: Arc<Draft>,
    file: File,
    layout: RamLayout,
    id: SnapshotId,
    base: Option<BaseName>,
    depth: u32,
    needs: Vec<FileId>,
    /// Pages that passes were asked for.
    covered: PageSet,
    /// Pages of the file that are no holes.
    data: PageSet,
    failed: bool,
}

/// A memory file that is complete, for [`Writer::commit`](crate::Writer::commit).
#[derive(Debug)]
pub struct Finished {
    pub(crate) draft: Arc<Draft>,
    /// To be synced.
    pub(crate) files: Vec<File>,
    /// Directories of the snapshots it is based on.
    pub(crate) needs: Vec<FileId>,
    /// What the file says about itself.
    pub header: Header,
}

impl Finished {
    /// Id of the snapshot.
    pub fn id(&self) -> SnapshotId {
        self.header.id
    }

    /// Digest of its memory.
    pub fn digest(&self) -> Digest {
        self.header.digest
    }
}

impl MemoryWriter {
    /// Creates the file in `draft`. `base` is what an incremental one is based on and how many bases that has, `needs`
    /// the directories of all of them.
    pub(crate) fn create(
        draft: Arc<Draft>,
        layout: &RamLayout,
        base: Option<(BaseName, u32)>,
        needs: Vec<FileId>,
    ) -> Result<Self, WriteError> {
        let io = |what, source| WriteError::Io {
            what,
            path: draft.target().join(directory::MEMORY),
            source,
        };
        let (base, depth) = match base {
            Some((_, depth)) if depth + 1 >= MAX_CHAIN => return Err(WriteError::TooDeep(depth)),
            Some((base, depth)) => (Some(base), depth + 1),
            None => (None, 0),
        };
        let id = SnapshotId::random().map_err(|e| io("choose an id for", e))?;
        let file = draft.create(directory::MEMORY)?;
        Ok(Self {
            draft,
            file,
            layout: layout.clone(),
            id,
            base,
            depth,
            needs,
            covered: PageSet::empty(layout),
            data: PageSet::empty(layout),
            failed: false,
        })
    }

    /// Id of the snapshot, which nobody else has.
    pub fn id(&self) -> SnapshotId {
        self.id
    }

    /// What it is based on.
    pub fn base(&self) -> Option<&BaseName> {
        self.base.as_ref()
    }

    /// The RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The pages that were written until now.
    pub fn written(&self) -> &PageSet {
        &self.covered
    }

    /// Writes `pages` of `guest` as they are now.
    pub fn pass<G: GuestPages + ?Sized>(
        &mut self,
        guest: &G,
        pages: &PageSet,
        mode: Guest,
        progress: OnProgress<'_>,
    ) -> Result<Pass, WriteError> {
        if *guest.layout() != self.layout || *pages.layout() != self.layout {
            return Err(WriteError::Layout);
        }
        if std::mem::replace(&mut self.failed, true) {
            return Err(WriteError::Failed);
        }
        let mut report = Pass {
            pages: pages.count(),
            data_pages: 0,
        };
        let total = report.pages * PAGE_SIZE;
        let mut done = 0;
        let mut begun = 0;
        // A piece of RAM that is occupied, and of which range.
        let mut known = (usize::MAX, 0..0);
        for run in pages.runs() {
            let mut at = run.offset;
            let end = run.offset + run.bytes();
            while at < end {
                let page = run.first + (at - run.offset) / PAGE_SIZE;
                if known.0 != run.range || !known.1.contains(&at) {
                    known = (run.range, occupied(guest, run.range, at).unwrap_or(0..0));
                }
                let piece = within(&known.1, at, end);
                let (count, filled) = match piece {
                    // Zeroes up to the next piece, or all of them.
                    Some(piece) if piece.start > at => ((piece.start - at) / PAGE_SIZE, false),
                    Some(piece) => (STEP.min(piece.end - at) / PAGE_SIZE, true),
                    None => ((end - at) / PAGE_SIZE, false),
                };
                let len = count * PAGE_SIZE;
                let outcome = match Piece::new(guest, run.range, at, len) {
                    Some(piece) if filled => self.write(&piece, page, count),
                    Some(_) => self.make_holes(page, count).map(|()| 0),
                    None => return Err(WriteError::Layout),
                };
                let left = (total - done) / PAGE_SIZE;
                report.data_pages += outcome.map_err(|e| self.error(e, left))?;
                at += len;
                done += len;
                if mode == Guest::Running && (report.data_pages - begun) * PAGE_SIZE >= WRITEBACK {
                    begun = report.data_pages;
                    self.begin_writeback();
                }
                if let ControlFlow::Break(()) = progress(Progress { done, total }) {
                    return Err(WriteError::Cancelled);
                }
            }
        }
        self.covered.union_with(pages);
        self.failed = false;
        Ok(report)
    }

    /// Writes those of `count` pages from number `first` on that are not all zero, and returns how many these are.
    fn write<G: GuestPages + ?Sized>(
        &mut self,
        piece: &Piece<'_, G>,
        first: u64,
        count: u64,
    ) -> io::Result<u64> {
        let mut written = 0;
        let mut at = 0;
        while at < count {
            let is_zero = piece.is_zero(at * PAGE_SIZE);
            let from = at;
            at += 1;
            while at < count && piece.is_zero(at * PAGE_SIZE) == is_zero {
                at += 1;
            }
            if is_zero {
                self.make_holes(first + from, at - from)?;
                continue;
            }
            let part = piece.part(from * PAGE_SIZE, (at - from) * PAGE_SIZE);
            let part = part.ok_or(io::ErrorKind::InvalidInput)?;
            part.write_to(&self.file, (first + from) * PAGE_SIZE)?;
            self.data.insert_run(first + from, at - from);
            written += at - from;
        }
        Ok(written)
    }

    /// Makes the `count` pages from number `first` on zero, as far as they are not.
    fn make_holes(&mut self, first: u64, count: u64) -> io::Result<()> {
        let mut at = first;
        while let Some(run) = self.data.run_within(at, first + count) {
            self.make_hole(run.start * PAGE_SIZE, (run.end - run.start) * PAGE_SIZE)?;
            at = run.end;
        }
        self.data.remove_run(first, count);
        Ok(())
    }

    fn make_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, offset, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // A file system without holes.
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROES.len() as u64);
            let zeroes = ZEROES.get(..n as usize).unwrap_or_default();
            self.file.write_all_at(zeroes, offset + done)?;
            done += n;
        }
        Ok(())
    }

    /// Lets the file system begin to write what it has, so that less is left for the end.
    #[allow(unsafe_code)]
    fn begin_writeback(&self) {
        // SAFETY: concerns the file only; it touches no memory. A failure shows when the file is synced.
        unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    }

    fn error(&self, source: io::Error, pages_left: u64) -> WriteError {
        let needed = (self.data.count() + pages_left) * PAGE_SIZE + HEADER_LEN;
        self.draft
            .write_error(&self.file, directory::MEMORY, source, needed)
    }

    /// Computes the digest from what the page cache has, and completes the file. The guest may run.
    pub fn finish(mut self, progress: OnProgress<'_>) -> Result<Finished, WriteError> {
        if self.failed {
            return Err(WriteError::Failed);
        }
        let missing = self.layout.pages() - self.covered.count();
        if self.base.is_none() && missing != 0 {
            return Err(WriteError::Incomplete(missing));
        }
        // The RAM may end with a hole.
        self.file
            .set_len(self.layout.bytes())
            .map_err(|e| self.error(e, 0))?;
        let present = self.base.is_some().then_some(&self.covered);
        let outcome = digest::of(&self.file, self.id, &self.layout, present, progress);
        let (digest, data) = outcome.map_err(|e| match e {
            DigestError::Io(source) => WriteError::Io {
                what: "read back",
                path: self.draft.target().join(directory::MEMORY),
                source,
            },
            DigestError::Cancelled => WriteError::Cancelled,
        })?;
        let header = Header {
            id: self.id,
            base: self.base.take(),
            digest,
            pages: self.covered.count(),
            data_pages: data.count(),
            depth: self.depth,
            layout: self.layout.clone(),
        };
        let bytes = header.encode().ok_or_else(|| {
            WriteError::BasePath(
                header
                    .base
                    .as_ref()
                    .map(|b| b.path.clone())
                    .unwrap_or_default(),
            )
        })?;
        let written = self.file.write_all_at(&bytes, self.layout.bytes());
        written.map_err(|e| self.error(e, 0))?;
        let mut files = Vec::with_capacity(2);
        if header.base.is_some() {
            let mut map = self.draft.create(directory::MAP)?;
            let bytes = self.covered.to_bytes();
            map.write_all(&bytes).map_err(|e| {
                let needed = bytes.len() as u64;
                self.draft.write_error(&map, directory::MAP, e, needed)
            })?;
            files.push(map);
        }
        files.push(self.file);
        Ok(Finished {
            draft: self.draft,
            files,
            needs: self.needs,
            header,
        })
    }
}

/// The next piece from `at` on in which anything but zeroes may be, in whole pages.
fn occupied<G: GuestPages + ?Sized>(guest: &G, range: usize, at: u64) -> Option<Range<u64>> {
    let piece = guest.occupied(range, at)?;
    let start = piece.start / PAGE_SIZE * PAGE_SIZE;
    Some(start..piece.end.checked_next_multiple_of(PAGE_SIZE)?)
}

/// What of `piece` is in `at..end`.
fn within(piece: &Range<u64>, at: u64, end: u64) -> Option<Range<u64>> {
    let part = piece.start.max(at)..piece.end.min(end);
    (!part.is_empty()).then_some(part)
}
