//! Every error of the API is JSON, also those that no handler of ours made.
//!
//! [`all_json`] takes care of what axum answers: no such path, another method, a body that is too long. What is not HTTP
//! at all, or has a line that is too long, is answered by hyper below it, with a head and nothing else, and hyper cannot
//! be told to do otherwise. [`Listener`] therefore looks at what goes out, and puts a body where there is none.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::to_bytes;
use axum::http::{StatusCode, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};

use super::Failure;

/// Longest text of an error that is kept.
const TEXT_MAX: usize = 4096;

/// The answer to a request that failed.
pub(super) fn failure(status: StatusCode, error: impl ToString) -> Response {
    (status, Json(Failure::new(error))).into_response()
}

/// `router` with all its errors in JSON.
pub(super) fn all_json(router: Router) -> Router {
    router.layer(map_response(async |response: Response| {
        let status = response.status();
        let json = response
            .headers()
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        if json || !(status.is_client_error() || status.is_server_error()) {
            return response;
        }
        let text = to_bytes(response.into_body(), TEXT_MAX).await;
        let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
        failure(
            status,
            if text.is_empty() {
                reason(status)
            } else {
                &text
            },
        )
    }))
}

/// Why a request failed of which no more is known than the status.
fn reason(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "the request is not HTTP/1.1 as it should be",
        StatusCode::URI_TOO_LONG => "the path of the request is too long",
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => "the header of the request is too long",
        _ => status.canonical_reason().unwrap_or("the request failed"),
    }
}

/// A Unix listener whose connections carry no error without a body.
pub(super) struct Listener(pub(super) UnixListener);

impl axum::serve::Listener for Listener {
    type Io = Connection;
    type Addr = tokio::net::unix::SocketAddr;

    async fn accept(&mut self) -> (Connection, Self::Addr) {
        let (stream, address) = axum::serve::Listener::accept(&mut self.0).await;
        let connection = Connection {
            stream,
            replacement: None,
        };
        (connection, address)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// See [`Listener`].
pub(super) struct Connection {
    stream: UnixStream,
    replacement: Option<Replacement>,
}

/// What goes out in place of an error without a body.
struct Replacement {
    bytes: Vec<u8>,
    written: usize,
    /// Bytes of the original.
    original: usize,
}

impl Replacement {
    /// The replacement of `head`, if that is an answer that is an error and has no body.
    fn of(head: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(head).ok()?;
        let line = text.strip_suffix("\r\n\r\n")?.split("\r\n").next()?;
        let code = line.strip_prefix("HTTP/1.1 ")?.get(..3)?;
        let status = StatusCode::from_bytes(code.as_bytes()).ok()?;
        let bare = text
            .to_ascii_lowercase()
            .contains("\r\ncontent-length: 0\r\n");
        if !bare || !(status.is_client_error() || status.is_server_error()) {
            return None;
        }
        let body = serde_json::to_string(&Failure::new(reason(status))).ok()?;
        let bytes = format!(
            "{line}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        Some(Self {
            bytes: bytes.into_bytes(),
            written: 0,
            original: head.len(),
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

// Not vectored: an answer comes in one piece.
impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.replacement.is_none() {
            this.replacement = Replacement::of(bytes);
        }
        let Some(replacement) = &mut this.replacement else {
            return Pin::new(&mut this.stream).poll_write(context, bytes);
        };
        while let Some(rest) = replacement
            .bytes
            .get(replacement.written..)
            .filter(|r| !r.is_empty())
        {
            let written = ready!(Pin::new(&mut this.stream).poll_write(context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            replacement.written += written;
        }
        let original = replacement.original;
        this.replacement = None;
        Poll::Ready(Ok(original))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::client::parse;
    use axum::body::Bytes;
    use axum::routing::put;
    use std::io::{Read, Write};
    use std::time::Duration;

    /// Serves a path that takes a body, at `path`, until the test ends.
    fn serve(path: std::path::PathBuf) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        std::thread::spawn(move || {
            runtime.block_on(async {
                let listener = Listener(UnixListener::from_std(listener).unwrap());
                let router = Router::new().route("/there", put(async |_: Bytes| "taken"));
                axum::serve(listener, all_json(router)).await.unwrap();
            })
        });
    }

    #[test]
    fn every_error_has_a_json_body_and_success_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        serve(path.clone());
        let put = |body: usize| {
            let body = "x".repeat(body);
            format!(
                "PUT /there HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        let get =
            |path: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        for (request, status) in [
            (put(2), 200),
            (get("/nothing"), 404),
            (get("/there"), 405),
            (put(3 << 20), 413),
            (get(&format!("/{}", "x".repeat(70_000))), 414),
            (
                format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "x".repeat(500_000)),
                431,
            ),
            ("this is not HTTP\r\n\r\n".to_owned(), 400),
        ] {
            let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            // The answer may come before everything was sent.
            let _ = stream.write_all(request.as_bytes());
            let mut bytes = Vec::new();
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                bytes.extend_from_slice(&chunk[..count]);
            }
            let said = String::from_utf8_lossy(&bytes).into_owned();
            let answer = parse(&bytes).unwrap();
            assert_eq!(answer.status, status, "{said}");
            let failure = serde_json::from_slice::<Failure>(&answer.body);
            assert_eq!(failure.is_ok(), status != 200, "{said}");
        }
    }
}
