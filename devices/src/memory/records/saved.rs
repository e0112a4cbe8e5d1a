//! Write records as state: what is recorded, and what was written and not yet read.

use std::sync::atomic::{Ordering, fence};

use super::{PageRange, RecordError, Recording, Records, addressed, join, pages_of, shift_of};
use crate::gate::Party;
use crate::state::RecordingState;

/// A saved recording that was found good, with its memory. Nothing can fail any more.
#[derive(Debug)]
pub struct Prepared(Recording);

impl Records {
    /// What `party` records, and which pages in these ranges were written and not yet read. `None` if it does not record.
    /// Whoever writes stands still.
    pub fn save(&self, party: Party) -> Option<RecordingState> {
        let recording = self.seat(party).lock();
        let now = recording.as_ref()?;
        let shift = now.written.shift();
        // What is written outside the ranges is never read, and cleared when a range comes to contain it.
        let mut runs = Vec::new();
        for range in &now.ranges {
            now.written.runs(range.clone(), &mut runs);
        }
        Some(RecordingState {
            page_size: now.page_size(),
            ranges: now.ranges(),
            written: runs.iter().map(|pages| addressed(pages, shift)).collect(),
        })
    }

    /// Checks `state`, and takes the memory it needs.
    ///
    /// # Errors
    ///
    /// What START says of such a page size and such ranges, of which saved ones are in order as well;
    /// [`Written`](RecordError::Written) and [`Order`](RecordError::Order) for pages that cannot be.
    pub fn prepare(&self, state: &RecordingState) -> Result<Prepared, RecordError> {
        let page_size = state.page_size;
        let shift = shift_of(page_size).ok_or(RecordError::PageSize(page_size))?;
        let (ranges, _) = join(&[], &state.ranges, shift)?;
        ascends(&state.ranges)?;
        ascends(&state.written)?;
        let written = self.nothing_written(shift)?;
        for run in &state.written {
            let pages = pages_of(*run, shift)?;
            let mut within = ranges.iter();
            let there = within.any(|r| r.start <= pages.start && pages.end <= r.end);
            if !there || !written.insert(pages) {
                return Err(RecordError::Written(run.page_address));
            }
        }
        Ok(Prepared(Recording { written, ranges }))
    }

    /// `party` records what was prepared, by this function, instead of whatever it does now.
    pub fn install(&self, party: Party, prepared: Prepared) {
        self.set(party, &mut self.seat(party).lock(), Some(prepared.0));
        fence(Ordering::SeqCst);
    }
}

/// An error if one of `ranges` does not begin behind the start of that before it. Overlaps of those under record are found by
/// [`join`]; those of pages are harmless.
fn ascends(ranges: &[PageRange]) -> Result<(), RecordError> {
    for pair in ranges.windows(2) {
        if pair[1].page_address <= pair[0].page_address {
            return Err(RecordError::Order(pair[1].page_address));
        }
    }
    Ok(())
}
