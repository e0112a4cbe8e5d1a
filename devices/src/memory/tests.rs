use super::*;
use std::os::unix::fs::FileExt;
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

fn ranges() -> [RamRange; 2] {
    [
        RamRange {
            start: GuestAddress(0),
            len: 4 * PAGE_SIZE,
        },
        RamRange {
            start: GuestAddress(0x1_0000_0000),
            len: 2 * PAGE_SIZE,
        },
    ]
}

/// A file in which each byte is the number of its page, and whose length is `pages`.
fn file(pages: usize) -> std::fs::File {
    let bytes: Vec<u8> = (0..pages * PAGE_SIZE)
        .map(|at| (at / PAGE_SIZE) as u8)
        .collect();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    file
}

fn from_file(pages: usize, offsets: &[u64]) -> Result<Arc<GuestRam>, MemoryError> {
    let backing = Backing::File {
        file: file(pages),
        offsets: offsets.into(),
    };
    GuestRam::with_backing(&ranges(), backing)
}

fn memfd(bytes: usize) -> Arc<GuestRam> {
    let range = RamRange {
        start: GuestAddress(0),
        len: bytes,
    };
    GuestRam::with_backing(&[range], Backing::memfd(bytes as u64).unwrap()).unwrap()
}

/// The lines of smaps about the mapping that holds `address`.
fn smaps(address: *mut u8) -> String {
    let all = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut found: Option<String> = None;
    for line in all.lines() {
        let bounds = line
            .split_once(' ')
            .and_then(|(range, _)| range.split_once('-'))
            .and_then(|(a, b)| {
                Some((
                    usize::from_str_radix(a, 16).ok()?,
                    usize::from_str_radix(b, 16).ok()?,
                ))
            });
        if let Some((start, end)) = bounds {
            found = (start..end)
                .contains(&address.addr())
                .then(String::new)
                .or(found.filter(|text| text.contains("VmFlags")));
        }
        if let Some(text) = &mut found
            && !text.contains("VmFlags")
        {
            text.push_str(line);
            text.push('\n');
        }
    }
    found.unwrap()
}

#[test]
fn no_backing_is_in_a_core_dump() {
    let two = 6 * PAGE_SIZE as u64;
    for backing in [
        Backing::Anonymous,
        Backing::memfd(two).unwrap(),
        Backing::File {
            file: file(6),
            offsets: vec![0, 4 * PAGE_SIZE as u64],
        },
    ] {
        let text = format!("{backing:?}");
        let ram = GuestRam::with_backing(&ranges(), backing).unwrap();
        for (range, start) in ram.host_addresses() {
            for at in [start, start.wrapping_add(range.len - 1)] {
                let map = smaps(at);
                let flags = map.lines().find(|line| line.starts_with("VmFlags"));
                assert!(flags.unwrap().contains(" dd"), "{text}: {map}");
            }
        }
    }
}

#[test]
fn the_ranges_of_a_memfd_are_packed_and_shared() {
    let backing = Backing::memfd(6 * PAGE_SIZE as u64).unwrap();
    let ram = GuestRam::with_backing(&ranges(), backing).unwrap();
    let view = ram.view().unwrap();
    view.write_obj(7u8, GuestAddress(0x1_0000_1000)).unwrap();
    let received = Backing::Memfd(ram.memfd().unwrap().try_clone_to_owned().unwrap());
    let other = GuestRam::with_backing(&ranges(), received).unwrap();
    let there: u8 = other
        .view()
        .unwrap()
        .read_obj(GuestAddress(0x1_0000_1000))
        .unwrap();
    assert_eq!(there, 7);
    assert_eq!(
        ram.occupied(1, 0),
        Some(PAGE_SIZE..2 * PAGE_SIZE),
        "nothing else was touched"
    );
    assert_eq!(ram.occupied(0, 0), None);
    assert_eq!(ram.occupied(1, 2 * PAGE_SIZE), None);
    assert_eq!(ram.occupied(2, 0), None);
}

#[test]
fn a_memfd_that_could_shrink_or_is_too_short_is_refused() {
    let shrinks = rustix::fs::memfd_create(c"test", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&shrinks, 6 * PAGE_SIZE as u64).unwrap();
    let outcome = GuestRam::with_backing(&ranges(), Backing::Memfd(shrinks));
    assert!(matches!(outcome, Err(MemoryError::NotSealed)));
    let short = Backing::memfd(5 * PAGE_SIZE as u64).unwrap();
    let outcome = GuestRam::with_backing(&ranges(), short);
    assert!(matches!(outcome, Err(MemoryError::TooShort { .. })));
    let outcome = GuestRam::with_backing(&ranges(), Backing::Memfd(file(6).into()));
    assert!(outcome.is_err());
}

#[test]
fn a_file_is_read_from_its_offsets_and_never_written() {
    let page = PAGE_SIZE as u64;
    let kept = file(9);
    let backing = Backing::File {
        file: kept.try_clone().unwrap(),
        offsets: vec![5 * page, 2 * page],
    };
    let ram = GuestRam::with_backing(&ranges(), backing).unwrap();
    let view = ram.view().unwrap();
    let at = |address| view.read_obj::<u8>(GuestAddress(address)).unwrap();
    assert_eq!(
        [
            at(0),
            at(3 * page + 17),
            at(0x1_0000_0000),
            at(0x1_0000_1fff)
        ],
        [5, 8, 2, 3]
    );
    assert!(
        ram.dirty_pages()
            .take()
            .concat()
            .iter()
            .all(|word| *word == 0)
    );
    view.write_obj(99u8, GuestAddress(0)).unwrap();
    assert_eq!(at(0), 99);
    assert!(ram.dirty_pages().is_dirty(GuestAddress(0)));
    let mut there = [0];
    kept.read_exact_at(&mut there, 5 * page).unwrap();
    assert_eq!(there, [5]);
    let mut done = Vec::new();
    ram.prefault(|bytes| done.push(bytes)).unwrap();
    assert_eq!(done.last(), Some(&ram.len()));
    assert_eq!(at(0), 99);
}

#[test]
fn a_file_that_is_too_short_or_badly_placed_is_refused() {
    let page = PAGE_SIZE as u64;
    assert!(from_file(6, &[0, 4 * page]).is_ok());
    for (pages, offsets) in [(5, [0, 4 * page]), (6, [3 * page, 0]), (0, [0, 0])] {
        let outcome = from_file(pages, &offsets);
        assert!(
            matches!(outcome, Err(MemoryError::TooShort { .. })),
            "{pages} {offsets:?}: {outcome:?}"
        );
    }
    for offsets in [[1, 0], [u64::MAX - 4095, 0]] {
        let outcome = from_file(6, &offsets);
        assert!(
            matches!(outcome, Err(MemoryError::Offset(_))),
            "{offsets:?}: {outcome:?}"
        );
    }
    assert!(matches!(
        from_file(6, &[0]),
        Err(MemoryError::Offsets(1, 2))
    ));
    let pipe = rustix::pipe::pipe().unwrap();
    let backing = Backing::File {
        file: pipe.0.into(),
        offsets: vec![0, 0],
    };
    let outcome = GuestRam::with_backing(&ranges(), backing);
    assert!(matches!(outcome, Err(MemoryError::NotAFile)), "{outcome:?}");
}

#[test]
fn a_file_stays_locked_for_readers_until_the_ram_is_gone() {
    use rustix::fs::{FlockOperation, flock};
    let named = tempfile::NamedTempFile::new().unwrap();
    named.as_file().set_len(6 * PAGE_SIZE as u64).unwrap();
    let open = || std::fs::File::open(named.path()).unwrap();
    let map = |file| {
        let offsets = vec![0, 4 * PAGE_SIZE as u64];
        GuestRam::with_backing(&ranges(), Backing::File { file, offsets })
    };
    let (first, second) = (map(open()).unwrap(), map(open()).unwrap());
    let writer = open();
    drop(first);
    assert!(flock(&writer, FlockOperation::NonBlockingLockExclusive).is_err());
    let view = second.view().unwrap();
    drop(second);
    assert!(flock(&writer, FlockOperation::NonBlockingLockExclusive).is_err());
    drop(view);
    flock(&writer, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(matches!(map(open()), Err(MemoryError::InUse)));
}

#[test]
fn collapse_leaves_the_bytes_and_the_untouched_pages_alone() {
    const LARGE: usize = 2 << 20;
    let ram = memfd(3 * LARGE);
    let view = ram.view().unwrap();
    for page in 0..LARGE / PAGE_SIZE {
        view.write_obj(page as u32, GuestAddress((LARGE + page * PAGE_SIZE) as u64))
            .unwrap();
    }
    let large = ram.collapse(GuestAddress(0), 3 * LARGE as u64);
    // None where the kernel cannot.
    assert!(large <= 1, "{large}");
    let (_, start) = ram.host_addresses().next().unwrap();
    let mapped = smaps(start).contains("ShmemPmdMapped:     2048 kB");
    assert_eq!(mapped, large == 1, "{}", smaps(start));
    for page in 0..LARGE / PAGE_SIZE {
        let value: u32 = view
            .read_obj(GuestAddress((LARGE + page * PAGE_SIZE) as u64))
            .unwrap();
        assert_eq!(value, page as u32);
    }
    assert_eq!(ram.occupied(0, 0), Some(LARGE..2 * LARGE));
    assert_eq!(
        ram.collapse(GuestAddress(LARGE as u64 + 1), LARGE as u64),
        0
    );
    assert_eq!(ram.collapse(GuestAddress(1 << 40), u64::MAX), 0);
}

#[test]
fn what_is_about_to_be_written_gets_large_pages_and_nothing_else_does() {
    const LARGE: usize = 2 << 20;
    let range = |start, len| RamRange {
        start: GuestAddress(start),
        len,
    };
    let ranges = [range(0, 4 * LARGE), range(1 << 32, 3 * LARGE)];
    let backing = Backing::memfd(7 * LARGE as u64).unwrap();
    let ram = GuestRam::with_backing(&ranges, backing).unwrap();
    let view = ram.view().unwrap();
    view.write_obj(7u8, GuestAddress(LARGE as u64 + 5)).unwrap();
    let pages = |index, from| ram.occupied(index, from);
    if ram.enlarge(GuestAddress(LARGE as u64 + 1), LARGE as u64) == 0 {
        // The kernel cannot.
        return;
    }
    assert_eq!(pages(0, 0), Some(LARGE..3 * LARGE));
    assert_eq!((pages(0, 3 * LARGE), pages(1, 0)), (None, None));
    let value: u8 = view.read_obj(GuestAddress(LARGE as u64 + 5)).unwrap();
    assert_eq!(value, 7);
    let second = ram.enlarge(GuestAddress((1 << 32) + 2 * LARGE as u64), 1 << 40);
    assert_eq!(second, LARGE as u64);
    assert_eq!(pages(1, 0), Some(2 * LARGE..3 * LARGE));
    assert_eq!(ram.enlarge(GuestAddress(1 << 40), u64::MAX), 0);
    assert_eq!(ram.enlarge(GuestAddress(0), 0), 0);
    let anonymous = GuestRam::new(&ranges).unwrap();
    assert_eq!(anonymous.enlarge(GuestAddress(0), LARGE as u64), 0);
    assert!(ram.dirty_pages().take()[1].iter().all(|word| *word == 0));
}

#[test]
fn marks_are_taken_once_and_can_be_put_back() {
    let ram = two_ranges();
    let view = ram.view().unwrap();
    view.write_slice(&[1; 2], GuestAddress(PAGE_SIZE as u64 * 2 - 1))
        .unwrap();
    view.write_obj(1u8, GuestAddress(0x1_0000_1000)).unwrap();
    let taken = ram.dirty_pages().take();
    assert_eq!(taken, [[0b0110], [0b10]]);
    assert_eq!(ram.dirty_pages().take(), [[0], [0]]);
    view.write_obj(1u8, GuestAddress(0)).unwrap();
    ram.dirty_pages().put_back(&taken);
    assert_eq!(ram.dirty_pages().take(), [[0b0111], [0b10]]);
    ram.dirty_pages()
        .put_back(&[vec![u64::MAX; 9], vec![u64::MAX; 9], vec![1]]);
    assert_eq!(ram.dirty_pages().take(), [[0b1111], [0b11]]);
}

/// The reader keeps a copy that it brings up to date with what it takes; when the writers are done, nothing is missing.
#[test]
fn no_mark_is_lost_to_one_that_is_being_taken() {
    const PAGES: usize = 200;
    let range = RamRange {
        start: GuestAddress(0),
        len: PAGES * PAGE_SIZE,
    };
    let ram = GuestRam::new(&[range]).unwrap();
    let running = std::sync::atomic::AtomicUsize::new(2);
    let reader = ram.view().unwrap();
    let mut copy = [0u64; PAGES];
    let mut bring_up_to_date = || {
        for (word, bits) in ram.dirty_pages().take()[0].iter().enumerate() {
            for bit in (0..64).filter(|bit| bits >> bit & 1 != 0) {
                let page = word * 64 + bit;
                copy[page] = reader
                    .read_obj(GuestAddress((page * PAGE_SIZE) as u64))
                    .unwrap();
            }
        }
        copy
    };
    std::thread::scope(|scope| {
        for writer in 0..2usize {
            let view = ram.view().unwrap();
            let running = &running;
            scope.spawn(move || {
                for n in 0..40_000usize {
                    let page = (n * 7 + writer) % (PAGES / 2) * 2 + writer;
                    view.write_obj(n as u64 + 1, GuestAddress((page * PAGE_SIZE) as u64))
                        .unwrap();
                }
                running.fetch_sub(1, Ordering::SeqCst);
            });
        }
        while running.load(Ordering::SeqCst) != 0 {
            bring_up_to_date();
        }
    });
    let copy = bring_up_to_date();
    for (page, value) in copy.iter().enumerate() {
        let there: u64 = reader
            .read_obj(GuestAddress((page * PAGE_SIZE) as u64))
            .unwrap();
        assert_eq!(*value, there, "page {page}");
    }
}

#[test]
fn what_a_device_may_write_is_marked_when_it_is_given_up() {
    let ram = two_ranges();
    let view = ram.view().unwrap();
    let reads: Vec<_> = view.lend_to_read(GuestAddress(0), PAGE_SIZE).collect();
    drop(reads);
    assert_eq!(ram.dirty_pages().take(), [[0], [0]]);
    let slice = view
        .lend_to_write(GuestAddress(PAGE_SIZE as u64 - 1), 2)
        .next()
        .unwrap()
        .unwrap();
    assert_eq!((slice.len(), slice.iovec().iov_len), (2, 2));
    assert_eq!(
        ram.dirty_pages().take(),
        [[0], [0]],
        "not before it is written"
    );
    drop(slice);
    assert_eq!(ram.dirty_pages().take(), [[0b11], [0]]);
}

/// All pages in which something may be, by their number in the range.
fn occupied(ram: &GuestRam, index: usize) -> Vec<usize> {
    let mut pages = Vec::new();
    let mut at = 0;
    while let Some(piece) = ram.occupied(index, at) {
        assert!(at <= piece.start && piece.start < piece.end);
        pages.extend(piece.start / PAGE_SIZE..piece.end.div_ceil(PAGE_SIZE));
        at = piece.end;
    }
    pages
}

#[test]
fn anonymous_memory_is_occupied_where_it_was_touched() {
    let ram = two_ranges();
    let view = ram.view().unwrap();
    assert_eq!((occupied(&ram, 0), occupied(&ram, 1)), (vec![], vec![]));
    for page in [0u64, 2, 3] {
        view.write_obj(1u8, GuestAddress(page * 4096 + 5)).unwrap();
    }
    view.write_obj(1u8, GuestAddress(0x1_0000_1000)).unwrap();
    assert_eq!(
        (occupied(&ram, 0), occupied(&ram, 1)),
        (vec![0, 2, 3], vec![1])
    );
    assert_eq!(
        ram.occupied(0, PAGE_SIZE + 1),
        Some(2 * PAGE_SIZE..4 * PAGE_SIZE)
    );
    assert_eq!(
        ram.occupied(0, 2 * PAGE_SIZE + 1),
        Some(2 * PAGE_SIZE + 1..4 * PAGE_SIZE)
    );
}

#[test]
fn a_private_mapping_is_occupied_where_the_file_is_or_the_guest_wrote() {
    let page = PAGE_SIZE as u64;
    let kept = tempfile::tempfile().unwrap();
    kept.set_len(5000 * page).unwrap();
    for at in [1, 4005] {
        kept.write_all_at(&[1], at * page).unwrap();
    }
    let range = RamRange {
        start: GuestAddress(0),
        len: 4990 * PAGE_SIZE,
    };
    let backing = Backing::File {
        file: kept,
        offsets: vec![page],
    };
    let ram = GuestRam::with_backing(&[range], backing).unwrap();
    let view = ram.view().unwrap();
    // Where the file system has blocks larger than a page, more of it is data.
    let before = occupied(&ram, 0);
    assert!(before.contains(&0) && before.contains(&4004), "{before:?}");
    assert!(before.len() < 100, "{before:?}");
    // To read a hole changes nothing.
    assert_eq!(view.read_obj::<u8>(GuestAddress(3000 * page)).unwrap(), 0);
    assert_eq!(occupied(&ram, 0), before);
    let mut after = before;
    for at in [2000, 2001, 4004, 4989] {
        view.write_obj(0u8, GuestAddress(at as u64 * page)).unwrap();
        after.push(at);
    }
    after.sort_unstable();
    after.dedup();
    assert_eq!(occupied(&ram, 0), after);
}
