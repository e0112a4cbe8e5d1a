//! A tap interface of the host.
//!
//! One that another process has open and hands over ([`Tap::received`]) is *held*: nothing is read from it, written to it or
//! changed about it until [`TapHandle::release`], since its other holder may still use it, or go on to. Frames that came in
//! meanwhile wait in the kernel.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{OFlags, fcntl_getfl, major, minor};

use super::announce::Announcer;
use super::link::{Counters, FRAME_MAX, FRAME_MIN, HEADER_LEN, Link, frame_len};
use super::{MacAddress, offload};
use crate::memory::{GuestRead, View};
use crate::virtio::Chain;

const TUN: &str = "/dev/net/tun";
/// Its device number.
const TUN_DEVICE: (u32, u32) = (10, 200);
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
    /// A descriptor of another process that is no tap, or not set up as it has to be.
    #[error("tap {name}, as another process gave it, {what}")]
    Received {
        /// The interface.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
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
    shared: Arc<Shared>,
    features: u64,
    /// The offloads of `features` are to be set when it is no longer held.
    postponed: bool,
    /// One frame that was read and not consumed, in its first `waiting` bytes.
    frame: Vec<u8>,
    waiting: usize,
    /// The interface was deleted, and somebody was told.
    gone: bool,
    counters: Arc<Counters>,
}

/// What the device of a tap and others in this process have in common.
#[derive(Debug)]
struct Shared {
    file: File,
    name: String,
    /// See the [module documentation](self).
    held: AtomicBool,
    /// A driver is there.
    up: AtomicBool,
}

impl Shared {
    fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }
}

/// A tap, apart from the device it belongs to.
#[derive(Clone, Debug)]
pub struct TapHandle(Arc<Shared>);

impl TapHandle {
    /// The tap is this process's alone from now on. Called before its function runs; without effect on one that is not held.
    pub fn release(&self) {
        self.0.held.store(false, Ordering::Release);
    }

    /// A descriptor for another process.
    ///
    /// # Errors
    ///
    /// The host refused a descriptor.
    pub fn duplicate(&self) -> io::Result<OwnedFd> {
        self.0.file.try_clone().map(OwnedFd::from)
    }

    /// Sends `frame`, header included, if a driver is there. Any thread may do so at any time: each frame is one write.
    pub(super) fn announce(&self, frame: &[u8]) {
        if self.0.is_held() || !self.0.up.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = (&self.0.file).write(frame) {
            tracing::debug!(tap = %self.0.name, %error, "cannot announce an address");
        }
    }
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
        let mut tap = Self::new(file, name, false);
        tap.down();
        Ok(tap)
    }

    /// Takes a tap that another process attached to, with what waits in it. It is held, see the
    /// [module documentation](self). `name` only appears in messages.
    pub fn received(file: OwnedFd, name: &str) -> Result<Self, TapError> {
        let file = File::from(file);
        let other = |source| TapError::Other {
            name: name.into(),
            source,
        };
        let received = |what| TapError::Received {
            name: name.into(),
            what,
        };
        let flags = fcntl_getfl(&file).map_err(|error| other(error.into()))?;
        let metadata = file.metadata().map_err(other)?;
        let device = metadata.rdev();
        // First: what the calls below mean to another device nobody knows.
        if flags.contains(OFlags::PATH)
            || !metadata.file_type().is_char_device()
            || (major(device), minor(device)) != TUN_DEVICE
        {
            return Err(received("is no tap"));
        }
        if flags & OFlags::ACCMODE != OFlags::RDWR {
            return Err(received("is not open for reading and writing"));
        }
        // Setting it would change it for the other holder, who may wait for frames that way.
        if !flags.contains(OFlags::NONBLOCK) {
            return Err(received("is not open with O_NONBLOCK"));
        }
        // SAFETY: all of `ifreq` is integers and unions of integers, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one `ifreq`, which `request` is.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) })
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EBADFD) => received("is attached to no interface"),
                _ => other(error),
            })?;
        // SAFETY: the kernel wrote the flags; whichever field it had written, any bytes are a valid integer.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & libc::IFF_TAP == 0 {
            return Err(received("is no tap"));
        }
        if flags & libc::IFF_DETACH_QUEUE != 0 {
            return Err(received("is attached to no interface"));
        }
        // That it has no IFF_NO_PI cannot be seen: an interface without a filter shows a flag of the same value. One of
        // that kind would only give its driver nonsense.
        if flags & libc::IFF_VNET_HDR == 0 {
            return Err(received(
                "does not have the header of virtio in front of its frames",
            ));
        }
        let mut len: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETVNETHDRSZ, &raw mut len) })
            .map_err(other)?;
        if usize::try_from(len) != Ok(HEADER_LEN) {
            return Err(received(
                "does not have the header of virtio 1 in front of its frames",
            ));
        }
        Ok(Self::new(file, name, true))
    }

    fn new(file: File, name: &str, held: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                file,
                name: name.into(),
                held: AtomicBool::new(held),
                up: AtomicBool::new(false),
            }),
            features: 0,
            postponed: false,
            frame: Vec::new(),
            waiting: 0,
            gone: false,
            counters: Arc::default(),
        }
    }

    /// A handle on it for those who do not own its device.
    pub fn handle(&self) -> TapHandle {
        TapHandle(Arc::clone(&self.shared))
    }

    /// Announces `mac` from it.
    pub fn announcer(&self, mac: MacAddress) -> Announcer {
        Announcer::on_tap(mac, self.handle())
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// True while it is not to be touched. Does what was put off until now if it is not.
    fn is_held(&mut self) -> bool {
        if self.shared.is_held() {
            return true;
        }
        if std::mem::take(&mut self.postponed) {
            self.set_offload(self.features);
        }
        false
    }

    /// A driver came with `features`, or the last one went.
    fn configure(&mut self, up: bool, features: u64) {
        self.shared.up.store(up, Ordering::Relaxed);
        self.features = features;
        self.waiting = 0;
        self.postponed = self.shared.is_held();
        if !self.postponed {
            self.set_offload(features);
        }
    }

    fn set_offload(&self, features: u64) {
        let flags = libc::c_ulong::from(offload::tun_flags(features));
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let outcome =
            check(unsafe { libc::ioctl(self.shared.file.as_raw_fd(), libc::TUNSETOFFLOAD, flags) });
        if let Err(error) = outcome {
            tracing::warn!(tap = %self.shared.name, %error, "tap refused the offloads of its driver");
        }
    }

    /// Sends a frame with its header, or counts that the host did not take it.
    pub(super) fn write(&mut self, frame: &[u8]) {
        if self.is_held() {
            return self.counters.refused();
        }
        loop {
            match (&self.shared.file).write(frame) {
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
            match (&self.shared.file).read(&mut self.frame) {
                Ok(n) if n >= HEADER_LEN + FRAME_MIN => return Some(n),
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.raw_os_error() == Some(libc::EBADFD) {
                        if !std::mem::replace(&mut self.gone, true) {
                            tracing::warn!(tap = %self.shared.name, "tap was deleted; its device is cut off");
                        }
                    } else if error.kind() != io::ErrorKind::WouldBlock {
                        tracing::debug!(tap = %self.shared.name, %error, "cannot read from tap");
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
        self.shared.file.as_raw_fd()
    }

    fn offloads(&self) -> u64 {
        offload::ALL
    }

    fn up(&mut self, features: u64) {
        // What waits in one that was handed over is for the driver that moves with it.
        if !self.shared.is_held() {
            self.drain();
        }
        self.configure(true, features);
    }

    fn down(&mut self) {
        self.configure(false, 0);
    }

    fn send(&mut self, view: &View, chain: &Chain) {
        if self.is_held() {
            return self.counters.refused();
        }
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
                    self.shared.file.as_raw_fd(),
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
        if self.is_held() {
            return None;
        }
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

    /// A raw socket on interface `name`, which it brings up, for frames of the type that tests use.
    pub fn packet_socket(name: &str) -> File {
        packet_socket_for(name, 0x88b5)
    }

    /// The same for frames of type `protocol`.
    pub fn packet_socket_for(name: &str, protocol: u16) -> File {
        use std::os::fd::FromRawFd;
        let protocol = protocol.to_be();
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

    /// Whether interface `name` leaves checksums to whoever reads its frames, as set by TUNSETOFFLOAD.
    fn leaves_checksums(name: &str) -> bool {
        const ETHTOOL_GTXCSUM: u32 = 0x16;
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let mut value = [ETHTOOL_GTXCSUM, 0];
        // SAFETY: SIOCETHTOOL reads and writes the command and the value that `ifr_data` points to, which outlive the call.
        unsafe {
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = value.as_mut_ptr().cast();
            let fd = socket.as_raw_fd();
            let outcome = libc::ioctl(fd, libc::SIOCETHTOOL, &raw mut request);
            assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        }
        value[1] != 0
    }

    /// A frame the host sends, with `n` in it.
    fn numbered(n: u8) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 9, 0x88, 0xb5];
        frame.extend([n; 50]);
        frame
    }

    /// The number of the next frame that has one: the host's own chatter comes in too.
    fn next_number(tap: &mut Tap) -> Option<u8> {
        loop {
            let frame = tap.peek()?[HEADER_LEN..].to_vec();
            tap.consume();
            if frame.len() == 64 && frame == numbered(frame[14]) {
                return Some(frame[14]);
            }
        }
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let refused = |file: OwnedFd| {
            let outcome = Tap::received(file, "theirs");
            assert!(
                matches!(outcome, Err(TapError::Received { .. })),
                "{outcome:?}"
            );
        };
        refused(tempfile::tempfile().unwrap().into());
        refused(File::open("/dev/null").unwrap().into());
        refused(std::os::unix::net::UnixStream::pair().unwrap().0.into());
        refused(rustix::pipe::pipe().unwrap().0);
        let path = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open("/");
        refused(path.unwrap().into());
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn a_tap_that_is_not_set_up_like_ours_is_refused() {
        /// A descriptor of the driver, attached to a new interface with `flags` unless they are 0.
        fn attached(flags: libc::c_int, open: libc::c_int, header: libc::c_int) -> OwnedFd {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(open)
                .open(TUN)
                .unwrap();
            if flags != 0 {
                // SAFETY: as in `Tap::open`.
                unsafe {
                    let mut request: libc::ifreq = std::mem::zeroed();
                    request.ifr_ifru.ifru_flags = flags as libc::c_short;
                    let fd = file.as_raw_fd();
                    assert_eq!(libc::ioctl(fd, libc::TUNSETIFF, &raw mut request), 0);
                    if flags & libc::IFF_VNET_HDR != 0 {
                        let set = libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header);
                        assert_eq!(set, 0);
                    }
                }
            }
            file.into()
        }
        fn work() {
            use libc::{IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR, O_NONBLOCK};
            let good = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
            for (flags, open, header) in [
                (0, O_NONBLOCK, 12),
                (good, 0, 12),
                (good, O_NONBLOCK, 10),
                (IFF_TAP | IFF_NO_PI, O_NONBLOCK, 12),
                (IFF_TUN | IFF_NO_PI | IFF_VNET_HDR, O_NONBLOCK, 12),
            ] {
                let outcome = Tap::received(attached(flags, open, header), "theirs");
                assert!(
                    matches!(outcome, Err(TapError::Received { .. })),
                    "{flags:#x} {open:#x} {header}: {outcome:?}"
                );
            }
            Tap::received(attached(good, O_NONBLOCK, 12), "theirs").unwrap();

            let source = Tap::open("tern-lost").unwrap();
            delete("tern-lost");
            let lent = source.handle().duplicate().unwrap();
            let outcome = Tap::received(lent, "tern-lost");
            assert!(
                matches!(outcome, Err(TapError::Received { .. })),
                "{outcome:?}"
            );
        }
        in_a_network_of_its_own(work);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn a_received_tap_is_left_alone_until_it_is_released() {
        fn hand_over() {
            const NAME: &str = "tern-lent";
            let mut source = Tap::open(NAME).unwrap();
            let mut host = packet_socket(NAME);
            source.up(offload::ALL);
            assert!(leaves_checksums(NAME));
            for n in 1..=3 {
                host.write_all(&numbered(n)).unwrap();
            }
            let lent = source.handle().duplicate().unwrap();
            let mut destination = Tap::received(lent, NAME).unwrap();
            let handle = destination.handle();
            // As a restore does, for one driver that has no offloads and one that has.
            destination.down();
            destination.up(0);
            destination.down();
            destination.up(offload::ALL);
            assert!(destination.peek().is_none());
            destination.write(&[0; HEADER_LEN + 64]);
            assert_eq!(destination.counters().snapshot().tx_refused, 1);
            assert!(leaves_checksums(NAME));
            // The source may still go on, or read what came before it stopped.
            assert_eq!(next_number(&mut source), Some(1));
            drop(source);
            host.write_all(&numbered(4)).unwrap();
            handle.release();
            let got: Vec<_> = std::iter::from_fn(|| next_number(&mut destination)).collect();
            assert_eq!(got, [2, 3, 4]);
            assert!(leaves_checksums(NAME));
            // From then on it is a tap like any other.
            destination.down();
            assert!(!leaves_checksums(NAME));
            host.write_all(&numbered(5)).unwrap();
            destination.up(offload::ALL);
            assert!(leaves_checksums(NAME));
            assert_eq!(next_number(&mut destination), None);
        }
        in_a_network_of_its_own(hand_over);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn offloads_that_were_put_off_are_set_when_a_tap_is_released() {
        fn postpone() {
            const NAME: &str = "tern-later";
            let mut source = Tap::open(NAME).unwrap();
            source.up(offload::ALL);
            let lent = source.handle().duplicate().unwrap();
            let mut destination = Tap::received(lent, NAME).unwrap();
            destination.up(0);
            assert!(leaves_checksums(NAME));
            destination.handle().release();
            let _ = destination.peek();
            assert!(!leaves_checksums(NAME));
        }
        in_a_network_of_its_own(postpone);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn a_driver_that_moved_gets_the_frames_that_waited() {
        use crate::gate::Reasons;
        use crate::net::Net;
        use crate::testing::{Buf, Driver};

        fn moved() {
            let source = Tap::open("tern-moved").unwrap();
            let mut host = packet_socket("tern-moved");
            let handle = source.handle();
            let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
            let before = Driver::live(Net::new(mac, source), u64::MAX);
            before.function.close(Reasons::PAUSED);
            for n in 1..=3 {
                host.write_all(&numbered(n)).unwrap();
            }
            before.turn();
            let tap = Tap::received(handle.duplicate().unwrap(), "tern-moved").unwrap();
            let handle = tap.handle();
            let mut driver = Driver::new(Net::new(mac, tap));
            // Its events are watched before the machine is closed for a pause.
            driver.turn();
            driver.function.close(Reasons::PAUSED);
            driver.start(u64::MAX);
            let offered: Vec<_> = (0..100).map(|_| driver.add(0, &[Buf::In(2000)])).collect();
            driver.turn();
            assert!(driver.used(0).is_none());
            drop(before);
            handle.release();
            driver.function.reopen(Reasons::PAUSED);
            let mut got = Vec::new();
            driver.until("the frames", |d| {
                let Some((head, len)) = d.used(0) else {
                    return false;
                };
                let buffer = offered.iter().find(|b| b.head == head).unwrap();
                let frame = d.written(buffer)[HEADER_LEN..len as usize].to_vec();
                if frame.len() == 64 && frame == numbered(frame[14]) {
                    got.push(frame[14]);
                }
                got.len() == 3
            });
            assert_eq!(got, [1, 2, 3]);
        }
        in_a_network_of_its_own(moved);
    }

    #[test]
    #[ignore = "needs the privilege to create a tap"]
    fn an_address_is_announced_from_a_tap_with_a_driver() {
        fn announce() {
            use std::os::fd::AsFd;
            let mac = MacAddress::new([2, 0, 0, 0, 0, 1]);
            let mut tap = Tap::open("tern-tell").unwrap();
            let mut host = packet_socket_for("tern-tell", 0x8035);
            rustix::io::ioctl_fionbio(host.as_fd(), true).unwrap();
            let mut heard = || {
                let mut frame = [0; 100];
                let len = host.read(&mut frame).ok()?;
                Some((len, frame))
            };
            tap.announcer(mac).announce();
            assert!(heard().is_none(), "announced without a driver");
            tap.up(0);
            tap.announcer(mac).announce();
            let (len, frame) = heard().unwrap();
            assert_eq!((len, &frame[..6]), (60, [0xff; 6].as_slice()));
            assert_eq!(frame[6..14], [2, 0, 0, 0, 0, 1, 0x80, 0x35]);
            assert!(heard().is_none());

            let lent = tap.handle().duplicate().unwrap();
            let mut received = Tap::received(lent, "tern-tell").unwrap();
            received.up(0);
            received.announcer(mac).announce();
            assert!(heard().is_none(), "announced before the machine runs");
            received.handle().release();
            received.announcer(mac).announce();
            assert!(heard().is_some());
        }
        in_a_network_of_its_own(announce);
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
