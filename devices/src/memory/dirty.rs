//! Pages that the monitor and its devices wrote.

use std::num::NonZeroUsize;
use std::sync::Arc;

use vm_memory::GuestAddress;
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

use super::{PAGE_SIZE, RamRange};

/// [`PAGE_SIZE`] in the type the bitmap wants.
const PAGE: NonZeroUsize = match NonZeroUsize::new(PAGE_SIZE) {
    Some(page) => page,
    None => unreachable!(),
};

/// The pages of one VM that its monitor or devices wrote, one bit each. Cheap to clone: all clones are one bitmap.
///
/// A writer stores its data first and marks the page then; whoever sends pages takes the marks first and reads the pages
/// then. Both are sequentially consistent read-modify-writes, so a mark that was taken was made after data that the
/// reader sees, and a mark made later stays for the next time.
#[derive(Clone, Debug)]
pub struct DirtyPages {
    regions: Arc<[(RamRange, Arc<AtomicBitmap>)]>,
}

impl DirtyPages {
    pub(super) fn new(ranges: &[RamRange]) -> Self {
        Self {
            regions: ranges
                .iter()
                .map(|range| (*range, Arc::new(AtomicBitmap::new(range.len, PAGE))))
                .collect(),
        }
    }

    /// The bitmap of each RAM range, for those who mark.
    pub(super) fn bitmaps(&self) -> impl Iterator<Item = &Arc<AtomicBitmap>> {
        self.regions.iter().map(|(_, bits)| bits)
    }

    /// The bitmaps, one per RAM range, in the order of the ranges.
    pub fn regions(&self) -> impl Iterator<Item = (RamRange, &AtomicBitmap)> {
        self.regions.iter().map(|(range, bits)| (*range, &**bits))
    }

    /// True if the page that holds `address` was written since the bitmap was last taken.
    pub fn is_dirty(&self, address: GuestAddress) -> bool {
        self.regions.iter().any(|(range, bits)| {
            address
                .0
                .checked_sub(range.start.0)
                .is_some_and(|offset| offset < range.len as u64 && bits.dirty_at(offset as usize))
        })
    }

    /// Takes the marks: afterwards no page is marked but those that are marked meanwhile.
    ///
    /// One bitmap per RAM range, in the order of the ranges: page n of the range is bit n mod 64 of word n / 64, as in
    /// KVM's dirty log.
    pub fn take(&self) -> Vec<Vec<u64>> {
        self.regions
            .iter()
            .map(|(_, bits)| bits.get_and_reset())
            .collect()
    }

    /// Marks again what [`take`](Self::take) returned, since nothing came of it. Bits beyond the RAM are ignored.
    pub fn put_back(&self, taken: &[Vec<u64>]) {
        for ((_, bits), words) in self.regions.iter().zip(taken) {
            for (index, word) in words.iter().enumerate() {
                let mut left = *word;
                while left != 0 {
                    bits.set_bit(index * 64 + left.trailing_zeros() as usize);
                    left &= left - 1;
                }
            }
        }
    }
}
