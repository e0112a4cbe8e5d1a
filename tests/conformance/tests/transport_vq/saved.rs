//! Managed devices as state.

use devices::state::{FunctionState, Kept, ManagerState, TransientState};
use devices::transport_vq::{NAME, StateError};
use driver::host::Machine;
use driver::virtio::feature;
use driver::virtio::management::command;

use crate::rig::{Device, Live, Rig, SIMPLE};

/// All there is of a management device and what it manages.
#[derive(Debug, PartialEq)]
struct Saved {
    own: (FunctionState, TransientState),
    devices: Vec<(FunctionState, TransientState)>,
}

fn save(rig: &Rig) -> Saved {
    let one = |function: &devices::virtio::VirtioFunction| {
        (function.save(), function.save_transient().unwrap())
    };
    Saved {
        own: one(&rig.manager.function),
        devices: rig.seats.iter().map(|seat| one(seat)).collect(),
    }
}

/// The managed devices of a management device.
fn managed(state: &TransientState) -> &ManagerState {
    match &state.services[NAME].kept {
        Kept::Managed(state) => state,
        Kept::Nothing => panic!("a management device keeps them"),
    }
}

fn restore(rig: &Rig, saved: &Saved) {
    let own = &rig.manager.function;
    own.restore_exact(&saved.own.0, &saved.own.1).unwrap();
    for (seat, (state, transient)) in rig.seats.iter().zip(&saved.devices) {
        seat.restore_exact(state, transient).unwrap();
    }
}

/// A machine over the same memory.
fn successor(rig: &Rig) -> Rig {
    let machine = Machine::with_memory(rig.machine.dma().clone()).unwrap();
    Rig::in_machine(machine, rig.seats.len(), Default::default())
}

/// Requirements: S4-41
#[test]
fn what_is_saved_is_what_was_restored_and_devices_go_on() {
    let rig = Rig::new(3);
    let mut live = rig.live();
    let mut split = rig.device(&mut live, SIMPLE);
    let mut packed = rig.device(&mut live, SIMPLE | feature::RING_PACKED);
    for device in [&mut split, &mut packed] {
        rig.echoes(device, 0, b"before");
    }
    live.switch(split.id, command::MASK_QUEUE_MSI, 0, 0)
        .unwrap();
    split.submit(&rig, 0, b"behind a mask");
    rig.machine.settle();
    rig.messages();
    let saved = save(&rig);
    let managed = managed(&saved.own.1);
    assert!(managed.devices[0].queues[0].pending);
    let next = successor(&rig);
    restore(&next, &saved);
    assert_eq!(save(&next), saved);
    go_on(&next, live, split, packed);
}

fn go_on(rig: &Rig, live: Live, mut split: Device, mut packed: Device) {
    assert_eq!(split.take(rig, 0).as_deref(), Some(&b"behind a mask"[..]));
    let mut live = live.moved(rig);
    for device in [&mut split, &mut packed] {
        device.find_doorbells(&mut live);
    }
    live.switch(split.id, command::MASK_QUEUE_MSI, 0, 1)
        .unwrap();
    assert_eq!(rig.messages().len(), 1, "it was owed");
    rig.echoes(&mut split, 0, b"after");
    rig.echoes(&mut packed, 0, b"after");
    let third = live.create(feature::VERSION_1);
    assert!(third > packed.id, "ids go on");
}

/// Requirements: S4-41
#[test]
fn s4_41_queues_that_are_not_enabled_keep_their_places() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let mut devices = [SIMPLE, SIMPLE | feature::RING_PACKED].map(|features| {
        let mut device = rig.device(&mut live, features);
        (0..11).for_each(|_| rig.echoes(&mut device, 0, b"before"));
        live.switch(device.id, command::SET_ENABLE, 0, 0).unwrap();
        device
    });
    let saved = save(&rig);
    // As snapshots and migrations have it.
    for (seat, (state, _)) in rig.seats.iter().zip(&saved.devices) {
        let shape = seat.shape();
        let bytes = devices::context::encode(state, &shape);
        let mut decoder = devices::context::Decoder::new(&shape);
        decoder.push(&bytes).unwrap();
        assert_eq!(decoder.take_latest().as_ref(), Some(state));
    }
    let next = successor(&rig);
    restore(&next, &saved);
    assert_eq!(save(&next), saved);
    let mut live = live.moved(&next);
    for device in &mut devices {
        device.find_doorbells(&mut live);
        live.switch(device.id, command::SET_ENABLE, 0, 1).unwrap();
        next.echoes(device, 0, b"after");
    }
}

/// A command that waits is executed anew.
#[test]
fn a_command_that_waits_moves_along() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    rig.controls[1].hold(true);
    rig.controls[1].give_up(true);
    device.submit(&rig, 0, b"in flight");
    rig.machine.settle();
    let off = live.management.out().half(0).byte(0).bytes();
    let posted = live
        .management
        .post(&live.transport, device.id, command::SET_ENABLE, &off)
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None);
    let paused = devices::gate::Reasons::PAUSED;
    for function in rig.seats.iter().chain([&rig.manager.function]) {
        function.close(paused);
        function.recall();
    }
    let saved = save(&rig);
    let next = successor(&rig);
    restore(&next, &saved);
    next.machine.settle();
    let mut live = live.moved(&next);
    assert_eq!(device.take(&next, 0).as_deref(), Some(&b"in flight"[..]));
    assert!(live.management.poll(&posted).unwrap().is_some());
    let shown = live.of_queue(device.id, command::GET_ENABLE, 0).unwrap();
    assert_eq!(shown[2], 0);
}

/// Hostile states are refused whole.
#[test]
fn states_that_cannot_be_are_refused_by_name() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    rig.device(&mut live, SIMPLE);
    rig.device(&mut live, SIMPLE);
    let saved = save(&rig);
    let mut lacks = saved.own.1.clone();
    lacks.services.get_mut(NAME).unwrap().kept = Kept::Nothing;
    let missing = Rig::new(2)
        .manager
        .function
        .restore_exact(&saved.own.0, &lacks);
    assert!(missing.unwrap_err().to_string().contains("missing"));
    let saved = managed(&saved.own.1).clone();
    type Change = fn(&mut ManagerState);
    let name = || "manager-device1".to_owned();
    let cases: [(Change, StateError); 11] = [
        (|s| s.next_id = 0, StateError::Id(0)),
        (|s| s.next_id = 2, StateError::Id(2)),
        (|s| s.devices[0].id = 0, StateError::Id(0)),
        (|s| s.devices[1].id = 1, StateError::Id(1)),
        (
            |s| s.devices[0].name = "x".into(),
            StateError::Unknown("x".into()),
        ),
        (
            |s| s.devices[1].name = s.devices[0].name.clone(),
            StateError::Unknown(name()),
        ),
        (
            |s| s.devices[0].features |= 1 << 6,
            StateError::Features {
                name: name(),
                features: 1 << 6,
            },
        ),
        (
            |s| s.devices[0].queues.clear(),
            StateError::Count {
                name: name(),
                found: 0,
                expected: 2,
            },
        ),
        (
            |s| s.devices[0].queues[1].address = 6,
            StateError::Address {
                name: name(),
                address: 6,
            },
        ),
        (
            |s| s.devices[0].config.pending = true,
            StateError::Pending(name()),
        ),
        (
            |s| s.devices[0].queues.push(Default::default()),
            StateError::Count {
                name: name(),
                found: 3,
                expected: 2,
            },
        ),
    ];
    let next = Rig::new(2);
    for (change, expected) in cases {
        let mut bad = saved.clone();
        change(&mut bad);
        let outcome = next.manager.function.with_manager(|m| m.restore(&bad));
        assert_eq!(outcome, Some(Err(expected)));
        let left = next.manager.function.with_manager(|m| m.save()).unwrap();
        assert!(left.devices.is_empty(), "nothing of it");
    }
    let twice = rig.manager.function.with_manager(|m| m.check(&saved));
    assert_eq!(twice, Some(Err(StateError::Busy)));
}
