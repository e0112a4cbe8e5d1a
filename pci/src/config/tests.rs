use proptest::prelude::*;

use super::*;

fn block(len: u16, registers: &[Register]) -> Block {
    Block {
        len,
        registers: registers.to_vec(),
    }
}

/// A header with one register of each kind of access at 0x10.
fn sample() -> ConfigSpace {
    let header = block(
        64,
        &[
            Register::word(0x00).reset(0x1af4),
            Register::byte(0x10).reset(0x5a).writable(0x0f),
            Register::byte(0x11).reset(0xff).clear_by_one(0xf0),
            Register::word(0x12).trigger(0x8001).writable(0x0010),
        ],
    );
    ConfigBuilder::new(&header).build()
}

fn read<const N: usize>(space: &ConfigSpace, at: u16) -> [u8; N] {
    let mut bytes = [0xcc; N];
    space.read(at, &mut bytes);
    bytes
}

#[test]
fn each_kind_of_bit_does_what_it_was_declared_for() {
    let mut space = sample();
    space.write(0x00, &[0xff, 0xff]);
    assert_eq!(space.word(0), 0x1af4, "read-only");
    space.write(0x10, &[0xa5]);
    assert_eq!(space.byte(0x10), 0x55, "low nibble writable");
    space.write(0x11, &[0x3f]);
    assert_eq!(
        space.byte(0x11),
        0xcf,
        "ones clear, in the high nibble only"
    );
    let written = space.write(0x12, &[0xff, 0xff]);
    assert_eq!(space.word(0x12), 0x0010, "triggers read 0");
    assert_eq!(written.triggered(0x12), 0x8001);
    assert_eq!(
        space.write(0x13, &[0x80]).triggered(0x12),
        0x8000,
        "one byte of the register"
    );
    assert_eq!(space.write(0x12, &[0x10, 0]).triggered(0x12), 0);
}

#[test]
fn a_write_knows_what_it_covered() {
    let written = sample().write(0x10, &[0; 4]);
    assert!(written.touches(0x13, 1) && written.touches(0x0c, 5) && written.touches(0x12, 2));
    assert!(!written.touches(0x14, 2) && !written.touches(0x0c, 4));
    assert!(!Written::default().touches(0, 1));
}

#[test]
fn reset_restores_every_register() {
    let mut space = sample();
    space.write(0x10, &[0; 4]);
    space.write(0x11, &[0xff]);
    space.set_dword(0, 0);
    space.reset();
    assert_eq!(read::<64>(&space, 0), read::<64>(&sample(), 0));
}

#[test]
fn without_capabilities_the_lists_are_empty_and_extended_space_reads_zero() {
    let space = sample();
    assert_eq!(space.byte(CAPABILITIES_POINTER), 0);
    assert_eq!(space.word(STATUS) & STATUS_CAPABILITIES, 0);
    assert_eq!(read::<4>(&space, 0x100), [0; 4]);
    assert_eq!(read::<8>(&space, 0xffc), [0; 8]);
}

#[test]
fn capabilities_are_linked_in_order_at_aligned_offsets() {
    let header = block(64, &[Register::word(STATUS).reset(0x2000)]);
    let mut builder = ConfigBuilder::new(&header);
    let odd = block(5, &[Register::byte(4).reset(9)]);
    let first = builder.capability(0x09, &odd).unwrap();
    let second = builder.capability(0x11, &block(12, &[])).unwrap();
    let space = builder.build();
    assert_eq!((first, second), (0x40, 0x48));
    assert_eq!(space.word(STATUS), 0x2000 | STATUS_CAPABILITIES);
    assert_eq!(space.byte(CAPABILITIES_POINTER), 0x40);
    assert_eq!(read(&space, 0x40), [0x09, 0x48, 0, 0, 9]);
    assert_eq!(read(&space, 0x48), [0x11, 0]);
}

#[test]
fn extended_capabilities_are_linked_from_0x100() {
    let mut builder = ConfigBuilder::new(&block(64, &[]));
    let first = builder.extended(0x000e, 1, &block(8, &[])).unwrap();
    let second = builder.extended(0x0010, 1, &block(0x40, &[])).unwrap();
    let space = builder.build();
    assert_eq!((first, second), (0x100, 0x108));
    assert_eq!(space.dword(0x100), 0x1081_000e);
    assert_eq!(space.dword(0x108), 0x0001_0010);
}

#[test]
fn capabilities_that_do_not_fit_are_refused() {
    let mut builder = ConfigBuilder::new(&block(64, &[]));
    builder.capability(1, &block(192, &[])).unwrap();
    assert_eq!(
        builder.capability(2, &block(4, &[])),
        Err(ConfigError::Full { id: 2, len: 4 })
    );
    builder.extended(1, 1, &block(3840, &[])).unwrap();
    assert!(builder.extended(2, 1, &block(4, &[])).is_err());
}

proptest! {
    /// Whatever is written wherever, read-only bits keep their value and nothing panics.
    #[test]
    fn read_only_bits_never_change(
        writes in prop::collection::vec((0u16..0x1010, prop::collection::vec(any::<u8>(), 0..10)), 0..64)
    ) {
        let mut space = sample();
        let before = read::<0x200>(&space, 0);
        for (at, data) in writes {
            space.write(at, &data);
        }
        let after = read::<0x200>(&space, 0);
        for at in 0..0x200u16 {
            let changed = before[usize::from(at)] ^ after[usize::from(at)];
            prop_assert_eq!(changed & space.read_only_bits(at), 0, "byte {:#x}", at);
        }
    }
}
