//! The guest physical address map.
//!
//! | guest physical address | what |
//! |---|---|
//! | `0x500` | the boot processor's GDT |
//! | `0x7000` | zero page (`boot_params`) |
//! | `0x9000..0xc000` | identity page tables of the first GiB |
//! | `0x2_0000` | kernel command line |
//! | `0x9_fc00..0xa_0000` | reserved, where firmware would keep its extended BIOS data area |
//! | `0xe_0000..0xf_e000` | ACPI tables, RSDP first |
//! | `0xf_e000..0xf_f000` | VM generation ID, 16 bytes at the start of a page of its own |
//! | `0xf_fff0..0x10_0000` | reset vector: a few instructions that reset the machine |
//! | `0x10_0000..` | RAM up to its size or 3 GiB, whichever comes first |
//! | `0xc000_0000..0xe000_0000` | PCI memory window below 4 GiB |
//! | `0xe000_0000..0xf000_0000` | PCI configuration space (ECAM), buses 0 to 255 |
//! | `0xfec0_0000`, `0xfee0_0000` | I/O APIC, local APICs |
//! | `0xfffb_c000..0xffff_c000` | pages KVM uses for itself on Intel |
//! | `0x1_0000_0000..` | the rest of RAM |
//! | 64 GiB above the next multiple of 64 GiB | PCI memory window above 4 GiB |
//!
//! The map is a function of the size of RAM alone, so that two hosts that agree on it agree on everything.

use std::ops::Range;

use devices::memory::RamRange;
use vm_memory::GuestAddress;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// The GDT the boot processor starts with.
pub const GDT: u64 = 0x500;
/// `boot_params`, 4096 bytes.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot processor; the two lower levels follow it.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel command line, NUL-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Where conventional memory ends.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// ACPI tables. The kernel scans this range for the RSDP.
pub const ACPI: Range<u64> = 0xe_0000..VM_GENERATION_ID;
/// The VM generation ID ([`crate::chipset::VmGeneration`]). It has its page for itself: the kernel maps it.
pub const VM_GENERATION_ID: u64 = 0xf_e000;
/// Where a processor in real mode starts after a reset, and where a kernel jumps that wants the firmware to reset it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory above the legacy hole begins; kernels are loaded at or above it.
pub const HIGH_MEMORY: u64 = MIB;

/// Where RAM below 4 GiB ends at the latest.
pub const LOW_RAM_END: u64 = 3 * GIB;
/// Where RAM that did not fit below [`LOW_RAM_END`] continues.
pub const HIGH_RAM: u64 = 4 * GIB;

/// PCI memory window below 4 GiB.
pub const PCI_MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// Room for PCI configuration space: 1 MiB for each of 256 buses, of which a machine uses the first few.
pub const PCI_ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// Most PCI buses.
pub const PCI_MAX_BUSES: u16 = 256;
/// Length of the PCI memory window above RAM.
pub const PCI_MMIO64_LEN: u64 = 64 * GIB;

/// I/O APIC registers.
pub const IO_APIC: u64 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page KVM needs on Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages KVM needs on Intel hosts.
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The smallest guest.
pub const MIN_RAM: u64 = 64 * MIB;
/// The largest guest.
pub const MAX_RAM: u64 = 256 * GIB;

/// The RAM ranges of a guest with `bytes` of memory, ascending. `bytes` is a multiple of the page size.
pub fn ram_ranges(bytes: u64) -> Vec<RamRange> {
    let low = bytes.min(LOW_RAM_END);
    let high = bytes - low;
    [(0, low), (HIGH_RAM, high)]
        .into_iter()
        .filter(|(_, len)| *len != 0)
        .map(|(start, len)| RamRange {
            start: GuestAddress(start),
            len: len as usize,
        })
        .collect()
}

/// Where RAM below 4 GiB ends in a guest with `bytes` of memory.
pub fn low_ram_end(bytes: u64) -> u64 {
    bytes.min(LOW_RAM_END)
}

/// PCI configuration space of a guest with `buses` buses, 1 to [`PCI_MAX_BUSES`].
pub fn pci_ecam(buses: u16) -> Range<u64> {
    let buses = buses.clamp(1, PCI_MAX_BUSES);
    PCI_ECAM.start..PCI_ECAM.start + u64::from(buses) * MIB
}

/// The PCI memory window above RAM in a guest with `bytes` of memory.
pub fn pci_mmio64(bytes: u64) -> Range<u64> {
    let ram_end = HIGH_RAM + bytes.saturating_sub(LOW_RAM_END);
    let start = ram_end.next_multiple_of(PCI_MMIO64_LEN);
    start..start + PCI_MMIO64_LEN
}

/// Why a memory size was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number followed by a unit.
    #[error("'{0}' is not a size; write a number and the unit M or G, between 64M and 256G")]
    Malformed(String),
    /// Outside of what a guest can have.
    #[error("{0} is out of range; a guest has between 64M and 256G of memory")]
    OutOfRange(String),
}

/// Parses a memory size such as `256M` or `1G` into bytes.
///
/// Units are `M` (MiB) and `G` (GiB), in either case, optionally followed by `iB` or `B`.
pub fn parse_memory_size(text: &str) -> Result<u64, SizeError> {
    let malformed = || SizeError::Malformed(text.to_owned());
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits).ok_or_else(malformed)?;
    let unit = match unit.to_ascii_lowercase().as_str() {
        "m" | "mb" | "mib" => MIB,
        "g" | "gb" | "gib" => GIB,
        _ => return Err(malformed()),
    };
    if number.is_empty() {
        return Err(malformed());
    }
    let out_of_range = || SizeError::OutOfRange(text.to_owned());
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(unit))
        .ok_or_else(out_of_range)?;
    if (MIN_RAM..=MAX_RAM).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(out_of_range())
    }
}

/// `bytes` the way [`parse_memory_size`] reads it.
pub fn format_memory_size(bytes: u64) -> String {
    if bytes.is_multiple_of(GIB) {
        format!("{}G", bytes / GIB)
    } else {
        format!("{}M", bytes / MIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("64M", 64 * MIB),
            ("256m", 256 * MIB),
            ("256MiB", 256 * MIB),
            ("1G", GIB),
            ("4gb", 4 * GIB),
            ("256G", 256 * GIB),
        ] {
            assert_eq!(parse_memory_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn malformed_sizes_are_refused() {
        for text in [
            "", "M", "256", "1T", "1.5G", "-1G", " 1G", "1 G", "G1", "0x10M", "1Gi", "é1M",
        ] {
            assert_eq!(
                parse_memory_size(text),
                Err(SizeError::Malformed(text.to_owned())),
                "{text}"
            );
        }
    }

    #[test]
    fn sizes_no_guest_can_have_are_refused() {
        for text in [
            "0M",
            "63M",
            "257G",
            "99999999999999999999G",
            "18446744073709551615M",
        ] {
            assert_eq!(
                parse_memory_size(text),
                Err(SizeError::OutOfRange(text.to_owned())),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn nothing_overlaps_and_no_byte_is_lost(mib in 64u64..=256 * 1024) {
            let bytes = mib * MIB;
            let ram = ram_ranges(bytes);
            prop_assert_eq!(ram.iter().map(|r| r.len as u64).sum::<u64>(), bytes);
            let mut all: Vec<Range<u64>> = ram
                .iter()
                .map(|r| r.start.0..r.start.0 + r.len as u64)
                .collect();
            all.extend([
                PCI_MMIO32,
                PCI_ECAM,
                IO_APIC..IO_APIC + 0x1000,
                LOCAL_APIC..LOCAL_APIC + 0x1000,
                KVM_IDENTITY_MAP..KVM_TSS,
                KVM_TSS..KVM_TSS + 0x3000,
                pci_mmio64(bytes),
            ]);
            all.sort_by_key(|r| r.start);
            for pair in all.windows(2) {
                prop_assert!(pair[0].end <= pair[1].start, "{:x?}", pair);
            }
        }

        #[test]
        fn sizes_survive_formatting(mib in 64u64..=256 * 1024) {
            let bytes = mib * MIB;
            prop_assert_eq!(parse_memory_size(&format_memory_size(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,12}") {
            let _ = parse_memory_size(&text);
        }
    }
}
