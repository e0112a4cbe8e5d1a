//! Memory that changes while it is written.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use migration::{Existing, Guest, GuestPages, PageSet, Progress, WriteError, Writer};
use proptest::prelude::*;

use crate::guest::{Memory, P, layout};
use crate::{names, on, open, scratch};

/// What happens to the guest before a pass: pages that become zero or get a value.
type Step = Vec<(u64, u64)>;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0u64..150, prop_oneof![Just(0u64), 1u64..]);
    proptest::collection::vec(proptest::collection::vec(write, 0..60), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Whatever is written in between, and whichever pages are written twice: it is the memory of the last pass.
    #[test]
    fn a_page_is_what_it_was_when_it_was_written_last(
        steps in steps(),
        split in 0u64..150,
        again in proptest::collection::btree_set(0u64..150, 0..40),
    ) {
        let directory = scratch();
        let target = directory.path().join("snap");
        let layout = layout(&[70, 80]);
        let memory = Memory::new(&layout);
        let writer = Writer::create(&target, Existing::Refuse).unwrap();
        let mut file = writer.memory(&layout, None).unwrap();
        // All pages, in two parts.
        let mut upper = PageSet::empty(&layout);
        upper.insert_run(split, 150);
        let mut lower = PageSet::full(&layout);
        lower.subtract(&upper);
        let mut parts = vec![upper, lower];
        for step in steps {
            for (page, value) in step {
                memory.fill(page, value);
            }
            let mut pages = memory.take();
            if let Some(part) = parts.pop() {
                pages.union_with(&part);
            }
            let pass = file.pass(&memory, &pages, Guest::Running, &mut on).unwrap();
            prop_assert_eq!(pass.pages, pages.count());
        }
        for part in parts {
            file.pass(&memory, &part, Guest::Paused, &mut on).unwrap();
        }
        let mut twice = PageSet::empty(&layout);
        again.iter().for_each(|page| twice.insert(*page));
        file.pass(&memory, &twice, Guest::Paused, &mut on).unwrap();
        let file = file.finish(&mut on).unwrap();
        writer.commit(b"{}", file).unwrap();
        let bytes = memory.bytes();
        let bin = std::fs::read(target.join("memory.bin")).unwrap();
        prop_assert!(bin[..bytes.len()] == bytes[..]);
        let image = open(&target);
        let data = image.verify(&mut on).unwrap();
        let filled = (0..150).filter(|page| memory.read(*page, 0) != 0).count();
        prop_assert_eq!(data[0].count(), filled as u64);
        // Pages that became zero are holes again, except where blocks are larger than pages.
        prop_assert_eq!(image.header().data_pages, filled as u64);
    }
}

#[test]
fn nothing_is_lost_of_what_others_write_during_the_passes() {
    let directory = scratch();
    for round in 0..4u64 {
        let target = directory.path().join(round.to_string());
        let layout = layout(&[300, 500]);
        let memory = Memory::new(&layout);
        (0..800).for_each(|page| memory.fill(page, page));
        let writer = Writer::create(&target, Existing::Refuse).unwrap();
        let mut file = writer.memory(&layout, None).unwrap();
        let stop = AtomicBool::new(false);
        let writes = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for thread in 0..2u64 {
                let (memory, stop, writes) = (&memory, &stop, &writes);
                scope.spawn(move || {
                    let mut n = round * 1000 + thread;
                    while !stop.load(Ordering::SeqCst) {
                        n = n
                            .wrapping_mul(6364136223846793005)
                            .wrapping_add(1442695040888963407);
                        let (page, word) = (n >> 33 & 0x3ff, n >> 50 & 0x1ff);
                        // Every fourth write makes a page zero, as far as this thread is concerned.
                        let value = if n >> 20 & 3 == 0 { 0 } else { n };
                        match page % 800 {
                            page if value == 0 => memory.fill(page, 0),
                            page => memory.write(page, word, value),
                        }
                        writes.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
            let mut pages = PageSet::full(&layout);
            memory.take();
            for _ in 0..5 {
                let before = writes.load(Ordering::SeqCst);
                file.pass(&memory, &pages, Guest::Running, &mut on).unwrap();
                while writes.load(Ordering::SeqCst) < before + 20 {
                    std::thread::yield_now();
                }
                pages = memory.take();
            }
            stop.store(true, Ordering::SeqCst);
            memory.put_back(&pages);
        });
        let last = memory.take();
        file.pass(&memory, &last, Guest::Paused, &mut on).unwrap();
        let file = file.finish(&mut on).unwrap();
        writer.commit(b"{}", file).unwrap();
        let image = open(&target);
        image.verify(&mut on).unwrap();
        let loaded = Memory::new(&layout);
        image.load(&loaded, &mut on).unwrap();
        assert!(loaded.bytes() == memory.bytes(), "round {round}");
    }
}

#[test]
fn progress_comes_to_the_whole_and_can_end_it() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(&[1000, 24]);
    let memory = Memory::new(&layout);
    (0..1024).for_each(|page| memory.write(page, 5, 5));
    let writer = Writer::create(&directory.path().join("snap"), Existing::Refuse).unwrap();
    let mut file = writer.memory(&layout, None).unwrap();
    let mut seen = Vec::new();
    let all = PageSet::full(&layout);
    file.pass(&memory, &all, Guest::Running, &mut |at| {
        seen.push(at);
        on(at)
    })
    .unwrap();
    assert!(seen.len() > 2 && seen.is_sorted_by_key(|at| at.done));
    let total = 1024 * P;
    assert_eq!(seen.last(), Some(&Progress { done: total, total }));

    let mut calls = 0;
    let outcome = file.pass(&memory, &all, Guest::Running, &mut |_| {
        calls += 1;
        ControlFlow::Break(())
    });
    assert!(matches!(outcome, Err(WriteError::Cancelled)) && calls == 1);
    let outcome = file.pass(&memory, &all, Guest::Running, &mut on);
    assert!(matches!(outcome, Err(WriteError::Failed)), "half is there");
    assert!(matches!(file.finish(&mut on), Err(WriteError::Failed)));
    drop(writer);
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn digest_and_reading_can_be_ended_too() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(&[10]);
    let memory = Memory::new(&layout);
    memory.fill(0, 1);
    let target = directory.path().join("snap");
    let writer = Writer::create(&target, Existing::Refuse).unwrap();
    let mut file = writer.memory(&layout, None).unwrap();
    let all = PageSet::full(&layout);
    file.pass(&memory, &all, Guest::Paused, &mut on).unwrap();
    let stop = &mut |_: Progress| ControlFlow::Break(());
    assert!(matches!(file.finish(stop), Err(WriteError::Cancelled)));
    drop(writer);
    crate::save_all(&memory, &target);
    let image = open(&target);
    assert!(image.verify(stop).is_err());
    assert!(image.load(&Memory::new(&layout), stop).is_err());
}

#[test]
fn a_full_snapshot_that_lacks_a_page_is_not_finished() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(&[10]);
    let memory = Memory::new(&layout);
    let writer = Writer::create(&directory.path().join("snap"), Existing::Refuse).unwrap();
    let mut file = writer.memory(&layout, None).unwrap();
    let mut pages = PageSet::full(&layout);
    pages.remove_run(4, 2);
    file.pass(&memory, &pages, Guest::Paused, &mut on).unwrap();
    assert_eq!(*file.written(), pages);
    assert!(matches!(
        file.finish(&mut on),
        Err(WriteError::Incomplete(2))
    ));
}

#[test]
fn memory_of_another_layout_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (layout(&[10]), layout(&[5, 5]));
    let writer = Writer::create(&directory.path().join("snap"), Existing::Refuse).unwrap();
    let mut file = writer.memory(&one, None).unwrap();
    let memory = Memory::new(&other);
    let outcome = file.pass(&memory, &PageSet::full(&one), Guest::Paused, &mut on);
    assert!(matches!(outcome, Err(WriteError::Layout)));
    let memory = Memory::new(&one);
    let outcome = file.pass(&memory, &PageSet::full(&other), Guest::Paused, &mut on);
    assert!(matches!(outcome, Err(WriteError::Layout)));
    let outcome = file.pass(
        &memory,
        &PageSet::full(memory.layout()),
        Guest::Paused,
        &mut on,
    );
    outcome.unwrap();
}
