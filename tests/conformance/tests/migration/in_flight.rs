//! Commands that meet requests in flight, or a reset: they wait, and what waits can be called off.

use std::time::Duration;

use conformance::{QUIET, SIMPLE};
use devices::admin::{Drain, Options};
use devices::context::{self, Field};
use driver::access::DmaExt;
use driver::host::{Access, VirtualFunction};
use driver::pci::{change_command, command, request_flr};
use driver::virtio::block::block_feature;
use driver::virtio::migration::{Migrate, mode, opcode};
use driver::virtio::{common, status};

use crate::rig::{AGAIN, PATIENCE, Rig, VF, content, patient, read_request, write_request};
use conformance::group::Live;
use mode::{ACTIVE, FREEZE, STOP};

const OK: (u16, u16) = (0, 0);

/// A driver that soon takes back what has not begun.
fn hasty() -> Options {
    Options {
        drain: Drain(Duration::from_millis(20)),
        ..Options::default()
    }
}

/// Writes four sectors, of which storage begins the first and no more.
fn four_writes(rig: &Rig, disk: &driver::host::Storage) -> Live<VirtualFunction> {
    // With a flush command writes are writes, and nothing follows them.
    let mut vf = rig.drive_with(1, SIMPLE | block_feature::FLUSH);
    disk.block();
    for sector in 0..4 {
        vf.submit(0, &write_request(sector, &[0xa0 + sector as u8; 512]), 1);
    }
    rig.settle();
    assert!(disk.wait_for_access(PATIENCE));
    vf
}

/// What storage has done once all four writes are.
fn writes() -> Vec<Access> {
    (0..4).map(|s| Access::Write(s * 512, 512)).collect()
}

/// Heads of the chains the device owns, as the context has them.
fn owned(context: &[u8]) -> Vec<u16> {
    let fields = context::parse(context).unwrap();
    let lists = fields.into_iter().filter_map(|field| match field {
        Field::OwnedChains(chains) => Some(chains.heads),
        _ => None,
    });
    lists.flatten().collect()
}

/// Requirements: S3-9, S3-8, B-7
#[test]
fn s3_9_mode_set_waits_for_requests_in_flight_and_those_behind_it_for_their_turn() {
    for to in [STOP, FREEZE] {
        let mut rig = Rig::new(2);
        let (mut vf, mut sibling) = (rig.drive(1), rig.drive(2));
        rig.controls(1).hold(true);
        vf.submit(0, b"in flight", 16);
        vf.submit(0, b"too", 16);
        rig.settle();
        let commands = [
            rig.guest.post(opcode::MODE_SET, 1, &[to]),
            rig.guest.post(opcode::MODE_GET, 1, &[]),
            rig.guest.post(opcode::MODE_SET, 2, &[STOP]),
        ];
        vf.submit(0, b"not begun", 16);
        for _ in 0..2 {
            rig.settle();
            for posted in &commands {
                assert_eq!(rig.guest.answered(posted), None);
            }
            assert_eq!(sibling.request(0, b"works", 8), b"works");
            rig.controls(1).release(1);
        }
        rig.quiet();
        rig.settle();
        for posted in &commands {
            assert_eq!(rig.guest.answered(posted), Some(OK));
        }
        // What was in flight came back, with its interrupt, and nothing more.
        assert_eq!(vf.collect(0, 2).len(), 2);
        assert_eq!(rig.interrupts(), [1]);
        assert_eq!(rig.controls(1).held(), 0);
        sibling.submit(0, b"stopped", 8);
        assert_eq!((vf.complete(0), sibling.complete(0)), (None, None));
        rig.controls(1).hold(false);
        for number in [1, 2] {
            rig.guest.set_mode(number, ACTIVE).unwrap();
        }
        assert_eq!((vf.complete(0), sibling.complete(0)), (Some(9), Some(7)));
    }
}

/// Requirements: S3-9, S3-6, E13
#[test]
fn s3_6_a_mode_set_that_waits_is_undone_by_a_reset_of_the_owner_or_its_queue() {
    let reset_device: fn(&Rig) = |rig| rig.guest.transport.reset().unwrap();
    let reset_queue: fn(&Rig) = |rig| {
        let index = rig.guest.queue.index();
        rig.guest.transport.reset_queue(index).unwrap();
        rig.guest.transport.reset().unwrap();
    };
    for end in [reset_device, reset_queue] {
        for to in [STOP, FREEZE] {
            let mut rig = Rig::new(2);
            let mut vf = rig.drive(1);
            rig.controls(1).hold(true);
            vf.submit(0, b"in flight", 16);
            rig.settle();
            let commands = [
                rig.guest.post(opcode::MODE_SET, 1, &[to]),
                rig.guest.post(opcode::MODE_SET, 2, &[to]),
            ];
            rig.settle();
            end(&rig);
            let before = rig.memory();
            rig.settle();
            assert!(rig.memory() == before, "no command of before is answered");
            for posted in &commands {
                assert_eq!(rig.guest.answered(posted), None);
            }
            let mut guest = crate::rig::Guest::start(&rig.group);
            assert_eq!([guest.mode(1), guest.mode(2)], [Ok(ACTIVE); 2]);
            vf.submit(1, b"runs", 8);
            rig.controls(1).hold(false);
            rig.controls(1).release(1);
            assert_eq!((vf.complete(0), vf.complete(1)), (Some(9), Some(4)));
        }
    }
}

/// Requirements: S3-6, S3-9, E13
#[test]
fn s3_6_a_mode_set_whose_vf_goes_is_answered_and_the_next_vf_is_active() {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"in flight", 16);
    rig.settle();
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[STOP]);
    let behind = rig.guest.post(opcode::MODE_GET, 2, &[]);
    rig.settle();
    rig.group.disable();
    rig.controls(1).release(1);
    rig.controls(1).hold(false);
    assert_eq!(rig.answer(&posted), (22, 4), "there is no group");
    assert_eq!(rig.answer(&behind), (22, 4));
    rig.group.enable(2);
    assert_eq!(rig.guest.mode(VF), Ok(ACTIVE));
    let mut vf = rig.drive(1);
    assert_eq!(vf.request(0, b"anew", 8), b"anew");
}

/// Requirements: S3-6, S3-9, S3-2
#[test]
fn s3_2_a_vf_that_comes_back_while_mode_set_waits_for_it_is_stopped_or_active_for_all() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"in flight", 16);
    rig.settle();
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[STOP]);
    rig.settle();
    rig.group.disable();
    rig.group.enable(1);
    rig.settle();
    assert_eq!(rig.guest.answered(&posted), None, "it is being reset");
    rig.controls(1).release(1);
    rig.controls(1).hold(false);
    // The command is about VF 1, whoever that is: when it succeeds, VF 1 is in that mode.
    assert_eq!(rig.answer(&posted), OK);
    assert_eq!(rig.guest.mode(VF), Ok(STOP));
    let mut vf = rig.drive(1);
    vf.submit(0, b"stopped", 8);
    assert_eq!(vf.complete(0), None);
    rig.guest.set_mode(VF, ACTIVE).unwrap();
    assert_eq!(vf.complete(0), Some(7));
}

/// Requirements: S3-19, S3-20
#[test]
fn s3_19_mode_and_context_commands_wait_for_resets() {
    let flr: fn(&Live<VirtualFunction>) = |vf| assert!(request_flr(vf.transport.function()));
    let virtio: fn(&Live<VirtualFunction>) = |vf| vf.transport.set(common::DEVICE_STATUS, 0);
    for reset in [flr, virtio] {
        let commands = [
            (opcode::MODE_SET, vec![STOP], OK),
            (opcode::MODE_SET, vec![FREEZE], OK),
            (opcode::MODE_SET, vec![ACTIVE], OK),
            (opcode::CONTEXT_READ, vec![], OK),
            // Not in Freeze.
            (opcode::CONTEXT_WRITE, vec![1], (22, 1)),
        ];
        for (opcode, data, outcome) in commands {
            let mut rig = Rig::new(2);
            let (mut vf, mut sibling) = (rig.drive(1), rig.drive(2));
            rig.controls(1).hold(true);
            vf.submit(0, b"never seen", 16);
            rig.settle();
            reset(&vf);
            let posted = rig.guest.post(opcode, VF, &data);
            rig.settle();
            assert_eq!(rig.guest.answered(&posted), None, "{opcode:#x}");
            assert_eq!(sibling.request(0, b"works", 8), b"works");
            assert_ne!(rig.function(1).save().registers.status, 0);
            rig.controls(1).release(1);
            rig.controls(1).hold(false);
            rig.settle();
            assert_eq!(rig.guest.answered(&posted), Some(outcome), "{opcode:#x}");
            assert_eq!(rig.function(1).save().registers.status, 0);
            assert_eq!(vf.complete(0), None, "unseen");
        }
    }
}

/// Requirements: S3-19, S3-20
#[test]
fn s3_19_a_context_that_is_read_after_a_reset_is_that_of_a_fresh_vf() {
    let mut rig = Rig::new(1);
    let fresh = rig.guest.read_all(VF, 4096).unwrap();
    rig.guest.discard(VF).unwrap();
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"never seen", 16);
    rig.settle();
    assert!(request_flr(vf.transport.function()));
    let bytes = driver::virtio::migration::request(opcode::CONTEXT_READ, VF, &[]);
    let posted = rig
        .guest
        .queue
        .post(&rig.guest.transport, &bytes, 8 + 4096)
        .unwrap();
    rig.controls(1).release(1);
    rig.settle();
    let answer = rig.guest.queue.poll(&posted).unwrap().unwrap();
    assert_eq!(answer.outcome(), OK);
    assert_eq!(answer.result()[..answer.output() as usize], fresh);
}

/// Requirements: S3-19, G3-z
#[test]
fn s3_19_an_flr_while_mode_set_waits_ends_the_wait_and_the_mode_holds() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"never seen", 16);
    rig.settle();
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[FREEZE]);
    rig.settle();
    assert!(request_flr(vf.transport.function()));
    rig.settle();
    assert_eq!(rig.guest.answered(&posted), None);
    rig.controls(1).release(1);
    rig.settle();
    assert_eq!(rig.guest.answered(&posted), Some(OK));
    assert_eq!(rig.guest.mode(VF), Ok(FREEZE));
    assert_eq!(vf.complete(0), None);
}

/// Requirements: S3-20, G3-aa
#[test]
fn s3_20_a_virtio_reset_while_mode_set_waits_is_done_for_stop_and_ignored_for_freeze() {
    for (to, resets) in [(STOP, true), (FREEZE, false)] {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        rig.controls(1).hold(true);
        vf.submit(0, b"in flight", 16);
        rig.settle();
        let posted = rig.guest.post(opcode::MODE_SET, VF, &[to]);
        rig.settle();
        let before = vf.transport.status();
        vf.transport.set(common::DEVICE_STATUS, 0);
        rig.settle();
        assert_eq!(rig.guest.answered(&posted), None);
        rig.controls(1).release(1);
        rig.settle();
        assert_eq!(rig.guest.answered(&posted), Some(OK));
        assert_eq!(vf.transport.status(), if resets { 0 } else { before });
        assert_eq!(vf.complete(0), if resets { None } else { Some(9) });
    }
}

/// Requirements: S3-19, E13, B-7
#[test]
fn s3_19_a_command_that_waits_for_a_reset_ends_with_a_reset_of_the_owner() {
    for (opcode, data) in [
        (opcode::MODE_SET, vec![STOP]),
        (opcode::CONTEXT_READ, vec![]),
        (opcode::CONTEXT_WRITE, vec![]),
    ] {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        rig.controls(1).hold(true);
        vf.submit(0, b"never seen", 16);
        rig.settle();
        assert!(request_flr(vf.transport.function()));
        let posted = rig.guest.post(opcode, VF, &data);
        rig.settle();
        rig.guest.transport.reset().unwrap();
        let before = rig.memory();
        rig.controls(1).release(1);
        rig.settle();
        assert!(rig.memory() == before, "{opcode:#x}");
        assert_eq!(rig.guest.answered(&posted), None);
        let mut guest = crate::rig::Guest::start(&rig.group);
        assert_eq!(guest.mode(VF), Ok(ACTIVE));
        assert!(!guest.read_context(VF, 8).unwrap().is_empty());
    }
}

/// Requirements: S3-9, G3-g, G3-h
#[test]
fn g3_g_what_a_slow_disk_has_not_begun_becomes_the_devices_and_is_done_once_in_order() {
    for to in [STOP, FREEZE] {
        let (mut rig, disks) = Rig::with_disks(2, hasty());
        let mut vf = four_writes(&rig, &disks[1]);
        let mut sibling = rig.drive(2);
        let posted = rig.guest.post(opcode::MODE_SET, VF, &[to]);
        sibling.submit(0, &read_request(3), 513);
        sibling.collect(0, 1);
        // What has begun has to end, however long it takes.
        std::thread::sleep(Duration::from_millis(60));
        rig.settle();
        assert_eq!(rig.guest.answered(&posted), None);
        disks[1].admit(1);
        assert_eq!(rig.answer(&posted), OK);
        assert_eq!(vf.collect(0, 1).len(), 1);
        assert_eq!(disks[1].done(), writes()[..1]);
        // Nothing moves, though the disk would.
        disks[1].unblock();
        rig.quiet();
        let before = rig.memory();
        vf.transport.notify(0);
        rig.settle();
        assert!(rig.memory() == before);
        assert_eq!(rig.interrupts(), QUIET);
        // They are in the context, oldest first: the heads that the ring has.
        let context = rig.guest.read_all(VF, 4096).unwrap();
        let layout = *vf.queues[0].layout();
        let head = |at| rig.group.machine.dma().get::<u16>(layout.avail_entry(at));
        assert_eq!(owned(&context), [head(1), head(2), head(3)]);
        rig.guest.set_mode(VF, ACTIVE).unwrap();
        let used: Vec<_> = vf.collect(0, 3).iter().map(|used| used.head).collect();
        assert_eq!(used, [head(1), head(2), head(3)]);
        assert_eq!(disks[1].done(), writes());
        let context = rig.guest.read_all(VF, 4096).unwrap();
        assert_eq!(owned(&context), QUIET);
    }
}

/// Requirements: G3-g, S3-9, S3-32
#[test]
fn g3_g_owned_descriptors_survive_a_reset_of_the_vf_in_its_context() {
    for party in 0..2 {
        let (mut rig, disks) = Rig::with_disks(1, hasty());
        let mut vf = four_writes(&rig, &disks[1]);
        let posted = rig.guest.post(opcode::MODE_SET, VF, &[FREEZE]);
        rig.settle();
        std::thread::sleep(Duration::from_millis(60));
        rig.settle();
        disks[1].admit(1);
        assert_eq!(rig.answer(&posted), OK);
        rig.monitor.set_mode(VF, FREEZE).unwrap();
        let before = rig.function(1).save();
        let context = rig.both()[party].read_all(VF, 100).unwrap();
        assert_eq!(owned(&context).len(), 3);
        assert!(request_flr(vf.transport.function()));
        rig.settle();
        // A context that was read to its end before the reset is not read once more by itself.
        rig.guest.discard(VF).unwrap();
        assert_eq!(owned(&rig.guest.read_all(VF, 4096).unwrap()), QUIET);
        rig.restore_pci(&vf);
        rig.both()[party].write_context(VF, &context).unwrap();
        rig.guest.set_mode(VF, STOP).unwrap();
        rig.monitor.set_mode(VF, STOP).unwrap();
        let mut after = rig.function(1).save();
        after.registers.config_generation -= 1;
        assert_eq!(after, before);
        // More comes behind them.
        vf.submit(0, &write_request(4, &[0xaf; 512]), 1);
        disks[1].unblock();
        rig.guest.set_mode(VF, ACTIVE).unwrap();
        rig.monitor.set_mode(VF, ACTIVE).unwrap();
        assert_eq!(vf.collect(0, 5).len(), 5);
        let mut all = writes();
        all.push(Access::Write(4 * 512, 512));
        assert_eq!(disks[1].done(), all, "once each, in order");
    }
}

/// Requirements: E10, E13
#[test]
fn e10_the_answer_of_a_command_that_waited_comes_when_the_owner_may_write_it() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"in flight", 16);
    rig.settle();
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[STOP]);
    rig.settle();
    let owner = rig.guest.transport.function().clone();
    change_command(&owner, 0, command::BUS_MASTER);
    rig.controls(1).release(1);
    rig.settle();
    assert_eq!(rig.guest.answered(&posted), None);
    change_command(&owner, command::BUS_MASTER, 0);
    rig.settle();
    assert_eq!(rig.answer(&posted), OK);
}

/// Requirements: S3-6, E13
#[test]
fn s3_6_requests_that_were_taken_back_run_when_mode_set_is_called_off() {
    let (mut rig, disks) = Rig::with_disks(1, hasty());
    let mut vf = four_writes(&rig, &disks[1]);
    let posted = rig.guest.post(opcode::MODE_SET, VF, &[FREEZE]);
    rig.settle();
    std::thread::sleep(Duration::from_millis(60));
    rig.settle();
    assert_eq!(
        rig.function(1).save().queues[0]
            .split()
            .unwrap()
            .owned
            .len(),
        4
    );
    rig.guest.transport.reset().unwrap();
    rig.settle();
    assert_eq!(rig.guest.answered(&posted), None);
    disks[1].unblock();
    assert_eq!(vf.collect(0, 4).len(), 4);
    assert_eq!(disks[1].done(), writes());
    let mut guest = crate::rig::Guest::start(&rig.group);
    assert_eq!(guest.mode(VF), Ok(ACTIVE));
}

/// Requirements: S3-6, S3-9
#[test]
fn s3_6_of_a_stuck_disk_the_monitor_gives_up_and_nothing_has_changed() {
    for to in [STOP, FREEZE] {
        let (mut rig, disks) = Rig::with_disks(1, hasty());
        let mut vf = four_writes(&rig, &disks[1]);
        rig.monitor.0.set_patience(Duration::from_millis(100));
        for _ in 0..2 {
            assert_eq!(rig.monitor.set_mode(VF, to), Err(AGAIN));
            assert_eq!(rig.monitor.mode(VF), Ok(ACTIVE));
            // Half a stop is none: what was taken back goes to the disk again.
            rig.settle();
        }
        // The guest is not held up by any of this: it can reset the PF, and it can work.
        rig.guest.transport.reset().unwrap();
        disks[1].unblock();
        assert_eq!(vf.collect(0, 4).len(), 4);
        assert_eq!(disks[1].done(), writes());
        rig.monitor.0.set_patience(PATIENCE);
        rig.monitor.set_mode(VF, to).unwrap();
        assert_eq!(rig.monitor.mode(VF), Ok(to));
    }
}

/// Requirements: S3-9
#[test]
fn s3_9_the_monitor_waits_for_requests_in_flight() {
    let (mut rig, disks) = Rig::with_disks(2, patient());
    let mut vf = four_writes(&rig, &disks[1]);
    let mut sibling = rig.drive(2);
    let monitor = &mut rig.monitor;
    let group = &rig.group;
    std::thread::scope(|scope| {
        let stop = scope.spawn(move || monitor.set_mode(VF, STOP));
        sibling.submit(0, &read_request(0), 513);
        sibling.collect(0, 1);
        assert!(!stop.is_finished(), "the first write is in flight");
        disks[1].unblock();
        // The machine works on this thread.
        let used = vf.collect(0, 4);
        assert_eq!(used.len(), 4);
        while !stop.is_finished() {
            group.machine.settle();
        }
        assert_eq!(stop.join().unwrap(), Ok(()));
    });
    assert_eq!(disks[1].done(), writes());
    assert_eq!(rig.monitor.mode(VF), Ok(STOP));
    assert_eq!(rig.guest.mode(VF), Ok(ACTIVE));
}

/// Requirements: S3-9
#[test]
fn s3_9_a_disk_that_fails_or_is_slow_delays_no_more_than_its_requests() {
    let (mut rig, disks) = Rig::with_disks(1, patient());
    let mut vf = rig.drive(1);
    disks[1].slow_down(Duration::from_millis(5));
    disks[1].fail(2);
    let answers: Vec<_> = (0..4)
        .map(|sector| vf.submit(0, &read_request(sector), 513))
        .collect();
    rig.settle();
    rig.guest.set_mode(VF, STOP).unwrap();
    assert_eq!(vf.collect(0, 4).len(), 4);
    let dma = rig.group.machine.dma();
    let status: Vec<_> = answers.iter().map(|at| dma.get::<u8>(at + 512)).collect();
    assert_eq!(status, [1, 1, 0, 0], "two errors, two successes");
    assert_eq!(dma.bytes(answers[3], 512), content(1)[3 * 512..][..512]);
    assert_eq!(vf.transport.status() & status::NEEDS_RESET, 0);
}

/// Requirements: S3-9, S3-29, B-7
#[test]
fn s3_9_commands_behind_one_that_waits_see_the_mode_it_brought() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    rig.controls(1).hold(true);
    vf.submit(0, b"in flight", 16);
    rig.settle();
    let early = rig.guest.post(opcode::CONTEXT_WRITE, VF, &[]);
    let freeze = rig.guest.post(opcode::MODE_SET, VF, &[FREEZE]);
    let late = rig.guest.post(opcode::CONTEXT_WRITE, VF, &[]);
    let active = rig.guest.post(opcode::MODE_SET, VF, &[ACTIVE]);
    let last = rig.guest.post(opcode::CONTEXT_WRITE, VF, &[]);
    rig.settle();
    assert_eq!(rig.guest.answered(&early), Some((22, 1)));
    assert_eq!(rig.guest.answered(&freeze), None);
    rig.controls(1).release(1);
    let outcomes = [freeze, late, active, last].map(|posted| rig.answer(&posted));
    assert_eq!(outcomes, [OK, OK, OK, (22, 1)]);
}
