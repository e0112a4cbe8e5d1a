//! DEVICE_STOPPED: a bit of the device status that a driver, or who stands in for it, sets and clears.

use conformance::QUIET;
use devices::virtio::Doors;
use driver::access::Dma;
use driver::virtio::{Door, common, isr, status};

use super::checks::{self, RUNNING, write};
use super::rig::{ALL, CASES, Kind, Rig, for_each, only};

const DOOR: Door = Door::DeviceStop;
const STOPPED: u8 = RUNNING | status::DEVICE_STOPPED;

/// Requirements: S2-1
#[test]
fn s2_1_without_the_feature_bit_32_does_not_exist() {
    checks::without_the_feature_the_bit_does_not_exist(DOOR);
}

/// Requirements: S2-2
#[test]
fn s2_2_no_bit_but_device_stopped_is_cleared_by_a_write() {
    for_each(only(DOOR), |mut rig| {
        // What is written to a device that shows the first, and what it shows then.
        for (before, value, after) in [
            (RUNNING, status::ACKNOWLEDGE, RUNNING),
            (RUNNING, status::DEVICE_STOPPED, STOPPED),
            (STOPPED, STOPPED, STOPPED),
            (STOPPED, status::DRIVER, RUNNING),
            (RUNNING, STOPPED | status::FAILED, STOPPED | status::FAILED),
            (STOPPED | status::FAILED, RUNNING, RUNNING | status::FAILED),
        ] {
            assert_eq!(rig.transport.status(), before);
            write(&rig, value);
            assert_eq!(rig.transport.status(), after, "{value:#x}");
        }
        rig.echo(0);
    });
}

/// Requirements: S2-3, S2-7
#[test]
fn s2_3_the_bit_is_ignored_without_driver_ok() {
    checks::before_driver_ok_the_bit_is_ignored(DOOR);
}

/// Requirements: S2-4, S2-5
#[test]
fn s2_4_a_driver_sets_the_bit_and_reads_until_it_shows() {
    checks::an_idle_device_stops_at_once(DOOR);
}

/// Requirements: S2-4, S2-5
#[test]
fn s2_4_a_driver_that_does_not_wait_loses_nothing() {
    checks::an_impatient_driver_loses_nothing(DOOR);
}

/// Requirements: S2-5
#[test]
fn s2_5_a_resume_is_taken_back_before_the_device_has_looked_at_its_rings() {
    for_each(only(DOOR), |mut rig| {
        rig.transport.stop(DOOR).unwrap();
        rig.lay(0);
        write(&rig, RUNNING);
        write(&rig, STOPPED);
        assert_eq!(rig.transport.status(), STOPPED);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(1);
    });
}

/// Requirements: S2-6
#[test]
fn s2_6_a_reset_clears_the_bit() {
    checks::a_stopped_device_can_be_reset(DOOR);
    checks::a_stopped_function_can_be_reset(DOOR);
}

/// Requirements: S2-8, S2-9, S2-11, G2-f
#[test]
fn s2_8_nothing_is_started_after_the_request_and_all_is_complete_before_the_bit_shows() {
    checks::a_stop_waits_for_what_is_in_flight(DOOR);
}

/// Requirements: S2-9
#[test]
fn s2_9_after_the_bit_shows_no_ring_is_read() {
    for_each(only(DOOR), |mut rig| {
        rig.occupy(0);
        write(&rig, STOPPED);
        let ring = *rig.queues[1].layout();
        let index = rig.machine.dma().load(ring.avail_index());
        // An index that no driver may show, for as long as the device is stopped.
        let wrong = index.wrapping_add(ring.size + 1);
        rig.release();
        assert_eq!(rig.transport.status(), STOPPED);
        rig.machine.dma().store(ring.avail_index(), wrong);
        rig.stays_still();
        rig.machine.dma().store(ring.avail_index(), index);
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(1);
        rig.echo(1);
        assert_eq!(rig.transport.status(), RUNNING, "it did not look");
    });
}

/// Requirements: S2-10
#[test]
fn s2_10_the_configuration_neither_changes_nor_interrupts() {
    checks::news_from_behind_waits_for_the_resume(DOOR);
    checks::news_while_stopping_is_told_in_the_end(DOOR);
}

/// Requirements: S2-10
#[test]
fn s2_10_what_the_driver_writes_to_the_configuration_is_lost() {
    checks::the_device_configuration_is_closed(DOOR);
}

/// Requirements: S2-10
#[test]
fn s2_10_a_failure_while_stopped_is_announced_after_the_resume() {
    for_each(only(DOOR), |mut rig| {
        rig.transport.stop(DOOR).unwrap();
        rig.transport.reset_queue(1).unwrap();
        rig.interrupts();
        // A ring that is not in memory.
        rig.transport.select(1);
        rig.transport.set(common::QUEUE_DESC_HIGH, 0x7fff_0000);
        rig.transport.set(common::QUEUE_ENABLE, 1);
        assert_eq!(rig.transport.status(), STOPPED | status::NEEDS_RESET);
        assert_eq!(rig.transport.isr() & isr::CONFIG, 0);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        assert_eq!(rig.interrupts(), [0]);
        assert_eq!(rig.transport.status(), RUNNING | status::NEEDS_RESET);
        rig.start_over(ALL);
    });
}

/// Requirements: S2-11
#[test]
fn s2_11_0_is_read_for_as_long_as_it_takes() {
    checks::a_stuck_device_says_that_it_runs(DOOR);
}

/// Requirements: S2-12
#[test]
fn s2_12_before_driver_ok_no_buffer_is_used_and_nobody_notified() {
    for (kind, features) in CASES {
        let mut rig = Rig::prepared(kind, only(DOOR), features);
        rig.submit(0);
        rig.submit(1);
        write(&rig, rig.transport.status() | status::DEVICE_STOPPED);
        rig.stays_still();
        rig.transport.start();
        rig.all_come_back(2);
        assert!(!rig.interrupts().is_empty());
    }
}

/// Requirements: S2-13, S2-8, G2-b, G2-c
#[test]
fn s2_13_what_was_not_fetched_waits_in_the_ring() {
    checks::a_stopped_device_stays_still_and_loses_nothing(DOOR);
}

/// Requirements: G2-b
#[test]
fn g2_b_a_stop_does_not_wait_for_entries_nobody_fetched() {
    for_each(only(DOOR), |mut rig| {
        for _ in 0..3 {
            rig.lay(0);
        }
        rig.submit(1);
        write(&rig, STOPPED);
        assert_eq!(rig.transport.status(), STOPPED);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(4);
    });
}

/// Requirements: S2-13
#[test]
fn s2_13_buffers_that_change_meanwhile_are_taken_as_they_are_then() {
    checks::buffers_changed_meanwhile_are_taken_as_they_are(DOOR);
}

/// Requirements: S2-8
#[test]
fn s2_8_a_ring_broken_meanwhile_is_found_after_the_resume() {
    checks::a_ring_broken_meanwhile_is_found_after_the_resume(DOOR);
    checks::a_device_that_needs_a_reset_can_be_stopped(DOOR);
}

/// Requirements: G2-a
#[test]
fn g2_a_the_feature_has_the_number_it_was_given() {
    let range = 1u64 << 44 | 1 << 45 | 1 << 46 | 1 << 47 | 1 << 48 | 1 << 49;
    for kind in [Kind::Plain, Kind::Member] {
        let unasked = Rig::untouched(kind, Doors::default());
        assert_eq!(unasked.transport.offered() & range, 0);
        for number in Doors::DEVICE_STOP_RANGE {
            let doors = Doors {
                device_stop: Some(number),
                ..Doors::default()
            };
            let mut rig = Rig::live(kind, doors, conformance::ALL | 1 << number);
            assert_eq!(rig.transport.offered() & range, 1 << number);
            rig.transport.stop(DOOR).unwrap();
            rig.lay(0);
            rig.stays_still();
            rig.transport.resume(DOOR).unwrap();
            rig.all_come_back(1);
        }
    }
}

/// Requirements: G2-c
#[test]
fn g2_c_messages_that_are_owed_wait_for_the_resume() {
    checks::messages_that_are_owed_wait_for_the_resume(DOOR);
}

/// Requirements: G2-c
#[test]
fn g2_c_all_registers_are_after_the_resume_what_they_were() {
    checks::a_resume_brings_back_what_was(DOOR);
}

/// Requirements: G2-c
#[test]
fn g2_c_a_stopped_device_rests_and_survives_its_bus() {
    checks::a_stopped_device_rests(DOOR);
    checks::the_bus_may_sleep_meanwhile(DOOR);
}

/// Requirements: G2-c
#[test]
fn g2_c_a_queue_reset_while_stopped_works_and_moves_nothing() {
    for_each(only(DOOR), |mut rig| {
        rig.transport.stop(DOOR).unwrap();
        rig.lay(0);
        let memory = rig.memory();
        rig.interrupts();
        rig.transport.reset_queue(1).unwrap();
        rig.queues[1].clear();
        rig.transport
            .enable_queue(1, rig.queues[1].layout(), 2)
            .unwrap();
        rig.settle();
        let cleared = rig.memory();
        assert!(memory == cleared, "queue 1 had not been used");
        assert_eq!(rig.interrupts(), QUIET);
        rig.lay(1);
        rig.stays_still();
        rig.transport.resume(DOOR).unwrap();
        rig.all_come_back(2);
    });
}

/// Requirements: G2-d
#[test]
fn g2_d_clearing_the_bit_before_it_shows_calls_the_stop_off() {
    checks::a_stop_is_called_off(DOOR);
}

/// Requirements: G2-e
#[test]
fn g2_e_a_reset_overtakes_a_stop_and_waits_for_what_reaches_memory() {
    checks::a_reset_overtakes_a_stop(DOOR);
}

/// Requirements: S2-6, S2-10
#[test]
fn s2_10_configuration_changed_from_behind_survives_a_reset() {
    checks::news_from_behind_survives_a_reset(DOOR);
}

/// Requirements: S2-10
#[test]
fn s2_10_news_reaches_a_driver_without_queues() {
    checks::news_reaches_a_driver_without_queues(DOOR);
}

/// Requirements: S2-10
#[test]
fn s2_10_the_access_window_leads_to_the_same_registers() {
    checks::the_access_window_leads_to_the_same_registers(DOOR);
}

/// Requirements: S2-9, S2-8
#[test]
fn s2_9_a_device_at_work_on_its_own_thread_stops() {
    checks::a_device_at_work_on_its_own_thread_stops(DOOR);
}
