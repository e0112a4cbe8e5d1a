//! Address-mapped regions: one trait for everything a guest can read or write.
//!
//! A [`Bus`] maps disjoint address ranges to devices. A look-up takes a snapshot of the map and calls the device
//! with no lock held, so vCPUs never wait for each other here; only changing the map takes a lock.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;

/// What a write changed beyond the device that received it. The caller of [`Bus::write`] applies it.
///
/// Effects travel down the call stack as data, so that a device never calls up into the machine it is part of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "a layout change that is not applied leaves doorbells at addresses the guest no longer uses"]
pub enum Effect {
    /// Nothing outside the device changed.
    #[default]
    None,
    /// The set of doorbells (address, queue event) may differ from before: the machine compares and re-registers.
    LayoutChanged,
}

impl Effect {
    /// The stronger of two effects.
    pub fn and(self, other: Self) -> Self {
        if self == Self::LayoutChanged {
            self
        } else {
            other
        }
    }
}

/// A device that answers to a range of addresses.
///
/// Called from any vCPU thread, several at a time; implementations lock what they must and never block on the
/// guest. `data` is 1 to 8 bytes for MMIO and 1, 2 or 4 for port I/O, in guest (little-endian) order. Offsets are
/// relative to the start of the range the device was mapped at, and `offset + data.len()` may pass its end when a
/// guest straddles it: implementations must answer such an access, never panic.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`. Every byte must be written.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Effect;
}

#[derive(Clone)]
struct Mapping {
    range: Range<u64>,
    device: Arc<dyn BusDevice>,
}

/// Why a range could not be mapped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range holds no address.
    #[error("range {0:#x?} is empty")]
    Empty(Range<u64>),
    /// Another device has part of the range.
    #[error("range {new:#x?} overlaps {existing:#x?}")]
    Overlap {
        /// The range that was asked for.
        new: Range<u64>,
        /// The range already mapped.
        existing: Range<u64>,
    },
}

/// Disjoint address ranges and their devices. See the [module documentation](self).
#[derive(Default)]
pub struct Bus {
    /// Sorted by start. Replaced as a whole on every change; readers keep the snapshot they took.
    map: ArcSwap<Vec<Mapping>>,
    /// Serialises changes.
    change: Mutex<()>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `device` at `range`.
    pub fn insert(&self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        if range.is_empty() {
            return Err(BusError::Empty(range));
        }
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = Vec::clone(&self.map.load());
        let at = map.partition_point(|m| m.range.start < range.start);
        let neighbours = [at.checked_sub(1), Some(at)];
        if let Some(hit) = neighbours
            .into_iter()
            .flatten()
            .filter_map(|i| map.get(i))
            .find(|m| m.range.start < range.end && range.start < m.range.end)
        {
            return Err(BusError::Overlap {
                new: range,
                existing: hit.range.clone(),
            });
        }
        map.insert(at, Mapping { range, device });
        self.map.store(Arc::new(map));
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`. Addresses no device answers read as all ones, as on real hardware.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.resolve(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` at `address`. Writes to addresses no device answers are dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> Effect {
        match self.resolve(address) {
            Some((device, offset)) => device.write(offset, data),
            None => Effect::None,
        }
    }

    fn resolve(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64)> {
        let map = self.map.load();
        let at = map.partition_point(|m| m.range.start <= address);
        let hit = map.get(at.checked_sub(1)?)?;
        hit.range
            .contains(&address)
            .then(|| (Arc::clone(&hit.device), address - hit.range.start))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.map.load().iter().map(|m| &m.range))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers every byte with the low byte of its offset, and remembers the last write.
    #[derive(Default)]
    struct Echo(Mutex<Vec<u8>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = (offset as usize + i) as u8;
            }
        }

        fn write(&self, offset: u64, data: &[u8]) -> Effect {
            let mut seen = self.0.lock().unwrap();
            seen.clear();
            seen.push(offset as u8);
            seen.extend_from_slice(data);
            Effect::LayoutChanged
        }
    }

    #[test]
    fn offsets_are_relative_to_the_range() {
        let bus = Bus::new();
        bus.insert(0x1000..0x1010, Arc::new(Echo::default()))
            .unwrap();
        let mut data = [0; 2];
        bus.read(0x1004, &mut data);
        assert_eq!(data, [4, 5]);
    }

    #[test]
    fn writes_reach_the_device_and_return_its_effect() {
        let bus = Bus::new();
        let echo = Arc::new(Echo::default());
        bus.insert(0x10..0x20, Arc::clone(&echo) as _).unwrap();
        assert_eq!(bus.write(0x12, &[7, 8]), Effect::LayoutChanged);
        assert_eq!(*echo.0.lock().unwrap(), [2, 7, 8]);
    }

    #[test]
    fn addresses_without_a_device_read_as_ones_and_swallow_writes() {
        let bus = Bus::new();
        bus.insert(0x10..0x20, Arc::new(Echo::default())).unwrap();
        for address in [0, 0xf, 0x20, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            assert_eq!(data, [0xff; 4], "{address:#x}");
            assert_eq!(bus.write(address, &[1]), Effect::None);
        }
    }

    #[test]
    fn overlapping_and_empty_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x10..0x20, Arc::new(Echo::default())).unwrap();
        for range in [0x0..0x11, 0x1f..0x30, 0x10..0x20, 0x12..0x14, 0x0..0x40] {
            assert!(
                matches!(
                    bus.insert(range.clone(), Arc::new(Echo::default())),
                    Err(BusError::Overlap { .. })
                ),
                "{range:#x?}"
            );
        }
        assert!(matches!(
            bus.insert(5..5, Arc::new(Echo::default())),
            Err(BusError::Empty(_))
        ));
        bus.insert(0x20..0x21, Arc::new(Echo::default())).unwrap();
        bus.insert(0xf..0x10, Arc::new(Echo::default())).unwrap();
    }
}
