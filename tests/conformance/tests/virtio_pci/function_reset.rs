//! Function level reset.

use conformance::{ALL, QUIET, Rig, SIMPLE, config_bytes};
use driver::access::{DmaExt, FunctionExt};
use driver::host::{HostFunction, Place, Shape};
use driver::pci::{
    bars, change_command, command, express, find_capability, header, id, request_flr,
    set_bar_address,
};
use driver::virtio::{NO_VECTOR, common};

/// What an operating system does after an FLR: puts back what it saved.
fn restore(function: &HostFunction, address: u64) {
    let bar = bars(function)[0];
    set_bar_address(function, &bar, address);
    change_command(function, command::MEMORY | command::BUS_MASTER, 0);
}

fn transactions_pending(function: &HostFunction) -> bool {
    let express = find_capability(function, id::EXPRESS).unwrap().unwrap();
    let status: u16 = function.config(express.offset + express::DEVICE_STATUS);
    status & express::TRANSACTIONS_PENDING != 0
}

/// Requirements: E3
#[test]
fn e3_flr_returns_configuration_space_to_its_reset_values() {
    for place in [Place::RootBus, Place::BehindPort] {
        let rig = Rig::with(Shape::default(), place);
        let function = rig.function();
        change_command(&function, 0, 0xffff);
        let bar = bars(&function)[0];
        set_bar_address(&function, &bar, 0);
        let fresh = config_bytes(&function, 0..256);
        restore(&function, bar.address);
        let _live = rig.live(ALL);
        assert_ne!(config_bytes(&function, 0..256), fresh);
        assert!(request_flr(&function));
        assert_eq!(config_bytes(&function, 0..256), fresh);
    }
}

/// Requirements: E3
#[test]
fn e3_flr_answers_at_once() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"in flight");
    rig.settle();
    request_flr(&rig.function());
    let vendor: u16 = rig.function().config(header::VENDOR_ID);
    let command: u16 = rig.function().config(header::COMMAND);
    assert_eq!((vendor, command), (0x1af4, 0));
}

/// Requirements: E3, E4
#[test]
fn e3_flr_resets_the_device_and_its_vectors() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(0, b"before");
    let function = rig.function();
    let address = function.bar_address(0, 0);
    let msix = *live.transport.msix().unwrap();
    request_flr(&function);
    restore(&function, address);
    assert_eq!(live.transport.status(), 0);
    assert_eq!(live.transport.accepted(), 0);
    assert_eq!(live.transport.get(common::CONFIG_MSIX_VECTOR), NO_VECTOR);
    assert_eq!(live.transport.queue_size(0), 16);
    assert_eq!(live.transport.get(common::QUEUE_ENABLE), 0);
    assert!(!msix.is_enabled(&function));
    for vector in 0..msix.vectors {
        let entry = msix.entry(&function, vector);
        assert_eq!((entry.address, entry.data, entry.masked), (0, 0, true));
    }
    assert!(rig.machine.registered_doorbells().is_empty());
}

/// Requirements: E3
#[test]
fn e3_transactions_are_pending_until_nothing_is_in_flight() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    let function = rig.function();
    assert!(!transactions_pending(&function));
    rig.controls.hold(true);
    live.submit(0, b"in flight");
    rig.settle();
    request_flr(&function);
    assert!(transactions_pending(&function));
    rig.controls.release(1);
    rig.settle();
    assert!(!transactions_pending(&function));
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E3
#[test]
fn e3_memory_is_not_written_once_no_transactions_are_pending() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    live.echo(0, b"before");
    let function = rig.function();
    request_flr(&function);
    assert!(!transactions_pending(&function));
    let to = live.submit(0, b"too late");
    rig.plugged.function.kick(0);
    rig.settle();
    assert_eq!(rig.machine.dma().bytes(to, 8), [0; 8]);
    assert_eq!(live.complete(0), 0);
}

/// Requirements: E3
#[test]
fn e3_a_device_works_again_after_flr() {
    let rig = Rig::new();
    for round in 0..3 {
        let mut live = rig.live(ALL);
        live.echo(0, &[round; 9]);
        assert_eq!(live.interrupts(), [1]);
        let address = rig.function().bar_address(0, 0);
        request_flr(&rig.function());
        restore(&rig.function(), address);
    }
}

/// Requirements: E3
#[test]
fn e3_flr_of_one_function_leaves_others_alone() {
    use driver::host::Loopback;
    let rig = Rig::new();
    let (other, _controls) = Loopback::new(Shape::default()).unwrap();
    let plugged = rig.machine.add("other", other, Place::RootBus).unwrap();
    rig.machine.power_on().unwrap();
    let mut live = rig.live(ALL);
    let other = rig.machine.function(rig.machine.locate(&plugged));
    assert!(request_flr(&other));
    live.echo(0, b"unharmed");
}
