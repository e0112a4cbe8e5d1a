//! A thread between a [`migration::wire::Connection`] and the network.
//!
//! ```text
//! Connection ── socket pair ── thread: TLS ── TCP
//! ```
//!
//! It says nothing of its own and keeps no more than a few buffers: a side that falls silent, or does not read, does so at
//! both ends. If one end is closed, so is the other, after what came before was passed on.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migration::wire::Connection;
use migration::wire::connection::Limits;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes of each buffer.
const BUFFER: usize = 128 << 10;
/// How long the last bytes may take to leave, once the connection is dropped.
const ENDING: Duration = Duration::from_secs(1);

/// Carries frames over `tls`, whose handshake is done.
pub(super) fn start(
    tls: rustls::Connection,
    tcp: TcpStream,
    limits: Limits,
) -> io::Result<Connection> {
    let (near, far) = UnixStream::pair()?;
    far.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let pump = Pump {
        tls,
        tcp,
        near: far,
        outgoing: vec![0; BUFFER].into(),
        incoming: Queue::new(),
        cipher: Queue::new(),
        talking: true,
        sending: true,
        hearing: true,
        deadline: None,
        finished: false,
    };
    let thread = std::thread::Builder::new()
        .name("tls".to_owned())
        .stack_size(512 << 10)
        .spawn(move || {
            if let Err(error) = pump.run() {
                tracing::warn!("the TLS connection was ended: {error}");
            }
        })?;
    Ok(Connection::new(near.into(), limits)?.carried_by(Carrier(Some(thread))))
}

/// Waits for the thread, which ends soon after its connection was closed.
struct Carrier(Option<JoinHandle<()>>);

impl Drop for Carrier {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            let _ = thread.join();
        }
    }
}

struct Pump {
    tls: rustls::Connection,
    tcp: TcpStream,
    /// To the connection.
    near: UnixStream,
    /// Where bytes of the connection are read into.
    outgoing: Box<[u8]>,
    /// Bytes for the connection.
    incoming: Queue,
    /// Bytes from the network.
    cipher: Queue,
    /// The connection may say more.
    talking: bool,
    /// The other side can be told more.
    sending: bool,
    /// The other side may say more.
    hearing: bool,
    /// The connection is closed, and when it is to be over.
    deadline: Option<Instant>,
    /// Nothing more follows over TCP, and it was told so.
    finished: bool,
}

impl Pump {
    fn run(mut self) -> Result<(), rustls::Error> {
        loop {
            let sent = self.send();
            let moved = self.receive()? || sent;
            if self.is_over() {
                return Ok(());
            }
            if !moved && let Err(error) = self.wait() {
                return Err(rustls::Error::General(format!("poll: {error}")));
            }
        }
    }

    fn is_over(&self) -> bool {
        let late = self
            .deadline
            .is_some_and(|deadline| Instant::now() >= deadline);
        let delivered = !self.hearing && self.incoming.is_empty();
        let nobody = !self.talking && (!self.sending || !self.hearing);
        late || delivered || nobody
    }

    /// True if ciphertext waits to be sent.
    fn owes(&self) -> bool {
        self.sending && self.tls.wants_write()
    }

    /// True if more of the connection can be read. What was read before has to be gone.
    fn listens(&self) -> bool {
        self.talking && self.sending && !self.tls.wants_write()
    }

    /// The connection was closed. It hears nothing more, but its last words may still have to be read.
    fn closed(&mut self) {
        self.incoming.clear();
        self.deadline.get_or_insert(Instant::now() + ENDING);
        // Unless nobody would hear them.
        self.talking &= self.sending;
    }

    /// The connection was closed, and its last words were read.
    fn hung_up(&mut self) {
        self.closed();
        self.talking = false;
        self.tls.send_close_notify();
    }

    /// The other side hears nothing more. The connection learns it when it sends.
    fn cannot_send(&mut self) {
        self.sending = false;
        let _ = self.near.shutdown(Shutdown::Read);
    }

    /// The other side says nothing more. Then it does not listen either: connections are closed as a whole.
    fn heard_all(&mut self) {
        self.hearing = false;
        self.cannot_send();
    }

    /// Moves bytes out. True if there were any.
    fn send(&mut self) -> bool {
        let mut moved = false;
        if self.listens() {
            match self.near.read(&mut self.outgoing) {
                Ok(0) => self.hung_up(),
                Ok(count) => {
                    moved = true;
                    let bytes = self.outgoing.get(..count).unwrap_or_default();
                    // Its buffer is without limit, and nothing is in it.
                    if self.tls.writer().write_all(bytes).is_err() {
                        self.cannot_send();
                    }
                }
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => {}
                    ErrorKind::Interrupted => moved = true,
                    _ => self.hung_up(),
                },
            }
        }
        while self.owes() {
            match self.tls.write_tls(&mut self.tcp) {
                Ok(1..) => moved = true,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // What has arrived already is passed on all the same.
                Ok(0) | Err(_) => self.cannot_send(),
            }
        }
        if !self.talking && !self.owes() && !self.finished {
            self.finished = true;
            let _ = self.tcp.shutdown(Shutdown::Write);
        }
        moved
    }

    /// Moves bytes in. True if there were any.
    fn receive(&mut self) -> Result<bool, rustls::Error> {
        if !self.incoming.is_empty() {
            return Ok(self.deliver());
        }
        match self.tls.reader().read(self.incoming.space()) {
            Ok(0) => {
                self.heard_all();
                return Ok(false);
            }
            Ok(count) => {
                self.incoming.filled(count);
                if self.deadline.is_some() {
                    self.incoming.clear();
                }
                return Ok(true);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => {
                self.heard_all();
                return Ok(false);
            }
        }
        if self.cipher.is_empty() {
            if !self.hearing {
                return Ok(false);
            }
            match self.tcp.read(self.cipher.space()) {
                Ok(count @ 1..) => self.cipher.filled(count),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
                Ok(0) | Err(_) => {
                    self.heard_all();
                    return Ok(false);
                }
            }
        }
        if let Err(error) = decipher(&mut self.tls, &mut self.cipher) {
            // An alert says why, if there is room for it.
            let _ = self.tls.write_tls(&mut self.tcp);
            return Err(error);
        }
        Ok(true)
    }

    /// Hands bytes to the connection. True if it took any.
    fn deliver(&mut self) -> bool {
        match self.near.write(self.incoming.bytes()) {
            Ok(count @ 1..) => {
                self.incoming.consume(count);
                true
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Err(error) if error.kind() == ErrorKind::Interrupted => true,
            Ok(0) | Err(_) => {
                self.closed();
                true
            }
        }
    }

    /// Waits until something can be moved, or it is late.
    fn wait(&mut self) -> io::Result<()> {
        let wanted = |first: (bool, PollFlags), second: (bool, PollFlags)| {
            let mut flags = PollFlags::empty();
            flags.set(first.1, first.0);
            flags.set(second.1, second.0);
            flags
        };
        let outside = wanted(
            (self.hearing && self.incoming.is_empty(), PollFlags::IN),
            (self.owes(), PollFlags::OUT),
        );
        let inside = wanted(
            (self.listens(), PollFlags::IN),
            (self.talking && !self.incoming.is_empty(), PollFlags::OUT),
        );
        let mut fds = Vec::with_capacity(2);
        // The end of the connection is always of interest, but only once.
        if !inside.is_empty() || (self.talking && self.deadline.is_none()) {
            fds.push(PollFd::new(&self.near, inside));
        }
        let near = fds.len();
        // That of TCP is found out by whoever reads or writes.
        if !outside.is_empty() {
            fds.push(PollFd::new(&self.tcp, outside));
        }
        let left = self
            .deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let closed = PollFlags::HUP | PollFlags::ERR;
        let gone = |fd: &PollFd<'_>| fd.revents().intersects(closed);
        if fds.iter().take(near).any(gone) {
            self.closed();
        }
        Ok(())
    }
}

/// Has `tls` read `cipher`, all of it or as much as it has room for. Its plaintext has to be read before.
pub(super) fn decipher(
    tls: &mut rustls::Connection,
    cipher: &mut Queue,
) -> Result<(), rustls::Error> {
    let mut bytes = cipher.bytes();
    let before = bytes.len();
    let read = tls.read_tls(&mut bytes);
    let count = before - bytes.len();
    cipher.consume(count);
    if let Err(error) = read {
        return Err(rustls::Error::General(error.to_string()));
    }
    tls.process_new_packets().map(|_| ())
}

/// Bytes on their way: filled when it is empty, then taken from the front.
pub(super) struct Queue {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; BUFFER].into(),
            start: 0,
            end: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Where bytes can be put while it is empty.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// So many were put there.
    pub(super) fn filled(&mut self, count: usize) {
        (self.start, self.end) = (0, count.min(self.bytes.len()));
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }

    fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
    }
}
