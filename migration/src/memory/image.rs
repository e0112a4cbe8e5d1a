//! Reads the memory of a snapshot: one file, or a chain of them.

use std::fs::File;
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::digest::{self, DigestError};
use super::header::Header;
use super::{Digest, MAX_CHAIN};
use crate::directory::{FileId, MEMORY, Reader};
use crate::error::ReadError;
use crate::guest::{GuestPages, Piece};
use crate::id::SnapshotId;
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;
use crate::{OnProgress, Progress};

/// Bytes read at once.
const STEP: u64 = 4 << 20;

/// What a memory file must say about itself to be the right one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    /// Id of the snapshot.
    pub id: SnapshotId,
    /// RAM of the guest.
    pub layout: RamLayout,
    /// Digest of the contents, if it is known. They are not read for this: see [`Image::verify`].
    pub digest: Option<Digest>,
}

/// Where the bases of an incremental snapshot are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bases<'a> {
    /// It must have none.
    None,
    /// Where each says that its base is, which is where it was when the snapshot was written. Each must belong to the
    /// caller and be writable by nobody else: see [`Reader::belongs_to_caller`].
    Follow,
    /// In one of these directories, in any order. What the files say about it is ignored.
    Named(&'a [PathBuf]),
}

/// One memory file of a chain.
#[derive(Debug)]
pub struct Layer {
    /// Directory of the snapshot.
    pub directory: PathBuf,
    /// What the file says about itself.
    pub header: Header,
    /// The pages it has, if it has not all.
    pub present: Option<PageSet>,
    file: File,
    path: PathBuf,
    pub(crate) identity: FileId,
}

/// The memory of a snapshot. Its files are locked for readers (`flock`) as long as it lives.
#[derive(Debug)]
pub struct Image {
    /// Newest first; each is the base of the one before it, and the last one has all pages.
    layers: Vec<Layer>,
}

impl Image {
    /// Opens the memory of `snapshot`, and all it is based on. No page is read.
    ///
    /// Each file must have the length it says, the id that is expected of it, and the same RAM as all others.
    pub fn open(
        snapshot: &Reader,
        expected: Option<&Expected>,
        bases: Bases<'_>,
    ) -> Result<Self, ReadError> {
        let mut top = Layer::open(snapshot, expected)?;
        let mut layers = Vec::with_capacity(1);
        let mut directory = snapshot.try_clone()?;
        while let Some(base) = &top.header.base {
            let below = match bases {
                Bases::None => {
                    return Err(ReadError::HasBase {
                        path: top.path,
                        base: base.path.clone(),
                    });
                }
                Bases::Follow => {
                    let below = directory.open_beside(&base.path)?;
                    below.belongs_to_caller()?;
                    below
                }
                Bases::Named(paths) => named(paths, base.id)?.ok_or(ReadError::NoBase {
                    path: top.path.clone(),
                    id: base.id,
                })?,
            };
            let wanted = Expected {
                id: base.id,
                layout: top.header.layout.clone(),
                digest: None,
            };
            let next = Layer::open(&below, Some(&wanted))?;
            // It goes down by one each time, so that a chain ends, after MAX_CHAIN files at the latest.
            if next.header.depth + 1 != top.header.depth || layers.len() as u32 >= MAX_CHAIN {
                return Err(ReadError::Depth(top.path));
            }
            directory = below;
            layers.push(std::mem::replace(&mut top, next));
        }
        layers.push(top);
        Ok(Self { layers })
    }

    /// What the newest file says about itself.
    pub fn header(&self) -> &Header {
        // There is always one; see `open`.
        #[allow(clippy::indexing_slicing)]
        &self.layers[0].header
    }

    /// Id of the snapshot.
    pub fn id(&self) -> SnapshotId {
        self.header().id
    }

    /// The RAM.
    pub fn layout(&self) -> &RamLayout {
        &self.header().layout
    }

    /// The files, newest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The file to map for a guest that is to run before its memory was read, and the offset of each RAM range in it.
    ///
    /// It is the only one, or the oldest: [`overlay`](Self::overlay) adds what the others have.
    pub fn lowest(&self) -> io::Result<(File, Vec<u64>)> {
        let lowest = self.layers.last().ok_or(io::ErrorKind::NotFound)?;
        Ok((lowest.file.try_clone()?, self.layout().offsets()))
    }

    /// Reads into `guest`, which maps [`lowest`](Self::lowest) privately, the pages that newer files have. Returns how
    /// many these are. `guest` must be writable, and nobody must use it.
    pub fn overlay<G: GuestPages + ?Sized>(
        &self,
        guest: &G,
        progress: OnProgress<'_>,
    ) -> Result<u64, ReadError> {
        let upper = self.layers.len() - 1;
        self.fill(
            guest,
            self.layers.get(..upper).unwrap_or_default(),
            progress,
        )
    }

    /// Reads all pages into `guest`, whose memory is all zero. `guest` must be writable, and nobody must use it.
    pub fn load<G: GuestPages + ?Sized>(
        &self,
        guest: &G,
        progress: OnProgress<'_>,
    ) -> Result<u64, ReadError> {
        self.fill(guest, &self.layers, progress)
    }

    fn fill<G: GuestPages + ?Sized>(
        &self,
        guest: &G,
        layers: &[Layer],
        progress: OnProgress<'_>,
    ) -> Result<u64, ReadError> {
        if guest.layout() != self.layout() {
            return Err(ReadError::Layout);
        }
        // Newest first: a page is read once.
        let plan = plan(layers, self.layout());
        let pages = plan.iter().map(|(_, pages)| pages.count()).sum::<u64>();
        let mut done = 0;
        let mut step = |bytes| {
            done += bytes;
            let total = pages * PAGE_SIZE;
            match progress(Progress { done, total }) {
                ControlFlow::Break(()) => Err(ReadError::Cancelled),
                ControlFlow::Continue(()) => Ok(()),
            }
        };
        for (layer, pages) in plan {
            // What is zero in the file that has all pages is zero in the memory, or comes from it.
            let clears = layer.present.is_some();
            for run in pages.runs() {
                let piece = Piece::new(guest, run.range, run.offset, run.bytes());
                let piece = piece.ok_or(ReadError::Layout)?;
                layer.read_run(
                    &piece,
                    run.first * PAGE_SIZE,
                    run.bytes(),
                    clears,
                    &mut step,
                )?;
            }
        }
        Ok(pages)
    }

    /// Page number `page`.
    pub fn read_page(
        &self,
        page: u64,
        out: &mut [u8; PAGE_SIZE as usize],
    ) -> Result<(), ReadError> {
        let has = |layer: &&Layer| layer.present.as_ref().is_none_or(|p| p.contains(page));
        let there = page < self.layout().pages();
        let layer = self.layers.iter().find(has).filter(|_| there);
        let layer = layer.ok_or(ReadError::NoPage(page))?;
        let outcome = layer.file.read_exact_at(out, page * PAGE_SIZE);
        outcome.map_err(|e| layer.error(e))
    }

    /// The pages that come from each of the files, in their order.
    pub fn origins(&self) -> Vec<PageSet> {
        let plan = plan(&self.layers, self.layout());
        plan.into_iter().map(|(_, pages)| pages).collect()
    }

    /// Reads all files and compares their digests with what was written. Returns, for each file, the pages in it that
    /// are not all zero.
    pub fn verify(&self, progress: OnProgress<'_>) -> Result<Vec<PageSet>, ReadError> {
        let files = self.layers.len() as u64;
        let bytes = self.layout().bytes();
        let mut all = Vec::with_capacity(self.layers.len());
        for (before, layer) in (0u64..).zip(&self.layers) {
            let outcome = digest::of(
                &layer.file,
                layer.header.id,
                &layer.header.layout,
                layer.present.as_ref(),
                &mut |at| {
                    progress(Progress {
                        done: before * bytes + at.done,
                        total: files * bytes,
                    })
                },
            );
            let (digest, data) = outcome.map_err(|e| match e {
                DigestError::Io(e) => layer.error(e),
                DigestError::Cancelled => ReadError::Cancelled,
            })?;
            if digest != layer.header.digest || data.count() != layer.header.data_pages {
                return Err(ReadError::Changed(layer.path.clone()));
            }
            all.push(data);
        }
        Ok(all)
    }
}

/// What is read from which layer.
fn plan<'l>(layers: &'l [Layer], layout: &RamLayout) -> Vec<(&'l Layer, PageSet)> {
    let mut left = PageSet::full(layout);
    let mut plan = Vec::with_capacity(layers.len());
    for layer in layers {
        let pages = match &layer.present {
            Some(present) => {
                let mut rest = left.clone();
                rest.subtract(present);
                let mut pages = left.clone();
                pages.subtract(&rest);
                left = rest;
                pages
            }
            None => std::mem::replace(&mut left, PageSet::empty(layout)),
        };
        plan.push((layer, pages));
    }
    plan
}

/// The one of `paths` that is snapshot `id`.
fn named(paths: &[PathBuf], id: SnapshotId) -> Result<Option<Reader>, ReadError> {
    for path in paths {
        let reader = Reader::open(path)?;
        if reader.header()?.id == id {
            return Ok(Some(reader));
        }
    }
    Ok(None)
}

impl Expected {
    /// Whether the memory file at `path`, which says this about itself, is the one.
    ///
    /// # Errors
    ///
    /// It is that of another snapshot, or of another guest.
    pub fn check(&self, path: &Path, header: &Header) -> Result<(), ReadError> {
        if header.id != self.id {
            return Err(ReadError::OtherSnapshot {
                path: path.into(),
                found: header.id,
                expected: self.id,
            });
        }
        if header.layout != self.layout {
            return Err(ReadError::OtherLayout(path.into()));
        }
        if self.digest.is_some_and(|digest| digest != header.digest) {
            return Err(ReadError::OtherDigest(path.into()));
        }
        Ok(())
    }
}

impl Layer {
    /// What is `expected` is looked at before memory is taken for the map.
    fn open(snapshot: &Reader, expected: Option<&Expected>) -> Result<Self, ReadError> {
        let path = snapshot.path().join(MEMORY);
        let file = snapshot.memory()?;
        // Before anything of it is looked at, so that it stays what it is.
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(ReadError::InUse(path)),
            // A file system without locks. Refusing it would help nobody.
            Err(error) => tracing::warn!(path = %path.display(), %error, "cannot lock memory file"),
        }
        let header = snapshot.header()?;
        if let Some(expected) = expected {
            expected.check(&path, &header)?;
        }
        let present = snapshot.map(&header)?;
        Ok(Self {
            directory: snapshot.path().into(),
            header,
            present,
            file,
            path,
            identity: snapshot.identity()?,
        })
    }

    /// Fills `piece` with the `len` bytes at `start`. Holes are only made zero if `clears`.
    fn read_run<G: GuestPages + ?Sized>(
        &self,
        piece: &Piece<'_, G>,
        start: u64,
        len: u64,
        clears: bool,
        step: &mut impl FnMut(u64) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let mut at = 0;
        while at < len {
            let data = digest::next_data(&self.file, start + at, start + len);
            let data = data.map_err(|e| self.error(e))?;
            let data = data.map(|d| {
                let first = (d.start - start) / PAGE_SIZE * PAGE_SIZE;
                first.max(at)..(d.end - start).next_multiple_of(PAGE_SIZE).min(len)
            });
            let (from, to) = data.map_or((len, len), |data| (data.start, data.end));
            if let Some(hole) = piece.part(at, from - at).filter(|_| clears) {
                hole.clear();
            }
            if from > at {
                step(from - at)?;
            }
            at = from;
            while at < to {
                let n = STEP.min(to - at);
                let part = piece.part(at, n).ok_or(ReadError::Layout)?;
                let outcome = part.read_from(&self.file, start + at);
                outcome.map_err(|e| self.error(e))?;
                at += n;
                step(n)?;
            }
        }
        Ok(())
    }

    fn error(&self, source: io::Error) -> ReadError {
        ReadError::Io {
            what: "read",
            path: self.path.clone(),
            source,
        }
    }

    /// The memory file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
