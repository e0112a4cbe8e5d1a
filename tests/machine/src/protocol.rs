//! The frames between the two halves of a session.
//!
//! A frame is a kind (1 byte), three zero bytes, the length of its payload (4 bytes, little endian) and the payload.
//! The host opens with nothing: `machine-init` sends [`Frame::Ready`], the host answers [`Frame::Start`], then data
//! flows both ways until [`Frame::Exit`] or [`Frame::Failed`].
//!
//! Standard input has credit-based flow control, because a command that does not read its input must not keep a signal
//! behind that input from reaching it. Output needs none: `machine-init` just blocks until the host reads.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port that carries the frames.
pub const PORT_NAME: &str = "tern.control";
/// Mount tag of the host's file tree.
pub const ROOT_TAG: &str = "host";
/// Longest payload that is sent or accepted.
pub const MAX_PAYLOAD: usize = 1024 * 1024;
/// How many bytes of a stream are put into one frame.
pub const CHUNK: usize = 32 * 1024;
/// How often the machine says that it is there, once it is up.
pub const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// How much standard input may be under way before the receiver has asked for more, in bytes.
pub const STDIN_WINDOW: usize = 512 * 1024;

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters per line.
    pub columns: u16,
}

/// A directory of the real host that is writable in the machine, at the same path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// 9p mount tag.
    pub tag: String,
    /// Absolute path, the same on both sides.
    pub path: PathBuf,
}

/// What to run in the machine, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// The whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Working directory.
    pub cwd: PathBuf,
    /// If present, the command gets a terminal of this size as its controlling terminal.
    pub terminal: Option<WindowSize>,
    /// Which of standard input, output and error are that terminal; the others are pipes.
    pub on_terminal: [bool; 3],
    /// Directories to mount first.
    pub shares: Vec<Share>,
}

/// One message. Its direction is part of its meaning: `>` from the host, `<` to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// `<` The machine is up and waits for [`Frame::Start`].
    Ready,
    /// `>` Run this.
    Start(Box<Start>),
    /// `>` Bytes for standard input.
    Stdin(Vec<u8>),
    /// `>` No more standard input.
    StdinEnd,
    /// `<` So many more bytes of standard input may be sent.
    Credit(u32),
    /// `<` Bytes from standard output, or from the terminal.
    Stdout(Vec<u8>),
    /// `<` Bytes from standard error.
    Stderr(Vec<u8>),
    /// `>` The terminal has a new size.
    Resize(WindowSize),
    /// `>` Deliver this signal to the command.
    Signal(i32),
    /// `<` The command has ended with this status, 128 + n for signal n. Nothing follows.
    Exit(i32),
    /// `<` The command could not be run, and why. Nothing follows.
    Failed(String),
    /// `<` The machine is there, although it has nothing to say.
    Alive,
    /// `>` Nothing but the interrupt that its arrival causes.
    Nudge,
}

const READY: u8 = 1;
const START: u8 = 2;
const STDIN: u8 = 3;
const STDIN_END: u8 = 4;
const CREDIT: u8 = 5;
const STDOUT: u8 = 6;
const STDERR: u8 = 7;
const RESIZE: u8 = 8;
const SIGNAL: u8 = 9;
const EXIT: u8 = 10;
const FAILED: u8 = 11;
const ALIVE: u8 = 12;
const NUDGE: u8 = 13;

/// Writes one frame, in one `write` if the other side takes it.
///
/// # Errors
/// Those of the writer, and `InvalidInput` for a payload beyond [`MAX_PAYLOAD`].
pub fn write_frame(writer: &mut impl Write, frame: &Frame) -> io::Result<()> {
    let (kind, payload): (u8, Vec<u8>) = match frame {
        Frame::Ready => (READY, Vec::new()),
        Frame::Start(start) => (START, serde_json::to_vec(start).map_err(io::Error::other)?),
        Frame::Stdin(bytes) => (STDIN, bytes.clone()),
        Frame::StdinEnd => (STDIN_END, Vec::new()),
        Frame::Credit(bytes) => (CREDIT, bytes.to_le_bytes().to_vec()),
        Frame::Stdout(bytes) => (STDOUT, bytes.clone()),
        Frame::Stderr(bytes) => (STDERR, bytes.clone()),
        Frame::Resize(size) => (
            RESIZE,
            [size.rows.to_le_bytes(), size.columns.to_le_bytes()].concat(),
        ),
        Frame::Signal(signal) => (SIGNAL, signal.to_le_bytes().to_vec()),
        Frame::Exit(status) => (EXIT, status.to_le_bytes().to_vec()),
        Frame::Failed(why) => (FAILED, why.as_bytes().to_vec()),
        Frame::Alive => (ALIVE, Vec::new()),
        Frame::Nudge => (NUDGE, Vec::new()),
    };
    if payload.len() > MAX_PAYLOAD {
        let message = format!(
            "a frame of {} bytes is longer than {MAX_PAYLOAD}",
            payload.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut bytes = Vec::with_capacity(8 + payload.len());
    bytes.extend_from_slice(&[kind, 0, 0, 0]);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&payload);
    writer.write_all(&bytes)?;
    writer.flush()
}

/// Reads one frame.
///
/// # Errors
/// Those of the reader (`UnexpectedEof` when the other side is gone), and `InvalidData` for anything that is no frame.
pub fn read_frame(reader: &mut impl Read) -> io::Result<Frame> {
    let mut header = [0; 8];
    reader.read_exact(&mut header)?;
    let [kind, zero @ .., l0, l1, l2, l3] = header;
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if zero != [0; 3] || length > MAX_PAYLOAD {
        return Err(invalid(format!("frame of kind {kind} with {length} bytes")));
    }
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload)?;
    Ok(match kind {
        READY => Frame::Ready,
        START => {
            Frame::Start(serde_json::from_slice(&payload).map_err(|e| invalid(e.to_string()))?)
        }
        STDIN => Frame::Stdin(payload),
        STDIN_END => Frame::StdinEnd,
        CREDIT => Frame::Credit(u32::from_le_bytes(fixed(&payload)?)),
        STDOUT => Frame::Stdout(payload),
        STDERR => Frame::Stderr(payload),
        RESIZE => {
            let [r0, r1, c0, c1] = fixed(&payload)?;
            Frame::Resize(WindowSize {
                rows: u16::from_le_bytes([r0, r1]),
                columns: u16::from_le_bytes([c0, c1]),
            })
        }
        SIGNAL => Frame::Signal(i32::from_le_bytes(fixed(&payload)?)),
        EXIT => Frame::Exit(i32::from_le_bytes(fixed(&payload)?)),
        FAILED => Frame::Failed(String::from_utf8_lossy(&payload).into_owned()),
        ALIVE => Frame::Alive,
        NUDGE => Frame::Nudge,
        other => return Err(invalid(format!("unknown frame kind {other}"))),
    })
}

fn fixed(payload: &[u8]) -> io::Result<[u8; 4]> {
    payload
        .try_into()
        .map_err(|_| invalid(format!("a payload of {} bytes instead of 4", payload.len())))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::Ready,
            Frame::Start(Box::new(Start {
                argv: vec!["cat".into(), OsString::from_vec(vec![0xff, 0x00])],
                env: vec![("PATH".into(), "/bin".into())],
                cwd: "/tmp".into(),
                terminal: Some(WindowSize {
                    rows: 24,
                    columns: 80,
                }),
                on_terminal: [true, false, true],
                shares: vec![Share {
                    tag: "share0".into(),
                    path: "/out".into(),
                }],
            })),
            Frame::Stdin((0..=255).collect()),
            Frame::StdinEnd,
            Frame::Credit(70_000),
            Frame::Stdout(vec![0; MAX_PAYLOAD]),
            Frame::Stderr(Vec::new()),
            Frame::Resize(WindowSize {
                rows: 1,
                columns: 0xffff,
            }),
            Frame::Signal(15),
            Frame::Exit(-1),
            Frame::Failed("no such file".into()),
            Frame::Alive,
            Frame::Nudge,
        ]
    }

    #[test]
    fn every_frame_survives_the_wire() {
        let mut wire = Vec::new();
        for frame in frames() {
            write_frame(&mut wire, &frame).unwrap();
        }
        let mut reader = wire.as_slice();
        for frame in frames() {
            assert_eq!(read_frame(&mut reader).unwrap(), frame);
        }
        assert!(reader.is_empty());
    }

    #[test]
    fn bad_frames_are_errors() {
        let cases: [(&[u8], io::ErrorKind); 7] = [
            (&[], io::ErrorKind::UnexpectedEof),
            (&[READY, 0, 0, 0, 0, 0, 0], io::ErrorKind::UnexpectedEof),
            (
                &[STDIN, 0, 0, 0, 2, 0, 0, 0, 1],
                io::ErrorKind::UnexpectedEof,
            ),
            (&[99, 0, 0, 0, 0, 0, 0, 0], io::ErrorKind::InvalidData),
            (&[READY, 0, 1, 0, 0, 0, 0, 0], io::ErrorKind::InvalidData),
            (
                &[STDOUT, 0, 0, 0, 0, 0, 0, 0xff],
                io::ErrorKind::InvalidData,
            ),
            (&[EXIT, 0, 0, 0, 1, 0, 0, 0, 1], io::ErrorKind::InvalidData),
        ];
        for (mut bytes, kind) in cases {
            assert_eq!(read_frame(&mut bytes).unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn too_long_a_payload_is_refused() {
        let frame = Frame::Stdout(vec![0; MAX_PAYLOAD + 1]);
        let error = write_frame(&mut Vec::new(), &frame).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
