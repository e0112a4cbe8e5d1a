//! What a driver sees of a disk is what its parameters say.

use super::*;

/// Parameters that differ from today's in every field.
const OTHER: Parameters = Parameters {
    queue_size: 16,
    seg_max: 7,
    physical_block_exp: 4,
    min_io_size: 16,
    max_discard_sectors: 5,
    max_discard_seg: 2,
    discard_sector_alignment: 16,
    max_write_zeroes_sectors: 6,
    max_write_zeroes_seg: 3,
    write_zeroes_may_unmap: false,
};

fn config_of(parameters: &Parameters) -> Vec<u8> {
    let file = image();
    let disk = Block::open(&BlockConfig::new(file.path())).unwrap();
    let disk = disk.with_parameters(parameters).unwrap();
    disk.config().to_vec()
}

#[test]
fn the_configuration_of_a_disk_by_default_is_that_of_the_first_snapshots() {
    let file = image();
    let disk = Block::open(&BlockConfig::new(file.path())).unwrap();
    let numbers = |list: &[u32]| -> Vec<u8> {
        let list = list.iter();
        list.flat_map(|number| number.to_le_bytes()).collect()
    };
    // Capacity; no size_max, seg_max, no geometry; blocks of 512 bytes, 8 of them in a physical one; one queue; ranges
    // of 1 GiB, 32 of them.
    let expected = [
        numbers(&[64, 0, 0, 254, 0, 512]),
        vec![3, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        numbers(&[1 << 21, 32, 8, 1 << 21, 32, 1]),
    ];
    assert_eq!(disk.config(), expected.concat());
    assert_eq!(disk.queue_sizes(), [256]);
    assert_eq!(disk.config(), config_of(&Parameters::default()));
}

#[test]
fn a_disk_shows_and_keeps_its_parameters() {
    let bytes = config_of(&OTHER);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(12), bytes[24], bytes[26]), (7, 4, 16));
    assert_eq!([36, 40, 44].map(word), [5, 2, 16]);
    assert_eq!([48, 52, 56].map(word), [6, 3, 0]);

    let file = image();
    let disk = Block::open(&BlockConfig::new(file.path())).unwrap();
    let mut driver = Driver::live(disk.with_parameters(&OTHER).unwrap(), ALL);
    assert_eq!(driver.function.queue(0).unwrap().max_size, 16);
    let mut status = |kind, count: usize, sectors| {
        let segments = (0..count).flat_map(|_| segment(0, sectors, 0));
        let out = header(kind, 0).into_iter().chain(segments).collect();
        ask(&mut driver, out, 0).0
    };
    for (kind, count, sectors, expected) in [
        (DISCARD, 2, 5, OK),
        (DISCARD, 3, 5, IOERR),
        (DISCARD, 1, 6, IOERR),
        (WRITE_ZEROES, 3, 6, OK),
        (WRITE_ZEROES, 4, 6, IOERR),
        (WRITE_ZEROES, 1, 7, IOERR),
    ] {
        assert_eq!(
            status(kind, count, sectors),
            expected,
            "{kind} {count} {sectors}"
        );
    }
}

#[test]
fn parameters_that_no_disk_can_have_are_refused_by_name() {
    assert_eq!(OTHER.check(), Ok(()));
    type Change = fn(&mut Parameters);
    let cases: [(&str, Change); 10] = [
        ("queue_size", |p| p.queue_size = 24),
        ("queue_size", |p| p.queue_size = 2),
        ("seg_max", |p| p.seg_max = 15),
        ("seg_max", |p| p.seg_max = 0),
        ("physical_block_exp", |p| p.physical_block_exp = 8),
        ("max_discard_sectors", |p| p.max_discard_sectors = 0),
        ("max_discard_seg", |p| p.max_discard_seg = 33),
        ("discard_sector_alignment", |p| {
            p.discard_sector_alignment = 3
        }),
        ("max_write_zeroes_sectors", |p| {
            p.max_write_zeroes_sectors = u32::MAX
        }),
        ("max_write_zeroes_seg", |p| p.max_write_zeroes_seg = 0),
    ];
    let file = image();
    for (field, change) in cases {
        let mut parameters = OTHER;
        change(&mut parameters);
        assert_eq!(parameters.check().unwrap_err().field, field);
        let disk = Block::open(&BlockConfig::new(file.path())).unwrap();
        assert!(disk.with_parameters(&parameters).is_err());
    }
}
