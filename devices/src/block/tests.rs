use super::*;
use crate::gate::{Patience, Reasons};
use crate::testing::{Buf, Driver, RAM};
use proptest::prelude::*;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::mpsc;
use tempfile::NamedTempFile;

use crate::memory::{GuestRead, GuestWrite};

mod locks;
mod parameters;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTORS: u64 = 64;
const ALL: u64 = u64::MAX;

/// An image of 64 sectors; each byte is the number of its sector.
fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..SECTORS).flat_map(|s| [s as u8; 512]).collect();
    file.as_file().write_all_at(&bytes, 0).unwrap();
    file
}

fn disk(file: &NamedTempFile) -> Driver {
    Driver::live(Block::open(&BlockConfig::new(file.path())).unwrap(), ALL)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Sends a request; the status and the device-writable bytes before it.
fn ask(driver: &mut Driver, out: Vec<u8>, data_in: usize) -> (u8, Vec<u8>) {
    let (_, mut bytes) = driver.request(0, &[Buf::Out(out), Buf::In(data_in), Buf::In(1)]);
    let status = bytes.pop().unwrap();
    (status, bytes)
}

fn read(driver: &mut Driver, sector: u64, sectors: usize) -> Vec<u8> {
    let (status, bytes) = ask(driver, header(IN, sector), sectors * 512);
    assert_eq!(status, OK);
    bytes
}

fn content(file: &File, sector: u64) -> [u8; 512] {
    let mut bytes = [0; 512];
    file.read_exact_at(&mut bytes, sector * 512).unwrap();
    bytes
}

#[test]
fn data_survives_odd_descriptors_both_ways() {
    let file = image();
    let mut driver = disk(&file);
    let data: Vec<u8> = (0..1024).map(|i| (i * 3 % 251) as u8).collect();
    let mut out = header(OUT, 5);
    out.extend(&data);
    // The header is split, and its last piece carries data.
    let pieces = [3, 7, 11, 500, 519];
    let mut bufs = Vec::new();
    let mut rest = out.as_slice();
    for len in pieces {
        let (piece, tail) = rest.split_at(len);
        bufs.push(Buf::Out(piece.into()));
        rest = tail;
    }
    assert!(rest.is_empty());
    bufs.push(Buf::In(1));
    let (len, status) = driver.request(0, &bufs);
    assert_eq!((len, status), (1, vec![OK]));
    assert_eq!(content(file.as_file(), 5)[..], data[..512]);

    let (len, mut bytes) = driver.request(
        0,
        &[
            Buf::Out(header(IN, 5)),
            Buf::In(1),
            Buf::In(1000),
            Buf::In(0),
            Buf::In(24),
        ],
    );
    assert_eq!((len, bytes.pop()), (1025, Some(OK)));
    assert_eq!(bytes, data);
}

#[test]
fn a_read_marks_the_pages_it_wrote() {
    let file = image();
    let mut driver = disk(&file);
    let added = driver.add(0, &[Buf::Out(header(IN, 1)), Buf::In(16 * 512), Buf::In(1)]);
    let bits = driver.view.ram().dirty_pages().clone();
    for (_, bitmap) in bits.regions() {
        bitmap.reset();
    }
    // The first page that has data and nothing else: the status byte marks its own.
    let page = vm_memory::GuestAddress(added.writable[0].0.next_multiple_of(4096));
    assert!(!bits.is_dirty(page));
    driver.kick(0);
    driver.wait_used(0);
    assert!(bits.is_dirty(page));
}

#[test]
fn many_requests_on_several_queues_all_complete() {
    let file = image();
    let config = BlockConfig {
        queues: 3,
        ..BlockConfig::new(file.path())
    };
    let mut driver = Driver::live(Block::open(&config).unwrap(), ALL);
    let mut added = Vec::new();
    for i in 0..60u64 {
        let queue = (i % 3) as u16;
        let bufs = [Buf::Out(header(IN, i)), Buf::In(512), Buf::In(1)];
        added.push((i, queue, driver.add(queue, &bufs)));
    }
    (0..3).for_each(|q| driver.function.kick(q));
    for (i, queue, added) in added {
        assert_eq!(driver.wait_used(queue), (added.head, 513));
        let bytes = driver.written(&added);
        assert_eq!(bytes[..512], [i as u8; 512]);
        assert_eq!(bytes[512], OK);
    }
}

#[test]
fn get_id_is_the_serial_padded_or_cut_to_20_bytes() {
    let file = image();
    for (serial, id) in [
        ("disk7", *b"disk7\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("a-serial-of-more-than-20", *b"a-serial-of-more-tha"),
    ] {
        let config = BlockConfig {
            serial: serial.into(),
            ..BlockConfig::new(file.path())
        };
        let mut driver = Driver::live(Block::open(&config).unwrap(), ALL);
        assert_eq!(ask(&mut driver, header(GET_ID, 0), 20), (OK, id.to_vec()));
        assert_eq!(ask(&mut driver, header(GET_ID, 0), 19).0, IOERR);
    }
}

#[test]
fn requests_that_make_no_sense_get_their_status_and_change_nothing() {
    let with = |kind, sector, data: Vec<u8>| {
        let mut out = header(kind, sector);
        out.extend(data);
        out
    };
    let many = |n: usize| (0..n).flat_map(|_| segment(0, 1, 0)).collect::<Vec<_>>();
    let huge = Parameters::default().max_discard_sectors + 1;
    let cases: Vec<(&str, Vec<u8>, usize, u8)> = vec![
        ("unknown type", header(99, 0), 512, UNSUPP),
        ("secure erase", header(14, 0), 0, UNSUPP),
        ("no header", vec![], 512, IOERR),
        ("half a header", vec![0; 15], 512, IOERR),
        ("read of a part of a sector", header(IN, 0), 511, IOERR),
        (
            "write of a part of a sector",
            with(OUT, 0, vec![1; 513]),
            0,
            IOERR,
        ),
        ("read beyond the end", header(IN, SECTORS), 512, IOERR),
        ("read across the end", header(IN, SECTORS - 1), 1024, IOERR),
        (
            "write across the end",
            with(OUT, SECTORS - 1, vec![1; 1024]),
            0,
            IOERR,
        ),
        (
            "sector that overflows when multiplied",
            header(IN, 1 << 55),
            512,
            IOERR,
        ),
        (
            "sector that overflows when added",
            header(IN, u64::MAX / 512),
            1024,
            IOERR,
        ),
        ("largest sector", header(IN, u64::MAX), 512, IOERR),
        (
            "read of nothing beyond the end",
            header(IN, SECTORS + 1),
            0,
            IOERR,
        ),
        ("discard of no segment", header(DISCARD, 0), 0, IOERR),
        (
            "discard of half a segment",
            with(DISCARD, 0, vec![0; 8]),
            0,
            IOERR,
        ),
        (
            "discard with unmap",
            with(DISCARD, 0, segment(0, 1, 1)),
            0,
            UNSUPP,
        ),
        (
            "discard with unknown flag",
            with(DISCARD, 0, segment(0, 1, 2)),
            0,
            UNSUPP,
        ),
        (
            "discard beyond the end",
            with(DISCARD, 0, segment(SECTORS, 1, 0)),
            0,
            IOERR,
        ),
        (
            "discard that overflows",
            with(DISCARD, 0, segment(u64::MAX, 1, 0)),
            0,
            IOERR,
        ),
        (
            "discard of too many sectors",
            with(DISCARD, 0, segment(0, huge, 0)),
            0,
            IOERR,
        ),
        (
            "discard of too many segments",
            with(DISCARD, 0, many(33)),
            0,
            IOERR,
        ),
        (
            "zeroes with unknown flag",
            with(WRITE_ZEROES, 0, segment(0, 1, 2)),
            0,
            UNSUPP,
        ),
        (
            "zeroes of which the second segment is beyond the end",
            with(
                WRITE_ZEROES,
                0,
                [segment(1, 1, 0), segment(SECTORS, 1, 0)].concat(),
            ),
            0,
            IOERR,
        ),
    ];
    let file = image();
    let mut driver = disk(&file);
    for (name, out, data_in, status) in cases {
        assert_eq!(ask(&mut driver, out, data_in).0, status, "{name}");
    }
    for sector in 0..SECTORS {
        assert_eq!(content(file.as_file(), sector), [sector as u8; 512]);
    }
}

#[test]
fn flush_zeroes_and_discard_do_what_they_say() {
    let file = image();
    let mut driver = disk(&file);
    assert_eq!(ask(&mut driver, header(FLUSH, 0), 0).0, OK);
    for (first, flags) in [(8, 0), (16, 1)] {
        let mut out = header(WRITE_ZEROES, 0);
        out.extend(segment(first, 3, flags));
        out.extend(segment(first + 5, 1, flags));
        assert_eq!(ask(&mut driver, out, 0).0, OK);
        for sector in [first, first + 1, first + 2, first + 5] {
            assert_eq!(
                read(&mut driver, sector, 1),
                vec![0; 512],
                "sector {sector}"
            );
        }
        for sector in [first - 1, first + 3, first + 4, first + 6] {
            assert_eq!(read(&mut driver, sector, 1), vec![sector as u8; 512]);
        }
    }
    let mut out = header(DISCARD, 0);
    out.extend(segment(32, 16, 0));
    assert_eq!(ask(&mut driver, out, 0).0, OK);
    let kept = read(&mut driver, 32, 1);
    assert!(kept == vec![0; 512] || kept == vec![32; 512]);
    assert_eq!(read(&mut driver, 48, 1), vec![48; 512]);
    assert_eq!(file.as_file().metadata().unwrap().len(), SECTORS * 512);
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let file = image();
    let config = BlockConfig {
        read_only: true,
        ..BlockConfig::new(file.path())
    };
    let mut driver = Driver::live(Block::open(&config).unwrap(), ALL);
    assert_ne!(u64::from(driver.function.device_features(0)) & F_RO, 0);
    for (kind, data) in [
        (OUT, vec![9; 512]),
        (DISCARD, segment(0, 1, 0)),
        (WRITE_ZEROES, segment(0, 1, 0)),
    ] {
        let mut out = header(kind, 0);
        out.extend(data);
        assert_eq!(ask(&mut driver, out, 0).0, IOERR, "type {kind}");
    }
    assert_eq!(ask(&mut driver, header(FLUSH, 0), 0).0, OK);
    assert_eq!(read(&mut driver, 1, 1), vec![1; 512]);
}

#[test]
fn a_request_without_room_for_a_status_breaks_the_device_and_still_resets() {
    let file = image();
    let mut driver = disk(&file);
    driver.add(0, &[Buf::Out(header(IN, 0))]);
    driver.kick(0);
    assert_ne!(driver.function.status() & crate::testing::NEEDS_RESET, 0);
    driver.status(0);
    assert_eq!(driver.function.status(), 0);
    driver.start(ALL);
    assert_eq!(read(&mut driver, 3, 1), vec![3; 512]);
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let file = image();
    let driver = disk(&file);
    assert_eq!(driver.function.config_len(), 60);
    let field = |offset, len| {
        let mut bytes = vec![0; 8];
        driver.function.read_config(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes.try_into().unwrap())
    };
    for (name, offset, len, value) in [
        ("capacity", 0, 8, SECTORS),
        ("seg_max", 12, 4, 254),
        ("blk_size", 20, 4, 512),
        ("physical_block_exp", 24, 1, 3),
        ("min_io_size", 26, 2, 8),
        ("num_queues", 34, 2, 1),
        ("max_discard_sectors", 36, 4, 1 << 21),
        ("max_discard_seg", 40, 4, 32),
        ("discard_sector_alignment", 44, 4, 8),
        ("max_write_zeroes_sectors", 48, 4, 1 << 21),
        ("max_write_zeroes_seg", 52, 4, 32),
        ("write_zeroes_may_unmap", 56, 1, 1),
    ] {
        assert_eq!(field(offset, len), value, "{name}");
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let sized = |name: &str, len: u64| {
        File::create(at(name)).unwrap().set_len(len).unwrap();
        at(name)
    };
    rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).unwrap();
    let open = |path: PathBuf| Block::open(&BlockConfig::new(path)).err().unwrap();
    assert!(matches!(open(at("none")), BlockError::Missing(p) if p == at("none")));
    assert!(matches!(open(at("x/none")), BlockError::Missing(_)));
    assert!(matches!(open(dir.path().into()), BlockError::Directory(_)));
    assert!(matches!(open(at("pipe")), BlockError::Kind(_)));
    assert!(matches!(open("/dev/null".into()), BlockError::Kind(_)));
    assert!(matches!(open(sized("empty", 0)), BlockError::Empty(_)));
    assert!(matches!(
        open(sized("odd", 513)),
        BlockError::Length { len: 513, .. }
    ));
    for queues in [0, MAX_QUEUES + 1] {
        let config = BlockConfig {
            queues,
            ..BlockConfig::new(sized("good", 512))
        };
        assert!(matches!(Block::open(&config), Err(BlockError::Queues(_))));
    }
    let path = at("none").display().to_string();
    assert!(open(at("none")).to_string().contains(&path));
}

#[test]
fn permissions_are_told_apart() {
    let denied = || io::Error::from_raw_os_error(libc::EACCES);
    let read_only_fs = io::Error::from_raw_os_error(libc::EROFS);
    let path = std::path::Path::new("disk");
    assert!(matches!(
        file::open_error(path, false, denied()),
        BlockError::NotWritable(_)
    ));
    assert!(matches!(
        file::open_error(path, true, denied()),
        BlockError::NotReadable(_)
    ));
    assert!(matches!(
        file::open_error(path, false, read_only_fs),
        BlockError::NotWritable(_)
    ));
}

#[test]
fn a_disk_has_one_writer_or_many_readers() {
    let file = image();
    let open = |read_only| {
        Block::open(&BlockConfig {
            read_only,
            ..BlockConfig::new(file.path())
        })
    };
    let writer = open(false).unwrap();
    assert!(matches!(open(false), Err(BlockError::InUse(_))));
    assert!(matches!(open(true), Err(BlockError::InUse(_))));
    drop(writer);
    let readers = (open(true).unwrap(), open(true).unwrap());
    assert!(matches!(open(false), Err(BlockError::InUse(_))));
    drop(readers);
    open(false).unwrap();
}

/// Storage in memory that fails, waits and counts as a test says.
#[derive(Default)]
struct Fake {
    fail: bool,
    /// Each read waits for a message; an error lets it pass.
    gate: Option<Mutex<mpsc::Receiver<()>>>,
    /// Reads that were started.
    reads: AtomicU32,
    flushes: Mutex<u32>,
}

impl Fake {
    fn outcome(&self) -> io::Result<()> {
        if self.fail {
            return Err(io::Error::other("injected"));
        }
        Ok(())
    }
}

impl Backend for Fake {
    fn len(&self) -> u64 {
        SECTORS * 512
    }

    fn read(&self, _offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        self.reads.fetch_add(1, SeqCst);
        if let Some(gate) = &self.gate {
            let _ = gate.lock().unwrap().recv();
        }
        for buffer in buffers {
            buffer.copy_from(&vec![7; buffer.len()]);
        }
        self.outcome()
    }

    fn write(&self, _offset: u64, _buffers: &[GuestRead<'_>]) -> io::Result<()> {
        self.outcome()
    }

    fn flush(&self) -> io::Result<()> {
        *self.flushes.lock().unwrap() += 1;
        self.outcome()
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.outcome()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.outcome()
    }
}

fn fake(backend: Fake) -> (Arc<Fake>, Block) {
    let backend = Arc::new(backend);
    let block = Block::with_backend(Arc::clone(&backend) as _, &BlockConfig::new("fake"));
    (backend, block.unwrap())
}

#[test]
fn a_failing_backend_fails_each_request_and_nothing_else() {
    let (_, block) = fake(Fake {
        fail: true,
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    let with = |kind, data: Vec<u8>| [header(kind, 0), data].concat();
    assert_eq!(ask(&mut driver, header(IN, 0), 512).0, IOERR);
    assert_eq!(ask(&mut driver, with(OUT, vec![0; 512]), 0).0, IOERR);
    assert_eq!(ask(&mut driver, header(FLUSH, 0), 0).0, IOERR);
    assert_eq!(
        ask(&mut driver, with(DISCARD, segment(0, 1, 0)), 0).0,
        IOERR
    );
    assert_eq!(
        ask(&mut driver, with(WRITE_ZEROES, segment(0, 1, 0)), 0).0,
        IOERR
    );
    assert_eq!(ask(&mut driver, header(GET_ID, 0), 20).0, OK);
}

#[test]
fn a_driver_that_cannot_flush_has_its_writes_flushed() {
    for (features, flushes) in [(ALL, 0), (ALL & !F_FLUSH, 2)] {
        let (backend, block) = fake(Fake::default());
        let mut driver = Driver::live(block, features);
        let out = [header(OUT, 0), vec![0; 512]].concat();
        assert_eq!(ask(&mut driver, out, 0).0, OK);
        let out = [header(WRITE_ZEROES, 0), segment(0, 1, 0)].concat();
        assert_eq!(ask(&mut driver, out, 0).0, OK);
        assert_eq!(ask(&mut driver, header(IN, 0), 512).0, OK);
        assert_eq!(*backend.flushes.lock().unwrap(), flushes);
    }
}

#[test]
fn a_reset_waits_for_a_stuck_request_and_takes_back_those_behind_it() {
    let (go, gate) = mpsc::channel();
    let (backend, block) = fake(Fake {
        gate: Some(Mutex::new(gate)),
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    let bufs = [Buf::Out(header(IN, 0)), Buf::In(512), Buf::In(1)];
    let added = [0; 3].map(|_| driver.add(0, &bufs));
    let status_at = added[0].writable[1].0;
    driver.kick(0);
    driver.until("the first read", |_| backend.reads.load(SeqCst) == 1);
    driver.status(0);
    assert_ne!(driver.function.status(), 0);
    assert!(driver.function.is_resetting());
    drop(go);
    driver.until("the reset", |d| d.function.status() == 0);
    assert_eq!(backend.reads.load(SeqCst), 1);
    assert_eq!(driver.used(0), None);
    assert!(driver.interrupts.take().is_empty());
    // The data of the first was on its way, but nobody looks at its status any more.
    let untouched = added.map(|chain| driver.written(&chain).iter().all(|b| *b == 0xee));
    assert_eq!(untouched, [false, true, true]);
    assert_eq!(driver.bytes(status_at, 1), [0xee]);
    driver.start(ALL);
    assert_eq!(read(&mut driver, 0, 1), vec![7; 512]);
}

#[test]
fn a_gate_closed_in_flight_still_gets_its_answer() {
    let (go, gate) = mpsc::channel();
    let (_, block) = fake(Fake {
        gate: Some(Mutex::new(gate)),
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    driver.add(0, &[Buf::Out(header(IN, 0)), Buf::In(512), Buf::In(1)]);
    driver.kick(0);
    driver.function.close(Reasons::PAUSED);
    driver.add(0, &[Buf::Out(header(GET_ID, 0)), Buf::In(20), Buf::In(1)]);
    driver.kick(0);
    drop(go);
    assert_eq!(driver.wait_used(0).1, 513);
    driver.turn();
    assert_eq!(driver.used(0), None, "fetched through a closed gate");
    driver.function.reopen(Reasons::PAUSED);
    assert_eq!(driver.wait_used(0).1, 21);
}

#[test]
fn dropping_a_disk_drops_what_waits_behind_a_request() {
    let (go, gate) = mpsc::channel();
    let (_, block) = fake(Fake {
        gate: Some(Mutex::new(gate)),
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    for _ in 0..5 {
        driver.add(0, &[Buf::Out(header(IN, 0)), Buf::In(512), Buf::In(1)]);
    }
    driver.kick(0);
    go.send(()).unwrap();
    driver.wait_used(0);
    drop(go);
    drop(driver);
}

#[test]
fn a_disk_whose_storage_is_stuck_can_be_dropped() {
    let (go, gate) = mpsc::channel();
    let (backend, block) = fake(Fake {
        gate: Some(Mutex::new(gate)),
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    driver.add(0, &[Buf::Out(header(IN, 0)), Buf::In(512), Buf::In(1)]);
    driver.kick(0);
    driver.until("the read", |_| backend.reads.load(SeqCst) == 1);
    let (dropped, done) = mpsc::channel();
    std::thread::spawn(move || {
        drop(driver);
        // The test may have given up.
        let _ = dropped.send(());
    });
    let outcome = done.recv_timeout(crate::testing::PATIENCE);
    assert!(outcome.is_ok(), "it waits for its storage");
    drop(go);
}

#[test]
fn chains_of_very_many_buffers_are_not_all_held_at_once() {
    let (go, gate) = mpsc::channel();
    let (_, block) = fake(Fake {
        gate: Some(Mutex::new(gate)),
        ..Fake::default()
    });
    let mut driver = Driver::live(block, ALL);
    // One indirect table of header, 60 sectors in buffers of one byte, status; used by each request.
    let count: u16 = 60 * 512 + 2;
    let table = 0x80_0000u64;
    let placed = driver.place(&[Buf::Out(header(IN, 0)), Buf::In(1)]);
    for slot in 0..count {
        let (addr, len, flags) = if slot == 0 { placed[0] } else { placed[1] };
        let next = if slot + 1 == count { 0 } else { 1 };
        driver.descriptor(table, slot, addr, len, flags | next, slot + 1);
    }
    assert!(table as usize + 16 * usize::from(count) < RAM);
    let ring = driver.rings[0].table;
    for slot in 0..8 {
        driver.descriptor(ring, slot, table, 16 * usize::from(count), 4, 0);
        driver.publish(0, slot);
    }
    driver.kick(0);
    // Nothing more is fetched from here on, so what comes back is what was held.
    driver.function.close(Reasons::PAUSED);
    drop(go);
    for _ in 0..3 {
        assert_eq!(driver.wait_used(0).1, 60 * 512 + 1);
    }
    assert!(
        driver
            .function
            .stop(Reasons::PAUSED, Patience::prompt(std::time::Duration::ZERO))
    );
    assert_eq!(driver.used(0), None);
    driver.function.reopen(Reasons::PAUSED);
    for _ in 3..8 {
        driver.wait_used(0);
    }
}

/// Disks that take a while, and the threads that served them.
struct Slow {
    threads: Arc<Mutex<std::collections::HashSet<std::thread::ThreadId>>>,
    reads: Mutex<Vec<u64>>,
}

impl Backend for Slow {
    fn len(&self) -> u64 {
        SECTORS * 512
    }

    fn read(&self, offset: u64, _buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        self.reads.lock().unwrap().push(offset);
        self.threads
            .lock()
            .unwrap()
            .insert(std::thread::current().id());
        std::thread::yield_now();
        Ok(())
    }

    fn write(&self, _offset: u64, _buffers: &[GuestRead<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn disks_of_a_pool_share_its_threads_and_each_keeps_its_order() {
    let pool = Pool::new(2);
    let threads = Arc::default();
    let mut disks: Vec<_> = (0..20)
        .map(|_| {
            let backend = Arc::new(Slow {
                threads: Arc::clone(&threads),
                reads: Mutex::default(),
            });
            let config = BlockConfig::new("slow");
            let block = Block::with_backend(Arc::clone(&backend) as _, &config).unwrap();
            (backend, Driver::live(block.sharing(&pool), ALL))
        })
        .collect();
    for (_, driver) in &mut disks {
        for sector in 0..40 {
            driver.add(0, &[Buf::Out(header(IN, sector)), Buf::In(512), Buf::In(1)]);
        }
        driver.kick(0);
    }
    let expected: Vec<u64> = (0..40).map(|sector| sector * 512).collect();
    for (backend, driver) in &mut disks {
        let mut used = 0;
        driver.until("all requests", |d| {
            while d.used(0).is_some() {
                used += 1;
            }
            used == 40
        });
        assert_eq!(*backend.reads.lock().unwrap(), expected);
    }
    assert!((1..=2).contains(&threads.lock().unwrap().len()));
    // A disk that goes with its pool in use, and the pool after it.
    drop(pool);
    disks.truncate(1);
    let (_, driver) = &mut disks[0];
    assert_eq!(ask(driver, header(IN, 0), 512).0, OK);
}

/// A disk that works on one request at a time, each for as long as the test says, and the driver of it.
fn gated(requests: u64) -> (mpsc::Sender<()>, Arc<Gated>, Driver) {
    let (go, gate) = mpsc::channel();
    let backend = Arc::new(Gated {
        gate: Mutex::new(gate),
        reads: Mutex::default(),
    });
    let config = BlockConfig::new("gated");
    let block = Block::with_backend(Arc::clone(&backend) as _, &config).unwrap();
    let mut driver = Driver::live(block, ALL);
    for sector in 0..requests {
        driver.add(0, &[Buf::Out(header(IN, sector)), Buf::In(512), Buf::In(1)]);
    }
    driver.kick(0);
    (go, backend, driver)
}

/// See [`gated`].
struct Gated {
    gate: Mutex<mpsc::Receiver<()>>,
    reads: Mutex<Vec<u64>>,
}

impl Backend for Gated {
    fn len(&self) -> u64 {
        SECTORS * 512
    }

    fn read(&self, offset: u64, _buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        self.reads.lock().unwrap().push(offset / 512);
        // An error means that the test lets all of them go.
        let _ = self.gate.lock().unwrap().recv();
        Ok(())
    }

    fn write(&self, _offset: u64, _buffers: &[GuestRead<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stop_waits_for_the_request_that_storage_works_on_and_for_none_behind_it() {
    let (go, backend, mut driver) = gated(40);
    driver.until("the first read", |_| {
        !backend.reads.lock().unwrap().is_empty()
    });
    let soon = Patience::prompt(std::time::Duration::from_millis(20));
    assert!(!driver.function.stop(Reasons::PAUSED, soon));
    let owned = driver.function.save().queues[0]
        .split()
        .unwrap()
        .owned
        .len();
    assert_eq!(owned, 40, "the one in flight is among them");
    go.send(()).unwrap();
    driver.until("the first request", |d| d.used(0).is_some());
    assert!(driver.function.stop(Reasons::PAUSED, soon));
    assert_eq!(*backend.reads.lock().unwrap(), [0]);

    drop(go);
    driver.function.reopen(Reasons::PAUSED);
    let mut heads = Vec::new();
    driver.until("all others", |d| {
        heads.extend(std::iter::from_fn(|| d.used(0)).map(|(head, _)| head));
        heads.len() == 39
    });
    let expected: Vec<u64> = (0..40).collect();
    assert_eq!(*backend.reads.lock().unwrap(), expected);
}

#[test]
fn a_stop_recalls_when_its_patience_says_so_and_not_before() {
    let (go, backend, mut driver) = gated(3);
    driver.until("the first read", |_| {
        !backend.reads.lock().unwrap().is_empty()
    });
    let soon = std::time::Duration::from_millis(20);
    let function = Arc::clone(&driver.function);
    assert!(!function.stop(Reasons::PAUSED, Patience::complete(soon)));
    drop(go);
    driver.until("all of them", |d| {
        d.function.stop(
            Reasons::PAUSED,
            Patience::complete(std::time::Duration::ZERO),
        )
    });
    assert_eq!(*backend.reads.lock().unwrap(), [0, 1, 2]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever is in a chain, it comes back exactly once, or the device asks for a reset and can be reset.
    #[test]
    fn hostile_requests_come_back_once_or_break_the_device(
        requests in prop::collection::vec((
            prop::collection::vec(0usize..40, 0..4),
            prop::collection::vec(0usize..1200, 0..3),
            prop_oneof![0u32..16, any::<u32>()],
            prop_oneof![0u64..70, any::<u64>()],
            any::<[u8; 8]>(),
        ), 1..12),
    ) {
        let file = image();
        let mut driver = disk(&file);
        let mut heads = Vec::new();
        for (out, into, kind, sector, noise) in requests {
            let mut bytes = header(kind, sector);
            bytes.extend(noise.iter().cycle().take(140));
            let mut bufs = Vec::new();
            for len in out {
                bufs.push(Buf::Out(bytes.drain(..len.min(bytes.len())).collect()));
            }
            bufs.extend(into.into_iter().map(Buf::In));
            if bufs.is_empty() {
                continue;
            }
            heads.push(driver.add(0, &bufs).head);
        }
        driver.kick(0);
        let mut used = Vec::new();
        driver.until("all chains", |d| {
            while let Some((head, _)) = d.used(0) {
                used.push(head);
            }
            used.len() == heads.len() || d.function.status() & crate::testing::NEEDS_RESET != 0
        });
        driver.status(0);
        driver.until("the reset", |d| d.function.status() == 0);
        while let Some((head, _)) = driver.used(0) {
            used.push(head);
        }
        used.sort_unstable();
        let all = used.len();
        used.dedup();
        prop_assert_eq!(all, used.len(), "a chain was used twice");
        prop_assert!(used.iter().all(|head| heads.contains(head)));
    }
}
