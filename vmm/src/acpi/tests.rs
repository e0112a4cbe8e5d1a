use super::*;

fn platform(cpus: u8) -> Platform {
    Platform {
        cpus,
        buses: 3,
        mmio64: layout::pci_mmio64(4 * layout::GIB),
    }
}

fn u32_at(area: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(area[offset..offset + 4].try_into().unwrap())
}

fn u64_at(area: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(area[offset..offset + 8].try_into().unwrap())
}

/// The table at a guest physical address, its checksum checked.
fn table(area: &[u8], address: u64) -> &[u8] {
    let at = (address - layout::ACPI.start) as usize;
    let len = u32_at(area, at + 4) as usize;
    let table = &area[at..at + len];
    let sum = table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
    table
}

/// All tables reachable from the RSDP, by signature; the DSDT through the FADT.
fn tables(area: &[u8]) -> Vec<(String, &[u8])> {
    assert_eq!(&area[..8], b"RSD PTR ");
    for len in [20, 36] {
        let sum = area[..len].iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(sum, 0, "checksum of the first {len} bytes of the RSDP");
    }
    let xsdt = table(area, u64_at(area, 24));
    let mut found: Vec<_> = xsdt[36..]
        .chunks(8)
        .map(|entry| table(area, u64::from_le_bytes(entry.try_into().unwrap())))
        .collect();
    let fadt = found.iter().find(|t| t.starts_with(b"FACP")).unwrap();
    found.push(table(area, u64_at(fadt, 140)));
    found.push(xsdt);
    found
        .into_iter()
        .map(|t| (String::from_utf8(t[..4].to_vec()).unwrap(), t))
        .collect()
}

#[test]
fn every_table_is_reachable_and_sums_to_zero() {
    let area = build(&platform(2)).unwrap();
    let names: Vec<_> = tables(&area).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["FACP", "APIC", "MCFG", "DSDT", "XSDT"]);
}

#[test]
fn the_madt_lists_every_processor() {
    for cpus in [1, 2, 254] {
        let area = build(&platform(cpus)).unwrap();
        let all = tables(&area);
        let madt = all.iter().find(|(name, _)| name == "APIC").unwrap().1;
        let (mut at, mut ids) = (44, Vec::new());
        while at < madt.len() {
            if madt[at] == 0 {
                ids.push(madt[at + 3]);
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(ids, (0..cpus).collect::<Vec<_>>());
    }
}

#[test]
fn the_mcfg_names_the_window_and_the_buses() {
    let area = build(&platform(1)).unwrap();
    let all = tables(&area);
    let mcfg = all.iter().find(|(name, _)| name == "MCFG").unwrap().1;
    assert_eq!(u64_at(mcfg, 44), layout::PCI_ECAM.start);
    assert_eq!(mcfg[52..56], [0, 0, 0, 2]);
}

#[test]
fn the_fadt_promises_hardware_reduced_acpi_and_nothing_legacy() {
    let area = build(&platform(1)).unwrap();
    let all = tables(&area);
    let fadt = all.iter().find(|(name, _)| name == "FACP").unwrap().1;
    let flags = u32_at(fadt, 112);
    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
    assert_ne!(flags & 1 << 10, 0, "reset register");
    assert_eq!(fadt[109..111], [0b10_0100, 0], "no 8042, no VGA, no RTC");
    assert_eq!(fadt[116..128], [1, 8, 0, 1, 2, 6, 0, 0, 0, 0, 0, 0]);
}

/// For the eyes of `iasl -d`: set `TERN_ACPI_DUMP` to a directory.
#[test]
fn tables_can_be_dumped() {
    let Some(directory) = std::env::var_os("TERN_ACPI_DUMP") else {
        return;
    };
    let area = build(&platform(2)).unwrap();
    for (name, table) in tables(&area) {
        let path = std::path::Path::new(&directory).join(format!("{name}.dat"));
        std::fs::write(path, table).unwrap();
    }
}
