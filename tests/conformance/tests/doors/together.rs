//! Several reasons to be stopped at once: each is asked for, shown and lifted by itself, in any order, and the device
//! goes on when the last one goes.

use devices::gate::{Mode, Party, Reasons};
use devices::virtio::Suspend;
use driver::access::Dma;
use driver::pci::{change_command, command};
use driver::virtio::{Door, common, status};

use super::checks::{RUNNING, write};
use super::rig::{ALL, Rig, all_doors, for_each};

/// A reason, and how it comes and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    Door(Door),
    BusMaster,
    Paused,
    GuestStop,
    MonitorStop,
    EngineStop,
}

impl Reason {
    fn of(suspend: Door) -> [Self; 7] {
        [
            Self::Door(suspend),
            Self::Door(Door::DeviceStop),
            Self::BusMaster,
            Self::Paused,
            Self::GuestStop,
            Self::MonitorStop,
            Self::EngineStop,
        ]
    }

    fn add(self, rig: &Rig) {
        match self {
            Self::Door(door) => rig.transport.stop(door).unwrap(),
            Self::BusMaster => change_command(rig.pci(), 0, command::BUS_MASTER),
            Self::Paused => rig.function.close(Reasons::PAUSED),
            Self::GuestStop => rig.function.set_mode(Party::Guest, Mode::Stop),
            Self::MonitorStop => rig.function.set_mode(Party::Monitor, Mode::Stop),
            Self::EngineStop => rig.function.set_mode(Party::Engine, Mode::Stop),
        }
    }

    fn remove(self, rig: &Rig) {
        match self {
            Self::Door(door) => rig.transport.resume(door).unwrap(),
            Self::BusMaster => change_command(rig.pci(), command::BUS_MASTER, 0),
            Self::Paused => rig.function.reopen(Reasons::PAUSED),
            Self::GuestStop => rig.function.set_mode(Party::Guest, Mode::Active),
            Self::MonitorStop => rig.function.set_mode(Party::Monitor, Mode::Active),
            Self::EngineStop => rig.function.set_mode(Party::Engine, Mode::Active),
        }
    }

    /// What of it shows in the status.
    fn shows(self, status: u8) -> u8 {
        match self {
            Self::Door(door) => door.stopped(status),
            _ => status,
        }
    }
}

const SUSPENDS: [(Suspend, Door); 2] = [
    (Suspend::V5, Door::SuspendV5),
    (Suspend::V1_4, Door::Suspend),
];

/// Where the device is in both rings, in memory and for itself.
fn position(rig: &Rig) -> Vec<u16> {
    let ring = |queue: usize| rig.queues[queue].layout().used_index();
    let used = [0, 1].map(|queue| rig.machine.dma().load(ring(queue)));
    let next = rig.function.save().queues.into_iter();
    used.into_iter()
        .chain(next.map(|q| q.split().unwrap().next_available))
        .collect()
}

/// All orders of `items`.
fn orders<T: Copy>(items: &[T]) -> Vec<Vec<T>> {
    if items.is_empty() {
        return vec![Vec::new()];
    }
    let with_first = |at: usize| {
        let mut rest = items.to_vec();
        let first = rest.remove(at);
        orders(&rest).into_iter().map(move |mut order| {
            order.insert(0, first);
            order
        })
    };
    (0..items.len()).flat_map(with_first).collect()
}

/// Requirements: G2-f, G1-d, S1-14, S2-8, B-45
#[test]
fn g2_f_reasons_are_lifted_in_any_order_and_the_last_one_lets_the_device_go() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            for order in orders(&Reason::of(door)[..4]) {
                for reason in Reason::of(door) {
                    reason.add(&rig);
                }
                rig.submit(0);
                rig.lay(1);
                rig.kick_all();
                rig.interrupts();
                let before = position(&rig);
                let rest = [Reason::GuestStop, Reason::MonitorStop, Reason::EngineStop];
                for reason in order.iter().chain(&rest) {
                    assert_eq!(position(&rig), before, "{order:?}");
                    assert_eq!(rig.interrupts(), conformance::QUIET);
                    reason.remove(&rig);
                    rig.kick_all();
                }
                assert_eq!(rig.transport.status(), RUNNING);
                rig.all_come_back(2);
                rig.interrupts();
            }
        });
    }
}

/// Requirements: G2-f
#[test]
fn g2_f_each_pair_is_added_and_lifted_in_any_order_and_shows_by_itself() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            let reasons = Reason::of(door);
            for first in reasons {
                for second in reasons.into_iter().filter(|reason| *reason != first) {
                    for (gone, stays) in [(first, second), (second, first)] {
                        first.add(&rig);
                        second.add(&rig);
                        let both = second.shows(first.shows(RUNNING));
                        assert_eq!(rig.transport.status(), both);
                        rig.lay(0);
                        rig.lay(1);
                        rig.kick_all();
                        gone.remove(&rig);
                        assert_eq!(rig.transport.status(), stays.shows(RUNNING));
                        rig.kick_all();
                        assert_eq!(rig.collect(), 0);
                        stays.remove(&rig);
                        assert_eq!(rig.transport.status(), RUNNING);
                        rig.all_come_back(2);
                    }
                }
            }
        });
    }
}

/// Requirements: G2-f, S1-14, S2-10
#[test]
fn g2_f_all_at_once_no_byte_moves() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            for reason in Reason::of(door) {
                reason.add(&rig);
            }
            rig.submit(0);
            rig.submit(1);
            rig.controls.change_config(vec![0x55; 16]);
            rig.settle();
            rig.stays_still();
            for reason in Reason::of(door) {
                reason.remove(&rig);
            }
            rig.all_come_back(2);
            let mut vectors = rig.interrupts();
            vectors.sort_unstable();
            assert_eq!(vectors, [0, 1, 2]);
        });
    }
}

/// Requirements: G2-f, S1-16, S2-9, S0-5
#[test]
fn g2_f_one_chain_in_flight_holds_up_every_acknowledgement() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            rig.occupy(0);
            rig.interrupts();
            rig.state().run(0, false);
            write(&rig, Door::DeviceStop.stop(RUNNING));
            write(&rig, door.stop(Door::DeviceStop.stop(RUNNING)));
            rig.settle();
            assert_eq!(rig.transport.status(), RUNNING);
            assert!(rig.state().runs(0));
            rig.release();
            let all = door.stopped(Door::DeviceStop.stopped(RUNNING));
            assert_eq!(rig.transport.status(), all);
            assert_eq!(rig.interrupts(), [1]);
            assert_eq!(rig.collect(), 1);
            rig.lay(0);
            rig.stays_still();
            rig.transport.resume(door).unwrap();
            assert!(!rig.state().runs(0));
            rig.transport.resume(Door::DeviceStop).unwrap();
            rig.echo(1);
            assert_eq!(rig.outstanding(), 1, "its queue is stopped");
            rig.state().start(0);
            rig.all_come_back(1);
        });
    }
}

/// Requirements: G2-d, G2-f, S1-6
#[test]
fn g2_d_one_of_two_stops_is_called_off_and_the_other_goes_on() {
    for_each(all_doors(Suspend::V5), |mut rig| {
        for (called_off, stays) in [
            (Door::SuspendV5, Door::DeviceStop),
            (Door::DeviceStop, Door::SuspendV5),
        ] {
            rig.occupy(0);
            write(&rig, called_off.stop(stays.stop(RUNNING)));
            rig.lay(0);
            write(&rig, stays.stop(RUNNING));
            rig.settle();
            assert_eq!(rig.controls.held(), 1, "nothing is fetched");
            rig.release();
            assert_eq!(rig.transport.status(), stays.stopped(RUNNING));
            assert_eq!(rig.collect(), 1);
            rig.stays_still();
            rig.transport.resume(stays).unwrap();
            rig.all_come_back(1);
        }
    });
}

/// Requirements: S1-13, S0-2, S0-7, S0-11, B-44
#[test]
fn s1_13_device_state_is_closed_while_suspended() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            rig.echo(0);
            rig.state().stop(0).unwrap();
            rig.lay(0);
            rig.transport.stop(door).unwrap();
            let before = (rig.registers(), rig.place());
            let ask: [&dyn Fn(&Rig); 3] = [
                &|rig| rig.state().set_index(0, 0x1234),
                &|rig| rig.state().start(0),
                &|rig| rig.state().run(1, false),
            ];
            for (number, ask) in ask.into_iter().enumerate() {
                ask(&rig);
                assert_eq!((rig.registers(), rig.place()), before, "{number}");
            }
            rig.stays_still();
            rig.transport.resume(door).unwrap();
            assert_eq!([0, 1].map(|queue| rig.state().runs(queue)), [false, true]);
            assert_eq!(rig.state().index(0), 1);
            rig.echo(1);
            assert_eq!(rig.outstanding(), 1);
            rig.state().start(0);
            rig.all_come_back(1);
        });
    }
}

/// Requirements: S0-10, S0-11, G2-f
#[test]
fn s0_11_a_queue_is_stopped_set_and_started_while_the_device_is_stopped() {
    for_each(all_doors(Suspend::V5), |mut rig| {
        rig.echo(0);
        rig.transport.stop(Door::DeviceStop).unwrap();
        rig.lay(0);
        rig.lay(1);
        rig.state().stop(0).unwrap();
        assert_eq!(rig.state().index(0), 1);
        rig.state().set_index(0, 1);
        rig.state().start(0);
        assert!(rig.state().runs(0));
        rig.stays_still();
        rig.state().stop(1).unwrap();
        rig.transport.resume(Door::DeviceStop).unwrap();
        rig.settle();
        assert_eq!(rig.collect(), 1, "the other stays stopped");
        rig.state().start(1);
        rig.all_come_back(1);
    });
}

/// Requirements: S1-19, S2-6, S0-3
#[test]
fn s1_19_one_reset_ends_all_that_a_driver_asked_for() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            rig.state().stop(1).unwrap();
            rig.transport.stop(Door::DeviceStop).unwrap();
            rig.transport.stop(door).unwrap();
            rig.function.close(Reasons::PAUSED);
            write(&rig, 0);
            assert_eq!(rig.transport.status(), 0);
            assert_eq!(
                rig.function.reasons(),
                Reasons::NO_DRIVER | Reasons::PAUSED,
                "and nothing else"
            );
            rig.function.reopen(Reasons::PAUSED);
            rig.start_over(ALL);
            assert_eq!(rig.transport.status(), RUNNING);
            assert!(rig.state().runs(1));
        });
    }
}

/// Requirements: S1-12, S2-10
#[test]
fn s1_12_in_mode_freeze_the_doors_do_not_move() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            for stopped in [false, true] {
                if stopped {
                    rig.transport.stop(door).unwrap();
                }
                let before = rig.transport.status();
                rig.function.set_mode(Party::Guest, Mode::Freeze);
                for value in [
                    door.stop(before),
                    door.resume(before),
                    Door::DeviceStop.stop(before),
                    RUNNING,
                    0,
                ] {
                    write(&rig, value);
                    rig.state().run(0, false);
                    assert_eq!(rig.transport.status(), before);
                }
                rig.stays_still();
                rig.function.set_mode(Party::Guest, Mode::Active);
                assert_eq!(rig.transport.status(), before);
            }
            rig.transport.resume(door).unwrap();
            assert!(rig.state().runs(0));
            rig.echo(0);
        });
    }
}

/// Requirements: S1-13, B-51
#[test]
fn s1_13_a_queue_reset_under_way_when_the_suspend_comes_is_completed_first() {
    for (suspend, door) in SUSPENDS {
        for_each(all_doors(suspend), |mut rig| {
            rig.occupy(0);
            rig.transport.select(0);
            rig.transport.set(common::QUEUE_RESET, 1);
            write(&rig, door.stop(RUNNING));
            rig.settle();
            assert_eq!(rig.transport.status(), RUNNING);
            rig.release();
            assert_eq!(rig.transport.status() & status::SUSPEND, status::SUSPEND);
            assert_eq!(rig.transport.get(common::QUEUE_RESET), 0);
            assert_eq!(rig.transport.get(common::QUEUE_ENABLE), 0);
            assert_eq!(rig.collect(), 1);
            rig.stays_still();
            rig.transport.resume(door).unwrap();
            rig.queues[0].clear();
            rig.enable(0);
            rig.echo(0);
            rig.echo(1);
        });
    }
}
