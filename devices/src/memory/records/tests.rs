use std::collections::BTreeSet;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;

use proptest::prelude::*;
use virtio_queue::{Queue, QueueT};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use super::super::{GuestRam, PAGE_SIZE, RamRange, View};
use super::*;
use crate::state::RecordingState;
use Party::{Guest, Monitor};
use RecordError::*;

const K4: u64 = 4 << 10;
const K8: u64 = 8 << 10;
const K64: u64 = 64 << 10;
const M2: u64 = 2 << 20;
const HIGH: u64 = 1 << 32;

const NOTHING: [u64; 0] = [];

/// RAM with gaps: small ones, so that a large page holds the end of one range and the start of the next, and a wide
/// one. First address and 4 KiB pages.
const RAM: [(u64, usize); 4] = [(0, 3), (0x5000, 70), (M2, 6), (HIGH, 9)];

fn view() -> View {
    view_of(&RAM)
}

fn view_of(ram: &[(u64, usize)]) -> View {
    let ranges: Vec<_> = ram
        .iter()
        .map(|(start, pages)| RamRange {
            start: GuestAddress(*start),
            len: pages * PAGE_SIZE,
        })
        .collect();
    GuestRam::new(&ranges).unwrap().view().unwrap()
}

fn range(page_address: u64, page_count: u64) -> PageRange {
    PageRange {
        page_address,
        page_count,
    }
}

/// Everything there is to read in one range.
fn read(view: &View, party: Party, start: u64, length: u64) -> Vec<u64> {
    let mut out = Vec::new();
    view.records()
        .read(party, start, length, usize::MAX, &mut out)
        .unwrap();
    out
}

fn touch(view: &View, address: u64) {
    view.write_obj(1u8, GuestAddress(address)).unwrap();
}

/// What [`Records`] tells about a party.
fn told(view: &View, party: Party) -> (bool, Option<u64>, Vec<PageRange>) {
    let records = view.records();
    (
        records.is_recording(party),
        records.page_size(party),
        records.ranges(party),
    )
}

/// Requirements: S3-38
#[test]
fn s3_38_every_page_size_that_is_offered_starts_and_no_other() {
    for bit in 0..u64::BITS - MIN_SHIFT {
        let view = view();
        let offered = bit < u32::BITS && PAGE_SIZES >> bit & 1 != 0;
        let size = K4 << bit;
        assert_eq!(
            view.records().start(Guest, size, &[range(0, 1)]).is_ok(),
            offered,
            "{size:#x}"
        );
    }
    assert_ne!(PAGE_SIZES, 0);
    for size in [0, 1, 512, 2048, 4097, 0x3000, u64::MAX] {
        assert_eq!(
            view().records().start(Guest, size, &[range(0, 1)]),
            Err(PageSize(size))
        );
    }
}

/// Requirements: S3-38, S3-49
#[test]
fn s3_38_as_many_ranges_as_offered_are_recorded_in_one_start_or_in_many() {
    let ranges: Vec<_> = (0..u64::from(MAX_RANGES))
        .map(|n| range(2 * n * K4, 1))
        .collect();
    let more = [range(HIGH, 1)];
    let at_once = view();
    at_once.records().start(Guest, K4, &ranges).unwrap();
    let one_by_one = view();
    for range in ranges.chunks(1) {
        one_by_one.records().start(Guest, K4, range).unwrap();
    }
    for view in [at_once, one_by_one] {
        assert_eq!(
            view.records().start(Guest, K4, &more),
            Err(TooManyRanges),
            "supported_ranges is used up"
        );
        assert_eq!(view.records().ranges(Guest), ranges);
    }
    let all: Vec<_> = ranges.into_iter().chain(more).collect();
    assert_eq!(view().records().start(Guest, K4, &all), Err(TooManyRanges));
}

/// Requirements: S3-39
#[test]
fn s3_39_reading_fails_if_recording_was_not_started() {
    let view = view();
    let mut out = vec![7];
    let mut read = || view.records().read(Guest, 0, K4, 9, &mut out);
    assert_eq!(read(), Err(NotStarted));
    view.records().start(Monitor, K4, &[range(0, 1)]).unwrap();
    assert_eq!(read(), Err(NotStarted), "started by the other party");
    view.records().start(Guest, K4, &[range(0, 1)]).unwrap();
    assert_eq!(read(), Ok(()));
    view.records().stop(Guest);
    assert_eq!(read(), Err(NotStarted), "stopped");
    assert_eq!(out, [7]);
}

/// Requirements: S3-40
#[test]
fn s3_40_stopping_is_always_fine_and_drops_what_was_not_read() {
    let view = view();
    view.records().stop(Guest);
    view.records().start(Guest, K4, &[range(0, 3)]).unwrap();
    touch(&view, 0);
    view.records().stop(Guest);
    view.records().stop(Guest);
    assert_eq!(told(&view, Guest), (false, None, vec![]));
    touch(&view, 0x1000);
    view.records().start(Guest, K8, &[range(0, 1)]).unwrap();
    assert_eq!(read(&view, Guest, 0, K8), NOTHING);
    touch(&view, 0x1000);
    assert_eq!(read(&view, Guest, 0, K8), [0]);
}

/// Requirements: S3-42
#[test]
fn s3_42_what_was_read_is_cleared_and_a_later_write_is_reported_again() {
    for size in [K4, K8, K64, M2] {
        let view = view();
        view.records().start(Guest, size, &[range(0, 1)]).unwrap();
        touch(&view, 0x123);
        touch(&view, (size - 1) & 0xffff);
        let shared = read(&view, Guest, 0, size);
        assert_eq!(shared, [0], "{size:#x}");
        assert_eq!(read(&view, Guest, 0, size), NOTHING, "{size:#x}");
        touch(&view, 0x124);
        assert_eq!(read(&view, Guest, 0, size), [0], "{size:#x}");
    }
}

/// Requirements: S3-42
#[test]
fn s3_42_what_does_not_fit_stays_recorded() {
    let view = view();
    view.records().start(Guest, K4, &[range(0, 75)]).unwrap();
    let pages: Vec<_> = (5..75).map(|n| n * K4).collect();
    view.write_slice(&[1; 70 * PAGE_SIZE], GuestAddress(0x5000))
        .unwrap();
    let mut out = Vec::new();
    for max in [0, 1, 10, 0, 51, 3] {
        let before = out.len();
        view.records()
            .read(Guest, 0, 75 * K4, max, &mut out)
            .unwrap();
        assert_eq!(out.len(), before + max);
    }
    assert_eq!(out, pages[..65]);
    assert_eq!(read(&view, Guest, 0, 75 * K4), pages[65..]);
}

/// Requirements: S3-43
#[test]
fn s3_43_writes_inside_ranges_are_recorded_at_the_chosen_page_size() {
    for (size, ranges, written) in [
        (K4, vec![(0x5000, 70), (HIGH, 2)], vec![0x6000, HIGH + K4]),
        (K8, vec![(0x4000, 35), (HIGH, 1)], vec![0x6000, HIGH]),
        (K64, vec![(0, 4), (HIGH, 1)], vec![0, HIGH]),
        (M2, vec![(0, 1), (HIGH, 1)], vec![0, HIGH]),
    ] {
        let view = view();
        let ranges: Vec<_> = ranges.iter().map(|(a, n)| range(*a, *n)).collect();
        view.records().start(Guest, size, &ranges).unwrap();
        for address in [0x6fff, HIGH + 0x1800, M2 + 5] {
            touch(&view, address);
        }
        let found: Vec<_> = ranges
            .iter()
            .flat_map(|r| read(&view, Guest, r.page_address, r.page_count * size))
            .collect();
        assert_eq!(found, written, "{size:#x}");
    }
}

/// Requirements: S3-43
#[test]
fn s3_43_a_range_records_from_its_own_start_on() {
    let view = view();
    touch(&view, 0);
    view.records().start(Guest, K4, &[range(0, 1)]).unwrap();
    touch(&view, 0x5000);
    view.records()
        .start(Guest, K4, &[range(0x5000, 2)])
        .unwrap();
    touch(&view, 0x6000);
    assert_eq!(read(&view, Guest, 0, K4), NOTHING);
    assert_eq!(read(&view, Guest, 0x5000, 2 * K4), [0x6000]);
}

/// Requirements: S3-43
#[test]
fn s3_43_each_view_has_its_own_records_and_clones_share_them() {
    let view = view();
    let other = view.ram().view().unwrap();
    view.records().start(Guest, K4, &[range(0, 3)]).unwrap();
    touch(&other, 0);
    touch(&view.clone(), 0x1000);
    assert_eq!(read(&view, Guest, 0, 3 * K4), [0x1000]);
    assert!(!other.records().is_recording(Guest));
    assert!(view.ram().dirty_pages().is_dirty(GuestAddress(0x1000)));
}

/// Requirements: S3-43
#[test]
fn s3_43_the_used_ring_and_suppression_of_notifications_are_writes() {
    let view = view();
    let mut queue = Queue::new(16).unwrap();
    queue.set_desc_table_address(Some(0), None);
    queue.set_avail_ring_address(Some(0x1000), None);
    queue.set_used_ring_address(Some(0x5000), None);
    queue.set_ready(true);
    view.records().start(Guest, K4, &[range(0, 6)]).unwrap();
    queue.add_used(&*view, 3, 1).unwrap();
    assert_eq!(read(&view, Guest, 0, 6 * K4), [0x5000]);
    queue.disable_notification(&*view).unwrap();
    assert_eq!(read(&view, Guest, 0, 6 * K4), [0x5000]);
    queue.set_event_idx(true);
    queue.enable_notification(&*view).unwrap();
    assert_eq!(read(&view, Guest, 0, 6 * K4), [0x5000]);
}

/// Requirements: S3-43
#[test]
fn s3_43_what_is_marked_through_a_slice_is_at_the_address_of_the_slice() {
    let view = view();
    view.records()
        .start(Guest, K4, &[range(HIGH, 9), range(0, 80)])
        .unwrap();
    let slice = view.get_slice(GuestAddress(HIGH + 0x1f00), 0x3000).unwrap();
    slice.bitmap().mark_dirty(0, 0x101);
    assert_eq!(
        read(&view, Guest, HIGH, 9 * K4),
        [HIGH + 0x1000, HIGH + 0x2000]
    );
    slice.offset(0x1100).unwrap().bitmap().mark_dirty(0, 1);
    assert_eq!(read(&view, Guest, HIGH, 9 * K4), [HIGH + 0x3000]);
    slice
        .subslice(0x2100, 0x100)
        .unwrap()
        .bitmap()
        .mark_dirty(0x10, 1);
    assert_eq!(read(&view, Guest, HIGH, 9 * K4), [HIGH + 0x4000]);
    slice.bitmap().mark_dirty(0, 0);
    slice.bitmap().mark_dirty(1 << 40, 1);
    slice.bitmap().mark_dirty(0x7000, usize::MAX);
    assert_eq!(
        read(&view, Guest, HIGH, 9 * K4),
        [HIGH + 0x8000],
        "nothing beyond the end of the range"
    );
    assert_eq!(read(&view, Guest, 0, 80 * K4), NOTHING);
}

/// Requirements: S3-44
#[test]
fn s3_44_a_range_inside_one_that_was_started_can_be_read() {
    let view = view();
    let ranges = [range(0x10000, 16), range(0x6000, 4), range(0xa000, 4)];
    view.records().start(Guest, K4, &ranges).unwrap();
    view.write_slice(&[1; 70 * PAGE_SIZE], GuestAddress(0x5000))
        .unwrap();
    let before = told(&view, Guest);
    let mut out = Vec::new();
    for (start, length, error) in [
        (0x5000, K4, NotRecorded(0x5000)),
        (0x5000, 2 * K4, NotRecorded(0x5000)),
        (0x9000, 2 * K4, NotRecorded(0x9000)),
        (0xd000, 2 * K4, NotRecorded(0xd000)),
        (0x6000, 8 * K4, NotRecorded(0x6000)),
        (0, HIGH, NotRecorded(0)),
        (0x6000, 0u64.wrapping_sub(K4), NotRecorded(0x6000)),
        (
            0u64.wrapping_sub(K4),
            K8,
            NotRecorded(0u64.wrapping_sub(K4)),
        ),
        (0x6000, 0, Length(0)),
        (0x6000, 1, Length(1)),
        (0x6000, K4 + 8, Length(K4 + 8)),
        (0x6000, u64::MAX, Length(u64::MAX)),
        (0x6001, K4, Unaligned(0x6001)),
    ] {
        let answer = view.records().read(Guest, start, length, 9, &mut out);
        assert_eq!(answer, Err(error), "{start:#x} {length:#x}");
    }
    assert_eq!(out, NOTHING);
    assert_eq!(told(&view, Guest), before);
    assert_eq!(read(&view, Guest, 0x7000, K4), [0x7000]);
    assert_eq!(read(&view, Guest, 0x6000, 4 * K4), [0x6000, 0x8000, 0x9000]);
    assert_eq!(read(&view, Guest, 0xd000, K4), [0xd000]);
    assert_eq!(read(&view, Guest, 0x10000, 16 * K4).len(), 16);
}

/// Requirements: S3-44
#[test]
fn s3_44_ranges_as_wide_as_the_address_space_take_time_and_memory_by_the_ram() {
    let view = view();
    for size in [K4, K8, K64, M2] {
        let half = (1 << 63) / size;
        view.records()
            .start(Guest, size, &[range(1 << 63, half), range(0, half)])
            .unwrap();
        touch(&view, HIGH);
        touch(&view, M2);
        assert_eq!(read(&view, Guest, 1 << 63, 1 << 63), NOTHING);
        assert_eq!(read(&view, Guest, 0, 1 << 63), [M2, HIGH]);
        view.records().stop(Guest);
    }
}

/// Requirements: S3-49
#[test]
fn s3_49_a_start_that_is_refused_starts_and_changes_nothing() {
    let last = 0u64.wrapping_sub(K4);
    let table: &[(u64, &[PageRange], RecordError)] = &[
        (K4, &[], NoRanges),
        (0x3000, &[range(0, 1)], PageSize(0x3000)),
        (K4, &[range(HIGH, 0)], Empty(HIGH)),
        (K4, &[range(0x800, 1)], Unaligned(0x800)),
        (K4, &[range(last, 2)], Wraps(last)),
        (K4, &[range(last, u64::MAX)], Wraps(last)),
        (K4, &[range(0, 1 << 52), range(0, 1)], Overlap(0)),
        (K4, &[range(HIGH, (1 << 52) - 1)], Wraps(HIGH)),
        (
            K4,
            &[range(HIGH, 4), range(M2, 1), range(HIGH + 3 * K4, 1)],
            Overlap(HIGH + 3 * K4),
        ),
        (K4, &[range(HIGH, 4), range(HIGH, 4)], Overlap(HIGH)),
        (
            K4,
            &[range(M2, 1), range(HIGH, 1), range(HIGH + K8, 0)],
            Empty(HIGH + K8),
        ),
    ];
    for (size, ranges, error) in table {
        let view = view();
        assert_eq!(view.records().start(Guest, *size, ranges), Err(*error));
        assert_eq!(told(&view, Guest), (false, None, vec![]));
    }
    let while_started: &[(u64, &[PageRange], RecordError)] = &[
        (
            K8,
            &[range(HIGH, 1)],
            OtherPageSize {
                asked: K8,
                current: K4,
            },
        ),
        (K4, &[range(0x5000, 1)], Overlap(0x5000)),
        (K4, &[range(M2, 1), range(0x6000, 9)], Overlap(0x6000)),
        (K4, &[range(0, 9)], Overlap(0x5000)),
    ];
    let view = view();
    view.records()
        .start(Guest, K4, &[range(0x5000, 3)])
        .unwrap();
    touch(&view, 0x6000);
    touch(&view, HIGH);
    let before = told(&view, Guest);
    for (size, ranges, error) in table.iter().chain(while_started) {
        assert_eq!(view.records().start(Guest, *size, ranges), Err(*error));
        assert_eq!(told(&view, Guest), before);
    }
    assert_eq!(read(&view, Guest, 0x5000, 3 * K4), [0x6000]);
}

/// Requirements: S3-49
#[test]
fn s3_49_neighbours_and_the_last_page_there_is_do_not_overlap() {
    let view = view();
    let last = 0u64.wrapping_sub(K4);
    let ranges = [range(0x5000, 1), range(0x6000, 2), range(last, 1)];
    view.records().start(Guest, K4, &[ranges[1]]).unwrap();
    view.records()
        .start(Guest, K4, &[ranges[2], ranges[0]])
        .unwrap();
    assert_eq!(view.records().ranges(Guest), ranges);
    assert_eq!(read(&view, Guest, last, K4), NOTHING);
}

#[test]
fn two_parties_record_without_noticing_each_other() {
    let view = view();
    view.records().start(Guest, K4, &[range(0, 3)]).unwrap();
    touch(&view, 0x1000);
    view.records().start(Monitor, K64, &[range(0, 4)]).unwrap();
    touch(&view, 0x2000);
    assert_eq!(read(&view, Monitor, 0, 4 * K64), [0]);
    assert_eq!(read(&view, Guest, 0, 3 * K4), [0x1000, 0x2000]);
    touch(&view, 0x2000);
    view.records().stop(Monitor);
    assert!(view.records().is_recording(Guest));
    touch(&view, 0);
    assert_eq!(read(&view, Guest, 0, 3 * K4), [0, 0x2000]);
}

#[test]
fn a_page_that_two_ram_ranges_share_is_reported_once() {
    let view = view();
    view.records().start(Guest, M2, &[range(0, 2)]).unwrap();
    touch(&view, 0);
    touch(&view, 0x5000);
    assert_eq!(read(&view, Guest, 0, 2 * M2), [0]);
    touch(&view, M2);
    touch(&view, 0x5000);
    assert_eq!(read(&view, Guest, 0, 2 * M2), [0, M2]);
}

#[test]
fn records_cost_a_few_words_when_idle_and_a_bit_per_page_of_ram_when_not() {
    assert!(size_of::<Records>() <= 192, "{}", size_of::<Records>());
    let ram = [(0, 3 << 18), (HIGH, 5 << 18)].map(|(start, pages)| RamRange {
        start: GuestAddress(start),
        len: pages * PAGE_SIZE,
    });
    for (size, bytes) in [(K4, 256 << 10), (M2, 8 * 64), (1 << 30, 8)] {
        let pages = WrittenPages::new(&ram, shift_of(size).unwrap()).unwrap();
        assert_eq!(pages.bytes(), bytes, "{size:#x}");
    }
}

#[test]
fn stopping_gives_the_memory_of_records_back() {
    let view = view();
    view.records().start(Guest, K4, &[range(0, 1)]).unwrap();
    let written = Arc::downgrade(view.records().seats[0].written.load().as_ref().unwrap());
    assert!(written.upgrade().is_some());
    view.records().stop(Guest);
    assert!(written.upgrade().is_none());
}

/// All RAM of a view, by its pages of 4 KiB.
fn snapshot(view: &View) -> Vec<(u64, Vec<u8>)> {
    RAM.iter()
        .flat_map(|(start, pages)| (0..*pages as u64).map(move |n| start + n * K4))
        .map(|address| (address, page(view, address)))
        .collect()
}

fn page(view: &View, address: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_SIZE];
    view.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

/// Turns every bit of `len` bytes around, in one of the ways in which devices write.
fn invert(view: &View, how: usize, address: u64, len: usize) {
    let address = GuestAddress(address);
    let mut bytes = vec![0; len];
    view.read_slice(&mut bytes, address).unwrap();
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
    match how % 5 {
        0 => view.write_slice(&bytes, address).unwrap(),
        1 => {
            for (n, byte) in bytes.iter().enumerate() {
                view.write_obj(*byte, GuestAddress(address.0 + n as u64))
                    .unwrap();
            }
        }
        2 => {
            let mut bytes = &bytes[..];
            for slice in view.lend_to_write(address, len) {
                let slice = slice.unwrap();
                let (target, len) = (slice.iovec().iov_base, slice.len());
                // SAFETY: the slice is `len` bytes of live guest memory, and `bytes` has at least as many; they do not
                // overlap, and this thread alone uses them.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target.cast(), len) };
                bytes = &bytes[len..];
            }
        }
        3 => {
            let slice = view.get_slice(address, len).unwrap();
            (&bytes[..])
                .read_exact_volatile(&mut slice.clone())
                .unwrap();
        }
        _ => {
            let slice = view.get_slice(address, len).unwrap();
            let (left, right) = slice.split_at(len / 2).unwrap();
            left.write_slice(&bytes[..len / 2], 0).unwrap();
            right.copy_from(&bytes[len / 2..]);
        }
    }
}

/// What the records of one party should be.
#[derive(Clone, Debug)]
struct Model {
    size: u64,
    ranges: Vec<PageRange>,
    written: BTreeSet<u64>,
}

impl Model {
    fn covers(&self, address: u64) -> bool {
        self.ranges.iter().any(|range| {
            (range.page_address..range.page_address + range.page_count * self.size)
                .contains(&address)
        })
    }
}

#[derive(Clone, Debug)]
enum Op {
    Start(Party, usize, Vec<(u64, u64)>),
    Stop(Party),
    Read(Party, usize, u64, u64, usize),
    Write(usize, usize, usize, usize),
}

fn party() -> impl Strategy<Value = Party> {
    prop::sample::select(&Party::ALL)
}

fn op() -> impl Strategy<Value = Op> {
    let start = prop_oneof![0u64..0x50, 0x1f0u64..0x210, 0xffff0u64..0x100010];
    let ranges = prop::collection::vec((start, 1u64..0x20), 1..4);
    prop_oneof![
        2 => (party(), 0usize..4, ranges).prop_map(|(a, b, c)| Op::Start(a, b, c)),
        1 => party().prop_map(Op::Stop),
        4 => (party(), any::<usize>(), 0u64..32, 1u64..32, 0usize..12)
            .prop_map(|(a, b, c, d, e)| Op::Read(a, b, c, d, e)),
        6 => (any::<usize>(), any::<usize>(), any::<usize>(), 1usize..20_000)
            .prop_map(|(a, b, c, d)| Op::Write(a, b, c, d)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// What is read is what a comparison of memory finds changed, in the ranges, since they were started or read.
    ///
    /// Requirements: S3-42, S3-43, S3-44
    #[test]
    fn s3_43_records_agree_with_a_comparison_of_memory(ops in prop::collection::vec(op(), 1..60)) {
        let view = view();
        let mut memory = snapshot(&view);
        let mut models: [Option<Model>; 3] = [None, None, None];
        for op in ops {
            match op {
                Op::Start(party, size, ranges) => {
                    let size = [K4, K8, K64, M2][size];
                    let ranges: Vec<_> = ranges
                        .iter()
                        .map(|(page, count)| range(page * K4 / size * size, *count))
                        .collect();
                    let model = &mut models[party as usize];
                    let before = told(&view, party);
                    match view.records().start(party, size, &ranges) {
                        Ok(()) => {
                            let model = model.get_or_insert_with(|| Model {
                                size,
                                ranges: vec![],
                                written: BTreeSet::new(),
                            });
                            prop_assert_eq!(model.size, size);
                            for range in &ranges {
                                for n in 0..range.page_count {
                                    prop_assert!(!model.covers(range.page_address + n * size));
                                }
                                model.ranges.push(*range);
                            }
                        }
                        Err(_) => prop_assert_eq!(told(&view, party), before),
                    }
                }
                Op::Stop(party) => {
                    view.records().stop(party);
                    models[party as usize] = None;
                }
                Op::Read(party, which, skip, count, max) => {
                    let mut out = Vec::new();
                    let Some(model) = &mut models[party as usize] else {
                        let answer = view.records().read(party, 0, K4, max, &mut out);
                        prop_assert_eq!(answer, Err(NotStarted));
                        continue;
                    };
                    let range = model.ranges[which % model.ranges.len()];
                    let skip = skip % range.page_count;
                    let count = count.min(range.page_count - skip);
                    let start = range.page_address + skip * model.size;
                    let length = count * model.size;
                    view.records().read(party, start, length, max, &mut out).unwrap();
                    let expected: Vec<_> = model
                        .written
                        .range(start..start + length)
                        .copied()
                        .take(max)
                        .collect();
                    prop_assert_eq!(&out, &expected);
                    for page in out {
                        model.written.remove(&page);
                    }
                }
                Op::Write(how, region, offset, len) => {
                    let (start, pages) = RAM[region % RAM.len()];
                    let offset = offset % (pages * PAGE_SIZE);
                    let len = len.min(pages * PAGE_SIZE - offset);
                    invert(&view, how, start + offset as u64, len);
                    let now = snapshot(&view);
                    for (old, new) in memory.iter().zip(&now).filter(|(old, new)| old != new) {
                        prop_assert_eq!(old.0, new.0);
                        for model in models.iter_mut().flatten().filter(|m| m.covers(old.0)) {
                            model.written.insert(old.0 / model.size * model.size);
                        }
                    }
                    memory = now;
                }
            }
        }
        let other = self::view();
        for party in Party::ALL {
            let saved = view.records().save(party);
            prop_assert_eq!(saved.is_some(), models[party as usize].is_some());
            if let Some(state) = &saved {
                let prepared = other.records().prepare(state).unwrap();
                other.records().install(party, prepared);
            }
            prop_assert_eq!(other.records().save(party), saved);
        }
        for party in Party::ALL {
            for range in view.records().ranges(party) {
                let model = models[party as usize].as_mut().unwrap();
                let length = range.page_count * model.size;
                let rest = read(&view, party, range.page_address, length);
                prop_assert_eq!(&read(&other, party, range.page_address, length), &rest);
                let end = range.page_address + length;
                let expected: Vec<_> =
                    model.written.range(range.page_address..end).copied().collect();
                prop_assert_eq!(rest, expected);
            }
        }
    }
}

#[test]
fn saved_records_that_cannot_be_are_refused() {
    let state = |page_size, ranges: &[PageRange], written: &[PageRange]| RecordingState {
        page_size,
        ranges: ranges.to_vec(),
        written: written.to_vec(),
    };
    let two = [range(0x5000, 4), range(0xa000, 4)];
    let cases = [
        (state(K4 / 2, &two, &[]), PageSize(K4 / 2)),
        (state(K4, &[], &[]), NoRanges),
        (state(K4, &[range(0, 1); 129], &[]), TooManyRanges),
        (state(K4, &[range(1, 1)], &[]), Unaligned(1)),
        (state(K4, &[range(0, 0)], &[]), Empty(0)),
        (state(K4, &[range(K4, u64::MAX)], &[]), Wraps(K4)),
        (state(K4, &[range(0, 2), range(K4, 1)], &[]), Overlap(K4)),
        (state(K4, &[two[1], two[0]], &[]), Order(0x5000)),
        (
            state(K4, &two, &[range(0x6000, 1), range(0x5000, 1)]),
            Order(0x5000),
        ),
        (state(K4, &two, &[range(0x5000, 5)]), Written(0x5000)),
        (state(K4, &two, &[range(0x9000, 1)]), Written(0x9000)),
        (state(K4, &two, &[range(0, u64::MAX)]), Wraps(0)),
        (state(K4, &two, &[range(0, 0)]), Empty(0)),
        (
            state(K4, &[range(1 << 40, 4)], &[range(1 << 40, 1)]),
            Written(1 << 40),
        ),
    ];
    for (state, error) in cases {
        assert_eq!(
            view().records().prepare(&state).unwrap_err(),
            error,
            "{state:x?}"
        );
    }
    let all = state(K4, &two, &two);
    let view = view();
    view.records()
        .install(Guest, view.records().prepare(&all).unwrap());
    assert_eq!(view.records().save(Guest), Some(all));
}

/// Requirements: S3-42
#[test]
fn s3_42_a_mark_that_meets_a_read_in_a_word_is_reported_once() {
    const PAGES: usize = 4 * 64;
    let view = view_of(&[(0, PAGES)]);
    let records = view.records();
    let all = range(0, PAGES as u64);
    records.start(Guest, K4, &[all]).unwrap();
    let barrier = Barrier::new(2);
    for round in 0..500 {
        let running = AtomicUsize::new(1);
        let mut found = Vec::new();
        thread::scope(|scope| {
            scope.spawn(|| {
                barrier.wait();
                for n in 0..PAGES {
                    // Neighbours lie in different words.
                    let page = n % 4 * 64 + n / 4;
                    records.mark(0, page * PAGE_SIZE, 1);
                }
                running.store(0, SeqCst);
            });
            barrier.wait();
            let mut last = false;
            while !last {
                last = running.load(SeqCst) == 0;
                let length = PAGES as u64 * K4;
                records.read(Guest, 0, length, PAGES, &mut found).unwrap();
            }
        });
        found.sort_unstable();
        let pages: Vec<_> = (0..PAGES as u64).map(|n| n * K4).collect();
        assert!(found == pages, "round {round}: {} pages", found.len());
    }
}

/// Two threads write; meanwhile each reader keeps a copy of memory by what it reads, as a migration does, and starts
/// anew with a whole copy after `restart` reads. At the end the copies are equal to memory.
fn copies_follow(view: &View, readers: &[(Party, u64)], writes: usize, restart: usize) {
    const WRITERS: usize = 2;
    let barrier = Barrier::new(WRITERS + readers.len());
    let running = AtomicUsize::new(WRITERS);
    let copies: Vec<_> = thread::scope(|scope| {
        for writer in 0..WRITERS as u64 {
            let (barrier, running) = (&barrier, &running);
            scope.spawn(move || {
                barrier.wait();
                let mut random = writer + 1;
                for n in 0..writes {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let (start, pages) = RAM[random as usize >> 8 & 3];
                    // Each thread in words of its own, all in few pages: they meet in the bits.
                    let page = (random >> 16) % (pages as u64).min(8);
                    let address = start + page * K4 + 16 * (random >> 32 & 255) + 8 * writer;
                    view.write_obj(n as u64, GuestAddress(address)).unwrap();
                }
                running.fetch_sub(1, SeqCst);
            });
        }
        let readers: Vec<_> = readers
            .iter()
            .map(|(party, size)| {
                let (barrier, running) = (&barrier, &running);
                scope.spawn(move || {
                    barrier.wait();
                    let records = view.records();
                    let everything = [range(0, (HIGH + M2) / size)];
                    records.start(*party, *size, &everything).unwrap();
                    let mut copy = snapshot(view);
                    let mut found = Vec::new();
                    for n in 1.. {
                        if n % restart == 0 {
                            records.stop(*party);
                            records.start(*party, *size, &everything).unwrap();
                            copy = snapshot(view);
                        }
                        let last = running.load(SeqCst) == 0;
                        found.clear();
                        let max = if last { usize::MAX } else { 7 };
                        records.read(*party, 0, HIGH + M2, max, &mut found).unwrap();
                        for (address, bytes) in &mut copy {
                            if found.contains(&(*address / size * size)) {
                                *bytes = page(view, *address);
                            }
                        }
                        if last {
                            break;
                        }
                    }
                    records.stop(*party);
                    copy
                })
            })
            .collect();
        readers.into_iter().map(|r| r.join().unwrap()).collect()
    });
    let memory = snapshot(view);
    for copy in copies {
        for (copied, page) in copy.iter().zip(&memory) {
            assert!(copied == page, "page {:#x}", page.0);
        }
    }
}

/// Requirements: S3-42, S3-43
#[test]
fn s3_42_no_write_is_lost_between_reads() {
    let view = view();
    for size in [K4, K8, K64, M2] {
        copies_follow(&view, &[(Guest, size)], 40_000, usize::MAX);
    }
}

/// Requirements: S3-43
#[test]
fn s3_43_no_write_is_lost_when_recording_starts_under_it() {
    let view = view();
    for _ in 0..20 {
        copies_follow(&view, &[(Guest, K4), (Monitor, K64)], 4_000, 5);
    }
}
