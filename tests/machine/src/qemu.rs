//! The QEMU that emulates a host with KVM, and its end.
//!
//! TCG emulates AMD's SVM with nested paging well enough for `kvm-amd`. The kernel is given as an ELF image, which QEMU
//! starts by its PVH entry, so that nothing is decompressed by emulated instructions; 5-level paging is switched off
//! because it makes every emulated page walk longer.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::protocol::{PORT_NAME, ROOT_TAG, Share};

/// Kernel parameters. On a panic the machine restarts at once, which `-no-reboot` turns into the end of QEMU; a kernel that
/// has lost a lock to an oops, or that spins for a minute, is as good as dead and says more if it panics.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 oops=panic softlockup_panic=1 watchdog_thresh=30 \
                       mitigations=off tsc=reliable random.trust_cpu=on";

/// An emulated host, before it is started.
#[derive(Debug, Clone)]
pub struct EmulatedHost {
    /// The QEMU program; a bare name is looked up in `PATH`.
    pub qemu: PathBuf,
    /// Kernel with virtio-pci, virtio-console, 9p, overlayfs and kvm-amd: an ELF image with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// Archive with `machine-init` as `/init` and the modules the kernel lacks.
    pub initramfs: PathBuf,
    /// Emulated CPUs, each a thread of QEMU.
    pub cpus: u32,
    /// Memory in MiB. It is taken from the real host as the emulated one comes to use it.
    pub memory_mib: u64,
    /// Directories that are writable in the machine.
    pub shares: Vec<Share>,
}

impl EmulatedHost {
    /// QEMU's arguments, given the descriptors it inherits for its two sockets.
    fn arguments(&self, control: RawFd, console: RawFd) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = [
            "-name",
            "tern-machine",
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi,tb-size=1024",
            "-cpu",
            "max,+svm,la57=off",
            "-no-user-config",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-append",
            CMDLINE,
        ]
        .map(OsString::from)
        .to_vec();
        let mut option =
            |name: &str, value: OsString| arguments.extend([OsString::from(name), value]);
        option("-smp", self.cpus.to_string().into());
        option("-m", format!("{}M", self.memory_mib).into());
        option("-kernel", self.kernel.clone().into());
        option("-initrd", self.initramfs.clone().into());
        option("-chardev", format!("socket,id=console,fd={console}").into());
        option("-serial", "chardev:console".into());
        option("-chardev", format!("socket,id=control,fd={control}").into());
        option("-device", "virtio-serial-pci,max_ports=2".into());
        option(
            "-device",
            format!("virtserialport,chardev=control,name={PORT_NAME}").into(),
        );
        option("-virtfs", file_tree(Path::new("/"), ROOT_TAG, true));
        for share in &self.shares {
            option("-virtfs", file_tree(&share.path, &share.tag, false));
        }
        arguments
    }

    /// Starts QEMU. Call it from a thread that outlives the machine: the kernel kills QEMU when that thread ends.
    ///
    /// # Errors
    /// Those of making sockets and starting a process.
    pub fn start(&self) -> io::Result<Qemu> {
        let (control, control_theirs) = UnixStream::pair()?;
        let (console, console_theirs) = UnixStream::pair()?;
        for theirs in [&control_theirs, &console_theirs] {
            fcntl_setfd(theirs, FdFlags::empty())?;
        }
        let mut command = Command::new(&self.qemu);
        command
            .args(self.arguments(control_theirs.as_raw_fd(), console_theirs.as_raw_fd()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // Out of the terminal's foreground group: Ctrl-C is for the session to handle, not for QEMU.
            .process_group(0);
        die_with_parent(&mut command);
        let child = command.spawn()?;
        Ok(Qemu {
            child,
            control: Some(control),
            console: Some(console),
        })
    }
}

/// An argument of `-virtfs`. QEMU reads a doubled comma as one that belongs to the value.
fn file_tree(path: &Path, tag: &str, read_only: bool) -> OsString {
    let mut argument = b"local,path=".to_vec();
    for &byte in path.as_os_str().as_bytes() {
        argument.extend_from_slice(if byte == b',' {
            b",,"
        } else {
            std::slice::from_ref(&byte)
        });
    }
    argument.extend_from_slice(
        format!(",mount_tag={tag},security_model=none,multidevs=remap").as_bytes(),
    );
    if read_only {
        argument.extend_from_slice(b",readonly=on");
    }
    OsString::from_vec(argument)
}

/// Has the kernel kill what `command` starts when the calling thread ends, by whatever cause.
#[allow(unsafe_code)]
pub fn die_with_parent(command: &mut Command) {
    let hook = || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    };
    // SAFETY: the hook makes one system call (prctl) between fork and exec and neither allocates nor locks.
    unsafe { command.pre_exec(hook) };
}

/// Whether `program` can be started: a path that exists, or a name found in `PATH`.
#[must_use]
pub fn is_program(program: &OsStr) -> bool {
    let path = Path::new(program);
    if path.components().count() > 1 {
        return path.exists();
    }
    std::env::var_os("PATH")
        .is_some_and(|dirs| std::env::split_paths(&dirs).any(|dir| dir.join(path).is_file()))
}

/// A running QEMU; it is killed when this is dropped, so that none is ever left behind.
#[derive(Debug)]
pub struct Qemu {
    child: Child,
    control: Option<UnixStream>,
    console: Option<UnixStream>,
}

impl Qemu {
    /// The sockets of the control port and of the serial console, the first time it is called.
    pub fn take_sockets(&mut self) -> Option<(UnixStream, UnixStream)> {
        self.control.take().zip(self.console.take())
    }

    /// QEMU's own complaints, the first time it is called.
    pub fn take_stderr(&mut self) -> Option<std::process::ChildStderr> {
        self.child.stderr.take()
    }

    /// How QEMU ended, if it did so by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> EmulatedHost {
        EmulatedHost {
            qemu: "qemu-system-x86_64".into(),
            kernel: "/k".into(),
            initramfs: "/i".into(),
            cpus: 3,
            memory_mib: 512,
            shares: vec![Share {
                tag: "share0".into(),
                path: "/a,b".into(),
            }],
        }
    }

    #[test]
    fn arguments_carry_what_was_asked_for() {
        let arguments = host().arguments(7, 9);
        let value = |option: &str| {
            let at = arguments.iter().position(|a| a == option).unwrap();
            arguments[at + 1].to_str().unwrap().to_owned()
        };
        assert_eq!(value("-smp"), "3");
        assert_eq!(value("-m"), "512M");
        assert_eq!(value("-kernel"), "/k");
        assert_eq!(value("-initrd"), "/i");
        assert!(arguments.contains(&"socket,id=control,fd=7".into()));
        assert!(arguments.contains(&"socket,id=console,fd=9".into()));
    }

    #[test]
    fn root_is_read_only_and_a_comma_in_a_share_is_doubled() {
        let arguments = host().arguments(7, 9);
        assert!(arguments.contains(
            &"local,path=/,mount_tag=host,security_model=none,multidevs=remap,readonly=on".into()
        ));
        assert!(arguments.contains(
            &"local,path=/a,,b,mount_tag=share0,security_model=none,multidevs=remap".into()
        ));
    }

    #[test]
    fn programs_are_found_in_path_or_by_path() {
        assert!(is_program(OsStr::new("sh")));
        assert!(is_program(OsStr::new("/bin/sh")));
        assert!(!is_program(OsStr::new("no-such-program-anywhere")));
        assert!(!is_program(OsStr::new("/bin/no-such-program")));
    }
}
