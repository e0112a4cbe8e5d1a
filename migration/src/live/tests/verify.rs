//! All of memory compared.

use proptest::prelude::*;

use super::*;
use crate::live::destination::Failure;
use crate::live::pages::Pending;
use crate::live::verify::{Comparing, Difference, send};
use crate::wire::connection::Received;
use crate::wire::frame::{Kind, PageTable};
use crate::wire::message::{Purpose, Range};
use crate::wire::{Message, WireError};

/// What the holder of `there` finds, when the one of `here` sends its checksums.
fn compare(here: &Ram, there: &Ram) -> Option<Difference> {
    let (mut source, mut destination) = pair();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || send(&mut source, here, &mut |_| Ok(())));
        let mut comparing = Comparing::default();
        while let Ok(received) = destination.receive() {
            let Received::Sums(body) = received else {
                panic!("{received:?}");
            };
            comparing.sums(there, &body).unwrap();
        }
        sending.join().unwrap().unwrap();
        comparing.finish(there)
    })
}

/// Pages and their contents.
fn contents() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..PAGES, 0u64..3), 0..40)
}

proptest! {
    #[test]
    fn the_pages_that_differ_are_counted_and_the_first_is_named(
        common in contents(), here in contents(), there in contents()
    ) {
        let (mut source, mut destination) = (Ram::new(), Ram::new());
        for (page, value) in common {
            source.write(page, value);
            destination.write(page, value);
        }
        prop_assert_eq!(compare(&source, &destination), None);
        for (page, value) in here {
            source.write(page, value);
        }
        for (page, value) in there {
            destination.write(page, value);
        }
        let words = |page: u64| (page * 512) as usize..(page * 512 + 512) as usize;
        let differ = |page: &u64| source.bytes[words(*page)] != destination.bytes[words(*page)];
        let differing: Vec<_> = (0..PAGES).filter(differ).collect();
        let expected = differing.first().map(|first| Difference {
            pages: differing.len() as u64,
            first: *first,
            address: source.layout.address_of(*first).unwrap(),
        });
        prop_assert_eq!(compare(&source, &destination), expected);
    }
}

/// More checksums than one frame has.
#[test]
fn memory_of_any_size_is_compared() {
    let layout = RamLayout::new([(0, 20_000 * PAGE_SIZE)]).unwrap();
    let (mut here, mut there) = (Ram::of(layout.clone()), Ram::of(layout));
    for page in 0..20_000 {
        here.write(page, page + 1);
        there.write(page, page + 1);
    }
    assert_eq!(compare(&here, &there), None);
    there.write(19_999, 0);
    let found = compare(&here, &there).unwrap();
    assert_eq!((found.pages, found.first), (1, 19_999));
}

#[test]
fn no_page_is_compared_twice() {
    let ram = Ram::new();
    let table = |first, count| PageTable {
        runs: vec![(first, count)],
        sums: vec![0; count as usize],
    };
    for next in [0, 3, 9] {
        let mut comparing = Comparing::default();
        comparing.sums(&ram, &table(3, 7).to_bytes()).unwrap();
        let error = comparing.sums(&ram, &table(next, 1).to_bytes());
        let kind = error.unwrap_err();
        assert!(matches!(
            kind,
            WireError::Malformed {
                kind: Kind::Sums,
                ..
            }
        ));
    }
}

/// What a destination says about a guest that is offered with `how` and `verify`, and of which all of `say` comes.
fn refused(
    how: Memory,
    verify: bool,
    say: impl FnOnce(&mut Connection) -> Result<(), WireError> + Send,
) -> Failure {
    let (mut near, far) = pair();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            near.send(&Message::hello(
                Purpose::Migrate,
                crate::SnapshotId([7; 16]),
            ))?;
            near.message("welcome")?;
            let memory = Ram::new().layout.ranges().to_vec();
            let memory = memory.iter().map(|range| Range {
                start: range.start,
                len: range.len,
            });
            let memory = memory.collect();
            near.send(&Message::Offer {
                memory,
                how,
                verify,
                connections: 1,
            })?;
            near.message("accept")?;
            say(&mut near)?;
            near.message("nothing").map(drop)
        });
        let offered = match Incoming::accept(far, "test") {
            Ok(Incoming::Offer(offered)) => offered,
            Ok(Incoming::Question { .. } | Incoming::Pages(_)) => panic!("not an offer"),
            Err(failure) => return failure,
        };
        let mut guest = Arriving {
            ram: Ram::new(),
            early: 0,
            state: Vec::new(),
        };
        let outcome = offered
            .accept()
            .unwrap()
            .receive(&mut guest, &mut |_| ControlFlow::Continue(()));
        match outcome {
            Ok(_) => panic!("it was taken"),
            Err(failure) => failure,
        }
    })
}

#[test]
fn checksums_that_were_not_announced_are_refused() {
    let sums = |connection: &mut Connection| {
        let runs = vec![(0, 1)];
        let sums = vec![1];
        connection.send_sums(&PageTable { runs, sums })
    };
    for (how, verify) in [(Memory::Copy, false), (Memory::Handoff, false)] {
        let failure = refused(how, verify, sums);
        assert!(failure.to_string().contains("checksums"), "{failure}");
    }
    let failure = refused(Memory::Handoff, true, sums);
    assert!(failure.to_string().contains("not copied"), "{failure}");
}

#[test]
fn nothing_of_memory_comes_once_it_is_compared() {
    let failure = refused(Memory::Copy, true, |connection| {
        let (runs, sums) = (vec![(0, 1)], vec![1]);
        connection.send_sums(&PageTable { runs, sums })?;
        let runs = vec![(5, 1)];
        connection.send_zeroes(&PageTable {
            runs,
            sums: Vec::new(),
        })
    });
    assert!(failure.to_string().contains("zero pages"), "{failure}");
}

#[test]
fn checksums_that_are_left_out_are_those_of_zeroes() {
    let failure = refused(Memory::Copy, true, |connection| {
        let ram = {
            let mut ram = Ram::new();
            ram.write(7, 7);
            ram
        };
        let all = PageSet::full(&ram.layout);
        let first = crate::live::pages::Round::First;
        let all = Pending::new(&ram, &all, first);
        crate::live::pages::send(connection, &all, || Ok(()))?;
        connection.send(&Message::Round { number: 1 })?;
        connection.message("arrived")?;
        connection.send(&Message::Complete)
    });
    let Failure::Differs(found) = failure else {
        panic!("{failure}");
    };
    assert_eq!((found.pages, found.first, found.address), (1, 7, 0x7000));
}
