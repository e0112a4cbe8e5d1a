//! All of memory compared at both ends, while the guest stands still: what was missed by whoever tracks writes is found here.
//!
//! The source sends the checksum of each page that is not zero, in ascending order. Pages that it leaves out have to be zero
//! at the destination. Memory that was never touched is not looked at, at either end, so that it need not be allocated.

use super::pages::{Round, locate, pieces};
use crate::guest::{GuestPages, Piece};
use crate::layout::{PAGE_SIZE, RamLayout};
use crate::pages::Run;
use crate::wire::WireError;
use crate::wire::connection::Connection;
use crate::wire::frame::{Kind, MAX_PAGES, MAX_SUMS, PageTable};

/// Sends the checksums of all pages of `guest`. `tick` is called now and then, with the number of pages dealt with; it may end
/// it.
pub fn send<G: GuestPages + ?Sized>(
    connection: &mut Connection,
    guest: &G,
    tick: &mut dyn FnMut(u64) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let mut table = PageTable::default();
    for run in runs(guest.layout(), 0, guest.layout().pages()) {
        for (piece, first) in touched(guest, &run) {
            for index in 0..piece.len() / PAGE_SIZE {
                if index % MAX_PAGES as u64 == 0 {
                    tick(first + index)?;
                }
                let offset = index * PAGE_SIZE;
                if piece.is_zero(offset) {
                    continue;
                }
                let Some(sum) = piece.checksum(offset) else {
                    continue;
                };
                let starts_range = first + index == run.first;
                if table.sums.len() >= MAX_SUMS || !table.push(first + index, starts_range) {
                    connection.send_sums(&std::mem::take(&mut table))?;
                    table.push(first + index, starts_range);
                }
                table.sums.push(sum);
            }
        }
    }
    if !table.runs.is_empty() {
        connection.send_sums(&table)?;
    }
    tick(guest.layout().pages())
}

/// The pages from number `from` to number `end`, as one run for each RAM range that has some.
fn runs(layout: &RamLayout, from: u64, end: u64) -> Vec<Run> {
    let mut before = 0;
    let mut runs = Vec::new();
    for (range, ram) in layout.ranges().iter().enumerate() {
        let after = before + ram.len / PAGE_SIZE;
        let (first, stop) = (from.max(before), end.min(after));
        if first < stop {
            runs.push(Run {
                range,
                offset: (first - before) * PAGE_SIZE,
                first,
                count: stop - first,
            });
        }
        before = after;
    }
    runs
}

/// The pieces of `run` in which anything but zeroes may be, each with the number of its first page.
fn touched<'g, G: GuestPages + ?Sized>(guest: &'g G, run: &Run) -> Vec<(Piece<'g, G>, u64)> {
    let pieces = pieces(guest, run, Round::First).into_iter();
    let pieces = pieces.filter_map(|run| {
        let piece = Piece::new(guest, run.range, run.offset, run.bytes())?;
        Some((piece, run.first))
    });
    pieces.collect()
}

/// How the memory of the destination differs from that of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Number of pages that differ.
    pub pages: u64,
    /// Number of the first.
    pub first: u64,
    /// Guest physical address of the first.
    pub address: u64,
}

/// A comparison under way, at the destination.
#[derive(Debug, Default)]
pub struct Comparing {
    /// Pages before this one were compared.
    next: u64,
    /// How many of them differ, and the first of these.
    differ: u64,
    first: Option<u64>,
}

impl Comparing {
    fn note(&mut self, page: u64, same: bool) {
        if !same {
            self.differ += 1;
            self.first.get_or_insert(page);
        }
    }

    /// Compares the pages of a [`Kind::Sums`] frame, and those before them that it leaves out.
    ///
    /// # Errors
    ///
    /// The frame is malformed, or does not go on where the one before it ended.
    pub fn sums<G: GuestPages + ?Sized>(
        &mut self,
        guest: &G,
        body: &[u8],
    ) -> Result<(), WireError> {
        let table = PageTable::parse(Kind::Sums, body, guest.layout())?;
        let pieces = locate(guest, Kind::Sums, &table)?;
        let mut sums = table.sums.iter();
        for ((first, count), piece) in table.runs.iter().zip(&pieces) {
            if *first < self.next {
                let why = format!("page {first} was compared before");
                return Err(WireError::malformed(Kind::Sums, why));
            }
            self.zeroes(guest, *first);
            for index in 0..u64::from(*count) {
                let same = piece.checksum(index * PAGE_SIZE).as_ref() == sums.next();
                self.note(first + index, same);
            }
            self.next = first + u64::from(*count);
        }
        Ok(())
    }

    /// The pages up to number `end` are zero at the source.
    fn zeroes<G: GuestPages + ?Sized>(&mut self, guest: &G, end: u64) {
        for run in runs(guest.layout(), self.next, end) {
            for (piece, first) in touched(guest, &run) {
                for index in 0..piece.len() / PAGE_SIZE {
                    self.note(first + index, piece.is_zero(index * PAGE_SIZE));
                }
            }
        }
        self.next = end;
    }

    /// What differs, when the source has sent all its checksums.
    pub fn finish<G: GuestPages + ?Sized>(mut self, guest: &G) -> Option<Difference> {
        self.zeroes(guest, guest.layout().pages());
        let first = self.first?;
        Some(Difference {
            pages: self.differ,
            first,
            address: guest.layout().address_of(first).unwrap_or_default(),
        })
    }
}
