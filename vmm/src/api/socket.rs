//! A listening Unix socket, of the control API or of a migration: one owner, mode 0600, gone at the end.
//!
//! A socket file outlives a process that was killed. Such a stale one is recognised (nobody answers) and replaced, while
//! one that is in use is left alone. Two processes that start at once must not take each other's fresh socket for a
//! stale one, so looking, binding and listening happen under a lock on the directory, which leaves no file behind.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::{Access, AtFlags, FlockOperation, Mode, OFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

/// Longest path of a Unix socket in bytes.
pub const PATH_MAX: usize = 107;

/// Why there is no socket. Each message names the path and the cure.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The address of a Unix socket has room for 107 bytes of path.
    #[error(
        "{what}{path}: the path has {len} bytes and a socket's has at most {PATH_MAX}; use a shorter one, \
         or change to its directory and give a relative one"
    )]
    TooLong {
        /// What the socket is for, as it stands before the path.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// Another process answers there.
    #[error("{what}{path}: {} or use another path", busy(what, path, *process))]
    InUse {
        /// What the socket is for, as it stands before the path.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The process, if the host tells.
        process: Option<u32>,
    },
    /// There is something else of that name.
    #[error("{0}{1}: it exists and is not a socket; remove it or use another path")]
    NotASocket(&'static str, PathBuf),
    /// The host refused.
    #[error("{what}{path}: {reason}")]
    Host {
        /// What the socket is for, as it stands before the path.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// What it said, and the cure.
        reason: String,
    },
}

/// Who has a socket, and what can be done about that.
fn busy(what: &str, path: &Path, process: Option<u32>) -> String {
    let who = match process {
        Some(id) => format!("process {id}"),
        None => "another process".to_owned(),
    };
    if what == API {
        let path = path.display();
        return format!(
            "{who} is serving it; end that guest (`tern shutdown --api-socket {path}`)"
        );
    }
    // It may run a guest, or wait for one and have no control API yet, or be no tern at all.
    let kill = process.map(|id| format!(" or `kill {id}`"));
    let kill = kill.unwrap_or_default();
    format!(
        "{who} listens there; if it is a `tern receive` that nobody needs, end it (Ctrl-C where it was started{kill}; a guest \
         that it does not run yet stays at its source),"
    )
}

/// What the socket of the control API is called in messages.
const API: &str = "--api-socket ";

/// The sockets this process has bound, so that a panic can remove them.
static BOUND: Mutex<Vec<Bound>> = Mutex::new(Vec::new());

#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Bound {
    fn remove(&self) {
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|m| (m.dev(), m.ino()) == (self.device, self.inode));
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A bound and listening socket; removed from the file system when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    bound: Bound,
}

impl Socket {
    /// Binds `path` for the control API and listens.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        Self::bind_as(API, path)
    }

    /// Binds `path` and listens. `what` says in messages what the socket is for; it stands right before the path.
    pub fn bind_as(what: &'static str, path: &Path) -> Result<Self, SocketError> {
        fits(what, path)?;
        let host = |error| refused(what, path, &error);
        let _lock = lock_directory(path).map_err(host)?;
        if look(what, path)? == Found::Stale {
            let _ = std::fs::remove_file(path);
        }
        let listener = listen(path).map_err(host)?;
        let metadata = std::fs::symlink_metadata(path).map_err(host)?;
        let bound = Bound {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        if let Ok(mut all) = BOUND.lock() {
            all.push(bound.clone());
        }
        Ok(Self { listener, bound })
    }

    /// Whether [`Self::bind`] would succeed now, as far as that can be said without doing it.
    pub fn check(path: &Path) -> Result<(), SocketError> {
        fits(API, path)?;
        let host = |error| refused(API, path, &error);
        let lock = lock_directory(path).map_err(host)?;
        look(API, path)?;
        let access = Access::WRITE_OK | Access::EXEC_OK;
        let writable = rustix::fs::accessat(lock, ".", access, AtFlags::EACCESS);
        writable.map_err(|error| host(error.into()))
    }

    /// A second handle to the listening socket.
    pub fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.bound.remove();
        if let Ok(mut all) = BOUND.lock() {
            all.retain(|bound| *bound != self.bound);
        }
    }
}

/// Removes the sockets this process has bound. For exits that drop nothing.
pub fn remove_bound() {
    if let Ok(mut all) = BOUND.try_lock() {
        for bound in all.drain(..) {
            bound.remove();
        }
    }
}

fn lock_directory(path: &Path) -> io::Result<OwnedFd> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(directory, flags, Mode::empty())?;
    rustix::fs::flock(&directory, FlockOperation::LockExclusive)?;
    Ok(directory)
}

/// Refuses a path that is too long.
fn fits(what: &'static str, path: &Path) -> Result<(), SocketError> {
    let len = path.as_os_str().len();
    if len <= PATH_MAX {
        return Ok(());
    }
    Err(SocketError::TooLong {
        what,
        path: path.to_owned(),
        len,
    })
}

/// What the host said, and the cure.
fn refused(what: &'static str, path: &Path, error: &io::Error) -> SocketError {
    SocketError::Host {
        what,
        path: path.to_owned(),
        reason: match error.kind() {
            io::ErrorKind::NotFound => "its directory does not exist; create it".to_owned(),
            io::ErrorKind::PermissionDenied => {
                "its directory may not be written; use another path".to_owned()
            }
            _ => error.to_string(),
        },
    }
}

/// What is in the place of a socket that is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A socket that nobody answers at.
    Stale,
}

/// Looks what is in the place of a socket. The directory is locked.
fn look(what: &'static str, path: &Path) -> Result<Found, SocketError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        // Nothing there, or nothing we may see: binding will tell.
        return Ok(Found::Nothing);
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket(what, path.to_owned()));
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(Found::Stale),
        answer => Err(SocketError::InUse {
            what,
            path: path.to_owned(),
            process: answer.ok().and_then(|stream| process(&stream)),
        }),
    }
}

/// The process at the other end, if it can be seen from here.
fn process(stream: &UnixStream) -> Option<u32> {
    let peer = sockopt::socket_peercred(stream).ok()?;
    u32::try_from(peer.pid.as_raw_nonzero().get()).ok()
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the mode the socket has when it is bound: no moment passes in which others may connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(UnixListener::from(socket))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_private_and_goes_away() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let socket = Socket::bind(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let socket = Socket::bind(&path).unwrap();
        assert!(matches!(
            Socket::bind(&path),
            Err(SocketError::InUse { .. })
        ));
        UnixStream::connect(&path).unwrap();
        drop(socket);
        Socket::bind(&path).unwrap();
    }

    #[test]
    fn whoever_has_a_socket_is_named_with_what_ends_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let _socket = Socket::bind(&path).unwrap();
        let id = std::process::id();
        let api = Socket::bind(&path).unwrap_err().to_string();
        let shutdown = format!("`tern shutdown --api-socket {}`", path.display());
        assert!(
            api.contains(&shutdown) && api.contains(&format!("process {id} ")),
            "{api}"
        );
        // There is no control API that could be asked.
        let guest = Socket::bind_as("unix:", &path).unwrap_err().to_string();
        assert!(
            guest.contains(&format!("Ctrl-C where it was started or `kill {id}`")),
            "{guest}"
        );
        // It may run somebody's guest.
        assert!(guest.contains("if it is a `tern receive`"), "{guest}");
        assert!(!guest.contains("--api-socket"), "{guest}");
    }

    #[test]
    fn a_successor_keeps_its_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let first = Socket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = Socket::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }

    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || Socket::bind(&path).ok())
            })
            .collect();
        let sockets: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        assert_eq!(sockets.iter().flatten().count(), 1);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn bad_paths_are_refused_with_the_cure() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let long = directory.path().join("x".repeat(100));
        for (path, reason) in [
            (&long, "at most 107"),
            (&file, "not a socket"),
            (&PathBuf::from("/nonexistent/s"), "create it"),
        ] {
            let message = Socket::bind(path).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert_eq!(Socket::check(path).unwrap_err().to_string(), message);
        }
        assert!(file.exists());
    }

    #[test]
    fn a_path_is_checked_and_nothing_is_done() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        Socket::check(&path).unwrap();
        assert!(!path.exists());
        drop(UnixListener::bind(&path).unwrap());
        Socket::check(&path).unwrap();
        assert!(path.exists());
        let _socket = Socket::bind(&path).unwrap();
        assert!(matches!(
            Socket::check(&path),
            Err(SocketError::InUse { .. })
        ));
    }
}
