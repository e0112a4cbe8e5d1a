//! Device status and feature negotiation.

use conformance::{ALL, Rig};
use driver::virtio::{common, feature, status};

/// Requirements: E2
#[test]
fn e2_features_that_are_not_offered_are_refused() {
    for extra in [1 << 0, 1 << 24, 1 << 34, 1 << 41, 1 << 63] {
        let rig = Rig::new();
        let transport = rig.transport();
        transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
        transport.accept(feature::VERSION_1 | extra);
        transport.add_status(status::FEATURES_OK);
        let refused = transport.status() & status::FEATURES_OK == 0;
        assert!(refused, "{extra:#x} was accepted");
    }
}

/// Requirements: E2
#[test]
fn e2_a_driver_without_version_1_is_refused() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.accept(feature::RING_RESET);
    transport.add_status(status::FEATURES_OK);
    assert_eq!(transport.status(), status::ACKNOWLEDGE | status::DRIVER);
}

/// Requirements: E2
#[test]
fn e2_a_refused_driver_may_try_again_with_less() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.accept(feature::VERSION_1 | 1 << 50);
    transport.add_status(status::FEATURES_OK);
    transport.accept(feature::VERSION_1);
    transport.add_status(status::FEATURES_OK);
    assert_ne!(transport.status() & status::FEATURES_OK, 0);
}

/// Requirements: E2
#[test]
fn e2_a_driver_may_accept_any_part_of_what_is_offered() {
    for part in [0, feature::INDIRECT_DESC, feature::EVENT_IDX, ALL, 1 << 5] {
        let rig = Rig::new();
        let agreed = rig.transport().negotiate(part).unwrap();
        assert_eq!(agreed, part | feature::VERSION_1);
        rig.transport().start();
        assert_eq!(rig.controls.activations(), [agreed]);
    }
}

/// Requirements: E2
#[test]
fn e2_unused_feature_windows_read_zero_and_take_zero() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.accept(feature::VERSION_1);
    for select in [2, 3, 4, 0xffff_ffff] {
        transport.set(common::DEVICE_FEATURE_SELECT, select);
        assert_eq!(transport.get(common::DEVICE_FEATURE), 0, "{select}");
        transport.set(common::DRIVER_FEATURE_SELECT, select);
        transport.set(common::DRIVER_FEATURE, 0);
        assert_eq!(transport.get(common::DRIVER_FEATURE), 0, "{select}");
    }
    transport.add_status(status::FEATURES_OK);
    assert_ne!(transport.status() & status::FEATURES_OK, 0);
}

/// Requirements: E2
#[test]
fn e2_accepted_features_read_back() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.accept(0x1234_5678_9abc_def0);
    assert_eq!(transport.accepted(), 0x1234_5678_9abc_def0);
}

/// Requirements: E2
#[test]
fn e2_features_are_frozen_by_features_ok() {
    let rig = Rig::new();
    let transport = rig.transport();
    let agreed = transport.negotiate(feature::RING_RESET).unwrap();
    transport.accept(u64::MAX);
    assert_eq!(transport.accepted(), agreed);
    transport.start();
    transport.accept(0);
    assert_eq!(transport.accepted(), agreed);
}

/// Requirements: E2
#[test]
fn e2_driver_ok_without_features_ok_does_not_start_the_device() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.start();
    assert_eq!(transport.status() & status::DRIVER_OK, 0);
    assert!(rig.controls.activations().is_empty());
}

/// Requirements: E2
#[test]
fn e2_refused_features_do_not_start_the_device_in_one_write() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.accept(1 << 50);
    transport.set(common::DEVICE_STATUS, 0xf);
    assert_eq!(transport.status(), status::ACKNOWLEDGE | status::DRIVER);
    assert!(rig.controls.activations().is_empty());
}

/// Requirements: S1-1, S2-2
#[test]
fn s1_1_status_bits_cannot_be_cleared_one_by_one() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    let before = live.transport.status();
    for value in [1, 3, 4, 8, 0x80 | before] {
        live.transport.set(common::DEVICE_STATUS, value);
        assert_eq!(live.transport.status() & before, before, "{value:#x}");
    }
}

/// Requirements: S1-3, S2-1, B-43
#[test]
fn b43_status_bits_of_features_that_were_not_negotiated_never_show() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.set(common::DEVICE_STATUS, 1 | 16 | 32 | 64);
    assert_eq!(transport.status(), 1);
    let mut live = rig.live(ALL);
    let running = live.transport.status();
    live.transport.add_status(16 | 32 | 64);
    assert_eq!(live.transport.status(), running);
    live.echo(0, b"runs on");
}

/// Requirements: E2
#[test]
fn e2_the_device_starts_once() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    live.transport.start();
    live.transport.add_status(status::FAILED);
    assert_eq!(rig.controls.activations().len(), 1);
}

/// Requirements: E15
#[test]
fn e15_no_reserved_feature_bit_is_offered() {
    let reserved = 0b11_1111 << 44 | 1 << 42 | 1 << 43;
    assert_eq!(Rig::new().transport().offered() & reserved, 0);
}
