//! Guest RAM, and the views through which devices reach it.
//!
//! [`GuestRam`] owns the RAM of one VM; a [`Backing`] says what its bytes are kept in. A device never touches it
//! directly. Each device function has a [`View`] of its own on the same bytes, which marks the VM-wide [`DirtyPages`] on
//! every write. KVM's dirty log sees what vCPUs write; this bitmap sees what the monitor and its devices write; a
//! migration sends the union of the two. A view also keeps the [`records`] of what its own function wrote, while
//! somebody asks for them.

#![allow(unsafe_code)]

mod backing;
mod dirty;
mod lent;
mod mapping;
mod occupied;
pub mod records;

pub use backing::Backing;
pub use dirty::DirtyPages;
use lent::GuestSlice;
pub use lent::{GuestRead, GuestWrite};
pub use mapping::LARGE_PAGE;
pub use records::Records;

use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mapping::Mapping;
use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError,
    GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, VolatileMemory, mmap::MmapRegionBuilder,
};

/// Bytes in one page of the dirty bitmaps; also the granularity of KVM's dirty log.
pub const PAGE_SIZE: usize = 4096;

/// A contiguous piece of guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest physical address; a multiple of [`PAGE_SIZE`].
    pub start: GuestAddress,
    /// Length in bytes; a multiple of [`PAGE_SIZE`], not zero.
    pub len: usize,
}

/// Why guest RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the address space.
    #[error("cannot create {bytes} bytes of guest memory; ask for less with --memory")]
    Allocate {
        /// Bytes asked for.
        bytes: u64,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A range is empty, not page-aligned, or wraps around.
    #[error("guest memory range {0:?} is empty, not page-aligned, or too long")]
    BadRange(RamRange),
    /// A mapping failed, or ranges overlap.
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// The kernel does not say about a memory file what has to be known.
    #[error("cannot {what} of the memory file")]
    File {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// What guest memory is to be mapped from is no regular file.
    #[error("the memory file is not a regular file")]
    NotAFile,
    /// A memory file has fewer bytes than the guest.
    #[error(
        "the memory file has {len} bytes and {needed} are needed; it was truncated, or is that of another VM"
    )]
    TooShort {
        /// Bytes there are.
        len: u64,
        /// Bytes the guest memory needs.
        needed: u64,
    },
    /// Somebody holds an exclusive lock on a memory file.
    #[error("the memory file is being written by another process")]
    InUse,
    /// A memory file is mapped from an offset that cannot be mapped.
    #[error("offset {0:#x} in the memory file is not a multiple of the page size, or too large")]
    Offset(u64),
    /// The offsets are not one per range.
    #[error("{0} offsets in the memory file for {1} ranges of guest memory")]
    Offsets(usize, usize),
    /// A memfd could shrink while the guest runs.
    #[error("the memfd of the guest memory is not sealed against shrinking")]
    NotSealed,
}

/// The RAM of one VM. See the [module documentation](self).
#[derive(Debug)]
pub struct GuestRam {
    ranges: Arc<[RamRange]>,
    mappings: Vec<Mapping>,
    dirty: DirtyPages,
    page_map: occupied::PageMap,
    /// Dropped after the mappings of it, and with it the lock on a file.
    backing: Backing,
}

impl GuestRam {
    /// Creates zeroed anonymous RAM for `ranges`, which must be in ascending order and disjoint.
    ///
    /// The host gives pages only as they are touched, and may refuse them then: what is asked for here is address
    /// space.
    pub fn new(ranges: &[RamRange]) -> Result<Arc<Self>, MemoryError> {
        Self::with_backing(ranges, Backing::Anonymous)
    }

    /// Creates RAM for `ranges`, which must be in ascending order and disjoint, with the contents that `backing` has.
    ///
    /// No page counts as dirty, whatever it contains.
    pub fn with_backing(ranges: &[RamRange], backing: Backing) -> Result<Arc<Self>, MemoryError> {
        let mut bytes = 0u64;
        for range in ranges {
            let aligned = range.start.0.is_multiple_of(PAGE_SIZE as u64)
                && range.len.is_multiple_of(PAGE_SIZE)
                && range.len != 0;
            let fits = range.start.0.checked_add(range.len as u64).is_some();
            match bytes.checked_add(range.len as u64) {
                Some(sum) if aligned && fits => bytes = sum,
                _ => return Err(MemoryError::BadRange(*range)),
            }
        }
        backing.prepare(ranges)?;
        let mappings = ranges
            .iter()
            .zip(backing.sources(ranges))
            .map(|(range, source)| Mapping::new(range.len, source))
            .collect::<Result<_, _>>()
            .map_err(|source| MemoryError::Allocate { bytes, source })?;
        Ok(Arc::new(Self {
            ranges: ranges.into(),
            mappings,
            dirty: DirtyPages::new(ranges),
            page_map: Default::default(),
            backing,
        }))
    }

    /// A view of this RAM for one device function (or for the monitor itself, when it loads a kernel).
    pub fn view(self: &Arc<Self>) -> Result<View, MemoryError> {
        let records = Arc::new(Records::new(Arc::clone(&self.ranges)));
        let mut views = Vec::with_capacity(self.mappings.len());
        let regions = self.mappings.iter().zip(self.dirty.bitmaps());
        for (region, (range, (mapping, dirty))) in self.ranges.iter().zip(regions).enumerate() {
            let bitmap = ViewBitmap {
                vm: Arc::clone(dirty),
                records: Arc::clone(&records),
                region,
            };
            // SAFETY: `mapping` is a live mapping of exactly `range.len` bytes. `View` keeps this `GuestRam`, the
            // owner of the mapping, alive for as long as any view of it exists, and never gives out the inner
            // memory by value.
            let builder = unsafe {
                MmapRegionBuilder::new_with_bitmap(range.len, bitmap)
                    .with_raw_mmap_pointer(mapping.as_ptr())
            };
            let region = builder
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(self.backing.map_flags())
                .build()
                .map_err(|e| MemoryError::Map(e.to_string()))?;
            views.push(
                GuestRegionMmap::new(region, range.start).ok_or(MemoryError::BadRange(*range))?,
            );
        }
        let memory =
            GuestMemoryMmap::from_regions(views).map_err(|e| MemoryError::Map(e.to_string()))?;
        Ok(View {
            memory,
            records,
            ram: Arc::clone(self),
        })
    }

    /// The ranges this RAM was made of, ascending.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The address in this process at which each range is mapped, for registering it with a hypervisor.
    ///
    /// Valid as long as the `GuestRam` lives.
    pub fn host_addresses(&self) -> impl Iterator<Item = (RamRange, *mut u8)> + '_ {
        self.ranges
            .iter()
            .zip(&self.mappings)
            .map(|(range, mapping)| (*range, mapping.as_ptr()))
    }

    /// The memfd the RAM is in, if it is in one: with it another process maps the same bytes.
    pub fn memfd(&self) -> Option<BorrowedFd<'_>> {
        match &self.backing {
            Backing::Memfd(fd) => Some(fd.as_fd()),
            Backing::Anonymous | Backing::File { .. } => None,
        }
    }

    /// The next piece of range number `index`, from byte `from` of it on, in which anything but zeroes may be. It may end
    /// before that ends: ask again.
    ///
    /// Whoever looks for contents should look there only: to read a page of a memfd that has none yet makes one, and to
    /// read a hole of a file fills the page cache with zeroes.
    pub fn occupied(&self, index: usize, from: usize) -> Option<Range<usize>> {
        let len = self.ranges.get(index)?.len;
        let start = self.mappings.get(index)?.as_ptr();
        if from >= len {
            return None;
        }
        match &self.backing {
            Backing::Memfd(fd) => {
                let offset = self.ranges.iter().take(index).map(|r| r.len as u64).sum();
                occupied::data(fd, offset, from, len)
            }
            Backing::Anonymous => self.page_map.own(start, from, len),
            Backing::File { file, offsets } => {
                let data = occupied::data(file, *offsets.get(index)?, from, len);
                // What the guest wrote where the file has nothing.
                let hole = data.as_ref().map_or(len, |data| data.start);
                self.page_map.own(start, from, hole).or(data)
            }
        }
    }

    /// How many bytes of `piece` of range number `index` are [occupied](Self::occupied).
    pub fn occupied_bytes(&self, index: usize, piece: Range<usize>) -> usize {
        let mut bytes = 0;
        let mut at = piece.start;
        while let Some(next) = self.occupied(index, at)
            && next.start < piece.end
        {
            at = next.end.min(piece.end);
            bytes += at - next.start;
            if at == piece.end {
                break;
            }
        }
        bytes
    }

    /// Makes large pages of the small ones in `start..start + len`, and returns how many large pages there are then.
    ///
    /// For a memfd this is the only way to get them that does not depend on the host's policy. It takes pages that were
    /// touched; the other ones stay as they are, as all do where the kernel cannot (before Linux 6.1) or there is no
    /// memory for it. Each 2 MiB are copied, and the guest waits if it touches them meanwhile.
    pub fn collapse(&self, start: GuestAddress, len: u64) -> usize {
        let end = start.0.saturating_add(len);
        let pieces = self.ranges.iter().zip(&self.mappings);
        pieces
            .map(|(range, mapping)| {
                let within = |at: u64| (at.max(range.start.0) - range.start.0) as usize;
                mapping.collapse(within(start.0), within(end).min(range.len))
            })
            .sum()
    }

    /// Gives `start..start + len` large pages, if it is in a memfd, for somebody who is about to write most of it. Returns
    /// how many bytes have them then.
    ///
    /// Large pages at its ends may reach beyond it. Nothing changes where the kernel cannot (before Linux 6.1) or there is
    /// no memory for it, except that one page may count as occupied.
    pub fn enlarge(&self, start: GuestAddress, len: u64) -> u64 {
        let Backing::Memfd(fd) = &self.backing else {
            return 0;
        };
        let large = LARGE_PAGE as u64;
        let end = start.0.saturating_add(len);
        let mut packed = 0;
        let mut done = 0;
        for range in self.ranges.iter() {
            let within = |at: u64| at.clamp(range.start.0, range.start.0 + range.len as u64);
            let (from, to) = (within(start.0), within(end));
            let first = (from - range.start.0) / large;
            let last = match from < to {
                // The last one may be cut off by the end of the range.
                true => ((to - range.start.0).div_ceil(large)).min(range.len as u64 / large),
                false => first,
            };
            for page in first..last {
                let at = page * large;
                // The kernel takes large pages in place of small ones only: there has to be one.
                let is_empty =
                    occupied::data(fd, packed, at as usize, (at + large) as usize).is_none();
                if is_empty
                    && fallocate(fd, FallocateFlags::empty(), packed + at, PAGE_SIZE as u64)
                        .is_err()
                {
                    return done;
                }
                let address = GuestAddress(range.start.0 + at);
                if self.collapse(address, large) == 0 {
                    return done;
                }
                done += large;
            }
            packed += range.len as u64;
        }
        done
    }

    /// Reads in what has to come from the file behind the RAM, so that the guest does not wait for it later.
    /// `progress` is told the bytes done.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or that ends too early.
    pub fn prefault(&self, mut progress: impl FnMut(u64)) -> io::Result<()> {
        const STEP: usize = 16 << 20;
        let mut done = 0;
        for (range, mapping) in self.ranges.iter().zip(&self.mappings) {
            for from in (0..range.len).step_by(STEP) {
                let to = range.len.min(from + STEP);
                mapping.populate(from, to)?;
                done += (to - from) as u64;
                progress(done);
            }
        }
        Ok(())
    }

    /// The pages written through views, VM-wide.
    pub fn dirty_pages(&self) -> &DirtyPages {
        &self.dirty
    }

    /// Total bytes of RAM.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|r| r.len as u64).sum()
    }

    /// True for a VM without RAM, which only tests make.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

/// What a write through a [`View`] marks: the page in the VM-wide bitmap, and in the view's [`Records`].
#[derive(Debug)]
pub struct ViewBitmap {
    vm: Arc<AtomicBitmap>,
    records: Arc<Records>,
    /// Which RAM range offsets are relative to.
    region: usize,
}

impl<'a> WithBitmapSlice<'a> for ViewBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for ViewBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // In this order: see `Records::mark`.
        self.vm.mark_dirty(offset, len);
        self.records.mark(self.region, offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.vm.dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

/// Guest RAM as one device function sees it. Cheap to clone; clones mark the same bitmap and share
/// their [`Records`].
///
/// Dereferences to the [`GuestMemoryMmap`] that the rust-vmm crates take.
#[derive(Clone, Debug)]
pub struct View {
    memory: GuestMemoryMmap<ViewBitmap>,
    records: Arc<Records>,
    /// Owns the mapping `memory` points into; declared after it, so dropped after it.
    ram: Arc<GuestRam>,
}

impl View {
    /// The RAM this is a view of.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the function wrote through this view and its clones, for those who asked.
    pub fn records(&self) -> &Arc<Records> {
        &self.records
    }

    /// `start..start + len`, for a device that reads it.
    pub(crate) fn lend_to_read(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Result<GuestRead<'_>, GuestMemoryError>> {
        GuestMemoryBackend::get_slices(&self.memory, start, len)
            .map(|slice| slice.map(GuestRead::new))
    }

    /// `start..start + len`, for a device that writes it.
    pub(crate) fn lend_to_write(
        &self,
        start: GuestAddress,
        len: usize,
    ) -> impl Iterator<Item = Result<GuestWrite<'_>, GuestMemoryError>> {
        GuestMemoryBackend::get_slices(&self.memory, start, len)
            .map(|slice| slice.map(GuestWrite::new))
    }

    /// True if every byte of `start..start + len` is RAM. `len` 0 asks about nothing and is true.
    #[inline]
    pub fn contains(&self, start: GuestAddress, len: usize) -> bool {
        len == 0
            || self.slice(start, len).is_some()
            || GuestMemoryBackend::check_range(&self.memory, start, len)
    }

    // What follows is what the memory itself offers, and shorter: rings are read and written a few bytes at a time, and all
    // of these are in one range of RAM, so that nothing has to be put together from several.

    /// `start..start + len`, if that is in one range of RAM.
    #[inline]
    fn slice(&self, start: GuestAddress, len: usize) -> Option<GuestSlice<'_>> {
        let (region, at) = self.memory.to_region_addr(start)?;
        region.get_slice(at, len).ok()
    }

    /// Reads a plain value.
    #[inline]
    pub fn read_obj<T: ByteValued>(&self, at: GuestAddress) -> Result<T, GuestMemoryError> {
        let slice = self.slice(at, size_of::<T>());
        match slice.as_ref().map(|slice| slice.get_ref(0)) {
            Some(Ok(value)) => Ok(value.load()),
            _ => self.memory.read_obj(at),
        }
    }

    /// Writes a plain value.
    #[inline]
    pub fn write_obj<T: ByteValued>(
        &self,
        value: T,
        at: GuestAddress,
    ) -> Result<(), GuestMemoryError> {
        let slice = self.slice(at, size_of::<T>());
        match slice.as_ref().map(|slice| slice.get_ref(0)) {
            Some(Ok(place)) => {
                place.store(value);
                Ok(())
            }
            _ => self.memory.write_obj(value, at),
        }
    }

    /// Reads an integer at once.
    #[inline]
    pub fn load<T: AtomicAccess>(
        &self,
        at: GuestAddress,
        order: Ordering,
    ) -> Result<T, GuestMemoryError> {
        match self.slice(at, size_of::<T>()) {
            Some(slice) => Ok(slice.load(0, order)?),
            None => self.memory.load(at, order),
        }
    }

    /// Writes an integer at once.
    #[inline]
    pub fn store<T: AtomicAccess>(
        &self,
        value: T,
        at: GuestAddress,
        order: Ordering,
    ) -> Result<(), GuestMemoryError> {
        match self.slice(at, size_of::<T>()) {
            Some(slice) => Ok(slice.store(value, 0, order)?),
            None => self.memory.store(value, at, order),
        }
    }

    /// The highest guest address that is RAM.
    pub fn last_address(&self) -> GuestAddress {
        self.memory
            .iter()
            .map(|region| region.last_addr())
            .max()
            .unwrap_or_default()
    }
}

impl Deref for View {
    type Target = GuestMemoryMmap<ViewBitmap>;

    fn deref(&self) -> &Self::Target {
        &self.memory
    }
}

#[cfg(test)]
mod tests;
