//! Where a destination listens: `unix:PATH` or `tcp:HOST:PORT`.

use std::fmt;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
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

use super::tls::{Client, Files, LoadError, Server};
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
        let bad = |why: &str| {
            format!(
                "'{text}' is no address: {why}; write unix:PATH, as in unix:/run/move.sock, or tcp:HOST:PORT, as in \
                 tcp:192.0.2.7:7000"
            )
        };
        match text.split_once(':') {
            Some(("unix", "")) => Err(bad("there is no path after unix:")),
            Some(("unix", path)) => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => host_and_port(rest)
                .map(|(host, port)| Self::Tcp { host, port })
                .map_err(|why| bad(&why)),
            _ => Err(bad("it begins neither with unix: nor with tcp:")),
        }
    }
}

/// The parts of `HOST:PORT`, or which of them is wrong.
fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(inside) => {
            let (host, rest) = inside
                .split_once(']')
                .ok_or("the host begins with [ and does not end with ]")?;
            let port = rest.strip_prefix(':');
            let port = port.ok_or("there is no :PORT after the host")?;
            if host.parse::<Ipv6Addr>().is_err() {
                return Err(format!("'{host}' in [] is no IPv6 address"));
            }
            (host, port)
        }
        None => {
            let parts = text.rsplit_once(':');
            let (host, port) = parts.ok_or("there is no :PORT after the host")?;
            if host.contains(':') {
                return Err(format!(
                    "the host '{host}' has colons; an IPv6 address stands in [], as in tcp:[2001:db8::7]:7000"
                ));
            }
            (host, port)
        }
    };
    if host.is_empty() {
        return Err("there is no host before the port".to_owned());
    }
    let number = port.parse().ok().filter(|number| *number != 0);
    // What a number may also begin with is no port.
    match number.filter(|_| port.starts_with(|c: char| c.is_ascii_digit())) {
        Some(number) => Ok((host.to_owned(), number)),
        None => Err(format!("the port '{port}' is no number from 1 to 65535")),
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

    /// Refuses what is too little for this address, or too much.
    fn check(&self, tls: Option<&Files>, insecure: bool) -> Result<(), SecurityError> {
        let address = self.to_string();
        match (self, tls) {
            (Self::Unix(_), Some(_)) => Err(SecurityError::Needless(address)),
            (Self::Tcp { .. }, Some(_)) if insecure => Err(SecurityError::Both(address)),
            (Self::Tcp { .. }, None) if !insecure => Err(SecurityError::Insecure(address)),
            _ => Ok(()),
        }
    }

    /// What a source needs to prove who it is to whoever listens there, if anything.
    pub fn client(
        &self,
        tls: Option<&Files>,
        insecure: bool,
    ) -> Result<Option<Client>, SecurityError> {
        self.check(tls, insecure)?;
        match (self, tls) {
            (Self::Tcp { host, .. }, Some(files)) => Ok(Some(Client::load(files, host)?)),
            _ => Ok(None),
        }
    }

    /// What a destination that listens there needs to prove who it is, if anything.
    pub fn server(
        &self,
        tls: Option<&Files>,
        insecure: bool,
    ) -> Result<Option<Server>, SecurityError> {
        self.check(tls, insecure)?;
        Ok(tls.map(Server::load).transpose()?)
    }

    /// Connects to the destination that listens there.
    pub fn connect(&self, tls: Option<&Client>, limits: Limits) -> Result<Connection, WireError> {
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
                if let Some(tls) = tls {
                    return Ok(tls.connect(stream, limits)?);
                }
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

/// Why nobody is talked to at an address.
#[derive(Debug, thiserror::Error)]
pub enum SecurityError {
    /// Anybody may be there, and no proof is asked for.
    #[error(
        "{0}: whoever can reach that network could read the guest's memory, take the guest, or have their own run; give \
         certificates (--tls-cert, --tls-key, --tls-ca), or use a unix: address, or, if only you can reach it, say \
         --insecure"
    )]
    Insecure(String),
    /// Certificates that nobody looks at.
    #[error(
        "{0}: certificates are for tcp: addresses; who is at a Unix socket is known, so leave them out (--tls-cert, \
         --tls-key, --tls-ca, --tls-name)"
    )]
    Needless(String),
    /// Proof, and none.
    #[error("{0}: with certificates it is secure; leave out --insecure, or the certificates")]
    Both(String),
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] LoadError),
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
    /// At a port, for whoever connects, or only for those with a certificate.
    Tcp(TcpListener, Option<Server>),
}

impl Listener {
    /// Listens at `address`.
    pub fn bind(address: &Address, tls: Option<Server>) -> anyhow::Result<Self> {
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
                Ok(Self::Tcp(listener, tls))
            }
        }
    }

    /// True if whoever connects has proved to be one of us.
    pub fn authenticates(&self) -> bool {
        !matches!(self, Self::Tcp(_, None))
    }

    /// The next one who connects; `None` if nobody does within `patience`.
    pub fn accept(&self, limits: Limits, patience: Duration) -> io::Result<Option<Caller>> {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: patience.subsec_nanos().into(),
        };
        let fd = match self {
            Self::Unix(_, listener) => listener.as_fd(),
            Self::Tcp(listener, _) => listener.as_fd(),
        };
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(error.into()),
        }
        let accepted = match self {
            Self::Unix(_, listener) => listener.accept().and_then(|(stream, _)| {
                trusted(&stream)?;
                Ok((OwnedFd::from(stream), None))
            }),
            Self::Tcp(listener, tls) => listener.accept().and_then(|(stream, peer)| {
                prepare(&stream, limits)?;
                let tls = tls.clone().map(|tls| (tls, peer));
                Ok((OwnedFd::from(stream), tls))
            }),
        };
        match accepted {
            Ok((socket, tls)) => Ok(Some(Caller {
                socket,
                tls,
                limits,
            })),
            // Whoever it was is gone, or may not.
            Err(error) => {
                tracing::debug!(%error, "a connection was not accepted");
                Ok(None)
            }
        }
    }
}

/// Somebody who connected, and who has yet to prove who they are, if that is wanted.
pub struct Caller {
    socket: OwnedFd,
    tls: Option<(Server, SocketAddr)>,
    limits: Limits,
}

impl Caller {
    /// Has them prove who they are, for which they have a limited time.
    pub fn connection(self) -> io::Result<Connection> {
        let Some((tls, peer)) = self.tls else {
            return Connection::new(self.socket, self.limits);
        };
        let shaken = tls.accept(self.socket.into(), self.limits);
        shaken.map_err(|error| io::Error::new(error.kind(), format!("{peer}: {error}")))
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
    fn an_address_has_what_it_needs_and_nothing_else() {
        let files = || Files {
            cert: "/c".into(),
            key: "/k".into(),
            ca: "/nowhere/ca.pem".into(),
            name: None,
        };
        let tcp: Address = "tcp:192.0.2.1:7".parse().unwrap();
        let unix: Address = "unix:/run/a".parse().unwrap();
        for (address, tls, insecure, says) in [
            (&tcp, None, false, "--insecure"),
            (&tcp, Some(files()), true, "leave out --insecure"),
            (
                &tcp,
                Some(files()),
                false,
                "--tls-ca: cannot read /nowhere/ca.pem: no such file",
            ),
            (&unix, Some(files()), false, "leave them out"),
        ] {
            let client = address.client(tls.as_ref(), insecure).map(drop);
            let server = address.server(tls.as_ref(), insecure).map(drop);
            for error in [client.unwrap_err(), server.unwrap_err()] {
                assert!(error.to_string().contains(says), "{error}");
            }
        }
        for (address, insecure) in [(&tcp, true), (&unix, false), (&unix, true)] {
            assert!(address.client(None, insecure).unwrap().is_none());
            assert!(address.server(None, insecure).unwrap().is_none());
        }
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_part_that_is_wrong_and_an_example() {
        for (text, part) in [
            ("", "neither with unix: nor with tcp:"),
            ("/run/a", "neither with unix: nor with tcp:"),
            ("udp:h:1", "neither with unix: nor with tcp:"),
            ("unix:", "no path"),
            ("tcp:", "no :PORT"),
            ("tcp:host", "no :PORT"),
            ("tcp:[::1]", "no :PORT"),
            ("tcp:[::1]7", "no :PORT"),
            ("tcp::1", "no host"),
            ("tcp:[]:1", "no IPv6 address"),
            ("tcp:[host]:1", "'host' in [] is no IPv6 address"),
            ("tcp:[::1:7", "does not end with ]"),
            ("tcp:::1:7", "stands in []"),
            ("tcp:h:0", "the port '0'"),
            ("tcp:h:x", "the port 'x'"),
            ("tcp:h:+7", "the port '+7'"),
            ("tcp:h:", "the port ''"),
            ("tcp:h:65536", "from 1 to 65535"),
        ] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains(part), "{error}");
            assert!(error.contains("write unix:PATH"), "{error}");
        }
    }
}
