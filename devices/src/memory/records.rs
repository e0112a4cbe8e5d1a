//! Write records: which pages of guest RAM a device function wrote since its driver asked.
//!
//! A driver that moves a function between machines copies guest memory while the function still writes to it. It names
//! ranges and a page size ([`Records::start`]), copies, and asks again and again which pages were written meanwhile
//! ([`Records::read`]). Each function keeps its own [`Records`], behind its [`View`](super::View), and several drivers use
//! them without noticing each other, each a [`Party`].
//!
//! What counts as a write is what goes through the view: buffers, descriptors, the used ring and the suppression of
//! notifications. Messages that signal an interrupt are none.
//!
//! # How a write is never lost
//!
//! While a party records, every write sets the bit of its page, wherever in RAM it is; the ranges matter only to those
//! who read. A writer first stores the data, then marks. The order of the two sides is
//!
//! | writer | reader |
//! |---|---|
//! | store data | start recording, or take and clear the bits of pages |
//! | mark the VM-wide bitmap: a sequentially consistent read-modify-write | a full barrier |
//! | look whether anybody records | copy the pages |
//! | set the bit in the record | |
//!
//! A writer that finds nobody recording has made its data visible before the look, so the copy that follows the start
//! contains them. A bit set before it is taken was set after its data were stored, so the copy that follows contains
//! them; a bit set after stays, and the next read takes it. Nothing of this stops a writer: it waits for no lock.
//!
//! Only [`Records::stop`] ends a recording: a reset of the function (S3-41) or a change of its mode does not touch it.

mod pages;
mod saved;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwapOption;
use pages::WrittenPages;
pub use saved::Prepared;

use super::RamRange;
use crate::gate::Party;

/// The page sizes a recording can have: bit n stands for 4 KiB << n. 4 KiB to 1 GiB.
pub const PAGE_SIZES: u32 = (1 << 19) - 1;

/// The ranges one party can have under record at once, per function.
pub const MAX_RANGES: u32 = 128;

/// log2 of the smallest page size.
const MIN_SHIFT: u32 = 12;

/// Guest memory to record, in pages of the size chosen with it. It need not be RAM; what is not is never written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRange {
    /// Guest physical address of the first page; a multiple of the page size.
    pub page_address: u64,
    /// Number of pages; not zero.
    pub page_count: u64,
}

/// Why a command on records was refused. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// [`PAGE_SIZES`] does not have it.
    #[error("pages of {0:#x} bytes cannot be recorded")]
    PageSize(u64),
    /// The recording that is under way has another page size.
    #[error("pages of {asked:#x} bytes, while pages of {current:#x} are recorded")]
    OtherPageSize {
        /// Asked for, in bytes.
        asked: u64,
        /// In force, in bytes.
        current: u64,
    },
    /// No range is named.
    #[error("no range to record")]
    NoRanges,
    /// With these there would be more than [`MAX_RANGES`].
    #[error("more than {MAX_RANGES} ranges to record")]
    TooManyRanges,
    /// A range has no page.
    #[error("range at {0:#x} is empty")]
    Empty(u64),
    /// An address is not a multiple of the page size.
    #[error("address {0:#x} is not at the start of a page")]
    Unaligned(u64),
    /// A range ends beyond the last address.
    #[error("range at {0:#x} wraps around")]
    Wraps(u64),
    /// A range overlaps one that is named with it, or one under record.
    #[error("range at {0:#x} overlaps another")]
    Overlap(u64),
    /// There is no memory for the records.
    #[error("no memory for write records")]
    NoMemory,
    /// The party does not record.
    #[error("writes are not recorded")]
    NotStarted,
    /// A length to read is zero or not a multiple of the page size.
    #[error("length {0:#x} is not a number of pages")]
    Length(u64),
    /// What to read is not within one range under record.
    #[error("range at {0:#x} is not within one that is recorded")]
    NotRecorded(u64),
    /// Saved ranges, or saved pages, are not in ascending order.
    #[error("range at {0:#x} is not behind the one before it")]
    Order(u64),
    /// Saved pages that cannot have been written.
    #[error("pages written at {0:#x} are not all of them RAM within one recorded range")]
    Written(u64),
}

/// The write records of one device function. See the [module documentation](self).
///
/// While nobody records it is a few words, and a write costs one look. A recording takes a bit per page of RAM,
/// whatever the ranges are: 32 KiB per GiB with pages of 4 KiB.
#[derive(Debug)]
pub struct Records {
    ram: Arc<[RamRange]>,
    /// One bit per party that records; not set before its `written` is there.
    active: AtomicU8,
    seats: [Seat; Party::ALL.len()],
}

/// What belongs to one party.
#[derive(Debug, Default)]
struct Seat {
    /// For writers, who wait for nobody.
    written: ArcSwapOption<WrittenPages>,
    /// For commands, one at a time.
    recording: Mutex<Option<Recording>>,
}

impl Seat {
    fn lock(&self) -> MutexGuard<'_, Option<Recording>> {
        // Nothing that holds the lock leaves it half changed.
        self.recording
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A recording under way.
#[derive(Debug)]
struct Recording {
    written: Arc<WrittenPages>,
    /// In pages; ascending and disjoint.
    ranges: Vec<Range<u64>>,
}

impl Recording {
    fn page_size(&self) -> u64 {
        1 << self.written.shift()
    }

    /// Those under record.
    fn ranges(&self) -> Vec<PageRange> {
        let shift = self.written.shift();
        let ranges = self.ranges.iter();
        ranges.map(|pages| addressed(pages, shift)).collect()
    }
}

impl Records {
    /// Of a function that reaches `ram`, which is disjoint and in ascending order.
    pub(super) fn new(ram: Arc<[RamRange]>) -> Self {
        Self {
            ram,
            active: AtomicU8::new(0),
            seats: Default::default(),
        }
    }

    fn seat(&self, party: Party) -> &Seat {
        &self.seats[party as usize]
    }

    /// Records writes to `ranges` from now on, for `party` (S3-43). One that records already gets further ranges.
    ///
    /// # Errors
    ///
    /// What is wrong with the page size or the ranges, or that there is no memory for a record.
    pub fn start(
        &self,
        party: Party,
        page_size: u64,
        ranges: &[PageRange],
    ) -> Result<(), RecordError> {
        let shift = shift_of(page_size).ok_or(RecordError::PageSize(page_size))?;
        let seat = self.seat(party);
        let mut recording = seat.lock();
        let old = match &*recording {
            Some(now) if now.written.shift() != shift => {
                return Err(RecordError::OtherPageSize {
                    asked: page_size,
                    current: 1 << now.written.shift(),
                });
            }
            Some(now) => &now.ranges[..],
            None => &[],
        };
        let (new, all) = join(old, ranges, shift)?;
        match &mut *recording {
            Some(now) => {
                // Written before they were asked about.
                for range in new {
                    now.written.clear(range);
                }
                now.ranges = all;
            }
            None => {
                let now = Recording {
                    written: self.nothing_written(shift)?,
                    ranges: all,
                };
                self.set(party, &mut recording, Some(now));
            }
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Ends what `party` records, if anything, and drops what it has not read (S3-40).
    pub fn stop(&self, party: Party) {
        self.set(party, &mut self.seat(party).lock(), None);
    }

    fn nothing_written(&self, shift: u32) -> Result<Arc<WrittenPages>, RecordError> {
        let written = WrittenPages::new(&self.ram, shift);
        written.map(Arc::new).map_err(|_| RecordError::NoMemory)
    }

    /// Replaces `recording`, that of `party`.
    fn set(&self, party: Party, recording: &mut Option<Recording>, new: Option<Recording>) {
        let written = new.as_ref().map(|now| Arc::clone(&now.written));
        let (bit, starts) = (1 << party as u8, written.is_some());
        if !starts {
            self.active.fetch_and(!bit, Ordering::SeqCst);
        }
        self.seat(party).written.store(written);
        if starts {
            self.active.fetch_or(bit, Ordering::SeqCst);
        }
        *recording = new;
    }

    /// Appends to `out` the addresses of pages written within `start..start + length`, ascending and no more than
    /// `max_entries`, and clears their records (S3-42). What there is no room for stays recorded.
    ///
    /// Takes time by the RAM in that range, whatever its length.
    ///
    /// # Errors
    ///
    /// [`NotStarted`](RecordError::NotStarted) (S3-39); [`Unaligned`](RecordError::Unaligned) for `start`;
    /// [`Length`](RecordError::Length); and [`NotRecorded`](RecordError::NotRecorded) unless one range given to
    /// [`start`](Self::start) contains all of it (S3-44).
    pub fn read(
        &self,
        party: Party,
        start: u64,
        length: u64,
        max_entries: usize,
        out: &mut Vec<u64>,
    ) -> Result<(), RecordError> {
        let recording = self.seat(party).lock();
        let now = recording.as_ref().ok_or(RecordError::NotStarted)?;
        let shift = now.written.shift();
        let page_size = 1 << shift;
        if !start.is_multiple_of(page_size) {
            return Err(RecordError::Unaligned(start));
        }
        if length == 0 || !length.is_multiple_of(page_size) {
            return Err(RecordError::Length(length));
        }
        // Page numbers are far from overflow.
        let pages = start >> shift..(start >> shift) + (length >> shift);
        if !now
            .ranges
            .iter()
            .any(|range| range.start <= pages.start && pages.end <= range.end)
        {
            return Err(RecordError::NotRecorded(start));
        }
        now.written.take(pages, max_entries, out);
        Ok(())
    }

    /// True while `party` records.
    pub fn is_recording(&self, party: Party) -> bool {
        self.active.load(Ordering::SeqCst) & 1 << party as u8 != 0
    }

    /// The size of the pages `party` records, in bytes.
    pub fn page_size(&self, party: Party) -> Option<u64> {
        let recording = self.seat(party).lock();
        recording.as_ref().map(Recording::page_size)
    }

    /// The ranges `party` records, ascending, in pages of its [`page_size`](Self::page_size).
    pub fn ranges(&self, party: Party) -> Vec<PageRange> {
        let recording = self.seat(party).lock();
        recording
            .as_ref()
            .map(Recording::ranges)
            .unwrap_or_default()
    }

    /// Records a write of `len` bytes at `offset` of the RAM range number `region`, for whoever records.
    ///
    /// To be called after the data are stored and the VM-wide bitmap is marked, which is what makes them visible
    /// before the look at `active`: see the [module documentation](self).
    #[inline]
    pub(super) fn mark(&self, region: usize, offset: usize, len: usize) {
        let active = self.active.load(Ordering::SeqCst);
        if active != 0 {
            self.mark_active(active, region, offset, len);
        }
    }

    #[inline(never)]
    fn mark_active(&self, active: u8, region: usize, offset: usize, len: usize) {
        for party in Party::ALL {
            if active & 1 << party as u8 == 0 {
                continue;
            }
            // A recording that ended since is none to write to.
            if let Some(written) = &*self.seat(party).written.load() {
                written.mark(region, offset, len);
            }
        }
    }
}

/// log2 of a supported page size.
fn shift_of(page_size: u64) -> Option<u32> {
    let shift = page_size.trailing_zeros();
    let bit = shift.checked_sub(MIN_SHIFT)?;
    let supported = PAGE_SIZES.checked_shr(bit).unwrap_or(0) & 1 != 0;
    (page_size.is_power_of_two() && supported).then_some(shift)
}

/// Page numbers.
type Pages = Range<u64>;

/// `ranges` in pages, and those together with the `old` ones, ascending.
fn join(
    old: &[Pages],
    ranges: &[PageRange],
    shift: u32,
) -> Result<(Vec<Pages>, Vec<Pages>), RecordError> {
    if ranges.is_empty() {
        return Err(RecordError::NoRanges);
    }
    if ranges.len() > MAX_RANGES as usize - old.len() {
        return Err(RecordError::TooManyRanges);
    }
    let new = ranges
        .iter()
        .map(|range| pages_of(*range, shift))
        .collect::<Result<Vec<_>, _>>()?;
    let mut all = [old, &new].concat();
    all.sort_unstable_by_key(|range| range.start);
    for pair in all.windows(2) {
        if pair[1].start < pair[0].end {
            return Err(RecordError::Overlap(pair[1].start << shift));
        }
    }
    Ok((new, all))
}

/// `pages` by their address.
fn addressed(pages: &Range<u64>, shift: u32) -> PageRange {
    PageRange {
        page_address: pages.start << shift,
        page_count: pages.end - pages.start,
    }
}

/// The page numbers of `range`.
fn pages_of(range: PageRange, shift: u32) -> Result<Range<u64>, RecordError> {
    let address = range.page_address;
    if !address.is_multiple_of(1 << shift) {
        return Err(RecordError::Unaligned(address));
    }
    if range.page_count == 0 {
        return Err(RecordError::Empty(address));
    }
    let start = address >> shift;
    match start.checked_add(range.page_count) {
        // The range may end with the last address, but not behind it.
        Some(end) if end <= 1 << (u64::BITS - shift) => Ok(start..end),
        _ => Err(RecordError::Wraps(address)),
    }
}
