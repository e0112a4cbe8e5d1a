//! The common configuration structure.

use conformance::{ALL, Rig};
use driver::access::{FunctionExt, Register};
use driver::host::{Place, Shape};
use driver::virtio::common;

/// Every register: offset, width, value after a reset of a device with queues of 16 and 8 entries.
const REGISTERS: [(u64, usize, u64); 20] = [
    (0, 4, 0),
    (4, 4, 1 << 28 | 1 << 29 | 1 << 5),
    (8, 4, 0),
    (12, 4, 0),
    (16, 2, 0xffff),
    (18, 2, 2),
    (20, 1, 0),
    (21, 1, 0),
    (22, 2, 0),
    (24, 2, 16),
    (26, 2, 0xffff),
    (28, 2, 0),
    (30, 2, 0),
    (32, 8, 0),
    (40, 8, 0),
    (48, 8, 0),
    (56, 2, 0),
    (58, 2, 0),
    (60, 2, 0),
    (62, 2, 0),
];

fn read(rig: &Rig, offset: u64, width: usize) -> u64 {
    let region = rig.transport().common_region();
    let mut bytes = [0; 8];
    let function = rig.function();
    let address = function.bar_address(region.bar, region.offset + offset);
    rig.machine.read(address, &mut bytes[..width]);
    u64::from_le_bytes(bytes)
}

fn write(rig: &Rig, offset: u64, data: &[u8]) {
    let region = rig.transport().common_region();
    let function = rig.function();
    let address = function.bar_address(region.bar, region.offset + offset);
    rig.machine.write(address, data);
}

/// All 64 bytes, read in whole registers.
fn snapshot(rig: &Rig) -> Vec<u64> {
    REGISTERS
        .iter()
        .map(|(offset, width, _)| read(rig, *offset, *width))
        .collect()
}

/// Requirements: D2
#[test]
fn d2_common_configuration_is_64_bytes_and_aligned() {
    let region = Rig::new().transport().common_region();
    assert_eq!(region.len, 64);
    assert_eq!(region.offset % 4, 0);
}

/// Requirements: D2, E8, B-51
#[test]
fn d2_registers_stand_at_their_offsets_with_their_reset_values() {
    let rig = Rig::new();
    for (offset, width, reset) in REGISTERS {
        assert_eq!(read(&rig, offset, width), reset, "offset {offset}");
    }
}

/// Requirements: D2
#[test]
fn d2_registers_can_be_read_in_pieces() {
    let rig = Rig::new();
    for (offset, width, reset) in REGISTERS {
        for (at, byte) in reset.to_le_bytes().iter().enumerate().take(width) {
            let found = read(&rig, offset + at as u64, 1);
            assert_eq!(found, u64::from(*byte), "byte {at} of offset {offset}");
        }
    }
}

/// Requirements: D2
#[test]
fn d2_read_only_registers_ignore_writes() {
    let rig = Rig::new();
    let before = snapshot(&rig);
    for (offset, width) in [(4, 4), (18, 2), (21, 1), (30, 2), (60, 2), (62, 2)] {
        write(&rig, offset, &[0xa5; 8][..width]);
    }
    assert_eq!(snapshot(&rig), before);
}

/// Requirements: D2
#[test]
fn d2_writes_of_part_of_a_register_are_ignored() {
    let rig = Rig::new();
    let before = snapshot(&rig);
    for (offset, width, _) in REGISTERS {
        for len in [1, 2, 3, 4, 5, 6, 7, 8] {
            let half = width == 8 && len == 4;
            if len != width && !half {
                write(&rig, offset, &[0x11; 8][..len]);
                assert_eq!(snapshot(&rig), before, "{len} bytes at {offset}");
            }
        }
    }
}

/// Requirements: D2
#[test]
fn d2_accesses_across_the_end_touch_nothing_beyond() {
    let rig = Rig::new();
    write(&rig, 62, &[0xff; 8]);
    write(&rig, 64, &[0xff; 4]);
    assert_eq!(read(&rig, 62, 8), 0);
    assert_eq!(read(&rig, 64, 4), 0);
}

/// Requirements: D2
#[test]
fn d2_queue_registers_follow_queue_select() {
    let rig = Rig::new();
    let transport = rig.transport();
    for (queue, size) in [(0, 16), (1, 8)] {
        transport.select(queue);
        assert_eq!(transport.get(common::QUEUE_SELECT), queue);
        assert_eq!(transport.get(common::QUEUE_SIZE), size);
        transport.set(common::QUEUE_DESC, u32::from(queue) * 0x1000 + 0x1000);
    }
    transport.select(0);
    assert_eq!(transport.get(common::QUEUE_DESC), 0x1000);
}

/// Requirements: D2, E8
#[test]
fn e8_a_queue_that_does_not_exist_has_size_0_and_takes_nothing() {
    let rig = Rig::new();
    let transport = rig.transport();
    for queue in [2, 0x7fff, 0xffff] {
        transport.select(queue);
        transport.set(common::QUEUE_SIZE, 4);
        transport.set(common::QUEUE_DESC, 0x1000);
        transport.set(common::QUEUE_ENABLE, 1);
        assert_eq!(transport.get(common::QUEUE_SIZE), 0);
        assert_eq!(transport.get(common::QUEUE_DESC), 0);
        assert_eq!(transport.get(common::QUEUE_ENABLE), 0);
    }
}

/// Requirements: E8
#[test]
fn e8_every_queue_starts_disabled_with_its_maximum_size() {
    let shape = Shape {
        queues: vec![256, 64, 1, 1024],
        ..Shape::default()
    };
    let rig = Rig::with(shape, Place::BehindPort);
    let transport = rig.transport();
    let found = [0, 1, 2, 3].map(|queue| {
        let size = transport.queue_size(queue);
        (size, transport.get(common::QUEUE_ENABLE))
    });
    assert_eq!(found, [(256, 0), (64, 0), (1, 0), (1024, 0)]);
}

/// Requirements: E8
#[test]
fn e8_a_queue_size_that_is_no_power_of_two_or_too_large_is_ignored() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.select(0);
    for (size, expected) in [
        (8, 8),
        (0, 8),
        (3, 8),
        (32, 8),
        (0xffff, 8),
        (16, 16),
        (1, 1),
    ] {
        transport.set(common::QUEUE_SIZE, size);
        assert_eq!(transport.get(common::QUEUE_SIZE), expected, "{size}");
    }
}

/// Requirements: D2
#[test]
fn d2_writing_0_to_queue_enable_does_not_disable_a_queue() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.transport.select(0);
    live.transport.set(common::QUEUE_ENABLE, 0);
    live.transport.set(common::QUEUE_ENABLE, 2);
    assert_eq!(live.transport.get(common::QUEUE_ENABLE), 1);
    live.echo(0, b"still here");
}

/// Requirements: D2
#[test]
fn d2_addresses_and_size_of_an_enabled_queue_do_not_change() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.transport.select(0);
    for register in [
        common::QUEUE_DESC,
        common::QUEUE_DRIVER,
        common::QUEUE_DEVICE,
    ] {
        live.transport.set(register, 0xdead_0000);
    }
    live.transport.set(common::QUEUE_SIZE, 2);
    let layout = *live.queues[0].layout();
    assert_eq!(
        u64::from(live.transport.get(common::QUEUE_DESC)),
        layout.descriptors
    );
    assert_eq!(live.transport.get(common::QUEUE_SIZE), layout.size);
    live.echo(0, b"still here");
}

/// Requirements: B-53
#[test]
fn b53_halves_of_64_bit_registers_are_independent() {
    let rig = Rig::new();
    let transport = rig.transport();
    let region = transport.common_region();
    let function = rig.function();
    for offset in [32, 40, 48] {
        let whole = Register::<u64>::at(offset);
        let [low, high] = [Register::<u32>::at(offset), Register::at(offset + 4)];
        function.set(region, high, 0x1122_3344);
        assert_eq!(function.get(region, whole), 0x1122_3344_0000_0000);
        function.set(region, low, 0x5566_7788);
        assert_eq!(function.get(region, whole), 0x1122_3344_5566_7788);
        assert_eq!(function.get(region, low), 0x5566_7788);
        assert_eq!(function.get(region, high), 0x1122_3344);
        function.set(region, high, 0);
        assert_eq!(function.get(region, whole), 0x5566_7788);
    }
}
