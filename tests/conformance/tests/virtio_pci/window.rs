//! The window to the BARs in configuration space (VIRTIO_PCI_CAP_PCI_CFG).

use conformance::{ALL, Rig};
use driver::access::FunctionExt;
use driver::pci::{change_command, command};
use driver::virtio::{Transport, common, isr, status};

fn offset(region: driver::access::Region, register: u64) -> u32 {
    (region.offset + register) as u32
}

fn rig() -> (Rig, Transport<driver::host::HostFunction>) {
    let rig = Rig::new();
    let transport = rig.transport();
    (rig, transport)
}

/// Requirements: D2
#[test]
fn d2_the_window_reads_what_the_bar_reads() {
    let (_rig, transport) = rig();
    let common = transport.common_region();
    let read = |at| offset(common, at);
    assert_eq!(transport.window_get(common.bar, read(18)), Some(2u16));
    assert_eq!(transport.window_get(common.bar, read(20)), Some(0u8));
    assert_eq!(
        transport.window_get(common.bar, read(4)),
        Some(transport.get(common::DEVICE_FEATURE))
    );
    let device = transport.device_region().unwrap();
    let found: Option<u32> = transport.window_get(device.bar, offset(device, 4));
    assert_eq!(found, Some(0x0706_0504));
}

/// Requirements: D2
#[test]
fn d2_the_window_writes_what_the_bar_writes() {
    let (_rig, transport) = rig();
    let common = transport.common_region();
    transport.window_set(common.bar, offset(common, 20), 1u8);
    transport.window_set(common.bar, offset(common, 22), 1u16);
    transport.window_set(common.bar, offset(common, 8), 1u32);
    assert_eq!(transport.status(), status::ACKNOWLEDGE);
    assert_eq!(transport.get(common::QUEUE_SELECT), 1);
    assert_eq!(transport.get(common::DRIVER_FEATURE_SELECT), 1);
}

/// Requirements: D2
#[test]
fn d2_the_window_works_without_memory_decoding() {
    let (rig, transport) = rig();
    let common = transport.common_region();
    change_command(&rig.function(), 0, command::MEMORY);
    transport.window_set(common.bar, offset(common, 20), 1u8);
    assert_eq!(
        transport.window_get(common.bar, offset(common, 20)),
        Some(1u8)
    );
}

/// Requirements: D2, E6
#[test]
fn d2_the_window_notifies() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.add(1, b"through the window");
    assert!(live.queues[1].publish());
    let place = live.transport.notify_place(1);
    live.transport
        .window_set(place.bar, place.offset as u32, 1u16);
    assert_eq!(live.complete(1), 1);
}

/// Requirements: D2, E6
#[test]
fn d2_reading_the_isr_through_the_window_clears_it() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(0, b"interrupt");
    let region = live.transport.isr_region();
    let at = offset(region, 0);
    assert_eq!(live.transport.window_get(region.bar, at), Some(isr::QUEUE));
    assert_eq!(live.transport.window_get(region.bar, at), Some(0u8));
}

/// Requirements: D2
#[test]
fn d2_setting_up_the_window_accesses_nothing() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(0, b"interrupt");
    let region = live.transport.isr_region();
    let (function, window) = (rig.function(), live.transport.window().unwrap());
    function.set_config(window + 4, region.bar);
    function.set_config(window + 8, offset(region, 0));
    function.set_config(window + 12, 1u32);
    for at in (0..16).step_by(4) {
        let _: u32 = function.config(window + at);
    }
    assert_eq!(live.transport.isr(), isr::QUEUE);
}

/// Requirements: D2
#[test]
fn d2_impossible_windows_access_nothing() {
    let (rig, transport) = rig();
    let function = rig.function();
    let window = transport.window().unwrap();
    let common = transport.common_region();
    let status_at = offset(common, 20);
    for (bar, at, len) in [
        (common.bar, status_at, 0u32),
        (common.bar, status_at, 3),
        (common.bar, status_at, 8),
        (common.bar, status_at, u32::MAX),
        (common.bar, status_at + 1, 2),
        (common.bar, u32::MAX, 1),
        (common.bar, 0x7fff_fffc, 4),
        (1, status_at, 1),
        (5, status_at, 1),
        (6, status_at, 1),
        (0xff, status_at, 1),
    ] {
        function.set_config(window + 4, bar);
        function.set_config(window + 8, at);
        function.set_config(window + 12, len);
        function.set_config(window + 16, 0x0101_0101u32);
        let _: u32 = function.config(window + 16);
        assert_eq!(transport.status(), 0, "bar {bar} {at:#x}+{len:#x}");
    }
}
