//! VFs that work, are reset, and come and go.

use super::*;

#[test]
fn d2_e10_each_vf_has_its_own_bus_mastering_and_msix() {
    let rig = rig(2);
    rig.enable(2);
    rig.start(1);
    rig.start(2);
    let _ = rig.set_config::<2>(1, 0x04, 0);
    rig.request(1);
    rig.request(2);
    assert_eq!(rig.complete(1), []);
    assert_eq!(rig.complete(2), [message(2)]);
    assert!(rig.reasons(1).contains(Reasons::NO_DMA));
}

#[test]
fn doorbells_of_vfs_are_in_the_vf_bar_and_go_with_them() {
    let rig = rig(3);
    rig.enable(3);
    rig.start(0);
    rig.start(1);
    rig.start(3);
    let found: Vec<_> = rig
        .pf
        .doorbells()
        .iter()
        .map(|d| (d.slot, d.offset))
        .collect();
    let vf = |index: u64| (MEMBERS, index * VF_SIZE + 0x1000);
    assert_eq!(found, [(MEMBER_BAR, 0x1000), vf(0), vf(2)]);
    assert_eq!(rig.disable(), Effect::LayoutChanged);
    rig.enable(3);
    assert_eq!(rig.pf.doorbells().len(), 1);
}

#[test]
fn e3_flr_of_a_vf_leaves_its_siblings_alone() {
    let rig = rig(2);
    rig.enable(2);
    for devfn in [0, 1, 2] {
        rig.start(devfn);
        rig.request(devfn);
    }
    assert_eq!(rig.flr(1), Effect::LayoutChanged);
    assert_eq!(rig.config::<2>(1, 0x04), 0);
    assert!(rig.transactions_pending(1));
    assert_eq!(rig.complete(1), []);
    assert_eq!(rig.get::<1>(1, 20), 0);
    for devfn in [0, 2] {
        assert_eq!(rig.get::<1>(devfn, 20), 0xf);
        assert_eq!(rig.complete(devfn), [message(devfn.into())]);
    }
    rig.start(1);
    rig.request(1);
    assert_eq!(rig.complete(1), [message(1)], "its driver recovers");
}

#[test]
fn e3_flr_of_the_pf_takes_the_vfs_away() {
    let rig = rig(3);
    rig.enable(3);
    rig.start(2);
    assert_eq!(rig.flr(0), Effect::LayoutChanged);
    assert!(rig.answering().is_empty());
    assert_eq!(rig.config::<2>(0, CONTROL), 0);
    assert_eq!(rig.config::<2>(0, NUM_VFS), 0);
    assert_eq!(rig.owner.membership().enabled_members(), None);
    assert_eq!(rig.reasons(2), Reasons::NO_DMA | Reasons::NO_DRIVER);
    rig.enable(3);
    assert_eq!(rig.get::<1>(2, 20), 0, "reset state");
}

#[test]
fn a_reset_of_the_bus_takes_the_vfs_away() {
    let rig = rig(2);
    rig.enable(2);
    rig.start(1);
    rig.pf.reset();
    assert!(rig.answering().is_empty());
    assert!(rig.reasons(1).contains(Reasons::NO_DMA));
}

#[test]
fn a_virtio_reset_of_the_pf_leaves_the_vfs_alone() {
    let rig = rig(2);
    rig.enable(2);
    rig.start(0);
    rig.start(1);
    let _ = rig.put::<1>(0, 20, 0);
    assert_eq!(rig.answering(), [1, 2]);
    assert_eq!(rig.get::<1>(1, 20), 0xf);
}

#[test]
fn vfs_that_are_disabled_while_busy_complete_unseen_and_come_back_reset() {
    let rig = rig(2);
    rig.enable(2);
    rig.start(1);
    rig.request(1);
    assert_eq!(rig.disable(), Effect::LayoutChanged);
    assert!(rig.reasons(1).contains(Reasons::NO_DMA | Reasons::RESET));
    rig.enable(2);
    assert!(rig.transactions_pending(1), "as after FLR");
    assert_eq!(rig.config::<2>(1, 0x04), 0);
    assert_eq!(rig.complete(1), []);
    assert!(!rig.transactions_pending(1));
    assert_eq!(rig.get::<1>(1, 20), 0);
    rig.start(1);
    rig.request(1);
    assert_eq!(rig.complete(1), [message(1)]);
}

#[test]
fn vfs_that_are_disabled_while_busy_may_complete_before_they_come_back() {
    let rig = rig(1);
    rig.enable(1);
    rig.start(1);
    rig.request(1);
    let _ = rig.disable();
    assert_eq!(rig.complete(1), []);
    assert_eq!(rig.reasons(1), Reasons::NO_DMA | Reasons::NO_DRIVER);
    rig.enable(1);
    assert!(!rig.transactions_pending(1));
}

#[test]
fn b6_the_sr_iov_group_is_what_the_registers_say() {
    let rig = rig(4);
    let mut driver = OwnerDriver::new(Arc::clone(&rig.admin));
    let names = || -> Vec<_> {
        rig.admin
            .members()
            .map(|(_, m)| m.name().to_string())
            .collect()
    };
    assert!(driver.negotiate(GroupType::SrIov).is_err(), "strict");
    assert!(names().is_empty());
    rig.enable(2);
    assert!(driver.negotiate(GroupType::SrIov).is_ok());
    assert_eq!(names(), ["vf1", "vf2"]);
    assert!(rig.admin.member(3).is_none());
    let _ = rig.disable();
    assert!(rig.admin.member(1).is_none());
}
