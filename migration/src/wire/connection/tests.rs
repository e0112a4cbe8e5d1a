//! One end is a [`Connection`], the other one too or a bare socket.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;

use super::*;

/// For what is to happen.
const PATIENT: Limits = Limits {
    silence: Duration::from_secs(20),
    beat: Duration::from_millis(20),
};
/// For what is to be given up.
const HASTY: Limits = Limits {
    silence: Duration::from_millis(200),
    beat: Duration::from_millis(5),
};

fn open(socket: UnixStream, limits: Limits) -> Connection {
    Connection::new(OwnedFd::from(socket), limits).unwrap()
}

fn pair(limits: Limits) -> (Connection, Connection) {
    let (a, b) = UnixStream::pair().unwrap();
    (open(a, limits), open(b, limits))
}

/// A connection, and the bare socket at its other end.
fn bare(limits: Limits) -> (Connection, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    (open(a, limits), b)
}

/// What `work` comes to, which must not take for ever.
fn bounded<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(Duration::from_secs(30)).unwrap()
}

fn frame(kind: Kind, sequence: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Header::new(kind, sequence, body).to_bytes().to_vec();
    bytes.extend(body);
    bytes
}

fn section(len: usize) -> Section {
    Section {
        name: "big".to_owned(),
        version: 3,
        bytes: (0..len).map(|index| index as u8).collect(),
    }
}

#[test]
fn a_peer_that_says_nothing_is_lost() {
    let (mut near, far) = bare(HASTY);
    let error = bounded(move || near.receive().unwrap_err());
    assert!(matches!(error, WireError::Silent(_)), "{error}");
    drop(far);
}

#[test]
fn a_peer_that_stops_after_some_frames_is_lost() {
    let (mut near, mut far) = bare(HASTY);
    for sequence in 0..5 {
        far.write_all(&frame(Kind::KeepAlive, sequence, &[]))
            .unwrap();
    }
    far.write_all(&frame(Kind::Message, 5, b"\"accept\"")[..20])
        .unwrap();
    let error = bounded(move || near.receive().unwrap_err());
    assert!(matches!(error, WireError::Silent(_)), "{error}");
    drop(far);
}

#[test]
fn a_peer_that_reads_nothing_is_lost() {
    let (mut near, far) = bare(HASTY);
    let error = bounded(move || near.send_section(&section(8 << 20)).unwrap_err());
    assert!(matches!(error, WireError::Silent(_)), "{error}");
    drop(far);
}

#[test]
fn a_peer_that_is_slow_to_answer_is_waited_for() {
    let limits = Limits {
        silence: Duration::from_secs(2),
        beat: Duration::from_millis(20),
    };
    let (mut near, mut far) = pair(limits);
    let busy = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(3));
        far.send(&Message::Accept).unwrap();
        far
    });
    let received = bounded(move || near.receive().unwrap());
    assert!(matches!(received, Received::Message(Message::Accept)));
    busy.join().unwrap();
}

#[test]
fn a_peer_that_is_slow_to_read_is_waited_for() {
    let (a, b) = UnixStream::pair().unwrap();
    // Room for a few frames only.
    rustix::net::sockopt::set_socket_send_buffer_size(&a, 1).unwrap();
    let mut near = open(a, HASTY);
    std::thread::sleep(5 * HASTY.silence);
    let mut far = open(b, PATIENT);
    let received = std::thread::spawn(move || far.receive().unwrap());
    near.send(&Message::Accept).unwrap();
    let received = bounded(move || received.join().unwrap());
    assert!(matches!(received, Received::Message(Message::Accept)));
}

#[test]
fn a_frame_that_comes_in_drops_is_given_up() {
    for kind in [Kind::Message, Kind::Section] {
        let (mut near, mut far) = bare(HASTY);
        let header = Header::new(kind, 0, &[1; 60000]).to_bytes();
        let dripping = std::thread::spawn(move || {
            far.write_all(&header)?;
            loop {
                far.write_all(&[1])?;
                std::thread::sleep(HASTY.silence / 20);
            }
            #[allow(unreachable_code)]
            io::Result::Ok(())
        });
        let error = bounded(move || near.receive().unwrap_err());
        assert!(matches!(error, WireError::Slow(_)), "{kind:?}: {error}");
        dripping.join().unwrap().unwrap_err();
    }
}

#[test]
fn a_flood_of_keep_alives_does_not_hide_that_nothing_came() {
    let (mut near, mut far) = bare(PATIENT);
    let flood = std::thread::spawn(move || {
        let mut sequence = 0;
        while far
            .write_all(&frame(Kind::KeepAlive, sequence, &[]))
            .is_ok()
        {
            sequence += 1;
        }
    });
    let nothing = bounded(move || near.receive_within(Duration::from_millis(50)).unwrap());
    assert!(nothing.is_none());
    flood.join().unwrap();
}

#[test]
fn a_wrong_length_is_noticed_before_anything_is_waited_for() {
    for bit in 0..32 {
        let (mut near, mut far) = bare(PATIENT);
        let mut bytes = frame(Kind::Section, 0, &section(100).to_bytes().unwrap());
        bytes[4 + bit / 8] ^= 1 << (bit % 8);
        far.write_all(&bytes).unwrap();
        let error = bounded(move || near.receive().unwrap_err());
        let noticed = matches!(error, WireError::Checksum { sequence: 0 });
        assert!(noticed, "bit {bit}: {error}");
    }
}

#[test]
fn frames_are_whole_however_their_bytes_come() {
    let section = section(3000);
    let mut bytes = frame(Kind::KeepAlive, 0, &[]);
    bytes.extend(frame(Kind::Section, 1, &section.to_bytes().unwrap()));
    bytes.extend(frame(Kind::Message, 2, b"\"accept\""));
    for step in [1, 7, HEADER_LEN, 4096] {
        let (mut near, mut far) = bare(PATIENT);
        let bytes = bytes.clone();
        let writing = std::thread::spawn(move || {
            for some in bytes.chunks(step) {
                far.write_all(some).unwrap();
            }
            far
        });
        let Received::Section(received) = near.receive().unwrap() else {
            panic!("not a section");
        };
        assert_eq!(received, section);
        assert_eq!(near.message("accept").unwrap(), Message::Accept);
        drop(writing.join().unwrap());
        assert!(matches!(near.receive(), Err(WireError::Closed)));
    }
}

#[test]
fn frames_are_whole_through_a_narrow_socket() {
    let (a, b) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&a, 1).unwrap();
    let (mut near, mut far) = (open(a, PATIENT), open(b, PATIENT));
    let sent = section(1 << 20);
    let expected = sent.clone();
    let sending = std::thread::spawn(move || near.send_section(&sent).map(|()| near));
    let Received::Section(received) = far.receive().unwrap() else {
        panic!("not a section");
    };
    assert_eq!(received, expected);
    sending.join().unwrap().unwrap();
}

#[test]
fn a_connection_that_is_dropped_ends_at_once() {
    let (near, mut far) = bare(PATIENT);
    bounded(move || drop(near));
    let mut rest = Vec::new();
    far.read_to_end(&mut rest).unwrap();
    assert!(rest.len().is_multiple_of(HEADER_LEN));
}

/// A pipe: at its end, one sees whether anybody still has its other end.
struct Pipe(io::PipeReader);

impl Pipe {
    fn new() -> (Self, OwnedFd) {
        let (reader, writer) = io::pipe().unwrap();
        (Self(reader), writer.into())
    }

    fn is_open(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec::default())).unwrap() == 0
    }
}

#[test]
fn descriptors_arrive_in_order_with_their_names() {
    for count in [1, 63, 64, 65, 200] {
        let (mut near, mut far) = pair(PATIENT);
        let (mut pipes, mut all) = (Vec::new(), Vec::new());
        for index in 0..count {
            let (pipe, fd) = Pipe::new();
            pipes.push(pipe);
            all.push((format!("file {index}"), fd));
        }
        near.send_descriptors(&all).unwrap();
        drop(all);
        let mut received = Vec::new();
        while received.len() < count {
            let Received::Descriptors(some) = far.receive().unwrap() else {
                panic!("not descriptors");
            };
            received.extend(some);
        }
        for (index, (pipe, (name, fd))) in pipes.iter_mut().zip(received).enumerate() {
            assert_eq!(name, format!("file {index}"));
            assert!(pipe.is_open());
            let mut file = std::fs::File::from(fd);
            file.write_all(&[index as u8]).unwrap();
            drop(file);
            let mut said = Vec::new();
            pipe.0.read_to_end(&mut said).unwrap();
            assert_eq!(said, [index as u8]);
        }
    }
}

/// Sends a byte with descriptors.
fn pass(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
    let sent = sendmsg(
        socket,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::empty(),
    );
    assert_eq!(sent.unwrap(), bytes.len());
}

#[test]
fn descriptors_that_are_not_as_announced_are_refused_and_closed() {
    let named = |count| -> Vec<String> { (0..count).map(|n| format!("file {n}")).collect() };
    for (names, fds) in [
        (1, 0),
        (1, 2),
        (2, 1),
        (0, 1),
        (63, 64),
        (64, 63),
        (64, 65),
        (64, 253),
        (65, 65),
    ] {
        let (mut near, mut far) = bare(HASTY);
        let body = serde_json::to_vec(&named(names)).unwrap();
        far.write_all(&frame(Kind::Descriptors, 0, &body)).unwrap();
        let (pipe, fd) = Pipe::new();
        pass(&far, &[0], &vec![fd.as_fd(); fds]);
        drop(fd);
        let error = bounded(move || near.receive().map(|_| ()).unwrap_err());
        let malformed = matches!(error, WireError::Malformed { .. });
        assert!(malformed, "{names} names, {fds} descriptors: {error}");
        assert!(!pipe.is_open(), "{names} names, {fds} descriptors");
    }
}

#[test]
fn descriptors_that_nobody_announced_are_closed() {
    let (mut near, far) = bare(PATIENT);
    let (pipe, fd) = Pipe::new();
    pass(
        &far,
        &frame(Kind::Message, 0, b"\"accept\""),
        &[fd.as_fd(); 3],
    );
    drop(fd);
    assert_eq!(near.message("accept").unwrap(), Message::Accept);
    assert!(!pipe.is_open());
}

#[test]
fn a_sender_that_failed_sends_nothing_more() {
    let (mut near, far) = bare(PATIENT);
    drop(far);
    for _ in 0..2 {
        let error = near.send(&Message::Accept).unwrap_err();
        assert!(matches!(error, WireError::Closed), "{error}");
    }
}

#[test]
fn a_message_that_is_too_long_is_not_begun() {
    let (mut near, mut far) = pair(PATIENT);
    let long = Message::Cancel {
        reason: "x".repeat(70000),
    };
    let error = near.send(&long).unwrap_err();
    assert!(matches!(error, WireError::TooLong { .. }), "{error}");
    near.send(&Message::Accept).unwrap();
    assert_eq!(far.message("accept").unwrap(), Message::Accept);
}
