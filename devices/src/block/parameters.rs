//! What a driver sees of a disk that no option asks for.

use super::request::{MAX_SEGMENT_SECTORS, MAX_SEGMENTS};
use crate::parameters::{BadParameter, power_of_two, queue_size, within};

/// Parameters of a disk; see [`parameters`](crate::parameters). The names are those of the device configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Entries of each virtqueue: a power of two, 4 to 1024.
    pub queue_size: u16,
    /// Data buffers of one request: at most those of a chain as long as the queue, less header and status.
    pub seg_max: u32,
    /// log2 of the sectors in a physical block, 0 to 7.
    pub physical_block_exp: u8,
    /// In sectors; 0 for none.
    pub min_io_size: u16,
    /// Sectors of one range of a DISCARD, 1 to 2^21.
    pub max_discard_sectors: u32,
    /// Ranges of one DISCARD, 1 to 32.
    pub max_discard_seg: u32,
    /// In sectors: a power of two, 1 to 2^21.
    pub discard_sector_alignment: u32,
    /// Sectors of one range of a WRITE_ZEROES, 1 to 2^21.
    pub max_write_zeroes_sectors: u32,
    /// Ranges of one WRITE_ZEROES, 1 to 32.
    pub max_write_zeroes_seg: u32,
    /// A WRITE_ZEROES may give space back.
    pub write_zeroes_may_unmap: bool,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            queue_size: 256,
            seg_max: 254,
            // The page cache works in pages of 4096 bytes.
            physical_block_exp: 3,
            min_io_size: 8,
            max_discard_sectors: MAX_SEGMENT_SECTORS,
            max_discard_seg: MAX_SEGMENTS,
            discard_sector_alignment: 8,
            max_write_zeroes_sectors: MAX_SEGMENT_SECTORS,
            max_write_zeroes_seg: MAX_SEGMENTS,
            write_zeroes_may_unmap: true,
        }
    }
}

impl Parameters {
    /// Whether a disk can be built with these.
    pub fn check(&self) -> Result<(), BadParameter> {
        let sectors = 1..=MAX_SEGMENT_SECTORS;
        let ranges = 1..=MAX_SEGMENTS;
        queue_size(self.queue_size, 4)?;
        within("seg_max", self.seg_max, 1..=u32::from(self.queue_size) - 2)?;
        within("physical_block_exp", self.physical_block_exp, 0..=7)?;
        within(
            "max_discard_sectors",
            self.max_discard_sectors,
            sectors.clone(),
        )?;
        within("max_discard_seg", self.max_discard_seg, ranges.clone())?;
        power_of_two(
            "discard_sector_alignment",
            self.discard_sector_alignment,
            sectors.clone(),
        )?;
        within(
            "max_write_zeroes_sectors",
            self.max_write_zeroes_sectors,
            sectors,
        )?;
        within("max_write_zeroes_seg", self.max_write_zeroes_seg, ranges)
    }
}
