//! The memory map and the zero page (`boot_params`) a kernel finds at its entry.

use std::ops::Range;

use devices::memory::View;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::GuestAddress;

use crate::layout;

/// RAM, in an E820 entry.
pub const E820_RAM: u32 = 1;
/// Reserved, in an E820 entry.
pub const E820_RESERVED: u32 = 2;

/// The memory map of a guest with `ram` bytes: address ranges and their E820 types.
pub fn memory_map(ram: u64) -> Vec<(Range<u64>, u32)> {
    let mut map = vec![
        (0..layout::CONVENTIONAL_END, E820_RAM),
        (layout::CONVENTIONAL_END..0xa_0000, E820_RESERVED),
        (layout::ACPI.start..layout::HIGH_MEMORY, E820_RESERVED),
        (layout::HIGH_MEMORY..layout::low_ram_end(ram), E820_RAM),
        // Without this entry Linux does not trust the configuration space window.
        (layout::PCI_ECAM, E820_RESERVED),
    ];
    if ram > layout::LOW_RAM_END {
        let end = layout::HIGH_RAM + (ram - layout::LOW_RAM_END);
        map.push((layout::HIGH_RAM..end, E820_RAM));
    }
    map
}

/// A setup header for a kernel whose image has none.
pub fn default_header() -> setup_header {
    setup_header {
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    }
}

/// The zero page: `header` completed with where everything else is.
pub fn zero_page(
    ram: u64,
    header: setup_header,
    cmdline: &str,
    initrd: Option<Range<u64>>,
) -> boot_params {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: layout::ACPI.start,
        ..Default::default()
    };
    // 0xff: a loader without a number of its own.
    params.hdr.type_of_loader = 0xff;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.start as u32;
        params.hdr.ramdisk_size = (initrd.end - initrd.start) as u32;
    }
    let map = memory_map(ram);
    let mut table = params.e820_table;
    for (slot, (range, kind)) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.end - range.start,
            r#type: *kind,
        };
    }
    params.e820_table = table;
    params.e820_entries = map.len() as u8;
    params
}

/// Writes the zero page to its place.
pub fn write(memory: &View, params: &boot_params) -> Result<(), String> {
    let params = BootParams::new(params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, &**memory).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{GIB, MIB};

    #[test]
    fn the_memory_map_covers_ram_and_reserves_the_rest() {
        for ram in [128 * MIB, 3 * GIB, 4 * GIB, 256 * GIB] {
            let map = memory_map(ram);
            let total: u64 = map
                .iter()
                .filter(|(_, kind)| *kind == E820_RAM)
                .map(|(range, _)| range.end - range.start)
                .sum();
            // Everything but the legacy hole between conventional and high memory.
            assert_eq!(
                total,
                ram - (layout::HIGH_MEMORY - layout::CONVENTIONAL_END)
            );
            assert!(map.contains(&(layout::PCI_ECAM, E820_RESERVED)));
            assert!(map.contains(&(layout::ACPI.start..layout::HIGH_MEMORY, E820_RESERVED)));
            assert!(map.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
        }
    }

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let params = zero_page(
            4 * GIB,
            default_header(),
            "console=ttyS0",
            Some(0x7000_0000..0x7000_1234),
        );
        let header = params.hdr;
        assert_eq!({ header.cmd_line_ptr }, layout::CMDLINE as u32);
        assert_eq!({ header.cmdline_size }, 13);
        assert_eq!({ header.ramdisk_image }, 0x7000_0000);
        assert_eq!({ header.ramdisk_size }, 0x1234);
        assert_eq!({ params.acpi_rsdp_addr }, 0xe_0000);
        assert_eq!({ params.e820_entries }, 6);
        let last = params.e820_table[5];
        assert_eq!(({ last.addr }, { last.size }), (4 * GIB, GIB));
    }
}
