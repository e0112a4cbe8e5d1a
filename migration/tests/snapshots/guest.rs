//! A guest that is nothing but memory.

#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use migration::{GuestPages, PAGE_SIZE, PageSet, RamLayout};

pub const P: u64 = PAGE_SIZE;

/// The layout with ranges of these numbers of pages, with gaps between.
pub fn layout(pages: &[u64]) -> RamLayout {
    let mut at = 0;
    RamLayout::new(pages.iter().map(|pages| {
        let start = at;
        at += (pages + 3) * P;
        (start, pages * P)
    }))
    .unwrap()
}

/// Memory, and a record of what was written to it.
pub struct Memory {
    layout: RamLayout,
    ranges: Vec<(*mut u8, usize)>,
    dirty: Mutex<PageSet>,
    /// If it has any, what is outside of these pages is said to be zero.
    pub occupied: Option<PageSet>,
}

// SAFETY: the mappings are this value's own, and are reached by atomics and system calls only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed.
    pub fn new(layout: &RamLayout) -> Self {
        Self::map(layout, None)
    }

    /// A private mapping of `file`.
    pub fn of(layout: &RamLayout, file: &File, offsets: &[u64]) -> Self {
        Self::map(layout, Some((file, offsets)))
    }

    fn map(layout: &RamLayout, from: Option<(&File, &[u64])>) -> Self {
        let ranges = layout.ranges().iter().enumerate().map(|(index, range)| {
            let (flags, fd, offset) = match from {
                Some((file, offsets)) => (0, file.as_raw_fd(), offsets[index] as i64),
                None => (libc::MAP_ANONYMOUS, -1, 0),
            };
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
            let address = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    range.len as usize,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | flags,
                    fd,
                    offset,
                )
            };
            assert_ne!(address, libc::MAP_FAILED);
            (address.cast(), range.len as usize)
        });
        Self {
            ranges: ranges.collect(),
            layout: layout.clone(),
            dirty: Mutex::new(PageSet::empty(layout)),
            occupied: None,
        }
    }

    fn word(&self, page: u64, word: u64) -> &AtomicU64 {
        let mut before = 0;
        for (address, len) in &self.ranges {
            let pages = *len as u64 / P;
            if page - before < pages {
                let offset = (page - before) * P + word * 8;
                assert!(word < P / 8);
                // SAFETY: aligned and inside a mapping that lives as long as `self`, and reached by atomics only.
                return unsafe { &*address.add(offset as usize).cast() };
            }
            before += pages;
        }
        panic!("no page {page}");
    }

    /// Writes `value` to word `word` of page `page`, and notes it, as a vCPU does.
    pub fn write(&self, page: u64, word: u64, value: u64) {
        self.word(page, word).store(value, Ordering::SeqCst);
        self.dirty.lock().unwrap().insert(page);
    }

    /// Writes to every word.
    pub fn fill(&self, page: u64, value: u64) {
        (0..P / 8).for_each(|word| self.word(page, word).store(value, Ordering::SeqCst));
        self.dirty.lock().unwrap().insert(page);
    }

    pub fn read(&self, page: u64, word: u64) -> u64 {
        self.word(page, word).load(Ordering::SeqCst)
    }

    /// Takes what was written.
    pub fn take(&self) -> PageSet {
        let mut dirty = self.dirty.lock().unwrap();
        std::mem::replace(&mut *dirty, PageSet::empty(&self.layout))
    }

    pub fn put_back(&self, pages: &PageSet) {
        self.dirty.lock().unwrap().union_with(pages);
    }

    /// All of it.
    pub fn bytes(&self) -> Vec<u8> {
        let words = (0..self.layout.pages())
            .flat_map(|page| (0..P / 8).map(move |word| self.read(page, word)));
        words.flat_map(u64::to_ne_bytes).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for (address, len) in &self.ranges {
            // SAFETY: our own mapping; nobody has its address any more.
            unsafe { libc::munmap(address.cast(), *len) };
        }
    }
}

// SAFETY: each range is a page-aligned mapping of its length that is readable and writable until the value is dropped,
// and is reached by atomics and system calls only.
unsafe impl GuestPages for Memory {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, range: usize) -> *mut u8 {
        self.ranges[range].0
    }

    fn occupied(&self, range: usize, from: u64) -> Option<Range<u64>> {
        let len = self.layout.ranges()[range].len;
        let Some(occupied) = &self.occupied else {
            return (from < len).then_some(from..len);
        };
        let before = self.layout.offset(range) / P;
        let run = occupied.run_within(before + from / P, before + len / P)?;
        Some((run.start - before) * P..(run.end - before) * P)
    }
}
