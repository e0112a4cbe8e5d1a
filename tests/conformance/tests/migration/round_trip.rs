//! Whole moves: a VF's context is read and written back, to it or to another, while its driver has work for it.

use std::time::Duration;

use conformance::group::Live;
use conformance::{QUIET, SIMPLE};
use devices::virtio::{Doors, Suspend};
use driver::access::{DmaExt, FunctionExt};
use driver::host::{Storage, VirtualFunction};
use driver::pci::{change_command, command, request_flr};
use driver::virtio::block::block_feature;
use driver::virtio::migration::{Migrate, mode};
use driver::virtio::{Buffer, Door, Transport, feature, status};

use crate::rig::{DISK, PATIENCE, Rig, VF, content, mac, patient, read_request, write_request};
use mode::{ACTIVE, FREEZE, STOP};

/// What happens to one VF when it is moved: Freeze, its context away, an FLR, what a hypervisor restores beside the
/// context, and the context back.
fn move_in_place(rig: &mut Rig, party: usize, vf: &Transport<VirtualFunction>, step: usize) {
    rig.set_mode(party, VF, FREEZE).unwrap();
    let context = rig.both()[party].read_all(VF, step).unwrap();
    assert!(request_flr(vf.function()));
    assert_eq!(rig.function(1).save().registers.status, 0);
    change_command(vf.function(), command::BUS_MASTER, 0);
    conformance::enable_msix(vf);
    let driver = &mut rig.both()[party];
    for piece in context.chunks(step) {
        driver.write_context(VF, piece).unwrap();
    }
    driver.set_mode(VF, ACTIVE).unwrap();
}

/// A deterministic stream of numbers.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % limit
    }
}

/// Rounds of random reads and writes with a move in the middle of each. Every request is answered once, every read has
/// what was written last, and the disk has all of it at the end.
fn disk_under_load(party: usize, features: u64) {
    let (mut rig, disks) = Rig::with_disks(2, patient());
    let mut vf = rig.drive_with(1, features);
    let mut sibling = rig.drive_with(2, features);
    let disk: &Storage = &disks[1];
    disk.slow_down(Duration::from_micros(200));
    let mut model = content(1);
    let mut numbers = Numbers(party as u64 + features);
    let mut writes = 0;
    for round in 0..12u8 {
        let mut reads = Vec::new();
        let mut count = 0;
        for request in 0..6 {
            let sector = numbers.below(DISK as u64 / 512);
            let at = sector as usize * 512;
            if numbers.below(2) == 0 {
                let data = vec![round * 16 + request; 512];
                vf.submit(0, &write_request(sector, &data), 1);
                model[at..at + 512].copy_from_slice(&data);
                writes += 1;
            } else {
                // A disk's requests are done in order, so that a read sees the writes before it.
                let to = vf.submit(0, &read_request(sector), 513);
                reads.push((to, model[at..at + 512].to_vec()));
            }
            count += 1;
            if request == 2 {
                rig.group.machine.pump();
            }
        }
        sibling.submit(0, &read_request(1), 513);
        move_in_place(&mut rig, party, &vf.transport, 7 + usize::from(round));
        assert_eq!(vf.collect(0, count).len(), count);
        assert_eq!(sibling.collect(0, 1).len(), 1);
        for (to, expected) in reads {
            let dma = rig.group.machine.dma();
            assert_eq!(dma.bytes(to, 512), expected);
            assert_eq!(dma.get::<u8>(to + 512), 0);
        }
    }
    assert!(disk.bytes() == model);
    let done = disk.done();
    let written = done
        .iter()
        .filter(|a| matches!(a, driver::host::Access::Write(..)));
    assert_eq!(written.count(), writes, "none twice");
    assert_eq!(vf.queues[0].in_flight(), 0);
}

/// Requirements: S3-22, S3-32, S3-9, S3-45, S3-46
#[test]
fn s3_32_a_disk_is_moved_under_load_and_loses_nothing() {
    for party in 0..2 {
        for event_index in [0, feature::EVENT_IDX] {
            disk_under_load(party, SIMPLE | block_feature::FLUSH | event_index);
        }
    }
}

/// Offers a receive buffer.
fn offer(vf: &mut Live<VirtualFunction>) -> u64 {
    let to = vf.machine.dma().place(&[0; 2048]).unwrap();
    vf.queues[0].add(&[Buffer::writable(to, 2048)]).unwrap();
    if vf.queues[0].publish() {
        vf.transport.notify(0);
    }
    to
}

/// Sends `number` from VF `from` to VF `to`.
fn send(vf: &mut Live<VirtualFunction>, from: u8, to: u8, number: u16) {
    let mut frame = vec![0; 12];
    frame.extend_from_slice(&mac(to));
    frame.extend_from_slice(&mac(from));
    frame.extend_from_slice(&[0x88, 0xb5]);
    frame.extend_from_slice(&number.to_be_bytes());
    frame.resize(12 + 60, 0);
    let at = vf.machine.dma().place(&frame).unwrap();
    let chain = [Buffer::readable(at, frame.len() as u32)];
    vf.queues[1].add(&chain).unwrap();
    if vf.queues[1].publish() {
        vf.transport.notify(1);
    }
}

/// Frames both ways over a VF that is moved while some wait on its rings.
///
/// Requirements: S3-22, S3-32, S3-9
#[test]
fn s3_32_an_interface_is_moved_under_load_and_loses_nothing() {
    for party in 0..2 {
        for event_index in [0, feature::EVENT_IDX] {
            let (mut rig, _switch) = Rig::with_interfaces(2);
            let mut vf = rig.drive_with(1, SIMPLE | event_index);
            let mut peer = rig.drive_with(2, SIMPLE | event_index);
            let mut buffers: Vec<_> = (0..128).map(|_| offer(&mut vf)).collect();
            let mut theirs: Vec<_> = (0..128).map(|_| offer(&mut peer)).collect();
            rig.settle();
            let number = |rig: &Rig, at: u64| {
                u16::from_be_bytes(rig.group.machine.dma().get::<u16>(at + 26).to_le_bytes())
            };
            for round in 0..8u16 {
                for frame in 0..8 {
                    // Some are on their way when the VF stops; others come while it is stopped.
                    send(&mut vf, 1, 2, round * 8 + frame);
                    send(&mut peer, 2, 1, round * 8 + frame);
                    if frame == 3 {
                        rig.group.machine.pump();
                        rig.both()[party].set_mode(VF, STOP).unwrap();
                        rig.settle();
                    }
                }
                rig.both()[party].set_mode(VF, ACTIVE).unwrap();
                // What the switch holds for a VF is not the VF's, and goes with an FLR.
                rig.settle();
                send(&mut vf, 1, 2, 0xffff);
                move_in_place(&mut rig, party, &vf.transport, 64);
                rig.settle();
                assert_eq!(vf.collect(0, 8).len(), 8);
                assert_eq!(vf.collect(1, 9).len(), 9);
                assert_eq!(peer.collect(0, 9).len(), 9);
                assert_eq!(peer.collect(1, 8).len(), 8);
                let got: Vec<_> = buffers.drain(..8).map(|at| number(&rig, at)).collect();
                assert_eq!(got, (round * 8..round * 8 + 8).collect::<Vec<_>>());
                let mut sent: Vec<_> = (round * 8..round * 8 + 8).collect();
                sent.push(0xffff);
                let got: Vec<_> = theirs.drain(..9).map(|at| number(&rig, at)).collect();
                assert_eq!(got, sent);
                buffers.extend((0..8).map(|_| offer(&mut vf)));
                theirs.extend((0..9).map(|_| offer(&mut peer)));
            }
        }
    }
}

/// Requirements: S3-32, G3-g
#[test]
fn s3_32_the_context_of_one_vf_becomes_that_of_another_which_goes_on_with_its_work() {
    for party in 0..2 {
        let (mut rig, disks) = Rig::with_disks(2, patient());
        let mut vf = rig.drive_with(1, SIMPLE | block_feature::FLUSH);
        vf.submit(0, &read_request(0), 513);
        vf.collect(0, 1);
        rig.both()[party].set_mode(1, STOP).unwrap();
        let to = vf.submit(0, &write_request(9, &[0x99; 512]), 1);
        let driver = &mut rig.both()[party];
        driver.set_mode(1, FREEZE).unwrap();
        let context = driver.read_all(1, 50).unwrap();
        driver.set_mode(2, FREEZE).unwrap();
        driver.write_context(2, &context).unwrap();
        let mut moved = rig.function(1).save();
        moved.registers.config_generation += 1;
        let function = rig.group.vf(2);
        change_command(&function, command::BUS_MASTER, 0);
        let transport = Transport::new(function).unwrap();
        conformance::enable_msix(&transport);
        rig.quiet();
        rig.both()[party].set_mode(2, STOP).unwrap();
        assert_eq!(rig.function(2).save(), moved);
        rig.both()[party].set_mode(2, ACTIVE).unwrap();
        // The driver of the first finds the second at its rings.
        vf.transport = transport;
        assert_eq!(vf.collect(0, 1).len(), 1);
        assert_eq!(rig.group.machine.dma().get::<u8>(to), 0);
        assert_eq!(disks[2].bytes()[9 * 512..][..512], [0x99; 512]);
        assert!(rig.interrupts().contains(&1));
        let read = vf.submit(0, &read_request(9), 513);
        vf.collect(0, 1);
        assert_eq!(rig.group.machine.dma().bytes(read, 512), [0x99; 512]);
        // The first has done nothing more.
        assert_eq!(disks[1].bytes(), content(1));
    }
}

/// Requirements: S3-32, S1-12, B-42
#[test]
fn s3_32_a_stopped_device_is_moved_stopped_and_its_driver_lets_it_go_on() {
    let offered = |suspend| Doors {
        suspend,
        device_stop: Some(Doors::DEVICE_STOP),
        queue_status: true,
    };
    for (door, suspend) in [
        (Door::SuspendV5, Suspend::V5),
        (Door::Suspend, Suspend::V1_4),
        (Door::DeviceStop, Suspend::V5),
        (Door::DeviceStop, Suspend::V1_4),
    ] {
        for party in 0..2 {
            let mut rig = Rig::with_doors(offered(Some(suspend)));
            let doors = [suspend.feature(), Doors::DEVICE_STOP];
            let features = doors.iter().fold(SIMPLE, |set, n| set | 1 << n);
            let mut vf = rig.drive_with(1, features);
            vf.request(0, b"before", 8);
            vf.transport.stop(door).unwrap();
            let shown = vf.transport.status();
            assert_eq!(shown & door.bit(), door.bit());
            move_in_place(&mut rig, party, &vf.transport, 33);
            assert_eq!(vf.transport.status(), shown, "{door:?}");
            rig.settle();
            rig.quiet();
            // It is stopped still.
            vf.submit(0, b"after", 8);
            assert_eq!(vf.complete(0), None);
            assert_eq!(rig.interrupts(), QUIET);
            vf.transport.resume(door).unwrap();
            assert_eq!(vf.complete(0), Some(5), "{door:?}");
            assert_eq!(vf.request(1, b"works", 8), b"works");
        }
    }
}

/// Requirements: S3-32, S0-9, S0-11
#[test]
fn s3_32_a_stopped_queue_is_moved_stopped_and_goes_on_where_it_was() {
    let doors = Doors {
        queue_status: true,
        ..Doors::default()
    };
    for party in 0..2 {
        let mut rig = Rig::with_doors(doors);
        let mut vf = rig.drive(1);
        for _ in 0..3 {
            vf.request(0, b"before", 8);
        }
        vf.transport.device_state().unwrap().stop(0).unwrap();
        vf.submit(0, b"waits", 8);
        move_in_place(&mut rig, party, &vf.transport, 64);
        assert_eq!(vf.request(1, b"the other", 16), b"the other");
        assert_eq!(vf.complete(0), None);
        let state = vf.transport.device_state().unwrap();
        assert!(!state.runs(0) && state.runs(1));
        assert_eq!(state.index(0), 3);
        state.start(0);
        assert_eq!(vf.complete(0), Some(5));
    }
}

/// Requirements: S3-32, S3-12, E1
#[test]
fn s3_32_a_device_that_asked_for_a_reset_is_moved_asking_for_it() {
    for party in 0..2 {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        // More chains available than the ring has.
        let available = vf.queues[0].layout().avail_index();
        rig.group.machine.dma().set::<u16>(available, 99);
        vf.transport.notify(0);
        rig.settle();
        assert_ne!(vf.transport.status() & status::NEEDS_RESET, 0);
        move_in_place(&mut rig, party, &vf.transport, 64);
        rig.settle();
        assert_ne!(vf.transport.status() & status::NEEDS_RESET, 0);
        vf = rig.drive(1);
        assert_eq!(vf.request(0, b"again", 8), b"again");
    }
}

/// Requirements: S3-32
#[test]
fn s3_32_a_vf_nobody_drives_yet_is_moved_in_the_middle_of_its_setup() {
    let mut rig = Rig::new(1);
    let transport = Transport::new(rig.group.vf(1)).unwrap();
    transport.negotiate(SIMPLE).unwrap();
    let features = transport.accepted();
    let before = rig.function(1).save();
    move_in_place(&mut rig, 0, &transport, 10);
    assert_eq!(transport.accepted(), features);
    let mut after = rig.function(1).save();
    after.registers = before.registers;
    assert_eq!(after, before);
    assert!(transport.function().wait_until(PATIENCE, || {
        transport.status() == before.registers.status
    }));
    let mut vf = rig.drive(1);
    assert_eq!(vf.request(0, b"runs", 8), b"runs");
}
