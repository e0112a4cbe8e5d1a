//! The digest of what a memory file contains.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use xxhash_rust::xxh3::Xxh3;

use crate::id::{SnapshotId, hex};
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::PageSet;
use crate::{OnProgress, Progress};

/// Bytes looked at at once.
const STEP: u64 = 1 << 20;

/// A digest of the contents of a memory file, which names its snapshot too. 32 bytes; as text, 64 hexadecimal digits.
///
/// It is BLAKE3 in the mode for key derivation with the context `tern 2025 guest memory of a snapshot`, over
///
/// 1. the 16 bytes of the snapshot's id;
/// 2. for each RAM range its first address and its length, 64 bits each, little-endian;
/// 3. BLAKE3 of the contents of `memory.map`, or 32 zeroes for a full snapshot;
/// 4. BLAKE3 of a map of the same form of the pages in `memory.bin` that are not all zero;
/// 5. XXH3 of these pages, in ascending order: 128 bits, big-endian. It is quick where a host emulates another, and protects
///    from accidents as well as anything: who can write the file can write the digest.
///
/// Pages that are all zero are not read if they are holes, and it makes no difference whether they are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(pub [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        hex(&self.0, f)
    }
}

/// Why there is no digest.
#[derive(Debug)]
pub(super) enum DigestError {
    Io(io::Error),
    Cancelled,
}

/// Digest of `file`, and the pages of it that are not all zero.
pub(super) fn of(
    file: &File,
    id: SnapshotId,
    layout: &RamLayout,
    present: Option<&PageSet>,
    progress: OnProgress<'_>,
) -> Result<(Digest, PageSet), DigestError> {
    let mut data = PageSet::empty(layout);
    let mut contents = Xxh3::new();
    let mut buffer = vec![0; STEP as usize];
    let total = layout.bytes();
    let mut at = 0;
    while let Some(piece) = next_data(file, at, total).map_err(DigestError::Io)? {
        // Whole pages, even where the file system's blocks are smaller.
        at = piece.start / PAGE_SIZE * PAGE_SIZE;
        let end = piece.end.next_multiple_of(PAGE_SIZE).min(total);
        while at < end {
            let len = STEP.min(end - at);
            let bytes = buffer.get_mut(..len as usize).unwrap_or_default();
            file.read_exact_at(bytes, at).map_err(DigestError::Io)?;
            add(bytes, at / PAGE_SIZE, &mut contents, &mut data);
            at += len;
            if let ControlFlow::Break(()) = progress(Progress { done: at, total }) {
                return Err(DigestError::Cancelled);
            }
        }
    }
    let mut hasher = blake3::Hasher::new_derive_key("tern 2025 guest memory of a snapshot");
    hasher.update(&id.0);
    for range in layout.ranges() {
        hasher.update(&range.start.to_le_bytes());
        hasher.update(&range.len.to_le_bytes());
    }
    match present {
        Some(present) => hasher.update(blake3::hash(&present.to_bytes()).as_bytes()),
        None => hasher.update(&[0; 32]),
    };
    hasher.update(blake3::hash(&data.to_bytes()).as_bytes());
    hasher.update(&contents.digest128().to_be_bytes());
    Ok((Digest(*hasher.finalize().as_bytes()), data))
}

/// Adds the pages among `bytes`, the first of which is number `first`, that are not all zero.
fn add(bytes: &[u8], first: u64, contents: &mut Xxh3, data: &mut PageSet) {
    let (pages, _) = bytes.as_chunks::<{ PAGE_SIZE as usize }>();
    let mut rest = pages;
    let mut at = first;
    while !rest.is_empty() {
        let zeroes = rest.iter().take_while(|page| is_zero(page)).count();
        rest = rest.get(zeroes..).unwrap_or_default();
        at += zeroes as u64;
        let filled = rest.iter().take_while(|page| !is_zero(page)).count();
        let (run, others) = rest.split_at(filled);
        contents.update(run.as_flattened());
        data.insert_run(at, filled as u64);
        rest = others;
        at += filled as u64;
    }
}

/// True if all bytes of `page` are zero.
pub(super) fn is_zero(page: &[u8; PAGE_SIZE as usize]) -> bool {
    let (words, _) = page.as_chunks::<64>();
    words.iter().all(|words| {
        words
            .as_chunks::<8>()
            .0
            .iter()
            .fold(0, |any, word| any | u64::from_ne_bytes(*word))
            == 0
    })
}

/// The next piece of the first `end` bytes of `file`, from `from` on, that is no hole.
pub(super) fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if from >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A file system that does not know.
        Err(Errno::INVAL) => return Ok(Some(from..end)),
        Err(error) => return Err(error.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start.max(from)..stop.min(end)))
}
