//! Messages of managed devices: class 7.

use driver::pci::{change_command, command as pci_command};
use driver::virtio::management::{Wire, command, number};

use crate::rig::{Device, Live, MANAGES, MESSAGES, Rig, SIMPLE};

/// The message of queue 0 of `device`.
fn message(device: &Device) -> (u64, u32) {
    (MESSAGES | device.id << 12, 0)
}

fn use_one(rig: &Rig, device: &mut Device) {
    device.submit(rig, 0, b"one");
    rig.machine.settle();
    device.take(rig, 0).unwrap();
}

/// Requirements: S4-25, M18
#[test]
fn s4_25_each_queue_has_a_message_of_its_own() {
    let rig = Rig::new(2);
    let mut live = rig.live();
    let mut first = rig.device(&mut live, SIMPLE);
    let mut second = rig.device(&mut live, SIMPLE);
    use_one(&rig, &mut first);
    assert_eq!(rig.messages(), [message(&first)]);
    second.submit(&rig, 1, b"one");
    rig.machine.settle();
    let (address, _) = message(&second);
    assert_eq!(rig.messages(), [(address, 1)]);
    let moved = live
        .management
        .out()
        .half(0)
        .long(0xfee0_1000)
        .word(77)
        .bytes();
    live.call(first.id, command::SET_QUEUE_MSI, &moved).unwrap();
    use_one(&rig, &mut first);
    assert_eq!(rig.messages(), [(0xfee0_1000, 77)]);
}

/// Requirements: S4-23, M20, M21, G4-c
#[test]
fn s4_23_masked_messages_are_remembered_and_disabled_ones_dropped() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let id = device.id;
    live.switch(id, command::MASK_QUEUE_MSI, 0, 0).unwrap();
    use_one(&rig, &mut device);
    use_one(&rig, &mut device);
    assert_eq!(rig.messages(), []);
    live.switch(id, command::MASK_QUEUE_MSI, 0, 1).unwrap();
    assert_eq!(rig.messages(), [message(&device)], "one for both");
    live.switch(id, command::ENABLE_QUEUE_MSI, 0, 0).unwrap();
    use_one(&rig, &mut device);
    live.switch(id, command::ENABLE_QUEUE_MSI, 0, 1).unwrap();
    assert_eq!(rig.messages(), [], "forgotten");
    live.switch(id, command::MASK_QUEUE_MSI, 0, 0).unwrap();
    use_one(&rig, &mut device);
    live.switch(id, command::ENABLE_QUEUE_MSI, 0, 0).unwrap();
    live.switch(id, command::ENABLE_QUEUE_MSI, 0, 1).unwrap();
    live.switch(id, command::MASK_QUEUE_MSI, 0, 1).unwrap();
    assert_eq!(rig.messages(), [], "disabling forgets what was pending");
}

/// Requirements: S4-23
#[test]
fn s4_23_the_configuration_has_a_message_as_well() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = rig.device(&mut live, SIMPLE);
    let out = || live.management.out();
    let (set, one, zero) = (
        out().long(0xfee0_2000).word(5).bytes(),
        out().byte(1).bytes(),
        out().byte(0).bytes(),
    );
    let change = |value| {
        rig.controls[1].change_config(vec![value; 16]);
        rig.machine.settle();
    };
    change(1);
    assert_eq!(rig.messages(), [], "disabled");
    live.call(device.id, command::SET_CONFIG_MSI, &set).unwrap();
    live.call(device.id, command::ENABLE_CONFIG_MSI, &one)
        .unwrap();
    change(2);
    assert_eq!(rig.messages(), [(0xfee0_2000, 5)]);
    live.call(device.id, command::MASK_CONFIG_MSI, &zero)
        .unwrap();
    change(3);
    assert_eq!(rig.messages(), []);
    let shown = live.call(device.id, command::GET_CONFIG_MSI, &[]).unwrap();
    assert_eq!(
        (number(&shown[..8]), number(&shown[8..12])),
        (0xfee0_2000, 5)
    );
    assert_eq!(shown[12..15], [1, 0, 1], "enabled, masked, pending");
    live.call(device.id, command::MASK_CONFIG_MSI, &one)
        .unwrap();
    assert_eq!(rig.messages(), [(0xfee0_2000, 5)]);
}

/// What GET says of a queue's message in the aligned layout: enabled, unmasked, pending.
fn switches(live: &mut Live, id: u64, queue: u16) -> [u8; 3] {
    let shown = live.of_queue(id, command::GET_QUEUE_MSI, queue).unwrap();
    assert_eq!(number(&shown[..2]), u64::from(queue));
    [shown[20], shown[21], shown[22]]
}

/// Requirements: S4-24, M19, G4-h
#[test]
fn s4_24_after_a_reset_nothing_interrupts() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    let id = device.id;
    let out = || live.management.out();
    let (message, on) = (
        out().long(0xfee0_2000).word(5).bytes(),
        out().byte(1).bytes(),
    );
    live.call(id, command::SET_CONFIG_MSI, &message).unwrap();
    live.call(id, command::ENABLE_CONFIG_MSI, &on).unwrap();
    live.switch(id, command::MASK_QUEUE_MSI, 0, 0).unwrap();
    use_one(&rig, &mut device);
    assert_eq!(switches(&mut live, id, 0), [1, 0, 1]);
    assert_eq!(switches(&mut live, id, 1), [1, 1, 0]);
    live.set_status(id, 0);
    for queue in 0..2 {
        assert_eq!(switches(&mut live, id, queue), [0, 1, 0]);
    }
    live.switch(id, command::ENABLE_QUEUE_MSI, 0, 1).unwrap();
    assert_eq!(rig.messages(), []);
    let shown = live.call(id, command::GET_CONFIG_MSI, &[]).unwrap();
    assert_eq!(shown[12..15], [0, 1, 0], "nor does the configuration");
}

/// Requirements: G4-h, M24
#[test]
fn g4_h_in_the_packed_layout_messages_are_read_without_the_index() {
    let options = devices::transport_vq::Options {
        wire: devices::transport_vq::Wire::Packed,
        ..Default::default()
    };
    let rig = Rig::with(1, options);
    let mut live = rig.live_with(MANAGES | SIMPLE, Wire::Packed);
    let device = rig.device(&mut live, SIMPLE);
    let shown = live.of_queue(device.id, command::GET_QUEUE_MSI, 1).unwrap();
    let (address, _) = message(&device);
    assert_eq!((number(&shown[..8]), number(&shown[8..12])), (address, 1));
    assert_eq!(shown[12..], [1, 1, 0]);
}

/// Requirements: S4-23
#[test]
fn s4_23_messages_wait_for_bus_master_enable_of_the_management_device() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let mut device = rig.device(&mut live, SIMPLE);
    change_command(&rig.function(), 0, pci_command::BUS_MASTER);
    device.submit(&rig, 0, b"one");
    rig.machine.settle();
    assert_eq!(device.take(&rig, 0), None, "no memory is reached");
    assert_eq!(rig.messages(), []);
    change_command(&rig.function(), pci_command::BUS_MASTER, 0);
    rig.machine.settle();
    assert_eq!(device.take(&rig, 0).as_deref(), Some(&b"one"[..]));
    assert_eq!(rig.messages(), [message(&device)]);
}
