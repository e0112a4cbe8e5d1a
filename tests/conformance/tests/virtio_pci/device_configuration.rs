//! The device configuration and its generation.

use conformance::{ALL, QUIET, Rig};
use driver::access::Register;
use driver::host::{Place, Shape};
use driver::pci::{change_command, command};
use driver::virtio::{common, status};

fn bytes(rig: &Rig) -> Vec<u8> {
    let transport = rig.transport();
    (0..16)
        .map(|at| transport.device_get(Register::<u8>::at(at)))
        .collect()
}

/// Requirements: E7
#[test]
fn e7_fields_read_the_same_in_every_width() {
    let rig = Rig::new();
    let transport = rig.transport();
    assert_eq!(bytes(&rig), (0..16).collect::<Vec<u8>>());
    assert_eq!(transport.device_get(Register::<u16>::at(2)), 0x0302);
    assert_eq!(transport.device_get(Register::<u32>::at(4)), 0x0706_0504);
    let wide: u64 = transport.device_get(Register::at(8));
    assert_eq!(wide, 0x0f0e_0d0c_0b0a_0908);
}

/// Requirements: E7, D2
#[test]
fn e7_the_capability_is_as_long_as_the_configuration() {
    for len in [1, 16, 60, 3840] {
        let shape = Shape {
            config: vec![1; len],
            ..Shape::default()
        };
        let rig = Rig::with(shape, Place::RootBus);
        let region = rig.transport().device_region().unwrap();
        assert_eq!(region.len, len as u64);
        assert_eq!(region.offset % 4, 0);
    }
}

/// Requirements: D2
#[test]
fn d2_a_device_without_configuration_has_no_capability_for_it() {
    let shape = Shape {
        config: Vec::new(),
        ..Shape::default()
    };
    let rig = Rig::with(shape, Place::RootBus);
    assert_eq!(rig.transport().device_region(), None);
    rig.live(ALL).echo(0, b"needs none");
}

/// Requirements: E7
#[test]
fn e7_writes_reach_the_device_and_writes_past_the_end_do_not() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.device_set(Register::<u16>::at(4), 0xbeef);
    transport.device_set(Register::<u32>::at(14), 0xffff_ffff);
    transport.device_set(Register::<u8>::at(16), 0xff);
    let mut expected: Vec<u8> = (0..16).collect();
    expected[4..6].copy_from_slice(&[0xef, 0xbe]);
    assert_eq!(bytes(&rig), expected);
    assert_eq!(transport.device_get(Register::<u32>::at(14)), 0x0f0e);
}

/// Requirements: B-52, E7
#[test]
fn b52_a_change_shows_in_generation_isr_and_interrupt() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let before: u8 = live.transport.get(common::CONFIG_GENERATION);
    rig.controls.change_config(vec![0xaa; 16]);
    rig.settle();
    assert_eq!(bytes(&rig), [0xaa; 16]);
    assert_ne!(live.transport.get(common::CONFIG_GENERATION), before);
    assert_eq!(live.interrupts(), [0]);
}

/// Requirements: B-52
#[test]
fn b52_generation_stands_still_without_a_change() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let before: u8 = live.transport.get(common::CONFIG_GENERATION);
    live.transport.device_set(Register::<u8>::at(0), 9);
    live.echo(0, b"no change");
    bytes(&rig);
    assert_eq!(live.transport.get(common::CONFIG_GENERATION), before);
}

/// Requirements: B-52
#[test]
fn b52_every_change_has_a_generation_of_its_own() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let mut before: u8 = live.transport.get(common::CONFIG_GENERATION);
    for n in 0..300u32 {
        rig.controls.change_config(vec![n as u8; 16]);
        rig.settle();
        let now = live.transport.get(common::CONFIG_GENERATION);
        assert_ne!(now, before, "change {n}");
        before = now;
    }
}

/// Requirements: B-52, E7
#[test]
fn b52_a_change_before_driver_ok_shows_in_the_generation_at_once() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.negotiate(ALL).unwrap();
    let before: u8 = transport.get(common::CONFIG_GENERATION);
    rig.controls.change_config(vec![0xaa; 16]);
    rig.settle();
    assert_eq!(bytes(&rig), [0xaa; 16]);
    assert_ne!(transport.get(common::CONFIG_GENERATION), before);
    assert_eq!(rig.machine.msi().take_vectors(), QUIET);
}

/// Requirements: E7
#[test]
fn e7_a_change_before_driver_ok_is_announced_by_then() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.negotiate(ALL).unwrap();
    conformance::enable_msix(&transport);
    transport.set_config_vector(0).unwrap();
    rig.controls.change_config(vec![0xaa; 16]);
    rig.settle();
    assert_eq!(rig.machine.msi().take_vectors(), QUIET);
    transport.start();
    rig.settle();
    assert_eq!(rig.machine.msi().take_vectors(), [0]);
}

/// Requirements: B-52, E10
#[test]
fn b52_a_change_without_bus_mastering_is_announced_afterwards() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    change_command(&rig.function(), 0, command::BUS_MASTER);
    rig.controls.change_config(vec![0xaa; 16]);
    rig.settle();
    assert_eq!(live.interrupts(), QUIET);
    change_command(&rig.function(), command::BUS_MASTER, 0);
    rig.settle();
    assert_eq!(live.interrupts(), [0]);
    assert_eq!(live.transport.status() & status::NEEDS_RESET, 0);
}
