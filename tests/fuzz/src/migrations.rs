//! The stream of a live migration, in both directions.

use std::cell::Cell;
use std::io::Write;
use std::net::Shutdown;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use migration::live::commit::Destination;
use migration::live::destination::{Decision, Failure, Offered, answer};
use migration::live::{
    DestinationGuest, End, GuestError, Incoming, Limits, Options, SourceGuest, migrate,
};
use migration::wire::connection::{Connection, Limits as Times, Named, Section};
use migration::wire::frame::{Header, PageTable};
use migration::wire::message::{Memory, Outcome, Purpose, VERSION};
use migration::wire::{Kind, Message, WireError};
use migration::{GuestPages, PAGE_SIZE, PageSet, RamLayout, SnapshotId};

use crate::input::Input;

const PAGES: usize = 12;
/// XXH64 of a page of zeroes.
const SUM_OF_ZEROES: u64 = 0xac86_9b6f_32d8_bbdb;
const WORDS: usize = PAGE_SIZE as usize / 8;

/// Whoever connects, or is connected to, says something like a migration, or anything. Neither end panics or waits, the guest
/// is called in the order its trait says, and what the source says about it is so.
pub fn migration_stream(data: &[u8]) {
    let mut input = Input::new(data);
    let how = [Memory::Copy, Memory::Handoff][usize::from(input.pick(2))];
    let role = input.pick(4);
    let connections = match role {
        0 | 1 => 1,
        _ => 2 + u32::from(input.pick(2)),
    };
    if role.is_multiple_of(2) {
        destination(&mut input, how, connections);
    } else {
        source(&mut input, how, connections);
    }
}

/// RAM with cells that both this crate and the engine write.
struct Ram {
    layout: RamLayout,
    words: Box<[Cell<u64>]>,
}

// SAFETY: the cells are used before the engine has them and never again; its threads know no cells, as the trait says.
#[allow(unsafe_code)]
unsafe impl Sync for Ram {}

impl Ram {
    fn new() -> Self {
        let ranges = [(0, 8 * PAGE_SIZE), (1 << 32, 4 * PAGE_SIZE)];
        let words = (0..PAGES * WORDS).map(|word| Cell::new((word / WORDS % 2) as u64));
        Self {
            layout: RamLayout::new(ranges).expect("a layout"),
            words: words.collect(),
        }
    }
}

// SAFETY: the ranges lie one after the other in `words`, which is never moved; its alignment is that of a `u64`, which is all
// that is relied on.
#[allow(unsafe_code)]
unsafe impl GuestPages for Ram {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, range: usize) -> *mut u8 {
        let start = self.words.as_ptr().cast_mut().cast::<u8>();
        start.wrapping_add(self.layout.offset(range) as usize)
    }
}

/// Bytes that look like frames, with sequence numbers and checksums that are right until somebody changes them.
#[derive(Default)]
struct Stream {
    bytes: Vec<u8>,
    sequence: u64,
}

impl Stream {
    fn frame(&mut self, kind: Kind, body: &[u8]) -> usize {
        let start = self.bytes.len();
        let header = Header::new(kind, self.sequence, body);
        self.sequence = self.sequence.wrapping_add(1);
        self.bytes.extend(header.to_bytes());
        self.bytes.extend(body);
        start
    }

    /// A frame of what the peer should say, to which something may happen.
    fn say(&mut self, input: &mut Input<'_>, kind: Kind, body: &[u8], data: &[u8]) {
        let mut body = body.to_vec();
        match input.pick(24) {
            // Another frame comes first.
            1 => self.any(input),
            // It is missing, or comes twice.
            2 => return,
            3 => {
                self.frame(kind, &body);
                self.bytes.extend(data);
            }
            // The body is another one, with the right checksum.
            4 | 5 => {
                let at = usize::from(input.word()) % (body.len() + 1);
                let new = input.byte();
                match body.get_mut(at) {
                    Some(byte) => *byte = new,
                    None => body.push(new),
                }
            }
            6 => body.truncate(input.byte().into()),
            7 => self.sequence = input.qword(),
            8 => {
                let len = usize::from(input.byte());
                self.bytes.extend(input.slice(len));
            }
            _ => {}
        }
        let start = self.frame(kind, &body);
        self.bytes.extend(data);
        if input.pick(24) == 1 {
            let at = start + usize::from(input.word()) % (self.bytes.len() - start);
            self.bytes[at] ^= 1 << input.pick(8);
        }
    }

    /// A frame with anything in it.
    fn any(&mut self, input: &mut Input<'_>) {
        let kinds = [
            Kind::Message,
            Kind::Section,
            Kind::Pages,
            Kind::Zeroes,
            Kind::Descriptors,
            Kind::KeepAlive,
            Kind::Sums,
        ];
        let kind = kinds[usize::from(input.pick(7))];
        let len = usize::from(input.byte());
        let body = input.slice(len).to_vec();
        self.frame(kind, &body);
    }

    fn message(&mut self, input: &mut Input<'_>, message: &Message) {
        let body = message.to_bytes().expect("a message");
        self.say(input, Kind::Message, &body, &[]);
    }

    fn section(&mut self, input: &mut Input<'_>, name: &str) {
        let section = Section {
            name: name.to_owned(),
            version: 1,
            bytes: input.slice(8).to_vec(),
        };
        let body = section.to_bytes().expect("a section");
        self.say(input, Kind::Section, &body, &[]);
    }

    /// Checksums of pages, which may be those of zeroes.
    fn sums(&mut self, input: &mut Input<'_>) {
        let mut table = PageTable::default();
        for _ in 0..=input.pick(2) {
            let (first, count) = (input.pick(13).into(), input.pick(4).into());
            table.runs.push((first, count));
        }
        let pages = table.pages() as usize;
        table.sums = (0..pages)
            .map(|_| SUM_OF_ZEROES ^ u64::from(input.pick(8) == 1))
            .collect();
        self.say(input, Kind::Sums, &table.to_bytes(), &[]);
    }

    /// Pages of zeroes, in either way: as such, or with checksums that may be right.
    fn pages(&mut self, input: &mut Input<'_>) {
        let mut table = PageTable::default();
        for _ in 0..=input.pick(3) {
            let (first, count) = (input.pick(13).into(), input.pick(4).into());
            table.runs.push((first, count));
        }
        if input.pick(2) == 0 {
            self.say(input, Kind::Zeroes, &table.to_bytes(), &[]);
            return;
        }
        let pages = table.pages() as usize;
        table.sums = (0..pages)
            .map(|_| SUM_OF_ZEROES ^ u64::from(input.pick(2)))
            .collect();
        let data = vec![0; pages * PAGE_SIZE as usize];
        self.say(input, Kind::Pages, &table.to_bytes(), &data);
    }

    /// A connection to a peer that has said all this and hung up.
    fn connection(&self) -> (Connection, UnixStream) {
        let (connection, far) = self.open_connection();
        far.shutdown(Shutdown::Write).expect("a socket");
        (connection, far)
    }

    /// A connection to a peer that has said all this and listens.
    fn open_connection(&self) -> (Connection, UnixStream) {
        let (near, mut far) = UnixStream::pair().expect("sockets");
        far.set_nonblocking(true).expect("a socket");
        // What is more than there is room for is not said.
        let _ = far.write(&self.bytes);
        let times = Times {
            silence: Duration::from_secs(1),
            beat: Duration::from_secs(60),
        };
        (Connection::new(near.into(), times).expect("a thread"), far)
    }
}

/// A guest that arrives.
struct There {
    ram: Ram,
    restored: bool,
}

impl DestinationGuest for There {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn early(&mut self, section: Section) -> Result<(), GuestError> {
        assert!(!self.restored);
        odd(&section)
    }

    fn restore(&mut self, sections: Vec<Section>) -> Result<(), GuestError> {
        assert!(!std::mem::replace(&mut self.restored, true));
        sections.iter().try_for_each(odd)
    }
}

/// Refuses some sections.
fn odd(section: &Section) -> Result<(), GuestError> {
    if section.bytes.first() == Some(&1) {
        return Err("an odd section".into());
    }
    Ok(())
}

/// What comes over a page connection, with as many rounds as the main one has.
fn pages_of(input: &mut Input<'_>, number: u32, rounds: u32, session: SnapshotId) -> Stream {
    let mut stream = Stream::default();
    let purpose = Purpose::Pages { connection: number };
    stream.message(input, &Message::hello(purpose, session));
    for number in 1..=rounds {
        for _ in 0..input.pick(3) {
            stream.pages(input);
        }
        stream.message(input, &Message::Round { number });
    }
    for _ in 0..input.pick(3) {
        stream.pages(input);
    }
    stream.message(input, &Message::Complete);
    stream
}

/// Hears one more who connects while a guest arrives.
fn join(decision: &Decision, connection: Connection) {
    match Incoming::accept(connection, "fuzz") {
        Ok(Incoming::Pages(joining)) => {
            if let Err(reason) = decision.join(joining) {
                assert!(reason.len() < 1 << 10, "{reason}");
            }
        }
        Ok(Incoming::Offer(offered)) => offered.refuse(vec!["no".to_owned()]),
        Ok(Incoming::Question { connection, .. }) => {
            let _ = answer(connection, Outcome::Unknown);
        }
        Err(error) => short(&error),
    }
}

fn destination(input: &mut Input<'_>, how: Memory, connections: u32) {
    let mut ram = Ram::new();
    for word in &mut ram.words {
        word.set(0);
    }
    let session = SnapshotId([7; 16]);
    let mut stream = Stream::default();
    let verify = input.pick(4) == 1;
    let purposes = [Purpose::Migrate, Purpose::Outcome];
    let purpose = purposes[usize::from(input.pick(16) == 1)];
    stream.message(input, &Message::hello(purpose, session));
    stream.section(input, "machine");
    stream.message(
        input,
        &Message::offer(&ram.layout, how, verify, connections),
    );
    let rounds = input.pick(3).into();
    for number in 1..=rounds {
        for _ in 0..input.pick(4) {
            stream.pages(input);
        }
        stream.section(input, "early");
        stream.message(input, &Message::Round { number });
    }
    for _ in 0..input.pick(3) {
        stream.pages(input);
    }
    stream.section(input, "state");
    // Without any, all of memory is said to be zero.
    for _ in 0..input.pick(3) * u8::from(verify) {
        stream.sums(input);
    }
    stream.message(input, &Message::Complete);
    let last = match input.pick(4) {
        1 => Message::cancel("no"),
        _ => Message::Commit,
    };
    stream.message(input, &last);
    stream.message(input, &Message::Bye);
    let pages: Vec<_> = (2..=connections)
        .map(|number| pages_of(input, number, rounds, session))
        .collect();
    stream.bytes.extend(input.rest());
    let (connection, _peer) = stream.connection();
    let mut guest = There {
        ram,
        restored: false,
    };
    let mut offered = match Incoming::accept(connection, "fuzz") {
        Ok(Incoming::Offer(offered)) => offered,
        Ok(Incoming::Question { connection, .. }) => {
            let _ = answer(connection, Outcome::Unknown);
            return;
        }
        Ok(Incoming::Pages(joining)) => return joining.refuse("no guest".to_owned()),
        Err(error) => return short(&error),
    };
    let decision = offered.decision();
    assert!(offered.descriptors().is_empty(), "none can be passed");
    if offered
        .sections()
        .iter()
        .any(|section| odd(section).is_err())
    {
        offered.refuse(vec!["odd".to_owned()]);
        assert_eq!(decision.state(), Destination::Discarded);
        return;
    }
    let mut peers = Vec::new();
    for stream in pages {
        let (connection, peer) = stream.connection();
        peers.push(peer);
        join(&decision, connection);
    }
    match arrive(*offered, &mut guest) {
        Ok(decision) => {
            assert!(guest.restored);
            assert_eq!(decision.state(), Destination::Running);
            let session = session.to_string();
            let outcome = decision.asked(&session);
            assert!([Outcome::Running, Outcome::Unknown].contains(&outcome));
        }
        Err(error) => {
            short(&error);
            assert_ne!(decision.state(), Destination::Running);
        }
    }
}

fn arrive(offered: Offered, guest: &mut There) -> Result<Decision, Failure> {
    let receiving = offered.accept()?;
    let prepared = receiving.receive(guest, &mut |arrived| {
        assert!(arrived.pages <= 1 << 20);
        ControlFlow::Continue(())
    })?;
    let decision = prepared.decision();
    assert!(guest.restored);
    let mut committed = prepared.commit(&mut || ControlFlow::Continue(()), || Ok(()))?;
    if committed.tell() {
        committed.await_bye();
    }
    Ok(decision)
}

fn short(error: &dyn std::error::Error) {
    assert!(error.to_string().len() < 80 << 10, "{error}");
}

/// A guest that leaves.
struct Here {
    ram: Ram,
    runs: bool,
    released: bool,
}

impl SourceGuest for Here {
    type Memory = Ram;

    fn memory(&self) -> &Ram {
        &self.ram
    }

    fn offer(&mut self) -> Result<Vec<Section>, GuestError> {
        let (name, bytes) = ("machine".to_owned(), vec![1, 2, 3]);
        Ok(vec![Section {
            name,
            version: 1,
            bytes,
        }])
    }

    fn descriptors(&mut self) -> Result<Vec<Named>, GuestError> {
        Ok(vec![("memory".to_owned(), std::io::pipe()?.0.into())])
    }

    fn track(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn early(&mut self) -> Result<Vec<Section>, GuestError> {
        Ok(Vec::new())
    }

    fn written(&mut self) -> Result<PageSet, GuestError> {
        Ok(PageSet::full(&self.ram.layout))
    }

    fn slow_down(&mut self, percent: u8) {
        assert!(percent < 100);
    }

    fn stop(&mut self) -> Result<(), GuestError> {
        assert!(std::mem::replace(&mut self.runs, false));
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<Section>, GuestError> {
        assert!(!self.runs);
        Ok(Vec::new())
    }

    fn release(&mut self) {
        assert!(!self.runs && !self.released);
        self.released = true;
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        (self.runs, self.released) = (true, false);
        Ok(())
    }
}

fn source(input: &mut Input<'_>, how: Memory, connections: u32) {
    let mut stream = Stream::default();
    let version = VERSION + u32::from(input.pick(16) == 1);
    let program = "fuzz".to_owned();
    let welcome = Message::Welcome { version, program };
    stream.message(input, &welcome);
    stream.message(input, &Message::Accept);
    for number in 1..=u32::from(input.pick(3)) {
        stream.message(input, &Message::Arrived { number });
    }
    if input.pick(8) == 1 {
        stream.message(input, &Message::refuse(vec!["no".to_owned()]));
    }
    stream.message(input, &Message::Prepared);
    let running = Message::Running {
        resume_us: input.qword(),
        restore_us: input.qword(),
    };
    stream.message(input, &running);
    let pages: Vec<_> = (2..=connections)
        .map(|_| {
            let mut one = Stream::default();
            one.message(input, &welcome);
            one
        })
        .collect();
    let whole = {
        let mut whole = Stream::default();
        whole.frame(Kind::Message, &welcome.to_bytes().expect("a message"));
        whole.bytes
    };
    let mut questions = Vec::new();
    for _ in 0..input.pick(3) {
        let mut one = Stream::default();
        let outcomes = [Outcome::Unknown, Outcome::Running, Outcome::Discarded];
        let outcome = outcomes[usize::from(input.pick(3))];
        one.message(input, &Message::Outcome { outcome });
        questions.push(one);
    }
    let patience = input.byte();
    stream.bytes.extend(input.rest());
    let mut guest = Here {
        ram: Ram::new(),
        runs: true,
        released: false,
    };
    let options = Options {
        how,
        files: how == Memory::Handoff,
        verify: input.pick(2) == 1,
        connections,
        limits: Limits {
            timeout: Duration::ZERO,
            ..Limits::default()
        },
        ask: (2, Duration::ZERO),
    };
    let mut streams = std::iter::once(stream).chain(pages).chain(questions);
    let mut peers = Vec::new();
    let mut looks = 0u8;
    let end = migrate(
        &mut guest,
        &mut || {
            let stream = streams.next().ok_or(WireError::Closed)?;
            // Pages go to one that listens; one that has said anything else is not waited for.
            let (connection, peer) = if connections > 1 && stream.bytes == whole {
                stream.open_connection()
            } else {
                stream.connection()
            };
            peers.push(peer);
            Ok(connection)
        },
        &options,
        &mut |_| {
            looks = looks.saturating_add(1);
            if looks > patience && patience > 0 {
                return ControlFlow::Break(());
            }
            ControlFlow::Continue(())
        },
    );
    match end {
        End::Moved(_) | End::InDoubt { .. } => assert!(!guest.runs && guest.released),
        End::Kept(reason) => {
            short(&reason);
            assert!(guest.runs && !guest.released);
        }
        End::Lost { .. } => panic!("it can always go on"),
    }
}
