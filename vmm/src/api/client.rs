//! A client for one request to the control API.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde::de::DeserializeOwned;

use super::Failure;
use super::socket::PATH_MAX;
use crate::machine::DRAIN;

/// Longest answer that is read: thousands of virtual functions have something to say.
const ANSWER_MAX: usize = 16 << 20;
/// How long an answer may take that changes something: a pause waits for vCPUs and devices, and possibly for another
/// pause before it.
const PATIENCE: Duration = Duration::from_secs(4 * DRAIN.as_secs());
/// How long an answer may take that waits for nothing.
const PATIENCE_TO_LOOK: Duration = DRAIN;

/// Why a request was not answered as hoped.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody serves the socket.
    #[error("{path}: {reason}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host said, and the cure.
        reason: String,
    },
    /// Nobody answers.
    #[error("{path}: {who} does not answer within {} s{cure}", patience.as_secs_f32())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// Who should.
        who: String,
        /// How long was waited.
        patience: Duration,
        /// What can be done.
        cure: String,
    },
    /// The connection broke.
    #[error("the connection to the monitor broke")]
    Io(#[from] io::Error),
    /// The answer is not HTTP, or not what was expected.
    #[error("the answer is not understood ({0}); is this a tern socket?")]
    Malformed(&'static str),
    /// The monitor refused.
    #[error("{}", .0.error)]
    Refused(Failure),
}

/// An HTTP answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// Sends one request to the socket at `path` and decodes its answer.
pub fn request<T: DeserializeOwned>(
    path: &Path,
    method: &str,
    target: &str,
    body: &[u8],
) -> Result<T, ClientError> {
    let patience = match method {
        "GET" => PATIENCE_TO_LOOK,
        _ => PATIENCE,
    };
    request_within(path, method, target, body, patience)
}

/// The same, for an answer that may take as long as `patience`.
pub fn request_within<T: DeserializeOwned>(
    path: &Path,
    method: &str,
    target: &str,
    body: &[u8],
    patience: Duration,
) -> Result<T, ClientError> {
    let bytes = exchange(path, method, target, body, patience)?;
    let answer = parse(&bytes)?;
    if (200..300).contains(&answer.status) {
        return serde_json::from_slice(&answer.body).map_err(|_| ClientError::Malformed("body"));
    }
    Err(ClientError::Refused(
        match serde_json::from_slice::<Failure>(&answer.body) {
            Ok(failure) => failure,
            Err(_) => Failure::new(format!(
                "the monitor answered with status {}",
                answer.status
            )),
        },
    ))
}

/// Sends one request and reads everything that comes back, in `patience`.
fn exchange(
    path: &Path,
    method: &str,
    target: &str,
    body: &[u8],
    patience: Duration,
) -> Result<Vec<u8>, ClientError> {
    let deadline = Instant::now() + patience;
    // At least a moment, since no time at all means forever.
    let left =
        || (deadline.saturating_duration_since(Instant::now())).max(Duration::from_millis(1));
    let mut stream = connect(path, patience)?;
    let peer = peer(&stream);
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => silent(path, peer, patience),
        _ => ClientError::Io(e),
    };
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: tern\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.set_write_timeout(Some(left()))?;
    stream.write_all(head.as_bytes()).map_err(failed)?;
    stream.write_all(body).map_err(failed)?;
    let mut bytes = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    while bytes.len() < ANSWER_MAX {
        if Instant::now() >= deadline {
            return Err(silent(path, peer, patience));
        }
        stream.set_read_timeout(Some(left()))?;
        match stream.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
    Ok(bytes)
}

/// Connects to the socket at `path`; one whose queue stays full for `patience` is silent.
fn connect(path: &Path, patience: Duration) -> Result<UnixStream, ClientError> {
    let refuse = |reason: String| ClientError::Connect {
        path: path.to_owned(),
        reason,
    };
    let Ok(address) = SocketAddrUnix::new(path) else {
        return Err(refuse(format!(
            "the path of a socket has at most {PATH_MAX} bytes; change to its directory and give a relative one"
        )));
    };
    // Connecting to anything else says that nobody serves it, as if it were an old socket.
    if std::fs::metadata(path).is_ok_and(|m| !m.file_type().is_socket()) {
        return Err(refuse(
            "is not a socket; give the path that `tern run --api-socket` was given".to_owned(),
        ));
    }
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(io::Error::from)?;
    set_socket_timeout(&socket, Timeout::Send, Some(patience)).map_err(io::Error::from)?;
    match rustix::net::connect(&socket, &address).map_err(io::Error::from) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(e) => Err(match e.kind() {
            io::ErrorKind::WouldBlock => silent(path, None, patience),
            io::ErrorKind::NotFound => refuse("no such socket; is the guest running?".to_owned()),
            io::ErrorKind::ConnectionRefused => {
                refuse("nobody serves this socket; the guest has ended".to_owned())
            }
            io::ErrorKind::PermissionDenied => refuse(
                "permission denied; the socket belongs to the account that started the guest"
                    .to_owned(),
            ),
            _ => refuse(e.to_string()),
        }),
    }
}

/// The process that listens at the other end, if the host tells.
#[allow(unsafe_code)]
fn peer(stream: &UnixStream) -> Option<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: 0,
        gid: 0,
    };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, the size of `peer`, of which any bytes are valid.
    let got = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &mut len,
        )
    };
    u32::try_from(peer.pid)
        .ok()
        .filter(|pid| got == 0 && *pid != 0)
}

/// The error of a monitor that does not answer.
fn silent(path: &Path, peer: Option<u32>, patience: Duration) -> ClientError {
    let (who, cure) = match peer {
        Some(pid) if is_stopped(pid) => (
            format!("the monitor (process {pid})"),
            format!(": it is stopped; `kill -CONT {pid}` lets it go on"),
        ),
        Some(pid) => (
            format!("the monitor (process {pid})"),
            format!(
                "; try again, or end it with `kill {pid}`, or with `kill -KILL {pid}` if that does nothing"
            ),
        ),
        None => (
            "the monitor".to_owned(),
            "; is it stopped? `fuser` with this path shows its process".to_owned(),
        ),
    };
    ClientError::Silent {
        path: path.to_owned(),
        who,
        patience,
        cure,
    }
}

/// True if process `pid` is stopped, by a signal or a debugger.
fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name before the state is in parentheses and may have any characters.
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    state.is_some_and(|state| state.starts_with(['T', 't']))
}

/// Parses an HTTP/1 answer that ends with the connection. Total: any bytes give an answer or an error.
pub fn parse(bytes: &[u8]) -> Result<Answer, ClientError> {
    const END: &[u8] = b"\r\n\r\n";
    let split = bytes
        .windows(END.len())
        .position(|window| window == END)
        .ok_or(ClientError::Malformed("no end of header"))?;
    let (head, body) = bytes.split_at(split);
    let body = body.get(END.len()..).unwrap_or_default();
    let head = std::str::from_utf8(head).map_err(|_| ClientError::Malformed("header"))?;
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    let mut words = status.split(' ');
    let version = words.next().unwrap_or_default();
    if !version.starts_with("HTTP/1.") {
        return Err(ClientError::Malformed("status line"));
    }
    let status = words
        .next()
        .and_then(|code| code.parse().ok())
        .filter(|code| (100..600).contains(code))
        .ok_or(ClientError::Malformed("status code"))?;
    let mut length = None;
    for line in lines {
        let (name, value) = line
            .split_once(':')
            .ok_or(ClientError::Malformed("header line"))?;
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(ClientError::Malformed("transfer encoding"));
        }
        if name.eq_ignore_ascii_case("content-length") {
            let value = value.trim().parse::<usize>();
            length = Some(value.map_err(|_| ClientError::Malformed("content length"))?);
        }
    }
    let body = match length {
        None => body,
        Some(length) => body
            .get(..length)
            .ok_or(ClientError::Malformed("body cut short"))?,
    };
    Ok(Answer {
        status,
        body: body.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::net::UnixListener;

    fn refused(path: &Path) -> String {
        let patience = Duration::from_millis(100);
        let result = exchange(path, "GET", "/", b"", patience);
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_connected_to_is_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "").unwrap();
        drop(UnixListener::bind(path("old")).unwrap());
        for (path, part) in [
            (path("nothing"), "no such socket"),
            (path("file"), "is not a socket"),
            (dir.path().to_owned(), "is not a socket"),
            (path("old"), "the guest has ended"),
            (path(&"x".repeat(200)), "at most 107 bytes"),
        ] {
            let message = refused(&path);
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_monitor_that_does_not_answer_is_named_with_what_can_be_done() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let message = refused(&path);
        let pid = std::process::id();
        assert!(
            message.contains("does not answer within 0.1 s"),
            "{message}"
        );
        assert!(message.contains(&format!("`kill {pid}`")), "{message}");
        // One that sends a little now and then does not get longer.
        let dripping = std::thread::spawn(move || {
            let mut stream = listener.incoming().nth(1).unwrap().unwrap();
            while stream.write_all(b"x").is_ok() {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        assert!(refused(&path).contains("does not answer"));
        dripping.join().unwrap();
    }

    #[test]
    fn a_stopped_process_is_seen() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        assert!(!is_stopped(child.id()));
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        while !is_stopped(child.id()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn answers_are_parsed() {
        let answer = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx: y\r\n\r\n{}junk").unwrap();
        assert_eq!((answer.status, &answer.body[..]), (200, &b"{}"[..]));
        let answer = parse(b"HTTP/1.0 404\r\n\r\nabc").unwrap();
        assert_eq!((answer.status, &answer.body[..]), (404, &b"abc"[..]));
    }

    #[test]
    fn what_is_no_answer_is_an_error() {
        for bytes in [
            &b""[..],
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/2 200\r\n\r\n",
            b"SSH-2.0-x\r\n\r\n",
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 99999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nbad\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            b"\xff\r\n\r\n",
        ] {
            assert!(parse(bytes).is_err(), "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
