//! Peers that are none, hang, or talk nonsense.

use super::*;

/// What is no migration: bytes, and whether the connection is closed after them.
fn strangers() -> Vec<(&'static str, Vec<u8>, bool)> {
    let mut noise = Vec::new();
    let mut state = 1u64;
    for _ in 0..4096 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
        noise.push((state >> 56) as u8);
    }
    let get = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: scanner\r\n\r\n";
    vec![
        ("nothing", Vec::new(), false),
        ("a port scanner", Vec::new(), true),
        ("a short request", b"GET /\r\n".to_vec(), false),
        ("a request", get.to_vec(), false),
        ("noise", noise.clone(), true),
        ("endless noise", noise.repeat(1000), false),
        ("zeroes", vec![0; 65536], false),
        ("the name of the protocol", b"TERN".repeat(100), false),
    ]
}

/// Says all `bytes`, as far as anybody listens.
fn say(mut socket: UnixStream, bytes: Vec<u8>, close: bool) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let _ = socket.write_all(&bytes);
        if !close {
            let _ = std::io::copy(&mut socket, &mut std::io::sink());
        }
    })
}

#[test]
fn a_stranger_is_no_source() {
    for (what, bytes, close) in strangers() {
        let (near, far) = UnixStream::pair().unwrap();
        let stranger = say(near, bytes, close);
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            let accepted = Incoming::accept(open(far, HASTY), "test");
            sender.send(accepted.map(|_| ())).unwrap();
        });
        let error = receiver.recv_timeout(FOR_EVER).unwrap().unwrap_err();
        assert!(matches!(error, Failure::Wire { .. }), "{what}: {error}");
        stranger.join().unwrap();
    }
}

#[test]
fn a_stranger_is_no_destination() {
    for (what, bytes, close) in strangers() {
        let mut guest = Here::new();
        let mut stranger = None;
        let end = migrate(
            &mut guest,
            &mut || {
                let (near, far) = UnixStream::pair().unwrap();
                stranger = Some(say(far, bytes.clone(), close));
                Ok(open(near, HASTY))
            },
            &patient(Memory::Copy),
            &mut go_on(),
        );
        let as_expected = matches!(
            end,
            End::Kept(Reason::Wire {
                phase: Phase::Connect,
                ..
            })
        );
        assert!(as_expected, "{what}: {end:?}");
        stranger.unwrap().join().unwrap();
        again(&mut guest, Memory::Copy);
    }
}

#[test]
fn a_destination_that_built_other_memory_is_no_destination() {
    for how in [Memory::Copy, Memory::Handoff] {
        let host = Host::new(Habits {
            other_ram: true,
            ..Habits::default()
        });
        let mut guest = Here::new();
        let connect = &mut || host.connect(PATIENT);
        let end = migrate(&mut guest, connect, &patient(how), &mut go_on());
        let there = host.end();
        let refused = matches!(end, End::Kept(Reason::Refused { .. }));
        assert!(refused, "{how:?}: {end:?}");
        settled(&end, &guest, there.as_deref(), how);
        again(&mut guest, how);
    }
}

/// Migrates to a destination whose `method` hangs while it sends signs of life.
fn to_one_that_hangs(method: &'static str) -> End {
    let host = Host::new(Habits {
        stalls: Some(method),
        ..Habits::default()
    });
    let mut guest = Here::new();
    let quick = Options {
        ask: (2, Duration::ZERO),
        ..patient(Memory::Copy)
    };
    let connect = &mut || {
        let (near, far) = UnixStream::pair().unwrap();
        host.connections.send(open(far, PATIENT)).unwrap();
        let silence = Duration::from_millis(500);
        Ok(open(near, connection::Limits { silence, ..HASTY }))
    };
    let end = migrate(&mut guest, connect, &quick, &mut go_on());
    host.goes_on.store(true, Ordering::SeqCst);
    let there = host.end();
    settled(&end, &guest, there.as_deref(), Memory::Copy);
    end
}

#[test]
fn a_destination_that_hangs_after_the_commit_leaves_doubt() {
    let end = to_one_that_hangs("take");
    let in_doubt = matches!(end, End::InDoubt { .. } | End::Kept(_));
    assert!(in_doubt, "{end:?}");
}

#[test]
fn a_destination_that_hangs_before_the_commit_does_not_keep_the_guest_standing_still() {
    let end = bounded(|| to_one_that_hangs("restore"));
    let phase = Phase::Restore;
    assert!(
        matches!(&end, End::Kept(Reason::Wire { phase: in_phase, .. }) if *in_phase == phase),
        "{end:?}"
    );
}

/// Hears `work` out in bounded time.
fn bounded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(FOR_EVER).unwrap()
}

#[test]
fn an_offer_that_makes_no_sense_is_refused_with_a_reason() {
    let range = |start, len| crate::wire::message::Range { start, len };
    for (memory, reason) in [
        (vec![], "0 RAM ranges"),
        (vec![range(1, PAGE_SIZE)], "RAM"),
        (vec![range(0, PAGE_SIZE), range(0, PAGE_SIZE)], "RAM"),
    ] {
        let (near, far) = UnixStream::pair().unwrap();
        let mut near = open(near, PATIENT);
        let session = crate::SnapshotId([1; 16]);
        let purpose = crate::wire::message::Purpose::Migrate;
        near.send(&Message::hello(purpose, session)).unwrap();
        let how = Memory::Copy;
        let verify = false;
        near.send(&Message::Offer {
            memory,
            how,
            verify,
            connections: 1,
        })
        .unwrap();
        let accepted = std::thread::spawn(move || Incoming::accept(open(far, PATIENT), "test"));
        let reasons = bounded(move || {
            near.message("welcome").unwrap();
            near.message("refuse").unwrap()
        });
        assert!(accepted.join().unwrap().is_err());
        let Message::Refuse { reasons } = reasons else {
            panic!("{reasons:?}");
        };
        assert!(reasons[0].contains(reason), "{reasons:?}");
    }
}

#[test]
fn a_destination_that_talks_without_end_is_given_up() {
    let (near, far) = UnixStream::pair().unwrap();
    // It reads nothing and sends as much as there is room for.
    far.shutdown(std::net::Shutdown::Read).unwrap();
    let mut far = open(far, HASTY);
    let talk = std::thread::spawn(move || {
        for _ in 0..10_000_000 {
            if far.send(&Message::Accept).is_err() {
                break;
            }
        }
    });
    let end = bounded(move || {
        let mut near = Some(open(near, PATIENT));
        let connect = &mut || near.take().ok_or(WireError::Closed);
        migrate(
            &mut Here::new(),
            connect,
            &patient(Memory::Copy),
            &mut go_on(),
        )
    });
    assert!(matches!(end, End::Kept(_)), "{end:?}");
    talk.join().unwrap();
}
