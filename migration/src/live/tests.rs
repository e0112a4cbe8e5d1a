//! Both ends in one process, around guests that are plain memory.

use std::ops::{ControlFlow, Range};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::Duration;

use super::destination::{Incoming, Offered, Receiving};
use super::source::{End, Options, Phase, attempt, migrate};
use super::{DestinationGuest, GuestError, Limits, SourceGuest};
use crate::guest::GuestPages;
use crate::layout::{LARGE_PAGE, PAGE_SIZE, RamLayout};
use crate::pages::PageSet;
use crate::wire::Connection;
use crate::wire::connection::{self, Named, Section};
use crate::wire::message::Memory;

mod faults;
mod pages;
mod proxy;
mod verify;

const PAGES: u64 = 1000;

/// RAM of a guest.
struct Ram {
    layout: RamLayout,
    bytes: Vec<u64>,
    /// What large pages were asked for: range number and first byte.
    enlarged: Mutex<Vec<(usize, u64)>>,
}

impl Ram {
    fn new() -> Self {
        Self::of(
            RamLayout::new([(0, 600 * PAGE_SIZE), (1 << 32, (PAGES - 600) * PAGE_SIZE)]).unwrap(),
        )
    }

    fn of(layout: RamLayout) -> Self {
        Self {
            bytes: vec![0; (layout.bytes() / 8) as usize],
            enlarged: Mutex::default(),
            layout,
        }
    }

    fn write(&mut self, page: u64, value: u64) {
        self.bytes[(page * PAGE_SIZE / 8) as usize + 7] = value;
    }
}

// SAFETY: the ranges lie one after the other in `bytes`, which is never moved or resized.
#[allow(unsafe_code)]
unsafe impl GuestPages for Ram {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, range: usize) -> *mut u8 {
        let start = self.bytes.as_ptr().cast::<u8>().cast_mut();
        start.wrapping_add(self.layout.offset(range) as usize)
    }

    fn occupied(&self, range: usize, from: u64) -> Option<Range<u64>> {
        let len = self.layout.ranges()[range].len;
        (from < len).then_some(from..len)
    }

    fn enlarge(&self, range: usize, piece: Range<u64>) {
        assert_eq!(piece.end - piece.start, LARGE_PAGE);
        self.enlarged.lock().unwrap().push((range, piece.start));
    }
}

/// A guest at its source, which writes pages 10 to 20 in each round.
struct Leaving {
    ram: Ram,
    dirty: Mutex<PageSet>,
    round: u64,
    calls: Vec<&'static str>,
}

impl Leaving {
    fn new() -> Self {
        let mut ram = Ram::new();
        for page in (0..PAGES).step_by(3) {
            ram.write(page, page + 1);
        }
        let dirty = Mutex::new(PageSet::full(&ram.layout));
        Self {
            ram,
            dirty,
            round: 0,
            calls: Vec::new(),
        }
    }
}

fn section(name: &str, text: &str) -> Section {
    Section {
        name: name.to_owned(),
        version: 1,
        bytes: text.as_bytes().to_vec(),
    }
}

impl SourceGuest for Leaving {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn offer(&mut self) -> Result<Vec<Section>, GuestError> {
        self.calls.push("offer");
        Ok(vec![section("machine", "a machine")])
    }

    fn descriptors(&mut self) -> Result<Vec<Named>, GuestError> {
        let file = tempfile::tempfile()?;
        Ok(vec![("memory".to_owned(), file.into())])
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.calls.push("track");
        Ok(())
    }

    fn early(&mut self) -> Result<Vec<Section>, GuestError> {
        self.calls.push("early");
        Ok(vec![section("context", "early")])
    }

    fn written(&mut self) -> Result<PageSet, GuestError> {
        let mut dirty = self.dirty.lock().unwrap();
        let taken = dirty.clone();
        *dirty = PageSet::empty(&self.ram.layout);
        self.round += 1;
        for page in 10..20 {
            self.ram.write(page, self.round % 3);
            dirty.insert(page);
        }
        Ok(taken)
    }

    fn slow_down(&mut self, _percent: u8) {}

    fn stop(&mut self) -> Result<(), GuestError> {
        self.calls.push("stop");
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<Section>, GuestError> {
        self.calls.push("state");
        Ok(vec![section("state", "all of it")])
    }

    fn release(&mut self) {
        self.calls.push("release");
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.calls.push("resume");
        Ok(())
    }
}

/// A guest at its destination.
struct Arriving {
    ram: Ram,
    early: usize,
    state: Vec<Section>,
}

impl Arriving {
    fn new() -> Self {
        Self {
            ram: Ram::new(),
            early: 0,
            state: Vec::new(),
        }
    }
}

impl DestinationGuest for Arriving {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn early(&mut self, section: Section) -> Result<(), GuestError> {
        assert_eq!(section.bytes, b"early");
        self.early += 1;
        Ok(())
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), GuestError> {
        self.state = sections;
        Ok(())
    }
}

fn pair() -> (Connection, Connection) {
    let limits = connection::Limits {
        silence: Duration::from_secs(5),
        beat: Duration::from_millis(20),
    };
    let (a, b) = UnixStream::pair().unwrap();
    let open = |socket: UnixStream| Connection::new(OwnedFd::from(socket), limits).unwrap();
    (open(a), open(b))
}

fn options(how: Memory) -> Options {
    Options {
        how,
        files: how == Memory::Handoff,
        verify: false,
        connections: 1,
        limits: Limits::default(),
        ask: (1, Duration::ZERO),
    }
}

/// What is offered over `connection`.
fn offer(connection: Connection) -> Box<Offered> {
    match Incoming::accept(connection, "test").unwrap() {
        Incoming::Offer(offered) => offered,
        Incoming::Question { .. } | Incoming::Pages(_) => panic!("not an offer"),
    }
}

/// Has a guest arrive, and says that it runs.
fn arrive(receiving: Receiving, guest: &mut Arriving) {
    let prepared = receiving.receive(guest, &mut |_| ControlFlow::Continue(()));
    let committed = prepared
        .unwrap()
        .commit(&mut || ControlFlow::Continue(()), || Ok(()));
    let mut committed = committed.unwrap();
    assert!(committed.tell() && committed.await_bye());
}

/// Moves `guest` over `connection`.
fn leave(guest: &mut Leaving, connection: Connection, how: Memory) -> End {
    let mut connection = Some(connection);
    let mut connect = || Ok(connection.take().unwrap());
    migrate(guest, &mut connect, &options(how), &mut |_| {
        ControlFlow::Continue(())
    })
}

#[test]
fn a_destination_can_call_it_off_while_memory_arrives() {
    let (near, far) = pair();
    let destination = std::thread::spawn(move || {
        let mut offered = offer(far);
        offered.sections();
        let mut guest = Arriving::new();
        let receiving = offered.accept().unwrap();
        let called_off = receiving.receive(&mut guest, &mut |_| ControlFlow::Break(()));
        assert!(called_off.is_err() && guest.state.is_empty());
    });
    let mut guest = Leaving::new();
    let end = leave(&mut guest, near, Memory::Copy);
    destination.join().unwrap();
    assert!(matches!(end, End::Kept(_)), "{end:?}");
    assert!(!guest.calls.contains(&"release"), "{:?}", guest.calls);
}

#[test]
fn a_guest_is_moved_with_all_its_memory() {
    let (near, far) = pair();
    let destination = std::thread::spawn(move || {
        let mut offered = offer(far);
        assert_eq!(offered.sections(), [section("machine", "a machine")]);
        let mut guest = Arriving::new();
        let receiving = offered.accept().unwrap();
        arrive(receiving, &mut guest);
        guest
    });
    let mut guest = Leaving::new();
    let end = leave(&mut guest, near, Memory::Copy);
    let there = destination.join().unwrap();
    let End::Moved(report) = end else {
        panic!("{end:?}");
    };
    assert!(
        report.rounds.len() == 1 && report.pause_us.total > 0,
        "{report:?}"
    );
    let pause = report.pause_us;
    let parts: u64 = pause.parts().iter().map(|part| part.us).sum();
    assert_eq!(parts, pause.total);
    assert_eq!((there.early, there.state.len()), (1, 1));
    let expected = ["offer", "track", "early", "stop", "state", "release"];
    assert_eq!(guest.calls, expected);
    // What was written since the last look is the fake's doing: `written` writes.
    for page in 0..PAGES as usize {
        let (from, to) = (page * 512, page * 512 + 512);
        let same = guest.ram.bytes[from..to] == there.ram.bytes[from..to];
        assert!(same || (10..20).contains(&page), "page {page}");
    }
}

/// How far a migration came is known whatever becomes of it, here one that is called off in `last`.
#[test]
fn how_far_a_migration_came_is_known_if_it_fails() {
    for (last, rounds, paused) in [
        (Phase::Connect, 0, false),
        (Phase::Offer, 0, false),
        (Phase::Memory, 0, false),
        (Phase::Restore, 1, true),
    ] {
        let (near, far) = pair();
        let destination = std::thread::spawn(move || {
            let Ok(Incoming::Offer(mut offered)) = Incoming::accept(far, "test") else {
                return;
            };
            offered.sections();
            let Ok(receiving) = offered.accept() else {
                return;
            };
            let mut guest = Arriving::new();
            let go_on = &mut |_| ControlFlow::Continue(());
            if let Ok(prepared) = receiving.receive(&mut guest, go_on) {
                let called_off = prepared.commit(&mut || ControlFlow::Continue(()), || Ok(()));
                assert!(called_off.is_err());
            }
        });
        let mut guest = Leaving::new();
        let mut connection = Some(near);
        let (end, attempt) = attempt(
            &mut guest,
            &mut || Ok(connection.take().unwrap()),
            &options(Memory::Copy),
            &mut |progress| {
                if progress.phase == last {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        destination.join().unwrap();
        assert!(matches!(end, End::Kept(_)), "{end:?}");
        assert_eq!(attempt.phase, last);
        let report = attempt.report;
        assert_eq!(report.rounds.len(), rounds, "{last}");
        let pause = report.pause_us;
        assert_eq!(pause.total > 0, paused, "{last}");
        let parts: u64 = pause.parts().iter().map(|part| part.us).sum();
        assert_eq!(parts, pause.total);
        assert!(report.total_us >= pause.total && (report.bytes > 0) == (last > Phase::Connect));
    }
}

#[test]
fn a_guest_is_handed_over_with_its_files() {
    let (near, far) = pair();
    let destination = std::thread::spawn(move || {
        let mut offered = offer(far);
        assert_eq!(offered.how(), Memory::Handoff);
        let files = offered.descriptors();
        assert_eq!(files.len(), 1);
        assert_eq!(files[0].0, "memory");
        let mut guest = Arriving::new();
        let receiving = offered.accept().unwrap();
        arrive(receiving, &mut guest);
    });
    let mut guest = Leaving::new();
    let end = leave(&mut guest, near, Memory::Handoff);
    destination.join().unwrap();
    assert!(matches!(end, End::Moved(_)), "{end:?}");
    assert_eq!(guest.calls, ["offer", "stop", "state", "release"]);
}
