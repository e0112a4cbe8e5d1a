//! What every system does first: file systems and modules.

use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::{Context, Failure, Result};

const FILE_SYSTEMS: [(&str, &str, &str); 6] = [
    ("/dev", "devtmpfs", "mode=755"),
    ("/proc", "proc", ""),
    ("/sys", "sysfs", ""),
    ("/dev/pts", "devpts", "mode=620,ptmxmode=666"),
    ("/run", "tmpfs", "mode=755"),
    ("/tmp", "tmpfs", "mode=1777"),
];

/// Mounts the usual file systems.
pub fn mount_all() -> Result<()> {
    for (at, kind, options) in FILE_SYSTEMS {
        fs::create_dir_all(at).context(at)?;
        let options = std::ffi::CString::new(options).context(at)?;
        mount(kind, at, kind, MountFlags::NOSUID, options.as_c_str())
            .context(format_args!("mounting {at}"))?;
    }
    let name = fs::read_to_string("/etc/hostname").context("/etc/hostname")?;
    rustix::system::sethostname(name.trim().as_bytes()).context("setting the host name")
}

/// Loads what `/etc/modules` lists, one path per line, in that order.
pub fn load_modules() -> Result<()> {
    let list = fs::read_to_string("/etc/modules").context("/etc/modules")?;
    let release = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    for path in list.lines() {
        let file = File::open(Path::new(path)).context(path)?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(Errno::NOEXEC) => {
                return Err(Failure(format!(
                    "{path} is not for Linux {release}: kernel and initramfs do not match"
                )));
            }
            // There is nothing for it to drive: that is for a scenario to notice.
            Err(Errno::NODEV) => {}
            Err(error) => return Err(Failure(format!("loading {path}: {error}"))),
        }
    }
    Ok(())
}
