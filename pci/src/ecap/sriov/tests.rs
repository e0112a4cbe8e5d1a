use proptest::prelude::*;

use super::*;

const DECLARED: Declaration = Declaration {
    total_vfs: 5,
    vf_device: 0x1041,
    vf_bar_size: 0x4000,
};

fn with(declaration: &Declaration) -> (ConfigSpace, Sriov) {
    let header = Block {
        len: 64,
        registers: Vec::new(),
    };
    let mut builder = ConfigBuilder::new(&header);
    let sriov = Sriov::add(&mut builder, declaration).unwrap();
    (builder.build(), sriov)
}

fn new() -> (ConfigSpace, Sriov) {
    with(&DECLARED)
}

/// Writes a 16-bit register of the capability.
fn put(config: &mut ConfigSpace, sriov: &Sriov, at: u16, value: u16) {
    sriov.write(config, sriov.at + at, &value.to_le_bytes());
}

fn put_dword(config: &mut ConfigSpace, sriov: &Sriov, at: u16, value: u32) {
    sriov.write(config, sriov.at + at, &value.to_le_bytes());
}

#[test]
fn d1_every_register_has_its_place_and_reset_value() {
    let (config, sriov) = new();
    let expected = [
        0x0001_0010,
        0,
        0,
        0x0005_0005,
        0,
        0x0001_0001,
        0x1041_0000,
        0x553,
        1,
        0xc,
        0,
        0,
        0,
        0,
        0,
        0,
    ];
    let found: Vec<_> = (0..LEN)
        .step_by(4)
        .map(|i| config.dword(sriov.at + i))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn d1_only_the_writable_bits_change() {
    let (mut config, sriov) = new();
    for at in (0..LEN).step_by(4).rev() {
        put_dword(&mut config, &sriov, at, u32::MAX);
    }
    let expected = [
        0x0001_0010,
        0,
        // VF Enable, VF MSE, ARI Capable Hierarchy.
        0x19,
        0x0005_0005,
        // 0xffff is more than TotalVFs.
        0,
        0x0001_0001,
        0x1041_0000,
        0x553,
        // 0xffffffff is not one page size.
        1,
        0xffff_c00c,
        0xffff_ffff,
        0,
        0,
        0,
        0,
        0,
    ];
    let found: Vec<_> = (0..LEN)
        .step_by(4)
        .map(|i| config.dword(sriov.at + i))
        .collect();
    assert_eq!(found, expected);
}

#[test]
fn d1_num_vfs_is_writable_only_while_vf_enable_is_clear() {
    let (mut config, sriov) = new();
    put(&mut config, &sriov, at::NUM_VFS, 3);
    assert_eq!(sriov.enabled_vfs(&config), None);
    put(&mut config, &sriov, at::CONTROL, VF_ENABLE);
    put(&mut config, &sriov, at::NUM_VFS, 5);
    assert_eq!(config.word(sriov.at + at::NUM_VFS), 3);
    assert_eq!(sriov.enabled_vfs(&config), Some(3));
    put(&mut config, &sriov, at::CONTROL, 0);
    put(&mut config, &sriov, at::NUM_VFS, 5);
    assert_eq!(config.word(sriov.at + at::NUM_VFS), 5);
}

#[test]
fn d1_num_vfs_above_total_vfs_is_ignored() {
    let (mut config, sriov) = new();
    put(&mut config, &sriov, at::NUM_VFS, 4);
    for value in [6, 0x100, 0xffff] {
        put(&mut config, &sriov, at::NUM_VFS, value);
        assert_eq!(config.word(sriov.at + at::NUM_VFS), 4, "{value:#x}");
    }
    sriov.write(&mut config, sriov.at + at::NUM_VFS + 1, &[1]);
    assert_eq!(config.word(sriov.at + at::NUM_VFS), 4, "high byte alone");
    sriov.write(&mut config, sriov.at + at::NUM_VFS, &[2]);
    assert_eq!(config.word(sriov.at + at::NUM_VFS), 2, "low byte alone");
}

#[test]
fn d1_ari_capable_hierarchy_is_fixed_while_vfs_are_enabled() {
    let (mut config, sriov) = new();
    put(&mut config, &sriov, at::CONTROL, ARI_CAPABLE_HIERARCHY);
    put(
        &mut config,
        &sriov,
        at::CONTROL,
        ARI_CAPABLE_HIERARCHY | VF_ENABLE,
    );
    put(
        &mut config,
        &sriov,
        at::CONTROL,
        VF_ENABLE | VF_MEMORY_SPACE_ENABLE,
    );
    assert_eq!(config.word(sriov.at + at::CONTROL), CONTROL_RW);
    put(&mut config, &sriov, at::CONTROL, 0);
    put(&mut config, &sriov, at::CONTROL, 0);
    assert_eq!(config.word(sriov.at + at::CONTROL), 0);
}

#[test]
fn d1_the_system_page_size_is_one_of_the_supported_ones() {
    let (mut config, sriov) = new();
    for (value, expected) in [
        (0x10, 0x10),
        (0, 0x10),
        (0x3, 0x10),
        (0x4, 0x10),
        (0x800, 0x10),
        (0x8000_0000, 0x10),
        (0x400, 0x400),
        (1, 1),
    ] {
        put_dword(&mut config, &sriov, at::SYSTEM_PAGE_SIZE, value);
        let found = config.dword(sriov.at + at::SYSTEM_PAGE_SIZE);
        assert_eq!(found, expected, "{value:#x}");
    }
    put(&mut config, &sriov, at::CONTROL, VF_ENABLE);
    put_dword(&mut config, &sriov, at::SYSTEM_PAGE_SIZE, 0x10);
    assert_eq!(
        config.dword(sriov.at + at::SYSTEM_PAGE_SIZE),
        1,
        "while enabled"
    );
}

#[test]
fn d1_vf_bars_size_as_one_vf_with_either_half_first() {
    for order in [[0u16, 4], [4, 0]] {
        let (mut config, sriov) = new();
        for half in order {
            put_dword(&mut config, &sriov, at::VF_BAR0 + half, u32::MAX);
        }
        assert_eq!(config.dword(sriov.at + at::VF_BAR0), 0xffff_c00c);
        assert_eq!(config.dword(sriov.at + at::VF_BAR0 + 4), 0xffff_ffff);
    }
}

#[test]
fn d1_a_larger_system_page_size_sizes_and_spaces_the_vfs() {
    let (mut config, sriov) = new();
    put_dword(&mut config, &sriov, at::VF_BAR0, 0x1234_4000);
    put_dword(&mut config, &sriov, at::SYSTEM_PAGE_SIZE, 0x10);
    assert_eq!(config.dword(sriov.at + at::VF_BAR0), 0x1234_000c);
    put_dword(&mut config, &sriov, at::VF_BAR0, u32::MAX);
    assert_eq!(config.dword(sriov.at + at::VF_BAR0), 0xffff_000c);
    put_dword(&mut config, &sriov, at::VF_BAR0, 0x10_0000);
    put(&mut config, &sriov, at::NUM_VFS, 2);
    put(&mut config, &sriov, at::CONTROL, CONTROL_RW);
    let range = sriov.decoded(&config).unwrap().range;
    assert_eq!(range, 0x10_0000..0x12_0000);
    assert_eq!(sriov.locate(&config, 0x1_0008), Some((1, 8)));
}

#[test]
fn d1_vfs_decode_with_vf_enable_and_vf_mse_only() {
    let (mut config, sriov) = new();
    sriov.assign(&mut config, 0x12_3456_4000);
    put(&mut config, &sriov, at::NUM_VFS, 3);
    for (control, vfs) in [
        (0, None),
        (VF_MEMORY_SPACE_ENABLE, None),
        (VF_ENABLE, None),
        (VF_ENABLE | VF_MEMORY_SPACE_ENABLE, Some(3)),
    ] {
        put(&mut config, &sriov, at::CONTROL, control);
        let range = vfs.map(|n| 0x12_3456_4000..0x12_3456_4000 + n * 0x4000);
        assert_eq!(
            sriov.decoded(&config).map(|d| d.range),
            range,
            "{control:#x}"
        );
    }
    assert_eq!(sriov.locate(&config, 0), Some((0, 0)));
    assert_eq!(sriov.locate(&config, 0xbfff), Some((2, 0x3fff)));
    assert_eq!(sriov.locate(&config, 0xc000), None);
    assert_eq!(sriov.locate(&config, u64::MAX), None);
}

#[test]
fn vfs_that_would_wrap_around_decode_nothing() {
    let (mut config, sriov) = new();
    sriov.assign(&mut config, u64::MAX);
    put(&mut config, &sriov, at::NUM_VFS, 2);
    put(&mut config, &sriov, at::CONTROL, CONTROL_RW);
    assert_eq!(sriov.decoded(&config), None);
    assert_eq!(sriov.locate(&config, 0), None);
}

#[test]
fn enabling_no_vf_enables_nothing() {
    let (mut config, sriov) = new();
    put(&mut config, &sriov, at::CONTROL, CONTROL_RW);
    assert_eq!(sriov.enabled_vfs(&config), Some(0));
    assert_eq!(sriov.decoded(&config), None);
}

#[test]
fn firmware_sets_space_aside_for_all_vfs() {
    let (_, sriov) = with(&Declaration {
        total_vfs: MAX_VFS,
        ..DECLARED
    });
    let resource = sriov.resource();
    assert_eq!((resource.size, resource.align), (255 * 0x4000, 0x4000));
}

#[test]
fn vfs_follow_their_pf() {
    let found = [0, 1, 2, 255].map(|devfn| vf_index(DevFn(devfn)));
    assert_eq!(found, [None, Some(0), Some(1), Some(254)]);
}

#[test]
fn bad_declarations_are_refused() {
    let add = |declaration: Declaration| {
        let header = Block {
            len: 64,
            registers: Vec::new(),
        };
        Sriov::add(&mut ConfigBuilder::new(&header), &declaration).is_ok()
    };
    let total = |total_vfs| Declaration {
        total_vfs,
        ..DECLARED
    };
    let size = |vf_bar_size| Declaration {
        vf_bar_size,
        ..DECLARED
    };
    assert_eq!([1, 255].map(total).map(add), [true; 2]);
    assert_eq!([0, 256].map(total).map(add), [false; 2]);
    assert_eq!([0, 2048, 5000].map(size).map(add), [false; 3]);
}

proptest! {
    /// Writes of every size anywhere in the capability: read-only bytes stay, and the rules hold after each.
    #[test]
    fn d1_random_writes_keep_the_rules(
        writes in prop::collection::vec((0u16..LEN, prop::collection::vec(
            prop_oneof![any::<u8>(), 0u8..0x20], 1..5)), 0..200),
    ) {
        let (mut config, sriov) = new();
        let fixed: [u16; 7] = [0x00, 0x04, 0x0c, 0x14, 0x18, 0x1c, 0x3c];
        let reset = fixed.map(|at| config.dword(sriov.at + at));
        for (at, data) in writes {
            let before = sriov.guarded(&config);
            sriov.write(&mut config, sriov.at + at, &data);
            let after = sriov.guarded(&config);
            prop_assert_eq!(fixed.map(|at| config.dword(sriov.at + at)), reset);
            prop_assert_eq!(after.control & !CONTROL_RW, 0);
            prop_assert!(after.num_vfs <= DECLARED.total_vfs);
            prop_assert!(after.page_size.is_power_of_two() && after.page_size & PAGE_SIZES != 0);
            if before.control & VF_ENABLE != 0 {
                prop_assert_eq!(after.num_vfs, before.num_vfs);
                prop_assert_eq!(after.page_size, before.page_size);
            }
            let size = sriov.vf_size(&config);
            prop_assert!(sriov.bars.address(&config, &sriov.bar).is_multiple_of(size));
            prop_assert_eq!(config.dword(sriov.at + at::VF_BAR0) & 0xf, 0xc);
            if let Some(decoded) = sriov.decoded(&config) {
                let len = decoded.range.end - decoded.range.start;
                prop_assert_eq!(len, size * u64::from(after.num_vfs));
            }
        }
    }
}
