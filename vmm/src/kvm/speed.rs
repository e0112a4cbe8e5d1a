//! Whether this KVM runs guest code or only interprets it.
//!
//! Some sandboxes offer a `/dev/kvm` that opens and answers like any other, and interprets guest code at half a million
//! instructions a second. The only way to tell is to run some. A loop of a few ten thousand instructions takes some
//! microseconds where the processor executes it.

use std::time::{Duration, Instant};

use devices::memory::View;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::{KvmError, failed};
use crate::vcpu::kick;

/// Below this many instructions a second a guest is of no use.
pub const USABLE: f64 = 20e6;

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

/// Runs about `2 * count` guest instructions on a vCPU that has not run yet and leaves no trace of it.
///
/// Returns after `deadline` at the latest, with what was done until then.
pub fn measure(
    vcpu: &mut VcpuFd,
    memory: &View,
    count: u32,
    deadline: Duration,
) -> Result<Speed, KvmError> {
    let sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
    let regs = vcpu.get_regs().map_err(failed("read registers"))?;
    let program = program(count);
    let write = |bytes: &[u8]| {
        memory
            .write_slice(bytes, GuestAddress(CODE))
            .map_err(|e| KvmError::Operation {
                what: "write to guest memory",
                source: std::io::Error::other(e.to_string()),
            })
    };
    write(&program)?;
    let mut real_mode = sregs;
    real_mode.cs.base = 0;
    real_mode.cs.selector = 0;
    vcpu.set_sregs(&real_mode)
        .map_err(failed("set registers"))?;
    let mut at_code = regs;
    at_code.rip = CODE;
    at_code.rcx = u64::from(count);
    vcpu.set_regs(&at_code).map_err(failed("set registers"))?;

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
    // Completes the port write, so that nothing of it is left for the guest's first instruction.
    vcpu.set_kvm_immediate_exit(1);
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
    vcpu.set_regs(&regs).map_err(failed("set registers"))?;
    vcpu.set_sregs(&sregs).map_err(failed("set registers"))?;
    write(&[0; 14])?;
    Ok(Speed {
        instructions: 2 * u64::from(done),
        elapsed,
    })
}

/// True if the loop ended by itself.
fn run_until_done(vcpu: &mut VcpuFd, start: Instant, deadline: Duration) -> Result<bool, KvmError> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) if port == u16::from(DONE_PORT) => return Ok(true),
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => {
                let source = std::io::Error::other(format!("unexpected exit {exit:?}"));
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

/// Refuses a KVM that only interprets. Takes well under a millisecond where the processor executes the loop.
///
/// A measurement disturbed by other work of the host looks slow, so a slow one is repeated.
pub fn check(vcpu: &mut VcpuFd, memory: &View) -> Result<(), KvmError> {
    const COUNT: u32 = 10_000;
    const DEADLINE: Duration = Duration::from_millis(25);
    let mut best: f64 = 0.0;
    for _ in 0..6 {
        let speed = measure(vcpu, memory, COUNT, DEADLINE)?;
        if speed.is_usable() {
            return Ok(());
        }
        best = best.max(speed.per_second());
    }
    Err(KvmError::Interprets((best / 1e4).round() / 100.0))
}
