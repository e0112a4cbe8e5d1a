//! Where in guest RAM anything but zeroes may be, as the kernel knows it without a page being touched.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::PAGE_SIZE;

/// Entries of the page map read at once.
const ENTRIES: usize = 2048;
/// Bits of an entry of the page map.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
/// A page of a file or of shared memory, not this process's own.
const SHARED: u64 = 1 << 61;

/// The kernel's map of the pages of this process.
#[derive(Debug, Default)]
pub(super) struct PageMap(OnceLock<Option<File>>);

impl PageMap {
    /// The next piece of `from..to`, relative to `start`, whose pages are this process's own: those of anonymous memory
    /// that were touched, those of a private mapping that were written. Pieces of any length, so ask again.
    pub fn own(&self, start: *const u8, from: usize, to: usize) -> Option<Range<usize>> {
        let map = self.0.get_or_init(|| File::open("/proc/self/pagemap").ok());
        let Some(map) = map else {
            // Whoever does not know must take it for data.
            return (from < to).then_some(from..to);
        };
        let mut at = from / PAGE_SIZE;
        let end = to.div_ceil(PAGE_SIZE);
        let first = start.addr() / PAGE_SIZE;
        let mut bytes = vec![0; 8 * ENTRIES.min(end.saturating_sub(at))];
        while at < end {
            let n = ENTRIES.min(end - at);
            let entries = bytes.get_mut(..8 * n).unwrap_or_default();
            if map.read_exact_at(entries, 8 * (first + at) as u64).is_err() {
                return Some((at * PAGE_SIZE).max(from)..to);
            }
            let mut own = entries.as_chunks().0.iter().map(|e| is_own(*e));
            if let Some(skipped) = own.position(|own| own) {
                let count = 1 + own.take_while(|own| *own).count();
                let piece = at + skipped..at + skipped + count;
                return Some((piece.start * PAGE_SIZE).max(from)..(piece.end * PAGE_SIZE).min(to));
            }
            at += n;
        }
        None
    }
}

fn is_own(entry: [u8; 8]) -> bool {
    let entry = u64::from_ne_bytes(entry);
    entry & SWAPPED != 0 || entry & (PRESENT | SHARED) == PRESENT
}

/// The next piece of the bytes `start..start + len` of a file, from `start + from` on, that is no hole. Relative to
/// `start`.
pub(super) fn data(fd: impl AsFd, start: u64, from: usize, len: usize) -> Option<Range<usize>> {
    let end = start + len as u64;
    let seek = |whence| match seek(&fd, whence) {
        Ok(at) => Some(at.min(end)),
        Err(Errno::NXIO) => None,
        // As above.
        Err(_) => Some(start + from as u64),
    };
    let first = seek(SeekFrom::Data(start + from as u64)).filter(|first| *first < end)?;
    let last = match seek(SeekFrom::Hole(first)) {
        Some(last) if last > first => last,
        _ => end,
    };
    Some((first - start) as usize..(last - start) as usize)
}
