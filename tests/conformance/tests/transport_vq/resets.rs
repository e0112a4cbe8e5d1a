//! Resets of the management device.

use std::time::Duration;

use devices::gate::{Patience, Reasons};
use driver::access::FunctionExt;
use driver::pci::{
    bars, change_command, command as pci_command, find_capability, id, set_bar_address,
};
use driver::virtio::management::{code, command};

use crate::rig::{Device, Live, Rig, SIMPLE};

/// A device with a request that its storage has not answered.
fn busy(rig: &Rig, live: &mut Live) -> Device {
    let mut device = rig.device(live, SIMPLE);
    rig.controls[1].hold(true);
    device.submit(rig, 0, b"in flight");
    rig.machine.settle();
    assert_eq!(rig.controls[1].held(), 1);
    device
}

/// The machine after the request came back: no device, and nothing was seen of it.
fn check_gone(rig: &Rig, mut device: Device) {
    assert_eq!(device.take(rig, 0), None);
    assert_eq!(rig.messages(), []);
    rig.controls[1].hold(false);
    let decode = pci_command::MEMORY | pci_command::BUS_MASTER;
    change_command(&rig.function(), decode, 0);
    let mut live = rig.live();
    assert_eq!(live.resources()[3], 1);
    assert_eq!(
        live.call(device.id, command::GET_STATUS, &[]),
        Err(code::DEVICE)
    );
    let mut next = rig.device(&mut live, SIMPLE);
    assert!(next.id > device.id);
    rig.echoes(&mut next, 0, b"another");
}

/// Requirements: G4-m
#[test]
fn g4_m_a_reset_ends_all_devices_and_waits_for_what_they_have_in_flight() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = busy(&rig, &mut live);
    let status = driver::virtio::common::DEVICE_STATUS;
    live.transport.set(status, 0);
    rig.machine.settle();
    assert_ne!(live.transport.get(status), 0, "it waits");
    rig.controls[1].release(1);
    rig.machine.settle();
    assert_eq!(live.transport.get(status), 0);
    check_gone(&rig, device);
}

/// Requirements: G4-m, E3
#[test]
fn g4_m_so_does_a_function_level_reset() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = busy(&rig, &mut live);
    let function = rig.function();
    let bar = bars(&function)[0];
    let express = find_capability(&function, id::EXPRESS).unwrap().unwrap();
    function.set_config::<u16>(express.offset + 8, 1 << 15);
    let pending = || function.config::<u16>(express.offset + 10) & 1 << 5 != 0;
    assert!(pending(), "Transactions Pending");
    rig.controls[1].release(1);
    rig.machine.settle();
    assert!(!pending());
    set_bar_address(&function, &bar, bar.address);
    check_gone(&rig, device);
}

/// A command that waits for a device is called off with the queue; what it began goes on.
#[test]
fn a_reset_does_not_wait_for_the_command_that_waits() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    let device = busy(&rig, &mut live);
    let posted = live
        .management
        .post(&live.transport, device.id, command::DESTROY, &[])
        .unwrap();
    rig.machine.settle();
    assert_eq!(live.management.poll(&posted).unwrap(), None);
    let status = driver::virtio::common::DEVICE_STATUS;
    live.transport.set(status, 0);
    rig.controls[1].release(1);
    rig.machine.settle();
    assert_eq!(live.transport.get(status), 0);
    assert_eq!(live.management.poll(&posted).unwrap(), None, "no answer");
    check_gone(&rig, device);
}

/// A pause waits for a reset that waits for a managed device.
#[test]
fn a_pause_waits_for_the_end_of_a_reset() {
    let rig = Rig::new(1);
    let mut live = rig.live();
    busy(&rig, &mut live);
    live.transport.set(driver::virtio::common::DEVICE_STATUS, 0);
    rig.machine.settle();
    let own = &rig.manager.function;
    for function in rig.seats.iter().chain([own]) {
        function.close(Reasons::PAUSED);
    }
    let at_once = Patience::prompt(Duration::ZERO);
    assert!(!own.stop(Reasons::PAUSED, at_once));
    assert!(own.save_transient().is_err());
    rig.controls[1].release(1);
    rig.machine.settle();
    assert!(own.stop(Reasons::PAUSED, at_once));
    let managed = own.with_manager(|manager| manager.save()).unwrap();
    assert!(managed.devices.is_empty());
    assert!(own.save_transient().is_ok());
}
