//! The interrupt controllers of a VM: two 8259s and an I/O APIC.

#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_ioapic_state,
    kvm_irqchip, kvm_pic_state,
};
use kvm_ioctls::VmFd;

use super::StateError;

/// Pins of the I/O APIC.
pub const PINS: usize = 24;

/// Masks all lines of both 8259s, as firmware does: the guest is told that there are none, and never will. KVM has them
/// unmasked at first, with vectors from 0 on, which are exceptions.
pub fn mask_pics(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        vm.get_irqchip(&mut chip)?;
        chip.chip.pic.imr = u8::MAX;
        vm.set_irqchip(&chip)?;
    }
    Ok(())
}

/// The state of the interrupt controllers.
#[derive(Clone, Copy)]
pub struct IrqchipState {
    /// The first 8259.
    pub master: kvm_pic_state,
    /// The second one, behind it.
    pub slave: kvm_pic_state,
    /// The I/O APIC.
    pub ioapic: kvm_ioapic_state,
}

impl IrqchipState {
    /// Reads them.
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let get = |chip_id, what| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(|error| StateError::ReadVm {
                    what,
                    source: error.into(),
                })?;
            Ok::<_, StateError>(chip.chip)
        };
        let master = get(KVM_IRQCHIP_PIC_MASTER, "the first interrupt controller")?;
        let slave = get(KVM_IRQCHIP_PIC_SLAVE, "the second interrupt controller")?;
        let ioapic = get(KVM_IRQCHIP_IOAPIC, "the I/O APIC")?;
        // SAFETY: each union was zero before KVM filled in the member of its chip, and any bytes are valid for these
        // members, which are integers.
        let (master, slave, ioapic) = unsafe { (master.pic, slave.pic, ioapic.ioapic) };
        Ok(Self {
            master,
            slave,
            ioapic,
        })
    }

    /// Sets them.
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        let set = |chip_id, path: &'static str, fill: &dyn Fn(&mut kvm_irqchip)| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            fill(&mut chip);
            vm.set_irqchip(&chip).map_err(|error| StateError::Refused {
                path: path.to_owned(),
                source: error.into(),
            })
        };
        set(KVM_IRQCHIP_PIC_MASTER, "irqchip.master", &|chip| {
            chip.chip.pic = self.master;
        })?;
        set(KVM_IRQCHIP_PIC_SLAVE, "irqchip.slave", &|chip| {
            chip.chip.pic = self.slave;
        })?;
        set(KVM_IRQCHIP_IOAPIC, "irqchip.ioapic", &|chip| {
            chip.chip.ioapic = self.ioapic;
        })
    }

    /// What the redirection table has for each pin.
    pub fn redirections(&self) -> [u64; PINS] {
        // SAFETY: the union is 64 bits in both of its members.
        self.ioapic.redirtbl.map(|entry| unsafe { entry.bits })
    }
}

impl PartialEq for IrqchipState {
    fn eq(&self, other: &Self) -> bool {
        let registers = |c: &Self| {
            let io = &c.ioapic;
            (
                io.base_address,
                io.ioregsel,
                io.id,
                io.irr,
                c.redirections(),
            )
        };
        self.master == other.master
            && self.slave == other.slave
            && registers(self) == registers(other)
    }
}

impl std::fmt::Debug for IrqchipState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IrqchipState")
            .field("master", &self.master)
            .field("slave", &self.slave)
            .field("ioapic.irr", &self.ioapic.irr)
            .field("redirections", &self.redirections())
            .finish_non_exhaustive()
    }
}
