//! The SR-IOV capability and the virtual functions.

use devices::admin::Options;
use driver::access::FunctionExt;
use driver::pci::{change_command, command, header, request_flr};

use conformance::group::{Rig, SR_IOV, sriov};

const SIMPLE: u64 = conformance::SIMPLE;

fn rig(vfs: usize) -> Rig {
    Rig::new(vfs, Options::default())
}

/// What Linux does when it finds the capability.
///
/// Requirements: D1
#[test]
fn d1_the_scan_of_linux_finds_a_usable_capability() {
    let rig = rig(5);
    let pf = rig.at(0);
    let word = |at| -> u16 { pf.config(rig.sriov(at)) };
    let dword = |at| -> u32 { pf.config(rig.sriov(at)) };
    pf.set_config(rig.sriov(sriov::CONTROL), sriov::OFF);
    assert_eq!(word(sriov::CONTROL), sriov::OFF, "ARI Capable Hierarchy");
    assert_eq!((word(sriov::TOTAL_VFS), word(sriov::INITIAL_VFS)), (5, 5));
    let smallest = dword(sriov::SUPPORTED_PAGES) & dword(sriov::SUPPORTED_PAGES).wrapping_neg();
    assert_eq!(smallest, 1, "4 KiB");
    pf.set_config(rig.sriov(sriov::SYSTEM_PAGE), smallest);
    assert_eq!(dword(sriov::SYSTEM_PAGE), 1);
    for vfs in (0..=5u16).rev() {
        pf.set_config(rig.sriov(sriov::NUM_VFS), vfs);
        assert_eq!(word(sriov::NUM_VFS), vfs);
        assert_eq!(
            (word(sriov::FIRST_VF_OFFSET), word(sriov::VF_STRIDE)),
            (1, 1)
        );
    }
    assert_eq!(word(sriov::FUNCTION_LINK) & 0xff, 0);
    let device: u16 = pf.config(header::DEVICE_ID);
    assert_eq!(word(sriov::VF_DEVICE_ID), device);
}

/// Requirements: D1, D2
#[test]
fn d2_enabled_vfs_are_there_and_work() {
    let rig = rig(5);
    assert!(rig.answering().is_empty());
    rig.enable(3);
    assert_eq!(rig.answering(), [1, 2, 3]);
    for index in 1..=3 {
        let mut vf = rig.drive(rig.vf(index), SIMPLE);
        let text = format!("to VF {index}");
        assert_eq!(vf.request(0, text.as_bytes(), 64), text.as_bytes());
    }
    rig.disable();
    assert!(rig.answering().is_empty());
}

/// Requirements: D1, D2
#[test]
fn d1_255_vfs_are_there_and_work() {
    let rig = rig(255);
    rig.enable(255);
    assert_eq!(rig.answering(), (1..=255).collect::<Vec<_>>());
    for index in [1, 8, 254, 255] {
        let mut vf = rig.drive(rig.vf(index), SIMPLE);
        assert_eq!(vf.request(1, b"hello", 8), b"hello");
    }
}

/// Requirements: D2, B-50
#[test]
fn b50_vfs_do_not_offer_what_makes_an_owner() {
    let rig = rig(1);
    rig.enable(1);
    let vf = rig.drive(rig.vf(1), SIMPLE);
    assert_eq!(vf.transport.offered() & (SR_IOV | 1 << 41), 0);
    let pf = rig.drive(rig.at(0), SIMPLE);
    assert_eq!(pf.transport.offered() >> 37 & 0x11, 0x11);
}

/// Requirements: E3
#[test]
fn e3_flr_of_a_busy_vf_leaves_its_siblings_alone_and_its_driver_recovers() {
    let rig = rig(2);
    rig.enable(2);
    let mut first = rig.drive(rig.vf(1), SIMPLE);
    let mut second = rig.drive(rig.vf(2), SIMPLE);
    let controls = &rig.controls[1];
    controls.hold(true);
    first.submit(0, b"never seen", 16);
    rig.machine.settle();
    assert_eq!(controls.held(), 1);
    rig.machine.msi().take();
    assert!(request_flr(&rig.vf(1)));
    assert_eq!(second.request(0, b"sibling", 16), b"sibling");
    controls.release(1);
    controls.hold(false);
    rig.machine.settle();
    assert_eq!(rig.machine.msi().take_vectors(), [1], "the sibling's");
    let mut again = rig.drive(rig.vf(1), SIMPLE);
    assert_eq!(again.request(0, b"again", 16), b"again");
}

/// Requirements: D2, E3
#[test]
fn d2_rounds_of_enable_and_disable_under_load() {
    let rig = rig(4);
    for round in 0..20u16 {
        rig.enable(1 + round % 4);
        let controls = &rig.controls[1];
        let mut vf = rig.drive(rig.vf(1), SIMPLE);
        assert_eq!(vf.request(0, b"alive", 8), b"alive");
        controls.hold(true);
        vf.submit(0, b"lost", 8);
        rig.machine.settle();
        rig.machine.msi().take();
        rig.disable();
        controls.release(1);
        controls.hold(false);
        rig.machine.settle();
        assert_eq!(
            rig.machine.msi().take_vectors(),
            conformance::QUIET,
            "round {round}"
        );
    }
    assert!(rig.answering().is_empty());
}

/// Requirements: E3
#[test]
fn e3_flr_of_the_pf_takes_its_vfs_away() {
    let rig = rig(2);
    rig.enable(2);
    let _vf = rig.drive(rig.vf(1), SIMPLE);
    assert!(request_flr(&rig.at(0)));
    assert!(rig.answering().is_empty());
    assert_eq!(rig.owner.members().count(), 0);
}

/// Requirements: E10
#[test]
fn e10_bus_mastering_is_each_functions_own() {
    let rig = rig(2);
    rig.enable(2);
    let mut first = rig.drive(rig.vf(1), SIMPLE);
    let mut second = rig.drive(rig.vf(2), SIMPLE);
    change_command(&rig.at(0), 0, command::BUS_MASTER);
    change_command(&rig.vf(1), 0, command::BUS_MASTER);
    first.submit(0, b"waits", 8);
    assert_eq!(first.complete(0), None);
    assert_eq!(second.request(0, b"works", 8), b"works");
    change_command(&rig.vf(1), command::BUS_MASTER, 0);
    assert_eq!(first.complete(0), Some(5));
}
