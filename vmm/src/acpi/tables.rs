//! The static tables.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform};
use crate::{chipset, layout};

/// `IAPC_BOOT_ARCH` bits: no VGA to probe, no CMOS clock. The absence of bits 0 and 1 says that there are neither
/// legacy devices nor an 8042 keyboard controller, whose probing takes a kernel longest of all.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

fn port(address: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(address),
    )
}

pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = port(chipset::RESET_PORT);
    fadt.reset_value = chipset::RESET_VALUE;
    fadt.sleep_control_reg = port(chipset::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(chipset::SLEEP_STATUS_PORT);
    fadt.finalize()
}

pub(super) fn madt(platform: &Platform) -> MADT {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC as u32),
    );
    for id in 0..platform.cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC as u32, 0));
    madt
}

/// One segment group with the buses there are.
pub(super) fn mcfg(platform: &Platform) -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM.start, 0, 0, platform.last_bus());
    mcfg
}
