//! A client for one request to the control API.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;

use super::Failure;
use crate::machine::DRAIN;

/// Longest answer that is read: thousands of virtual functions have something to say.
const ANSWER_MAX: u64 = 16 << 20;
/// How long an answer may take: a pause waits for the devices, and possibly for another pause before it.
const PATIENCE: Duration = Duration::from_secs(3 * DRAIN.as_secs());

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
    /// The connection broke.
    #[error("the connection to the monitor broke")]
    Io(#[from] io::Error),
    /// The answer is not HTTP, or not what was expected.
    #[error("the answer is not understood ({0}); is this a tern socket?")]
    Malformed(&'static str),
    /// The monitor refused.
    #[error("{0}")]
    Refused(String),
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
    let connect = |e: &io::Error| ClientError::Connect {
        path: path.to_owned(),
        reason: match e.kind() {
            io::ErrorKind::NotFound => "no such socket; is the guest running?".to_owned(),
            io::ErrorKind::ConnectionRefused => {
                "nobody serves this socket; the guest has ended".to_owned()
            }
            io::ErrorKind::PermissionDenied => {
                "permission denied; the socket belongs to the account that started the guest"
                    .to_owned()
            }
            _ => e.to_string(),
        },
    };
    let mut stream = UnixStream::connect(path).map_err(|e| connect(&e))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: tern\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)?;
    let mut bytes = Vec::new();
    stream.take(ANSWER_MAX).read_to_end(&mut bytes)?;
    let answer = parse(&bytes)?;
    if (200..300).contains(&answer.status) {
        return serde_json::from_slice(&answer.body).map_err(|_| ClientError::Malformed("body"));
    }
    Err(ClientError::Refused(
        match serde_json::from_slice::<Failure>(&answer.body) {
            Ok(failure) => failure.error,
            Err(_) => format!("the monitor answered with status {}", answer.status),
        },
    ))
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
