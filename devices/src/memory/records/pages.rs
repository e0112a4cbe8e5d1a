//! A set of pages of guest RAM that many threads add to while another takes from it.

use std::collections::TryReserveError;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::RamRange;

/// Bits in a word.
const WORD: usize = u64::BITS as usize;

/// The pages of RAM that were written, one bit each, at one page size. Page numbers are guest physical addresses
/// divided by that.
#[derive(Debug)]
pub struct WrittenPages {
    shift: u32,
    regions: Box<[Region]>,
    words: Box<[AtomicU64]>,
}

/// Where the pages of one RAM range are.
#[derive(Debug)]
struct Region {
    /// First guest address.
    start: u64,
    /// Bytes.
    len: u64,
    /// Number of the page that holds the first byte.
    first_page: u64,
    /// Number after that of the page that holds the last byte.
    end_page: u64,
    /// The bit of the first page.
    first_bit: usize,
}

impl WrittenPages {
    /// None written, of `ram`, disjoint and ascending, in pages of `1 << shift` bytes.
    pub fn new(ram: &[RamRange], shift: u32) -> Result<Self, TryReserveError> {
        let mut regions = Vec::<Region>::with_capacity(ram.len());
        let mut bits = 0usize;
        for range in ram {
            let (start, len) = (range.start.0, range.len as u64);
            let first_page = start >> shift;
            let end_page = ((start + (len - 1)) >> shift) + 1;
            // A large page may hold the end of one range and the start of the next: it has one bit.
            let shared = regions.last().is_some_and(|r| r.end_page > first_page);
            let first_bit = bits - usize::from(shared);
            bits = first_bit + (end_page - first_page) as usize;
            regions.push(Region {
                start,
                len,
                first_page,
                end_page,
                first_bit,
            });
        }
        let mut words = Vec::new();
        words.try_reserve_exact(bits.div_ceil(WORD))?;
        words.resize_with(bits.div_ceil(WORD), || AtomicU64::new(0));
        Ok(Self {
            shift,
            regions: regions.into(),
            words: words.into(),
        })
    }

    /// log2 of the page size.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// Bytes the bits take.
    #[cfg(test)]
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.words)
    }

    /// Adds the pages of a write of `len` bytes at `offset` of the RAM range number `region`. What lies beyond its end
    /// is ignored, as the VM-wide bitmap does.
    pub fn mark(&self, region: usize, offset: usize, len: usize) {
        let Some(region) = self.regions.get(region) else {
            return;
        };
        let end = (offset as u64).saturating_add(len as u64).min(region.len);
        if offset as u64 >= end {
            return;
        }
        let bit = |offset| {
            let page = (region.start + offset) >> self.shift;
            region.first_bit + (page - region.first_page) as usize
        };
        for (word, mask) in masks(bit(offset as u64)..bit(end - 1) + 1) {
            self.words[word].fetch_or(mask, Ordering::AcqRel);
        }
    }

    /// Removes `pages`.
    pub fn clear(&self, pages: Range<u64>) {
        for (_, bits) in self.bits(pages) {
            for (word, mask) in masks(bits) {
                self.words[word].fetch_and(!mask, Ordering::AcqRel);
            }
        }
    }

    /// Adds `pages`. False if some of them are not RAM; the others are added all the same.
    pub fn insert(&self, pages: Range<u64>) -> bool {
        let mut missing = pages.end - pages.start;
        for (_, bits) in self.bits(pages) {
            missing -= bits.len() as u64;
            for (word, mask) in masks(bits) {
                self.words[word].fetch_or(mask, Ordering::AcqRel);
            }
        }
        missing == 0
    }

    /// Appends to `out` the runs of those `pages` that are in the set, ascending. Runs that `out` has are left alone.
    pub fn runs(&self, pages: Range<u64>, out: &mut Vec<Range<u64>>) {
        let kept = out.len();
        for (first_page, bits) in self.bits(pages) {
            let first_bit = bits.start;
            for (word, mask) in masks(bits) {
                let mut found = self.words[word].load(Ordering::Acquire) & mask;
                while found != 0 {
                    let low = found.trailing_zeros();
                    let len = (found >> low).trailing_ones();
                    let start = first_page + (word * WORD + low as usize - first_bit) as u64;
                    let end = start + u64::from(len);
                    match out.get_mut(kept..).and_then(<[_]>::last_mut) {
                        Some(last) if last.end == start => last.end = end,
                        _ => out.push(start..end),
                    }
                    // Adding at the lowest bit carries through the run and clears it.
                    found &= found.wrapping_add(1 << low);
                }
            }
        }
    }

    /// Moves the lowest of `pages` that are in the set to `out`, as addresses, ascending, and not more than `max`.
    ///
    /// A page that is added meanwhile either is among them or stays in the set.
    pub fn take(&self, pages: Range<u64>, max: usize, out: &mut Vec<u64>) {
        let mut room = max;
        for (first_page, bits) in self.bits(pages) {
            let first_bit = bits.start;
            for (word, mask) in masks(bits) {
                let found = self.words[word].load(Ordering::Acquire) & mask;
                if found == 0 {
                    continue;
                }
                if room == 0 {
                    return;
                }
                let mut taken = lowest(found, room);
                // Nobody else takes, so all of these are still set.
                self.words[word].fetch_and(!taken, Ordering::AcqRel);
                room -= taken.count_ones() as usize;
                while taken != 0 {
                    let bit = word * WORD + taken.trailing_zeros() as usize;
                    let page = first_page + (bit - first_bit) as u64;
                    out.push(page << self.shift);
                    taken &= taken - 1;
                }
            }
        }
    }

    /// The bits of those `pages` that are RAM: for each run, the number of its first page and its bits.
    fn bits(&self, pages: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
        let mut from = pages.start;
        self.regions.iter().filter_map(move |region| {
            let first = from.max(region.first_page);
            let end = pages.end.min(region.end_page);
            if first >= end {
                return None;
            }
            // A page shared with the next range has been seen.
            from = end;
            let bit = region.first_bit + (first - region.first_page) as usize;
            Some((first, bit..bit + (end - first) as usize))
        })
    }
}

/// The words that hold `bits`, and which bits of each. There is at least one bit.
fn masks(bits: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let last = bits.end - 1;
    (bits.start / WORD..=last / WORD).map(move |word| {
        let low = bits.start.saturating_sub(word * WORD);
        let high = (last - word * WORD).min(WORD - 1);
        (word, (u64::MAX >> (WORD - 1 - high)) & (u64::MAX << low))
    })
}

/// The `n` lowest bits that are set in `word`, or all if there are fewer.
fn lowest(word: u64, n: usize) -> u64 {
    if n >= word.count_ones() as usize {
        return word;
    }
    let mut rest = word;
    for _ in 0..n {
        rest &= rest - 1;
    }
    word & !rest
}
