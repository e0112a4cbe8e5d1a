//! Sets of pages of guest RAM.

use std::fmt;
use std::ops::Range;

use crate::layout::{PAGE_SIZE, RamLayout};

/// A set of pages of one guest's RAM: a bit for each, by their numbers in the [`RamLayout`].
#[derive(Clone, PartialEq, Eq)]
pub struct PageSet {
    layout: RamLayout,
    /// Page n is bit n mod 64 of word n / 64. Bits that are no page are zero.
    words: Vec<u64>,
}

/// Neighbouring pages of one RAM range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the RAM range.
    pub range: usize,
    /// Offset in the range, in bytes.
    pub offset: u64,
    /// Number of the first page.
    pub first: u64,
    /// How many; not zero.
    pub count: u64,
}

impl Run {
    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        self.count * PAGE_SIZE
    }
}

/// Bytes are not a set of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPageSet {
    /// The length is another one than the RAM has.
    #[error("{len} bytes; the RAM has {needed}")]
    Length {
        /// Bytes there are.
        len: u64,
        /// Bytes there should be.
        needed: u64,
    },
    /// A bit beyond the last page is set.
    #[error("names pages beyond the end of RAM")]
    Beyond,
}

impl PageSet {
    /// No page of the RAM described by `layout`.
    pub fn empty(layout: &RamLayout) -> Self {
        Self {
            layout: layout.clone(),
            words: vec![0; layout.pages().div_ceil(64) as usize],
        }
    }

    /// All pages of the RAM described by `layout`.
    pub fn full(layout: &RamLayout) -> Self {
        let mut set = Self::empty(layout);
        set.words.fill(u64::MAX);
        set.trim();
        set
    }

    /// The RAM the pages are of.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// True if page number `page` is one of them.
    pub fn contains(&self, page: u64) -> bool {
        self.words
            .get((page / 64) as usize)
            .is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Adds page number `page`, if there is such a page.
    pub fn insert(&mut self, page: u64) {
        self.insert_run(page, 1);
    }

    /// Adds the `count` pages from `first` on, as far as there are such pages.
    pub fn insert_run(&mut self, first: u64, count: u64) {
        self.for_words(first, count, |word, mask| *word |= mask);
    }

    /// Removes the `count` pages from `first` on.
    pub fn remove_run(&mut self, first: u64, count: u64) {
        self.for_words(first, count, |word, mask| *word &= !mask);
    }

    fn for_words(&mut self, first: u64, count: u64, change: impl Fn(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.layout.pages());
        let mut at = first;
        while at < end {
            let upto = (at / 64 + 1).saturating_mul(64).min(end);
            let mask = (u64::MAX >> (64 - (upto - at))) << (at % 64);
            if let Some(word) = self.words.get_mut((at / 64) as usize) {
                change(word, mask);
            }
            at = upto;
        }
    }

    /// Adds the pages of `other`, which are of the same RAM.
    pub fn union_with(&mut self, other: &Self) {
        debug_assert_eq!(self.layout, other.layout);
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word |= other;
        }
        self.trim();
    }

    /// Removes the pages of `other`, which are of the same RAM.
    pub fn subtract(&mut self, other: &Self) {
        debug_assert_eq!(self.layout, other.layout);
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Adds pages of RAM range number `range`: page n of the range is bit n mod 64 of word n / 64, as in KVM's dirty
    /// log. Bits beyond the range are ignored.
    pub fn insert_words(&mut self, range: usize, words: &[u64]) {
        let Some(pages) = self.pages_of(range) else {
            return;
        };
        let first = self.layout.offset(range) / PAGE_SIZE;
        let shift = first % 64;
        for (index, word) in (0u64..).zip(words) {
            let left = pages.saturating_sub(index * 64);
            let word = match left {
                0 => break,
                1..64 => word & (u64::MAX >> (64 - left)),
                _ => *word,
            };
            let at = (first / 64 + index) as usize;
            if let Some(low) = self.words.get_mut(at) {
                *low |= word << shift;
            }
            if shift != 0
                && let Some(high) = self.words.get_mut(at + 1)
            {
                *high |= word >> (64 - shift);
            }
        }
    }

    /// The pages of RAM range number `range`, in the form [`insert_words`](Self::insert_words) takes.
    pub fn words_of(&self, range: usize) -> Vec<u64> {
        let Some(pages) = self.pages_of(range) else {
            return Vec::new();
        };
        let first = self.layout.offset(range) / PAGE_SIZE;
        let word = |at: u64| self.words.get(at as usize).copied().unwrap_or_default();
        let mut words: Vec<_> = (0..pages.div_ceil(64))
            .map(|index| {
                let (at, shift) = (first / 64 + index, first % 64);
                match shift {
                    0 => word(at),
                    _ => word(at) >> shift | word(at + 1) << (64 - shift),
                }
            })
            .collect();
        if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(64)) {
            *last &= u64::MAX >> (64 - pages % 64);
        }
        words
    }

    fn pages_of(&self, range: usize) -> Option<u64> {
        let range = self.layout.ranges().get(range)?;
        Some(range.len / PAGE_SIZE)
    }

    /// The pages in ascending order, neighbours of one RAM range together.
    pub fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let mut ends = Vec::with_capacity(self.layout.ranges().len());
        let mut sum = 0;
        for range in self.layout.ranges() {
            sum += range.len / PAGE_SIZE;
            ends.push(sum);
        }
        let (mut at, mut range, mut before) = (0, 0, 0);
        std::iter::from_fn(move || {
            let first = self.next(at, true)?;
            while let Some(end) = ends.get(range).filter(|end| first >= **end) {
                before = *end;
                range += 1;
            }
            let end = *ends.get(range)?;
            at = self.next(first, false).unwrap_or(end).min(end);
            Some(Run {
                range,
                offset: (first - before) * PAGE_SIZE,
                first,
                count: at - first,
            })
        })
    }

    /// The first pages of the set among `from..end` that are neighbours.
    pub fn run_within(&self, from: u64, end: u64) -> Option<Range<u64>> {
        let first = self.next(from, true).filter(|first| *first < end)?;
        Some(first..self.next(first, false).map_or(end, |stop| stop.min(end)))
    }

    /// The first page from `from` on that is in the set, or is not.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        let flip = if wanted { 0 } else { u64::MAX };
        let mut mask = u64::MAX << (from % 64);
        for (index, word) in (from / 64..).zip(self.words.get((from / 64) as usize..)?) {
            let found = (word ^ flip) & mask;
            if found != 0 {
                return Some(index * 64 + u64::from(found.trailing_zeros()));
            }
            mask = u64::MAX;
        }
        None
    }

    /// One bit for each page in ascending order, from the least significant bit of the first byte on.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        bytes.truncate(Self::byte_len(&self.layout));
        bytes
    }

    /// Length of [`to_bytes`](Self::to_bytes).
    pub fn byte_len(layout: &RamLayout) -> usize {
        layout.pages().div_ceil(8) as usize
    }

    /// The set that [`to_bytes`](Self::to_bytes) gave `bytes` for.
    pub fn from_bytes(layout: &RamLayout, bytes: &[u8]) -> Result<Self, BadPageSet> {
        let needed = Self::byte_len(layout);
        if bytes.len() != needed {
            return Err(BadPageSet::Length {
                len: bytes.len() as u64,
                needed: needed as u64,
            });
        }
        let mut set = Self::empty(layout);
        for (word, bytes) in set.words.iter_mut().zip(bytes.chunks(8)) {
            for (index, byte) in bytes.iter().enumerate() {
                *word |= u64::from(*byte) << (8 * index);
            }
        }
        let before = set.count();
        set.trim();
        if set.count() != before {
            return Err(BadPageSet::Beyond);
        }
        Ok(set)
    }

    /// Clears the bits that are no page.
    fn trim(&mut self) {
        let pages = self.layout.pages();
        if let Some(last) = self.words.last_mut().filter(|_| !pages.is_multiple_of(64)) {
            *last &= u64::MAX >> (64 - pages % 64);
        }
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "PageSet({} of {} pages)",
            self.count(),
            self.layout.pages()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Ranges of all alignments to words.
    fn layouts() -> impl Strategy<Value = RamLayout> {
        proptest::collection::vec((0u64..3, 1u64..200), 1..5).prop_map(|pieces| {
            let mut at = 0;
            RamLayout::new(pieces.into_iter().map(|(gap, pages)| {
                let start = at + gap * PAGE_SIZE;
                at = start + pages * PAGE_SIZE;
                (start, pages * PAGE_SIZE)
            }))
            .unwrap()
        })
    }

    fn sets() -> impl Strategy<Value = (RamLayout, BTreeSet<u64>, BTreeSet<u64>)> {
        layouts().prop_flat_map(|layout| {
            let pages = proptest::collection::btree_set(0..layout.pages(), 0..120);
            (Just(layout), pages.clone(), pages)
        })
    }

    fn set_of(layout: &RamLayout, pages: &BTreeSet<u64>) -> PageSet {
        let mut set = PageSet::empty(layout);
        pages.iter().for_each(|page| set.insert(*page));
        set
    }

    fn pages_of(set: &PageSet) -> BTreeSet<u64> {
        set.runs()
            .flat_map(|run| run.first..run.first + run.count)
            .collect()
    }

    proptest! {
        #[test]
        fn it_is_a_set((layout, a, b) in sets()) {
            let (set, other) = (set_of(&layout, &a), set_of(&layout, &b));
            prop_assert_eq!(set.count(), a.len() as u64);
            prop_assert_eq!(set.is_empty(), a.is_empty());
            prop_assert_eq!(&pages_of(&set), &a);
            for page in 0..layout.pages() + 70 {
                prop_assert_eq!(set.contains(page), a.contains(&page));
            }
            let mut union = set.clone();
            union.union_with(&other);
            prop_assert_eq!(pages_of(&union), &a | &b);
            let mut rest = set.clone();
            rest.subtract(&other);
            prop_assert_eq!(pages_of(&rest), &a - &b);
            let bytes = set.to_bytes();
            prop_assert_eq!(bytes.len() as u64, layout.pages().div_ceil(8));
            prop_assert_eq!(PageSet::from_bytes(&layout, &bytes), Ok(set));
        }

        #[test]
        fn runs_are_as_long_as_they_can_be_and_stay_in_their_range((layout, a, _) in sets()) {
            let set = set_of(&layout, &a);
            let mut last: Option<Run> = None;
            for run in set.runs() {
                let range = layout.ranges()[run.range];
                prop_assert!(run.count > 0 && run.offset + run.bytes() <= range.len);
                prop_assert_eq!(layout.address_of(run.first), Some(range.start + run.offset));
                if let Some(last) = last {
                    prop_assert!(last.first + last.count < run.first || last.range < run.range);
                }
                last = Some(run);
            }
        }

        #[test]
        fn words_of_a_range_are_where_kvm_has_them((layout, a, b) in sets()) {
            let (set, mut other) = (set_of(&layout, &a), set_of(&layout, &b));
            for (index, range) in layout.ranges().iter().enumerate() {
                let mut words = set.words_of(index);
                let pages = range.len / PAGE_SIZE;
                let first = layout.offset(index) / PAGE_SIZE;
                prop_assert_eq!(words.len() as u64, pages.div_ceil(64));
                for page in 0..pages.next_multiple_of(64) {
                    let bit = words[(page / 64) as usize] >> (page % 64) & 1 != 0;
                    prop_assert_eq!(bit, page < pages && a.contains(&(first + page)));
                }
                // What is beyond the range is ignored.
                if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(64)) {
                    *last |= u64::MAX << (pages % 64);
                }
                words.push(u64::MAX);
                other.insert_words(index, &words);
            }
            other.insert_words(layout.ranges().len(), &[u64::MAX]);
            prop_assert_eq!(pages_of(&other), &a | &b);
        }

        #[test]
        fn runs_are_added_and_removed_as_a_whole(
            (layout, a, _) in sets(), first in 0u64..900, count in 0u64..900
        ) {
            let run: BTreeSet<_> = (first..first + count).filter(|p| *p < layout.pages()).collect();
            let mut set = set_of(&layout, &a);
            set.insert_run(first, count);
            prop_assert_eq!(pages_of(&set), &a | &run);
            set.remove_run(first, count);
            prop_assert_eq!(pages_of(&set), &a - &run);
            let within = set.run_within(first, first + count);
            let next = a.iter().find(|page| !run.contains(page) && **page >= first + count);
            prop_assert!(within.is_none(), "{within:?}");
            let found = set.run_within(first, u64::MAX);
            prop_assert_eq!(found.map(|run| run.start), next.copied());
            set.insert_run(first, u64::MAX);
            let rest: BTreeSet<_> = (first..layout.pages()).collect();
            prop_assert_eq!(pages_of(&set), &(&a - &run) | &rest);
        }
    }

    #[test]
    fn the_full_set_has_all_pages_and_no_bit_more() {
        for pages in [1, 63, 64, 65, 200] {
            let layout = RamLayout::new([(0, pages * PAGE_SIZE)]).unwrap();
            let full = PageSet::full(&layout);
            assert_eq!(full.count(), pages);
            assert_eq!(full.runs().count(), 1);
            let mut bytes = full.to_bytes();
            bytes.push(0);
            assert!(matches!(
                PageSet::from_bytes(&layout, &bytes),
                Err(BadPageSet::Length { .. })
            ));
            bytes.pop();
            if !pages.is_multiple_of(8) {
                *bytes.last_mut().unwrap() = 0xff;
                let outcome = PageSet::from_bytes(&layout, &bytes);
                assert_eq!(outcome, Err(BadPageSet::Beyond));
            }
        }
    }
}
