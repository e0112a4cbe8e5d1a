//! Which function answers at a memory address: a sorted table that is rebuilt when registers change.

use std::ops::Range;
use std::sync::Arc;

use crate::function::{BarSlot, PciFunction};

/// A range of addresses and the function that decodes it.
#[derive(Clone)]
pub struct Entry {
    /// The addresses. Part of the function's range if bridges or other functions cut it short.
    pub range: Range<u64>,
    /// The address of byte 0 of the function's range.
    pub base: u64,
    /// Which of the function's ranges.
    pub slot: BarSlot,
    /// The function.
    pub function: Arc<dyn PciFunction>,
}

/// The decoded ranges of all functions, disjoint and ascending.
#[derive(Clone, Default)]
pub struct DecodeTable {
    entries: Vec<Entry>,
}

impl DecodeTable {
    /// Adds `function` for the part of `range` that no earlier claim has: of overlapping ranges, the first wins.
    ///
    /// `window` cuts the range to what reaches the function.
    pub fn claim(
        &mut self,
        window: &Range<u64>,
        slot: BarSlot,
        range: &Range<u64>,
        function: &Arc<dyn PciFunction>,
    ) {
        let end = range.end.min(window.end);
        let mut start = range.start.max(window.start);
        while start < end {
            let next = self.entries.partition_point(|e| e.range.end <= start);
            let (free_until, then) = match self.entries.get(next) {
                Some(taken) if taken.range.start < end => (taken.range.start, taken.range.end),
                _ => (end, end),
            };
            if start < free_until {
                let entry = Entry {
                    range: start..free_until,
                    base: range.start,
                    slot,
                    function: Arc::clone(function),
                };
                self.entries.insert(next, entry);
            }
            start = then;
        }
    }

    /// The entry that holds `address`, and the offset in the function's range.
    pub fn resolve(&self, address: u64) -> Option<(&Entry, u64)> {
        let at = self.entries.partition_point(|e| e.range.end <= address);
        let entry = self.entries.get(at)?;
        (entry.range.start <= address).then(|| (entry, address - entry.base))
    }

    /// The entries, ascending.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::bar::BarIndex;
    use crate::testing::Stub;

    const SLOT: BarSlot = BarSlot::Own(BarIndex::ZERO);
    const EVERYWHERE: Range<u64> = 0..u64::MAX;

    fn table(claims: &[Range<u64>], window: &Range<u64>) -> DecodeTable {
        let mut table = DecodeTable::default();
        for (i, range) in claims.iter().enumerate() {
            let function = Stub::new(i.to_string()) as Arc<dyn PciFunction>;
            table.claim(window, SLOT, range, &function);
        }
        table
    }

    fn found(table: &DecodeTable, address: u64) -> Option<(String, u64)> {
        table
            .resolve(address)
            .map(|(e, offset)| (e.function.name().to_string(), offset))
    }

    #[test]
    fn an_address_resolves_to_the_offset_in_its_range() {
        let table = table(&[0x3000..0x4000, 0x1000..0x2000], &EVERYWHERE);
        assert_eq!(found(&table, 0xfff), None);
        assert_eq!(found(&table, 0x1000), Some(("1".into(), 0)));
        assert_eq!(found(&table, 0x3fff), Some(("0".into(), 0xfff)));
        assert_eq!(found(&table, 0x4000), None);
    }

    #[test]
    fn of_overlapping_ranges_the_first_wins() {
        let claims = [0x2000..0x3000, 0x1000..0x5000, 0x1000..0x6000];
        let table = table(&claims, &EVERYWHERE);
        let owners = [0x1000, 0x2000, 0x3000, 0x5000].map(|a| found(&table, a).unwrap());
        let expected = [("1", 0), ("0", 0), ("1", 0x2000), ("2", 0x4000)];
        assert_eq!(owners, expected.map(|(n, o)| (n.to_string(), o)));
    }

    #[test]
    fn a_window_cuts_a_range_without_moving_it() {
        let claims = [0x1000..0x5000, 0..0x800];
        let table = table(&claims, &(0x2000..0x3000));
        assert_eq!(found(&table, 0x1fff), None);
        assert_eq!(found(&table, 0x2000), Some(("0".into(), 0x1000)));
        assert_eq!(found(&table, 0x3000), None);
    }

    proptest! {
        /// The table answers as a search through the claims in order would, and stays sorted and disjoint.
        #[test]
        fn the_table_agrees_with_a_linear_search(
            claims in prop::collection::vec((0u64..200, 0u64..60), 0..20),
            (from, to) in (0u64..200, 0u64..260),
        ) {
            let claims: Vec<_> = claims.into_iter().map(|(start, len)| start..start + len).collect();
            let window = from..to;
            let table = table(&claims, &window);
            for address in 0..270 {
                let expected = claims
                    .iter()
                    .position(|c| c.contains(&address) && window.contains(&address))
                    .map(|i| (i.to_string(), address - claims[i].start));
                prop_assert_eq!(found(&table, address), expected);
            }
            for pair in table.entries().windows(2) {
                prop_assert!(pair[0].range.end <= pair[1].range.start);
            }
        }
    }
}
