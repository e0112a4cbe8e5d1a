//! Which pages of guest RAM were written: by vCPUs, as KVM's log has it, or by the monitor and its devices, as the dirty
//! bitmap has it. A snapshot or migration sends the union.
//!
//! Whoever takes pages does something with them that can fail. An [`Attempt`] remembers all that were taken, and unless
//! it succeeds they are there again: a snapshot that failed costs the next incremental one nothing.
//!
//! # Order
//!
//! 1. [`PageSource::start`], before the first page is copied;
//! 2. [`Attempt::take`], then copy what it returned, as often as wanted while the guest runs;
//! 3. with the guest paused and its devices at rest, take and copy once more;
//! 4. [`Attempt::succeed`] when the snapshot is on disk. From then on, the pages that are taken are those written since
//!    *that* snapshot, as of its last take.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::memory::GuestRam;
use migration::layout::LayoutError;
use migration::{GuestPages, PageSet, RamLayout, SnapshotId};
use vm_memory::GuestAddress;

use crate::kvm::KvmError;
use crate::kvm::slots::Slots;

/// Why pages could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Nobody asked for a record of writes.
    #[error("what the guest writes is not being recorded")]
    Stopped,
    /// Another attempt is under way.
    #[error("what the guest writes is being taken by somebody else")]
    Busy,
}

/// Guest RAM for the crate `migration`.
#[derive(Clone, Debug)]
pub struct RamPages {
    ram: Arc<GuestRam>,
    layout: RamLayout,
}

impl RamPages {
    /// All of `ram`.
    pub fn new(ram: &Arc<GuestRam>) -> Result<Self, LayoutError> {
        let ranges = ram.ranges().iter();
        Ok(Self {
            ram: Arc::clone(ram),
            layout: RamLayout::new(ranges.map(|range| (range.start.0, range.len as u64)))?,
        })
    }
}

// SAFETY: `GuestRam` maps each of its ranges, from which the layout was made, readable and writable, aligned to a large
// page, and keeps them mapped as long as it lives; this value keeps it alive. It is reached by vm-memory's volatile
// accesses, system calls and the guest alone.
#[allow(unsafe_code)]
unsafe impl GuestPages for RamPages {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, range: usize) -> *mut u8 {
        let mapping = self.ram.host_addresses().nth(range);
        mapping.map_or(std::ptr::null_mut(), |(_, address)| address)
    }

    fn occupied(&self, range: usize, from: u64) -> Option<Range<u64>> {
        let piece = self.ram.occupied(range, usize::try_from(from).ok()?)?;
        Some(piece.start as u64..piece.end as u64)
    }

    fn enlarge(&self, range: usize, piece: Range<u64>) {
        if let Some(range) = self.ram.ranges().get(range) {
            let start = range.start.0 + piece.start;
            self.ram
                .enlarge(GuestAddress(start), piece.end - piece.start);
        }
    }
}

/// The pages of one VM that were written. See the [module documentation](self).
#[derive(Debug)]
pub struct PageSource {
    slots: Arc<Slots>,
    layout: RamLayout,
    tracking: Mutex<Option<Tracking>>,
}

/// Writes are being recorded.
#[derive(Debug)]
struct Tracking {
    /// Since when.
    since: Option<SnapshotId>,
    /// Pages that are in neither log nor bitmap any more, and still have to be taken.
    kept: PageSet,
    /// Whether there is an attempt.
    busy: bool,
}

impl PageSource {
    /// Of the VM with `slots`. Records nothing yet.
    pub fn new(slots: &Arc<Slots>) -> Result<Arc<Self>, LayoutError> {
        Ok(Arc::new(Self {
            slots: Arc::clone(slots),
            layout: RamPages::new(slots.ram())?.layout,
            tracking: Mutex::new(None),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Tracking>> {
        // Nothing that holds the lock leaves it half changed.
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The RAM the pages are of.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// Records writes from now on.
    ///
    /// Without `since`, all pages count as written now, and the guest may run. With it, RAM must be what that snapshot has
    /// at this moment, as it is after a restore and before anything runs: no page counts as written.
    ///
    /// Does nothing if writes are recorded already, whatever since.
    pub fn start(&self, since: Option<SnapshotId>) -> Result<(), SourceError> {
        let mut tracking = self.lock();
        if tracking.is_some() {
            return Ok(());
        }
        self.slots.start_log()?;
        let mut state = Tracking {
            since,
            kept: PageSet::full(&self.layout),
            busy: false,
        };
        if since.is_some() {
            // What was written before.
            let outcome = self.collect(&mut state.kept);
            if let Err(error) = outcome {
                let _ = self.slots.stop_log();
                return Err(error.into());
            }
            state.kept = PageSet::empty(&self.layout);
        }
        *tracking = Some(state);
        Ok(())
    }

    /// Records no longer, and forgets what was recorded. The guest has its full speed again.
    ///
    /// An attempt that is under way gets no more pages.
    pub fn stop(&self) -> Result<(), SourceError> {
        let mut tracking = self.lock();
        *tracking = None;
        Ok(self.slots.stop_log()?)
    }

    /// The snapshot since which writes are recorded: the one an incremental snapshot can be based on.
    pub fn since(&self) -> Option<SnapshotId> {
        self.lock().as_ref().and_then(|tracking| tracking.since)
    }

    /// Whether writes are recorded.
    pub fn is_recording(&self) -> bool {
        self.lock().is_some()
    }

    /// Begins to take pages. There is one attempt at a time.
    pub fn attempt(self: &Arc<Self>) -> Result<Attempt, SourceError> {
        let mut tracking = self.lock();
        let state = tracking.as_mut().ok_or(SourceError::Stopped)?;
        if std::mem::replace(&mut state.busy, true) {
            return Err(SourceError::Busy);
        }
        Ok(Attempt {
            source: Arc::clone(self),
            taken: PageSet::empty(&self.layout),
        })
    }

    /// Moves what log and bitmap have into `pages`, also if it fails halfway.
    fn collect(&self, pages: &mut PageSet) -> Result<(), KvmError> {
        for (range, words) in self.slots.ram().dirty_pages().take().iter().enumerate() {
            pages.insert_words(range, words);
        }
        for slot in 0..self.slots.count() {
            let words = self.slots.get(slot)?;
            pages.insert_words(slot, &words);
            self.slots.clear(slot, &words)?;
        }
        Ok(())
    }
}

/// Pages that were taken for one purpose. Unless it [succeeds](Self::succeed), dropping it puts all of them back.
#[derive(Debug)]
#[must_use = "dropping it puts back what was taken"]
pub struct Attempt {
    source: Arc<PageSource>,
    /// All of them.
    taken: PageSet,
}

impl Attempt {
    /// The pages that were written since they were taken last. Copy them now: a page that is written from now on is in
    /// the next set.
    pub fn take(&mut self) -> Result<PageSet, SourceError> {
        let mut tracking = self.source.lock();
        let state = tracking.as_mut().ok_or(SourceError::Stopped)?;
        self.source.collect(&mut state.kept)?;
        let pages = std::mem::replace(&mut state.kept, PageSet::empty(&self.source.layout));
        self.taken.union_with(&pages);
        Ok(pages)
    }

    /// All pages taken until now.
    pub fn taken(&self) -> &PageSet {
        &self.taken
    }

    /// Puts `pages` back, since they could not be copied: the next set has them.
    pub fn put_back(&mut self, pages: &PageSet) {
        if let Some(state) = &mut *self.source.lock() {
            state.kept.union_with(pages);
        }
    }

    /// All pages are on disk, in snapshot `id`: what is taken from now on was written since.
    pub fn succeed(mut self, id: SnapshotId) {
        self.taken = PageSet::empty(&self.source.layout);
        if let Some(state) = &mut *self.source.lock() {
            state.since = Some(id);
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(state) = &mut *self.source.lock() {
            state.kept.union_with(&self.taken);
            state.busy = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use devices::memory::Backing;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::kvm::slots::tests::Scribbler;

    const ID: SnapshotId = SnapshotId([7; 16]);
    /// Numbers of pages: those of the program, which the monitor writes.
    const CODE: u64 = 1;

    fn numbers(pages: &PageSet) -> Vec<u64> {
        pages
            .runs()
            .flat_map(|run| run.first..run.first + run.count)
            .collect()
    }

    /// Guests whose log is cleared page by page, and by reading it, with memory of both kinds. None where there is no KVM.
    fn sources() -> impl Iterator<Item = (Scribbler, Arc<PageSource>)> {
        [true, false].into_iter().filter_map(|manual| {
            let backing = match manual {
                true => Backing::memfd(198 * 4096).unwrap(),
                false => Backing::Anonymous,
            };
            let guest = Scribbler::new(backing, manual)?;
            let source = PageSource::new(guest.vm.slots()).unwrap();
            Some((guest, source))
        })
    }

    #[test]
    fn what_guest_and_monitor_wrote_is_taken_together() {
        for (mut guest, source) in sources() {
            assert!(matches!(source.attempt(), Err(SourceError::Stopped)));
            guest.write(&[0x3000]);
            source.start(None).unwrap();
            let mut attempt = source.attempt().unwrap();
            assert_eq!(attempt.take().unwrap(), PageSet::full(source.layout()));
            assert!(attempt.take().unwrap().is_empty());
            guest.write(&[0x4000, 0x8_2000]);
            let view = guest.ram.view().unwrap();
            view.write_obj(1u8, GuestAddress(0x8_5000)).unwrap();
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 4, 72, 75]);
            assert!(attempt.take().unwrap().is_empty());
        }
    }

    #[test]
    fn an_attempt_that_fails_puts_everything_back() {
        for (mut guest, source) in sources() {
            source.start(Some(ID)).unwrap();
            assert_eq!(source.since(), Some(ID));
            let mut attempt = source.attempt().unwrap();
            assert!(attempt.take().unwrap().is_empty(), "nothing since then");
            guest.write(&[0x4000]);
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 4]);
            guest.write(&[0x5000]);
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 5]);
            assert!(matches!(source.attempt(), Err(SourceError::Busy)));
            guest.write(&[0x6000]);
            drop(attempt);
            let mut attempt = source.attempt().unwrap();
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 4, 5, 6]);
            let back = attempt.taken().clone();
            attempt.put_back(&back);
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 4, 5, 6]);
            let other = SnapshotId([8; 16]);
            attempt.succeed(other);
            assert_eq!(source.since(), Some(other));
            guest.write(&[0x7000]);
            let mut attempt = source.attempt().unwrap();
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 7]);
        }
    }

    #[test]
    fn stopping_forgets_and_starting_again_begins_anew() {
        for (mut guest, source) in sources() {
            source.start(Some(ID)).unwrap();
            let mut attempt = source.attempt().unwrap();
            source.stop().unwrap();
            assert!(matches!(attempt.take(), Err(SourceError::Stopped)));
            assert!(!source.is_recording() && source.since().is_none());
            drop(attempt);
            guest.write(&[0x4000]);
            source.start(Some(ID)).unwrap();
            let mut attempt = source.attempt().unwrap();
            assert!(attempt.take().unwrap().is_empty());
            guest.write(&[0x5000]);
            assert_eq!(numbers(&attempt.take().unwrap()), [CODE, 5]);
        }
    }

    /// Three generations of a guest that writes on: the chain has what its memory was at each.
    #[test]
    fn a_guest_is_saved_with_what_changed_since_and_read_back_whole() {
        use migration::{Bases, Existing, Expected, Guest, Image, Reader, Writer};
        use std::ops::ControlFlow;

        for backing in [Backing::Anonymous, Backing::memfd(198 * 4096).unwrap()] {
            let Some(mut guest) = Scribbler::new(backing, true) else {
                return;
            };
            let source = PageSource::new(guest.vm.slots()).unwrap();
            let ram = RamPages::new(&guest.ram).unwrap();
            let directory = tempfile::tempdir().unwrap();
            let progress = &mut |_: migration::Progress| ControlFlow::Continue(());
            source.start(None).unwrap();
            let mut base = None;
            let mut generations = Vec::new();
            for (name, writes) in [
                ("a", [0x3000, 0x8_0000]),
                ("b", [0x4000, 0xf_f000]),
                ("c", [0x3008, 0x5000]),
            ] {
                let path = directory.path().join(name);
                let writer = Writer::create(&path, Existing::Refuse).unwrap();
                let mut memory = writer.memory(ram.layout(), base.as_deref()).unwrap();
                let mut attempt = source.attempt().unwrap();
                let first = attempt.take().unwrap();
                memory.pass(&ram, &first, Guest::Running, progress).unwrap();
                guest.write(&writes);
                let last = attempt.take().unwrap();
                memory.pass(&ram, &last, Guest::Paused, progress).unwrap();
                let memory = memory.finish(progress).unwrap();
                let id = memory.id();
                writer.commit(b"{}", memory).unwrap();
                attempt.succeed(id);
                let mut bytes = vec![0; 70 * 4096];
                let view = guest.ram.view().unwrap();
                view.read_slice(&mut bytes, GuestAddress(0)).unwrap();
                generations.push((path.clone(), id, bytes));
                base = Some(path);
            }
            for (path, id, bytes) in generations {
                let reader = Reader::open(&path).unwrap();
                let expected = Expected {
                    id,
                    layout: ram.layout().clone(),
                    digest: None,
                };
                let image = Image::open(&reader, Some(&expected), Bases::Follow).unwrap();
                image.verify(progress).unwrap();
                let (file, offsets) = image.lowest().unwrap();
                let backing = Backing::File { file, offsets };
                let lazy = GuestRam::with_backing(guest.ram.ranges(), backing).unwrap();
                image
                    .overlay(&RamPages::new(&lazy).unwrap(), progress)
                    .unwrap();
                let eager = GuestRam::new(guest.ram.ranges()).unwrap();
                image
                    .load(&RamPages::new(&eager).unwrap(), progress)
                    .unwrap();
                for ram in [lazy, eager] {
                    let mut there = vec![0; 70 * 4096];
                    let view = ram.view().unwrap();
                    view.read_slice(&mut there, GuestAddress(0)).unwrap();
                    assert!(there == bytes, "{}", path.display());
                    assert_eq!(view.read_obj::<u8>(GuestAddress(0x8_0000)).unwrap(), 0x5a);
                }
            }
        }
    }
}
