//! A context that an owner's driver writes: what is taken, what is refused, and when it becomes the VF's.

use devices::context::{self, Field, QueueStatus, SplitRuntime};
use devices::context::{OwnedChains, PackedRuntime};
use driver::pci::request_flr;
use driver::virtio::migration::{CommandError, Migrate, mode, opcode};
use driver::virtio::status;

use crate::rig::{BAD_FIELD, BAD_STATE, Rig, VF};
use mode::{ACTIVE, FREEZE, STOP};

/// A group whose first VF is live and in Freeze for both drivers, and its context.
fn frozen() -> (Rig, Vec<u8>) {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    for _ in 0..5 {
        vf.request(0, b"some work", 16);
    }
    for driver in rig.both() {
        driver.set_mode(VF, FREEZE).unwrap();
    }
    let context = rig.guest.read_all(VF, 4096).unwrap();
    rig.guest.discard(VF).unwrap();
    (rig, context)
}

/// The same context with its configuration vector set to `vector`, to tell contexts apart.
fn marked(context: &[u8], vector: u16) -> Vec<u8> {
    changed(context, |fields| {
        for field in fields {
            if let Field::CommonConfig(common) = field {
                common.config_vector = vector.into();
            }
        }
    })
}

fn changed(context: &[u8], change: impl FnOnce(&mut Vec<Field>)) -> Vec<u8> {
    let mut fields = context::parse(context).unwrap();
    change(&mut fields);
    context::assemble(&fields)
}

/// Writes `context` in pieces until one is refused.
fn write(
    driver: &mut (impl Migrate + ?Sized),
    context: &[u8],
    step: usize,
) -> Result<(), CommandError> {
    context
        .chunks(step)
        .try_for_each(|piece| driver.write_context(VF, piece))
}

/// Requirements: S3-29, G3-p
#[test]
fn s3_29_only_in_freeze_a_context_is_taken() {
    let (mut rig, context) = frozen();
    let before = rig.function(1).save();
    for party in 0..2 {
        for held in [STOP, ACTIVE] {
            let driver = &mut rig.both()[party];
            driver.set_mode(VF, held).unwrap();
            for piece in [&context[..], &context[..7], &[]] {
                assert_eq!(driver.write_context(VF, piece), Err(BAD_STATE));
            }
            // Nothing of it is there.
            driver.set_mode(VF, FREEZE).unwrap();
            driver.set_mode(VF, held).unwrap();
            assert_eq!(rig.function(1).save(), before);
        }
    }
}

/// Requirements: S3-32, S3-34, G3-l, G3-s
#[test]
fn s3_34_pieces_of_every_size_make_a_context_that_counts_when_freeze_is_left() {
    let (mut rig, context) = frozen();
    for party in 0..2 {
        let mut vector = 1;
        for step in 1..=context.len() {
            let written = marked(&context, vector);
            let before = rig.function(1).save();
            let driver = &mut rig.both()[party];
            driver.write_context(VF, &[]).unwrap();
            assert_eq!(write(driver, &written, step), Ok(()), "{step}");
            // A completed write makes a new context, and what was written is what there is to read.
            assert_eq!(driver.context_size(VF, 0), Ok(written.len() as u64));
            assert_eq!(driver.read_all(VF, 4096), Ok(written));
            assert_eq!(rig.function(1).save(), before, "not yet the VF's");
            let to = if step % 2 == 0 { STOP } else { ACTIVE };
            let driver = &mut rig.both()[party];
            driver.set_mode(VF, to).unwrap();
            driver.set_mode(VF, FREEZE).unwrap();
            assert_eq!(rig.function(1).save().registers.config_vector, vector);
            vector = 3 - vector;
        }
    }
}

/// Requirements: S3-30, S3-32, S3-34
#[test]
fn s3_30_of_several_contexts_the_last_complete_one_counts() {
    let (mut rig, context) = frozen();
    let [a, b, c] = [0, 1, 2].map(|vector| marked(&context, vector));
    for driver in 0..2 {
        for to in [STOP, ACTIVE] {
            // One after the other, and several in one piece.
            for (pieces, vector) in [
                (vec![a.clone(), b.clone(), c.clone()], 2),
                (vec![c.clone(), [&a[..], &b[..]].concat()], 1),
                (vec![[&b[..], &c[..], &a[..9]].concat(), a[9..].to_vec()], 0),
            ] {
                let driver = &mut rig.both()[driver];
                for piece in pieces {
                    driver.write_context(VF, &piece).unwrap();
                }
                driver.set_mode(VF, to).unwrap();
                driver.set_mode(VF, FREEZE).unwrap();
                assert_eq!(rig.function(1).save().registers.config_vector, vector);
            }
        }
    }
}

/// Requirements: S3-31, G3-l
#[test]
fn s3_31_a_discard_undoes_all_that_was_written() {
    let (mut rig, context) = frozen();
    let before = rig.function(1).save();
    let other = marked(&context, 2);
    for party in 0..2 {
        for part in [1, 4, 30, other.len() - 1, other.len(), other.len() + 5] {
            let twice = [&other[..], &other[..]].concat();
            let driver = &mut rig.both()[party];
            driver.write_context(VF, &twice[..part]).unwrap();
            driver.discard(VF).unwrap();
            assert_eq!(driver.read_all(VF, 4096).unwrap(), context);
            driver.set_mode(VF, STOP).unwrap();
            driver.set_mode(VF, FREEZE).unwrap();
            assert_eq!(rig.function(1).save(), before, "{part}");
        }
    }
}

/// A change that no context of this device survives, and its name.
type Change = (&'static str, fn(&mut Vec<Field>));

/// The common configuration among `fields`.
fn common(fields: &mut [Field], change: impl FnOnce(&mut context::CommonConfig)) {
    let found = fields.iter_mut().find_map(|field| match field {
        Field::CommonConfig(common) => Some(common),
        _ => None,
    });
    change(found.unwrap());
}

/// The configuration of the first queue among `fields`.
fn queue(fields: &mut [Field], change: impl FnOnce(&mut context::QueueConfig)) {
    let found = fields.iter_mut().find_map(|field| match field {
        Field::QueueConfig(queue) => Some(queue),
        _ => None,
    });
    change(found.unwrap());
}

/// Where the first queue stands, among `fields`.
fn runtime(fields: &mut [Field], change: impl FnOnce(&mut SplitRuntime)) {
    let found = fields.iter_mut().find_map(|field| match field {
        Field::SplitRuntime(runtime) => Some(runtime),
        _ => None,
    });
    change(found.unwrap());
}

fn features(fields: &mut [Field], change: impl FnOnce(&mut u128)) {
    let found = fields.iter_mut().find_map(|field| match field {
        Field::DriverFeatures(features) => Some(features),
        _ => None,
    });
    change(found.unwrap());
}

fn own(fields: &mut Vec<Field>, heads: Vec<u16>) {
    fields.push(Field::OwnedChains(OwnedChains { queue: 0, heads }));
}

const IMPOSSIBLE: [Change; 37] = [
    ("a feature nobody has", |f| {
        features(f, |features| *features |= 1 << 50)
    }),
    ("a feature beyond 63", |f| {
        features(f, |features| *features |= 1 << 100)
    }),
    ("another device's feature", |f| {
        features(f, |features| *features |= 1 << 42)
    }),
    ("FEATURES_OK without VERSION_1", |f| {
        features(f, |features| *features &= !(1 << 32));
    }),
    ("DRIVER_OK without FEATURES_OK", |f| {
        common(f, |c| c.status = 0x07);
    }),
    ("SUSPEND, which is not offered", |f| {
        common(f, |c| c.status |= status::SUSPEND)
    }),
    ("DEVICE_STOPPED, which is not offered", |f| {
        common(f, |c| c.status |= status::DEVICE_STOPPED);
    }),
    ("a vector for the configuration", |f| {
        common(f, |c| c.config_vector = 3.into())
    }),
    ("one queue more", |f| {
        common(f, |c| c.num_queues = 3.into());
    }),
    ("no queue", |f| common(f, |c| c.num_queues = 0.into())),
    ("a vector for a queue", |f| {
        queue(f, |q| q.vector = 3.into());
    }),
    ("size 0", |f| queue(f, |q| q.size = 0.into())),
    ("size 3", |f| queue(f, |q| q.size = 3.into())),
    ("size above the maximum", |f| {
        queue(f, |q| q.size = 32.into());
    }),
    ("descriptors outside memory", |f| {
        queue(f, |q| q.descriptor_area = (1 << 40).into());
    }),
    ("descriptors at the very end", |f| {
        queue(f, |q| {
            q.descriptor_area = (driver::host::RAM as u64 - 16).into()
        });
    }),
    ("descriptors that wrap around", |f| {
        queue(f, |q| q.descriptor_area = (u64::MAX - 15).into());
    }),
    ("descriptors not aligned", |f| {
        queue(f, |q| {
            q.descriptor_area = (q.descriptor_area.get() + 8).into()
        });
    }),
    ("descriptors nowhere", |f| {
        queue(f, |q| q.descriptor_area = 0.into());
    }),
    ("available ring outside memory", |f| {
        queue(f, |q| q.driver_area = (1 << 40).into());
    }),
    ("available ring not aligned", |f| {
        queue(f, |q| q.driver_area = (q.driver_area.get() + 1).into());
    }),
    ("used ring outside memory", |f| {
        queue(f, |q| q.device_area = (1 << 40).into());
    }),
    ("used ring not aligned", |f| {
        queue(f, |q| q.device_area = (q.device_area.get() + 2).into());
    }),
    ("enabled twice over", |f| runtime(f, |r| r.enabled = 2)),
    ("an index without being enabled", |f| {
        runtime(f, |r| r.enabled = 0);
    }),
    ("owned without being enabled", |f| {
        runtime(f, |r| (r.enabled, r.next_available) = (0, 0.into()));
        own(f, vec![1]);
    }),
    ("owned beyond the queue", |f| own(f, vec![1, 16])),
    ("owned twice", |f| own(f, vec![1, 2, 1])),
    ("owned more than there are", |f| {
        own(f, (0..17).map(|head| head % 16).collect());
    }),
    ("a field twice", |f| f.push(f[3].clone())),
    ("a queue twice", |f| f[5] = f[3].clone()),
    ("a queue that does not exist", |f| {
        queue(f, |q| q.queue = 2.into());
    }),
    ("a queue that is missing", |f| drop(f.remove(3))),
    ("no features", |f| drop(f.remove(0))),
    ("no device configuration", |f| drop(f.pop())),
    ("queue status, which is not offered", |f| {
        f.push(Field::QueueStatus(QueueStatus {
            queue: 0.into(),
            running: 1,
            flags: 0,
            next_used: 0.into(),
            reserved: 0.into(),
        }));
    }),
    ("packed rings, which are not offered", |f| {
        f[4] = Field::PackedRuntime(PackedRuntime {
            queue: 0.into(),
            next_available: 0.into(),
            next_used: 0.into(),
            enabled: 1,
            reserved: 0,
        });
    }),
];

/// Whatever is wrong with a context and however it is cut: its writer hears of it, and the VF is exactly as before.
///
/// Requirements: S3-33, S3-46, G3-d, G3-f, G3-g, G3-h, G3-i, G3-p, G3-q
#[test]
fn g3_p_a_context_that_cannot_be_is_refused_and_leaves_no_trace() {
    let (mut rig, context) = frozen();
    let before = rig.function(1).save();
    let good = marked(&context, 2);
    for party in 0..2 {
        for (name, change) in IMPOSSIBLE {
            let bad = changed(&context, change);
            for step in [1, 13, bad.len()] {
                let driver = &mut rig.both()[party];
                assert_eq!(write(driver, &bad, step), Err(BAD_FIELD), "{name}, {step}");
                assert_eq!(rig.function(1).save(), before, "{name}");
                let driver = &mut rig.both()[party];
                assert_eq!(driver.mode(VF), Ok(FREEZE));
                driver.discard(VF).unwrap();
                driver.set_mode(VF, STOP).unwrap();
                driver.set_mode(VF, FREEZE).unwrap();
                assert_eq!(rig.function(1).save(), before, "{name}");
            }
            // Behind a good one, in the same piece, it takes the good one with it; in its own, it does not.
            let driver = &mut rig.both()[party];
            let both = [&good[..], &bad[..]].concat();
            assert_eq!(driver.write_context(VF, &both), Err(BAD_FIELD), "{name}");
            assert_eq!(driver.read_all(VF, 4096).unwrap(), context);
            driver.write_context(VF, &good).unwrap();
            assert_eq!(driver.write_context(VF, &bad), Err(BAD_FIELD), "{name}");
            assert_eq!(driver.read_all(VF, 4096).unwrap(), good);
            driver.discard(VF).unwrap();
        }
    }
}

/// Offsets in `context` of the headers of its fields.
fn headers(context: &[u8]) -> Vec<usize> {
    let mut at = 4;
    let mut found = Vec::new();
    while at < context.len() {
        found.push(at);
        at += 16 + usize::from(context[at + 8]);
    }
    found
}

/// Requirements: S3-33, S3-36, G3-e, G3-q
#[test]
fn s3_33_every_field_has_the_devices_length_and_a_type_it_knows() {
    let (mut rig, context) = frozen();
    let before = rig.function(1).save();
    for party in 0..2 {
        for at in headers(&context) {
            let len = u64::from(context[at + 8]);
            // Also a value that is as long as its header says.
            for other in [0, len - 1, len + 1, len + 8, 1 << 40, u64::MAX] {
                let mut bad = context.clone();
                bad[at + 8..at + 16].copy_from_slice(&other.to_le_bytes());
                if other == len + 8 {
                    let end = at + 16 + len as usize;
                    bad.splice(end..end, [0; 8]);
                }
                for step in [1, bad.len()] {
                    let driver = &mut rig.both()[party];
                    assert_eq!(write(driver, &bad, step), Err(BAD_FIELD), "{at} {other}");
                    driver.discard(VF).unwrap();
                }
            }
            for unknown in [0x09u16, 0xfff, 0x1001, 0x1fff, 0x2000, 0x3000, 0xffff] {
                let mut bad = context.clone();
                bad[at..at + 2].copy_from_slice(&unknown.to_le_bytes());
                let driver = &mut rig.both()[party];
                assert_eq!(driver.write_context(VF, &bad), Err(BAD_FIELD));
                driver.discard(VF).unwrap();
            }
        }
        let driver = &mut rig.both()[party];
        for count in [0u32, 1, 6, 0x100, u32::MAX] {
            let mut bad = context.clone();
            bad[..4].copy_from_slice(&count.to_le_bytes());
            assert_eq!(driver.write_context(VF, &bad), Err(BAD_FIELD), "{count}");
        }
        driver.set_mode(VF, ACTIVE).unwrap();
        assert_eq!(rig.function(1).save(), before);
        rig.both()[party].set_mode(VF, FREEZE).unwrap();
    }
}

/// Requirements: S3-46, S3-34, G3-p
#[test]
fn g3_p_a_refused_piece_counts_as_never_written_and_the_right_one_may_follow() {
    let (mut rig, context) = frozen();
    let good = marked(&context, 2);
    for party in 0..2 {
        for cut in (1..good.len()).step_by(5) {
            let driver = &mut rig.both()[party];
            driver.write_context(VF, &good[..cut]).unwrap();
            // Two contexts' worth of ones: wherever it starts, something is wrong in it.
            let noise = vec![0xff; 2 * good.len()];
            assert_eq!(driver.write_context(VF, &noise), Err(BAD_FIELD), "{cut}");
            driver.write_context(VF, &good[cut..]).unwrap();
            assert_eq!(driver.read_all(VF, 4096).unwrap(), good);
            driver.discard(VF).unwrap();
        }
    }
}

/// Requirements: S3-34, G3-p
#[test]
fn g3_p_a_piece_that_is_longer_than_any_command_is_refused_whole() {
    let (mut rig, context) = frozen();
    let before = rig.function(1).save();
    let most = devices::admin::queue::MAX_DATA;
    let other = marked(&context, 2);
    let many: Vec<u8> = other.iter().copied().cycle().take(most + 1).collect();
    for party in 0..2 {
        let driver = &mut rig.both()[party];
        assert_eq!(driver.write_context(VF, &many), Err(BAD_FIELD));
        assert_eq!(driver.read_all(VF, 4096).unwrap(), context);
        // One byte less is not too long: so many contexts, and a part of one.
        driver.write_context(VF, &many[..most]).unwrap();
        assert_eq!(driver.read_all(VF, 4096).unwrap(), other);
        assert_eq!(driver.set_mode(VF, STOP), Err(BAD_STATE));
        driver.discard(VF).unwrap();
        driver.set_mode(VF, STOP).unwrap();
        assert_eq!(rig.function(1).save(), before);
        rig.both()[party].set_mode(VF, FREEZE).unwrap();
    }
}

/// Requirements: G3-d, G3-j
#[test]
fn g3_j_fields_come_in_any_order_and_accepted_features_default_to_the_offered() {
    let (mut rig, context) = frozen();
    let mut before = rig.function(1).save();
    let reversed = changed(&context, |fields| fields.reverse());
    rig.guest.write_context(VF, &reversed).unwrap();
    rig.guest.set_mode(VF, STOP).unwrap();
    before.registers.config_generation += 1;
    assert_eq!(
        rig.function(1).save(),
        before,
        "and one generation on (G3-f)"
    );
    rig.guest.set_mode(VF, FREEZE).unwrap();
    let without = changed(&context, |fields| drop(fields.remove(1)));
    rig.guest.write_context(VF, &without).unwrap();
    rig.guest.set_mode(VF, STOP).unwrap();
    let after = rig.function(1).save();
    assert_eq!(after.accepted, after.offered);
}

/// Requirements: G3-f
#[test]
fn g3_f_what_is_shown_through_selectors_is_not_taken_from_the_common_configuration() {
    let (mut rig, context) = frozen();
    let mut before = rig.function(1).save();
    let odd = changed(&context, |fields| {
        common(fields, |c| {
            c.device_feature = 0xdead_beef.into();
            c.driver_feature = 0xdead_beef.into();
            c.queue_size = 7.into();
            c.queue_vector = 99.into();
            c.queue_enable = 7.into();
            c.queue_desc = 1.into();
            c.queue_driver = 1.into();
            c.queue_device = 1.into();
            c.queue_reset = 1.into();
            c.admin_queue_index = 9.into();
            c.admin_queue_num = 9.into();
            // These are.
            c.device_feature_select = 5.into();
            c.driver_feature_select = 6.into();
            c.queue_select = 0x7777.into();
        });
    });
    rig.guest.write_context(VF, &odd).unwrap();
    rig.guest.set_mode(VF, STOP).unwrap();
    before.registers.device_feature_select = 5;
    before.registers.driver_feature_select = 6;
    before.registers.queue_select = 0x7777;
    before.registers.config_generation += 1;
    assert_eq!(rig.function(1).save(), before);
}

/// Requirements: G3-z, S3-12, S3-32
#[test]
fn g3_z_an_flr_in_freeze_drops_what_was_written_and_the_mode_stays() {
    for party in 0..2 {
        for written in [1, 20, usize::MAX] {
            let (mut rig, context) = frozen();
            let fresh = rig.function(2).save();
            let written = written.min(context.len());
            let driver = &mut rig.both()[party];
            driver.write_context(VF, &context[..written]).unwrap();
            assert!(request_flr(&rig.group.vf(1)));
            assert_eq!(rig.function(1).save(), fresh);
            for driver in rig.both() {
                assert_eq!(driver.mode(VF), Ok(FREEZE));
                driver.set_mode(VF, ACTIVE).unwrap();
            }
            assert_eq!(rig.function(1).save(), fresh);
            let mut vf = rig.drive(1);
            assert_eq!(vf.request(0, b"fresh", 8), b"fresh");
        }
    }
}

/// Requirements: S3-7, G3-z
#[test]
fn g3_z_an_flr_takes_a_half_read_context_away() {
    let (mut rig, context) = frozen();
    rig.guest.read_context(VF, 40).unwrap();
    assert_eq!(rig.guest.set_mode(VF, STOP), Err(BAD_STATE));
    assert!(request_flr(&rig.group.vf(1)));
    let fresh = rig.guest.read_all(VF, 4096).unwrap();
    assert_ne!(fresh, context);
    assert_eq!(rig.guest.set_mode(VF, STOP), Ok(()));
}

/// Requirements: S3-29, S3-32, G3-p
#[test]
fn s3_32_what_both_drivers_wrote_takes_effect_as_each_leaves_freeze() {
    let (mut rig, context) = frozen();
    rig.guest.write_context(VF, &marked(&context, 1)).unwrap();
    rig.monitor.write_context(VF, &marked(&context, 2)).unwrap();
    // Each reads its own.
    assert_eq!(
        rig.guest.read_all(VF, 4096).unwrap(),
        marked(&context, 1),
        "of the guest"
    );
    assert_eq!(
        rig.monitor.read_all(VF, 4096).unwrap(),
        marked(&context, 2),
        "of the monitor"
    );
    rig.monitor.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(rig.function(1).save().registers.config_vector, 2);
    assert_eq!(rig.guest.mode(VF), Ok(FREEZE));
    rig.guest.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(rig.function(1).save().registers.config_vector, 1);
}

/// Requirements: S3-33, S3-35
#[test]
fn s3_33_commands_for_fields_a_device_lacks_are_refused_by_their_lengths_alone() {
    let (mut rig, _) = frozen();
    let fields = rig.guest.context_fields(VF).unwrap();
    // A header tells enough: no value is waited for, nor memory taken.
    for kind in (0..0x20u16).chain([0x1000, 0x1001, 0x2000]) {
        let listed = fields.iter().find(|(raw, _)| *raw == kind);
        for len in [0u64, 5, 16, 30, 36, 64, 1 << 30] {
            let mut head = 8u32.to_le_bytes().to_vec();
            head.extend_from_slice(&kind.to_le_bytes());
            head.extend_from_slice(&[0; 6]);
            head.extend_from_slice(&len.to_le_bytes());
            let list = |most: u64| kind == 4 && (4..=most).contains(&len) && len % 2 == 0;
            let fits = listed.is_some_and(|(_, has)| *has == len || list(*has));
            let taken = rig.guest.write_context(VF, &head);
            assert_eq!(
                taken,
                if fits { Ok(()) } else { Err(BAD_FIELD) },
                "{kind:#x} {len}"
            );
            rig.guest.discard(VF).unwrap();
        }
    }
    let refused = rig.guest.ask(opcode::CONTEXT_WRITE, 3, &[], 0).map(drop);
    assert_eq!(refused, Err(CommandError::Refused(22, 5)));
}
