//! Keeps the emulated host's KVM from rewriting its own code while guests run.
//!
//! KVM has branches that the kernel patches in and out as the first vCPU comes and the last one goes for which they
//! matter: vCPUs without an in-kernel APIC, with an APIC that is off, with one that is off in hardware, and any vCPU at
//! all. QEMU's TCG with several threads has a race there: a CPU that translates such a code just while another one
//! writes it can keep the breakpoint that Linux puts there for the time of the writing, and hits it later. The kernel
//! then dies of it ("Oops: int3" in `__apic_accept_irq`). It takes dozens of guests, but tests start dozens.
//!
//! So one vCPU of each kind is made before anything else and kept, and the branches stay as they are.

use std::mem;

use kvm_ioctls::Kvm;

use crate::{Context, Result};

/// IA32_APIC_BASE: the APIC is on.
const APIC_ENABLED: u64 = 1 << 11;

/// Makes the vCPUs, which live until the machine is switched off. They never run.
pub fn branches() -> Result<()> {
    let doing = || "keeping KVM's branches as they are".to_owned();
    let kvm = Kvm::new().context(doing)?;
    let with_apics = kvm.create_vm().context(doing)?;
    with_apics.create_irq_chip().context(doing)?;
    // Off until its guest turns it on, as after every reset.
    let off = with_apics.create_vcpu(0).context(doing)?;
    let off_in_hardware = with_apics.create_vcpu(1).context(doing)?;
    let mut registers = off_in_hardware.get_sregs().context(doing)?;
    registers.apic_base &= !APIC_ENABLED;
    off_in_hardware.set_sregs(&registers).context(doing)?;
    let without_apic = kvm.create_vm().context(doing)?;
    let none = without_apic.create_vcpu(0).context(doing)?;
    // Closing any of these would let its branch go.
    mem::forget((kvm, with_apics, off, off_in_hardware, without_apic, none));
    Ok(())
}
