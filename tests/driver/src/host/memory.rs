//! Guest memory of the machine in this process, as its driver shares it with devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::memory::{GuestRam, MemoryError, RamRange, View};
use vm_memory::{Bytes, GuestAddress};

use crate::access::Dma;

/// Memory handed out from the start of a range on, never given back.
#[derive(Clone, Debug)]
pub struct HostDma {
    view: View,
    next: Arc<AtomicU64>,
    end: u64,
}

impl HostDma {
    /// RAM of `len` bytes at `start` (multiples of 4096), and its allocator. The first page is never handed out.
    pub fn new(start: u64, len: usize) -> Result<Self, MemoryError> {
        let range = RamRange {
            start: GuestAddress(start),
            len,
        };
        Self::over(GuestRam::new(&[range])?.view()?, start, len)
    }

    /// An allocator over `start..start + len` of the RAM behind `view`.
    pub fn over(view: View, start: u64, len: usize) -> Result<Self, MemoryError> {
        Ok(Self {
            view,
            next: Arc::new(AtomicU64::new(start + 4096)),
            end: start + len as u64,
        })
    }

    /// The RAM.
    pub fn ram(&self) -> &Arc<GuestRam> {
        self.view.ram()
    }

    /// The view the driver uses. Its writes mark the dirty bitmap, unlike those of a vCPU.
    pub fn view(&self) -> &View {
        &self.view
    }
}

impl Dma for HostDma {
    fn allocate(&self, len: usize, align: usize) -> Option<u64> {
        let (len, align) = (len as u64, align as u64);
        let take = |next: u64| {
            let start = next.checked_next_multiple_of(align)?;
            start.checked_add(len).filter(|end| *end <= self.end)
        };
        let next = self
            .next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .ok()?;
        let start = next.checked_next_multiple_of(align)?;
        self.write(start, &vec![0; len as usize]);
        Some(start)
    }

    fn read(&self, address: u64, data: &mut [u8]) {
        if self.view.read_slice(data, GuestAddress(address)).is_err() {
            data.fill(0xff);
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        // Lost, as the trait says, where there is no memory.
        let _ = self.view.write_slice(data, GuestAddress(address));
    }

    fn load(&self, address: u64) -> u16 {
        self.view
            .load(GuestAddress(address), Ordering::Acquire)
            .map_or(0xffff, u16::from_le)
    }

    fn store(&self, address: u64, value: u16) {
        let _ = self
            .view
            .store(value.to_le(), GuestAddress(address), Ordering::Release);
    }
}
