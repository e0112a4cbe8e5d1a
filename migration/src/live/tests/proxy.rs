//! Stands between both ends, knows where frames begin, and does one thing wrong.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use crate::layout::PAGE_SIZE;
use crate::wire::Message;
use crate::wire::frame::{HEADER_LEN, Kind};

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    ToDestination,
    ToSource,
}

/// What is done to a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    CutBefore,
    /// After so many of its bytes; if it has fewer, in its middle.
    CutWithin(usize),
    CutAfter,
    /// One bit of a byte of the header.
    FlipHeader(usize),
    /// One bit in the middle of the body; of the header, if there is none.
    FlipBody,
    /// One bit of the last byte: of page data, if there is some.
    FlipLast,
    Duplicate,
    Drop,
    /// Without its last byte.
    Truncate,
    /// Neither it nor anything after it arrives, and nothing is closed.
    Silence,
}

/// One thing that goes wrong, at frame `frame` of one direction. Keep-alive frames are not counted.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub way: Way,
    pub frame: usize,
    pub fault: Fault,
}

/// What went through.
#[derive(Clone, Default)]
pub struct Seen {
    pub frames: Arc<std::sync::Mutex<Vec<(Way, String)>>>,
    pub fired: Arc<AtomicBool>,
}

/// The two ends to connect.
pub fn between(plan: Option<Plan>, seen: &Seen) -> (OwnedFd, OwnedFd) {
    let (source, near) = UnixStream::pair().unwrap();
    let (far, destination) = UnixStream::pair().unwrap();
    for (way, from, to) in [
        (Way::ToDestination, &near, &far),
        (Way::ToSource, &far, &near),
    ] {
        let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let plan = plan.filter(|plan| plan.way == way);
        let seen = seen.clone();
        std::thread::spawn(move || {
            // Whatever ends it: the other direction ends too.
            let _ = forward(way, &from, &to, plan, &seen);
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
    (source.into(), destination.into())
}

/// A frame with all that follows it.
struct Frame {
    name: Option<String>,
    bytes: Vec<u8>,
    body: usize,
    fds: Vec<OwnedFd>,
}

impl Frame {
    fn read(mut from: &UnixStream) -> io::Result<Self> {
        let mut bytes = vec![0; HEADER_LEN];
        from.read_exact(&mut bytes)?;
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let (kind, body) = (word(0), word(4) as usize);
        bytes.resize(HEADER_LEN + body, 0);
        from.read_exact(&mut bytes[HEADER_LEN..])?;
        let mut frame = Self {
            name: None,
            bytes,
            body,
            fds: Vec::new(),
        };
        let is = |one: Kind| kind == one as u32;
        if is(Kind::Message) {
            let message = Message::parse(&frame.bytes[HEADER_LEN..]).unwrap();
            frame.name = Some(message.name().to_owned());
        } else if is(Kind::Pages) {
            let pages = frame.pages();
            let start = frame.bytes.len();
            frame.bytes.resize(start + pages * PAGE_SIZE as usize, 0);
            from.read_exact(&mut frame.bytes[start..])?;
            frame.name = Some("pages".to_owned());
        } else if is(Kind::Sums) {
            frame.name = Some("sums".to_owned());
        } else if is(Kind::Descriptors) {
            frame.bytes.push(0);
            frame.fds = receive_fds(from)?;
            frame.name = Some("descriptors".to_owned());
        } else if !is(Kind::KeepAlive) {
            frame.name = Some(format!("kind {kind}"));
        }
        Ok(frame)
    }

    /// Number of pages that follow, by its table.
    fn pages(&self) -> usize {
        let table = &self.bytes[HEADER_LEN..];
        let word = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().unwrap()) as usize;
        (0..word(0)).map(|run| word(4 + 12 * run + 8)).sum()
    }

    fn write(&self, mut to: &UnixStream) -> io::Result<()> {
        if self.fds.is_empty() {
            return to.write_all(&self.bytes);
        }
        let (last, bytes) = self.bytes.split_last().unwrap();
        to.write_all(bytes)?;
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [*last];
        let slices = [IoSlice::new(&bytes)];
        sendmsg(to, &slices, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

fn receive_fds(from: &UnixStream) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut slices = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().collect())
}

fn forward(
    way: Way,
    from: &UnixStream,
    mut to: &UnixStream,
    plan: Option<Plan>,
    seen: &Seen,
) -> io::Result<()> {
    let mut count = 0;
    loop {
        let mut frame = Frame::read(from)?;
        let Some(name) = frame.name.clone() else {
            frame.write(to)?;
            continue;
        };
        seen.frames.lock().unwrap().push((way, name));
        count += 1;
        let Some(plan) = plan.filter(|plan| plan.frame == count - 1) else {
            frame.write(to)?;
            continue;
        };
        seen.fired.store(true, Ordering::SeqCst);
        let len = frame.bytes.len();
        match plan.fault {
            Fault::CutBefore => return Ok(()),
            Fault::CutWithin(bytes) => {
                let bytes = if bytes < len { bytes } else { len / 2 };
                return to.write_all(&frame.bytes[..bytes]);
            }
            Fault::CutAfter => return frame.write(to),
            Fault::FlipHeader(byte) => frame.bytes[byte] ^= 1,
            Fault::FlipBody => frame.bytes[HEADER_LEN - 1 + frame.body.div_ceil(2)] ^= 4,
            Fault::FlipLast => frame.bytes[len - 1] ^= 0x80,
            Fault::Duplicate => frame.write(to)?,
            Fault::Drop => continue,
            Fault::Truncate => {
                frame.fds.clear();
                frame.bytes.pop();
            }
            Fault::Silence => {
                // Whoever sends can go on, until it hangs up.
                return io::copy(&mut &*from, &mut io::sink()).map(|_| ());
            }
        }
        frame.write(to)?;
    }
}
