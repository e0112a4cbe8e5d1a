//! Snapshots as a VMM writes and reads them, and what goes wrong with them.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bad;
mod chain;
mod directory;
mod full;
mod guest;
mod killed;
mod passes;

use std::ops::ControlFlow;
use std::path::Path;

use migration::directory::Committed;
use migration::{
    Bases, Existing, Expected, Guest, GuestPages, Image, PageSet, Progress, Reader, SnapshotId,
    WriteError, Writer,
};

/// A directory in memory if there is one: to sync many files on a disk takes long.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Goes on, whatever the progress.
fn on(_: Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Writes a snapshot of `pages` of `guest` to `target`, all of them without a base.
fn save(
    guest: &impl GuestPages,
    target: &Path,
    base: Option<&Path>,
    pages: &PageSet,
    existing: Existing,
) -> Result<(SnapshotId, Committed), WriteError> {
    let writer = Writer::create(target, existing)?;
    let mut memory = writer.memory(guest.layout(), base)?;
    memory.pass(guest, pages, Guest::Paused, &mut on)?;
    let memory = memory.finish(&mut on)?;
    let id = memory.id();
    let state = format!("{{\"id\":\"{id}\"}}");
    Ok((id, writer.commit(state.as_bytes(), memory)?))
}

/// A full snapshot of `guest` at `target`.
fn save_all(guest: &impl GuestPages, target: &Path) -> SnapshotId {
    let pages = PageSet::full(guest.layout());
    let saved = save(guest, target, None, &pages, Existing::Refuse);
    saved.unwrap().0
}

/// The snapshot at `path`, with all it is based on.
fn open(path: &Path) -> Image {
    let reader = Reader::open(path).unwrap();
    reader.belongs_to_caller().unwrap();
    Image::open(&reader, None, Bases::Follow).unwrap()
}

fn expected(image: &Image) -> Expected {
    Expected {
        id: image.id(),
        layout: image.layout().clone(),
        digest: Some(image.header().digest),
    }
}

/// The names in a directory, sorted.
fn names(path: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(path)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
