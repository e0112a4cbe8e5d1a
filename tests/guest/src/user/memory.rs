//! Memory a device can reach: locked pages, whose physical addresses `/proc/self/pagemap` gives.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use driver::access::Dma;

use super::mapping::Mapping;
use crate::{Context, Result, check};

const PAGE: usize = 4096;
/// In an entry of pagemap: the page is in memory.
const PRESENT: u64 = 1 << 63;
/// In an entry of pagemap: the page frame number.
const FRAME: u64 = (1 << 55) - 1;
/// Locked pages stay in memory, but not where they are, unless this is 0.
const COMPACTION: &str = "/proc/sys/vm/compact_unevictable_allowed";

/// Pages that are shared with a device. What is allocated lies within one page, so no two have to be neighbours.
pub struct Pages {
    mapping: Mapping,
    /// Physical address of each page, in the order of the mapping.
    physical: Vec<u64>,
    /// Bytes given out, in the order of the mapping.
    used: Cell<usize>,
}

impl Pages {
    /// Takes `count` pages that stay where they are.
    pub fn new(count: usize) -> Result<Self> {
        // A kernel without compaction does not have it, and moves nothing.
        if fs::exists(COMPACTION).unwrap_or(false) {
            fs::write(COMPACTION, "0").context(COMPACTION)?;
        }
        let mapping = Mapping::locked(count * PAGE).context("locking memory")?;
        let pagemap = File::open("/proc/self/pagemap").context("pagemap")?;
        let mut physical = Vec::with_capacity(count);
        for page in 0..count {
            let mut entry = [0; 8];
            let at = (mapping.address() / PAGE + page) * 8;
            pagemap
                .read_exact_at(&mut entry, at as u64)
                .context("pagemap")?;
            let entry = u64::from_ne_bytes(entry);
            let frame = entry & FRAME;
            check(entry & PRESENT != 0 && frame != 0, || {
                format!("page {page} has no physical address")
            })?;
            physical.push(frame * PAGE as u64);
        }
        Ok(Self::at(mapping, physical))
    }

    fn at(mapping: Mapping, physical: Vec<u64>) -> Self {
        Self {
            mapping,
            physical,
            used: Cell::new(0),
        }
    }

    /// Where in the mapping a physical address is; beyond its end if it is nowhere.
    fn offset(&self, address: u64) -> usize {
        let (page, within) = (address & !(PAGE as u64 - 1), address as usize % PAGE);
        match self.physical.iter().position(|at| *at == page) {
            Some(index) => index * PAGE + within,
            None => self.mapping.len(),
        }
    }
}

impl Dma for Pages {
    fn allocate(&self, len: usize, align: usize) -> Option<u64> {
        if len > PAGE || align > PAGE {
            return None;
        }
        let mut start = self.used.get().next_multiple_of(align);
        if start % PAGE + len > PAGE {
            start = start.next_multiple_of(PAGE);
        }
        let physical = self.physical.get(start / PAGE)?;
        self.used.set(start + len.max(1));
        Some(physical + (start % PAGE) as u64)
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        for (at, byte) in (0..).zip(data.chunks_mut(1)) {
            self.mapping
                .read(self.offset(address.wrapping_add(at)), byte);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        for (at, byte) in (0..).zip(data.chunks(1)) {
            self.mapping
                .write(self.offset(address.wrapping_add(at)), byte);
        }
    }

    fn load(&self, address: u64) -> u16 {
        self.mapping.load(self.offset(address))
    }

    fn store(&self, address: u64, value: u16) {
        self.mapping.store(self.offset(address), value);
    }
}

#[cfg(test)]
mod tests {
    use driver::access::DmaExt;

    use super::*;

    /// Three pages, each somewhere else.
    fn pages() -> Pages {
        let mapping = Mapping::locked(3 * PAGE).unwrap();
        Pages::at(mapping, vec![0x9000, 0x4000, 0x1_0000_0000])
    }

    #[test]
    fn what_is_allocated_lies_in_one_page() {
        let pages = pages();
        for (len, align, expected) in [
            (100, 16, Some(0x9000)),
            (10, 64, Some(0x9080)),
            (4000, 2, Some(0x4000)),
            (96, 1, Some(0x4fa0)),
            (4097, 1, None),
            (0, 1, Some(0x1_0000_0000)),
            (4096, 1, None),
            (4095, 1, Some(0x1_0000_0001)),
        ] {
            assert_eq!(pages.allocate(len, align), expected, "{len} at {align}");
        }
    }

    #[test]
    fn bytes_are_found_by_their_physical_address() {
        let pages = pages();
        pages.write(0x4ffe, &[1, 2, 3]);
        assert_eq!(pages.bytes(0x4ffd, 4), [0, 1, 2, 0xff]);
        pages.store(0x1_0000_0010, 0x0201);
        assert_eq!(pages.load(0x1_0000_0010), 0x0201);
        assert_eq!(pages.bytes(0x1_0000_0010, 2), [1, 2]);
        assert_eq!(pages.load(0x5000), 0xffff);
    }
}
