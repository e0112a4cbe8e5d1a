//! Resources, and devices that come and go: classes 1, 2 and 4.

use driver::virtio::management::{ManagementError, Wire, code, command, number};
use driver::virtio::{common, feature, status};

use crate::rig::{Live, MANAGES, OWN_FEATURE, QUEUES, Rig, SIMPLE, TYPE};

/// What a device needs that is to be of use.
const PLAIN: u64 = feature::VERSION_1;

/// Requirements: S4-1
#[test]
fn s4_1_managed_devices_need_the_transport_virtqueue() {
    let rig = Rig::new(1);
    for (features, accepted) in [(1 << 46, false), (1 << 45, true), (MANAGES, true)] {
        let transport = driver::virtio::Transport::new(rig.function()).unwrap();
        let outcome = transport.negotiate(features | feature::VERSION_1);
        assert_eq!(outcome.is_ok(), accepted, "{features:#x}");
    }
}

/// Requirements: S4-2, M10
#[test]
fn s4_2_without_the_feature_there_is_the_queue_and_no_command() {
    let rig = Rig::new(1);
    let mut live = rig.live_with(1 << 45 | SIMPLE, Wire::Aligned);
    for command in [command::AVAIL_RES_GET, command::CREATE, command::GET_STATUS] {
        assert_eq!(live.call(0, command, &[0; 16]), Err(code::COMMAND));
    }
}

/// The virtqueue is behind those of the device, and there for drivers that asked for it.
#[test]
fn the_queue_is_there_for_drivers_that_accepted_it() {
    let rig = Rig::new(1);
    let transport = driver::virtio::Transport::new(rig.function()).unwrap();
    for (features, there) in [(0, false), (MANAGES, true)] {
        transport.negotiate(features | feature::VERSION_1).unwrap();
        let count: u16 = transport.get(common::NUM_QUEUES);
        assert_eq!(count, QUEUES);
        assert_eq!(transport.queue_size(count) > 0, there);
    }
}

/// Requirements: S4-3, S4-4, S4-5, M2, M3, M4
#[test]
fn s4_5_resources_are_counted_as_they_are_taken_and_given_back() {
    let rig = Rig::new(3);
    let mut live = rig.live();
    assert_eq!(live.resources(), [6, QUEUES, QUEUES, 3]);
    let id = live.create(PLAIN);
    assert_eq!(live.resources(), [4, QUEUES, QUEUES, 2]);
    live.call(id, command::DESTROY, &[]).unwrap();
    assert_eq!(live.resources(), [6, QUEUES, QUEUES, 3]);
}

/// Requirements: M6
#[test]
fn m6_the_counters_are_in_the_configuration_as_well() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let read = |live: &Live| -> [u16; 4] {
        let half = |at: u64| {
            let place = driver::access::Register::<u16>::at(16 + 2 * at);
            live.transport.device_get(place)
        };
        [half(0), half(1), half(2), half(3)]
    };
    assert_eq!(read(&live), live.resources());
    let before: u8 = live.transport.get(common::CONFIG_GENERATION);
    live.create(PLAIN);
    assert_eq!(read(&live), [2, QUEUES, QUEUES, 1]);
    assert_eq!(read(&live), live.resources());
    let after: u8 = live.transport.get(common::CONFIG_GENERATION);
    assert_ne!(before, after, "a change shows in the generation");
}

/// Requirements: S4-6, S4-7, S4-9, M7, M8, G4-f
#[test]
fn s4_9_ids_are_unique_and_never_used_again() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let mut seen = Vec::new();
    for _ in 0..20 {
        let id = live.create(PLAIN);
        assert!(id != 0 && !seen.contains(&id));
        seen.push(id);
        live.call(id, command::DESTROY, &[]).unwrap();
    }
    live.transport.reset().unwrap();
    let mut live = rig.live();
    let id = live.create(PLAIN);
    assert!(!seen.contains(&id), "also after a reset");
}

/// Requirements: S4-8, M9
#[test]
fn s4_8_create_fails_for_what_no_device_could_be() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let create = |live: &mut Live, device_type, features, config: &[u8]| {
        let out = live.management.out().word(device_type).long(features);
        live.call(0, command::CREATE, &out.raw(config).bytes())
    };
    let own: Vec<u8> = (0..16).collect();
    for (what, device_type, features, config) in [
        ("another type", 1, PLAIN, vec![]),
        ("a feature it has not", TYPE, PLAIN | 1 << 6, vec![]),
        ("the last feature", TYPE, PLAIN | 1 << 63, vec![]),
        ("another configuration", TYPE, PLAIN, vec![9; 8]),
        (
            "a longer one",
            TYPE,
            PLAIN,
            [own.clone(), vec![1; 8]].concat(),
        ),
    ] {
        let answer = create(&mut live, device_type, features, &config);
        assert_eq!(answer, Err(code::VALUE), "{what}");
    }
    assert_eq!(live.resources()[3], 1, "nothing was taken");
    // Six bytes, and two of padding.
    let six = create(&mut live, TYPE, PLAIN, &own[..6]).unwrap();
    live.call(number(&six[..8]), command::DESTROY, &[]).unwrap();
    create(&mut live, TYPE, PLAIN | OWN_FEATURE, &own).unwrap();
    let answer = create(&mut live, TYPE, PLAIN, &[0; 16]);
    assert_eq!(answer, Err(code::RESOURCE), "the last is taken");
}

/// Requirements: S4-10, S4-11, G4-l
#[test]
fn s4_10_destroy_ends_a_device_that_runs() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    rig.echoes(&mut device, 0, b"alive");
    rig.controls[1].hold(true);
    device.submit(&rig, 0, b"in flight");
    rig.machine.settle();
    let posted = live
        .management
        .post(&live.transport, device.id, command::DESTROY, &[])
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None, "it waits");
    rig.controls[1].release(1);
    rig.machine.settle();
    let answer = live.management.poll(&posted).unwrap();
    assert_eq!(answer.map(|bytes| bytes[0]), Some(0));
    assert_eq!(device.take(&rig, 0), None, "it completes unseen");
    assert_eq!(rig.messages(), []);
    assert_eq!(
        live.call(device.id, command::GET_STATUS, &[]),
        Err(code::DEVICE)
    );
    rig.controls[1].hold(false);
    let mut next = rig.device(&mut live, SIMPLE);
    rig.echoes(&mut next, 0, b"another life");
}

/// Requirements: S4-15, S4-16, S4-17, S4-18
#[test]
fn s4_15_status_0_is_answered_when_the_reset_is_done() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let mut sibling = rig.device(&mut live, SIMPLE);
    rig.controls[1].hold(true);
    device.submit(&rig, 0, b"in flight");
    rig.machine.settle();
    let zero = live.management.out().byte(0).bytes();
    let posted = live
        .management
        .post(&live.transport, device.id, command::SET_STATUS, &zero)
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None);
    rig.echoes(&mut sibling, 0, b"nobody else waits");
    rig.controls[1].release(1);
    rig.machine.settle();
    assert!(live.management.poll(&posted).unwrap().is_some());
    assert_eq!(live.status(device.id), 0);
    assert_eq!(device.take(&rig, 0), None);
    assert_eq!(rig.messages(), []);
}

/// Requirements: S4-13, S4-16, S4-17
#[test]
fn s4_17_the_status_goes_as_over_any_transport() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(PLAIN);
    assert_eq!(live.status(id), 0);
    live.set_status(id, status::ACKNOWLEDGE);
    assert_eq!(live.status(id), status::ACKNOWLEDGE);
    let unfit = live.management.out().long(0).bytes();
    live.call(id, command::ACCEPT_FEATURES, &unfit).unwrap();
    live.set_status(
        id,
        status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK,
    );
    let shown = live.status(id);
    assert_eq!(shown & status::FEATURES_OK, 0, "not without VERSION_1");
}

/// Requirements: G4-a, G4-i, G4-j
#[test]
fn g4_i_devices_can_be_driven_in_both_layouts() {
    for wire in [Wire::Aligned, Wire::Packed] {
        let ours = match wire {
            Wire::Aligned => devices::transport_vq::Wire::Aligned,
            Wire::Packed => devices::transport_vq::Wire::Packed,
        };
        let options = devices::transport_vq::Options {
            wire: ours,
            ..Default::default()
        };
        let rig = Rig::with(1, options);
        for packed in [0, feature::RING_PACKED] {
            let mut live = rig.live_with(MANAGES | SIMPLE, wire);
            let mut device = rig.device(&mut live, SIMPLE | packed);
            rig.echoes(&mut device, 0, b"first");
            rig.echoes(&mut device, 1, b"second");
            live.transport.reset().unwrap();
        }
    }
}

/// Requirements: G4-a
#[test]
fn g4_a_answers_have_the_layout_that_is_written_down() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let create = live.management.out().word(TYPE).long(PLAIN).bytes();
    assert_eq!(create.len(), 16);
    let made = live
        .management
        .send(&live.transport, 0, command::CREATE, &create, 64);
    let made = made.unwrap();
    assert_eq!(
        (made.len(), &made[..8]),
        (16, &[0, 0, 0, 0, 8, 0, 0, 0][..])
    );
    let id = number(&made[8..]);
    let refused = live
        .management
        .send(&live.transport, 0, command::GET_STATUS, &[], 64);
    assert_eq!(refused.unwrap(), [1, code::DEVICE, 0, 0, 0, 0, 0, 0]);
    let status = live
        .management
        .send(&live.transport, id, command::GET_STATUS, &[], 64);
    assert_eq!(
        status.unwrap(),
        [0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );
    let short = live
        .management
        .send(&live.transport, id, command::GET_STATUS, &[], 9);
    assert_eq!(
        short.unwrap(),
        [0, 0, 0, 0, 1, 0, 0, 0, 0],
        "padding may be left out"
    );
}

/// The sequence that is in progress is not disturbed by a device that is gone.
#[test]
fn a_command_for_a_device_that_was_destroyed_says_so() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let id = live.create(PLAIN);
    live.call(id, command::DESTROY, &[]).unwrap();
    let outcome = live.management.negotiate(&live.transport, id, SIMPLE);
    let expected = ManagementError::Failed {
        device: id,
        command: command::SET_STATUS,
        code: code::DEVICE,
    };
    assert_eq!(outcome, Err(expected));
}

/// As many as one management device can have: each has an id, a page of doorbells and queues of its own, and one more fails.
#[test]
fn there_can_be_255_devices_and_no_more() {
    let rig = Rig::new(255);
    let mut live = rig.live();
    assert_eq!(live.resources(), [510, QUEUES, QUEUES, 255]);
    let mut devices: Vec<_> = (0..255).map(|_| rig.device(&mut live, SIMPLE)).collect();
    assert_eq!(live.resources(), [0, QUEUES, QUEUES, 0]);
    let create = live.management.out().word(TYPE).long(PLAIN).bytes();
    assert_eq!(live.call(0, command::CREATE, &create), Err(code::RESOURCE));
    let mut doorbells: Vec<_> = devices.iter().map(|device| device.doorbell(0)).collect();
    doorbells.dedup();
    assert_eq!(doorbells.len(), 255);
    for device in [0, 1, 127, 254] {
        rig.echoes(&mut devices[device], 1, b"one of many");
    }
    for device in &devices {
        live.call(device.id, command::DESTROY, &[]).unwrap();
    }
    assert_eq!(live.resources(), [510, QUEUES, QUEUES, 255]);
}
