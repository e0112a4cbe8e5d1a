//! A connected socket that carries frames.
//!
//! Nobody waits for ever: if no byte moves for [`Limits::silence`], the other side counts as lost. A side that is busy, and
//! has nothing to say, says so: a thread sends a keep-alive frame whenever nothing was sent for [`Limits::beat`]. So a slow
//! side is not taken for a dead one, and one that is stopped or cut off is noticed. Once begun, a frame has to move at
//! [`MIN_RATE`] at least: keep-alive frames that fill what a damaged frame lacks do not count as progress.

#![allow(unsafe_code)]

use std::any::Any;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::WireError;
use super::frame::{HEADER_LEN, Header, Kind, PageTable};
use super::message::Message;
use crate::guest::{GuestPages, Piece};

/// The most descriptors passed at once: the kernel's limit is 253.
const MAX_DESCRIPTORS: usize = 64;
/// Memory that is allocated for a body before any of it has arrived.
const FIRST_STEP: usize = 1 << 20;
/// Bytes of a frame that have to move in each [`Limits::silence`], on average.
pub const MIN_RATE: usize = 1 << 20;

/// Times that a connection keeps.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long the other side may be silent.
    pub silence: Duration,
    /// How long this side is silent at most.
    pub beat: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(10),
            beat: Duration::from_secs(1),
        }
    }
}

/// A named descriptor.
pub type Named = (String, OwnedFd);

/// What came.
#[derive(Debug)]
pub enum Received {
    /// A message.
    Message(Message),
    /// A section.
    Section(Section),
    /// Pages follow this table.
    Pages(Vec<u8>),
    /// The table of zero pages.
    Zeroes(Vec<u8>),
    /// A table of pages with their checksums.
    Sums(Vec<u8>),
    /// Descriptors with their names.
    Descriptors(Vec<Named>),
}

impl Received {
    /// Its name, for errors.
    pub fn name(&self) -> String {
        match self {
            Self::Message(message) => message.name().to_owned(),
            Self::Section(section) => format!("section {}", section.name),
            Self::Pages(_) => "pages".to_owned(),
            Self::Zeroes(_) => "zero pages".to_owned(),
            Self::Sums(_) => "checksums of pages".to_owned(),
            Self::Descriptors(_) => "descriptors".to_owned(),
        }
    }
}

/// One end of a migration stream. See the [module documentation](self).
#[derive(Debug)]
pub struct Connection {
    shared: Arc<Shared>,
    /// Sequence number of the next frame that comes.
    expected: u64,
    /// Only frames are taken that a page connection has.
    only_pages: bool,
    beat: Option<std::thread::JoinHandle<()>>,
    /// Dropped last.
    carrier: Option<Box<dyn Any + Send + Sync>>,
}

#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    limits: Limits,
    sender: Mutex<Sender>,
    ended: Condvar,
}

#[derive(Debug)]
struct Sender {
    sequence: u64,
    last: Instant,
    ended: bool,
    /// A frame was sent in part: nothing can follow it.
    broken: bool,
    bytes: u64,
}

impl Connection {
    /// Carries frames over a connected stream socket.
    ///
    /// # Errors
    ///
    /// The host refuses a thread, or `socket` is none.
    pub fn new(socket: OwnedFd, limits: Limits) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        // The other side waits for small frames. A Unix socket has no such delay and refuses the option.
        let _ = rustix::net::sockopt::set_tcp_nodelay(&socket, true);
        let shared = Arc::new(Shared {
            socket,
            limits,
            sender: Mutex::new(Sender {
                sequence: 0,
                last: Instant::now(),
                ended: false,
                broken: false,
                bytes: 0,
            }),
            ended: Condvar::new(),
        });
        let beating = Arc::clone(&shared);
        let beat = std::thread::Builder::new()
            .name("keep-alive".to_owned())
            .stack_size(128 << 10)
            .spawn(move || beating.beat())?;
        Ok(Self {
            shared,
            expected: 0,
            only_pages: false,
            beat: Some(beat),
            carrier: None,
        })
    }

    /// The same, over a socket whose other end is a `carrier` in this process, which takes the bytes further. It is dropped
    /// when nothing more will be sent; its drop may wait, but not for long, until what was sent is on its way.
    pub fn carried_by(mut self, carrier: impl Any + Send + Sync) -> Self {
        self.carrier = Some(Box::new(carrier));
        self
    }

    /// Takes nothing but pages and messages from here on: no body is longer than 64 KiB, and no descriptors come.
    pub(crate) fn take_only_pages(&mut self) {
        self.only_pages = true;
    }

    /// What ends it from another thread.
    pub(crate) fn closer(&self) -> Closer {
        Closer(Arc::clone(&self.shared))
    }

    /// Bytes sent so far.
    pub fn bytes_sent(&self) -> u64 {
        self.shared.lock().bytes
    }

    /// Frames received so far.
    pub fn received(&self) -> u64 {
        self.expected
    }

    /// How long the other side may be silent.
    pub fn silence(&self) -> Duration {
        self.shared.limits.silence
    }

    /// Sends a message.
    pub fn send(&mut self, message: &Message) -> Result<(), WireError> {
        let body = message.to_bytes()?;
        self.shared.frame(Kind::Message, &body, &[])
    }

    /// Sends a named, versioned piece of state.
    pub fn send_section(&mut self, section: &Section) -> Result<(), WireError> {
        self.shared.frame(Kind::Section, &section.to_bytes()?, &[])
    }

    /// Sends descriptors, for a Unix socket.
    pub fn send_descriptors(&mut self, all: &[Named]) -> Result<(), WireError> {
        for some in all.chunks(MAX_DESCRIPTORS) {
            let names: Vec<_> = some.iter().map(|(name, _)| name).collect();
            let body = serde_json::to_vec(&names)
                .map_err(|e| WireError::malformed(Kind::Descriptors, e))?;
            let mut sender = self.shared.lock();
            self.shared
                .send_frame(&mut sender, Kind::Descriptors, &body, &[])?;
            let fds: Vec<_> = some.iter().map(|(_, fd)| fd.as_fd()).collect();
            self.shared.send_fds(&mut sender, &fds)?;
        }
        Ok(())
    }

    /// Sends the pages of `table` straight from guest memory, which may change meanwhile; then they do not match their
    /// checksums, and must be sent again.
    pub(crate) fn send_pages<G: GuestPages + ?Sized>(
        &mut self,
        table: &PageTable,
        pieces: &[Piece<'_, G>],
    ) -> Result<(), WireError> {
        let data: Vec<_> = pieces.iter().map(Piece::iovec).collect();
        self.shared.frame(Kind::Pages, &table.to_bytes(), &data)
    }

    /// Tells of zero pages.
    pub(crate) fn send_zeroes(&mut self, table: &PageTable) -> Result<(), WireError> {
        self.shared.frame(Kind::Zeroes, &table.to_bytes(), &[])
    }

    /// Sends the checksums of pages.
    pub(crate) fn send_sums(&mut self, table: &PageTable) -> Result<(), WireError> {
        self.shared.frame(Kind::Sums, &table.to_bytes(), &[])
    }

    /// Waits for the next frame that is no keep-alive.
    pub fn receive(&mut self) -> Result<Received, WireError> {
        loop {
            if let Some(received) = self.frame()? {
                return Ok(received);
            }
        }
    }

    /// As [`receive`](Self::receive), but `None` if nothing but keep-alive frames comes within `limit`.
    pub fn receive_within(&mut self, limit: Duration) -> Result<Option<Received>, WireError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.shared.ready(PollFlags::IN, left)? {
                return Ok(None);
            }
            if let Some(received) = self.frame()? {
                return Ok(Some(received));
            }
            // A flood of keep-alive frames is nothing, too.
            if left.is_zero() {
                return Ok(None);
            }
        }
    }

    /// Reads one frame; `None` for a keep-alive.
    fn frame(&mut self) -> Result<Option<Received>, WireError> {
        let mut header = [0; HEADER_LEN];
        self.shared.read(&mut header)?;
        let header = Header::parse(&header, self.expected)?;
        let kind = header.kind;
        if self.only_pages && matches!(kind, Kind::Section | Kind::Descriptors | Kind::Sums) {
            return Err(WireError::Unexpected {
                found: format!("a {kind:?} frame"),
                expected: "pages",
            });
        }
        let body = self.body(header.len as usize)?;
        header.check(&body)?;
        self.expected += 1;
        Ok(Some(match header.kind {
            Kind::KeepAlive => return Ok(None),
            Kind::Message => Received::Message(Message::parse(&body)?),
            Kind::Section => Received::Section(Section::parse(&body)?),
            Kind::Pages => Received::Pages(body),
            Kind::Zeroes => Received::Zeroes(body),
            Kind::Sums => Received::Sums(body),
            Kind::Descriptors => Received::Descriptors(self.descriptors(&body)?),
        }))
    }

    /// The next frame, which has to be a message.
    pub fn message(&mut self, expected: &'static str) -> Result<Message, WireError> {
        match self.receive()? {
            Received::Message(message) => Ok(message),
            other => Err(WireError::Unexpected {
                found: other.name(),
                expected,
            }),
        }
    }

    /// Reads the pages that follow a [`Received::Pages`] straight into guest memory.
    pub(crate) fn read_pages<G: GuestPages + ?Sized>(
        &mut self,
        pieces: &[Piece<'_, G>],
    ) -> Result<(), WireError> {
        let mut data: Vec<_> = pieces.iter().map(Piece::iovec).collect();
        self.shared.read_into(&mut data)
    }

    /// Reads a body. Memory grows as it arrives: its length is the sender's word.
    fn body(&mut self, len: usize) -> Result<Vec<u8>, WireError> {
        let mut body = Vec::new();
        while body.len() < len {
            let step = (len - body.len()).min(FIRST_STEP.max(body.len()));
            let start = body.len();
            body.resize(start + step, 0);
            self.shared
                .read(body.get_mut(start..).unwrap_or_default())?;
        }
        Ok(body)
    }

    fn descriptors(&mut self, body: &[u8]) -> Result<Vec<Named>, WireError> {
        let malformed = |why: String| WireError::Malformed {
            kind: Kind::Descriptors,
            why,
        };
        let names: Vec<String> =
            serde_json::from_slice(body).map_err(|e| malformed(e.to_string()))?;
        if names.is_empty() || names.len() > MAX_DESCRIPTORS {
            return Err(malformed(format!("{} names", names.len())));
        }
        let fds = self.shared.read_fds()?;
        if fds.len() != names.len() {
            return Err(malformed(format!(
                "{} names and {} descriptors",
                names.len(),
                fds.len()
            )));
        }
        Ok(names.into_iter().zip(fds).collect())
    }
}

/// Ends a connection, in whatever its thread is waiting for.
#[derive(Debug)]
pub(crate) struct Closer(Arc<Shared>);

impl Closer {
    /// Neither sends nor receives anything any more.
    pub fn close(&self) {
        let _ = rustix::net::shutdown(&self.0.socket, rustix::net::Shutdown::Both);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A sender that is stuck is woken by this too.
        self.closer().close();
        self.shared.lock().ended = true;
        self.shared.ended.notify_all();
        if let Some(beat) = self.beat.take() {
            let _ = beat.join();
        }
        drop(self.carrier.take());
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Sender> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn beat(&self) {
        let mut sender = self.lock();
        while !sender.ended && !sender.broken {
            let quiet = sender.last.elapsed();
            if quiet >= self.limits.beat {
                match self.ready(PollFlags::OUT, Duration::ZERO) {
                    // The other side has enough to read that says that this one is alive. Filling its buffer with more
                    // would break the connection, although it may have good reason not to read for long.
                    Ok(false) => sender.last = Instant::now(),
                    // Whoever sends next learns of a failure.
                    _ => {
                        let _ = self.send_frame(&mut sender, Kind::KeepAlive, &[], &[]);
                    }
                }
                continue;
            }
            sender = self
                .ended
                .wait_timeout(sender, self.limits.beat - quiet)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn frame(&self, kind: Kind, body: &[u8], data: &[libc::iovec]) -> Result<(), WireError> {
        self.send_frame(&mut self.lock(), kind, body, data)
    }

    fn send_frame(
        &self,
        sender: &mut Sender,
        kind: Kind,
        body: &[u8],
        data: &[libc::iovec],
    ) -> Result<(), WireError> {
        if sender.broken {
            return Err(WireError::Closed);
        }
        if body.len() > kind.max_len() as usize {
            return Err(WireError::TooLong {
                kind,
                len: body.len() as u64,
                max: kind.max_len().into(),
            });
        }
        let header = Header::new(kind, sender.sequence, body).to_bytes();
        let own = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut parts = vec![own(&header), own(body)];
        parts.extend_from_slice(data);
        sender.sequence += 1;
        sender.bytes += parts.iter().map(|part| part.iov_len as u64).sum::<u64>();
        let outcome = self.transfer(&mut parts, PollFlags::OUT, |parts| {
            // SAFETY: the parts point into `header` and `body`, which outlive the call, or into guest memory that the
            // caller keeps mapped; the kernel only reads them. There are at most IOV_MAX of them.
            unsafe {
                let mut message: libc::msghdr = std::mem::zeroed();
                message.msg_iov = parts.as_mut_ptr();
                message.msg_iovlen = parts.len() as _;
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_NOSIGNAL,
                )
            }
        });
        sender.last = Instant::now();
        sender.broken |= outcome.is_err();
        outcome
    }

    fn send_fds(
        &self,
        sender: &mut Sender,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<(), WireError> {
        let outcome = self.try_send_fds(fds);
        sender.bytes += 1;
        sender.last = Instant::now();
        sender.broken |= outcome.is_err();
        outcome
    }

    fn try_send_fds(&self, fds: &[std::os::fd::BorrowedFd<'_>]) -> Result<(), WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::from(Errno::TOOBIG).into());
            }
            let byte = [IoSlice::new(&[0])];
            match sendmsg(&self.socket, &byte, &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::OUT, self.limits.silence)? {
                        return Err(WireError::Silent(self.limits.silence));
                    }
                }
                Err(error) => return Err(lost(error.into())),
            }
        }
    }

    fn read_fds(&self) -> Result<Vec<OwnedFd>, WireError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        loop {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            let flags = RecvFlags::CMSG_CLOEXEC;
            match recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut byte)],
                &mut control,
                flags,
            ) {
                Ok(received) if received.bytes == 0 => return Err(WireError::Closed),
                Ok(received) if received.flags.contains(ReturnFlags::CTRUNC) => {
                    let why =
                        "there are more than one frame passes, or than this process may have open";
                    return Err(WireError::malformed(Kind::Descriptors, why));
                }
                Ok(_) => {
                    return Ok(control
                        .drain()
                        .filter_map(|message| match message {
                            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                            _ => None,
                        })
                        .flatten()
                        .collect());
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if !self.ready(PollFlags::IN, self.limits.silence)? {
                        return Err(WireError::Silent(self.limits.silence));
                    }
                }
                Err(error) => return Err(lost(error.into())),
            }
        }
    }

    fn read(&self, bytes: &mut [u8]) -> Result<(), WireError> {
        self.read_into(&mut [libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        }])
    }

    fn read_into(&self, parts: &mut [libc::iovec]) -> Result<(), WireError> {
        self.transfer(parts, PollFlags::IN, |parts| {
            // SAFETY: the parts point into a buffer that is borrowed for the length of the call, or into guest memory
            // that the caller keeps mapped and writable. There are at most IOV_MAX of them.
            unsafe {
                libc::readv(
                    self.socket.as_raw_fd(),
                    parts.as_ptr(),
                    parts.len() as libc::c_int,
                )
            }
        })
    }

    /// Has `call` move all bytes of `parts`, waiting for `direction` in between. Fails if none moves for
    /// [`Limits::silence`], or all of them are slower than [`MIN_RATE`].
    fn transfer(
        &self,
        parts: &mut [libc::iovec],
        direction: PollFlags,
        call: impl Fn(&mut [libc::iovec]) -> isize,
    ) -> Result<(), WireError> {
        let silence = self.limits.silence;
        let bytes: usize = parts.iter().map(|part| part.iov_len).sum();
        let limit = silence.saturating_mul(1 + (bytes / MIN_RATE) as u32);
        let begun = Instant::now();
        let mut last = begun;
        let mut first = 0;
        loop {
            while parts.get(first).is_some_and(|part| part.iov_len == 0) {
                first += 1;
            }
            let Some(left) = parts.get_mut(first..).filter(|left| !left.is_empty()) else {
                return Ok(());
            };
            match call(left) {
                0 => return Err(WireError::Closed),
                moved if moved > 0 => {
                    advance(left, moved as usize);
                    last = Instant::now();
                }
                _ => {
                    let error = io::Error::last_os_error();
                    match Errno::from_io_error(&error) {
                        Some(Errno::INTR) => {}
                        Some(Errno::AGAIN) => {
                            let left = limit.saturating_sub(begun.elapsed());
                            if self.ready(direction, silence.min(left))? && !left.is_zero() {
                                continue;
                            }
                            return Err(if last.elapsed() >= silence {
                                WireError::Silent(silence)
                            } else {
                                WireError::Slow(limit)
                            });
                        }
                        _ => return Err(lost(error)),
                    }
                }
            }
        }
    }

    /// Waits until the socket can be read or written, or has failed. False if that takes longer than `limit`.
    fn ready(&self, direction: PollFlags, limit: Duration) -> Result<bool, WireError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = [PollFd::new(&self.socket, direction)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) if left.is_zero() => return Ok(false),
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(true),
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
    }
}

/// The error of a socket whose other end may just be gone.
fn lost(error: io::Error) -> WireError {
    match Errno::from_io_error(&error) {
        Some(Errno::PIPE | Errno::CONNRESET) => WireError::Closed,
        _ => WireError::Io(error),
    }
}

/// Takes `count` bytes off the front of `parts`.
fn advance(parts: &mut [libc::iovec], mut count: usize) {
    for part in parts {
        let here = count.min(part.iov_len);
        part.iov_base = part.iov_base.cast::<u8>().wrapping_add(here).cast();
        part.iov_len -= here;
        count -= here;
        if count == 0 {
            return;
        }
    }
}

/// A named, versioned piece of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// What it is.
    pub name: String,
    /// Version of its format.
    pub version: u32,
    /// Its contents.
    pub bytes: Vec<u8>,
}

impl Section {
    /// | bytes | |
    /// |---|---|
    /// | 1 | length of the name *n* |
    /// | *n* | name, UTF-8 |
    /// | 4 | version |
    /// | | contents |
    pub fn to_bytes(&self) -> Result<Vec<u8>, WireError> {
        let len = u8::try_from(self.name.len())
            .map_err(|_| WireError::malformed(Kind::Section, "its name is too long"))?;
        let mut bytes = Vec::with_capacity(5 + self.name.len() + self.bytes.len());
        bytes.push(len);
        bytes.extend(self.name.bytes());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(&self.bytes);
        Ok(bytes)
    }

    /// Reads a section.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        let malformed = || WireError::malformed(Kind::Section, "its name or version is cut off");
        let (len, rest) = bytes.split_first().ok_or_else(malformed)?;
        let (name, rest) = rest.split_at_checked((*len).into()).ok_or_else(malformed)?;
        let (version, bytes) = rest.split_first_chunk().ok_or_else(malformed)?;
        let name = std::str::from_utf8(name)
            .ok()
            .filter(|name| name.bytes().all(|b| b.is_ascii_graphic()))
            .ok_or_else(|| WireError::malformed(Kind::Section, "its name is not one"))?;
        Ok(Self {
            name: name.to_owned(),
            version: u32::from_le_bytes(*version),
            bytes: bytes.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests;
