//! Notifications of the device: register and doorbells; and the ISR status.

use std::collections::BTreeSet;

use conformance::{ALL, Rig, SIMPLE};
use driver::access::{FunctionExt, Register};
use driver::host::{Notifications, Place, Shape};
use driver::pci::{bars, change_command, command, set_bar_address};
use driver::virtio::{common, isr, status};

/// Requirements: E6
#[test]
fn e6_every_notification_register_lies_in_the_structure() {
    let shape = Shape {
        queues: vec![16; 64],
        ..Shape::default()
    };
    let rig = Rig::with(shape, Place::RootBus);
    let transport = rig.transport();
    let region = transport.notify_region();
    let mut places = BTreeSet::new();
    for queue in 0..64 {
        let place = transport.notify_place(queue);
        assert_eq!(place.offset % 2, 0);
        assert!(place.offset + 2 <= region.offset + region.len, "{queue}");
        places.insert(place.offset);
    }
    assert_eq!(places.len(), 64);
}

/// Requirements: E6
#[test]
fn e6_a_write_to_the_register_notifies_its_queue() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(0, b"by register");
    live.echo(1, b"by register");
}

/// Requirements: E6
#[test]
fn e6_a_write_of_32_bits_notifies_as_well() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.add(1, b"wide");
    assert!(live.queues[1].publish());
    let place = live.transport.notify_place(1);
    rig.function().set(place, Register::<u32>::at(0), 1);
    assert_eq!(live.complete(1), 1);
}

/// Requirements: E6
#[test]
fn e6_notifications_of_queues_that_do_not_exist_are_ignored() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let place = live.transport.notify_place(1);
    for offset in (4..64).step_by(4) {
        rig.function().set(place, Register::<u16>::at(offset), 9);
    }
    live.echo(0, b"unharmed");
}

/// Requirements: E6
#[test]
fn e6_a_doorbell_notifies_without_the_register() {
    for place in [Place::RootBus, Place::BehindPort] {
        let rig = Rig::with(Shape::default(), place);
        rig.machine.set_notifications(Notifications::Doorbell);
        let mut live = rig.live(ALL);
        assert_eq!(rig.machine.registered_doorbells().len(), 2);
        live.echo(0, b"by doorbell");
        live.echo(1, b"by doorbell");
    }
}

/// Requirements: E6
#[test]
fn e6_doorbells_are_where_the_driver_writes() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let function = rig.function();
    let expected: Vec<u64> = [0, 1]
        .map(|queue| live.transport.notify_place(queue))
        .map(|place| function.bar_address(place.bar, place.offset))
        .into();
    let found: Vec<u64> = rig
        .machine
        .registered_doorbells()
        .iter()
        .map(|d| d.address)
        .collect();
    assert_eq!(found, expected);
}

/// Requirements: E6, E1
#[test]
fn e6_there_are_doorbells_for_enabled_queues_of_a_live_device_only() {
    let rig = Rig::new();
    let count = || rig.machine.registered_doorbells().len();
    assert_eq!(count(), 0);
    let live = rig.live(ALL);
    assert_eq!(count(), 2);
    live.transport.reset_queue(1).unwrap();
    assert_eq!(count(), 1);
    live.transport
        .enable_queue(1, live.queues[1].layout(), 2)
        .unwrap();
    assert_eq!(count(), 2);
    live.transport.reset().unwrap();
    assert_eq!(count(), 0);
}

/// Requirements: E6
#[test]
fn e6_doorbells_move_with_the_bar() {
    let rig = Rig::new();
    rig.machine.set_notifications(Notifications::Doorbell);
    let mut live = rig.live(ALL);
    let function = rig.function();
    let bar = bars(&function)[0];
    change_command(&function, 0, command::MEMORY);
    assert!(rig.machine.registered_doorbells().is_empty());
    set_bar_address(&function, &bar, bar.address + 16 * bar.size);
    change_command(&function, command::MEMORY, 0);
    let place = live.transport.notify_place(0);
    let address = function.bar_address(place.bar, place.offset);
    let first = rig.machine.registered_doorbells()[0].address;
    assert_eq!(first, address);
    live.echo(0, b"moved");
}

/// Requirements: E6
#[test]
fn e6_buffers_made_available_before_driver_ok_are_not_forgotten() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    // Again from the start, but with a buffer on the ring before DRIVER_OK.
    live.transport.negotiate(ALL).unwrap();
    live.queues[0].clear();
    live.add(0, b"early");
    let _ = live.queues[0].publish();
    let layout = *live.queues[0].layout();
    live.transport.enable_queue(0, &layout, 1).unwrap();
    assert_eq!(live.complete(0), 0, "the device is not live");
    live.transport.start();
    assert_eq!(live.complete(0), 1);
}

/// Requirements: E6
#[test]
fn e6_isr_shows_what_happened_and_reading_clears_it() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    live.transport
        .msix()
        .unwrap()
        .set_control(&rig.function(), false, false);
    assert_eq!(live.transport.isr(), 0);
    live.echo(0, b"queue");
    assert_eq!(live.transport.isr(), isr::QUEUE);
    assert_eq!(live.transport.isr(), 0);
    rig.controls.change_config(vec![1; 16]);
    rig.settle();
    assert_eq!(live.transport.isr(), isr::CONFIG);
    live.echo(0, b"queue");
    rig.controls.change_config(vec![2; 16]);
    rig.settle();
    assert_eq!(live.transport.isr(), isr::QUEUE | isr::CONFIG);
    assert_eq!(live.transport.isr(), 0);
}

/// Requirements: E6
#[test]
fn e6_isr_ignores_writes() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    rig.function()
        .set(live.transport.isr_region(), Register::<u8>::at(0), 0xff);
    assert_eq!(live.transport.isr(), 0);
}

/// Requirements: E6
#[test]
fn e6_reading_the_notification_register_does_nothing() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let place = live.transport.notify_place(0);
    let _: u16 = rig.function().get(place, Register::at(0));
    assert_eq!(
        live.transport.get(common::DEVICE_STATUS) & status::NEEDS_RESET,
        0
    );
}
