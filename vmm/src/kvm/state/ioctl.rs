//! System calls on vCPUs that `kvm-ioctls` does not have, or has for areas of one size only.

#![allow(unsafe_code)]

use std::ffi::c_int;
use std::io;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_sregs, kvm_sregs2,
    kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};

use crate::kvm::model::XSAVE_SIZE;

ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The special registers; `sregs2` says whether KVM has those with page directory pointers.
///
/// Interrupts that are being injected are among the events, not here.
pub(super) fn get_sregs(vcpu: &VcpuFd, sregs2: bool) -> io::Result<kvm_sregs2> {
    if !sregs2 {
        return Ok(widened(&vcpu.get_sregs()?));
    }
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes one structure of this type.
    check(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) })?;
    Ok(sregs)
}

/// The reverse of [`get_sregs`].
pub(super) fn set_sregs(vcpu: &VcpuFd, sregs: &kvm_sregs2, sregs2: bool) -> io::Result<()> {
    if !sregs2 {
        // Page directory pointers are read from the guest's memory.
        return Ok(vcpu.set_sregs(&narrowed(sregs))?);
    }
    // SAFETY: KVM reads one structure of this type.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) })
}

fn widened(s: &kvm_sregs) -> kvm_sregs2 {
    kvm_sregs2 {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        ..Default::default()
    }
}

fn narrowed(s: &kvm_sregs2) -> kvm_sregs {
    kvm_sregs {
        cs: s.cs,
        ds: s.ds,
        es: s.es,
        fs: s.fs,
        gs: s.gs,
        ss: s.ss,
        tr: s.tr,
        ldt: s.ldt,
        gdt: s.gdt,
        idt: s.idt,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// The XSAVE area, of `size` bytes: what KVM says its size is.
pub(super) fn get_xsave(vcpu: &VcpuFd, size: u32) -> io::Result<Vec<u8>> {
    let mut area = area(&[], size);
    let request = if size > XSAVE_SIZE {
        KVM_GET_XSAVE2()
    } else {
        KVM_GET_XSAVE()
    };
    // SAFETY: KVM writes as many bytes as it says the area has, or 4096 with the older request, which is what `area`
    // has at least.
    check(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) })?;
    Ok(area.into_iter().flat_map(u32::to_le_bytes).collect())
}

/// Sets the XSAVE area, where KVM's has `size` bytes; one that is shorter has nothing in the rest.
pub(super) fn set_xsave(vcpu: &VcpuFd, bytes: &[u8], size: u32) -> io::Result<()> {
    let area = area(bytes, size);
    // SAFETY: KVM reads as many bytes as it says the area has, which is what `area` has at least.
    check(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) })
}

/// An area of `size` bytes, and at least what every KVM reads, that begins with `bytes`.
fn area(bytes: &[u8], size: u32) -> Vec<u32> {
    let length = size.max(XSAVE_SIZE).div_ceil(4) as usize;
    let mut area = vec![0; length];
    let (words, _) = bytes.as_chunks::<4>();
    for (to, from) in area.iter_mut().zip(words) {
        *to = u32::from_le_bytes(*from);
    }
    area
}

/// What is added to the host's time stamp counter, after scaling; `None` where KVM does not tell: before Linux 5.16.
pub(super) fn get_tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset(&raw mut offset as u64);
    // SAFETY: KVM writes eight bytes at the attribute's address, which is that of a live local.
    let done = check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) });
    done.ok().map(|()| offset)
}

/// Sets what is added to the host's time stamp counter.
pub(super) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attribute = tsc_offset(&raw const offset as u64);
    // SAFETY: KVM reads eight bytes at the attribute's address, which is that of a live local.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) })
}

fn tsc_offset(addr: u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr,
        flags: 0,
    }
}
