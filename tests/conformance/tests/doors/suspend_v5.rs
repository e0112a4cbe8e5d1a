//! SUSPEND of the fifth version: DRIVER_OK stays, and a driver resumes by clearing the bit.

use devices::virtio::{Doors, Suspend};
use driver::access::FunctionExt;
use driver::virtio::{Door, Transport, common, feature, status};

use super::checks::{self, RUNNING, write};
use super::rig::{ALL, CASES, Kind, Rig, SIMPLE, for_each, only};

const DOOR: Door = Door::SuspendV5;
const SUSPENDED: u8 = RUNNING | status::SUSPEND;

/// Requirements: S1-1
#[test]
fn s1_1_no_bit_but_suspend_is_cleared_by_a_write() {
    for_each(only(DOOR), |mut rig| {
        // What is written to a device that shows the first, and what it shows then.
        for (before, value, after) in [
            (RUNNING, status::ACKNOWLEDGE, RUNNING),
            (RUNNING, status::SUSPEND, SUSPENDED),
            (SUSPENDED, status::SUSPEND, SUSPENDED),
            (SUSPENDED, SUSPENDED, SUSPENDED),
            (SUSPENDED, status::DRIVER, RUNNING),
            (RUNNING, RUNNING, RUNNING),
            (RUNNING, status::FAILED, RUNNING | status::FAILED),
            (RUNNING | status::FAILED, RUNNING, RUNNING | status::FAILED),
        ] {
            assert_eq!(rig.transport.status(), before);
            write(&rig, value);
            assert_eq!(rig.transport.status(), after, "{value:#x}");
        }
        rig.start_over(ALL);
        assert_eq!(rig.transport.status(), RUNNING, "a reset clears FAILED");
    });
}

/// Requirements: S1-2
#[test]
fn s1_2_a_driver_that_sets_suspend_without_the_feature_does_nothing() {
    checks::without_the_feature_the_bit_does_not_exist(DOOR);
}

/// Requirements: S1-3
#[test]
fn s1_3_suspend_works_if_it_was_negotiated() {
    checks::an_idle_device_stops_at_once(DOOR);
}

/// Requirements: S1-3
#[test]
fn s1_3_suspend_never_reads_1_if_the_device_does_not_offer_it() {
    for kind in [Kind::Plain, Kind::Member] {
        let mut rig = Rig::live(kind, Doors::default(), ALL);
        rig.transport.accept(ALL);
        write(&rig, SUSPENDED);
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.echo(0);
    }
}

/// Requirements: S1-4, S1-11
#[test]
fn s1_4_suspend_is_ignored_without_driver_ok() {
    checks::before_driver_ok_the_bit_is_ignored(DOOR);
}

/// Requirements: S1-5
#[test]
fn s1_5_a_driver_that_does_not_wait_loses_nothing() {
    checks::an_impatient_driver_loses_nothing(DOOR);
}

/// Requirements: S1-6
#[test]
fn s1_6_a_suspend_is_called_off_by_the_opposite_write() {
    checks::a_stop_is_called_off(DOOR);
}

/// Requirements: S1-6
#[test]
fn s1_6_a_suspend_is_called_off_by_a_reset() {
    checks::a_reset_overtakes_a_stop(DOOR);
}

/// Requirements: S1-6
#[test]
fn s1_6_a_resume_is_called_off_by_the_opposite_write() {
    for_each(only(DOOR), |mut rig| {
        rig.transport.stop(DOOR).unwrap();
        rig.lay(0);
        rig.lay(1);
        write(&rig, RUNNING);
        // The device has not come to its rings yet.
        write(&rig, SUSPENDED);
        assert_eq!(rig.transport.status(), SUSPENDED);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(2);
    });
}

/// Requirements: S1-7, S1-13
#[test]
fn s1_7_configuration_written_while_suspended_is_lost_and_what_is_read_is_valid() {
    checks::the_device_configuration_is_closed(DOOR);
}

/// Requirements: S1-8
#[test]
fn s1_8_buffers_stay_outstanding_over_a_suspend() {
    for_each(only(DOOR), |mut rig| {
        for _ in 0..3 {
            rig.lay(0);
        }
        rig.lay(1);
        rig.transport.stop(DOOR).unwrap();
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(4);
    });
}

/// Requirements: S1-8
#[test]
fn s1_8_buffers_modified_while_suspended_are_taken_as_they_are_then() {
    checks::buffers_changed_meanwhile_are_taken_as_they_are(DOOR);
}

/// Requirements: S1-8, G1-f
#[test]
fn s1_8_a_ring_broken_while_suspended_is_announced_after_the_resume() {
    checks::a_ring_broken_meanwhile_is_found_after_the_resume(DOOR);
}

/// Requirements: S1-9, S1-14, G1-d
#[test]
fn s1_9_what_is_made_available_while_suspended_waits_and_comes_back_once() {
    checks::a_stopped_device_stays_still_and_loses_nothing(DOOR);
}

/// Requirements: S1-10
#[test]
fn s1_10_the_bus_may_put_a_suspended_device_to_sleep() {
    checks::the_bus_may_sleep_meanwhile(DOOR);
}

/// Requirements: S1-11
#[test]
fn s1_11_suspend_is_ignored_after_a_reset_until_driver_ok() {
    for (kind, features) in CASES {
        let mut rig = Rig::live(kind, only(DOOR), features);
        rig.transport.stop(DOOR).unwrap();
        rig.prepare(features);
        let ready = rig.transport.status();
        write(&rig, ready | status::SUSPEND);
        assert_eq!(rig.transport.status(), ready);
        rig.transport.start();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.echo(0);
    }
}

/// Requirements: S1-12
#[test]
fn s1_12_a_driver_sees_after_the_resume_what_it_saw_before() {
    checks::a_resume_brings_back_what_was(DOOR);
}

/// Requirements: S1-13, G1-c
#[test]
fn s1_13_no_common_register_but_the_status_can_be_written() {
    checks::the_common_configuration_is_closed(DOOR);
}

/// Requirements: G1-c
#[test]
fn g1_c_a_function_level_reset_works_while_suspended() {
    checks::a_stopped_function_can_be_reset(DOOR);
}

/// Requirements: G1-c, S1-14
#[test]
fn g1_c_msix_works_while_suspended_and_what_it_owes_waits_for_the_resume() {
    checks::messages_that_are_owed_wait_for_the_resume(DOOR);
}

/// Requirements: S1-14, G1-e
#[test]
fn s1_14_configuration_changed_from_behind_appears_after_the_resume() {
    checks::news_from_behind_waits_for_the_resume(DOOR);
}

/// Requirements: S1-15
#[test]
fn s1_15_the_configuration_may_change_until_the_suspend_is_acknowledged() {
    checks::news_while_stopping_is_told_in_the_end(DOOR);
}

/// Requirements: S1-15, S1-16, S1-5, G1-h
#[test]
fn s1_16_what_was_fetched_is_used_and_signalled_before_the_acknowledgement() {
    checks::a_stop_waits_for_what_is_in_flight(DOOR);
}

/// Requirements: S1-17
#[test]
fn s1_17_a_suspended_device_rests() {
    checks::a_stopped_device_rests(DOOR);
}

/// A driver that takes no status but the one byte it waits for.
///
/// Requirements: S1-18
#[test]
fn s1_18_the_status_is_the_old_one_with_the_bit_and_nothing_else() {
    for_each(only(DOOR), |mut rig| {
        let old = rig.transport.status();
        for _ in 0..3 {
            rig.occupy(0);
            write(&rig, old | 0x10);
            let shown = rig.transport.status();
            assert_eq!(shown, old, "no other bit moves while it waits");
            rig.release();
            assert_eq!(rig.transport.status(), old | 0x10);
            let old = rig.transport.status();
            write(&rig, old & !0x10);
            assert_eq!(rig.transport.status(), old & !0x10);
            rig.all_come_back(1);
        }
    });
}

/// Requirements: S1-19
#[test]
fn s1_19_a_reset_works_while_suspended_and_clears_everything() {
    checks::a_stopped_device_can_be_reset(DOOR);
}

/// Requirements: G1-b
#[test]
fn g1_b_feature_42_is_offered_for_this_suspend_alone() {
    for kind in [Kind::Plain, Kind::Member] {
        for (suspend, offered) in [
            (None, 0),
            (Some(Suspend::V5), 1 << 42),
            (Some(Suspend::V1_4), 1 << 43),
        ] {
            let doors = Doors {
                suspend,
                ..Doors::default()
            };
            let rig = Rig::untouched(kind, doors);
            let both = rig.transport.offered() & (1 << 42 | 1 << 43);
            assert_eq!(both, offered, "{suspend:?}");
        }
    }
}

/// Requirements: G1-b
#[test]
fn g1_b_the_other_feature_is_refused() {
    for (door, other) in [(Door::SuspendV5, 1u64 << 43), (Door::Suspend, 1 << 42)] {
        let rig = Rig::untouched(Kind::Plain, only(door));
        rig.transport.reset().unwrap();
        rig.transport.accept(feature::VERSION_1 | other);
        rig.transport.add_status(status::FEATURES_OK);
        assert_eq!(rig.transport.status() & status::FEATURES_OK, 0);
    }
}

/// Requirements: G1-f
#[test]
fn g1_f_while_the_backend_is_stuck_suspend_reads_0() {
    checks::a_stuck_device_says_that_it_runs(DOOR);
}

/// Requirements: G1-f
#[test]
fn g1_f_a_device_that_needs_a_reset_is_suspended_like_any_other() {
    checks::a_device_that_needs_a_reset_can_be_stopped(DOOR);
}

/// Requirements: G1-g
#[test]
fn g1_g_with_failed_only_failed_counts() {
    for_each(only(DOOR), |mut rig| {
        rig.lay(0);
        write(&rig, SUSPENDED | status::FAILED);
        assert_eq!(rig.transport.status(), RUNNING | status::FAILED);
        rig.kick_all();
        assert_eq!(rig.collect(), 1, "it runs");
    });
}

/// Requirements: G1-g
#[test]
fn g1_g_a_suspended_device_that_failed_stays_suspended_and_resumes() {
    for_each(only(DOOR), |mut rig| {
        rig.transport.stop(DOOR).unwrap();
        rig.lay(0);
        write(&rig, SUSPENDED | status::FAILED);
        assert_eq!(rig.transport.status(), SUSPENDED | status::FAILED);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        assert_eq!(rig.transport.status(), RUNNING | status::FAILED);
        rig.all_come_back(1);
    });
}

/// Requirements: G1-i
#[test]
fn g1_i_an_owner_with_an_administration_queue_offers_no_suspend() {
    let rig = Rig::untouched(Kind::Member, only(DOOR));
    let owner = Transport::new(rig.owner.clone().unwrap()).unwrap();
    let offered = owner.offered();
    assert_ne!(offered & feature::ADMIN_VQ, 0);
    assert_eq!(offered & (1 << 42 | 1 << 43 | 1 << 44), 0);
    let features = owner.negotiate(SIMPLE).unwrap();
    assert_eq!(features & 1 << 42, 0);
    owner.start();
    owner.set(common::DEVICE_STATUS, SUSPENDED);
    assert_eq!(owner.status(), RUNNING);
    let command: u16 = owner.function().config(driver::pci::header::COMMAND);
    assert_ne!(command, u16::MAX, "it is there");
}

/// Requirements: S1-19, G1-e
#[test]
fn g1_e_configuration_changed_from_behind_survives_a_reset() {
    checks::news_from_behind_survives_a_reset(DOOR);
}

/// Requirements: G1-e
#[test]
fn g1_e_news_reaches_a_driver_without_queues() {
    checks::news_reaches_a_driver_without_queues(DOOR);
}

/// Requirements: G1-c, S1-13
#[test]
fn g1_c_the_access_window_leads_to_the_same_registers() {
    checks::the_access_window_leads_to_the_same_registers(DOOR);
}

/// Requirements: S1-14, S1-16
#[test]
fn s1_14_a_device_at_work_on_its_own_thread_stops() {
    checks::a_device_at_work_on_its_own_thread_stops(DOOR);
}
