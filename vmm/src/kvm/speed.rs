//! Whether this KVM runs guest code or only interprets it.
//!
//! Some sandboxes offer a `/dev/kvm` that opens and answers like any other, and interprets guest code at half a million
//! instructions a second. The only way to tell is to run some. A loop of a few ten thousand instructions takes some
//! microseconds where the processor executes it.
//!
//! It runs in a VM of its own with one page of memory: a vCPU that has run takes no other features, and the memory of a
//! guest that is restored is not to be written.

use std::io;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use super::{KvmError, failed};
use crate::layout;
use crate::vcpu::kick;

/// Below this many instructions a second a guest is of no use. Interpreters have up to 3 million, and an emulated host that is
/// busy may show no more than 20 for a moment.
pub const USABLE: f64 = 10e6;

/// Where the loop is put in guest memory.
const CODE: u64 = 0x1000;
/// The port that ends the loop.
const DONE_PORT: u8 = 0x80;

/// What a measurement found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Instructions the guest completed.
    pub instructions: u64,
    /// How long it took them.
    pub elapsed: Duration,
}

impl Speed {
    /// Instructions a second.
    pub fn per_second(self) -> f64 {
        self.instructions as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }

    /// True if a guest can be run at this speed.
    pub fn is_usable(self) -> bool {
        self.per_second() >= USABLE
    }
}

/// A loop in 16-bit real mode: `count` times decrement and jump, then a write to [`DONE_PORT`].
fn program(count: u32) -> [u8; 14] {
    let [a, b, c, d] = count.to_le_bytes();
    [
        0x66, 0xb9, a, b, c, d, // mov ecx, count
        0x66, 0x49, // dec ecx
        0x75, 0xfc, // jnz to the dec
        0xe6, DONE_PORT, // out DONE_PORT, al
        0xeb, 0xfe, // jmp to itself
    ]
}

/// A VM of one page and one vCPU, to be thrown away.
#[derive(Debug)]
pub struct Trial {
    vcpu: VcpuFd,
    vm: VmFd,
    /// What KVM maps; dropped after the VM.
    memory: GuestMemoryMmap,
}

impl Trial {
    /// Creates it; it has not run anything.
    // Nobody asks which pages of a trial are dirty.
    #[allow(unsafe_code, clippy::disallowed_methods)]
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        const PAGE: usize = 4096;
        let code = GuestAddress(CODE);
        let memory = GuestMemoryMmap::from_ranges(&[(code, PAGE)]).map_err(memory_failed)?;
        let host = memory.get_host_address(code).map_err(memory_failed)?;
        let vm = kvm.create_vm().map_err(failed("create a VM"))?;
        // Processors that cannot run real mode by themselves need both.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(failed("set the identity map address"))?;
        vm.set_tss_address(layout::KVM_TSS as usize)
            .map_err(failed("set the TSS address"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE,
            memory_size: PAGE as u64,
            userspace_addr: host as u64,
        };
        // SAFETY: the region is a live mapping of one page, which the result keeps until the VM is gone.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("map guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("create a vCPU"))?;
        Ok(Self { vcpu, vm, memory })
    }

    /// Drops it without waiting for the end: the kernel lets a VM go when all its processors have passed through a certain state,
    /// which takes tens of milliseconds, a quarter of the time in which a guest is restored.
    pub fn discard(self) {
        let thread = std::thread::Builder::new().name("trial".to_owned());
        // Without a thread, the closure is dropped here, and takes its time.
        let _ = thread.spawn(move || drop(self));
    }

    /// Its vCPU, which has the features KVM gives by itself.
    pub fn vcpu(&self) -> &VcpuFd {
        &self.vcpu
    }

    /// Its VM.
    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    /// Runs about `2 * count` guest instructions.
    ///
    /// Returns after `deadline` at the latest, with what was done until then.
    pub fn measure(&mut self, count: u32, deadline: Duration) -> Result<Speed, KvmError> {
        let vcpu = &mut self.vcpu;
        self.memory
            .write_slice(&program(count), GuestAddress(CODE))
            .map_err(memory_failed)?;
        let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        vcpu.set_sregs(&sregs).map_err(failed("set registers"))?;
        let mut regs = vcpu.get_regs().map_err(failed("read registers"))?;
        regs.rip = CODE;
        regs.rcx = u64::from(count);
        vcpu.set_regs(&regs).map_err(failed("set registers"))?;

        let alarm = kick::Alarm::start(vcpu, deadline).map_err(|source| KvmError::Operation {
            what: "set an alarm",
            source,
        })?;
        let start = Instant::now();
        let finished = run_until_done(vcpu, start, deadline);
        let elapsed = start.elapsed();
        drop(alarm);
        let finished = finished?;

        let left = vcpu.get_regs().map_err(failed("read registers"))?.rcx & 0xffff_ffff;
        let done = if finished {
            count
        } else {
            count.saturating_sub(left as u32)
        };
        // Completes the port write, so that nothing of it is left for the next measurement.
        vcpu.set_kvm_immediate_exit(1);
        let _ = vcpu.run();
        vcpu.set_kvm_immediate_exit(0);
        Ok(Speed {
            instructions: 2 * u64::from(done),
            elapsed,
        })
    }

    /// Refuses a KVM that only interprets. Takes well under a millisecond where the processor executes the loop.
    ///
    /// A measurement disturbed by other work of the host looks slow, so a slow one is repeated; the last ones are of more
    /// instructions, so that the way into the guest and back counts less.
    pub fn check(&mut self) -> Result<(), KvmError> {
        const COUNTS: [u32; 6] = [10_000, 10_000, 10_000, 100_000, 100_000, 100_000];
        const DEADLINE: Duration = Duration::from_millis(25);
        let mut best: f64 = 0.0;
        for count in COUNTS {
            let speed = self.measure(count, DEADLINE)?;
            if speed.is_usable() {
                return Ok(());
            }
            best = best.max(speed.per_second());
        }
        Err(KvmError::Interprets((best / 1e4).round() / 100.0))
    }
}

fn memory_failed(error: impl std::fmt::Display) -> KvmError {
    KvmError::Operation {
        what: "use the memory of a trial",
        source: io::Error::other(error.to_string()),
    }
}

/// True if the loop ended by itself.
fn run_until_done(vcpu: &mut VcpuFd, start: Instant, deadline: Duration) -> Result<bool, KvmError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(DONE_PORT) => return Ok(true),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let source = io::Error::other(format!("unexpected exit {exit:?}"));
                let what = "run a small loop of guest code";
                return Err(KvmError::Operation { what, source });
            }
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(failed("run a small loop of guest code")(e)),
        }
        vcpu.set_kvm_immediate_exit(0);
        if start.elapsed() >= deadline {
            return Ok(false);
        }
    }
}

/// Refuses a KVM that only interprets: [`Trial::check`] in a VM made for it.
pub fn check(kvm: &Kvm) -> Result<(), KvmError> {
    Trial::new(kvm)?.check()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_counts_what_was_run_before_its_deadline() {
        let Ok(kvm) = crate::kvm::open() else {
            println!("skipped: no KVM here");
            return;
        };
        let mut trial = Trial::new(&kvm).unwrap();
        let patience = Duration::from_secs(60);
        // Twice, since one must leave nothing behind that disturbs the next.
        for _ in 0..2 {
            let speed = trial.measure(500, patience).unwrap();
            assert_eq!(speed.instructions, 1000);
        }
        let start = Instant::now();
        let speed = trial.measure(u32::MAX, Duration::from_millis(20)).unwrap();
        assert!(start.elapsed() < patience);
        assert!(speed.instructions < 2 * u64::from(u32::MAX));
    }
}
