//! The device-state structure: one queue stops, shows where it is, and goes on there or elsewhere.

use conformance::QUIET;
use devices::virtio::Doors;
use driver::access::{Dma, Register};
use driver::pci::{bars, capabilities};
use driver::virtio::{common, feature, state, status, structure};

use super::checks::RUNNING;
use super::rig::{self, ALL, CASES, Kind, NO_DOOR, Rig, SIMPLE};

const STATE: Doors = Doors {
    suspend: None,
    device_stop: None,
    queue_status: true,
};

fn for_each(test: impl Fn(Rig)) {
    rig::for_each(STATE, test);
}

/// The used index of `queue`, in memory.
fn used(rig: &Rig, queue: usize) -> u16 {
    let ring = rig.queues[queue].layout();
    rig.machine.dma().load(ring.used_index())
}

/// Requirements: S0-1, G0-k
#[test]
fn s0_1_a_capability_of_type_10_says_where_the_structure_is() {
    for kind in [Kind::Plain, Kind::Member] {
        let rig = Rig::untouched(kind, STATE);
        let structures = rig.transport.structures();
        let found: Vec<_> = structures.iter().filter(|s| s.kind == 10).collect();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].capability_len, 16);
        let region = found[0].region;
        assert!(region.len >= 8);
        assert_eq!(region.offset % 4, 0);
        let others = structures.iter().filter(|s| s.kind < 5);
        for other in others.map(|s| s.region) {
            let apart = other.offset >= region.offset + region.len
                || region.offset >= other.offset + other.len;
            assert!(apart, "{other:?}");
        }
        assert!(capabilities(rig.pci()).unwrap().len() > structures.len());
    }
    let rig = Rig::untouched(Kind::Plain, STATE);
    let region = rig.state().region();
    let own = bars(rig.pci());
    let bar = own.iter().find(|bar| bar.index == region.bar).unwrap();
    assert!(region.offset + region.len <= bar.size);
}

/// Requirements: S0-1, G0-a
#[test]
fn s0_1_a_device_that_does_not_offer_it_has_no_such_capability() {
    for kind in [Kind::Plain, Kind::Member] {
        let rig = Rig::untouched(kind, Doors::default());
        let kinds: Vec<_> = rig.transport.structures().iter().map(|s| s.kind).collect();
        assert!(!kinds.contains(&structure::DEVICE_STATE), "{kinds:?}");
    }
}

/// Requirements: S0-2
#[test]
fn s0_2_queue_select_keeps_its_value_and_selects() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.echo(1);
        rig.echo(1);
        rig.state().stop(0).unwrap();
        rig.state().stop(1).unwrap();
        for (queue, index) in [(1, 2), (0, 1), (1, 2)] {
            rig.state().set(state::QUEUE_SELECT, queue);
            assert_eq!(rig.state().get(state::QUEUE_SELECT), queue);
            assert_eq!(rig.state().get(state::LAST_AVAIL_IDX), index);
        }
        rig.state().start(0);
        assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [true, false]);
        for value in [0, 1, 2, 0x1234, 0xffff] {
            rig.state().set(state::QUEUE_SELECT, value);
            assert_eq!(rig.state().get(state::QUEUE_SELECT), value);
        }
    });
}

/// Requirements: G0-b
#[test]
fn g0_b_the_two_queue_selects_do_not_move_each_other() {
    for_each(|rig| {
        for (mine, common) in [(0, 1), (1, 0), (1, 7), (9, 1)] {
            rig.state().set(state::QUEUE_SELECT, mine);
            rig.transport.select(common);
            assert_eq!(rig.state().get(state::QUEUE_SELECT), mine);
            rig.state().set(state::QUEUE_SELECT, mine);
            assert_eq!(rig.transport.get(common::QUEUE_SELECT), common);
        }
        rig.state().set(state::QUEUE_SELECT, 1);
        rig.transport.select(0);
        rig.state().set(state::QUEUE_STATUS, 0);
        assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [true, false]);
    });
}

/// Requirements: G0-c
#[test]
fn g0_c_a_queue_that_does_not_exist_reads_0_and_ignores_writes() {
    for_each(|mut rig| {
        rig.echo(0);
        for queue in [2, 3, 255, 0xffff] {
            rig.state().set(state::QUEUE_SELECT, queue);
            for value in [0, 1] {
                rig.state().set(state::LAST_AVAIL_IDX, 0x5555);
                rig.state().set(state::QUEUE_STATUS, value);
                assert_eq!(rig.state().get(state::LAST_AVAIL_IDX), 0);
                assert_eq!(rig.state().get(state::QUEUE_STATUS), 0);
            }
        }
        rig.echo(0);
        rig.echo(1);
    });
}

/// Requirements: S0-3, G0-g
#[test]
fn s0_3_after_a_reset_no_queue_runs_and_nothing_is_kept() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.state().stop(0).unwrap();
        rig.state().set_index(0, 0x1111);
        rig.transport.reset().unwrap();
        assert_eq!(rig.state().get(state::QUEUE_SELECT), 0);
        for queue in [0, 1] {
            assert!(!rig.state().runs(queue));
            assert_eq!(rig.state().index(queue), 0);
        }
        // Also what is written before a queue is enabled ends with the next reset.
        rig.state().set_index(1, 0x2222);
        rig.transport.reset().unwrap();
        assert_eq!(rig.state().index(1), 0);
        rig.start_over(ALL);
    });
}

/// Requirements: S0-3, S0-5
#[test]
fn s0_3_a_reset_overtakes_a_stop() {
    for_each(|mut rig| {
        rig.occupy(0);
        rig.state().run(0, false);
        rig.transport.set(common::DEVICE_STATUS, 0);
        rig.settle();
        assert_ne!(rig.transport.status(), 0, "a chain is in flight");
        let memory = rig.memory();
        rig.release();
        assert_eq!(rig.transport.status(), 0);
        assert!(memory == rig.memory(), "memory changed");
        assert!(!rig.state().runs(0));
        rig.start_over(ALL);
        assert!(rig.state().runs(0), "the stop is forgotten");
    });
}

/// Requirements: S0-4
#[test]
fn s0_4_an_enabled_queue_runs() {
    for (kind, features) in CASES {
        let mut rig = Rig::untouched(kind, STATE);
        rig.negotiate(features);
        rig.enable(1);
        assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [false, true]);
        rig.enable(0);
        assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [true, true]);
        rig.transport.start();
        rig.echo(0);
        rig.echo(1);
        assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [true, true]);
    }
}

/// Requirements: S0-4
#[test]
fn s0_4_a_queue_that_was_stopped_and_reset_runs_when_it_is_enabled_again() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.state().stop(0).unwrap();
        rig.transport.reset_queue(0).unwrap();
        assert!(!rig.state().runs(0));
        assert_eq!(rig.state().index(0), 0);
        rig.queues[0].clear();
        rig.enable(0);
        assert!(rig.state().runs(0));
        rig.echo(0);
    });
}

/// Requirements: S0-5, G0-j, G0-l
#[test]
fn s0_5_a_queue_reads_1_until_its_last_chain_is_used() {
    for_each(|mut rig| {
        rig.occupy(0);
        rig.occupy(0);
        rig.interrupts();
        rig.state().run(0, false);
        rig.submit(0);
        rig.submit(0);
        for released in [0, 1] {
            rig.controls.release(released);
            rig.settle();
            assert!(rig.state().runs(0));
            assert_eq!(rig.state().index(0), 0, "not yet at rest");
        }
        assert_eq!(rig.controls.held(), 1, "nothing more is fetched");
        rig.controls.release(1);
        rig.settle();
        assert!(!rig.state().runs(0));
        assert_eq!(rig.interrupts().last(), Some(&1), "signalled before");
        assert_eq!(rig.collect(), 2);
        assert_eq!(rig.state().index(0), 2, "available entries stay");
        assert_eq!(used(&rig, 0), 2);
        rig.controls.hold(false);
        rig.stays_still();
        rig.state().start(0);
        rig.all_come_back(2);
    });
}

/// Requirements: S0-5
#[test]
fn s0_5_the_other_queue_goes_on_all_the_while() {
    for_each(|mut rig| {
        rig.occupy(0);
        rig.controls.hold(false);
        rig.state().run(0, false);
        rig.echo(1);
        rig.controls.release(1);
        rig.settle();
        assert!(!rig.state().runs(0));
        assert_eq!(rig.collect(), 1);
        rig.lay(0);
        let used = used(&rig, 0);
        for _ in 0..10 {
            rig.echo(1);
        }
        assert_eq!(self::used(&rig, 0), used);
        rig.state().start(0);
        rig.all_come_back(1);
    });
}

/// Requirements: S0-6
#[test]
fn s0_6_the_status_of_a_queue_that_is_not_enabled_cannot_be_written() {
    for (kind, features) in CASES {
        let mut rig = Rig::untouched(kind, STATE);
        rig.negotiate(features);
        for run in [true, false] {
            rig.state().run(0, run);
            assert!(!rig.state().runs(0));
        }
        rig.enable(0);
        assert!(rig.state().runs(0), "no stop was kept");
        rig.state().run(1, true);
        rig.transport.start();
        assert!(!rig.state().runs(1));
        rig.lay(1);
        let memory = rig.memory();
        rig.kick_all();
        assert!(memory == rig.memory(), "memory changed");
        rig.enable(1);
        rig.all_come_back(1);
    }
}

/// Requirements: S0-7
#[test]
fn s0_7_a_driver_that_stops_and_does_not_wait_loses_nothing() {
    for_each(|mut rig| {
        for _ in 0..5 {
            rig.occupy(0);
            rig.state().run(0, false);
            rig.submit(0);
            rig.state().run(0, true);
            rig.state().run(0, false);
            rig.submit(0);
            rig.release();
            assert!(!rig.state().runs(0));
            rig.submit(0);
            rig.state().run(0, true);
            rig.state().run(0, true);
            rig.all_come_back(4);
            rig.echo(0);
            rig.echo(1);
        }
    });
}

/// Requirements: S0-7
#[test]
fn s0_7_an_idle_queue_stops_at_once_as_often_as_it_is_asked() {
    for_each(|mut rig| {
        for round in 1..=5 {
            rig.state().run(0, false);
            assert!(!rig.state().runs(0));
            rig.state().run(0, false);
            assert!(!rig.state().runs(0));
            rig.state().run(0, true);
            assert!(rig.state().runs(0));
            rig.echo(0);
            assert_eq!(used(&rig, 0), round);
        }
    });
}

/// Requirements: S0-8, G0-f
#[test]
fn s0_8_the_index_of_a_running_queue_reads_0_and_cannot_be_written() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.echo(0);
        rig.state().set_index(0, 0x7777);
        assert_eq!(rig.state().index(0), 0);
        rig.occupy(0);
        rig.state().run(0, false);
        rig.state().set_index(0, 0x7777);
        assert_eq!(rig.state().index(0), 0, "still draining");
        rig.release();
        assert_eq!(rig.state().index(0), 3);
        rig.state().start(0);
        assert_eq!(rig.state().index(0), 0);
        rig.all_come_back(1);
        rig.echo(0);
    });
}

/// Requirements: S0-8
#[test]
fn s0_8_an_index_that_no_ring_can_have_ends_in_needs_reset() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.state().stop(0).unwrap();
        rig.state().set_index(0, 0x8000);
        assert_eq!(rig.state().index(0), 0x8000);
        rig.interrupts();
        rig.state().start(0);
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING | status::NEEDS_RESET);
        assert_eq!(rig.interrupts(), [0]);
        rig.start_over(ALL);
    });
}

/// Requirements: S0-9, G0-l
#[test]
fn s0_9_the_index_is_that_of_the_entry_fetched_next() {
    for_each(|mut rig| {
        for round in 0..20 {
            rig.state().stop(0).unwrap();
            assert_eq!(rig.state().index(0), round);
            assert_eq!(used(&rig, 0), round);
            rig.lay(0);
            rig.kick_all();
            assert_eq!(rig.state().index(0), round, "available, not fetched");
            rig.state().start(0);
            rig.all_come_back(1);
        }
    });
}

/// Requirements: S0-10
#[test]
fn s0_10_an_index_that_was_written_is_where_the_queue_goes_on() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.state().stop(0).unwrap();
        let skipped = rig.lay(0);
        rig.lay(0);
        rig.lay(0);
        rig.state().set_index(0, 2);
        assert_eq!(rig.state().index(0), 2);
        rig.stays_still();
        rig.state().start(0);
        rig.settle();
        assert_eq!(rig.collect(), 2);
        assert_eq!(rig.outstanding(), 1, "the entry before is not fetched");
        assert_eq!(rig.machine.dma().load(skipped), 0xeeee);
        rig.state().stop(0).unwrap();
        assert_eq!(rig.state().index(0), 4);
        // And back to it: the driver shows it alone.
        let ring = *rig.queues[0].layout();
        let available = rig.machine.dma().load(ring.avail_index());
        rig.machine.dma().store(ring.avail_index(), 2);
        rig.state().set_index(0, 1);
        rig.state().start(0);
        rig.settle();
        assert_eq!(rig.collect(), 1);
        rig.state().stop(0).unwrap();
        rig.state().set_index(0, available);
        rig.machine.dma().store(ring.avail_index(), available);
        rig.state().start(0);
        rig.echo(0);
    });
}

/// Requirements: S0-11
#[test]
fn s0_11_a_started_queue_finds_what_became_available_without_a_kick() {
    for_each(|mut rig| {
        rig.echo(0);
        rig.state().stop(0).unwrap();
        for _ in 0..4 {
            rig.lay(0);
        }
        rig.stays_still();
        rig.state().start(0);
        rig.all_come_back(4);
        assert_eq!(rig.interrupts(), [1]);
        for _ in 0..20 {
            rig.echo(0);
        }
        assert_eq!(rig.interrupts(), [1].repeat(20));
    });
}

/// Requirements: S0-11
#[test]
fn s0_11_kicks_of_a_stopped_queue_are_not_lost() {
    for_each(|mut rig| {
        rig.state().stop(1).unwrap();
        rig.submit(1);
        rig.settle();
        rig.submit(1);
        rig.stays_still();
        assert_eq!(rig.interrupts(), QUIET);
        rig.state().start(1);
        rig.all_come_back(2);
    });
}

/// Requirements: G0-a
#[test]
fn g0_a_no_feature_is_asked_of_the_driver() {
    for kind in [Kind::Plain, Kind::Member] {
        let without = Rig::untouched(kind, Doors::default()).transport.offered();
        let mut rig = Rig::live(kind, STATE, feature::VERSION_1);
        assert_eq!(rig.transport.offered(), without);
        rig.state().stop(0).unwrap();
        rig.lay(0);
        rig.stays_still();
        rig.state().start(0);
        rig.all_come_back(1);
    }
}

/// Requirements: G0-a
#[test]
fn g0_a_a_driver_that_does_not_know_the_capability_is_served_as_ever() {
    for kind in [Kind::Plain, Kind::Member] {
        let mut rig = Rig::live(kind, STATE, NO_DOOR);
        for _ in 0..30 {
            rig.echo(0);
            rig.echo(1);
        }
    }
}

/// Requirements: G0-d
#[test]
fn g0_d_other_values_of_queue_status_are_dropped() {
    for_each(|mut rig| {
        for run in [true, false, true] {
            rig.state().run(0, run);
            for value in 2..=255u8 {
                rig.state().set(state::QUEUE_STATUS, value);
                assert_eq!(rig.state().get(state::QUEUE_STATUS), run.into());
            }
            for value in [0x100u32, 0x101, 0x0100_0000, 0x8000_0001, u32::MAX] {
                rig.state().set(Register::at(4), value);
                assert_eq!(rig.state().get(state::QUEUE_STATUS), run.into());
            }
        }
        rig.echo(0);
    });
}

/// Requirements: G0-e
#[test]
fn g0_e_writing_1_while_the_queue_drains_calls_the_stop_off() {
    for_each(|mut rig| {
        rig.occupy(0);
        rig.state().run(0, false);
        rig.lay(0);
        rig.kick_all();
        assert_eq!(rig.controls.held(), 1);
        assert!(rig.state().runs(0));
        rig.state().run(0, true);
        rig.settle();
        assert_eq!(rig.controls.held(), 2, "it goes on at once");
        rig.release();
        assert!(rig.state().runs(0));
        rig.all_come_back(2);
    });
}

/// Requirements: G0-g
#[test]
fn g0_g_an_index_written_before_the_queue_is_enabled_is_where_it_starts() {
    for (kind, features) in CASES {
        let mut rig = Rig::untouched(kind, STATE);
        rig.negotiate(features);
        rig.queues[0].start_at(0xfffd);
        rig.state().set_index(0, 0xfffd);
        assert_eq!(rig.state().index(0), 0xfffd);
        assert!(!rig.state().runs(0));
        rig.enable(0);
        rig.enable(1);
        assert!(rig.state().runs(0));
        rig.transport.start();
        for _ in 0..10 {
            rig.echo(0);
            rig.echo(1);
        }
        rig.state().stop(0).unwrap();
        rig.state().stop(1).unwrap();
        assert_eq!([0, 1].map(|queue| rig.state().index(queue)), [7, 10]);
        assert_eq!(used(&rig, 0), 7);
    }
}

/// Requirements: G0-g, S0-10
#[test]
fn g0_g_an_enabled_queue_is_stopped_and_set_before_it_runs() {
    for (kind, features) in CASES {
        let mut rig = Rig::prepared(kind, STATE, features);
        rig.state().stop(0).unwrap();
        rig.queues[0].start_at(0xfffe);
        rig.state().set_index(0, 0xfffe);
        rig.lay(0);
        rig.transport.start();
        rig.stays_still();
        rig.state().start(0);
        rig.all_come_back(1);
        for _ in 0..10 {
            rig.echo(0);
        }
        rig.state().stop(0).unwrap();
        assert_eq!(rig.state().index(0), 9);
    }
}

/// Requirements: G0-g
#[test]
fn g0_g_a_queue_reset_clears_index_and_status() {
    for_each(|mut rig| {
        rig.echo(1);
        rig.state().stop(1).unwrap();
        rig.state().set_index(1, 0x1234);
        rig.transport.reset_queue(1).unwrap();
        assert_eq!(rig.state().index(1), 0);
        assert!(!rig.state().runs(1));
        // A queue that is not enabled keeps an index until it is reset as well.
        rig.state().set_index(1, 5);
        assert_eq!(rig.state().index(1), 5);
        rig.transport.reset_queue(1).unwrap();
        assert_eq!(rig.state().index(1), 0);
        rig.queues[1].clear();
        rig.enable(1);
        rig.echo(1);
        rig.echo(0);
    });
}

/// Requirements: G0-g
#[test]
fn g0_g_a_queue_that_drains_for_a_stop_can_be_reset() {
    for_each(|mut rig| {
        rig.occupy(0);
        rig.state().run(0, false);
        rig.transport.select(0);
        rig.transport.set(common::QUEUE_RESET, 1);
        rig.settle();
        assert_eq!(rig.transport.get(common::QUEUE_RESET), 1);
        rig.state().run(0, true);
        rig.settle();
        assert_eq!(rig.transport.get(common::QUEUE_RESET), 1);
        rig.release();
        assert_eq!(rig.transport.get(common::QUEUE_RESET), 0);
        assert!(!rig.state().runs(0));
        assert_eq!(rig.state().index(0), 0);
        assert_eq!(rig.collect(), 1, "it was used before");
        rig.echo(1);
    });
}

/// Requirements: G0-h
#[test]
fn g0_h_before_driver_ok_a_queue_reads_1_and_does_nothing() {
    for (kind, features) in CASES {
        let mut rig = Rig::prepared(kind, STATE, features);
        rig.submit(0);
        rig.submit(1);
        assert!(rig.state().runs(0));
        rig.stays_still();
        rig.state().stop(1).unwrap();
        rig.transport.start();
        rig.settle();
        assert_eq!(rig.collect(), 1, "the other is stopped");
        rig.state().start(1);
        rig.all_come_back(1);
    }
}

/// Requirements: G0-i
#[test]
fn g0_i_without_packed_rings_the_structure_has_no_place_for_them() {
    let packed = 1 << 34;
    for kind in [Kind::Plain, Kind::Member] {
        let mut rig = Rig::live(kind, STATE, SIMPLE);
        assert_eq!(rig.transport.offered() & packed, 0);
        let region = rig.state().region();
        assert!(region.len < 16);
        rig.state().stop(0).unwrap();
        for at in [8, 10, 12] {
            rig.state().set(Register::<u16>::at(at), 0x8001);
            assert_eq!(rig.state().get::<u16>(Register::at(at)), 0);
        }
        assert_eq!(rig.state().index(0), 0);
        rig.state().start(0);
        rig.echo(0);
    }
}

/// Requirements: G0-j
#[test]
fn g0_j_entries_nobody_fetched_do_not_hold_up_a_stop() {
    for_each(|mut rig| {
        for _ in 0..3 {
            rig.lay(0);
        }
        rig.transport.notify(0);
        rig.state().run(0, false);
        assert!(!rig.state().runs(0));
        assert_eq!(rig.state().index(0), 0);
        rig.stays_still();
        rig.state().start(0);
        rig.all_come_back(3);
    });
}

/// Requirements: G0-k
#[test]
fn g0_k_registers_are_read_in_any_width_and_the_rest_reads_0() {
    for_each(|mut rig| {
        rig.echo(1);
        rig.echo(1);
        rig.state().stop(1).unwrap();
        rig.state().set_index(1, 0x0302);
        rig.state().set(state::QUEUE_SELECT, 1);
        let bytes = [0, 1, 2, 3, 4, 5, 6, 7].map(|at| rig.state().get::<u8>(Register::at(at)));
        assert_eq!(bytes, [1, 0, 2, 3, 0, 0, 0, 0]);
        let words = [0, 2, 4, 6].map(|at| rig.state().get::<u16>(Register::at(at)));
        assert_eq!(words, [1, 0x0302, 0, 0]);
        let dwords = [0, 4].map(|at| rig.state().get::<u32>(Register::at(at)));
        assert_eq!(dwords, [0x0302_0001, 0]);
        rig.state().set(Register::<u8>::at(5), 0xff);
        rig.state().set(Register::<u16>::at(6), 0xffff);
        assert_eq!(rig.state().get::<u32>(Register::at(4)), 0);
        rig.state().start(0);
    });
}

/// Requirements: G0-k
#[test]
fn g0_k_registers_are_written_in_any_width_that_has_them_whole() {
    for_each(|mut rig| {
        rig.echo(1);
        // queue_select and last_avail_idx at once: of the queue that is selected by it.
        rig.state().stop(1).unwrap();
        rig.state().set(state::QUEUE_SELECT, 0);
        rig.state().set(Register::at(0), 0x0001_0001u32);
        assert_eq!(rig.state().get(state::QUEUE_SELECT), 1);
        assert_eq!(rig.state().get(state::LAST_AVAIL_IDX), 1);
        for write in [
            |rig: &Rig, on: u8| rig.state().set(Register::<u8>::at(4), on),
            |rig: &Rig, on: u8| rig.state().set(Register::<u16>::at(4), on.into()),
            |rig: &Rig, on: u8| rig.state().set(Register::<u32>::at(4), on.into()),
        ] {
            write(&rig, 1);
            assert_eq!(rig.state().get(state::QUEUE_STATUS), 1);
            rig.echo(1);
            write(&rig, 0);
            assert_eq!(rig.state().get(state::QUEUE_STATUS), 0);
        }
        let before = rig.registers();
        rig.state().set(Register::<u16>::at(1), 0x0101);
        rig.state().set(Register::<u16>::at(3), 0x0101);
        rig.state().set(Register::<u32>::at(2), 0x0001_0101);
        assert_eq!(rig.registers(), before, "not aligned");
    });
}

/// Requirements: S0-5, S0-11
#[test]
fn s0_5_a_queue_that_stops_without_bus_mastering_goes_on_with_it() {
    use driver::pci::{change_command, command};
    for_each(|mut rig| {
        rig.lay(0);
        change_command(rig.pci(), 0, command::BUS_MASTER);
        rig.state().stop(0).unwrap();
        rig.state().start(0);
        let memory = rig.memory();
        rig.kick_all();
        assert!(memory == rig.memory(), "memory changed");
        change_command(rig.pci(), command::BUS_MASTER, 0);
        rig.all_come_back(1);
    });
}
