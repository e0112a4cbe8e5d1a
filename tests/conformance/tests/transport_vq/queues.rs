//! Virtqueues of managed devices: classes 8 to 14.

use driver::host::Notifications;
use driver::virtio::management::{ManagementError, code, command, number};
use driver::virtio::{Queue, feature};

use crate::rig::{Device, Live, QUEUES, Rig, SIMPLE, SUSPEND, halves};

/// Requirements: S4-26, S4-32, M24
#[test]
fn s4_32_a_queue_is_set_up_and_then_enabled() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(SIMPLE);
    let size = |live: &mut Live| halves(&live.of_queue(id, command::GET_SIZE, 0).unwrap())[1];
    assert_eq!(size(&mut live), 16, "S4-35: the largest");
    let device = rig.set_up(&mut live, id, SIMPLE);
    assert_eq!(size(&mut live), 16);
    let shown = live.of_queue(id, command::GET_ADDRESS, 0).unwrap();
    let layout = device.queues[0].layout();
    assert_eq!(number(&shown[..2]), 0);
    let areas = [8, 16, 24].map(|at| number(&shown[at..at + 8]));
    assert_eq!(areas, [layout.descriptors, layout.used, layout.available]);
    assert_eq!(live.of_queue(id, command::GET_ENABLE, 0).unwrap()[2], 1);
}

/// Requirements: S4-28, S4-29, S4-31, G4-o
#[test]
fn s4_28_a_disabled_queue_stands_still_and_goes_on_where_it_was() {
    let rig = Rig::new(1);
    for packed in [0, feature::RING_PACKED] {
        let mut live = rig.live();
        let mut device = rig.device(&mut live, SIMPLE | packed);
        let id = device.id;
        for _ in 0..21 {
            rig.echoes(&mut device, 0, b"before");
        }
        rig.controls[1].hold(true);
        device.submit(&rig, 0, b"in flight");
        rig.machine.settle();
        let off = live.management.out().half(0).byte(0).bytes();
        let posted = live
            .management
            .post(&live.transport, id, command::SET_ENABLE, &off)
            .unwrap();
        rig.machine.settle();
        assert_eq!(live.management.poll(&posted).unwrap(), None, "it drains");
        device.submit(&rig, 0, b"later");
        rig.controls[1].hold(false);
        rig.controls[1].release(1);
        rig.machine.settle();
        assert!(live.management.poll(&posted).unwrap().is_some());
        assert_eq!(device.take(&rig, 0).as_deref(), Some(&b"in flight"[..]));
        assert_eq!(live.of_queue(id, command::GET_ENABLE, 0).unwrap()[2], 0);
        assert_eq!(live.of_queue(id, command::GET_ENABLE, 1).unwrap()[2], 1);
        rig.machine.write(device.doorbell(0), &0u16.to_le_bytes());
        rig.machine.settle();
        assert_eq!(device.take(&rig, 0), None, "it does not process");
        live.switch(id, command::SET_ENABLE, 0, 1).unwrap();
        rig.machine.settle();
        assert_eq!(device.take(&rig, 0).as_deref(), Some(&b"later"[..]));
        live.set_status(id, 0);
        assert_eq!(live.of_queue(id, command::GET_ENABLE, 1).unwrap()[2], 0);
        live.transport.reset().unwrap();
    }
}

/// Requirements: S4-33, S4-34, S4-35
#[test]
fn s4_35_sizes_are_what_rings_can_have() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(SIMPLE | feature::RING_PACKED);
    let set = |live: &mut Live, size| {
        let data = live.management.out().half(0).half(size).bytes();
        live.call(id, command::SET_SIZE, &data).map(drop)
    };
    for (size, split, packed) in [
        (0, false, false),
        (3, false, true),
        (8, true, true),
        (32, false, false),
    ] {
        for (features, fits) in [(SIMPLE, split), (SIMPLE | feature::RING_PACKED, packed)] {
            live.management
                .negotiate(&live.transport, id, features)
                .unwrap();
            let expected = if fits { Ok(()) } else { Err(code::VALUE) };
            assert_eq!(set(&mut live, size), expected, "{size} with {features:#x}");
            live.set_status(id, 0);
            let shown = live.of_queue(id, command::GET_SIZE, 0).unwrap();
            assert_eq!(halves(&shown)[1], 16, "after a reset");
        }
    }
}

/// Requirements: S4-36, S4-38, G4-q
#[test]
fn s4_38_a_queue_is_kicked_at_the_address_that_the_device_gives() {
    let rig = Rig::new(2);
    for how in [Notifications::Register, Notifications::Doorbell] {
        rig.machine.set_notifications(how);
        let mut live = rig.live();
        let mut first = rig.device(&mut live, SIMPLE);
        let mut second = rig.device(&mut live, SIMPLE);
        assert_ne!(first.doorbell(0), second.doorbell(0));
        for queue in [1, 0] {
            rig.echoes(&mut first, queue, b"kicked");
            rig.echoes(&mut second, queue, b"kicked");
        }
        let doorbells = rig.machine.registered_doorbells();
        for device in [&first, &second] {
            for queue in 0..2 {
                let place = (device.doorbell(queue), Some(queue));
                let mut all = doorbells.iter().map(|d| (d.address, d.datamatch));
                assert!(all.any(|d| d == place), "{place:?}");
            }
        }
        live.call(first.id, command::DESTROY, &[]).unwrap();
        rig.machine.settle();
        let mut left = rig.machine.registered_doorbells().into_iter();
        assert!(left.all(|d| d.address != first.doorbell(0)));
        let shown = live.of_queue(second.id, command::GET_NOTIFY, 0).unwrap();
        assert!(number(&shown[8..16]) >= 2);
        live.transport.reset().unwrap();
    }
}

/// Where queue 0 of a device is, as GET has it.
fn state(live: &mut Live, id: u64) -> Vec<u16> {
    halves(&live.of_queue(id, command::GET_STATE, 0).unwrap())
}

fn set_state(live: &mut Live, id: u64, fields: &[u16]) -> Result<Vec<u8>, u8> {
    let out = live.management.out().half(0);
    let out = fields.iter().fold(out, |out, field| out.half(*field));
    live.call(id, command::SET_STATE, &out.bytes())
}

fn disable(live: &mut Live, device: &Device) {
    let id = device.id;
    live.switch(id, command::SET_ENABLE, 0, 0).unwrap();
}

/// Destroys `device`, and makes another whose queue 0 goes on in the same ring at `place`.
fn made_anew(rig: &Rig, live: &mut Live, mut device: Device, features: u64, place: &[u16]) {
    let layout = device.queues[0].layout();
    live.call(device.id, command::DESTROY, &[]).unwrap();
    let id = live.create(features);
    let Live {
        transport,
        management,
    } = live;
    management.negotiate(transport, id, features).unwrap();
    set_state(live, id, place).unwrap();
    let shown = state(live, id);
    assert_eq!(shown[1..=place.len()], *place);
    let Live {
        transport,
        management,
    } = live;
    management.enable_queue(transport, id, 0, &layout).unwrap();
    management.start(transport, id).unwrap();
    device.submit(rig, 0, b"goes on");
    rig.machine.settle();
    assert_eq!(device.take(rig, 0).as_deref(), Some(&b"goes on"[..]));
}

/// Requirements: S4-39, S4-41, M24, G4-k
#[test]
fn s4_41_the_state_of_a_split_queue_is_its_available_index() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    for _ in 0..20 {
        rig.echoes(&mut device, 0, b"before");
    }
    assert_eq!(
        set_state(&mut live, device.id, &[0]),
        Err(code::STATE),
        "it is enabled"
    );
    disable(&mut live, &device);
    assert_eq!(state(&mut live, device.id)[..2], [0, 20]);
    made_anew(&rig, &mut live, device, SIMPLE, &[20]);
    let id = 2;
    assert_eq!(state(&mut live, id)[..2], [0, 21]);
}

/// Requirements: S4-41, G4-p
#[test]
fn s4_41_the_state_of_a_packed_queue_has_both_places_and_wrap_counters() {
    let features = SIMPLE | feature::RING_PACKED;
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(features);
    assert_eq!(
        state(&mut live, id).len(),
        4,
        "split before FEATURES_OK: 2 and padding"
    );
    live.management
        .negotiate(&live.transport, id, features)
        .unwrap();
    assert_eq!(state(&mut live, id)[..5], [0, 1, 0, 1, 0]);
    for bad in [[2, 0, 1, 0], [1, 16, 1, 0], [1, 0, 2, 0], [1, 0, 1, 16]] {
        assert_eq!(set_state(&mut live, id, &bad), Err(code::VALUE), "{bad:?}");
    }
    live.call(id, command::DESTROY, &[]).unwrap();
    let mut device = rig.device(&mut live, features);
    // Two descriptors each.
    for _ in 0..10 {
        rig.echoes(&mut device, 0, b"before");
    }
    disable(&mut live, &device);
    let place = state(&mut live, device.id);
    assert_eq!(place[..5], [0, 0, 4, 0, 4]);
    made_anew(&rig, &mut live, device, features, &place[1..5]);
}

/// Requirements: S4-42, S4-43, S4-44
#[test]
fn s4_42_there_is_one_address_space() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(SIMPLE);
    let set = |live: &mut Live, asid| {
        let data = live.management.out().half(0).word(asid).bytes();
        live.call(id, command::SET_ASID, &data).map(drop)
    };
    assert_eq!(set(&mut live, 0), Ok(()));
    for missing in [1, 0x8000_0000, u32::MAX] {
        assert_eq!(set(&mut live, missing), Err(code::VALUE));
    }
    let shown = live.of_queue(id, command::GET_ASID, 0).unwrap();
    assert_eq!(number(&shown[4..8]), 0);
    rig.set_up(&mut live, id, SIMPLE);
    assert_eq!(set(&mut live, 0), Err(code::STATE), "it is enabled");
}

/// Requirements: S4-45, S4-46, S4-47, S4-48, S4-49, M25, M26
#[test]
fn s4_47_a_reset_queue_is_as_it_was_at_first() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let id = device.id;
    for _ in 0..3 {
        rig.echoes(&mut device, 0, b"before");
    }
    rig.controls[1].hold(true);
    device.submit(&rig, 0, b"in flight");
    rig.machine.settle();
    let index = live.management.out().half(0).bytes();
    let posted = live
        .management
        .post(&live.transport, id, command::RESET, &index)
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None, "it drains");
    device.submit(&rig, 0, b"not any more");
    rig.machine.settle();
    assert_eq!(rig.controls[1].held(), 1);
    rig.controls[1].hold(false);
    rig.controls[1].release(1);
    rig.machine.settle();
    assert!(live.management.poll(&posted).unwrap().is_some());
    assert_eq!(live.of_queue(id, command::GET_ENABLE, 0).unwrap()[2], 0);
    assert_eq!(
        halves(&live.of_queue(id, command::GET_SIZE, 0).unwrap())[1],
        16
    );
    assert_eq!(state(&mut live, id)[..2], [0, 0]);
    let shown = live.of_queue(id, command::GET_ADDRESS, 0).unwrap();
    assert!(shown.iter().all(|byte| *byte == 0));
    let fresh = Queue::new(rig.machine.dma().clone(), 16, SIMPLE).unwrap();
    live.management
        .enable_queue(&live.transport, id, 0, &fresh.layout())
        .unwrap();
    device.replace_queue(0, fresh);
    rig.echoes(&mut device, 0, b"anew");
    rig.echoes(&mut device, 1, b"the other one never noticed");
}

/// Requirements: M25
#[test]
fn m25_a_queue_is_reset_for_drivers_that_accepted_it() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = rig.device(&mut live, feature::VERSION_1);
    assert_eq!(
        live.of_queue(device.id, command::RESET, 0),
        Err(code::STATE)
    );
    assert_eq!(
        live.of_queue(device.id, command::GET_ENABLE, 0).unwrap()[2],
        1
    );
}

/// Requirements: S4-26, G4-k
#[test]
fn g4_k_an_enabled_queue_does_not_change() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let out = || live.management.out().half(0);
    let address = out().long(0x1000).long(0x2000).long(0x3000).bytes();
    let size = out().half(8).bytes();
    for (command, data) in [(command::SET_ADDRESS, address), (command::SET_SIZE, size)] {
        assert_eq!(live.call(device.id, command, &data), Err(code::STATE));
    }
    assert_eq!(set_state(&mut live, device.id, &[9]), Err(code::STATE));
    rig.echoes(&mut device, 0, b"unmoved");
}

/// A ring outside guest memory is refused, and the device goes on.
#[test]
fn a_ring_outside_memory_is_not_enabled() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    disable(&mut live, &device);
    for bad in [0, 3, 1 << 52, u64::MAX - 15] {
        let out = live.management.out().half(0).long(bad).long(bad).long(bad);
        live.call(device.id, command::SET_ADDRESS, &out.bytes())
            .unwrap();
        let answer = live.switch(device.id, command::SET_ENABLE, 0, 1);
        assert_eq!(answer, Err(code::VALUE), "{bad:#x}");
    }
    rig.echoes(&mut device, 1, b"alive");
}

/// Requirements: S4-48
#[test]
fn s4_48_a_queue_that_is_disabled_is_reset_as_well() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = rig.device(&mut live, SIMPLE);
    let id = device.id;
    disable(&mut live, &device);
    let size = live.management.out().half(0).half(8).bytes();
    live.call(id, command::SET_SIZE, &size).unwrap();
    live.of_queue(id, command::RESET, 0).unwrap();
    let shown = live.of_queue(id, command::GET_SIZE, 0).unwrap();
    assert_eq!(halves(&shown)[1], 16);
    let shown = live.of_queue(id, command::GET_ADDRESS, 0).unwrap();
    assert!(shown.iter().all(|byte| *byte == 0));
    assert_eq!(state(&mut live, id)[..2], [0, 0]);
    let message = live.of_queue(id, command::GET_QUEUE_MSI, 0).unwrap();
    assert_eq!(message[20], 0, "its message is disabled");
}

/// Requirements: S4-47, M26, S1-13
#[test]
fn m26_a_suspended_device_does_not_say_that_its_queue_was_reset() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE | SUSPEND);
    let id = device.id;
    live.set_status(id, 0xf | 0x10);
    rig.machine.settle();
    assert_eq!(live.status(id), 0x1f);
    assert_eq!(live.of_queue(id, command::RESET, 0), Err(code::STATE));
    let off = live.switch(id, command::SET_ENABLE, 0, 0);
    assert_eq!(off, Err(code::STATE));
    assert_eq!(live.of_queue(id, command::GET_ENABLE, 0).unwrap()[2], 1);
    live.set_status(id, 0xf);
    rig.echoes(&mut device, 0, b"goes on");
}

/// A device that is to be suspended, and was given back a request that it had begun, cannot do that one before it goes on:
/// disabling its queue fails, and nobody waits behind it.
#[test]
fn a_queue_with_requests_to_do_is_not_disabled_while_its_device_is_suspended() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE | SUSPEND);
    let mut other = rig.device(&mut live, SIMPLE);
    let id = device.id;
    rig.controls[1].hold(true);
    rig.controls[1].give_up(true);
    device.submit(&rig, 0, b"in flight");
    rig.machine.settle();
    live.set_status(id, 0xf | 0x10);
    let off = live.management.out().half(0).byte(0).bytes();
    let posted = live
        .management
        .post(&live.transport, id, command::SET_ENABLE, &off)
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None, "it waits");
    rig.seats[0].recall();
    rig.machine.settle();
    let answer = live.management.poll(&posted).unwrap().unwrap();
    assert_eq!(answer[..2], [1, code::STATE]);
    rig.echoes(&mut other, 0, b"not behind it");
    rig.controls[1].hold(false);
    live.set_status(id, 0xf);
    rig.machine.settle();
    assert_eq!(device.take(&rig, 0).as_deref(), Some(&b"in flight"[..]));
    live.switch(id, command::SET_ENABLE, 0, 0).unwrap();
}

/// Who called VQ_ENABLE 0 off by a reset of the transport virtqueue can have the queue go on, or ask again.
#[test]
fn a_queue_that_is_about_to_be_disabled_can_go_on() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let id = device.id;
    for (on, expected) in [(1, true), (0, false)] {
        rig.controls[1].hold(true);
        device.submit(&rig, 0, b"in flight");
        rig.machine.settle();
        let off = live.management.out().half(0).byte(0).bytes();
        live.management
            .post(&live.transport, id, command::SET_ENABLE, &off)
            .unwrap();
        rig.machine.settle();
        live.transport.reset_queue(QUEUES).unwrap();
        live.renew(&rig);
        let order = live.management.out().half(0).byte(on).bytes();
        let posted = live
            .management
            .post(&live.transport, id, command::SET_ENABLE, &order)
            .unwrap();
        rig.machine.settle();
        let done = live.management.poll(&posted).unwrap();
        assert_eq!(done.is_some(), expected, "it waits only to be disabled");
        rig.controls[1].hold(false);
        rig.controls[1].release(1);
        rig.machine.settle();
        assert_eq!(device.take(&rig, 0).as_deref(), Some(&b"in flight"[..]));
        let shown = live.of_queue(id, command::GET_ENABLE, 0).unwrap();
        assert_eq!(shown[2], on);
    }
}

/// Requirements: S4-41, G4-p
#[test]
fn s4_41_a_packed_queue_begins_at_one_place_within_its_ring() {
    let features = SIMPLE | feature::RING_PACKED;
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(features);
    set_state(&mut live, id, &[20]).unwrap();
    live.management
        .negotiate(&live.transport, id, features)
        .unwrap();
    // As with the device-state capability (G0-i), a place that was set before is one in the packed ring.
    assert_eq!(state(&mut live, id)[..5], [0, 0, 20, 0, 20]);
    let two = set_state(&mut live, id, &[1, 3, 1, 4]);
    assert_eq!(
        two,
        Err(code::VALUE),
        "nothing is in flight between the two"
    );
    set_state(&mut live, id, &[0, 9, 0, 9]).unwrap();
    let queue = Queue::new(rig.machine.dma().clone(), 8, features).unwrap();
    let outcome = live
        .management
        .enable_queue(&live.transport, id, 0, &queue.layout());
    let ManagementError::Failed { code, .. } = outcome.unwrap_err() else {
        panic!("no answer");
    };
    assert_eq!(code, code::VALUE, "beyond the end of a smaller ring");
}
