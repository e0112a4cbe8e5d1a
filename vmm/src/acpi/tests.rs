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

/// What `value` is in AML.
fn aml(value: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    value.to_aml_bytes(&mut bytes);
    bytes
}

fn contains(table: &[u8], part: &[u8]) -> bool {
    table.windows(part.len()).any(|window| window == part)
}

#[test]
fn each_event_has_an_interrupt_and_notifies_its_own_device() {
    let area = build(&platform(1)).unwrap();
    let all = tables(&area);
    let dsdt = all.iter().find(|(name, _)| name == "DSDT").unwrap().1;
    // If (LEqual (Arg0, line)) { Notify (device, 0x80) }
    for (line, device) in [(5u8, b"PWRB"), (6, b"VGEN")] {
        let interrupt = [0x89, 6, 0, 0x03, 1, line, 0, 0, 0];
        assert!(contains(dsdt, &interrupt), "interrupt {line}, edge");
        let condition = [0xa0, 12, 0x93, 0x68, 0x0a, line];
        let notify = [&[0x86][..], device, &[0x0a, 0x80]].concat();
        assert!(contains(dsdt, &[&condition[..], &notify].concat()));
    }
    let notifies = |w: &&[u8]| w[0] == 0x86 && w[1..].iter().all(u8::is_ascii_uppercase);
    assert_eq!(dsdt.windows(5).filter(notifies).count(), 2);
}

#[test]
fn the_generation_device_says_where_the_identifier_is() {
    let area = build(&platform(1)).unwrap();
    let all = tables(&area);
    let dsdt = all.iter().find(|(name, _)| name == "DSDT").unwrap().1;
    let name = |path: &str, value: &'static str| {
        aml(&acpi_tables::aml::Name::new(
            acpi_tables::aml::Path::new(path),
            &value,
        ))
    };
    assert!(contains(dsdt, &name("_CID", "VM_Gen_Counter")));
    assert!(contains(dsdt, &name("_DDN", "VM_Gen_Counter")));
    // Method (ADDR, 0) { Return (Package () { 0x000f_e000, 0 }) }
    let address = [
        &[0x14, 16][..],
        b"ADDR",
        &[0, 0xa4, 0x12, 8, 2, 0x0c, 0, 0xe0, 0x0f, 0, 0],
    ];
    assert!(contains(dsdt, &address.concat()));
    // A page of its own, between the tables and the reset vector.
    const {
        assert!(layout::VM_GENERATION_ID.is_multiple_of(4096));
        assert!(layout::ACPI.end <= layout::VM_GENERATION_ID);
        assert!(layout::VM_GENERATION_ID + 4096 <= layout::RESET_VECTOR);
    }
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
