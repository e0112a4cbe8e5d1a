//! The context of a VF as an owner's driver reads it.

use devices::context;
use driver::access::{FunctionExt, Register};
use driver::pci::{VectorEntry, header};
use driver::virtio::common;
use driver::virtio::migration::{CommandError, Migrate, mode, opcode};

use crate::rig::{BAD_FIELD, Rig, VF};
use mode::{ACTIVE, FREEZE, STOP};

/// A group whose first VF is live and has echoed something.
fn used() -> Rig {
    let rig = Rig::new(2);
    let mut vf = rig.drive(1);
    for _ in 0..5 {
        vf.request(0, b"some work", 16);
    }
    vf.request(1, b"more", 16);
    rig
}

/// Requirements: S3-22, S3-23, S3-24, S3-27, G3-k
#[test]
fn s3_22_the_context_is_read_in_every_mode_and_then_there_is_no_more() {
    let mut rig = used();
    for party in 0..2 {
        for held in mode::ALL {
            let driver = &mut rig.both()[party];
            driver.set_mode(VF, held).unwrap();
            driver.discard(VF).unwrap();
            let context = driver.read_all(VF, 4096).unwrap();
            assert!(context.len() > 300, "{}", context.len());
            for _ in 0..3 {
                let answer = driver.ask(opcode::CONTEXT_READ, VF, &[], 64).unwrap();
                assert_eq!((answer.output(), answer.result().len()), (0, 0));
                assert_eq!(driver.context_size(VF, 0), Ok(0));
            }
            let function = rig.function(1);
            assert_eq!(
                context,
                context::encode(&function.save(), &function.shape())
            );
        }
        rig.both()[party].set_mode(VF, ACTIVE).unwrap();
    }
    // The device has lost nothing by it (G3-k).
    let mut vf = rig.drive(1);
    assert_eq!(vf.request(0, b"alive", 8), b"alive");
}

/// Requirements: S3-24, S3-25, S3-26
#[test]
fn s3_25_pieces_of_every_size_make_the_same_context() {
    let mut rig = used();
    for driver in rig.both() {
        driver.set_mode(VF, FREEZE).unwrap();
        let whole = driver.read_all(VF, 1 << 16).unwrap();
        let size = whole.len();
        for step in (1..=size + 1).chain([4096, 1 << 19]) {
            driver.discard(VF).unwrap();
            let mut context = Vec::new();
            while context.len() < size {
                let left = (size - context.len()) as u64;
                assert_eq!(driver.context_size(VF, 0), Ok(left));
                // No room is no progress.
                assert_eq!(driver.read_context(VF, 0), Ok(vec![]));
                assert_eq!(driver.context_size(VF, 0), Ok(left));
                let piece = driver.read_context(VF, step).unwrap();
                assert_eq!(piece.len() as u64, left.min(step as u64));
                context.extend(piece);
            }
            assert!(context == whole, "{step} bytes at a time");
            assert_eq!(driver.context_size(VF, 0), Ok(0));
        }
        driver.set_mode(VF, ACTIVE).unwrap();
    }
}

/// Requirements: S3-26, S3-27, G3-dd, G3-p
#[test]
fn s3_26_sizes_are_what_is_left_and_what_freeze_would_have() {
    let mut rig = used();
    for party in 0..2 {
        for held in mode::ALL {
            let driver = &mut rig.both()[party];
            driver.set_mode(VF, held).unwrap();
            let full = driver.context_size(VF, 0).unwrap();
            assert_eq!(driver.context_size(VF, 1), Ok(full));
            driver.read_context(VF, 100).unwrap();
            let in_freeze = if held == FREEZE { full - 100 } else { full };
            assert_eq!(driver.context_size(VF, 0), Ok(full - 100));
            assert_eq!(driver.context_size(VF, 1), Ok(in_freeze));
            driver.read_all(VF, 4096).unwrap();
            let in_freeze = if held == FREEZE { 0 } else { full };
            assert_eq!(driver.context_size(VF, 0), Ok(0));
            assert_eq!(driver.context_size(VF, 1), Ok(in_freeze));
            for wrong in [2, 3, 0x80, 0xff] {
                assert_eq!(driver.context_size(VF, wrong), Err(BAD_FIELD));
            }
            // A freeze_mode that is missing is 0 (B-8).
            let answer = driver.ask(opcode::CONTEXT_SIZE, VF, &[], 8).unwrap();
            assert_eq!(answer.result(), [0; 8]);
        }
        rig.both()[party].set_mode(VF, ACTIVE).unwrap();
    }
}

/// Requirements: S3-28, G3-l
#[test]
fn s3_28_a_discard_takes_the_reader_back_to_the_beginning() {
    let mut rig = used();
    for driver in rig.both() {
        for held in mode::ALL {
            driver.set_mode(VF, held).unwrap();
            let whole = driver.read_all(VF, 4096).unwrap();
            for part in [0, 1, 5, whole.len() - 1, whole.len(), whole.len() + 9] {
                driver.discard(VF).unwrap();
                driver.read_context(VF, part).unwrap();
                driver.discard(VF).unwrap();
                assert_eq!(driver.context_size(VF, 0), Ok(whole.len() as u64));
                assert_eq!(driver.read_all(VF, 4096), Ok(whole.clone()));
            }
        }
        driver.set_mode(VF, ACTIVE).unwrap();
    }
}

/// Requirements: S3-23, G3-l, G3-m
#[test]
fn g3_m_a_context_is_of_one_moment_and_the_guest_makes_no_new_one() {
    for party in 0..2 {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        let first = rig.both()[party].read_context(VF, 50).unwrap();
        let then = rig.function(1).save();
        vf.request(0, b"changes the rings", 32);
        vf.transport.device_set(Register::<u32>::at(0), u32::MAX);
        assert_ne!(rig.function(1).save(), then);
        let rest = rig.both()[party].read_all(VF, 4096).unwrap();
        let shape = rig.function(1).shape();
        assert_eq!([first, rest].concat(), context::encode(&then, &shape));
        vf.request(0, b"more", 32);
        vf.transport.reset().unwrap();
        assert_eq!(rig.both()[party].read_context(VF, 4096), Ok(vec![]));
        // A change of the mode does, and so does a discard; and each is a whole one.
        let now = context::encode(&rig.function(1).save(), &shape);
        for to in [STOP, FREEZE, STOP, ACTIVE] {
            let driver = &mut rig.both()[party];
            driver.set_mode(VF, to).unwrap();
            assert_eq!(driver.read_all(VF, 4096), Ok(now.clone()), "mode {to}");
        }
        let driver = &mut rig.both()[party];
        driver.discard(VF).unwrap();
        assert_eq!(driver.read_all(VF, 4096), Ok(now));
    }
}

/// Requirements: S3-14, S3-22
#[test]
fn s3_14_in_freeze_every_read_is_the_same_whatever_the_guest_does() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.guest.set_mode(VF, FREEZE).unwrap();
    let first = rig.guest.read_all(VF, 4096).unwrap();
    for round in 0..4u8 {
        vf.submit(0, b"a kick", 8);
        vf.transport.set(common::DEVICE_STATUS, 0);
        vf.transport.device_set(Register::<u8>::at(0), round);
        rig.controls(1).change_config(vec![round; 16]);
        rig.settle();
        rig.guest.discard(VF).unwrap();
        assert_eq!(rig.guest.read_all(VF, 77).unwrap(), first);
        assert_eq!(rig.monitor.read_all(VF, 4096).unwrap(), first);
        rig.monitor.discard(VF).unwrap();
    }
}

/// Requirements: G3-b, G3-c, G3-d, G3-e, G3-f, G3-i, G3-j
#[test]
fn g3_j_the_fields_are_what_the_driver_sees_in_this_order() {
    let mut rig = used();
    let vf = rig.group.vf(1);
    let t = driver::virtio::Transport::new(vf).unwrap();
    t.set(common::DEVICE_FEATURE_SELECT, 1);
    t.set(common::DRIVER_FEATURE_SELECT, 1);
    t.select(1);
    let context = rig.guest.read_all(VF, 4096).unwrap();
    let fields = context::parse(&context).unwrap();
    let types: Vec<_> = fields.iter().map(|field| field.id().kind.raw()).collect();
    assert_eq!(types, [1, 5, 0, 2, 3, 2, 3, 0x1000]);
    let common = |len: usize| {
        let region = t.common_region();
        let byte = |at| t.function().get(region, Register::<u8>::at(at));
        (0..len as u64).map(byte).collect::<Vec<_>>()
    };
    let raw = |wanted: u16| {
        let mut rest = &context[4..];
        loop {
            let kind = u16::from_le_bytes([rest[0], rest[1]]);
            let len = rest[8] as usize;
            if kind == wanted {
                return rest[16..16 + len].to_vec();
            }
            rest = &rest[16 + len..];
        }
    };
    // The snapshot is what the driver reads, selectors and windows and all.
    assert_eq!(raw(0), common(64));
    // Offered and accepted features, arrays of 64-bit words.
    assert_eq!(raw(1), u128::from(t.offered()).to_le_bytes());
    assert_eq!(raw(5), u128::from(t.accepted()).to_le_bytes());
    // A queue: 30 packed bytes.
    t.select(0);
    let registers = common(56);
    let queue = [
        &[0, 0],
        &registers[24..28],
        &registers[32..40],
        &registers[40..48],
        &registers[48..56],
    ]
    .concat();
    assert_eq!(raw(2), queue);
    assert_eq!(raw(3), [0, 0, 5, 0, 1], "five chains were fetched");
    assert_eq!(raw(0x1000), (0..16).collect::<Vec<u8>>());
}

/// Requirements: G3-cc
#[test]
fn g3_cc_neither_pci_configuration_nor_vectors_are_in_the_context() {
    let mut rig = used();
    let vf = rig.group.vf(1);
    let t = driver::virtio::Transport::new(vf).unwrap();
    let before = rig.guest.read_all(VF, 4096).unwrap();
    let msix = t.msix().unwrap();
    let entry = VectorEntry {
        address: 0xfee0_1000,
        data: 0x99,
        masked: true,
    };
    msix.set_entry(t.function(), 0, entry);
    msix.set_control(t.function(), false, true);
    t.function().set_config::<u16>(header::COMMAND, 0);
    rig.guest.discard(VF).unwrap();
    assert_eq!(rig.guest.read_all(VF, 4096), Ok(before));
}

/// Requirements: S3-35, S3-36, G3-h, G3-i
#[test]
fn s3_35_the_fields_are_listed_with_their_lengths() {
    let mut rig = used();
    // 16 is the larger of the two queues.
    let expected = [
        (1, 16),
        (5, 16),
        (0, 64),
        (2, 30),
        (3, 5),
        (4, 4 + 2 * 16),
        (0x1000, 16),
    ];
    let function = rig.function(1).clone();
    let most = context::max_len(&function.shape());
    for driver in rig.both() {
        let mut listed = driver.context_fields(VF).unwrap();
        let mut wanted = expected;
        listed.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(listed, wanted);
        // Every field of a context is of a type and a length in the list.
        let context = driver.read_all(VF, 4096).unwrap();
        assert!(context.len() <= most);
        for field in context::parse(&context).unwrap() {
            let kind = field.id().kind;
            assert!(listed.iter().any(|(raw, _)| *raw == kind.raw()), "{kind:?}");
        }
        // A list that does not fit is cut, as every answer.
        let cut = driver.ask(opcode::CONTEXT_FIELDS, VF, &[], 24).unwrap();
        assert_eq!(cut.bytes.len(), 32);
    }
}

/// Requirements: S3-22
#[test]
fn s3_22_members_that_do_not_exist_have_no_context() {
    let mut rig = Rig::new(2);
    for driver in rig.both() {
        for member in [0, 3, 0x1_0000_0001, u64::MAX] {
            for opcode in opcode::ALL {
                let refused = driver.ask(opcode, member, &[], 64).map(drop);
                assert_eq!(refused, Err(CommandError::Refused(22, 5)), "{opcode:#x}");
            }
        }
    }
}

/// Requirements: S3-24, S3-26, G3-p
#[test]
fn s3_24_answers_are_cut_to_their_buffers_and_nothing_is_lost_of_the_context() {
    let mut rig = used();
    for driver in rig.both() {
        let whole = driver.read_all(VF, 4096).unwrap();
        driver.discard(VF).unwrap();
        // Room for no more than the status: the command is done, and the cursor stays.
        for room in 0..=8 {
            let request = driver::virtio::migration::request(opcode::CONTEXT_READ, VF, &[]);
            let answer = driver.send(&request, room).unwrap();
            assert_eq!(answer.bytes, vec![0; room], "{room}");
        }
        assert_eq!(driver.context_size(VF, 0), Ok(whole.len() as u64));
        // A size that is cut is that of the fitting bytes.
        let request = driver::virtio::migration::request(opcode::CONTEXT_SIZE, VF, &[0]);
        let answer = driver.send(&request, 10).unwrap();
        assert_eq!(answer.result(), &(whole.len() as u64).to_le_bytes()[..2]);
        driver.discard(VF).unwrap();
    }
}
