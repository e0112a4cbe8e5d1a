//! File systems and devices of the emulated host.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use machine::protocol::{ROOT_TAG, Share};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::{Context, Result};

/// How many files a process may have open: a VM of many devices has an eventfd per queue.
const OPEN_FILES: u64 = 65_536;

/// File systems that the kernel itself provides: mount point, type, options.
const KERNEL_FILE_SYSTEMS: [(&str, &str, &str); 6] = [
    ("/dev", "devtmpfs", "mode=755"),
    ("/proc", "proc", ""),
    ("/sys", "sysfs", ""),
    ("/dev/pts", "devpts", "mode=620,ptmxmode=666"),
    ("/dev/shm", "tmpfs", "mode=1777"),
    ("/run", "tmpfs", "mode=755"),
];

/// Mounts what is needed to find the control port.
pub fn first() -> Result<()> {
    KERNEL_FILE_SYSTEMS[..3]
        .iter()
        .try_for_each(kernel_file_system)
}

/// Mounts all file systems of the kernel, in the host's tree.
pub fn all() -> Result<()> {
    KERNEL_FILE_SYSTEMS.iter().try_for_each(kernel_file_system)
}

fn kernel_file_system((at, kind, options): &(&str, &str, &str)) -> Result<()> {
    let at = Path::new(at);
    make_directory(at)?;
    mount_at(kind, at, kind, MountFlags::NOSUID, options)
}

/// Makes the real host's file tree, with a writable layer in memory over it, the root of everything.
pub fn host_tree() -> Result<()> {
    for at in ["/lower", "/upper", "/root"] {
        make_directory(Path::new(at))?;
    }
    let options = "trans=virtio,version=9p2000.L,msize=1048576,cache=loose";
    mount_at(
        ROOT_TAG,
        Path::new("/lower"),
        "9p",
        MountFlags::RDONLY,
        options,
    )?;
    mount_at(
        "tmpfs",
        Path::new("/upper"),
        "tmpfs",
        MountFlags::empty(),
        "mode=755,size=75%",
    )?;
    for at in ["/upper/data", "/upper/work"] {
        make_directory(Path::new(at))?;
    }
    let options = "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work";
    mount_at(
        "overlay",
        Path::new("/root"),
        "overlay",
        MountFlags::empty(),
        options,
    )?;
    std::env::set_current_dir("/root").context(|| "entering the host's tree".into())?;
    mount_move(".", "/").context(|| "moving the host's tree".into())?;
    rustix::process::chroot(".").context(|| "entering the host's tree".into())?;
    std::env::set_current_dir("/").context(|| "entering the host's tree".into())
}

/// Mounts a directory of the real host at its own path, writable.
pub fn share(share: &Share) -> Result<()> {
    make_directory(&share.path)?;
    // Not `loose`: both sides see what the other writes.
    let options = "trans=virtio,version=9p2000.L,msize=1048576,cache=mmap";
    mount_at(&share.tag, &share.path, "9p", MountFlags::empty(), options)
}

/// Sets permissions that udev would set, and limits that a host for guests needs.
pub fn open_devices() -> Result<()> {
    for (device, mode) in [("/dev/kvm", 0o666), ("/dev/net/tun", 0o666)] {
        fs::set_permissions(device, Permissions::from_mode(mode)).context(|| device.into())?;
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // devtmpfs may have been mounted, and linked, before the root was changed.
        if fs::symlink_metadata(link).is_err() {
            std::os::unix::fs::symlink(target, link).context(|| link.into())?;
        }
    }
    let many = Rlimit {
        current: Some(OPEN_FILES),
        maximum: Some(OPEN_FILES),
    };
    setrlimit(Resource::Nofile, many).context(|| "raising the limit of open files".into())?;
    rustix::system::sethostname(b"tern-machine").context(|| "setting the host name".into())
}

/// Brings `lo` up; the kernel gives it its addresses.
pub fn loopback_up() -> Result<()> {
    let doing = || "bringing lo up".to_owned();
    // Protocol 0 of this family is NETLINK_ROUTE.
    let socket =
        rustix::net::socket(AddressFamily::NETLINK, SocketType::RAW, None).context(doing)?;
    let kernel = SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(
        &socket,
        &link_up(LOOPBACK_INDEX),
        SendFlags::empty(),
        &kernel,
    )
    .context(doing)?;
    // struct nlmsghdr, then the negated errno of an acknowledgement.
    let mut reply = [0u8; 256];
    let (length, _) = rustix::net::recv(&socket, &mut reply, RecvFlags::empty()).context(doing)?;
    match reply[..length].get(16..20) {
        Some([0, 0, 0, 0]) => Ok(()),
        other => Err(format!("bringing lo up: the kernel answered {other:02x?}")),
    }
}

/// `lo` is the first interface of every network namespace.
const LOOPBACK_INDEX: i32 = 1;

/// An RTM_NEWLINK message that sets IFF_UP: struct nlmsghdr (16 bytes) and struct ifinfomsg (16 bytes).
fn link_up(index: i32) -> Vec<u8> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend_from_slice(&32u32.to_ne_bytes());
    message.extend_from_slice(&RTM_NEWLINK.to_ne_bytes());
    message.extend_from_slice(&NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence number, port
    message.extend_from_slice(&[0; 4]); // family, padding, type
    message.extend_from_slice(&index.to_ne_bytes());
    message.extend_from_slice(&IFF_UP.to_ne_bytes()); // flags
    message.extend_from_slice(&IFF_UP.to_ne_bytes()); // which of them change
    message
}

fn make_directory(at: &Path) -> Result<()> {
    if at.is_dir() {
        return Ok(());
    }
    fs::create_dir_all(at).context(|| format!("creating {}", at.display()))
}

fn mount_at(source: &str, at: &Path, kind: &str, flags: MountFlags, options: &str) -> Result<()> {
    let options = std::ffi::CString::new(options).context(|| "mount options".into())?;
    mount(source, at, kind, flags, options.as_c_str())
        .context(|| format!("mounting {kind} at {}", at.display()))
}
