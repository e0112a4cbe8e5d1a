//! Is the `/dev/kvm` of this host fit for use?
//!
//! That it opens proves little: some sandboxes offer a `/dev/kvm` that interprets guest code a hundred times slower
//! than even an emulated CPU. So a guest of two instructions is run for a known count and a bounded time.
//!
//! The module depends on nothing else in this crate.

use std::fmt;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_API_VERSION, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

/// Guest instructions per second below which a KVM is called unusable: a Linux boot at this speed takes a minute.
pub const USABLE_RATE: u64 = 50_000_000;

/// How long the whole measurement may take, whatever the kernel does.
const DEADLINE: Duration = Duration::from_secs(4);
/// A run that lasted this long is long enough to be believed.
const CONVINCING: Duration = Duration::from_millis(20);
/// How many slow runs make a slow KVM.
const PATIENCE: u32 = 4;
/// Iterations of the first run: 40 000 instructions, a tenth of a second where KVM is an interpreter.
const FIRST_RUN: u32 = 20_000;
/// Iterations of the longest run: 2^31 instructions.
const LONGEST_RUN: u32 = 1 << 30;

/// Guest physical address of the code and, by the size of one page, of all guest memory there is.
const CODE_ADDR: u64 = 0x1000;
const PAGE: usize = 4096;
/// `1: dec ecx; jnz 1b; hlt`, 32-bit code.
const CODE: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
/// Instructions per iteration of [`CODE`].
const PER_ITERATION: u64 = 2;

/// What was found out about `/dev/kvm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It runs guest code at this many instructions per second, which is enough.
    Usable {
        /// Guest instructions per second.
        rate: u64,
    },
    /// It works, at this many instructions per second, which is not enough.
    Slow {
        /// Guest instructions per second.
        rate: u64,
    },
    /// It is not there.
    Absent,
    /// It cannot be opened or does not do what KVM does; the text says what failed.
    Broken(String),
}

impl Verdict {
    /// Whether guests can be run here.
    #[must_use]
    pub fn usable(&self) -> bool {
        matches!(self, Self::Usable { .. })
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millions = |rate: u64| rate as f64 / 1e6;
        match self {
            Self::Usable { rate } => {
                write!(
                    f,
                    "/dev/kvm runs {:.0} million instructions/s",
                    millions(*rate)
                )
            }
            Self::Slow { rate } => write!(
                f,
                "/dev/kvm runs only {:.1} million instructions/s, {:.0} are needed",
                millions(*rate),
                millions(USABLE_RATE)
            ),
            Self::Absent => write!(f, "there is no /dev/kvm"),
            Self::Broken(why) => write!(f, "/dev/kvm is not usable: {why}"),
        }
    }
}

/// Measures `/dev/kvm`. Takes less than half a second, and never more than four.
#[must_use]
pub fn measure() -> Verdict {
    if !Path::new("/dev/kvm").exists() {
        return Verdict::Absent;
    }
    // On a thread of its own, which is left behind if the kernel never comes back from KVM_RUN.
    let (tx, rx) = mpsc::channel();
    let spawned = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || tx.send(guest_rate()));
    if let Err(error) = spawned {
        return Verdict::Broken(format!("no thread to measure on: {error}"));
    }
    match rx.recv_timeout(DEADLINE) {
        Ok(Ok(rate)) if rate >= USABLE_RATE => Verdict::Usable { rate },
        Ok(Ok(rate)) => Verdict::Slow { rate },
        Ok(Err(why)) => Verdict::Broken(why),
        Err(_) => Verdict::Broken(format!(
            "a guest of two instructions was not done after {} s",
            DEADLINE.as_secs()
        )),
    }
}

/// Runs the loop with growing counts until one takes long enough to be measured. A slow run is repeated, and the best
/// one counts: on a busy host it may have had to share its CPU.
fn guest_rate() -> Result<u64, String> {
    let mut guest = Guest::new()?;
    let mut iterations = FIRST_RUN;
    let mut best = 0;
    let mut slow_runs = 0;
    loop {
        let took = guest.run(iterations)?;
        if took < CONVINCING && iterations < LONGEST_RUN {
            iterations = iterations.saturating_mul(8).min(LONGEST_RUN);
            continue;
        }
        best = best.max(rate(iterations, took));
        slow_runs += 1;
        if best >= USABLE_RATE || slow_runs == PATIENCE {
            return Ok(best);
        }
    }
}

fn rate(iterations: u32, took: Duration) -> u64 {
    let instructions = u64::from(iterations) * PER_ITERATION;
    (instructions as f64 / took.as_secs_f64().max(1e-9)) as u64
}

/// A VM with one vCPU and one page. Field order is drop order: the VM goes before the memory it maps.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    _page: page::Page,
}

impl Guest {
    fn new() -> Result<Self, String> {
        let kvm = Kvm::new().map_err(|e| format!("cannot open it: {e}"))?;
        if kvm.get_api_version() != KVM_API_VERSION as i32 {
            return Err(format!(
                "API version {} instead of {KVM_API_VERSION}",
                kvm.get_api_version()
            ));
        }
        let vm = kvm.create_vm().map_err(|e| format!("KVM_CREATE_VM: {e}"))?;
        // Intel CPUs need a place for this before they run without paging; the others ignore it.
        vm.set_tss_address(0xfffb_d000)
            .map_err(|e| format!("KVM_SET_TSS_ADDR: {e}"))?;
        let page = page::Page::new(&CODE).map_err(|e| format!("no memory: {e}"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE_ADDR,
            memory_size: PAGE as u64,
            userspace_addr: page.address(),
        };
        page.map_into(&vm, region)
            .map_err(|e| format!("KVM_SET_USER_MEMORY_REGION: {e}"))?;
        let vcpu = vm
            .create_vcpu(0)
            .map_err(|e| format!("KVM_CREATE_VCPU: {e}"))?;
        let mut sregs = vcpu
            .get_sregs()
            .map_err(|e| format!("KVM_GET_SREGS: {e}"))?;
        // Flat 32-bit protected mode without paging: real mode is emulated by some Intel CPUs.
        sregs.cr0 |= 1;
        sregs.cs = flat_segment(0xb, 1);
        for segment in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *segment = flat_segment(0x3, 2);
        }
        vcpu.set_sregs(&sregs)
            .map_err(|e| format!("KVM_SET_SREGS: {e}"))?;
        Ok(Self {
            vcpu,
            _vm: vm,
            _page: page,
        })
    }

    /// Runs the loop `iterations` times and returns how long it took.
    fn run(&mut self, iterations: u32) -> Result<Duration, String> {
        let mut regs = self
            .vcpu
            .get_regs()
            .map_err(|e| format!("KVM_GET_REGS: {e}"))?;
        regs.rip = CODE_ADDR;
        regs.rcx = u64::from(iterations);
        regs.rflags = 2;
        self.vcpu
            .set_regs(&regs)
            .map_err(|e| format!("KVM_SET_REGS: {e}"))?;
        let start = Instant::now();
        match self.vcpu.run() {
            Ok(VcpuExit::Hlt) => Ok(start.elapsed()),
            Ok(other) => Err(format!("the guest was to halt, but: {other:?}")),
            Err(e) => Err(format!("KVM_RUN: {e}")),
        }
    }
}

fn flat_segment(type_: u8, index: u16) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: index << 3,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

#[allow(unsafe_code)]
mod page {
    //! One page of guest memory.

    use std::ptr::{self, NonNull};

    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::VmFd;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    use super::PAGE;

    pub struct Page(NonNull<u8>);

    impl Page {
        /// A fresh page that begins with `code`.
        pub fn new(code: &[u8; 4]) -> rustix::io::Result<Self> {
            // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no existing memory.
            let raw = unsafe {
                mmap_anonymous(
                    ptr::null_mut(),
                    PAGE,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE,
                )?
            };
            let page = NonNull::new(raw.cast::<u8>()).ok_or(rustix::io::Errno::NOMEM)?;
            // SAFETY: the mapping is PAGE bytes long, writable, ours alone, and `code` is shorter than that.
            unsafe { ptr::copy_nonoverlapping(code.as_ptr(), page.as_ptr(), code.len()) };
            Ok(Self(page))
        }

        /// Where it is, for KVM.
        pub fn address(&self) -> u64 {
            self.0.as_ptr() as u64
        }

        /// Gives the page to `vm` as `region`, which must describe this page.
        pub fn map_into(
            &self,
            vm: &VmFd,
            region: kvm_userspace_memory_region,
        ) -> Result<(), kvm_ioctls::Error> {
            debug_assert_eq!(region.userspace_addr, self.address());
            // SAFETY: the region is this live page; the guest may write anything there, and nothing here reads it back.
            // `Guest` drops the VM before the page.
            unsafe { vm.set_user_memory_region(region) }
        }
    }

    impl Drop for Page {
        fn drop(&mut self) {
            // SAFETY: this is the mapping made in `new`, and nobody can refer to it after the drop. That the unmapping
            // of a valid mapping fails is impossible, and a leak if not.
            let _ = unsafe { munmap(self.0.as_ptr().cast(), PAGE) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_is_two_instructions_per_iteration() {
        assert_eq!(rate(1_000_000, Duration::from_secs(2)), 1_000_000);
    }

    #[test]
    fn verdict_names_the_rate_it_measured() {
        let slow = Verdict::Slow { rate: 512_345 };
        assert_eq!(
            slow.to_string(),
            "/dev/kvm runs only 0.5 million instructions/s, 50 are needed"
        );
        assert!(!slow.usable());
        assert!(Verdict::Usable { rate: USABLE_RATE }.usable());
    }

    /// Whatever this host has, there is a verdict, and in time.
    #[test]
    fn measuring_always_ends() {
        let start = Instant::now();
        let verdict = measure();
        assert!(
            start.elapsed() < DEADLINE + Duration::from_secs(5),
            "{verdict}"
        );
    }
}
