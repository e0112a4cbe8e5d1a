//! Where the structures of a virtio function lie in its one BAR.
//!
//! | offset | structure | length |
//! |---|---|---|
//! | `0x0000` | common configuration | 64 |
//! | `0x0080` | ISR status | 1 |
//! | `0x00c0` | device state, of a device that offers it | 8 |
//! | `0x0100` | device configuration | what the device has, up to 3840 |
//! | `0x1000` | notifications: 4 bytes per queue | 4 × queues |
//! | next page | MSI-X table | 16 × vectors |
//! | next page | MSI-X pending bits | 8 per 64 vectors |
//! | next page | doorbells of managed devices, of a device that has these | a page per device |
//!
//! Each of the last four has pages of its own. The BAR is the next power of two, at least 16 KiB, which is enough
//! for 1024 queues and 256 vectors. Bytes of no structure read 0 and ignore writes.

use std::ops::Range;

use crate::msix::VectorCount;

/// Bytes between the notification registers of neighbouring queues (`notify_off_multiplier`).
pub const NOTIFY_MULTIPLIER: u32 = 4;
/// Length of the common configuration (D2).
pub const COMMON_LEN: u64 = 64;
/// Bytes the device configuration can have.
pub const MAX_DEVICE_LEN: u64 = NOTIFY - DEVICE;

const ISR: u64 = 0x80;
const STATE: u64 = 0xc0;
const DEVICE: u64 = 0x100;
const NOTIFY: u64 = 0x1000;
const PAGE: u64 = 0x1000;
const MIN_SIZE: u64 = 0x4000;

/// A structure in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Common configuration.
    Common,
    /// ISR status.
    Isr,
    /// Device state (S0).
    State,
    /// Device configuration.
    Device,
    /// Notifications.
    Notify,
    /// MSI-X table.
    MsixTable,
    /// MSI-X pending bits.
    MsixPba,
    /// Doorbells of managed devices (S4-38).
    Doorbells,
}

/// The structures of one function. See the [module documentation](self).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    regions: [(Region, Range<u64>); 8],
    size: u64,
}

impl Layout {
    /// The layout for this many queues, vectors and bytes of device configuration (at most [`MAX_DEVICE_LEN`]), and of the
    /// device-state structure and doorbells of managed devices, which not every function has.
    pub fn new(
        queues: u16,
        vectors: VectorCount,
        device_len: u64,
        state_len: u64,
        doorbells_len: u64,
    ) -> Self {
        let notify = NOTIFY..NOTIFY + u64::from(queues) * u64::from(NOTIFY_MULTIPLIER);
        let table = notify.end.next_multiple_of(PAGE).max(NOTIFY + PAGE);
        let table = table..table + vectors.table_len();
        let pba = table.end.next_multiple_of(PAGE);
        let pba = pba..pba + vectors.pba_len();
        let doorbells = pba.end.next_multiple_of(PAGE);
        let doorbells = doorbells..doorbells + doorbells_len;
        let end = if doorbells.is_empty() {
            pba.end
        } else {
            doorbells.end
        };
        Self {
            size: end.next_power_of_two().max(MIN_SIZE),
            regions: [
                (Region::Common, 0..COMMON_LEN),
                (Region::Isr, ISR..ISR + 1),
                (Region::State, STATE..STATE + state_len),
                (
                    Region::Device,
                    DEVICE..DEVICE + device_len.min(MAX_DEVICE_LEN),
                ),
                (Region::Notify, notify),
                (Region::MsixTable, table),
                (Region::MsixPba, pba),
                (Region::Doorbells, doorbells),
            ],
        }
    }

    /// Bytes of the BAR.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where `region` is in the BAR.
    pub fn range(&self, region: Region) -> Range<u64> {
        self.regions
            .iter()
            .find(|(r, _)| *r == region)
            .map_or(0..0, |(_, range)| range.clone())
    }

    /// The structure that has byte `offset` of the BAR, and the offset in it.
    pub fn locate(&self, offset: u64) -> Option<(Region, u64)> {
        self.regions
            .iter()
            .find(|(_, range)| range.contains(&offset))
            .map(|(region, range)| (*region, offset - range.start))
    }

    /// Byte offset in the BAR of the notification register of `queue`.
    pub fn notify_offset(queue: u16) -> u64 {
        NOTIFY + u64::from(queue) * u64::from(NOTIFY_MULTIPLIER)
    }

    /// The queue whose notification register is at `offset` of the notification structure.
    pub fn notified_queue(offset: u64) -> Option<u16> {
        let multiplier = u64::from(NOTIFY_MULTIPLIER);
        let aligned = offset.is_multiple_of(multiplier);
        u16::try_from(offset / multiplier).ok().filter(|_| aligned)
    }
}

#[cfg(test)]
mod tests {
    use super::super::device_state;
    use super::*;

    fn layout(queues: u16, vectors: u16) -> Layout {
        Layout::new(queues, VectorCount::new(vectors).unwrap(), 60, 0, 0)
    }

    #[test]
    fn a_common_function_fits_into_16_kib() {
        for (queues, vectors) in [(1, 1), (3, 4), (1024, 256)] {
            let layout = layout(queues, vectors);
            assert_eq!(layout.size(), 0x4000);
            assert_eq!(layout.range(Region::MsixTable).start, 0x2000);
            assert_eq!(layout.range(Region::MsixPba).start, 0x3000);
        }
    }

    #[test]
    fn larger_functions_get_larger_bars_and_nothing_overlaps() {
        for (queues, vectors) in [(1025, 1), (1, 257), (65535, 2048), (0, 1)] {
            let layout = layout(queues, vectors);
            assert!(layout.size().is_power_of_two());
            for pair in layout.regions.windows(2) {
                assert!(pair[0].1.end <= pair[1].1.start, "{pair:x?}");
            }
            assert!(layout.range(Region::MsixPba).end <= layout.size());
        }
    }

    #[test]
    fn s0_1_device_state_has_a_place_if_the_device_has_it() {
        let vectors = VectorCount::new(1).unwrap();
        let with = Layout::new(1, vectors, 60, device_state::LEN, 0);
        assert_eq!(with.range(Region::State), 0xc0..0xc8);
        let packed = Layout::new(1, vectors, 60, device_state::PACKED_LEN, 0);
        assert_eq!(packed.range(Region::State), 0xc0..0xd0);
        assert_eq!(with.locate(0xc4), Some((Region::State, 4)));
        assert_eq!(layout(1, 1).locate(0xc4), None);
    }

    #[test]
    fn s4_38_managed_devices_have_a_page_each() {
        let vectors = VectorCount::new(4).unwrap();
        let layout = Layout::new(3, vectors, 60, 0, 255 * 0x1000);
        let pages = layout.range(Region::Doorbells);
        assert_eq!(pages, 0x4000..0x4000 + 255 * 0x1000);
        assert_eq!(layout.size(), 0x20_0000);
        assert_eq!(layout.locate(0x5002), Some((Region::Doorbells, 0x1002)));
    }

    #[test]
    fn e6_the_notifications_of_an_ordinary_function_fit_into_one_page() {
        let range = layout(1024, 1).range(Region::Notify);
        assert_eq!(range, 0x1000..0x2000);
        assert_eq!(Layout::notify_offset(1023) + 4, range.end);
    }

    #[test]
    fn offsets_resolve_to_structures() {
        let layout = layout(2, 2);
        let cases = [
            (0x00, Some((Region::Common, 0))),
            (0x3f, Some((Region::Common, 63))),
            (0x40, None),
            (0x80, Some((Region::Isr, 0))),
            (0x81, None),
            (0x100 + 59, Some((Region::Device, 59))),
            (0x100 + 60, None),
            (0x1007, Some((Region::Notify, 7))),
            (0x1008, None),
            (0x201f, Some((Region::MsixTable, 31))),
            (0x3007, Some((Region::MsixPba, 7))),
            (0x3008, None),
            (u64::MAX, None),
        ];
        for (offset, expected) in cases {
            assert_eq!(layout.locate(offset), expected, "{offset:#x}");
        }
        let queues = [0, 4, 2, 8, 4 * 65536].map(Layout::notified_queue);
        assert_eq!(queues, [Some(0), Some(1), None, Some(2), None]);
    }
}
