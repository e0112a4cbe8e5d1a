//! Memory that is copied over several connections.

use super::*;
use crate::live::destination::Prepared;
use crate::live::page_connections::{Joining, PageConnections};
use crate::live::pages::{Arriving, CHUNK, Pending, Round, send};
use crate::wire::connection::Received;
use crate::wire::frame::PageTable;
use crate::wire::message::Purpose;

const SESSION: crate::SnapshotId = crate::SnapshotId([7; 16]);
const LARGE: Habits = Habits {
    fails: None,
    vanishes: false,
    stalls: None,
    other_ram: false,
    large: true,
};

fn over(connections: u32) -> Options {
    Options {
        connections,
        // One round, and as much again while the guest stands still.
        limits: Limits {
            downtime: FOR_EVER,
            ..Limits::default()
        },
        ..patient(Memory::Copy)
    }
}

#[test]
fn memory_is_the_same_over_any_number_of_connections() {
    for connections in [1, 2, 4, 16] {
        for habits in [Habits::default(), LARGE] {
            let host = Host::new(habits);
            let mut guest = Here::with(if habits.large { large() } else { layout() });
            let mut opened = 0;
            let connect = &mut || {
                opened += 1;
                host.connect(PATIENT)
            };
            let end = migrate(&mut guest, connect, &over(connections), &mut go_on());
            let there = host.end();
            let End::Moved(report) = &end else {
                panic!("{connections}: {end:?}");
            };
            assert_eq!(opened, connections);
            let round = &report.rounds[0];
            assert_eq!(round.data + round.zero, guest.ram.layout.pages());
            // Those of the main connection alone would be less.
            assert!(report.bytes > round.data * PAGE_SIZE);
            settled(&end, &guest, there.as_deref(), Memory::Copy);
        }
    }
}

#[test]
fn memory_that_is_handed_over_takes_one_connection() {
    let host = Host::new(Habits::default());
    let mut guest = Here::new();
    let mut first = true;
    let connect = &mut || {
        assert!(std::mem::take(&mut first));
        host.connect(PATIENT)
    };
    let options = Options {
        connections: 4,
        ..patient(Memory::Handoff)
    };
    let end = migrate(&mut guest, connect, &options, &mut go_on());
    assert!(matches!(end, End::Moved(_)), "{end:?}");
    settled(&end, &guest, host.end().as_deref(), Memory::Handoff);
}

/// Moves a guest over three connections, on number `number` of which something goes wrong.
fn with_fault_on(number: u32, plan: Plan) -> (End, Seen) {
    let host = Host::new(LARGE);
    let seen = Seen::default();
    let mut guest = Here::with(large());
    let mut opened = 0;
    let connect = &mut || {
        opened += 1;
        if opened != number {
            return host.connect(PATIENT);
        }
        let (near, far) = between(Some(plan), &seen);
        host.connections.send(open(far, HASTY)).unwrap();
        Ok(open(near, HASTY))
    };
    let end = migrate(&mut guest, connect, &over(3), &mut go_on());
    let there = host.end();
    settled(&end, &guest, there.as_deref(), Memory::Copy);
    (end, seen)
}

#[test]
fn a_fault_on_a_page_connection_leaves_the_guest_at_its_source() {
    let mut plans = Vec::new();
    for (number, way, frames) in [
        (2, Way::ToDestination, 0..6),
        (3, Way::ToDestination, 0..6),
        (3, Way::ToSource, 0..1),
    ] {
        for frame in frames {
            plans.extend(FAULTS.map(|fault| (number, Plan { way, frame, fault })));
        }
    }
    let fired = AtomicUsize::new(0);
    all(&plans, |(number, plan)| {
        let (end, seen) = with_fault_on(*number, *plan);
        // How many frames there are is chance.
        if !seen.fired.load(Ordering::SeqCst) {
            return;
        }
        fired.fetch_add(1, Ordering::SeqCst);
        let frames = seen.frames.lock().unwrap();
        let mut of_way = frames.iter().filter(|(way, _)| *way == plan.way);
        let name = of_way.nth(plan.frame).unwrap().1.as_str();
        let harmless = match (plan.fault, name) {
            // It has to come again, and may.
            (Fault::FlipLast, "pages") => true,
            // Nothing is read after it.
            (Fault::CutAfter | Fault::Duplicate, "complete") => true,
            _ => false,
        };
        if harmless {
            return;
        }
        let said = match end {
            End::Kept(reason) => reason.to_string(),
            other => panic!("{number} {plan:?} {name}: {other:?}"),
        };
        let named = said.contains(&format!("connection {number}: "));
        assert!(named, "{number} {plan:?} {name}: {said}");
    });
    // Hello, the end of the first round and that of all are always there.
    assert!(fired.into_inner() >= 7 * FAULTS.len());
}

#[test]
fn a_page_connection_that_cannot_be_opened_keeps_the_guest_and_is_named() {
    let host = Host::new(Habits::default());
    let mut guest = Here::new();
    let mut opened = 0;
    let connect = &mut || {
        opened += 1;
        match opened {
            3 => Err(std::io::Error::from(std::io::ErrorKind::ConnectionRefused).into()),
            _ => host.connect(PATIENT),
        }
    };
    let end = migrate(&mut guest, connect, &over(4), &mut go_on());
    settled(&end, &guest, host.end().as_deref(), Memory::Copy);
    let End::Kept(reason) = end else {
        panic!("{end:?}");
    };
    let said = reason.to_string();
    assert!(said.starts_with("connect: connection 3: "), "{said}");
}

#[test]
fn a_migration_over_several_connections_can_be_called_off_at_any_moment() {
    for moment in 0.. {
        let host = Host::new(LARGE);
        let mut guest = Here::with(large());
        let mut looks = 0;
        let mut watch = |_| {
            looks += 1;
            match looks > moment {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        let connect = &mut || host.connect(PATIENT);
        let end = migrate(&mut guest, connect, &over(3), &mut watch);
        settled(&end, &guest, host.end().as_deref(), Memory::Copy);
        match end {
            End::Moved(_) => {
                assert!(moment > 6, "it was never looked at");
                break;
            }
            End::Kept(Reason::Cancelled(_)) => {}
            other => panic!("{moment}: {other:?}"),
        }
    }
}

#[test]
fn connections_take_what_one_that_is_stuck_does_not() {
    let layout = large();
    let mut from = Ram::of(layout.clone());
    let to = Ram::of(layout.clone());
    for page in 0..layout.pages() {
        from.write(page, page + 1);
    }
    let (mut main, mut main_end) = pair();
    let (others, ends): (Vec<_>, Vec<_>) = (0..2).map(|_| pair()).unzip();
    let mut connections = PageConnections::default();
    others.into_iter().for_each(|one| connections.push(one));
    let all = PageSet::full(&layout);
    let mut arriving = Arriving::new(&layout);
    let end = Message::Round { number: 1 };
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let tick = &mut |_| Ok(());
            connections.send(&mut main, &from, &all, Round::First, &end, tick)
        });
        let threads: Vec<_> = ends
            .into_iter()
            .map(|mut connection| {
                let (mut arriving, to) = (arriving.clone(), &to);
                scope.spawn(move || {
                    while let Received::Pages(body) = connection.receive().unwrap() {
                        arriving.data(&mut connection, to, &body).unwrap();
                    }
                    connection
                })
            })
            .collect();
        let _ends: Vec<_> = threads.into_iter().map(|one| one.join().unwrap()).collect();
        // Nobody has read the main one, which has no room for what it takes at a time. What is too little for a frame it
        // keeps, and takes some more.
        let least = layout.pages() - 2 * CHUNK / PAGE_SIZE;
        assert!(arriving.pages() >= least, "{} of {least}", arriving.pages());
        while arriving.pages() < layout.pages() {
            let Received::Pages(body) = main_end.receive().unwrap() else {
                panic!("no pages");
            };
            arriving.data(&mut main_end, &to, &body).unwrap();
        }
        let sent = sending.join().unwrap().unwrap();
        assert_eq!(sent.data, layout.pages());
    });
    assert!(arriving.first_torn().is_none() && to.bytes == from.bytes);
}

/// A destination that a test talks to as a source, with the guest's memory when it is prepared.
struct Talk {
    main: Connection,
    decision: Decision,
    guest: std::thread::JoinHandle<Result<(Vec<u64>, Prepared), Failure>>,
}

impl Talk {
    fn new(connections: u32) -> Self {
        let (mut main, far) = pair();
        let (tell, told) = mpsc::channel();
        let guest = std::thread::spawn(move || {
            let mut offered = offer(far);
            offered.sections();
            tell.send(offered.decision()).unwrap();
            let mut guest = super::super::Arriving::new();
            let receiving = offered.accept().unwrap();
            let prepared = receiving.receive(&mut guest, &mut |_| ControlFlow::Continue(()))?;
            Ok((guest.ram.bytes, prepared))
        });
        main.send(&Message::hello(Purpose::Migrate, SESSION))
            .unwrap();
        main.message("welcome").unwrap();
        let layout = Ram::new().layout;
        let offer = Message::offer(&layout, Memory::Copy, false, connections);
        main.send(&offer).unwrap();
        assert_eq!(main.message("accept").unwrap(), Message::Accept);
        let decision = told.recv_timeout(FOR_EVER).unwrap();
        Self {
            main,
            decision,
            guest,
        }
    }

    /// Connects as page connection `number` of `session`, and returns the answer.
    fn join(&self, session: crate::SnapshotId, number: u32) -> (Connection, Message) {
        let (mut near, far) = pair();
        let purpose = Purpose::Pages { connection: number };
        near.send(&Message::hello(purpose, session)).unwrap();
        let joining: Box<Joining> = match Incoming::accept(far, "test").unwrap() {
            Incoming::Pages(joining) => joining,
            Incoming::Offer(_) | Incoming::Question { .. } => panic!("no page connection"),
        };
        let decision = self.decision.clone();
        let thread = std::thread::spawn(move || decision.join(joining));
        let answer = near.message("an answer").unwrap();
        let welcome = matches!(answer, Message::Welcome { .. });
        assert_eq!(thread.join().unwrap().is_ok(), welcome);
        (near, answer)
    }

    fn join_all(&self, numbers: std::ops::RangeInclusive<u32>) -> Vec<Connection> {
        let joined = numbers.map(|number| self.join(SESSION, number));
        let joined = joined.map(|(connection, answer)| {
            assert!(matches!(answer, Message::Welcome { .. }), "{answer:?}");
            connection
        });
        joined.collect()
    }

    /// Why it refuses the guest.
    fn refusal(mut self) -> String {
        let Message::Refuse { reasons } = self.main.message("refuse").unwrap() else {
            panic!("it does not refuse");
        };
        assert!(self.guest.join().unwrap().is_err());
        reasons.concat()
    }
}

/// Sends one page with this value over `connection`.
fn page(connection: &mut Connection, page: u64, value: u64) {
    let mut ram = Ram::new();
    ram.write(page, value);
    let mut pages = PageSet::empty(&ram.layout);
    pages.insert(page);
    let pending = Pending::new(&ram, &pages, Round::Later);
    send(connection, &pending, || Ok(())).unwrap();
}

#[test]
fn a_stranger_is_no_page_connection_and_disturbs_nobody() {
    let mut talk = Talk::new(3);
    let mut joined = talk.join_all(2..=2);
    let other = crate::SnapshotId([8; 16]);
    for (session, number, says) in [
        (other, 3, "no guest of that session"),
        (SESSION, 0, "connection 0 is none"),
        (SESSION, 1, "connection 1 is none"),
        (SESSION, 2, "connection 2 is there already"),
        (SESSION, 4, "connection 4 is none"),
        (SESSION, u32::MAX, "is none that is waited for"),
    ] {
        let (_, answer) = talk.join(session, number);
        let Message::Refuse { reasons } = answer else {
            panic!("{number}: {answer:?}");
        };
        assert!(reasons[0].contains(says), "{number}: {reasons:?}");
    }
    joined.extend(talk.join_all(3..=3));
    page(&mut joined[0], 5, 50);
    page(&mut joined[1], 6, 60);
    page(&mut talk.main, 7, 70);
    // Nobody comes later, either.
    joined
        .iter_mut()
        .for_each(|one| one.send(&Message::Complete).unwrap());
    talk.main.send(&Message::Complete).unwrap();
    assert_eq!(talk.main.message("prepared").unwrap(), Message::Prepared);
    let (_, answer) = talk.join(SESSION, 3);
    assert!(matches!(answer, Message::Refuse { .. }), "{answer:?}");
    let (bytes, _prepared) = talk.guest.join().unwrap().ok().unwrap();
    let words = [5, 6, 7].map(|page| bytes[page * 512 + 7]);
    assert_eq!(words, [50, 60, 70]);
}

#[test]
fn no_page_of_a_round_comes_after_one_of_the_next() {
    let mut talk = Talk::new(3);
    let [mut second, mut third] = talk.join_all(2..=3).try_into().unwrap();
    let round = Message::Round { number: 1 };
    // This one is ahead of the others, by a whole round.
    page(&mut second, 9, 1);
    second.send(&round).unwrap();
    page(&mut second, 5, 2);
    second.send(&Message::Complete).unwrap();
    talk.main.send(&round).unwrap();
    page(&mut third, 5, 1);
    third.send(&round).unwrap();
    let arrived = talk.main.message("arrived").unwrap();
    assert_eq!(arrived, Message::Arrived { number: 1 });
    third.send(&Message::Complete).unwrap();
    talk.main.send(&Message::Complete).unwrap();
    assert_eq!(talk.main.message("prepared").unwrap(), Message::Prepared);
    let (bytes, _prepared) = talk.guest.join().unwrap().ok().unwrap();
    assert_eq!((bytes[5 * 512 + 7], bytes[9 * 512 + 7]), (2, 1));
}

#[test]
fn connections_that_end_a_round_in_different_ways_are_refused() {
    let round = |number| Message::Round { number };
    for (main, other) in [
        (round(1), round(2)),
        (round(1), Message::Complete),
        (Message::Complete, round(1)),
    ] {
        let mut talk = Talk::new(2);
        let mut joined = talk.join_all(2..=2);
        joined[0].send(&other).unwrap();
        talk.main.send(&main).unwrap();
        let said = talk.refusal();
        assert!(said.contains("memory: connection 2: "), "{said}");
    }
}

/// Says something on a connection.
type Say<'a> = &'a dyn Fn(&mut Connection) -> Result<(), WireError>;

#[test]
fn what_is_not_pages_is_refused_on_a_page_connection() {
    for (say, found) in [
        (Message::Commit, "commit came"),
        (Message::cancel("no"), "cancel came"),
        (Message::Bye, "bye came"),
    ] {
        let talk = Talk::new(2);
        let mut joined = talk.join_all(2..=2);
        joined[0].send(&say).unwrap();
        let said = talk.refusal();
        let expected = format!("memory: connection 2: {found}");
        assert!(said.contains(&expected), "{said}");
    }
    let section = section("state", "some");
    let file = || ("memory".to_owned(), tempfile::tempfile().unwrap().into());
    let sums = PageTable {
        runs: vec![(5, 1)],
        sums: vec![1],
    };
    let say: [(Say<'_>, &str); 3] = [
        (&|one| one.send_section(&section), "a Section frame came"),
        (
            &|one| one.send_descriptors(&[file()]),
            "a Descriptors frame came",
        ),
        (&|one| one.send_sums(&sums), "a Sums frame came"),
    ];
    for (say, found) in say {
        let talk = Talk::new(2);
        let mut joined = talk.join_all(2..=2);
        say(&mut joined[0]).unwrap();
        let said = talk.refusal();
        let expected = format!("memory: connection 2: {found}");
        assert!(said.contains(&expected), "{said}");
    }
}

#[test]
fn a_torn_page_is_mended_over_any_connection() {
    let tear = |connection: &mut Connection| {
        let ram = Ram::new();
        let table = PageTable {
            runs: vec![(5, 1)],
            sums: vec![1],
        };
        let piece = crate::guest::Piece::new(&ram, 0, 5 * PAGE_SIZE, PAGE_SIZE);
        connection.send_pages(&table, &[piece.unwrap()]).unwrap();
    };
    for mended in [true, false] {
        let mut talk = Talk::new(3);
        let mut joined = talk.join_all(2..=3);
        let round = Message::Round { number: 1 };
        tear(&mut joined[0]);
        joined.iter_mut().for_each(|one| one.send(&round).unwrap());
        talk.main.send(&round).unwrap();
        talk.main.message("arrived").unwrap();
        if mended {
            page(&mut joined[1], 5, 1);
        }
        let end = Message::Complete;
        joined.iter_mut().for_each(|one| one.send(&end).unwrap());
        talk.main.send(&end).unwrap();
        match mended {
            true => assert_eq!(talk.main.message("prepared").unwrap(), Message::Prepared),
            false => {
                let said = talk.refusal();
                assert!(said.contains("page 5 was damaged"), "{said}");
            }
        }
    }
}

#[test]
fn pages_before_all_connections_are_there_are_refused() {
    let mut talk = Talk::new(3);
    let _joined = talk.join_all(2..=2);
    page(&mut talk.main, 5, 1);
    let said = talk.refusal();
    assert!(
        said.contains("pages came instead of the connections"),
        "{said}"
    );
}

#[test]
fn more_connections_than_there_can_be_are_refused() {
    for (how, connections, says) in [
        (Memory::Copy, 0, "0 connections; there are 1 to 16"),
        (Memory::Copy, 17, "17 connections; there are 1 to 16"),
        (Memory::Handoff, 2, "2 connections; there are 1 to 1"),
    ] {
        let (mut near, far) = pair();
        near.send(&Message::hello(Purpose::Migrate, SESSION))
            .unwrap();
        let offer = Message::offer(&layout(), how, false, connections);
        near.send(&offer).unwrap();
        let accepted = std::thread::spawn(move || Incoming::accept(far, "test").map(drop));
        near.message("welcome").unwrap();
        let Message::Refuse { reasons } = near.message("refuse").unwrap() else {
            panic!("{connections}");
        };
        assert!(reasons[0].ends_with(says), "{reasons:?}");
        assert!(accepted.join().unwrap().is_err());
    }
}
