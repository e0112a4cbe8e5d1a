//! Guest RAM, and the views through which devices reach it.
//!
//! [`GuestRam`] owns the RAM of one VM: anonymous memory, which hosts back with large pages unless told not to. (A
//! memfd gets them only where the administrator allowed it, and a guest in small pages pays for each with an exit.)
//! A device never touches it directly. Each device function has a [`View`] of its own on the same bytes, which marks
//! the VM-wide [`DirtyPages`] on every write. KVM's dirty log sees what vCPUs write; this bitmap sees what the monitor
//! and its devices write; a migration sends the union of the two. A view also keeps the [`records`] of what its own
//! function wrote, while somebody asks for them.

#![allow(unsafe_code)]

mod mapping;
pub mod records;

pub use records::Records;

use std::num::NonZeroUsize;
use std::ops::Deref;
use std::sync::Arc;

use mapping::Mapping;
use vm_memory::bitmap::{AtomicBitmap, Bitmap, RefSlice, WithBitmapSlice};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    VolatileSlice, mmap::MmapRegionBuilder,
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
        source: std::io::Error,
    },
    /// A range is empty, not page-aligned, or wraps around.
    #[error("guest memory range {0:?} is empty, not page-aligned, or too long")]
    BadRange(RamRange),
    /// A mapping failed, or ranges overlap.
    #[error("cannot map guest memory: {0}")]
    Map(String),
}

/// The pages of one VM that its monitor or devices wrote, one bit each. Cheap to clone: all clones are one bitmap.
#[derive(Clone, Debug)]
pub struct DirtyPages {
    regions: Arc<Vec<(RamRange, Arc<AtomicBitmap>)>>,
}

impl DirtyPages {
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
}

/// The RAM of one VM. See the [module documentation](self).
#[derive(Debug)]
pub struct GuestRam {
    ranges: Arc<[RamRange]>,
    mappings: Vec<Mapping>,
    dirty: DirtyPages,
}

impl GuestRam {
    /// Creates zeroed RAM for `ranges`, which must be in ascending order and disjoint.
    ///
    /// The host gives pages only as they are touched, and may refuse them then: what is asked for here is address
    /// space.
    pub fn new(ranges: &[RamRange]) -> Result<Arc<Self>, MemoryError> {
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
        let mut mappings = Vec::with_capacity(ranges.len());
        let mut dirty = Vec::with_capacity(ranges.len());
        for range in ranges {
            let mapping = Mapping::new(range.len)
                .map_err(|source| MemoryError::Allocate { bytes, source })?;
            mappings.push(mapping);
            dirty.push((*range, Arc::new(AtomicBitmap::new(range.len, PAGE))));
        }
        Ok(Arc::new(Self {
            ranges: ranges.into(),
            mappings,
            dirty: DirtyPages {
                regions: Arc::new(dirty),
            },
        }))
    }

    /// A view of this RAM for one device function (or for the monitor itself, when it loads a kernel).
    pub fn view(self: &Arc<Self>) -> Result<View, MemoryError> {
        let records = Arc::new(Records::new(Arc::clone(&self.ranges)));
        let mut views = Vec::with_capacity(self.mappings.len());
        let regions = self.mappings.iter().zip(self.dirty.regions.iter());
        for (region, (mapping, (range, dirty))) in regions.enumerate() {
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
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
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

/// [`PAGE_SIZE`] in the type the bitmap wants.
const PAGE: NonZeroUsize = match NonZeroUsize::new(PAGE_SIZE) {
    Some(page) => page,
    None => unreachable!(),
};

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

/// Contiguous guest memory as a [`View`] lends it, for scatter-gather I/O.
///
/// Writing through its raw pointer bypasses the dirty bitmap: afterwards, mark what was written with
/// `slice.bitmap().mark_dirty(0, n)`.
pub type GuestSlice<'v> = VolatileSlice<'v, RefSlice<'v, ViewBitmap>>;

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

    /// True if every byte of `start..start + len` is RAM. `len` 0 asks about nothing and is true.
    pub fn contains(&self, start: GuestAddress, len: usize) -> bool {
        len == 0 || GuestMemoryBackend::check_range(&self.memory, start, len)
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
mod tests {
    use super::*;
    use vm_memory::Bytes;

    fn two_ranges() -> Arc<GuestRam> {
        GuestRam::new(&[
            RamRange {
                start: GuestAddress(0),
                len: 4 * PAGE_SIZE,
            },
            RamRange {
                start: GuestAddress(0x1_0000_0000),
                len: 2 * PAGE_SIZE,
            },
        ])
        .unwrap()
    }

    #[test]
    fn all_views_see_the_same_bytes() {
        let ram = two_ranges();
        let (a, b) = (ram.view().unwrap(), ram.view().unwrap());
        a.write_obj(0x1122_3344u32, GuestAddress(0x1_0000_0ffc))
            .unwrap();
        assert_eq!(
            b.read_obj::<u32>(GuestAddress(0x1_0000_0ffc)).unwrap(),
            0x1122_3344
        );
    }

    #[test]
    fn a_write_marks_its_pages_and_no_other() {
        let ram = two_ranges();
        let view = ram.view().unwrap();
        view.write_slice(&[1; 2], GuestAddress(PAGE_SIZE as u64 * 2 - 1))
            .unwrap();
        view.write_slice(&[1], GuestAddress(0x1_0000_1000)).unwrap();
        let dirty: Vec<_> = [0, 0x1000, 0x2000, 0x3000, 0x1_0000_0000, 0x1_0000_1000]
            .map(|a| ram.dirty_pages().is_dirty(GuestAddress(a)))
            .into();
        assert_eq!(dirty, [false, true, true, false, false, true]);
    }

    #[test]
    fn a_read_marks_nothing() {
        let ram = two_ranges();
        let view = ram.view().unwrap();
        let mut bytes = [0; 64];
        view.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert!(!ram.dirty_pages().is_dirty(GuestAddress(0)));
    }

    #[test]
    fn a_view_outlives_the_last_other_handle_of_its_ram() {
        let view = two_ranges().view().unwrap();
        view.write_obj(7u8, GuestAddress(5)).unwrap();
        assert_eq!(view.read_obj::<u8>(GuestAddress(5)).unwrap(), 7);
    }

    #[test]
    fn ranges_that_are_empty_unaligned_or_wrap_are_refused() {
        for (start, len) in [
            (0, 0),
            (1, PAGE_SIZE),
            (0, 100),
            (u64::MAX - 4095, PAGE_SIZE),
        ] {
            let range = RamRange {
                start: GuestAddress(start),
                len,
            };
            assert!(
                matches!(GuestRam::new(&[range]), Err(MemoryError::BadRange(_))),
                "{range:?}"
            );
        }
    }

    #[test]
    fn contains_knows_the_gap() {
        let view = two_ranges().view().unwrap();
        assert!(view.contains(GuestAddress(0), 4 * PAGE_SIZE));
        assert!(!view.contains(GuestAddress(0), 4 * PAGE_SIZE + 1));
        assert!(!view.contains(GuestAddress(u64::MAX), 2));
        assert_eq!(view.last_address(), GuestAddress(0x1_0000_1fff));
    }
}
