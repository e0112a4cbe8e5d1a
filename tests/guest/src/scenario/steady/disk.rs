//! Disks: blocks that are read back before they are written again, several requests at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use rustix::fs::OFlags;

use super::super::block::Disk;
use super::{Load, Turns};
use crate::pattern::{self, Buffer, PAGE};
use crate::{Context, Failure, Result, check};

/// Threads per disk, each with a request under way most of the time.
const IN_FLIGHT: u64 = 4;
/// Bytes per block.
const BLOCK: u64 = 2 * PAGE as u64;
/// Bytes of the disk that are used, if it has so many.
const SPAN: u64 = 4 << 20;
/// Turns from one flush to the next.
const FLUSH: u64 = 16;
const REST: Duration = Duration::from_millis(1);
/// Of the order in which blocks are used.
const ORDER: u64 = 0xd15c_0bde;

/// Several threads that write to the disk, or read it if nobody may write to it.
pub fn start(load: &mut Load, name: &str) -> Result<()> {
    let disk = Disk::new(name);
    let writable = disk.is_writable()?;
    let slots = disk.bytes()?.min(SPAN) / BLOCK / IN_FLIGHT;
    check(slots > 0, || format!("{name} is too small"))?;
    for thread in 0..IN_FLIGHT {
        let device = disk.open(OFlags::DIRECT)?;
        let place = format!("of {name}, {thread}");
        let strip = Strip {
            device,
            first: thread * slots,
            slots,
        };
        if writable {
            load.start("blocks", place, None, move |turns| write(turns, &strip));
        } else {
            load.start("reads", place, None, move |turns| read(turns, &strip));
        }
    }
    Ok(())
}

/// A part of a disk that one thread uses.
struct Strip {
    device: File,
    /// Its first block.
    first: u64,
    slots: u64,
}

impl Strip {
    fn slot(&self, step: u64) -> u64 {
        self.first + pattern::word(ORDER ^ self.first, step) % self.slots
    }

    fn read(&self, slot: u64, buffer: &mut Buffer) -> Result<()> {
        let read = self.device.read_exact_at(buffer.bytes_mut(), slot * BLOCK);
        read.context(format_args!("reading block {slot}"))
    }

    /// Reads a block and compares it with what was written to it last.
    fn verify(&self, slot: u64, generation: u64, buffer: &mut Buffer) -> Result<()> {
        self.read(slot, buffer)?;
        let found = buffer.bytes();
        let mut expected = Buffer::of_pages(found.len() / PAGE);
        pattern::fill(expected.bytes_mut(), seed(slot, generation), 0);
        if found == expected.bytes() {
            return Ok(());
        }
        let mut pairs = found.iter().zip(expected.bytes());
        let at = pairs.position(|(a, b)| a != b).unwrap_or_default();
        pattern::fill(expected.bytes_mut(), seed(slot, generation - 1), 0);
        let stale = if found == expected.bytes() {
            ": that is the one before"
        } else {
            ""
        };
        Err(Failure(format!(
            "block {slot} is not generation {generation} from byte {at} on{stale}"
        )))
    }
}

fn seed(slot: u64, generation: u64) -> u64 {
    slot << 32 ^ generation
}

fn write(turns: &Turns, strip: &Strip) -> Result<()> {
    let mut buffer = Buffer::of_pages(BLOCK as usize / PAGE);
    let mut generations = BTreeMap::<u64, u64>::new();
    let mut step = 0;
    while turns.goes_on() {
        let slot = strip.slot(step);
        let generation = generations.entry(slot).or_default();
        if *generation > 0 {
            strip.verify(slot, *generation, &mut buffer)?;
        }
        pattern::fill(buffer.bytes_mut(), seed(slot, *generation + 1), 0);
        let written = strip.device.write_all_at(buffer.bytes(), slot * BLOCK);
        written.context(format_args!("writing block {slot}"))?;
        *generation += 1;
        step += 1;
        if step.is_multiple_of(FLUSH) {
            strip.device.sync_data().context("flush")?;
        }
        turns.add(1);
        thread::sleep(REST);
    }
    let mut all = generations.into_iter();
    all.try_for_each(|(slot, generation)| strip.verify(slot, generation, &mut buffer))
}

/// What a block holds when it is read first it holds for ever.
fn read(turns: &Turns, strip: &Strip) -> Result<()> {
    let mut buffer = Buffer::of_pages(BLOCK as usize / PAGE);
    let mut checksums = BTreeMap::new();
    let mut step = 0;
    while turns.goes_on() {
        let slot = strip.slot(step);
        strip.read(slot, &mut buffer)?;
        let found = crc32fast::hash(buffer.bytes());
        let first = *checksums.entry(slot).or_insert(found);
        check(found == first, || {
            format!("block {slot} had crc32={first:08x} and now {found:08x}")
        })?;
        step += 1;
        turns.add(1);
        thread::sleep(REST);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_tell_their_generation() {
        let path = std::env::temp_dir().join(format!("tern-steady-{}", std::process::id()));
        let device = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        device.set_len(SPAN).unwrap();
        let strip = Strip {
            device,
            first: 4,
            slots: 4,
        };
        let mut buffer = Buffer::of_pages(2);
        pattern::fill(buffer.bytes_mut(), seed(5, 2), 0);
        strip
            .device
            .write_all_at(buffer.bytes(), 5 * BLOCK)
            .unwrap();
        strip.verify(5, 2, &mut buffer).unwrap();
        let mut asked = |slot, generation| {
            strip
                .verify(slot, generation, &mut buffer)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            asked(5, 3),
            "block 5 is not generation 3 from byte 0 on: that is the one before"
        );
        assert_eq!(asked(5, 1), "block 5 is not generation 1 from byte 0 on");
        assert_eq!(asked(4, 2), "block 4 is not generation 2 from byte 0 on");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn threads_have_blocks_of_their_own() {
        let strip = |first| Strip {
            device: File::open("/dev/null").unwrap(),
            first,
            slots: 128,
        };
        for step in 0..1000 {
            assert!((0..128).contains(&strip(0).slot(step)));
            assert!((128..256).contains(&strip(128).slot(step)));
        }
    }
}
