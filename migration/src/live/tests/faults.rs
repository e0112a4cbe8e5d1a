//! The engine with something wrong at every place where something can go wrong. After each: one of the two runs the guest,
//! with its memory; or the source is in doubt, and says so.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};

use super::proxy::{Fault, Plan, Seen, Way, between};
use super::*;
use crate::live::commit;
use crate::live::destination::{self, Decision, Failure};
use crate::live::source::{Phase, Reason};
use crate::wire::message::Outcome;
use crate::wire::{Message, WireError};

mod page_connections;
mod peers;

/// For a connection on which something goes wrong.
const HASTY: connection::Limits = connection::Limits {
    silence: Duration::from_millis(250),
    beat: Duration::from_millis(25),
};
/// For one on which nothing should.
const PATIENT: connection::Limits = connection::Limits {
    silence: Duration::from_secs(20),
    beat: Duration::from_millis(100),
};
/// However busy the host is, what was not done by then hangs.
const FOR_EVER: Duration = Duration::from_secs(60);

fn layout() -> RamLayout {
    RamLayout::new([(0, 16 * PAGE_SIZE), (1 << 32, 8 * PAGE_SIZE)]).unwrap()
}

/// More than one connection takes at a time.
fn large() -> RamLayout {
    RamLayout::new([(0, 1100 * PAGE_SIZE), (1 << 32, 500 * PAGE_SIZE)]).unwrap()
}

fn open(socket: impl Into<OwnedFd>, limits: connection::Limits) -> Connection {
    Connection::new(socket.into(), limits).unwrap()
}

/// A guest at its source. One of its methods may fail.
struct Here {
    ram: Ram,
    dirty: PageSet,
    writes: u64,
    fails: Option<(&'static str, usize)>,
    calls: usize,
    /// Writes that no log has: page and value.
    unrecorded: Vec<(u64, u64)>,
    runs: bool,
    released: bool,
}

impl Here {
    fn new() -> Self {
        Self::with(layout())
    }

    fn with(layout: RamLayout) -> Self {
        let mut ram = Ram::of(layout);
        for page in (0..ram.layout.pages()).step_by(2) {
            ram.write(page, page + 1);
        }
        Self {
            dirty: PageSet::full(&ram.layout),
            ram,
            writes: 0,
            fails: None,
            calls: 0,
            unrecorded: Vec::new(),
            runs: true,
            released: false,
        }
    }

    /// Fails at call number `n` of `method`.
    fn failing(method: &'static str, n: usize) -> Self {
        Self {
            fails: Some((method, n)),
            ..Self::new()
        }
    }

    fn call(&mut self, method: &str) -> Result<(), GuestError> {
        match self.fails {
            Some((name, n)) if name == method => {
                self.calls += 1;
                if self.calls == n {
                    return Err(format!("{method} fails").into());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

impl SourceGuest for Here {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn offer(&mut self) -> Result<Vec<Section>, GuestError> {
        self.call("offer")?;
        Ok(vec![section("machine", "a machine")])
    }

    fn descriptors(&mut self) -> Result<Vec<Named>, GuestError> {
        self.call("descriptors")?;
        let file = tempfile::tempfile()?;
        Ok(vec![("memory".to_owned(), file.into())])
    }

    fn track(&mut self) -> Result<(), GuestError> {
        self.call("track")?;
        self.dirty = PageSet::full(&self.ram.layout);
        self.writes = 0;
        Ok(())
    }

    fn early(&mut self) -> Result<Vec<Section>, GuestError> {
        self.call("early")?;
        Ok(vec![section("context", "early")])
    }

    fn written(&mut self) -> Result<PageSet, GuestError> {
        self.call("written")?;
        let empty = PageSet::empty(&self.ram.layout);
        let taken = std::mem::replace(&mut self.dirty, empty);
        if self.runs {
            // One page gets contents, and one gets zeroes.
            self.writes += 1;
            self.ram.write(3, self.writes);
            self.ram.write(4, 0);
            self.dirty.insert_run(3, 2);
            // For more connections than one.
            self.dirty.insert_run(24, u64::MAX);
        }
        if self.runs && self.writes == 2 {
            // After the first round.
            for (page, value) in self.unrecorded.drain(..) {
                self.ram.write(page, value);
            }
        }
        Ok(taken)
    }

    fn slow_down(&mut self, _percent: u8) {}

    fn stop(&mut self) -> Result<(), GuestError> {
        self.call("stop")?;
        self.runs = false;
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<Section>, GuestError> {
        self.call("state")?;
        Ok(vec![section("state", "all of it")])
    }

    fn release(&mut self) {
        assert!(!self.runs && !self.released);
        self.released = true;
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.call("resume")?;
        (self.runs, self.released) = (true, false);
        Ok(())
    }
}

/// A guest at its destination.
struct There {
    ram: Ram,
    fails: Option<&'static str>,
    /// A method that takes until the test says that it goes on.
    stalls: Option<&'static str>,
    goes_on: Arc<AtomicBool>,
}

impl There {
    fn call(&self, method: &'static str) -> Result<(), GuestError> {
        while self.stalls == Some(method) && !self.goes_on.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(10));
        }
        match self.fails {
            Some(name) if name == method => Err(format!("{method} fails").into()),
            _ => Ok(()),
        }
    }
}

impl DestinationGuest for There {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn early(&mut self, _section: Section) -> Result<(), GuestError> {
        self.call("early")
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), GuestError> {
        assert_eq!(sections, [section("state", "all of it")]);
        self.call("restore")
    }
}

/// What a destination may do wrong.
#[derive(Clone, Copy, Debug, Default)]
struct Habits {
    /// A method of its guest that fails.
    fails: Option<&'static str>,
    /// Its process vanishes when it runs the guest, before it says so.
    vanishes: bool,
    /// A method of its guest that takes until the test says that it goes on.
    stalls: Option<&'static str>,
    /// It built a machine with other RAM than was offered.
    other_ram: bool,
    /// Its guest has much RAM.
    large: bool,
}

/// A destination: whatever connects is heard in a thread of its own.
struct Host {
    connections: mpsc::Sender<Connection>,
    runs: Arc<AtomicBool>,
    /// Its process is gone.
    gone: Arc<AtomicBool>,
    /// It need not stall any more.
    goes_on: Arc<AtomicBool>,
    /// Memory of the guest, if one ran, when all is over.
    ended: mpsc::Receiver<Option<Vec<u64>>>,
}

impl Host {
    fn new(habits: Habits) -> Self {
        let (connections, incoming) = mpsc::channel::<Connection>();
        let (over, ended) = mpsc::channel();
        let runs = Arc::new(AtomicBool::new(false));
        let gone = Arc::new(AtomicBool::new(false));
        let goes_on = Arc::new(AtomicBool::new(false));
        let (running, vanished) = (Arc::clone(&runs), Arc::clone(&gone));
        let going_on = Arc::clone(&goes_on);
        std::thread::spawn(move || {
            let known: Arc<Mutex<Option<Decision>>> = Arc::default();
            let heard: Vec<_> = incoming
                .iter()
                .map(|connection| {
                    let (known, running) = (Arc::clone(&known), Arc::clone(&running));
                    let vanished = Arc::clone(&vanished);
                    let going_on = Arc::clone(&going_on);
                    std::thread::spawn(move || {
                        hear(connection, habits, &known, &running, &vanished, &going_on)
                    })
                })
                .collect();
            let memories = heard.into_iter().map(|one| one.join().unwrap());
            let memory = memories.fold(None, |found, one| found.or(one));
            let _ = over.send(memory);
        });
        Self {
            connections,
            runs,
            gone,
            goes_on,
            ended,
        }
    }

    fn is_gone(&self) -> bool {
        self.gone.load(Ordering::SeqCst)
    }

    fn connect(&self, limits: connection::Limits) -> Result<Connection, WireError> {
        let (near, far) = UnixStream::pair().unwrap();
        self.connections.send(open(far, limits)).unwrap();
        Ok(open(near, limits))
    }

    /// Memory of the guest, if it runs here.
    fn end(self) -> Option<Vec<u64>> {
        drop(self.connections);
        let memory = self.ended.recv_timeout(FOR_EVER).unwrap();
        assert_eq!(memory.is_some(), self.runs.load(Ordering::SeqCst));
        memory
    }
}

fn hear(
    connection: Connection,
    habits: Habits,
    known: &Mutex<Option<Decision>>,
    runs: &AtomicBool,
    gone: &AtomicBool,
    goes_on: &Arc<AtomicBool>,
) -> Option<Vec<u64>> {
    let layout = match habits {
        Habits {
            other_ram: true, ..
        } => RamLayout::new([(0, 8 * PAGE_SIZE), (1 << 32, 16 * PAGE_SIZE)]).unwrap(),
        Habits { large: true, .. } => large(),
        _ => layout(),
    };
    let mut guest = There {
        ram: Ram::of(layout),
        fails: habits.fails,
        stalls: habits.stalls,
        goes_on: Arc::clone(goes_on),
    };
    let mut offered = match Incoming::accept(connection, "test").ok()? {
        Incoming::Offer(offered) => offered,
        Incoming::Question {
            session,
            connection,
        } => {
            let decision = known.lock().unwrap().clone();
            let outcome = decision.as_ref().map(|one| one.asked(&session));
            let answered = destination::answer(connection, outcome.unwrap_or(Outcome::Unknown));
            if let (Ok(()), Some(decision)) = (answered, decision) {
                decision.told();
            }
            return None;
        }
        Incoming::Pages(joining) => {
            let decision = known.lock().unwrap().clone();
            let _ = decision.unwrap().join(joining);
            return None;
        }
    };
    let decision = offered.decision();
    *known.lock().unwrap() = Some(decision.clone());
    assert_eq!(offered.sections(), [section("machine", "a machine")]);
    let receiving = offered.accept().ok()?;
    let prepared = receiving
        .receive(&mut guest, &mut |_| ControlFlow::Continue(()))
        .ok()?;
    let mut committed = prepared
        .commit(&mut || ControlFlow::Continue(()), || guest.call("take"))
        .ok()?;
    if habits.vanishes {
        gone.store(true, Ordering::SeqCst);
        return None;
    }
    assert!(!runs.swap(true, Ordering::SeqCst), "it runs twice");
    if committed.tell() {
        committed.await_bye();
    }
    assert_eq!(decision.state(), commit::Destination::Running);
    Some(guest.ram.bytes)
}

fn go_on() -> impl FnMut(super::super::source::Progress) -> ControlFlow<()> {
    |_| ControlFlow::Continue(())
}

fn patient(how: Memory) -> Options {
    Options {
        ask: (20, Duration::from_millis(50)),
        verify: how == Memory::Copy,
        ..options(how)
    }
}

/// Who runs the guest after `end`? Checks that nobody is wrong about it.
fn settled(end: &End, guest: &Here, there: Option<&[u64]>, how: Memory) {
    match end {
        End::Moved(_) => {
            assert!(!guest.runs && guest.released);
            let there = there.expect("it runs nowhere");
            assert!(how == Memory::Handoff || guest.ram.bytes == there);
        }
        End::Kept(_) => {
            assert!(guest.runs && !guest.released, "it does not run here");
            assert!(there.is_none(), "it runs there too");
        }
        End::InDoubt { .. } => assert!(!guest.runs && guest.released),
        End::Lost { .. } => panic!("{end:?}"),
    }
}

/// Moves the guest with fresh connections, on which nothing goes wrong.
fn again(guest: &mut Here, how: Memory) {
    let host = Host::new(Habits::default());
    let end = migrate(
        guest,
        &mut || host.connect(PATIENT),
        &patient(how),
        &mut go_on(),
    );
    let there = host.end();
    assert!(matches!(end, End::Moved(_)), "the second attempt: {end:?}");
    settled(&end, guest, there.as_deref(), how);
}

fn with_fault(plan: Option<Plan>, how: Memory) -> (End, Seen) {
    let host = Host::new(Habits::default());
    let seen = Seen::default();
    let mut guest = Here::new();
    let mut first = Some(between(plan, &seen));
    let limits = if plan.is_some() { HASTY } else { PATIENT };
    let end = migrate(
        &mut guest,
        &mut || match first.take() {
            Some((near, far)) => {
                host.connections.send(open(far, limits)).unwrap();
                Ok(open(near, limits))
            }
            None => host.connect(PATIENT),
        },
        &patient(how),
        &mut go_on(),
    );
    let there = host.end();
    settled(&end, &guest, there.as_deref(), how);
    if matches!(end, End::Kept(_)) {
        again(&mut guest, how);
    }
    (end, seen)
}

/// Does all of `work`, several at a time: most of them wait for something to be given up.
fn all<T: Sync>(work: &[T], run: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                while let Some(one) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
                    run(one);
                }
            });
        }
    });
}

/// What can happen to a frame.
const FAULTS: [Fault; 15] = [
    Fault::CutBefore,
    Fault::CutWithin(1),
    Fault::CutWithin(usize::MAX),
    Fault::CutAfter,
    Fault::FlipHeader(0),
    Fault::FlipHeader(5),
    Fault::FlipHeader(8),
    Fault::FlipHeader(17),
    Fault::FlipHeader(30),
    Fault::FlipBody,
    Fault::FlipLast,
    Fault::Duplicate,
    Fault::Drop,
    Fault::Truncate,
    Fault::Silence,
];

fn faults_at_every_frame(how: Memory) {
    let (end, seen) = with_fault(None, how);
    assert!(matches!(end, End::Moved(_)), "{end:?}");
    let frames = seen.frames.lock().unwrap().clone();
    let names = |way| {
        let of_way = frames.iter().filter(move |(one, _)| *one == way);
        of_way.map(|(_, name)| name.as_str()).collect::<Vec<_>>()
    };
    let mut plans = Vec::new();
    for way in [Way::ToDestination, Way::ToSource] {
        let names = names(way);
        for (frame, name) in names.into_iter().enumerate() {
            plans.extend(FAULTS.map(|fault| (Plan { way, frame, fault }, name)));
        }
    }
    let messages = ["hello", "offer", "complete", "commit", "bye"];
    assert!(
        messages
            .iter()
            .all(|one| names(Way::ToDestination).contains(one))
    );
    assert_eq!(
        names(Way::ToDestination).contains(&"sums"),
        how == Memory::Copy
    );
    assert!(plans.len() > 150, "{} faults", plans.len());
    all(&plans, |(plan, name)| {
        let (end, seen) = with_fault(Some(*plan), how);
        // On a busy host, a connection may be given up before the fault.
        if !seen.fired.load(Ordering::SeqCst) {
            return;
        }
        let harmless = plan.fault == Fault::FlipLast && ["pages", "descriptors"].contains(name);
        match *name {
            // It ran there when these were sent.
            "running" | "bye" => assert!(matches!(end, End::Moved(_)), "{plan:?} {name}: {end:?}"),
            // Who is first, the commit or the question, decides; both are right.
            "commit" | "prepared" => {
                let decided = matches!(end, End::Moved(_) | End::Kept(_));
                assert!(decided, "{plan:?} {name}: {end:?}");
            }
            _ if harmless => {}
            _ => assert!(matches!(end, End::Kept(_)), "{plan:?} {name}: {end:?}"),
        }
    });
}

#[test]
fn a_fault_at_any_frame_leaves_one_owner_when_memory_is_copied() {
    faults_at_every_frame(Memory::Copy);
}

#[test]
fn a_fault_at_any_frame_leaves_one_owner_when_files_are_handed_over() {
    faults_at_every_frame(Memory::Handoff);
}

#[test]
fn a_destination_that_vanishes_after_the_commit_leaves_doubt() {
    let commit = {
        let (_, seen) = with_fault(None, Memory::Copy);
        let frames = seen.frames.lock().unwrap().clone();
        let mut sent = frames.iter().filter(|(way, _)| *way == Way::ToDestination);
        sent.position(|(_, name)| name == "commit").unwrap()
    };
    let lost = Plan {
        way: Way::ToDestination,
        frame: commit,
        fault: Fault::CutBefore,
    };
    for (what, plan, stranger) in [
        ("before it arrived", Some(lost), false),
        ("after it arrived", None, false),
        ("after it arrived, and another process answers", None, true),
    ] {
        let habits = Habits {
            vanishes: true,
            ..Habits::default()
        };
        let host = Host::new(habits);
        let other = Host::new(Habits::default());
        let seen = Seen::default();
        let mut guest = Here::new();
        let mut first = Some(between(plan, &seen));
        let quick = Options {
            ask: (2, Duration::ZERO),
            ..patient(Memory::Copy)
        };
        let end = migrate(
            &mut guest,
            &mut || match first.take() {
                Some((near, far)) => {
                    host.connections.send(open(far, PATIENT)).unwrap();
                    Ok(open(near, PATIENT))
                }
                None if stranger => other.connect(PATIENT),
                None => Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into()),
            },
            &quick,
            &mut go_on(),
        );
        assert!(host.is_gone() || plan.is_some(), "{what}");
        assert!(host.end().is_none(), "{what}");
        assert!(other.end().is_none(), "{what}");
        settled(&end, &guest, None, Memory::Copy);
        let End::InDoubt { asked, .. } = end else {
            panic!("{what}: {end:?}");
        };
        let expected = if stranger {
            "knows nothing"
        } else {
            "cannot be asked"
        };
        assert!(asked.contains(expected), "{what}: {asked}");
    }
}

#[test]
fn a_guest_that_fails_at_its_source_stays() {
    use Memory::{Copy, Handoff};
    for (method, call, how, phase) in [
        ("offer", 1, Copy, Phase::Offer),
        ("descriptors", 1, Handoff, Phase::Offer),
        ("track", 1, Copy, Phase::Memory),
        ("written", 1, Copy, Phase::Memory),
        ("early", 1, Copy, Phase::Memory),
        ("written", 2, Copy, Phase::Memory),
        ("written", 3, Copy, Phase::Pause),
        ("stop", 1, Copy, Phase::Pause),
        ("stop", 1, Handoff, Phase::Pause),
        ("state", 1, Copy, Phase::Pause),
        ("state", 1, Handoff, Phase::Pause),
    ] {
        let host = Host::new(Habits::default());
        let mut guest = Here::failing(method, call);
        let connect = &mut || host.connect(PATIENT);
        let end = migrate(&mut guest, connect, &patient(how), &mut go_on());
        let there = host.end();
        settled(&end, &guest, there.as_deref(), how);
        let as_expected =
            matches!(&end, End::Kept(Reason::Guest { phase: at, .. }) if *at == phase);
        assert!(as_expected, "{method} {call}: {end:?}");
        guest.fails = None;
        again(&mut guest, how);
    }
}

#[test]
fn a_write_that_nobody_recorded_is_found_when_memory_is_compared() {
    // Even pages below 24 are not zero; 3 and 4 are written and recorded in each round.
    for (writes, expected) in [
        (
            &[(5, 9)][..],
            "source: 1; the first is page 5, at guest address 0x5000",
        ),
        (
            &[(6, 0)],
            "source: 1; the first is page 6, at guest address 0x6000",
        ),
        (
            &[(8, 1)],
            "source: 1; the first is page 8, at guest address 0x8000",
        ),
        (
            &[(23, 1)],
            "source: 1; the first is page 23, at guest address 0x100007000",
        ),
        (
            &[(22, 0), (16, 5), (15, 6)],
            "source: 3; the first is page 15, at guest address 0xf000",
        ),
    ] {
        let mut guest = Here::new();
        guest.unrecorded = writes.to_vec();
        let host = Host::new(Habits::default());
        let connect = &mut || host.connect(PATIENT);
        let end = migrate(&mut guest, connect, &patient(Memory::Copy), &mut go_on());
        let there = host.end();
        settled(&end, &guest, there.as_deref(), Memory::Copy);
        let End::Kept(Reason::Refused { phase, reasons }) = end else {
            panic!("{writes:?}: {end:?}");
        };
        assert_eq!((phase, reasons.len()), (Phase::Restore, 1), "{writes:?}");
        assert!(reasons[0].ends_with(expected), "{}", reasons[0]);
        again(&mut guest, Memory::Copy);
    }
}

#[test]
fn a_write_that_nobody_recorded_is_lost_when_memory_is_not_compared() {
    let mut guest = Here::new();
    guest.unrecorded = vec![(5, 9)];
    let host = Host::new(Habits::default());
    let blind = Options {
        verify: false,
        ..patient(Memory::Copy)
    };
    let connect = &mut || host.connect(PATIENT);
    let end = migrate(&mut guest, connect, &blind, &mut go_on());
    assert!(matches!(end, End::Moved(_)), "{end:?}");
    assert_ne!(guest.ram.bytes, host.end().unwrap());
}

#[test]
fn a_guest_that_fails_at_its_destination_stays() {
    use Memory::{Copy, Handoff};
    for (method, how, phase) in [
        ("early", Copy, Phase::Memory),
        ("restore", Copy, Phase::Restore),
        ("restore", Handoff, Phase::Restore),
        ("take", Copy, Phase::Commit),
        ("take", Handoff, Phase::Commit),
    ] {
        let host = Host::new(Habits {
            fails: Some(method),
            ..Habits::default()
        });
        let mut guest = Here::new();
        let connect = &mut || host.connect(PATIENT);
        let end = migrate(&mut guest, connect, &patient(how), &mut go_on());
        let there = host.end();
        settled(&end, &guest, there.as_deref(), how);
        let End::Kept(Reason::Refused { phase: at, reasons }) = end else {
            panic!("{method}: {end:?}");
        };
        assert_eq!((at, reasons.len()), (phase, 1), "{method}");
        assert!(reasons[0].ends_with(&format!("{method} fails")));
        again(&mut guest, how);
    }
}

#[test]
fn a_guest_that_cannot_go_on_is_lost_and_says_why() {
    let host = Host::new(Habits {
        fails: Some("take"),
        ..Habits::default()
    });
    let mut guest = Here::failing("resume", 1);
    let connect = &mut || host.connect(PATIENT);
    let end = migrate(&mut guest, connect, &patient(Memory::Copy), &mut go_on());
    assert!(host.end().is_none());
    let End::Lost { reason, error } = end else {
        panic!("{end:?}");
    };
    assert!(matches!(reason, Reason::Refused { .. }), "{reason}");
    assert_eq!(error.to_string(), "resume fails");
}

#[test]
fn a_migration_can_be_called_off_at_any_moment_before_the_commit() {
    for how in [Memory::Copy, Memory::Handoff] {
        for moment in 0.. {
            let host = Host::new(Habits::default());
            let mut guest = Here::new();
            let mut looks = 0;
            let mut watch = |_| {
                looks += 1;
                match looks > moment {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            };
            let connect = &mut || host.connect(PATIENT);
            let end = migrate(&mut guest, connect, &patient(how), &mut watch);
            let there = host.end();
            settled(&end, &guest, there.as_deref(), how);
            match end {
                End::Moved(_) => {
                    assert!(moment > 4, "it was never looked at");
                    break;
                }
                End::Kept(Reason::Cancelled(_)) => again(&mut guest, how),
                other => panic!("{moment}: {other:?}"),
            }
        }
    }
}
