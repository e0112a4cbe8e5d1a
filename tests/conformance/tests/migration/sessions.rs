//! Two drivers of one owner at the same time: what the monitor does to a VF, the guest's driver does not notice, and the
//! other way round.

use std::time::Duration;

use devices::admin::{Drain, Options};
use driver::pci::request_flr;
use driver::virtio::migration::{Migrate, Range, mode, opcode};
use driver::virtio::{NO_VECTOR, common};

use crate::rig::{AGAIN, BAD_STATE, Guest, PATIENCE, Rig, VF};
use mode::{ACTIVE, FREEZE, STOP};

/// What the monitor does when it moves a VF: all of it.
fn monitor_moves(rig: &mut Rig) {
    let monitor = &mut rig.monitor;
    monitor.set_mode(VF, FREEZE).unwrap();
    let context = monitor.read_all(VF, 100).unwrap();
    for piece in context.chunks(30) {
        monitor.write_context(VF, piece).unwrap();
    }
    monitor.set_mode(VF, STOP).unwrap();
    assert_eq!(monitor.mode(VF), Ok(STOP));
    monitor.set_mode(VF, ACTIVE).unwrap();
}

/// Requirements: S3-3, S3-23, S3-25, S3-26, G3-l, G3-m
#[test]
fn g3_m_the_monitor_moves_a_vf_whose_context_the_guest_has_half_read() {
    for held in mode::ALL {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        vf.request(0, b"work", 8);
        rig.guest.set_mode(VF, held).unwrap();
        let whole = rig.guest.read_all(VF, 4096).unwrap();
        rig.guest.discard(VF).unwrap();
        let first = rig.guest.read_context(VF, 60).unwrap();
        monitor_moves(&mut rig);
        assert_eq!(rig.guest.mode(VF), Ok(held));
        let left = (whole.len() - 60) as u64;
        assert_eq!(rig.guest.context_size(VF, 0), Ok(left));
        let rest = rig.guest.read_all(VF, 4096).unwrap();
        assert_eq!([first, rest].concat(), whole);
        monitor_moves(&mut rig);
        assert_eq!(
            rig.guest.context_size(VF, 0),
            Ok(0),
            "no new context by that"
        );
        rig.guest.set_mode(VF, ACTIVE).unwrap();
        assert_eq!(vf.request(0, b"more", 8), b"more");
    }
}

/// Requirements: S3-10, S3-34, S3-7
#[test]
fn s3_34_the_monitor_moves_a_vf_whose_context_the_guest_has_half_written() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.guest.set_mode(VF, FREEZE).unwrap();
    let whole = rig.guest.read_all(VF, 4096).unwrap();
    rig.guest.write_context(VF, &whole[..77]).unwrap();
    monitor_moves(&mut rig);
    assert_eq!(rig.guest.set_mode(VF, ACTIVE), Err(BAD_STATE));
    rig.guest.write_context(VF, &whole[77..]).unwrap();
    rig.guest.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(vf.request(0, b"goes on", 8), b"goes on");
}

/// Requirements: S3-8, S3-10, S3-15
#[test]
fn s3_15_while_the_monitor_freezes_it_the_guest_can_still_change_the_vfs_mode() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.monitor.set_mode(VF, FREEZE).unwrap();
    for to in [STOP, ACTIVE, FREEZE, STOP, ACTIVE] {
        rig.guest.set_mode(VF, to).unwrap();
        assert_eq!(rig.guest.mode(VF), Ok(to));
        vf.submit(0, b"waits", 8);
        vf.transport.set(common::CONFIG_MSIX_VECTOR, NO_VECTOR);
        assert_eq!(vf.complete(0), None, "mode {to}");
    }
    assert_eq!(vf.transport.get(common::CONFIG_MSIX_VECTOR), 0, "frozen");
    assert_eq!(rig.monitor.mode(VF), Ok(FREEZE));
    rig.monitor.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(vf.collect(0, 5).len(), 5);
}

/// Requirements: S3-2, B-4, G3-x
#[test]
fn s3_2_a_reset_of_the_owner_ends_the_guests_session_and_not_the_monitors() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    let all = Range {
        address: 0,
        pages: 4096,
    };
    rig.monitor.set_mode(VF, FREEZE).unwrap();
    rig.monitor.start_records(VF, 4096, &[all]).unwrap();
    let first = rig.monitor.read_context(VF, 50).unwrap();
    rig.guest.set_mode(VF, STOP).unwrap();
    rig.guest.read_context(VF, 50).unwrap();
    rig.guest.transport.reset().unwrap();
    rig.guest = Guest::start(&rig.group);
    // The monitor goes on where it was.
    let rest = rig.monitor.read_all(VF, 4096).unwrap();
    assert_eq!(rig.monitor.mode(VF), Ok(FREEZE));
    rig.monitor
        .write_context(VF, &[first, rest].concat())
        .unwrap();
    rig.monitor.set_mode(VF, ACTIVE).unwrap();
    // The mode the guest set stays with the VF; what it had read does not.
    assert_eq!(rig.guest.mode(VF), Ok(STOP));
    rig.guest.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(vf.request(0, b"runs", 8), b"runs");
    let pages = rig.monitor.read_records(VF, 0, 16 << 20, 4096).unwrap();
    assert!(!pages.is_empty());
}

/// Requirements: S3-6, S3-9
#[test]
fn s3_9_both_drivers_wait_for_one_vf_and_each_gets_its_answer() {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"in flight", 16);
    rig.settle();
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[STOP]);
    rig.settle();
    rig.monitor.0.set_patience(Duration::from_millis(50));
    assert_eq!(rig.monitor.set_mode(VF, FREEZE), Err(AGAIN));
    assert_eq!(rig.monitor.mode(VF), Ok(ACTIVE));
    rig.settle();
    assert_eq!(
        rig.guest.answered(&posted),
        None,
        "that was not the guest's"
    );
    rig.monitor.0.set_patience(PATIENCE);
    let (monitor, group, guest) = (&mut rig.monitor, &rig.group, &mut rig.guest);
    std::thread::scope(|scope| {
        let freeze = scope.spawn(move || monitor.set_mode(VF, FREEZE));
        std::thread::sleep(Duration::from_millis(20));
        group.machine.settle();
        assert!(!freeze.is_finished());
        group.controls[1].release(1);
        while !freeze.is_finished() {
            group.machine.settle();
        }
        assert_eq!(freeze.join().unwrap(), Ok(()));
        group.machine.settle();
        assert_eq!(guest.answered(&posted), Some((0, 0)));
    });
    assert_eq!(vf.complete(0), Some(9));
    assert_eq!(
        [rig.guest.mode(VF), rig.monitor.mode(VF)],
        [Ok(STOP), Ok(FREEZE)]
    );
}

/// Requirements: S3-19, S3-6
#[test]
fn s3_19_the_monitor_waits_for_a_reset_and_gives_up_when_it_takes_too_long() {
    let options = Options {
        drain: Drain(Duration::from_millis(10)),
        ..Options::default()
    };
    let mut rig = Rig::with(1, options);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"never seen", 16);
    rig.settle();
    assert!(request_flr(vf.transport.function()));
    rig.monitor.0.set_patience(Duration::from_millis(50));
    let monitor = &mut rig.monitor;
    assert_eq!(monitor.set_mode(VF, STOP), Err(AGAIN));
    assert_eq!(monitor.read_context(VF, 8), Err(AGAIN));
    assert_eq!(monitor.write_context(VF, &[]), Err(AGAIN));
    assert_eq!(
        monitor.mode(VF),
        Ok(ACTIVE),
        "what does not wait is answered"
    );
    rig.controls(1).release(1);
    rig.settle();
    assert_eq!(rig.monitor.set_mode(VF, STOP), Ok(()));
    assert!(!rig.monitor.read_context(VF, 8).unwrap().is_empty());
}

/// Requirements: S3-2, S3-7
#[test]
fn s3_2_nothing_half_done_outlives_the_vf() {
    let mut rig = Rig::new(1);
    for driver in rig.both() {
        driver.set_mode(VF, FREEZE).unwrap();
        let context = driver.read_all(VF, 4096).unwrap();
        driver.write_context(VF, &context[..9]).unwrap();
        driver.discard(VF).unwrap();
        driver.write_context(VF, &context).unwrap();
        driver.read_context(VF, 9).unwrap();
        assert_eq!(driver.set_mode(VF, STOP), Err(BAD_STATE));
    }
    rig.group.disable();
    rig.group.enable(1);
    for driver in rig.both() {
        assert_eq!(driver.set_mode(VF, STOP), Ok(()));
        assert_eq!(driver.set_mode(VF, FREEZE), Ok(()));
        assert_eq!(driver.write_context(VF, &[]), Ok(()));
        assert_eq!(driver.set_mode(VF, ACTIVE), Ok(()));
    }
    let mut vf = rig.drive(1);
    assert_eq!(vf.request(0, b"fresh", 8), b"fresh");
}

/// Requirements: B-8, S3-3, S3-26, S3-35, S3-38
#[test]
fn b8_answers_are_cut_to_any_buffer_and_missing_data_is_zero() {
    let mut rig = Rig::new(1);
    for driver in rig.both() {
        driver.set_mode(VF, STOP).unwrap();
        for (opcode, data, len) in [
            (opcode::MODE_GET, vec![], 16),
            (opcode::CONTEXT_SIZE, vec![], 16),
            (opcode::CONTEXT_FIELDS, vec![], 8 + 7 * 16),
            (opcode::RECORD_CAPS, vec![], 16),
            // Mode 0.
            (opcode::MODE_SET, vec![], 8),
            (opcode::CONTEXT_DISCARD, vec![1, 2, 3], 8),
            (opcode::RECORD_STOP, vec![1, 2, 3], 8),
        ] {
            let request = driver::virtio::migration::request(opcode, VF, &data);
            let whole = driver.send(&request, 4096).unwrap().bytes;
            assert_eq!(whole.len(), len, "{opcode:#x}");
            assert_eq!(whole[..4], [0; 4], "{opcode:#x}");
            for room in [0, 1, 3, 4, 7, 8, 9, 15] {
                let cut = driver.send(&request, room).unwrap().bytes;
                assert_eq!(cut, whole[..room.min(len)], "{opcode:#x} {room}");
            }
        }
        assert_eq!(driver.mode(VF), Ok(ACTIVE));
        // READ of address 0, length 0; START of no ranges.
        for opcode in [opcode::RECORD_START, opcode::RECORD_READ] {
            let request = driver::virtio::migration::request(opcode, VF, &[]);
            let refused = driver.send(&request, 64).unwrap();
            assert_eq!(refused.outcome().0, 22);
            assert_eq!(refused.bytes.len(), 8);
            assert_eq!(refused.output(), 0);
        }
    }
}
