//! The device configuration of managed devices: classes 5 and 6.

use driver::virtio::feature;
use driver::virtio::management::{code, command};

use crate::rig::{Live, Rig, SIMPLE};

fn read(live: &mut Live, id: u64, offset: u32, size: u32) -> Result<Vec<u8>, u8> {
    let range = live.management.out().word(offset).word(size).bytes();
    let mut bytes = live.call(id, command::GET_CONFIG, &range)?;
    bytes.truncate(size as usize);
    Ok(bytes)
}

fn write(live: &mut Live, id: u64, offset: u32, bytes: &[u8]) -> Result<Vec<u8>, u8> {
    let range = live.management.out().word(offset).word(bytes.len() as u32);
    let data = range.raw(bytes).bytes();
    live.call(id, command::SET_CONFIG, &data)
}

/// Requirements: S4-21, S4-22, M15, M16
#[test]
fn s4_21_the_configuration_is_read_and_written_in_aligned_parts_within_it() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(feature::VERSION_1);
    let whole: Vec<u8> = (0..16).collect();
    assert_eq!(read(&mut live, id, 0, 16), Ok(whole));
    for (offset, size) in [(3, 1), (2, 2), (12, 4), (8, 8), (4, 5), (16, 0)] {
        let expected: Vec<u8> = (offset..offset + size).map(|n| n as u8).collect();
        assert_eq!(
            read(&mut live, id, offset, size),
            Ok(expected),
            "{offset}, {size}"
        );
    }
    let bad = [
        (16, 1),
        (0, 17),
        (15, 2),
        (1, 2),
        (2, 4),
        (4, 3),
        (2, 8),
        (u32::MAX, 1),
        (4, u32::MAX),
        (u32::MAX, u32::MAX),
    ];
    for (offset, size) in bad {
        assert_eq!(
            read(&mut live, id, offset, size),
            Err(code::VALUE),
            "{offset}, {size}"
        );
    }
    write(&mut live, id, 4, &[0xaa, 0xbb]).unwrap();
    assert_eq!(read(&mut live, id, 4, 4), Ok(vec![0xaa, 0xbb, 6, 7]));
    assert_eq!(write(&mut live, id, 5, &[1, 2]), Err(code::VALUE));
    assert_eq!(write(&mut live, id, 16, &[1]), Err(code::VALUE));
    let claims = live.management.out().word(0).word(8).raw(&[1; 7]);
    let mut claims = claims.bytes();
    claims.truncate(8 + 7);
    assert_eq!(
        live.call(id, command::SET_CONFIG, &claims),
        Err(code::LENGTH)
    );
    assert_eq!(
        read(&mut live, id, 0, 4),
        Ok(vec![0, 1, 2, 3]),
        "none of it was written"
    );
}

/// Requirements: S4-19, S4-20, M14
#[test]
fn s4_19_a_change_shows_in_the_generation() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = rig.device(&mut live, SIMPLE);
    let generation = |live: &mut Live| live.call(device.id, command::GENERATION, &[]).unwrap()[0];
    let before = generation(&mut live);
    assert_eq!(generation(&mut live), before, "asking changes nothing");
    read(&mut live, device.id, 0, 16).unwrap();
    assert_eq!(generation(&mut live), before, "nor does reading");
    rig.controls[1].change_config(vec![7; 16]);
    rig.machine.settle();
    assert_eq!(read(&mut live, device.id, 0, 4), Ok(vec![7; 4]));
    assert_ne!(generation(&mut live), before);
}
