//! Requests to control APIs over Unix sockets.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// How long may pass between making a socket and listening at it.
const SOON: Duration = Duration::from_secs(2);
/// Longest body of an answer.
const LONGEST: usize = 16 << 20;

/// Sends a request and returns the JSON of its answer, or null. An answer that is no success is an error with its words.
pub fn request(
    socket: &Path,
    method: &str,
    path: &str,
    body: Option<&Value>,
    patience: Duration,
) -> Result<Value> {
    let doing = || format!("{method} {path}");
    let mut stream = connect(socket).with_context(doing)?;
    stream.set_read_timeout(Some(patience))?;
    let body = body.map(Value::to_string).unwrap_or_default();
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n");
    if !body.is_empty() {
        head += "Content-Type: application/json\r\n";
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
    answer(&mut BufReader::new(stream)).with_context(doing)
}

/// Connects to a socket that is there, perhaps before anybody listens.
fn connect(socket: &Path) -> io::Result<UnixStream> {
    let deadline = Instant::now() + SOON;
    loop {
        match UnixStream::connect(socket) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() < deadline =>
            {
                thread::sleep(Duration::from_millis(1));
            }
            done => return done,
        }
    }
}

/// Reads an answer. Not all servers close the connection after it.
fn answer(stream: &mut impl BufRead) -> Result<Value> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.trim_end().to_owned();
    let code = status.split(' ').nth(1).and_then(|code| code.parse().ok());
    let code: u16 = code.with_context(|| format!("no HTTP: {status:?}"))?;
    let mut length = 0usize;
    loop {
        line.clear();
        ensure!(stream.read_line(&mut line)? > 0, "it ends in its head");
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().context("its length")?;
        }
    }
    ensure!(length <= LONGEST, "{length} bytes");
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let words = String::from_utf8_lossy(&body);
    ensure!((200..300).contains(&code), "{status}: {words}");
    if body.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_slice(&body).with_context(|| words.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let read = |text: &str| answer(&mut text.as_bytes());
        let ok = read("HTTP/1.1 200 OK\r\ncontent-length: 7\r\nX: y\r\n\r\n{\"a\":1}more").unwrap();
        assert_eq!(ok, serde_json::json!({ "a": 1 }));
        assert!(read("HTTP/1.1 204 \r\n\r\n").unwrap().is_null());
        let bad = read("HTTP/1.1 400 \r\nContent-Length: 2\r\n\r\nno").unwrap_err();
        assert!(bad.to_string().ends_with("no"), "{bad}");
        for broken in [
            "",
            "hello",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        ] {
            assert!(read(broken).is_err(), "{broken:?}");
        }
    }
}
