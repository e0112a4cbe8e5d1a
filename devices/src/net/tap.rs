//! A tap interface of the host.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use super::link::{Counters, FRAME_MAX, FRAME_MIN, HEADER_LEN, Link, frame_len};
use super::offload;
use crate::memory::{GuestRead, View};
use crate::virtio::Chain;

const TUN: &str = "/dev/net/tun";
/// Frames dropped before a driver gets the first: more than the kernel queues, and an end even if the host never stops.
const DRAIN_MAX: usize = 4096;
/// The most buffers the kernel takes in one call (IOV_MAX).
const IOV_MAX: usize = 1024;

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Interface names have 1 to 15 bytes, without `/` or white space.
    #[error("{0:?} is no interface name; use 1 to 15 characters without spaces and slashes")]
    Name(String),
    /// The kernel has no tap driver, or the container hides it.
    #[error("this host has no /dev/net/tun; load it with `modprobe tun`")]
    NoDriver,
    /// Neither root nor the owner of the interface.
    #[error(
        "no permission to use tap {0}; as root, run `ip tuntap add dev {0} mode tap user $USER`, then try again"
    )]
    Permission(String),
    /// Another process has it.
    #[error("tap {0} is in use by another process; stop that one or use another tap")]
    Busy(String),
    /// There is an interface of that name and it is no tap, or one with several queues.
    #[error("interface {0} is not a tap with a single queue; use another name")]
    NotATap(String),
    /// Anything else.
    #[error("cannot open tap {name}")]
    Other {
        /// The interface.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A tap interface. One that did not exist is created, and vanishes when this is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    features: u64,
    /// One frame that was read and not consumed, in its first `waiting` bytes.
    frame: Vec<u8>,
    waiting: usize,
    /// The interface was deleted, and somebody was told.
    gone: bool,
    counters: Arc<Counters>,
}

impl Tap {
    /// Attaches to the tap `name`, or creates it.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let legal = |b: u8| b.is_ascii_graphic() && b != b'/' && b != b':';
        // A '%' would make the kernel choose a name.
        if name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || name.contains('%')
            || !name.bytes().all(legal)
        {
            return Err(TapError::Name(name.into()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(TUN)
            .map_err(|error| open_error(name, error))?;
        // SAFETY: all of `ifreq` is integers and unions of integers, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
            .map_err(|error| attach_error(name, error))?;
        let len = HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
            .map_err(|error| attach_error(name, error))?;
        let mut tap = Self {
            file,
            name: name.into(),
            features: 0,
            frame: Vec::new(),
            waiting: 0,
            gone: false,
            counters: Arc::default(),
        };
        tap.down();
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set_offload(&self, features: u64) {
        let flags = libc::c_ulong::from(offload::tun_flags(features));
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let outcome =
            check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, flags) });
        if let Err(error) = outcome {
            tracing::warn!(tap = %self.name, %error, "tap refused the offloads of its driver");
        }
    }

    /// Sends a frame with its header, or counts that the host did not take it.
    pub(super) fn write(&mut self, frame: &[u8]) {
        loop {
            match (&self.file).write(frame) {
                Ok(_) => return self.counters.sent(frame.len().saturating_sub(HEADER_LEN)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.counters.refused(),
            }
        }
    }

    /// Drops what the kernel queued while there was no driver.
    fn drain(&mut self) {
        self.waiting = 0;
        self.frame.resize(HEADER_LEN + FRAME_MAX, 0);
        for _ in 0..DRAIN_MAX {
            if self.read().is_none() {
                return;
            }
        }
    }

    /// Reads frames until one is usable.
    fn read(&mut self) -> Option<usize> {
        loop {
            match self.file.read(&mut self.frame) {
                Ok(n) if n >= HEADER_LEN + FRAME_MIN => return Some(n),
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.raw_os_error() == Some(libc::EBADFD) {
                        if !std::mem::replace(&mut self.gone, true) {
                            tracing::warn!(tap = %self.name, "tap was deleted; its device is cut off");
                        }
                    } else if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::debug!(tap = %self.name, %error, "cannot read from tap");
                    }
                    return None;
                }
            }
        }
    }
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn open_error(name: &str, source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver,
        Some(libc::EACCES | libc::EPERM) => TapError::Permission(name.into()),
        _ => TapError::Other {
            name: name.into(),
            source,
        },
    }
}

fn attach_error(name: &str, source: io::Error) -> TapError {
    match source.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => TapError::Permission(name.into()),
        Some(libc::EBUSY) => TapError::Busy(name.into()),
        Some(libc::EINVAL) => TapError::NotATap(name.into()),
        _ => TapError::Other {
            name: name.into(),
            source,
        },
    }
}

impl Link for Tap {
    fn event_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        offload::ALL
    }

    fn up(&mut self, features: u64) {
        self.drain();
        self.features = features;
        self.set_offload(features);
    }

    fn down(&mut self) {
        self.features = 0;
        self.waiting = 0;
        self.set_offload(0);
    }

    fn send(&mut self, view: &View, chain: &Chain) {
        let Some(len) = frame_len(chain) else {
            return self.counters.malformed();
        };
        let total = (HEADER_LEN + len) as u64;
        let slices = match chain.readable_slices(view, 0, total) {
            Ok(slices) if slices.len() <= IOV_MAX => slices,
            _ => return self.counters.malformed(),
        };
        let iovecs: Vec<_> = slices.iter().map(GuestRead::iovec).collect();
        loop {
            // SAFETY: the vectors point into guest memory that `slices` keeps mapped for the length of this call;
            // the kernel only reads from them, and their count is at most IOV_MAX.
            let written = unsafe {
                libc::writev(
                    self.file.as_raw_fd(),
                    iovecs.as_ptr(),
                    iovecs.len() as libc::c_int,
                )
            };
            if written >= 0 {
                return self.counters.sent(len);
            }
            // A header that makes no sense, an interface that is down, a full queue: the frame is lost, as on a wire.
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return self.counters.refused();
            }
        }
    }

    fn flush(&mut self) {}

    fn peek(&mut self) -> Option<&mut [u8]> {
        if self.waiting == 0 {
            self.frame.resize(HEADER_LEN + FRAME_MAX, 0);
            self.waiting = self.read()?;
            if !offload::accepts_checksum(self.features) {
                // The kernel may still say that it checked the sum, which such a driver must not be told.
                self.frame.iter_mut().take(HEADER_LEN).for_each(|b| *b = 0);
            }
        }
        self.frame.get_mut(..self.waiting)
    }

    fn consume(&mut self) {
        self.waiting = 0;
    }

    fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_not_take_are_refused() {
        for name in ["", "a-name-too-long-", "a b", "a/b", "tap%d", "é", "a:b"] {
            let outcome = Tap::open(name);
            assert!(
                matches!(outcome, Err(TapError::Name(n)) if n == name),
                "{name:?}"
            );
        }
    }

    #[test]
    fn system_errors_name_their_cure() {
        let from = |code| io::Error::from_raw_os_error(code);
        assert!(matches!(
            open_error("t", from(libc::ENOENT)),
            TapError::NoDriver
        ));
        assert!(matches!(
            open_error("t", from(libc::EACCES)),
            TapError::Permission(_)
        ));
        assert!(matches!(
            attach_error("t", from(libc::EPERM)),
            TapError::Permission(_)
        ));
        assert!(matches!(
            attach_error("t", from(libc::EBUSY)),
            TapError::Busy(_)
        ));
        assert!(matches!(
            attach_error("t", from(libc::EINVAL)),
            TapError::NotATap(_)
        ));
        assert!(matches!(
            attach_error("t", from(libc::EIO)),
            TapError::Other { .. }
        ));
    }

    /// Runs `work` where the interfaces it creates are seen by nobody else. Takes privilege: tests that use it are ignored
    /// unless asked for, which `cargo xtask test` does in its KVM machine.
    pub fn in_a_network_of_its_own(work: fn()) {
        let thread = std::thread::spawn(move || {
            // SAFETY: the call affects this thread alone, which runs nothing else.
            let isolated = unsafe { libc::unshare(libc::CLONE_NEWNET) } == 0;
            assert!(isolated, "{}", io::Error::last_os_error());
            work();
        });
        thread.join().unwrap();
    }

    /// A raw socket on interface `name`, which it brings up.
    pub fn packet_socket(name: &str) -> File {
        use std::os::fd::{FromRawFd, OwnedFd};
        let protocol = 0x88b5u16.to_be();
        // SAFETY: plain system calls; `request` and `address` are valid for their lengths, and the new descriptor
        // is owned by nobody else.
        unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
            assert!(fd >= 0, "{}", io::Error::last_os_error());
            let socket = OwnedFd::from_raw_fd(fd);
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            assert_eq!(libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut request), 0);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = request.ifr_ifru.ifru_ifindex;
            request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
            assert_eq!(libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request), 0);
            let len = size_of_val(&address) as libc::socklen_t;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0);
            socket.into()
        }
    }

    /// Deletes interface `name`.
    pub fn delete(name: &str) {
        let status = std::process::Command::new("ip")
            .args(["link", "delete", name])
            .status();
        assert!(status.unwrap().success());
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn frames_from_before_a_driver_are_not_for_it() {
        fn rebind() {
            let mut tap = Tap::open("tern-late").unwrap();
            let mut host = packet_socket("tern-late");
            let frame = |n: u8| {
                let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x88, 0xb5];
                frame.extend([n; 50]);
                frame
            };
            // The host's own chatter comes in too.
            let next = |tap: &mut Tap| {
                let got = tap.peek()?[HEADER_LEN..].to_vec();
                tap.consume();
                Some(got)
            };
            for round in 0..3 {
                for _ in 0..100 {
                    host.write_all(&frame(1)).unwrap();
                }
                tap.up(0);
                host.write_all(&frame(2)).unwrap();
                let got: Vec<_> = std::iter::from_fn(|| next(&mut tap)).collect();
                assert!(!got.contains(&frame(1)), "round {round}");
                assert!(got.contains(&frame(2)), "round {round}");
                tap.down();
            }
        }
        in_a_network_of_its_own(rebind);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn frames_cross_to_the_host_and_back() {
        use crate::net::link::NUM_BUFFERS;
        use crate::net::{MacAddress, Net};
        use crate::testing::{Buf, Driver};

        fn cross() {
            let tap = Tap::open("tern-test").unwrap();
            assert!(matches!(Tap::open("tern-test"), Err(TapError::Busy(_))));
            assert!(matches!(Tap::open("lo"), Err(TapError::NotATap(_))));
            let mut host = packet_socket("tern-test");
            let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
            let mut driver = Driver::live(Net::new(mac, tap), u64::MAX);
            let mut frame = vec![0xff; 6];
            frame.extend(mac.octets());
            frame.extend([0x88, 0xb5]);
            frame.extend([7; 50]);
            let header = Buf::Out(vec![0; HEADER_LEN]);
            driver.request(1, &[header, Buf::Out(frame.clone())]);
            let mut got = [0; 2000];
            let n = host.read(&mut got).unwrap();
            assert_eq!(got[..n], frame);

            frame[6] = 6;
            host.write_all(&frame).unwrap();
            // The host's own chatter comes in too; ours is among it.
            let offered: Vec<_> = (0..100).map(|_| driver.add(0, &[Buf::In(2000)])).collect();
            driver.kick(0);
            driver.until("the frame", |d| {
                let Some((head, len)) = d.used(0) else {
                    return false;
                };
                let buffer = offered.iter().find(|b| b.head == head).unwrap();
                let got = d.written(buffer);
                got[HEADER_LEN..len as usize] == frame && got[NUM_BUFFERS] == [1, 0]
            });
        }
        in_a_network_of_its_own(cross);
    }
}
