//! The ACPI tables: hardware-reduced ACPI, one PCIe host bridge, a serial port, a power button, a VM generation ID, a
//! panic device.
//!
//! Hardware-reduced means that there is no legacy power management block, no legacy interrupt controller to probe and
//! no timer to calibrate against; the power button and a change of the VM generation ID arrive through a generic event
//! device, with an interrupt line each, power-off and reset are one port write each ([`crate::chipset`]). It also spares a booting kernel several hundred exits.

mod dsdt;
mod tables;

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;

use crate::layout;

const OEM_ID: [u8; 6] = *b"TERN  ";
const OEM_TABLE_ID: [u8; 8] = *b"TERNVMM ";
const OEM_REVISION: u32 = 1;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Number of processors; their local APIC ids are 0 upwards.
    pub cpus: u8,
    /// Number of PCI buses, 1 to 256.
    pub buses: u16,
    /// PCI memory window above 4 GiB.
    pub mmio64: Range<u64>,
}

impl Platform {
    /// The number of the last PCI bus.
    fn last_bus(&self) -> u8 {
        self.buses.clamp(1, layout::PCI_MAX_BUSES).wrapping_sub(1) as u8
    }
}

/// Why there are no tables.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// More processors than the area has room for, which the limit on processors should have excluded.
    #[error("the ACPI tables have {0} bytes, more than their area holds")]
    TooLarge(usize),
}

/// The tables as they stand in guest memory from the start of [`layout::ACPI`]: the RSDP first.
pub fn build(platform: &Platform) -> Result<Vec<u8>, AcpiError> {
    let base = layout::ACPI.start;
    // The RSDP comes first but must know where the XSDT will be.
    let mut area = vec![0; Rsdp::len().next_multiple_of(16)];
    let dsdt = append(&mut area, &dsdt::dsdt(platform));
    let fadt = append(&mut area, &tables::fadt(base + dsdt));
    let madt = append(&mut area, &tables::madt(platform));
    let mcfg = append(&mut area, &tables::mcfg(platform));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(base + table);
    }
    let xsdt = append(&mut area, &xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, base + xsdt).to_aml_bytes(&mut rsdp);
    for (slot, byte) in area.iter_mut().zip(rsdp) {
        *slot = byte;
    }
    if area.len() as u64 > layout::ACPI.end - base {
        return Err(AcpiError::TooLarge(area.len()));
    }
    Ok(area)
}

/// Appends `table` at a multiple of 16; returns its offset.
fn append(area: &mut Vec<u8>, table: &dyn Aml) -> u64 {
    area.resize(area.len().next_multiple_of(16), 0);
    let offset = area.len() as u64;
    table.to_aml_bytes(area);
    offset
}

#[cfg(test)]
mod tests;
