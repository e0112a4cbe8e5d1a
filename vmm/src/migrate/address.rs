//! Where a destination listens: `unix:PATH` or `tcp:HOST:PORT`.

use std::fmt;
use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use migration::wire::connection::Limits;
use migration::wire::{Connection, WireError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::api::socket::Socket;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// Where a destination listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket: open files can be handed over.
    Unix(PathBuf),
    /// A host and a port.
    Tcp {
        /// Name or address of the host.
        host: String,
        /// Its port.
        port: u16,
    },
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "'{text}' is no address; write unix:PATH, as in unix:/run/move.sock, or tcp:HOST:PORT, as in \
                 tcp:192.0.2.7:7000"
            )
        };
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let (host, port) = text
            .strip_prefix("tcp:")
            .and_then(|rest| rest.rsplit_once(':'))
            .ok_or_else(bad)?;
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host);
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(bad)?;
        if host.is_empty() {
            return Err(bad());
        }
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

impl Address {
    /// The same with an absolute path.
    pub fn absolute(self) -> io::Result<Self> {
        Ok(match self {
            Self::Unix(path) => Self::Unix(std::path::absolute(path)?),
            tcp @ Self::Tcp { .. } => tcp,
        })
    }

    /// True if open files can be handed over.
    pub fn passes_files(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    /// Connects to the destination that listens there.
    pub fn connect(&self, limits: Limits) -> Result<Connection, WireError> {
        let socket = match self {
            Self::Unix(path) => {
                let stream = connect_unix(path).map_err(|error| self.unreachable(&error))?;
                trusted(&stream)?;
                OwnedFd::from(stream)
            }
            Self::Tcp { host, port } => {
                let addresses = (host.as_str(), *port).to_socket_addrs()?;
                let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
                let mut found = None;
                for address in addresses {
                    match TcpStream::connect_timeout(&address, CONNECT) {
                        Ok(stream) => {
                            found = Some(stream);
                            break;
                        }
                        Err(error) => last = error,
                    }
                }
                let stream = found.ok_or_else(|| self.unreachable(&last))?;
                prepare(&stream, limits)?;
                OwnedFd::from(stream)
            }
        };
        Ok(Connection::new(socket, limits)?)
    }

    fn unreachable(&self, error: &io::Error) -> io::Error {
        let cure = match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                "; start `tern receive` there first"
            }
            _ => "",
        };
        io::Error::new(error.kind(), format!("cannot reach {self}: {error}{cure}"))
    }
}

/// Connects to a Unix socket. One whose listener accepts nothing is not waited for without end, as `connect` would.
fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    const AGAIN: Duration = Duration::from_millis(20);
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    let deadline = Instant::now() + CONNECT;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(UnixStream::from(socket)),
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(AGAIN),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Refuses a process of somebody else at the other end: it would have the guest's memory.
fn trusted(stream: &UnixStream) -> io::Result<()> {
    let peer = sockopt::socket_peercred(stream)?;
    let me = rustix::process::geteuid();
    if peer.uid == me || peer.uid.is_root() || me.is_root() {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        "the process at the other end belongs to another user",
    ))
}

/// No byte waits for others, and a connection that is cut off fails.
fn prepare(stream: &TcpStream, limits: Limits) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let silence = u32::try_from(limits.silence.as_millis()).unwrap_or(u32::MAX);
    sockopt::set_tcp_user_timeout(stream, silence)?;
    Ok(())
}

/// Listens at an address.
#[derive(Debug)]
pub enum Listener {
    /// At a Unix socket, which is removed in the end.
    Unix(Socket, UnixListener),
    /// At a port.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`.
    pub fn bind(address: &Address) -> anyhow::Result<Self> {
        match address {
            Address::Unix(path) => {
                let socket = Socket::bind_as("unix:", path)?;
                let listener = socket.listener()?;
                Ok(Self::Unix(socket, listener))
            }
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind((host.as_str(), *port))
                    .map_err(|error| anyhow::anyhow!("cannot listen at {address}: {error}"))?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
        }
    }

    /// The next connection; `None` if there is none within `patience`.
    pub fn accept(&self, limits: Limits, patience: Duration) -> io::Result<Option<Connection>> {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let fd = match self {
            Self::Unix(_, listener) => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let socket = match self {
            Self::Unix(_, listener) => listener.accept().and_then(|(stream, _)| {
                trusted(&stream)?;
                Ok(OwnedFd::from(stream))
            }),
            Self::Tcp(listener) => listener.accept().and_then(|(stream, _)| {
                prepare(&stream, limits)?;
                Ok(OwnedFd::from(stream))
            }),
        };
        match socket {
            Ok(socket) => Connection::new(socket, limits).map(Some),
            // Whoever it was is gone, or may not.
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_the_same_after_being_text() {
        for text in ["unix:/run/a b", "unix:a", "tcp:example:7000", "tcp:[::1]:1"] {
            let address: Address = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_an_example() {
        for text in [
            "", "unix:", "/run/a", "tcp:", "tcp:host", "tcp::1", "tcp:h:0", "tcp:h:x",
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains("write unix:PATH"), "{error}");
        }
    }
}
