//! Where guest RAM is, and where its pages are in a file.

use std::sync::Arc;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of a large page of the host.
pub const LARGE_PAGE: u64 = 2 << 20;

/// The most RAM a guest can have, in bytes.
pub const MAX_RAM: u64 = 1 << 44;

/// The most RAM ranges a guest can have.
pub const MAX_RANGES: usize = 64;

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address; a multiple of [`PAGE_SIZE`].
    pub start: u64,
    /// Length in bytes; a multiple of [`PAGE_SIZE`], not zero.
    pub len: u64,
}

/// Why ranges are no guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There is none, or too many.
    #[error("{0} RAM ranges; there can be 1 to {MAX_RANGES}")]
    Count(usize),
    /// A range is empty, not page-aligned, or wraps around.
    #[error("RAM range {:#x}+{:#x} is empty, not page-aligned, or wraps around", .0.start, .0.len)]
    Bad(RamRange),
    /// A range begins before the one named before it ends.
    #[error("RAM range {:#x}+{:#x} overlaps the one before it, or is out of order", .0.start, .0.len)]
    Overlap(RamRange),
    /// They are more than [`MAX_RAM`] together.
    #[error("more than {MAX_RAM:#x} bytes of RAM")]
    TooLarge,
}

/// The RAM ranges of a guest, ascending and disjoint. Cheap to clone.
///
/// The pages of all ranges, one range after the other, are numbered from 0 on. This number is the place of a page in a
/// memory file (times [`PAGE_SIZE`]) and in a [`PageSet`](crate::PageSet).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RamLayout {
    ranges: Arc<[RamRange]>,
}

impl RamLayout {
    /// Checks `ranges`, each a first guest physical address and a length in bytes.
    pub fn new(ranges: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, LayoutError> {
        let ranges: Vec<_> = ranges
            .into_iter()
            .map(|(start, len)| RamRange { start, len })
            .collect();
        if !(1..=MAX_RANGES).contains(&ranges.len()) {
            return Err(LayoutError::Count(ranges.len()));
        }
        let (mut free, mut bytes) = (0, 0u64);
        for range in &ranges {
            let aligned =
                range.start.is_multiple_of(PAGE_SIZE) && range.len.is_multiple_of(PAGE_SIZE);
            let end = range.start.checked_add(range.len);
            let end = end.filter(|_| aligned && range.len != 0);
            let end = end.ok_or(LayoutError::Bad(*range))?;
            if range.start < free {
                return Err(LayoutError::Overlap(*range));
            }
            free = end;
            bytes = bytes.saturating_add(range.len);
            if bytes > MAX_RAM {
                return Err(LayoutError::TooLarge);
            }
        }
        Ok(Self {
            ranges: ranges.into(),
        })
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// Bytes of RAM.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len).sum()
    }

    /// Pages of RAM.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// Offset in a memory file of the first byte of range number `index`; the end of the last one for those beyond.
    pub fn offset(&self, index: usize) -> u64 {
        self.ranges.iter().take(index).map(|range| range.len).sum()
    }

    /// The offset of each range in a memory file, in bytes.
    pub fn offsets(&self) -> Vec<u64> {
        (0..self.ranges.len())
            .map(|index| self.offset(index))
            .collect()
    }

    /// The number of the page that holds guest physical address `address`.
    pub fn page_at(&self, address: u64) -> Option<u64> {
        let mut before = 0;
        for range in &*self.ranges {
            match address.checked_sub(range.start) {
                Some(offset) if offset < range.len => return Some((before + offset) / PAGE_SIZE),
                _ => before += range.len,
            }
        }
        None
    }

    /// Guest physical address of page number `page`.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let mut offset = page.checked_mul(PAGE_SIZE)?;
        for range in &*self.ranges {
            if offset < range.len {
                return Some(range.start + offset);
            }
            offset -= range.len;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE_SIZE;

    #[test]
    fn pages_are_numbered_through_all_ranges() {
        let layout = RamLayout::new([(P, 2 * P), (10 * P, 3 * P)]).unwrap();
        assert_eq!((layout.bytes(), layout.pages()), (5 * P, 5));
        assert_eq!(layout.offsets(), [0, 2 * P]);
        for (page, address) in [(0, P), (1, 2 * P), (2, 10 * P), (4, 12 * P)] {
            assert_eq!(layout.address_of(page), Some(address));
            assert_eq!(layout.page_at(address + 17), Some(page));
        }
        assert_eq!(layout.address_of(5), None);
        assert_eq!(layout.address_of(u64::MAX), None);
        for address in [0, 3 * P, 9 * P, 13 * P, u64::MAX] {
            assert_eq!(layout.page_at(address), None);
        }
    }

    #[test]
    fn what_is_no_ram_is_refused() {
        let bad = |start, len| LayoutError::Bad(RamRange { start, len });
        for (ranges, error) in [
            (vec![], LayoutError::Count(0)),
            (vec![(0, P); MAX_RANGES + 1], LayoutError::Count(65)),
            (vec![(0, 0)], bad(0, 0)),
            (vec![(1, P)], bad(1, P)),
            (vec![(0, P + 1)], bad(0, P + 1)),
            (
                vec![(0u64.wrapping_sub(P), 2 * P)],
                bad(0u64.wrapping_sub(P), 2 * P),
            ),
            (
                vec![(P, 2 * P), (2 * P, P)],
                LayoutError::Overlap(RamRange {
                    start: 2 * P,
                    len: P,
                }),
            ),
            (
                vec![(8 * P, P), (0, P)],
                LayoutError::Overlap(RamRange { start: 0, len: P }),
            ),
            (vec![(0, MAX_RAM + P)], LayoutError::TooLarge),
        ] {
            assert_eq!(RamLayout::new(ranges), Err(error));
        }
        RamLayout::new([(0, MAX_RAM)]).unwrap();
    }
}
