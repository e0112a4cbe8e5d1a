//! Setting up one vCPU.

#![allow(unsafe_code)]

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::model::CpuModel;
use super::{KvmError, failed};
use crate::boot::{Entry, long_mode};

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, everything write-back where no range says otherwise.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const APIC_MODE_EXTINT: u32 = 7 << 8;
const APIC_MODE_NMI: u32 = 4 << 8;

/// Gives vCPU `id` of a new guest its features, model-specific registers and interrupt pins.
pub fn configure(vcpu: &VcpuFd, model: &CpuModel, id: u8) -> Result<(), KvmError> {
    model.set_features(vcpu, id)?;
    set_msrs(vcpu)?;
    set_interrupt_pins(vcpu)
}

/// Puts the boot processor at the kernel's entry.
pub fn enter(vcpu: &VcpuFd, entry: Entry) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read registers"))?;
    long_mode::special_registers(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("set registers"))?;
    vcpu.set_regs(&long_mode::registers(entry))
        .map_err(failed("set registers"))
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entries = [
        (MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    // One at a time: a host that lacks one of them keeps the other.
    for entry in entries {
        let msrs = Msrs::from_entries(&[entry])
            .map_err(|_| KvmError::Capability("room for model-specific registers"))?;
        let set = vcpu
            .set_msrs(&msrs)
            .map_err(failed("set model-specific registers"))?;
        if set != 1 {
            tracing::debug!(register = entry.index, "KVM does not take a register");
        }
    }
    Ok(())
}

/// Connects the local interrupt pins as firmware does: the legacy controller to LINT0, NMI to LINT1.
fn set_interrupt_pins(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu
        .get_lapic()
        .map_err(failed("read the interrupt controller"))?;
    set_mode(&mut lapic, APIC_LVT_LINT0, APIC_MODE_EXTINT);
    set_mode(&mut lapic, APIC_LVT_LINT1, APIC_MODE_NMI);
    vcpu.set_lapic(&lapic)
        .map_err(failed("set the interrupt controller"))
}

fn set_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const MODE_MASK: u32 = 7 << 8;
    let Some(bytes) = lapic.regs.get_mut(register..register + 4) else {
        return;
    };
    let mut value = 0u32;
    for (i, byte) in bytes.iter().enumerate() {
        value |= u32::from(*byte as u8) << (8 * i);
    }
    value = value & !MODE_MASK | mode;
    for (byte, new) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = new as _;
    }
}

/// The registers of a vCPU in lines for a message, as far as they can be read.
pub fn describe(vcpu: &mut VcpuFd) -> String {
    let mut text = String::new();
    if let Ok(r) = vcpu.get_regs() {
        text += &format!(
            "\n  rip {:016x}  rsp {:016x}  rflags {:016x}\
             \n  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}\
             \n  rsi {:016x}  rdi {:016x}  rbp {:016x}  r8  {:016x}",
            r.rip, r.rsp, r.rflags, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.r8
        );
    }
    if let Ok(s) = vcpu.get_sregs() {
        text += &format!(
            "\n  cr0 {:016x}  cr2 {:016x}  cr3 {:016x}  cr4 {:016x}  efer {:016x}  cs {:04x}",
            s.cr0, s.cr2, s.cr3, s.cr4, s.efer, s.cs.selector
        );
    }
    text
}

/// The registers of a vCPU that triple-faulted, as [`describe`].
///
/// AMD's processors leave none behind, and KVM then resets the vCPU.
pub fn describe_crash(vcpu: &mut VcpuFd) -> String {
    const RESET: u64 = 0xfff0;
    let reset = |regs: kvm_bindings::kvm_regs| regs.rip == RESET && regs.rsp == 0;
    if vcpu.get_regs().is_ok_and(reset) {
        return "; this host's processor leaves no registers of it".to_owned();
    }
    describe(vcpu)
}

/// The sub-error of an internal error exit.
pub fn internal_error(vcpu: &mut VcpuFd) -> u32 {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member; any bytes are a valid
    // u32 in any case.
    unsafe { run.__bindgen_anon_1.internal.suberror }
}
