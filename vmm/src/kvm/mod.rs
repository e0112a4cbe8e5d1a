//! Everything that talks to KVM.
//!
//! | module | what it does |
//! |---|---|
//! | [`cpu`] | one vCPU: features, model-specific registers, interrupt pins, first registers |
//! | [`cpuid`] | what CPUID shows to a guest |
//! | [`doorbells`] | keeps the registered ioeventfds equal to the set that should exist |
//! | [`model`] | the processor a guest was promised, and whether a host can keep the promise |
//! | [`msi`] | interrupt routes and irqfds behind the vectors of PCI functions |
//! | [`msrs`] | which model-specific registers are state |
//! | [`slots`] | guest memory, and the log of what vCPUs write to it |
//! | [`speed`] | whether this KVM runs guest code or only interprets it |
//! | [`state`] | everything KVM keeps of a VM, saved and restored |

pub mod cpu;
pub mod cpuid;
pub mod doorbells;
pub mod model;
pub mod msi;
pub mod msrs;
pub mod slots;
pub mod speed;
pub mod state;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use devices::memory::GuestRam;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use slots::Slots;

/// The version of the interface every KVM since Linux 2.6.22 has.
pub const API_VERSION: i32 = 12;

/// What a guest cannot do without.
pub const REQUIRED: [(Cap, &str); 15] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
];

/// Why KVM cannot be used. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no device node.
    #[error(
        "/dev/kvm does not exist; load the module kvm_intel or kvm_amd, and enable virtualization in the firmware \
         (in a virtual machine: nested virtualization on its host)"
    )]
    Absent,
    /// The device node may not be opened.
    #[error("/dev/kvm may not be opened{0}")]
    Forbidden(String),
    /// Opening failed otherwise.
    #[error("/dev/kvm cannot be opened: {0}")]
    Open(io::Error),
    /// Something else answers there.
    #[error("/dev/kvm speaks version {0} of the interface; version 12 is needed")]
    ApiVersion(i32),
    /// A capability is missing.
    #[error("/dev/kvm lacks {0}; update the host's kernel to Linux 5.10 or later")]
    Capability(&'static str),
    /// It is too slow to be of use.
    #[error(
        "/dev/kvm opens but only interprets guest code, at {0} million instructions a second: a kernel would take \
         minutes to boot. Run where the processor's virtualization is available, or in an \
         emulated host (`cargo xtask kvm` in tern's source); `tern run --force` tries all the same"
    )]
    Interprets(f64),
    /// An operation failed.
    #[error("KVM: cannot {what}: {source}")]
    Operation {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Turns the error of an ioctl into one that says what was tried.
pub(crate) fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Operation {
        what,
        source: e.into(),
    }
}

/// Opens `/dev/kvm` and checks what the whole machine relies on.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|e| {
        let error = io::Error::from(e);
        match error.kind() {
            io::ErrorKind::NotFound => KvmError::Absent,
            io::ErrorKind::PermissionDenied => KvmError::Forbidden(how_to_get_access()),
            _ => KvmError::Open(error),
        }
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::ApiVersion(version));
    }
    match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Capability(name)),
        None => Ok(kvm),
    }
}

/// What to do where `/dev/kvm` may not be opened.
fn how_to_get_access() -> String {
    let Ok(node) = std::fs::metadata("/dev/kvm") else {
        return cure(0, 0, "", false);
    };
    let groups = rustix::process::getgroups().unwrap_or_default();
    let member = groups.iter().any(|group| group.as_raw() == node.gid())
        || rustix::process::getegid().as_raw() == node.gid();
    let names = std::fs::read_to_string("/etc/group").unwrap_or_default();
    cure(node.mode(), node.gid(), &names, member)
}

/// The cure for a node of this mode and group, which may not be opened. `names` is `/etc/group`; `member`: this process
/// is in the group.
fn cure(mode: u32, gid: u32, names: &str, member: bool) -> String {
    const ROOT: u32 = 0;
    let may = |bits: u32| mode & bits == bits;
    if may(0o6) || may(0o60) && member {
        return " although its mode allows it; in a container or a service, pass the device through".to_owned();
    }
    if !may(0o60) || gid == ROOT {
        return ", as it is root's alone; as root, `setfacl -m u:$USER:rw /dev/kvm` lets this account use it until the \
                next start of the host, and a udev rule that gives it to a group does for good"
            .to_owned();
    }
    let name = names.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == gid.to_string()).then_some(name)
    });
    match name {
        Some(name) => format!(
            "; add this account to the group that owns it, `usermod -aG {name} $USER` as root, and log in anew"
        ),
        None => format!(
            "; it belongs to group number {gid}, which has no name here: in a container, add that group \
             (`--group-add {gid}`); else name it (`groupadd -g {gid} NAME`) and join it"
        ),
    }
}

/// One virtual machine of KVM: memory and interrupt controllers, without vCPUs yet.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: Arc<VmFd>,
    slots: Arc<Slots>,
}

impl Vm {
    /// Creates a VM with interrupt controllers and `ram`.
    pub fn new(kvm: Kvm, ram: &Arc<GuestRam>) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed("create a VM"))?;
        fd.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("set the identity map address"))?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(failed("set the TSS address"))?;
        fd.create_irq_chip()
            .map_err(failed("create the interrupt controllers"))?;
        state::irqchip::mask_pics(&fd).map_err(failed("mask the 8259 interrupt controllers"))?;
        let fd = Arc::new(fd);
        let slots = Arc::new(Slots::register(&fd, ram)?);
        Ok(Self { kvm, fd, slots })
    }

    /// Its memory.
    pub fn slots(&self) -> &Arc<Slots> {
        &self.slots
    }

    /// The VM's descriptor.
    pub fn fd(&self) -> &Arc<VmFd> {
        &self.fd
    }

    /// The system descriptor.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Creates vCPU `id`.
    pub fn create_vcpu(&self, id: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(id))
            .map_err(failed("create a vCPU"))
    }

    /// An event that raises interrupt line `gsi` (edge) whenever it is signalled.
    pub fn interrupt_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = event("create an interrupt event")?;
        self.fd
            .register_irqfd(&event, gsi)
            .map_err(failed("connect an interrupt line"))?;
        Ok(event)
    }
}

/// A non-blocking event.
pub(crate) fn event(what: &'static str) -> Result<EventFd, KvmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
        .map_err(|source| KvmError::Operation { what, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cure_names_the_group_that_owns_the_node() {
        const GROUPS: &str = "root:x:0:\nbroken\nvirt:x:36:someone\nkvm:x:104:\n";
        for (mode, gid, member, part) in [
            (0o660, 36, false, "usermod -aG virt "),
            (0o660, 104, false, "usermod -aG kvm "),
            (0o660, 99, false, "group number 99"),
            (0o660, 0, false, "setfacl"),
            (0o600, 104, false, "setfacl"),
            (0o600, 104, true, "setfacl"),
            (0o660, 104, true, "container"),
            (0o666, 0, false, "container"),
        ] {
            let text = cure(mode, gid, GROUPS, member);
            assert!(text.contains(part), "{mode:o} {gid} {member}: {text}");
        }
    }
}
