//! The function on its bus: identity, BARs, capabilities.

use conformance::Rig;
use driver::access::{FunctionExt, Region};
use driver::host::{Place, Shape};
use driver::pci::{
    BarKind, bars, capabilities, express, extended_capabilities, find_capability, header, id, scan,
};
use driver::virtio::{Transport, VENDOR, structure};

/// Requirements: D1
#[test]
fn d1_a_scan_finds_functions_on_the_root_bus_and_behind_ports() {
    for (place, bus) in [(Place::RootBus, 0), (Place::BehindPort, 1)] {
        let rig = Rig::with(Shape::default(), place);
        let found = scan(0, &|address| rig.machine.function(address));
        let virtio: Vec<_> = found.iter().filter(|f| f.vendor == VENDOR).collect();
        assert_eq!(virtio.len(), 1);
        assert_eq!(virtio[0].address, rig.address);
        assert_eq!(virtio[0].address.bus, bus);
        let bridges = found.iter().filter(|f| f.secondary_bus.is_some());
        assert_eq!(bridges.count(), usize::from(bus));
    }
}

/// Requirements: D2
#[test]
fn d2_the_header_says_modern_virtio() {
    let rig = Rig::new();
    let function = rig.function();
    assert_eq!(function.config::<u16>(header::VENDOR_ID), 0x1af4);
    assert_eq!(function.config::<u16>(header::DEVICE_ID), 0x1040 + 4);
    assert!(function.config::<u8>(header::REVISION) >= 1);
    assert!(function.config::<u16>(header::SUBSYSTEM_ID) >= 0x40);
    assert_eq!(function.config::<u8>(header::INTERRUPT_PIN), 0);
}

/// Requirements: D1
#[test]
fn d1_the_port_type_fits_the_bus() {
    for (place, port_type) in [(Place::RootBus, 9), (Place::BehindPort, 0)] {
        let rig = Rig::with(Shape::default(), place);
        let function = rig.function();
        let at = find_capability(&function, id::EXPRESS).unwrap().unwrap();
        let express: u16 = function.config(at.offset + 2);
        assert_eq!(express >> 4 & 0xf, port_type);
        assert_eq!(express & 0xf, 2, "version");
    }
}

/// Requirements: D1
#[test]
fn d1_extended_space_starts_with_a_valid_header() {
    for place in [Place::RootBus, Place::BehindPort] {
        let rig = Rig::with(Shape::default(), place);
        let function = rig.function();
        assert_ne!(function.config::<u32>(0x100), u32::MAX);
        let list = extended_capabilities(&function).unwrap();
        let ari = list.iter().any(|c| c.id == id::EXT_ARI);
        assert_eq!(ari, place == Place::BehindPort);
    }
}

/// Requirements: D2, E11
#[test]
fn d2_all_structures_are_there_once() {
    let rig = Rig::new();
    let transport = rig.transport();
    let mut kinds: Vec<u8> = transport.structures().iter().map(|s| s.kind).collect();
    kinds.sort_unstable();
    assert_eq!(kinds, [1, 2, 3, 4, 5]);
    assert!(transport.msix().is_some());
}

/// Requirements: E11
#[test]
fn e11_structures_are_aligned_long_enough_and_in_a_bar() {
    let rig = Rig::new();
    let transport = rig.transport();
    let bars = bars(transport.function());
    for (kind, align, min, cap_len) in [
        (structure::COMMON, 4, 56, 16),
        (structure::NOTIFY, 2, 2, 20),
        (structure::ISR, 1, 1, 16),
        (structure::DEVICE, 4, 1, 16),
    ] {
        let found = transport.structures().iter().find(|s| s.kind == kind);
        let found = found.unwrap();
        assert_eq!(found.region.offset % align, 0, "{kind}");
        assert!(found.region.len >= min, "{kind}");
        assert!(found.capability_len >= cap_len, "{kind}");
        let bar = bars.iter().find(|b| b.index == found.region.bar).unwrap();
        assert_ne!(bar.kind, BarKind::Io, "{kind}");
        assert!(found.region.offset + found.region.len <= bar.size, "{kind}");
    }
}

/// Requirements: E11
#[test]
fn e11_structures_do_not_overlap() {
    for queues in [1, 2, 200] {
        let shape = Shape {
            queues: vec![16; queues],
            config: vec![0; 3840],
            ..Shape::default()
        };
        let rig = Rig::with(shape, Place::RootBus);
        let transport = rig.transport();
        let msix = *transport.msix().unwrap();
        let mut regions: Vec<Region> = transport
            .structures()
            .iter()
            .filter(|s| s.kind != structure::PCI_CFG)
            .map(|s| s.region)
            .collect();
        regions.extend([msix.table, msix.pending]);
        regions.sort_by_key(|r| (r.bar, r.offset));
        for pair in regions.windows(2) {
            let apart =
                pair[0].bar != pair[1].bar || pair[0].offset + pair[0].len <= pair[1].offset;
            assert!(apart, "{pair:?}");
        }
    }
}

/// Requirements: E11
#[test]
fn e11_the_msix_table_shares_no_page_with_anything_else() {
    let rig = Rig::new();
    let transport = rig.transport();
    let msix = *transport.msix().unwrap();
    let pages = |r: Region| (r.bar, r.offset / 4096, (r.offset + r.len - 1) / 4096);
    let (bar, first, last) = pages(msix.table);
    for other in transport
        .structures()
        .iter()
        .filter(|s| s.kind != structure::PCI_CFG)
    {
        let (other_bar, from, to) = pages(other.region);
        assert!(bar != other_bar || to < first || last < from, "{other:?}");
    }
}

/// Requirements: E9
#[test]
fn e9_there_is_no_power_management_capability() {
    let rig = Rig::new();
    let found = find_capability(&rig.function(), id::POWER_MANAGEMENT).unwrap();
    assert_eq!(found, None);
}

/// Requirements: E3
#[test]
fn e3_the_function_offers_flr() {
    let rig = Rig::new();
    let function = rig.function();
    let at = find_capability(&function, id::EXPRESS).unwrap().unwrap();
    let capable: u32 = function.config(at.offset + express::DEVICE_CAPABILITIES);
    assert_ne!(capable & express::CAPABLE_OF_FLR, 0);
}

/// Requirements: E11
#[test]
fn e11_capabilities_are_read_only() {
    let rig = Rig::new();
    let function = rig.function();
    let transport = rig.transport();
    let before = transport.structures().to_vec();
    for cap in capabilities(&function).unwrap() {
        if cap.id == id::VENDOR {
            for at in (0..16).step_by(4) {
                function.set_config(cap.offset + at, u32::MAX);
            }
        }
    }
    let after = Transport::new(function).unwrap();
    let fixed = |list: &[driver::virtio::Structure]| -> Vec<_> {
        list.iter()
            .filter(|s| s.kind != structure::PCI_CFG)
            .copied()
            .collect()
    };
    assert_eq!(fixed(after.structures()), fixed(&before));
}
