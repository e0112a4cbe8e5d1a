//! What holds for every door, one function each. The tests that cite requirements are in the files of the doors.

use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use conformance::QUIET;
use driver::access::{Dma, DmaExt, FunctionExt, Register};
use driver::pci::{change_command, command};
use driver::virtio::{Door, common, isr, status};

use super::rig::{ALL, CASES, Kind, NO_DOOR, Rig, SIMPLE, for_each, only};

/// How long another thread may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The status of a device that runs.
pub const RUNNING: u8 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

/// Writes the device status.
pub fn write(rig: &Rig, value: u8) {
    rig.transport.set(common::DEVICE_STATUS, value);
}

/// A device with nothing in flight shows the stop and the resume, as a whole byte, at once, as often as it is asked.
pub fn an_idle_device_stops_at_once(door: Door) {
    for_each(only(door), |mut rig| {
        for _ in 0..3 {
            write(&rig, door.stop(RUNNING));
            assert_eq!(rig.transport.status(), door.stopped(RUNNING));
            write(&rig, door.resume(door.stopped(RUNNING)));
            assert_eq!(rig.transport.status(), RUNNING);
            rig.echo(0);
            rig.echo(1);
        }
    });
}

/// A stop is shown when the last chain in flight has been used and its interrupt sent, and not before. Until then and
/// afterwards, nothing new is fetched.
pub fn a_stop_waits_for_what_is_in_flight(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        rig.occupy(1);
        rig.interrupts();
        write(&rig, door.stop(RUNNING));
        rig.submit(0);
        rig.submit(1);
        for _ in 0..3 {
            rig.settle();
            assert_eq!(rig.transport.status(), RUNNING);
        }
        rig.controls.release(1);
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING);
        assert_eq!(rig.controls.held(), 1, "nothing more is fetched");
        rig.controls.release(1);
        rig.settle();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        assert_eq!(rig.interrupts(), [1, 2]);
        assert_eq!(rig.collect(), 2);
        rig.controls.hold(false);
        rig.stays_still();
        rig.transport.resume(door).unwrap();
        rig.all_come_back(2);
    });
}

/// A stopped device does nothing, whatever happens around it, and misses nothing: all that was made available meanwhile
/// comes back once, without another kick, and kicks work as before.
pub fn a_stopped_device_stays_still_and_loses_nothing(door: Door) {
    for_each(only(door), |mut rig| {
        rig.echo(0);
        rig.lay(0);
        rig.transport.stop(door).unwrap();
        rig.submit(0);
        rig.lay(0);
        rig.lay(1);
        rig.submit(1);
        rig.stays_still();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        rig.transport.resume(door).unwrap();
        rig.all_come_back(5);
        assert_eq!(rig.interrupts(), [1, 2]);
        for _ in 0..20 {
            rig.echo(0);
            rig.echo(1);
        }
        assert_eq!(rig.interrupts(), [1, 2].repeat(20));
    });
}

/// A driver that changes its mind before the device has stopped gets a device that runs as if nothing had been.
pub fn a_stop_is_called_off(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        write(&rig, door.stop(RUNNING));
        rig.lay(0);
        rig.lay(1);
        rig.settle();
        assert_eq!(rig.controls.held(), 1);
        write(&rig, RUNNING);
        assert_eq!(rig.transport.status(), RUNNING);
        rig.settle();
        assert_eq!(rig.controls.held(), 3, "it goes on at once");
        rig.release();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.all_come_back(3);
    });
}

/// A driver that did not accept the feature can neither stop the device nor see the bit.
pub fn without_the_feature_the_bit_does_not_exist(door: Door) {
    for kind in [Kind::Plain, Kind::Member] {
        let mut rig = Rig::live(kind, only(door), NO_DOOR);
        for value in [door.stop(RUNNING), door.bit()] {
            write(&rig, value);
            rig.settle();
            assert_eq!(rig.transport.status(), RUNNING);
            rig.echo(0);
        }
        write(&rig, RUNNING);
        assert_eq!(rig.transport.status(), RUNNING);
    }
}

/// Before DRIVER_OK, and in the write that sets it, the bit is ignored.
pub fn before_driver_ok_the_bit_is_ignored(door: Door) {
    for (kind, features) in CASES {
        let mut rig = Rig::untouched(kind, only(door));
        write(&rig, door.bit());
        assert_eq!(rig.transport.status(), 0);
        rig.prepare(features);
        let ready = rig.transport.status();
        for value in [door.stop(ready), door.bit(), ready] {
            write(&rig, value);
            assert_eq!(rig.transport.status(), ready);
        }
        write(&rig, RUNNING | door.bit());
        assert_eq!(rig.transport.status(), RUNNING);
        rig.echo(0);
    }
}

/// A stopped device can be reset, by its status and by its function, and remembers nothing of it.
pub fn a_stopped_device_can_be_reset(door: Door) {
    for (kind, features) in CASES {
        let mut rig = Rig::live(kind, only(door), features);
        rig.transport.stop(door).unwrap();
        rig.lay(0);
        let (memory, resets) = (rig.memory(), rig.controls.resets());
        write(&rig, 0);
        assert_eq!(rig.transport.status(), 0);
        assert_eq!(rig.controls.resets(), resets + 1);
        assert!(memory == rig.memory(), "memory changed");
        let fresh = Rig::untouched(kind, only(door));
        assert_eq!(rig.registers(), fresh.registers());
        for queue in 0..2 {
            assert_eq!(rig.queue_registers(queue), fresh.queue_registers(queue));
        }
        rig.start_over(features);
        assert_eq!(rig.transport.status(), RUNNING);
    }
}

/// A function level reset ends a stop, whether it waits or is complete. What is in flight comes back to nobody.
pub fn a_stopped_function_can_be_reset(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport.stop(door).unwrap();
        rig.lay(0);
        rig.function_level_reset();
        assert_eq!(rig.transport.status(), 0);
        rig.start_over(ALL);
        assert_eq!(rig.transport.status(), RUNNING);
    });
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        write(&rig, door.stop(RUNNING));
        rig.function_level_reset();
        assert_ne!(rig.transport.status(), 0, "a chain is in flight");
        let memory = rig.memory();
        rig.interrupts();
        rig.release();
        assert_eq!(rig.transport.status(), 0);
        assert!(memory == rig.memory(), "memory changed");
        assert_eq!(rig.interrupts(), QUIET);
        rig.start_over(ALL);
        assert_eq!(rig.transport.status(), RUNNING);
    });
}

/// A reset overtakes a stop that waits. Its status reads 0 when nothing is in flight any more; from then on no byte of
/// memory changes.
pub fn a_reset_overtakes_a_stop(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        write(&rig, door.stop(RUNNING));
        write(&rig, 0);
        rig.settle();
        assert_ne!(rig.transport.status(), 0, "a chain is in flight");
        write(&rig, door.stop(RUNNING));
        write(&rig, RUNNING);
        let (memory, _) = (rig.memory(), rig.interrupts());
        rig.release();
        assert_eq!(rig.transport.status(), 0);
        rig.disturb();
        assert!(memory == rig.memory(), "memory changed");
        assert_eq!(rig.interrupts(), QUIET);
        rig.start_over(ALL);
        assert_eq!(rig.transport.status(), RUNNING);
    });
}

/// All registers and places in rings are after the resume as they were before the stop.
pub fn a_resume_brings_back_what_was(door: Door) {
    for_each(only(door), |mut rig| {
        for _ in 0..5 {
            rig.echo(0);
        }
        rig.transport
            .device_set(Register::<u32>::at(4), 0x5a5a_1234);
        let seen = |rig: &Rig| {
            let queues = [0, 1].map(|queue| rig.queue_registers(queue));
            let features = (rig.transport.offered(), rig.transport.accepted());
            (
                conformance::config_bytes(rig.pci(), 0..4096),
                rig.transport.status(),
                queues,
                features,
                rig.registers(),
                rig.place(),
            )
        };
        let before = seen(&rig);
        rig.transport.stop(door).unwrap();
        rig.disturb();
        rig.transport.resume(door).unwrap();
        rig.settle();
        assert_eq!(seen(&rig), before);
        rig.echo(0);
        rig.echo(1);
    });
}

/// What changes behind a stopped device appears, with its generation and its one interrupt, after the resume.
pub fn news_from_behind_waits_for_the_resume(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport.stop(door).unwrap();
        let before = rig.registers();
        rig.interrupts();
        rig.transport.isr();
        for value in [0xa1, 0xa2] {
            rig.controls.change_config(vec![value; 16]);
            rig.settle();
            assert_eq!(rig.registers(), before);
            assert_eq!(rig.transport.isr(), 0);
        }
        rig.stays_still();
        write(&rig, door.resume(door.stopped(RUNNING)));
        assert_eq!(rig.transport.status(), RUNNING);
        assert_eq!(rig.registers(), before, "not before the driver can know");
        assert_eq!(rig.interrupts(), QUIET);
        let generation: u8 = rig.transport.get(common::CONFIG_GENERATION);
        rig.settle();
        assert_eq!(rig.interrupts(), [0]);
        assert_eq!(rig.transport.isr() & isr::CONFIG, isr::CONFIG);
        let now: u8 = rig.transport.get(common::CONFIG_GENERATION);
        assert_ne!(now, generation);
        let config: u32 = rig.transport.device_get(Register::at(8));
        assert_eq!(config, 0xa2a2_a2a2);
        rig.echo(0);
    });
}

/// While a device is about to stop its configuration may change, but once it has stopped nobody is interrupted for
/// that; after the resume they are, once.
pub fn news_while_stopping_is_told_in_the_end(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        write(&rig, door.stop(RUNNING));
        rig.interrupts();
        rig.controls.change_config(vec![0xc3; 16]);
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.release();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        let early = rig.interrupts();
        rig.stays_still();
        rig.transport.resume(door).unwrap();
        rig.settle();
        let all = [early, rig.interrupts()].concat();
        assert_eq!(all.iter().filter(|vector| **vector == 0).count(), 1);
        assert_eq!(rig.transport.device_get::<u8>(Register::at(15)), 0xc3);
        rig.all_come_back(1);
    });
}

/// What the driver writes to the device configuration of a stopped device is lost; reads give what was.
pub fn the_device_configuration_is_closed(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport
            .device_set(Register::<u32>::at(0), 0x0403_0201);
        rig.transport.stop(door).unwrap();
        let before = rig.registers();
        for at in 0..16 {
            rig.transport.device_set(Register::<u8>::at(at), 0x99);
        }
        rig.transport.device_set(Register::<u32>::at(4), u32::MAX);
        assert_eq!(rig.registers(), before);
        assert_eq!(
            rig.transport.device_get::<u32>(Register::at(0)),
            0x0403_0201
        );
        rig.transport.resume(door).unwrap();
        rig.settle();
        assert_eq!(rig.registers(), before);
        rig.transport.device_set(Register::<u8>::at(0), 0x42);
        assert_eq!(rig.transport.device_get::<u8>(Register::at(0)), 0x42);
        rig.echo(0);
    });
}

/// What the driver writes to any common register of a stopped device, other than the status, is lost; reads are valid.
pub fn the_common_configuration_is_closed(door: Door) {
    for_each(only(door), |mut rig| {
        rig.echo(0);
        rig.echo(1);
        let queues = [0, 1].map(|queue| rig.queue_registers(queue));
        rig.transport.stop(door).unwrap();
        let before = (rig.registers(), rig.place());
        let region = rig.transport.common_region();
        for value in [0u32, 1, 2, 0x4444_4444, u32::MAX] {
            for at in [0, 4, 8, 12, 32, 36, 40, 44, 48, 52] {
                rig.pci().set(region, Register::at(at), value);
            }
            for at in [16, 18, 22, 24, 26, 28, 30, 56, 58, 60, 62] {
                rig.pci().set(region, Register::at(at), value as u16);
            }
            rig.pci().set(region, Register::at(21), value as u8);
            for at in [32, 40, 48] {
                let value = u64::from(value) << 32 | u64::from(value);
                rig.pci().set(region, Register::at(at), value);
            }
            rig.settle();
            assert_eq!((rig.registers(), rig.place()), before, "{value:#x}");
        }
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        rig.transport.resume(door).unwrap();
        assert_eq!([0, 1].map(|queue| rig.queue_registers(queue)), queues);
        rig.echo(0);
        rig.echo(1);
    });
}

/// A ring that the driver broke while the device was stopped is found after the resume: then the device asks for a
/// reset, and announces that.
pub fn a_ring_broken_meanwhile_is_found_after_the_resume(door: Door) {
    for_each(only(door), |mut rig| {
        rig.echo(0);
        rig.transport.stop(door).unwrap();
        let ring = *rig.queues[0].layout();
        let available = rig.machine.dma().load(ring.avail_index());
        let wrong = available.wrapping_add(ring.size + 1);
        rig.machine.dma().store(ring.avail_index(), wrong);
        rig.interrupts();
        rig.transport.isr();
        rig.stays_still();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        assert_eq!(rig.transport.isr(), 0);
        rig.transport.resume(door).unwrap();
        rig.settle();
        assert_eq!(rig.transport.status(), RUNNING | status::NEEDS_RESET);
        assert_eq!(rig.interrupts(), [0]);
        assert_eq!(
            rig.transport.stop(door),
            Ok(()),
            "a broken device stops all the same"
        );
        rig.stays_still();
        rig.start_over(SIMPLE);
    });
}

/// A device that needs a reset stops like any other, and its status says both.
pub fn a_device_that_needs_a_reset_can_be_stopped(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        let ring = *rig.queues[1].layout();
        let wrong = ring.size + 1;
        rig.machine.dma().store(ring.avail_index(), wrong);
        rig.transport.notify(1);
        rig.settle();
        let broken = RUNNING | status::NEEDS_RESET;
        write(&rig, door.stop(broken));
        rig.settle();
        assert_eq!(rig.transport.status(), broken, "a chain is in flight");
        rig.release();
        assert_eq!(rig.transport.status(), door.stopped(broken));
        assert_eq!(rig.collect(), 1);
        rig.stays_still();
        rig.start_over(ALL);
    });
}

/// The bus takes its accesses away from a stopped device, and gives them back.
pub fn the_bus_may_sleep_meanwhile(door: Door) {
    for_each(only(door), |mut rig| {
        rig.lay(0);
        rig.transport.stop(door).unwrap();
        change_command(rig.pci(), 0, command::MEMORY | command::BUS_MASTER);
        rig.settle();
        change_command(rig.pci(), command::MEMORY | command::BUS_MASTER, 0);
        rig.settle();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        rig.stays_still();
        rig.transport.resume(door).unwrap();
        rig.all_come_back(1);
    });
}

/// A driver rewrites what it had made available before the device came to it. The device takes what it finds.
pub fn buffers_changed_meanwhile_are_taken_as_they_are(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport.stop(door).unwrap();
        let to = rig.lay(0);
        let ring = *rig.queues[0].layout();
        let head: u16 = rig.machine.dma().get(ring.avail_entry(0));
        let from: u64 = rig.machine.dma().get(ring.descriptor(head));
        rig.stays_still();
        rig.machine.dma().write(from, b"something else, 24 bytes");
        rig.transport.resume(door).unwrap();
        rig.settle();
        assert_eq!(rig.machine.dma().bytes(to, 24), b"something else, 24 bytes");
        assert_eq!(rig.machine.dma().load(ring.used_index()), 1);
    });
}

/// A stopped device costs nothing: what wakes it, wakes it once.
pub fn a_stopped_device_rests(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport.stop(door).unwrap();
        rig.settle();
        for _ in 0..3 {
            rig.submit(0);
            rig.controls.change_config(vec![7; 16]);
            assert!(rig.machine.pump(), "a kick and an event are taken");
            assert!(!rig.machine.pump(), "and then there is nothing to do");
        }
        rig.transport.resume(door).unwrap();
        rig.all_come_back(3);
    });
}

/// A driver that asks and does not wait: it goes on adding, kicks, asks again, and takes things back at any moment.
/// Whatever it does, each chain comes back once.
pub fn an_impatient_driver_loses_nothing(door: Door) {
    for_each(only(door), |mut rig| {
        let running = RUNNING;
        for round in 0..6 {
            rig.occupy(0);
            write(&rig, door.stop(running));
            write(&rig, door.stop(running));
            rig.submit(1);
            if round % 2 == 0 {
                write(&rig, door.resume(door.stopped(running)));
            }
            rig.lay(0);
            write(&rig, door.stop(running));
            rig.release();
            rig.submit(1);
            write(&rig, door.resume(door.stopped(running)));
            rig.lay(0);
            write(&rig, door.stop(rig.transport.status()));
            rig.settle();
            write(&rig, door.resume(rig.transport.status()));
            assert_eq!(rig.transport.status(), running);
            rig.settle();
            assert_eq!(rig.collect(), 5);
            assert_eq!(rig.outstanding(), 0);
            rig.echo(0);
            rig.echo(1);
        }
    });
}

/// The driver of a device that never finishes what it has does not wait for ever: the device keeps on showing that it
/// runs, and the reset is always open.
pub fn a_stuck_device_says_that_it_runs(door: Door) {
    for_each(only(door), |mut rig| {
        rig.occupy(0);
        write(&rig, door.stop(RUNNING));
        for _ in 0..50 {
            rig.kick_all();
            assert_eq!(rig.transport.status(), RUNNING);
        }
        write(&rig, 0);
        rig.release();
        assert_eq!(rig.transport.status(), 0);
        rig.start_over(ALL);
    });
}

/// MSI-X is programmed, masked and unmasked as ever, but what was signalled to a masked vector before the stop leaves
/// after the resume, as the vector is programmed by then.
pub fn messages_that_are_owed_wait_for_the_resume(door: Door) {
    for_each(only(door), |mut rig| {
        let msix = *rig.transport.msix().unwrap();
        msix.mask(rig.pci(), 1, true);
        rig.submit(0);
        rig.settle();
        rig.transport.stop(door).unwrap();
        assert!(msix.is_pending(rig.pci(), 1));
        let mut entry = msix.entry(rig.pci(), 1);
        entry.data = 0x77;
        entry.masked = false;
        msix.set_entry(rig.pci(), 1, entry);
        assert_eq!(msix.entry(rig.pci(), 1), entry);
        rig.stays_still();
        assert!(msix.is_pending(rig.pci(), 1));
        rig.transport.resume(door).unwrap();
        rig.all_come_back(1);
        assert!(!msix.is_pending(rig.pci(), 1));
        let delivered = rig.machine.msi().take().into_iter();
        let data: Vec<_> = delivered.map(|d| d.message.unwrap().data).collect();
        assert_eq!(data, [0x77]);
    });
}

/// What changed behind a stopped device is not lost with a reset either: the next driver sees it.
pub fn news_from_behind_survives_a_reset(door: Door) {
    for_each(only(door), |mut rig| {
        rig.transport.stop(door).unwrap();
        rig.controls.change_config(vec![0x3c; 16]);
        rig.settle();
        rig.transport.reset().unwrap();
        rig.start_over(ALL);
        rig.settle();
        let config: u32 = rig.transport.device_get(Register::at(8));
        assert_eq!(config, 0x3c3c_3c3c);
    });
}

/// News from behind reach a driver that has no queue, too.
pub fn news_reaches_a_driver_without_queues(door: Door) {
    for (kind, features) in CASES {
        let mut rig = Rig::untouched(kind, only(door));
        rig.negotiate(features);
        rig.transport.start();
        rig.transport.stop(door).unwrap();
        rig.controls.change_config(vec![0x18; 16]);
        rig.settle();
        assert_eq!(rig.interrupts(), QUIET);
        rig.transport.resume(door).unwrap();
        rig.settle();
        assert_eq!(rig.interrupts(), [0]);
        assert_eq!(rig.transport.device_get::<u8>(Register::at(0)), 0x18);
    }
}

/// The window to the registers in configuration space leads to the same registers: the status can be written through it,
/// and nothing else.
pub fn the_access_window_leads_to_the_same_registers(door: Door) {
    for_each(only(door), |mut rig| {
        let common = rig.transport.common_region();
        let device = rig.transport.device_region().unwrap();
        let at = |offset: u64| offset as u32;
        let status = at(common.offset + common::DEVICE_STATUS.offset);
        let through = |value: u8| rig.transport.window_set(common.bar, status, value);
        through(door.stop(RUNNING)).unwrap();
        assert_eq!(rig.transport.status(), door.stopped(RUNNING));
        let before = rig.registers();
        let config = at(device.offset);
        rig.transport.window_set(device.bar, config, 0x1122_3344u32);
        assert_eq!(rig.registers(), before);
        let shown = rig.transport.window_get(common.bar, status);
        assert_eq!(shown, Some(door.stopped(RUNNING)));
        through(door.resume(door.stopped(RUNNING))).unwrap();
        assert_eq!(rig.transport.status(), RUNNING);
        rig.echo(0);
    });
}

/// The same with a device that works on a thread of its own: however the stop falls into its work, from the moment it shows
/// no byte of memory changes, and nothing is lost or comes twice.
pub fn a_device_at_work_on_its_own_thread_stops(door: Door) {
    for (kind, features) in CASES {
        let mut rig = Rig::live(kind, only(door), features);
        let ends = AtomicBool::new(false);
        let machine = rig.machine.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    machine.pump();
                    std::thread::yield_now();
                }
            });
            let _end = EndsOnDrop(&ends);
            for _ in 0..40 {
                for _ in 0..6 {
                    rig.submit(0);
                }
                rig.submit(1);
                rig.transport.stop(door).unwrap();
                rig.interrupts();
                rig.lay(1);
                let memory = rig.memory();
                rig.kick_all();
                assert!(memory == rig.memory(), "memory changed");
                assert_eq!(rig.interrupts(), QUIET);
                rig.transport.resume(door).unwrap();
                let pci = Rc::clone(rig.pci());
                let mut back = 0;
                let all = pci.wait_until(PATIENCE, || {
                    back += rig.collect();
                    rig.outstanding() == 0
                });
                assert!(all, "{back} of 8 came back");
                assert_eq!(back, 8);
            }
        });
    }
}

/// Lets the device's thread end, also when the test fails.
struct EndsOnDrop<'a>(&'a AtomicBool);

impl Drop for EndsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
