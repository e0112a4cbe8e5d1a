//! Write records.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use devices::admin::{FixedMembership, Options, Outcome, Owner, Session};
use devices::gate::Party;
use devices::memory::{GuestRam, RamRange, View};
use devices::virtio::VirtioFunction;
use driver::host::Shape;
use driver::virtio::admin::command;
use vm_memory::{Bytes, GuestAddress};

use crate::fixture::loopback;
use crate::input::Input;

const CAPABILITIES: u16 = 0x0f;
const START: u16 = 0x10;
const STOP: u16 = 0x11;
const READ: u16 = 0x12;

/// Two ranges of RAM with a hole between them, in bytes.
const RAM: [Range<u64>; 2] = [0..0x8_0000, 0x10_0000..0x18_0000];
/// Bits of page addresses that are likely to mean something.
const PAGES: u16 = 0x1ff;

/// Pages are 4 KiB to 1 GiB.
const SHIFTS: Range<u32> = 12..31;
const MOST_RANGES: usize = 128;

/// What one driver records, in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Recording {
    shift: u32,
    ranges: Vec<Range<u128>>,
    written: BTreeSet<u128>,
}

/// Two drivers start, stop and read the records of one function with any bytes, while the function writes to memory, is
/// reset and changes its mode: each sees exactly what was written to where it looks since it last did.
pub fn write_records(data: &[u8]) {
    let mut input = Input::new(data);
    let ranges = RAM.map(|range| RamRange {
        start: GuestAddress(range.start),
        len: (range.end - range.start) as usize,
    });
    let view = GuestRam::new(&ranges).expect("RAM").view().expect("view");
    let (device, _) = loopback(Shape::default());
    let function = VirtioFunction::new("vf1", device, view.clone()).expect("events");
    let member = Arc::clone(&function) as _;
    let owner = Owner::new(vec![member], Options::default()).expect("descriptors");
    owner.set_membership(Arc::new(FixedMembership(1)));
    let mut sessions = [Party::Guest, Party::Monitor].map(|party| negotiated(&owner, party));
    let mut recordings = [None, None];
    while !input.is_empty() {
        let which = usize::from(input.pick(2));
        let session = &mut sessions[which];
        let recording = &mut recordings[which];
        match input.pick(8) {
            0 => {
                let request = any_start(&mut input);
                let before = recording.clone();
                let done = execute(&owner, session, START, &request, 0).is_some();
                assert_eq!(done, start(recording, &request), "S3-43: {before:x?}");
            }
            1 => {
                let answer = execute(&owner, session, STOP, &[], 0);
                assert!(answer.is_some(), "S3-40");
                *recording = None;
            }
            2 | 3 => {
                let (request, room) = any_read(&mut input);
                let answer = execute(&owner, session, READ, &request, room);
                let expected = read(recording, &request, room / 8);
                assert_eq!(answer, expected, "S3-42: {recording:x?}");
            }
            4..=6 => write(&mut input, &view, &mut recordings),
            _ => match input.pick(3) {
                0 => {
                    // The layout of nothing is watched here.
                    let _ = function.request_reset();
                }
                1 => {
                    let answer = execute(&owner, session, 0x08, &[input.pick(3)], 0);
                    assert!(answer.is_some(), "G3-o");
                }
                _ => {
                    let words = execute(&owner, session, CAPABILITIES, &[], 8);
                    let words = words.expect("S3-38");
                    assert!(words[..4] != [0; 4] && words[4..] != [0; 4], "S3-38");
                }
            },
        }
    }
}

fn negotiated(owner: &Owner, party: Party) -> Session {
    let mut session = Session::new(party);
    let request = command(0, 1, 0, &[]);
    let Outcome::Done(reply) = owner.execute(&mut session, &request, 4096) else {
        panic!("LIST_QUERY waits for nobody");
    };
    let list = reply.0.expect("LIST_QUERY").result;
    let Outcome::Done(reply) = owner.execute(&mut session, &command(1, 1, 0, &list), 4096) else {
        panic!("LIST_USE waits for nobody");
    };
    reply.0.expect("LIST_USE");
    session
}

/// The result of a command, or nothing if it was refused. Of one that counts, the count is checked.
fn execute(
    owner: &Owner,
    session: &mut Session,
    opcode: u16,
    data: &[u8],
    room: usize,
) -> Option<Vec<u8>> {
    let request = command(opcode, 1, 1, data);
    let Outcome::Done(reply) = owner.execute(session, &request, 8 + room) else {
        panic!("nothing is in flight, and so there is nothing to wait for");
    };
    let answer = reply.0.ok()?;
    assert!(answer.result.len() <= room, "more than there is room for");
    if opcode == READ {
        assert_eq!(answer.output as usize * 8, answer.result.len(), "G3-t");
    }
    Some(answer.result)
}

/// A page address that is likely to mean something, or any.
fn any_address(input: &mut Input<'_>) -> u64 {
    match input.pick(16) {
        0 => input.qword(),
        _ => u64::from(input.word() & PAGES) << 12,
    }
}

fn any_start(input: &mut Input<'_>) -> Vec<u8> {
    let page_size = match input.pick(8) {
        0 => input.qword(),
        1 => 1 << input.pick(64),
        _ => 0x1000 << input.pick(3),
    };
    let ranges = u32::from(input.pick(5));
    let count = match input.pick(16) {
        0 => input.dword(),
        _ => ranges,
    };
    let mut data = page_size.to_le_bytes().to_vec();
    data.extend(count.to_le_bytes());
    data.extend([0; 4]);
    for _ in 0..ranges {
        data.extend(any_address(input).to_le_bytes());
        let pages = match input.pick(16) {
            0 => input.qword(),
            _ => input.pick(64).into(),
        };
        data.extend(pages.to_le_bytes());
    }
    // Bytes that are missing read as zero.
    let kept = match input.pick(8) {
        0 => usize::from(input.byte()).min(data.len()),
        _ => data.len(),
    };
    data.truncate(kept);
    data
}

fn any_read(input: &mut Input<'_>) -> (Vec<u8>, usize) {
    let start = any_address(input);
    let length = match input.pick(8) {
        0 => input.qword(),
        _ => u64::from(input.pick(128)) << 12,
    };
    let data = [start.to_le_bytes(), length.to_le_bytes()].concat();
    (data, input.byte().into())
}

fn le64(data: &[u8], at: usize) -> u64 {
    let mut bytes = [0; 8];
    for (to, from) in bytes.iter_mut().zip(data.get(at..).unwrap_or_default()) {
        *to = *from;
    }
    u64::from_le_bytes(bytes)
}

/// DEV_WRITE_RECORDS_START as the rules have it (S3-43, G3-v). False if it is refused.
fn start(recording: &mut Option<Recording>, data: &[u8]) -> bool {
    let page_size = le64(data, 0);
    let count = le64(data, 8) as u32 as usize;
    let shift = page_size.trailing_zeros();
    let old = recording.as_ref();
    let known = page_size.is_power_of_two() && SHIFTS.contains(&shift);
    if !known || old.is_some_and(|old| old.shift != shift) {
        return false;
    }
    let mut ranges = old.map_or(Vec::new(), |old| old.ranges.clone());
    if count == 0 || count + ranges.len() > MOST_RANGES {
        return false;
    }
    let mut new = Vec::new();
    for index in 0..count {
        let (address, pages) = (le64(data, 16 + 16 * index), le64(data, 24 + 16 * index));
        let first = u128::from(address >> shift);
        let range = first..first + u128::from(pages);
        let fits = range.end << shift <= 1 << 64;
        let apart = |other: &Range<u128>| other.end <= range.start || range.end <= other.start;
        let aligned = address.is_multiple_of(page_size);
        if !aligned || pages == 0 || !fits || !ranges.iter().all(apart) {
            return false;
        }
        ranges.push(range.clone());
        new.push(range);
    }
    let mut written = old.map_or(BTreeSet::new(), |old| old.written.clone());
    written.retain(|page| !new.iter().any(|range| range.contains(page)));
    *recording = Some(Recording {
        shift,
        ranges,
        written,
    });
    true
}

/// DEV_WRITE_RECORDS_READ as the rules have it (S3-39, S3-42, S3-44, G3-u). Nothing if it is refused.
fn read(recording: &mut Option<Recording>, data: &[u8], entries: usize) -> Option<Vec<u8>> {
    let now = recording.as_mut()?;
    let (start, length) = (le64(data, 0), le64(data, 8));
    let page_size = 1 << now.shift;
    if length == 0 || !start.is_multiple_of(page_size) || !length.is_multiple_of(page_size) {
        return None;
    }
    let first = u128::from(start >> now.shift);
    let pages = first..first + u128::from(length >> now.shift);
    let within = |range: &Range<u128>| range.start <= pages.start && pages.end <= range.end;
    if !now.ranges.iter().any(within) {
        return None;
    }
    let found: Vec<u128> = now.written.range(pages).take(entries).copied().collect();
    for page in &found {
        now.written.remove(page);
    }
    let addresses = found.iter().map(|page| (page << now.shift) as u64);
    Some(addresses.flat_map(u64::to_le_bytes).collect())
}

/// The function writes to memory, within one range of it or not at all.
fn write(input: &mut Input<'_>, view: &View, recordings: &mut [Option<Recording>; 2]) {
    let ram = &RAM[usize::from(input.pick(2))];
    let offset = (u64::from(input.word() & PAGES) << 12 | u64::from(input.word() & 0xfff))
        % (ram.end - ram.start);
    let address = ram.start + offset;
    let most = (ram.end - address) as usize;
    let len = usize::from(input.word() & 0x3fff).clamp(1, most);
    let bytes = vec![input.byte(); len];
    view.write_slice(&bytes, GuestAddress(address))
        .expect("it is RAM");
    for recording in recordings.iter_mut().flatten() {
        let pages = address >> recording.shift..=(address + len as u64 - 1) >> recording.shift;
        recording.written.extend(pages.map(u128::from));
    }
}
