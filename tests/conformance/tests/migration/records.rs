//! Records of what a VF writes, against what memory shows.

use std::collections::BTreeSet;

use conformance::SIMPLE;
use conformance::group::Live;
use driver::access::{Dma, DmaExt};
use driver::host::{RAM, VirtualFunction};
use driver::pci::request_flr;
use driver::virtio::migration::{
    CommandError, Commands, Migrate, Range, mode, opcode, read_data, request, start_data,
};
use driver::virtio::{Buffer, feature};

use crate::rig::{
    BAD_FIELD, BAD_STATE, DISK, Guest, Rig, VF, mac, patient, read_request, write_request,
};

const PAGE: u64 = 4096;
/// All of memory.
const ALL: Range = Range {
    address: 0,
    pages: RAM as u64 / PAGE,
};

fn range(address: u64, pages: u64) -> Range {
    Range { address, pages }
}

/// All records of `driver`, taken.
fn take(driver: &mut (impl Migrate + ?Sized)) -> BTreeSet<u64> {
    let pages = driver.read_records(VF, 0, RAM as u64, 4096).unwrap();
    let set: BTreeSet<_> = pages.iter().copied().collect();
    assert_eq!(set.len(), pages.len(), "none is reported twice");
    set
}

/// The pages of `size` bytes in which `a` and `b` differ.
fn difference(a: &[u8], b: &[u8], size: u64) -> BTreeSet<u64> {
    let pages = a.chunks(size as usize).zip(b.chunks(size as usize));
    let differ = (0..).zip(pages).filter(|(_, (a, b))| a != b);
    differ.map(|(page, _)| page * size).collect()
}

/// The pages of `size` bytes that `len` bytes at `address` lie in.
fn pages(address: u64, len: u64, size: u64) -> BTreeSet<u64> {
    let first = address / size;
    let last = (address + len - 1) / size;
    (first..=last).map(|page| page * size).collect()
}

/// The pages the device may write because of its rings.
fn rings(vf: &Live<VirtualFunction>, size: u64) -> BTreeSet<u64> {
    let used = vf.queues.iter().map(driver::virtio::SplitQueue::layout);
    let used = used.map(|l| pages(l.used, 6 + 8 * u64::from(l.size), size));
    used.flatten().collect()
}

/// Requirements: S3-38, S3-37
#[test]
fn s3_38_what_can_be_recorded() {
    let mut rig = Rig::new(1);
    for driver in rig.both() {
        let (sizes, ranges) = driver.record_caps(VF).unwrap();
        assert_ne!(sizes & 1, 0, "4 KiB");
        assert!(ranges >= 1);
        // Every size it names works, with a range of each; none that it does not name does.
        for bit in 0..52 {
            let started = driver.start_records(VF, PAGE << bit, &[range(0, 1)]);
            let named = bit < 32 && sizes & 1 << bit != 0;
            assert_eq!(
                started,
                if named { Ok(()) } else { Err(BAD_FIELD) },
                "{bit}"
            );
            driver.stop_records(VF).unwrap();
        }
        // And as many ranges as it says, all at once or one by one.
        let list: Vec<_> = (0..u64::from(ranges))
            .map(|n| range(n * 2 * PAGE, 1))
            .collect();
        driver.start_records(VF, PAGE, &list).unwrap();
        let more = [range(1 << 40, 1)];
        assert_eq!(driver.start_records(VF, PAGE, &more), Err(BAD_FIELD));
        driver.stop_records(VF).unwrap();
        for one in &list {
            driver.start_records(VF, PAGE, &[*one]).unwrap();
        }
        assert_eq!(driver.start_records(VF, PAGE, &more), Err(BAD_FIELD));
        driver.stop_records(VF).unwrap();
    }
}

/// Requirements: S3-39, S3-40, G3-w, G3-p
#[test]
fn s3_39_records_are_read_between_start_and_stop_and_stop_never_fails() {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    for party in 0..2 {
        let driver = &mut rig.both()[party];
        assert_eq!(driver.read_records(VF, 0, PAGE, 8), Err(BAD_STATE));
        for _ in 0..2 {
            assert_eq!(driver.stop_records(VF), Ok(()));
        }
        driver.start_records(VF, PAGE, &[ALL]).unwrap();
        assert_eq!(
            driver.read_records(2, 0, PAGE, 8),
            Err(BAD_STATE),
            "sibling"
        );
        vf.request(0, b"written", 16);
        let driver = &mut rig.both()[party];
        for _ in 0..2 {
            assert_eq!(driver.stop_records(VF), Ok(()));
            assert_eq!(driver.read_records(VF, 0, PAGE, 8), Err(BAD_STATE));
        }
        // What was not read is gone.
        driver.start_records(VF, PAGE, &[ALL]).unwrap();
        assert_eq!(take(*driver), BTreeSet::new());
        driver.stop_records(VF).unwrap();
    }
}

/// Requirements: S3-42, S3-43, G3-t, G3-y
#[test]
fn s3_42_a_page_is_reported_once_for_each_time_it_was_written_in_between() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    for party in 0..2 {
        rig.both()[party].start_records(VF, PAGE, &[ALL]).unwrap();
        for _ in 0..3 {
            let to = vf.submit(0, b"data", 8);
            rig.settle();
            let expected = &pages(to, 4, PAGE) | &rings(&vf, PAGE);
            let data = read_data(0, RAM as u64);
            let driver = &mut rig.both()[party];
            let answer = driver.ask(opcode::RECORD_READ, VF, &data, 4096).unwrap();
            let found: BTreeSet<_> = (0..answer.output() as usize)
                .map(|at| u64::from_le_bytes(answer.result()[8 * at..][..8].try_into().unwrap()))
                .collect();
            assert_eq!(answer.result().len(), 8 * answer.output() as usize);
            // Both queues were told not to kick or asked to: only what was written is there.
            assert!(found.is_subset(&expected), "{found:x?} {expected:x?}");
            assert!(pages(to, 4, PAGE).is_subset(&found));
            assert_eq!(take(*driver), BTreeSet::new());
            vf.complete(0);
        }
        rig.both()[party].stop_records(VF).unwrap();
    }
}

/// Requirements: S3-42, G3-u
#[test]
fn g3_u_what_does_not_fit_stays_recorded() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    let dma = rig.group.machine.dma().clone();
    for party in 0..2 {
        rig.both()[party].start_records(VF, PAGE, &[ALL]).unwrap();
        let to = dma.allocate(8 * PAGE as usize, PAGE as usize).unwrap();
        let from = dma.place(&[7; 8 * PAGE as usize]).unwrap();
        let len = 8 * PAGE as u32;
        let chain = [Buffer::readable(from, len), Buffer::writable(to, len)];
        vf.queues[0].add(&chain).unwrap();
        assert!(vf.queues[0].publish());
        vf.transport.notify(0);
        assert_eq!(vf.complete(0), Some(len));
        let driver = &mut rig.both()[party];
        // Room for nothing, in several ways, takes nothing.
        for room in [0, 4, 8, 15] {
            let request = request(opcode::RECORD_READ, VF, &read_data(to, 8 * PAGE));
            let answer = driver.send(&request, room).unwrap();
            assert_eq!(answer.bytes, vec![0; room.min(8)], "{room}");
        }
        let mut found = Vec::new();
        for most in [1, 2, 3, 9] {
            found.push(driver.read_records(VF, to, 8 * PAGE, most).unwrap());
        }
        let lens: Vec<_> = found.iter().map(Vec::len).collect();
        assert_eq!(lens, [1, 2, 3, 2]);
        let all: Vec<_> = (0..8).map(|page| to + page * PAGE).collect();
        assert_eq!(found.concat(), all);
        driver.stop_records(VF).unwrap();
    }
}

/// Requirements: S3-43, S3-44, S3-49
#[test]
fn s3_44_only_started_ranges_are_recorded_and_parts_of_them_can_be_read() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    let dma = rig.group.machine.dma().clone();
    let area = dma.allocate(16 * PAGE as usize, PAGE as usize).unwrap();
    let from = dma.place(&[9; 16 * PAGE as usize]).unwrap();
    for party in 0..2 {
        // Pages 2 to 5 and 8 to 9 of the area.
        let ranges = [range(area + 8 * PAGE, 2), range(area + 2 * PAGE, 4)];
        rig.both()[party].start_records(VF, PAGE, &ranges).unwrap();
        let len = 16 * PAGE as u32;
        vf.queues[0]
            .add(&[Buffer::readable(from, len), Buffer::writable(area, len)])
            .unwrap();
        assert!(vf.queues[0].publish());
        vf.transport.notify(0);
        assert_eq!(vf.complete(0), Some(len));
        let driver = &mut rig.both()[party];
        let mut read = |first: u64, pages: u64| {
            driver
                .read_records(VF, area + first * PAGE, pages * PAGE, 64)
                .map(|found| {
                    found
                        .iter()
                        .map(|at| (at - area) / PAGE)
                        .collect::<Vec<_>>()
                })
        };
        // Outside, across an end, across a gap, nothing: refused, and nothing is taken.
        for (first, pages) in [(0, 1), (1, 2), (5, 2), (2, 8), (8, 3), (12, 1), (2, 0)] {
            assert_eq!(read(first, pages), Err(BAD_FIELD), "{first}, {pages}");
        }
        assert_eq!(read(3, 1), Ok(vec![3]));
        assert_eq!(read(2, 4), Ok(vec![2, 4, 5]), "3 is taken");
        assert_eq!(read(8, 2), Ok(vec![8, 9]));
        assert_eq!(read(8, 2), Ok(vec![]));
        for (address, len) in [
            (area + 2 * PAGE + 1, PAGE),
            (area + 2 * PAGE, PAGE - 1),
            (area + 2 * PAGE, 1),
            (area + 2 * PAGE, u64::MAX),
            (!0xfff, 2 * PAGE),
        ] {
            let refused = driver.read_records(VF, address, len, 8);
            assert_eq!(refused, Err(BAD_FIELD), "{address:#x} {len:#x}");
        }
        driver.stop_records(VF).unwrap();
    }
}

/// Requirements: S3-49, G3-v, G3-p, B-8
#[test]
fn g3_v_a_start_that_is_refused_starts_nothing() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    for party in 0..2 {
        for running in [false, true] {
            let driver = &mut rig.both()[party];
            if running {
                driver.start_records(VF, PAGE, &[ALL]).unwrap();
            }
            let high = 1 << 40;
            let good = range(high, 4);
            for (name, size, ranges) in [
                ("overlap", PAGE, vec![good, range(high + 3 * PAGE, 1)]),
                ("twice", PAGE, vec![good, good]),
                ("not aligned", PAGE, vec![good, range(high + 0x10_0800, 1)]),
                ("no page", PAGE, vec![good, range(high + 0x10_0000, 0)]),
                ("wraps", PAGE, vec![good, range(!0xfff, 2)]),
                (
                    "more pages than there can be",
                    PAGE,
                    vec![good, range(0, u64::MAX)],
                ),
                ("no range", PAGE, vec![]),
                ("no size", 0, vec![good]),
                ("an odd size", PAGE + 1, vec![good]),
                ("a small size", 2048, vec![good]),
                ("a size between", 3 * PAGE, vec![good]),
                (
                    "too many",
                    PAGE,
                    (0..129).map(|n| range(high + n * PAGE, 1)).collect(),
                ),
            ] {
                let refused = driver.start_records(VF, size, &ranges);
                assert_eq!(refused, Err(BAD_FIELD), "{name}");
                let read = driver.read_records(VF, high, PAGE, 8);
                let expected = if running { BAD_FIELD } else { BAD_STATE };
                assert_eq!(read, Err(expected), "{name}");
            }
            // A count without its ranges: they are zeroes, which are no pages (B-8).
            let mut data = start_data(PAGE, &[good, range(high + 16 * PAGE, 1)]);
            data.truncate(16 + 16);
            let short = driver.ask(opcode::RECORD_START, VF, &data, 0).map(drop);
            assert_eq!(short, Err(BAD_FIELD));
            let mut huge = start_data(PAGE, &[good]);
            huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
            let huge = driver.ask(opcode::RECORD_START, VF, &huge, 0).map(drop);
            assert_eq!(huge, Err(BAD_FIELD));
            if running {
                // Another page size, or an overlap with what is under record.
                let other = driver.start_records(VF, 2 * PAGE, &[range(high, 1)]);
                assert_eq!(other, Err(BAD_FIELD));
                let overlap = driver.start_records(VF, PAGE, &[good, range(PAGE, 1)]);
                assert_eq!(overlap, Err(BAD_FIELD));
                // More of the same size is fine, and what was recorded is still there.
                let to = vf.submit(0, b"data", 8);
                vf.complete(0);
                let driver = &mut rig.both()[party];
                driver.start_records(VF, PAGE, &[good]).unwrap();
                assert_eq!(driver.read_records(VF, high, PAGE, 8), Ok(vec![]));
                assert!(pages(to, 4, PAGE).is_subset(&take(*driver)));
                driver.stop_records(VF).unwrap();
            }
        }
    }
}

/// Requirements: S3-41, G3-x
#[test]
fn s3_41_records_outlive_resets_and_modes_of_the_vf() {
    let mut rig = Rig::new(1);
    for party in 0..2 {
        for before_reset in [true, false] {
            let mut vf = rig.drive(1);
            rig.both()[party].start_records(VF, PAGE, &[ALL]).unwrap();
            let mut expected = BTreeSet::new();
            if before_reset {
                expected.extend(pages(vf.submit(0, b"before", 8), 6, PAGE));
                vf.complete(0);
            }
            assert!(request_flr(vf.transport.function()));
            rig.settle();
            let mut vf = rig.drive(1);
            vf.transport.reset().unwrap();
            vf = rig.drive(1);
            for mode in [mode::STOP, mode::FREEZE, mode::ACTIVE] {
                rig.both()[party].set_mode(VF, mode).unwrap();
            }
            expected.extend(pages(vf.submit(1, b"after", 8), 5, PAGE));
            vf.complete(1);
            let driver = &mut rig.both()[party];
            let found = take(*driver);
            assert!(expected.is_subset(&found), "{expected:x?} {found:x?}");
            driver.stop_records(VF).unwrap();
        }
    }
}

/// Requirements: G3-x, S3-49
#[test]
fn g3_x_a_reset_of_the_owner_ends_what_its_driver_recorded() {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    for driver in rig.both() {
        for member in [1, 2] {
            driver.start_records(member, PAGE, &[ALL]).unwrap();
        }
    }
    vf.request(0, b"written", 16);
    rig.guest.transport.reset().unwrap();
    rig.guest = Guest::start(&rig.group);
    for member in [1, 2] {
        let read = rig.guest.read_records(member, 0, PAGE, 8);
        assert_eq!(read, Err(BAD_STATE));
    }
    // The guest may start anew, in another page size even; the monitor has lost nothing.
    rig.guest
        .start_records(VF, 2 * PAGE, &[range(0, 4)])
        .unwrap();
    assert!(!take(&mut rig.monitor).is_empty());
    // With the VF, its records go, for everyone.
    rig.group.disable();
    rig.group.enable(2);
    for driver in rig.both() {
        assert_eq!(driver.read_records(VF, 0, PAGE, 8), Err(BAD_STATE));
        driver.start_records(VF, 8 * PAGE, &[range(0, 1)]).unwrap();
    }
}

/// Requirements: S3-41, S3-42
#[test]
fn s3_42_the_records_of_two_drivers_and_of_two_vfs_are_apart() {
    let mut rig = Rig::new(2);
    let (mut vf, mut sibling) = (rig.drive(1), rig.drive(2));
    rig.guest.start_records(1, PAGE, &[ALL]).unwrap();
    rig.guest.start_records(2, PAGE, &[ALL]).unwrap();
    rig.monitor
        .start_records(1, 2 * PAGE, &[range(0, ALL.pages / 2)])
        .unwrap();
    let to = vf.submit(0, b"data", 8);
    vf.complete(0);
    assert!(pages(to, 4, PAGE).is_subset(&take(&mut rig.guest)));
    assert!(pages(to, 4, 2 * PAGE).is_subset(&take(&mut rig.monitor)));
    assert_eq!(rig.guest.read_records(2, 0, RAM as u64, 4096), Ok(vec![]));
    sibling.request(0, b"data", 8);
    assert_eq!(take(&mut rig.guest), BTreeSet::new());
    assert_ne!(rig.guest.read_records(2, 0, RAM as u64, 4096), Ok(vec![]));
    rig.guest.stop_records(1).unwrap();
    vf.request(0, b"data", 8);
    assert!(!take(&mut rig.monitor).is_empty());
    let refused = rig.guest.ask(opcode::RECORD_CAPS, 3, &[], 8).map(drop);
    assert_eq!(refused, Err(CommandError::Refused(22, 5)));
}

/// A deterministic stream of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % limit
    }
}

/// What a round of I/O wrote is what was recorded: `recorded` has every page that differs, and none that the device had no
/// business with.
fn agree(changed: &BTreeSet<u64>, recorded: &BTreeSet<u64>, allowed: &BTreeSet<u64>) {
    assert!(
        changed.is_subset(recorded),
        "missing {:x?}",
        changed - recorded
    );
    assert!(
        recorded.is_subset(allowed),
        "too many {:x?}",
        recorded - allowed
    );
}

/// Requirements: S3-43, S3-42, G3-y
#[test]
fn s3_43_the_records_of_a_disk_agree_with_memory() {
    for (seed, event_index, shift) in [
        (1, 0, 0),
        (2, feature::EVENT_IDX, 0),
        (3, 0, 2),
        (4, feature::EVENT_IDX, 4),
    ] {
        let size = PAGE << shift;
        let (mut rig, _disks) = Rig::with_disks(1, patient());
        let mut vf = rig.drive_with(1, SIMPLE | event_index);
        let party = seed as usize % 2;
        let all = range(0, RAM as u64 / size);
        rig.both()[party].start_records(VF, size, &[all]).unwrap();
        let mut numbers = Numbers(seed);
        for _ in 0..16 {
            let mut allowed = rings(&vf, size);
            let count = 1 + numbers.below(12);
            for _ in 0..count {
                let sector = numbers.below(DISK as u64 / 512 - 8);
                if numbers.below(3) == 0 {
                    let data = vec![numbers.below(256) as u8; 512];
                    let to = vf.submit(0, &write_request(sector, &data), 1);
                    allowed.extend(pages(to, 1, size));
                } else {
                    let len = 512 * (1 + numbers.below(8)) as u32 + 1;
                    let to = vf.submit(0, &read_request(sector), len);
                    allowed.extend(pages(to, len.into(), size));
                }
            }
            let before = rig.memory();
            vf.collect(0, count as usize);
            rig.settle();
            let changed = difference(&before, &rig.memory(), size);
            let driver = &mut rig.both()[party];
            agree(&changed, &take(*driver), &allowed);
        }
    }
}

/// Requirements: S3-43, S3-42, G3-y
#[test]
fn s3_43_the_records_of_an_interface_agree_with_memory() {
    for (seed, event_index, shift) in [
        (1, 0, 0),
        (2, feature::EVENT_IDX, 1),
        (3, feature::EVENT_IDX, 0),
    ] {
        let size = PAGE << shift;
        let (mut rig, _switch) = Rig::with_interfaces(2);
        let mut vf = rig.drive_with(1, SIMPLE | event_index);
        let mut peer = rig.drive_with(2, SIMPLE | event_index);
        let party = seed as usize % 2;
        let all = range(0, RAM as u64 / size);
        rig.both()[party].start_records(VF, size, &[all]).unwrap();
        let mut numbers = Numbers(seed);
        let dma = rig.group.machine.dma().clone();
        for round in 0..16u8 {
            let frames = 1 + numbers.below(6);
            let mut allowed = rings(&vf, size);
            for _ in 0..frames {
                let to = dma.place(&[0xee; 2048]).unwrap();
                vf.queues[0].add(&[Buffer::writable(to, 2048)]).unwrap();
                let len = 60 + numbers.below(1400);
                let mut frame = vec![round; 12 + len as usize];
                frame[..12].fill(0);
                frame[12..18].copy_from_slice(&mac(1));
                frame[18..24].copy_from_slice(&mac(2));
                let from = dma.place(&frame).unwrap();
                peer.queues[1]
                    .add(&[Buffer::readable(from, frame.len() as u32)])
                    .unwrap();
                allowed.extend(pages(to, 2048, size));
            }
            if vf.queues[0].publish() {
                vf.transport.notify(0);
            }
            rig.settle();
            // The peer writes as well: what differs counts where the VF has business only.
            let theirs = rings(&peer, size);
            if peer.queues[1].publish() {
                peer.transport.notify(1);
            }
            let before = rig.memory();
            vf.collect(0, frames as usize);
            peer.collect(1, frames as usize);
            rig.settle();
            let changed = difference(&before, &rig.memory(), size);
            let changed = changed.difference(&theirs).copied().collect();
            let driver = &mut rig.both()[party];
            agree(&changed, &take(*driver), &allowed);
        }
    }
}
