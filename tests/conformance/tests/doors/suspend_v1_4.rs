//! SUSPEND of virtio 1.4: the device takes DRIVER_OK away, and a driver resumes by setting it.

use driver::virtio::{Door, status};

use super::checks::{self, RUNNING, write};
use super::rig::{for_each, only};

const DOOR: Door = Door::Suspend;
const SUSPENDED: u8 = (RUNNING | status::SUSPEND) & !status::DRIVER_OK;

/// Requirements: B-41, B-42
#[test]
fn b41_an_idle_device_shows_suspend_and_takes_driver_ok_away() {
    checks::an_idle_device_stops_at_once(DOOR);
}

/// Requirements: B-41
#[test]
fn b41_a_driver_without_the_feature_does_not_suspend() {
    checks::without_the_feature_the_bit_does_not_exist(DOOR);
}

/// Requirements: B-41
#[test]
fn b41_both_bits_move_at_once_when_the_last_chain_is_used() {
    for_each(only(DOOR), |mut rig| {
        rig.occupy(1);
        write(&rig, RUNNING | status::SUSPEND);
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.release();
        assert_eq!(rig.transport.status(), SUSPENDED);
        assert_eq!(rig.collect(), 1);
    });
}

/// Requirements: B-42
#[test]
fn b42_a_driver_sees_after_the_resume_what_it_saw_before() {
    checks::a_resume_brings_back_what_was(DOOR);
}

/// Requirements: B-42
#[test]
fn b42_a_resume_that_fails_sets_needs_reset() {
    checks::a_ring_broken_meanwhile_is_found_after_the_resume(DOOR);
}

/// Requirements: B-42
#[test]
fn b42_a_device_that_needs_a_reset_suspends_and_says_both() {
    checks::a_device_that_needs_a_reset_can_be_stopped(DOOR);
}

/// Requirements: B-43
#[test]
fn b43_suspend_is_ignored_before_driver_ok() {
    checks::before_driver_ok_the_bit_is_ignored(DOOR);
}

/// Requirements: B-44
#[test]
fn b44_the_device_configuration_cannot_be_written() {
    checks::the_device_configuration_is_closed(DOOR);
}

/// Requirements: B-44
#[test]
fn b44_no_common_register_but_the_status_can_be_written() {
    checks::the_common_configuration_is_closed(DOOR);
}

/// Requirements: B-45, B-48
#[test]
fn b45_a_suspended_device_does_nothing_and_loses_nothing() {
    checks::a_stopped_device_stays_still_and_loses_nothing(DOOR);
}

/// Requirements: B-45
#[test]
fn b45_the_bus_may_put_a_suspended_device_to_sleep() {
    checks::the_bus_may_sleep_meanwhile(DOOR);
}

/// Requirements: B-45
#[test]
fn b45_a_suspended_device_rests() {
    checks::a_stopped_device_rests(DOOR);
}

/// Requirements: B-45
#[test]
fn b45_buffers_that_change_meanwhile_are_taken_as_they_are_then() {
    checks::buffers_changed_meanwhile_are_taken_as_they_are(DOOR);
}

/// Requirements: B-45
#[test]
fn b45_messages_that_are_owed_wait_for_the_resume() {
    checks::messages_that_are_owed_wait_for_the_resume(DOOR);
}

/// Requirements: B-46
#[test]
fn b46_configuration_changes_are_announced_after_the_resume() {
    checks::news_from_behind_waits_for_the_resume(DOOR);
}

/// Requirements: B-46
#[test]
fn b46_changes_on_the_way_there_are_announced_once() {
    checks::news_while_stopping_is_told_in_the_end(DOOR);
}

/// Requirements: B-47
#[test]
fn b47_what_was_fetched_is_used_and_signalled_first() {
    checks::a_stop_waits_for_what_is_in_flight(DOOR);
}

/// Requirements: B-48
#[test]
fn b48_a_driver_that_does_not_wait_loses_nothing() {
    checks::an_impatient_driver_loses_nothing(DOOR);
}

/// Requirements: B-49
#[test]
fn b49_what_a_write_means_depends_on_the_state() {
    for_each(only(DOOR), |rig| {
        let failed = status::FAILED;
        // What is written to a device that shows the first, and what it shows then.
        for (before, value, after) in [
            (RUNNING, RUNNING, RUNNING),
            (RUNNING, status::ACKNOWLEDGE, RUNNING),
            (RUNNING, RUNNING | status::SUSPEND, SUSPENDED),
            (SUSPENDED, SUSPENDED, SUSPENDED),
            (SUSPENDED, status::SUSPEND, SUSPENDED),
            (SUSPENDED, SUSPENDED & !status::SUSPEND, SUSPENDED),
            (SUSPENDED, SUSPENDED | status::DRIVER_OK, RUNNING),
            (RUNNING, status::SUSPEND, SUSPENDED),
            (SUSPENDED, RUNNING, RUNNING),
            (RUNNING, status::SUSPEND | status::DRIVER_OK, SUSPENDED),
            (SUSPENDED, status::DRIVER_OK, RUNNING),
            (
                RUNNING,
                RUNNING | status::SUSPEND | failed,
                RUNNING | failed,
            ),
        ] {
            assert_eq!(rig.transport.status(), before);
            write(&rig, value);
            assert_eq!(rig.transport.status(), after, "{value:#x}");
        }
    });
}

/// Requirements: B-49
#[test]
fn b49_a_suspend_on_its_way_is_ended_by_a_reset_alone() {
    for_each(only(DOOR), |mut rig| {
        rig.occupy(0);
        write(&rig, RUNNING | status::SUSPEND);
        rig.lay(0);
        for value in [RUNNING, status::DRIVER_OK, RUNNING | status::SUSPEND] {
            write(&rig, value);
            rig.settle();
            assert_eq!(rig.transport.status(), RUNNING);
            assert_eq!(rig.controls.held(), 1, "{value:#x}");
        }
        rig.release();
        assert_eq!(rig.transport.status(), SUSPENDED);
        assert_eq!(rig.collect(), 1);
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(1);
    });
    checks::a_reset_overtakes_a_stop(DOOR);
}

/// Requirements: B-49
#[test]
fn b49_a_reset_works_while_suspended_and_clears_everything() {
    checks::a_stopped_device_can_be_reset(DOOR);
    checks::a_stopped_function_can_be_reset(DOOR);
    checks::a_stuck_device_says_that_it_runs(DOOR);
}

/// Requirements: B-46
#[test]
fn b46_configuration_changed_from_behind_survives_a_reset() {
    checks::news_from_behind_survives_a_reset(DOOR);
}

/// Requirements: B-46
#[test]
fn b46_news_reaches_a_driver_without_queues() {
    checks::news_reaches_a_driver_without_queues(DOOR);
}

/// Requirements: B-44
#[test]
fn b44_the_access_window_leads_to_the_same_registers() {
    checks::the_access_window_leads_to_the_same_registers(DOOR);
}

/// Requirements: B-45, B-47
#[test]
fn b45_a_device_at_work_on_its_own_thread_stops() {
    checks::a_device_at_work_on_its_own_thread_stops(DOOR);
}
