//! Device reset.

use conformance::{ALL, QUIET, Rig, SIMPLE};
use driver::access::{Dma, DmaExt};
use driver::virtio::{NO_VECTOR, common, status};

/// Requirements: E1, E4
#[test]
fn e1_reset_returns_every_register_to_its_default() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(1, b"before");
    let transport = live.transport;
    transport.select(1);
    transport.set(common::DEVICE_FEATURE_SELECT, 1);
    transport.set(common::DRIVER_FEATURE_SELECT, 1);
    transport.reset().unwrap();
    assert_eq!(transport.get(common::DEVICE_FEATURE_SELECT), 0);
    assert_eq!(transport.get(common::DRIVER_FEATURE_SELECT), 0);
    assert_eq!(transport.get(common::QUEUE_SELECT), 0);
    assert_eq!(transport.accepted(), 0);
    assert_eq!(transport.get(common::CONFIG_MSIX_VECTOR), NO_VECTOR);
    for (queue, size) in [(0, 16), (1, 8)] {
        assert_eq!(transport.queue_size(queue), size);
        assert_eq!(transport.get(common::QUEUE_MSIX_VECTOR), NO_VECTOR);
        assert_eq!(transport.get(common::QUEUE_ENABLE), 0);
        assert_eq!(transport.get(common::QUEUE_RESET), 0);
        let addresses = [
            transport.get(common::QUEUE_DESC),
            transport.get(common::QUEUE_DRIVER),
            transport.get(common::QUEUE_DEVICE),
        ];
        assert_eq!(addresses, [0; 3]);
    }
    assert_eq!(transport.isr(), 0);
}

/// Requirements: E1
#[test]
fn e1_an_idle_device_shows_zero_at_once() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    live.transport.set(common::DEVICE_STATUS, 0);
    assert_eq!(live.transport.status(), 0);
    assert_eq!(rig.controls.resets(), 1 + 1, "negotiation resets, too");
}

/// Requirements: E1, S2-6
#[test]
fn e1_status_shows_zero_only_when_nothing_is_in_flight() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"one");
    live.submit(0, b"two");
    rig.settle();
    assert_eq!(rig.controls.held(), 2);
    let resets = rig.controls.resets();
    live.transport.set(common::DEVICE_STATUS, 0);
    assert_ne!(live.transport.status(), 0);
    rig.controls.release(1);
    rig.settle();
    assert_ne!(live.transport.status(), 0);
    assert_eq!(rig.controls.resets(), resets);
    rig.controls.release(1);
    rig.settle();
    assert_eq!(live.transport.status(), 0);
    assert_eq!(rig.controls.resets(), resets + 1);
}

/// Requirements: E1
#[test]
fn e1_after_zero_is_shown_memory_and_interrupts_are_quiet() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.set(common::DEVICE_STATUS, 0);
    rig.controls.release(1);
    rig.settle();
    assert_eq!(live.transport.status(), 0);
    live.interrupts();
    let layout = *live.queues[0].layout();
    let used = rig.machine.dma().bytes(layout.used, 6 + 8 * 16);
    live.submit(0, b"too late");
    live.transport.notify(0);
    rig.controls.change_config(vec![0xff; 16]);
    rig.settle();
    assert_eq!(live.interrupts(), QUIET);
    assert_eq!(rig.machine.dma().bytes(layout.used, 6 + 8 * 16), used);
}

/// Requirements: E1
#[test]
fn e1_nothing_new_is_fetched_while_a_reset_waits() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.set(common::DEVICE_STATUS, 0);
    live.submit(1, b"not any more");
    live.transport.notify(1);
    rig.settle();
    assert_eq!(rig.controls.held(), 1);
}

/// Requirements: E1
#[test]
fn e1_a_waiting_reset_cannot_be_undone() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.set(common::DEVICE_STATUS, 0);
    live.transport.set(common::DEVICE_STATUS, 0xf);
    live.transport.set(common::DEVICE_STATUS, 0);
    rig.controls.release(1);
    rig.settle();
    assert_eq!(live.transport.status(), 0);
}

/// Requirements: E1
#[test]
fn e1_a_device_can_be_started_again_after_a_reset() {
    let rig = Rig::new();
    for round in 0..3 {
        let mut live = rig.live(ALL);
        live.echo(0, &[round; 100]);
        live.echo(1, &[round; 7]);
        assert_eq!(live.interrupts(), [1, 2]);
    }
}

/// Requirements: E1
#[test]
fn e1_reset_works_in_every_state() {
    for stop_at in [0, 1, 3, 0xb, 0xf, 0x8f] {
        let rig = Rig::new();
        let transport = rig.transport();
        transport.accept(ALL);
        for bit in [1, 2, 8, 4, 0x80] {
            if stop_at & bit != 0 {
                transport.add_status(bit);
            }
        }
        assert_eq!(transport.status(), stop_at);
        transport.reset().unwrap();
        assert_eq!(transport.status(), 0, "{stop_at:#x}");
    }
}

/// Requirements: E1
#[test]
fn e1_reset_cures_a_device_that_needs_it() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let avail = live.queues[0].layout().avail_index();
    rig.machine.dma().store(avail, 1000);
    live.transport.notify(0);
    rig.settle();
    assert!(live.needs_reset());
    drop(live);
    live = rig.live(ALL);
    assert_eq!(live.transport.status() & status::NEEDS_RESET, 0);
    live.echo(0, b"cured");
}
