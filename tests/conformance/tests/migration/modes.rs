//! Modes: which there are, who may change them, and what a VF does and does not do in each.

use devices::admin::{Options, Profile};
use driver::access::{Function, FunctionExt};
use driver::pci::{VectorEntry, change_command, command, find_capability, id, request_flr};
use driver::virtio::migration::{CommandError, Migrate, mode, opcode};
use driver::virtio::{common, status};

use crate::rig::{BAD_FIELD, BAD_STATE, Rig, VF};

use conformance::QUIET;
use mode::{ACTIVE, FREEZE, STOP};

/// Requirements: S3-1, S3-37, G3-a, G3-r
#[test]
fn s3_1_all_commands_are_offered_or_none() {
    let mut rig = Rig::new(1);
    let all = opcode::ALL.iter().fold(3, |set, opcode| set | 1 << opcode);
    for driver in rig.both() {
        assert_eq!(driver.use_all(), Ok(all));
        let hole = driver.ask(0x0e, VF, &[], 8).map(drop);
        assert_eq!(hole, Err(CommandError::Refused(22, 2)));
    }
    let options = Options {
        profile: Profile::V1_4,
        ..Options::default()
    };
    let mut other = Rig::with(1, options);
    for driver in other.both() {
        assert_eq!(driver.use_all(), Ok(3));
        for opcode in opcode::ALL {
            let refused = driver.ask(opcode, VF, &[], 8).map(drop);
            assert_eq!(refused, Err(CommandError::Refused(22, 2)), "{opcode:#x}");
        }
    }
}

/// Requirements: S3-2, S3-3
#[test]
fn s3_2_a_vf_is_active_whenever_it_comes_to_exist() {
    let mut rig = Rig::new(2);
    for round in 0..2 {
        for driver in rig.both() {
            assert_eq!([driver.mode(1), driver.mode(2)], [Ok(ACTIVE); 2], "{round}");
            driver.set_mode(1, FREEZE).unwrap();
            driver.set_mode(2, STOP).unwrap();
            assert_eq!([driver.mode(1), driver.mode(2)], [Ok(FREEZE), Ok(STOP)]);
        }
        rig.group.disable();
        rig.group.enable(2);
    }
}

/// Requirements: S3-3, S3-4, G3-o
#[test]
fn s3_4_any_mode_follows_any_mode_and_itself() {
    let mut rig = Rig::new(2);
    for driver in rig.both() {
        for from in mode::ALL {
            for to in mode::ALL {
                driver.set_mode(VF, from).unwrap();
                assert_eq!(driver.set_mode(VF, to), Ok(()), "{from} to {to}");
                assert_eq!(driver.mode(VF), Ok(to), "{from} to {to}");
                assert_eq!(driver.mode(2), Ok(ACTIVE), "its sibling");
            }
        }
        driver.set_mode(VF, ACTIVE).unwrap();
    }
}

/// Requirements: S3-5, S3-6, G3-p
#[test]
fn s3_5_there_are_three_modes() {
    let mut rig = Rig::new(1);
    for driver in rig.both() {
        for held in mode::ALL {
            driver.set_mode(VF, held).unwrap();
            for wrong in 3..=255 {
                assert_eq!(driver.set_mode(VF, wrong), Err(BAD_FIELD), "{wrong}");
            }
            assert_eq!(driver.mode(VF), Ok(held));
        }
        // The mode is one byte: what follows it says nothing, and one that is missing is 0 (B-8).
        driver
            .ask(opcode::MODE_SET, VF, &[STOP, 0xff, 0xff], 0)
            .unwrap();
        assert_eq!(driver.mode(VF), Ok(STOP));
        driver.ask(opcode::MODE_SET, VF, &[], 0).unwrap();
        assert_eq!(driver.mode(VF), Ok(ACTIVE));
    }
}

/// Requirements: S3-6, S3-7, S3-45, G3-n, G3-p
#[test]
fn s3_7_a_half_read_context_keeps_the_mode_from_active_and_stop() {
    let mut rig = Rig::new(1);
    for driver in rig.both() {
        for held in mode::ALL {
            driver.set_mode(VF, held).unwrap();
            let size = driver.context_size(VF, 0).unwrap();
            driver.read_context(VF, 9).unwrap();
            for to in [ACTIVE, STOP].into_iter().filter(|to| *to != held) {
                assert_eq!(driver.set_mode(VF, to), Err(BAD_STATE), "{held} to {to}");
                assert_eq!(driver.mode(VF), Ok(held));
            }
            // Setting the same mode is no change, and keeps the place (S3-4).
            assert_eq!(driver.set_mode(VF, held), Ok(()));
            assert_eq!(driver.context_size(VF, 0), Ok(size - 9));
            // Entering Freeze is, and drops it.
            assert_eq!(driver.set_mode(VF, FREEZE), Ok(()));
            let left = if held == FREEZE { size - 9 } else { size };
            assert_eq!(driver.context_size(VF, 0), Ok(left));
            driver.discard(VF).unwrap();
            assert_eq!(driver.set_mode(VF, ACTIVE), Ok(()));
        }
    }
}

/// Requirements: S3-6, S3-7, S3-47, G3-n
#[test]
fn s3_47_a_half_written_context_keeps_the_vf_in_freeze() {
    let mut rig = Rig::new(1);
    let function = rig.function(1).clone();
    for driver in rig.both() {
        driver.set_mode(VF, FREEZE).unwrap();
        let context = driver.read_all(VF, 4096).unwrap();
        let before = function.save();
        for cut in [1, 4, 20, context.len() - 1] {
            driver.write_context(VF, &context[..cut]).unwrap();
            for to in [ACTIVE, STOP] {
                assert_eq!(driver.set_mode(VF, to), Err(BAD_STATE), "{cut}");
            }
            assert_eq!(driver.set_mode(VF, FREEZE), Ok(()));
            assert_eq!(driver.mode(VF), Ok(FREEZE));
            // The rest may still come.
            driver.write_context(VF, &context[cut..]).unwrap();
        }
        driver.write_context(VF, &context[..7]).unwrap();
        driver.discard(VF).unwrap();
        assert_eq!(driver.set_mode(VF, ACTIVE), Ok(()));
        assert_eq!(function.save(), before);
    }
}

/// Requirements: S3-8, S3-10, S3-15, G3-bb
#[test]
fn s3_15_a_vf_that_is_not_active_touches_nothing_and_loses_no_kick() {
    let mut rig = Rig::new(2);
    let mut vf = rig.drive(1);
    let mut sibling = rig.drive(2);
    for party in 0..2 {
        for held in [STOP, FREEZE] {
            rig.both()[party].set_mode(VF, held).unwrap();
            vf.submit(0, b"kicked", 16);
            vf.submit(1, b"another", 16);
            rig.quiet();
            let before = rig.memory();
            for queue in [0, 1, 0] {
                vf.transport.notify(queue);
                rig.settle();
            }
            assert!(rig.memory() == before, "mode {held}");
            assert_eq!(rig.interrupts(), QUIET);
            assert_eq!(sibling.request(0, b"sibling", 16), b"sibling");
            rig.quiet();
            rig.both()[party].set_mode(VF, ACTIVE).unwrap();
            assert_eq!((vf.complete(0), vf.complete(1)), (Some(6), Some(7)));
            let mut vectors = rig.interrupts();
            vectors.sort_unstable();
            assert_eq!(vectors, [1, 2]);
        }
    }
}

/// Requirements: S3-14, S3-16
#[test]
fn s3_16_a_change_of_configuration_is_announced_when_active_again() {
    let mut rig = Rig::new(1);
    let vf = rig.drive(1);
    let read = || -> Vec<u8> {
        let register = |at| {
            vf.transport
                .device_get::<u8>(driver::access::Register::at(at))
        };
        (0..16).map(register).collect()
    };
    let mut value = 0x40;
    for party in 0..2 {
        for held in [STOP, FREEZE] {
            let old = read();
            let generation: u8 = vf.transport.get(common::CONFIG_GENERATION);
            rig.both()[party].set_mode(VF, held).unwrap();
            let before = rig.function(1).save();
            rig.quiet();
            value += 1;
            rig.controls(1).change_config(vec![value; 16]);
            rig.settle();
            assert_eq!(rig.interrupts(), QUIET);
            assert_eq!((read(), rig.function(1).save()), (old, before));
            assert_eq!(vf.transport.get(common::CONFIG_GENERATION), generation);
            rig.both()[party].set_mode(VF, ACTIVE).unwrap();
            rig.settle();
            assert_eq!(rig.interrupts(), [0], "the configuration's vector");
            assert_eq!(read(), [value; 16]);
            assert_ne!(vf.transport.get(common::CONFIG_GENERATION), generation);
        }
    }
}

/// Requirements: S3-10, S3-11, G3-aa, G3-ee
#[test]
fn s3_10_in_stop_configuration_writes_resets_and_reads_work() {
    for party in 0..2 {
        let mut rig = Rig::new(1);
        let vf = rig.drive(1);
        rig.both()[party].set_mode(VF, STOP).unwrap();
        let before = rig.function(1).save();
        // What is read is true.
        assert_eq!(vf.transport.status(), before.registers.status);
        assert_eq!(vf.transport.queue_size(0), before.queues[0].size);
        assert_eq!(u128::from(vf.transport.offered()), before.offered);
        assert_eq!(u128::from(vf.transport.accepted()), before.accepted);
        // Written is what changes, and nothing else.
        let quiet = rig.function(1).save();
        rig.settle();
        assert_eq!(rig.function(1).save(), quiet);
        vf.transport
            .device_set(driver::access::Register::<u32>::at(4), 0x0403_0201);
        assert_eq!(rig.function(1).save().config[4..8], [1, 2, 3, 4]);
        // A reset resets, and the driver can start over.
        vf.transport.reset().unwrap();
        assert_eq!(rig.function(1).save().accepted, 0);
        let mut again = rig.drive(1);
        again.submit(0, b"later", 8);
        assert_eq!(again.complete(0), None);
        rig.both()[party].set_mode(VF, ACTIVE).unwrap();
        assert_eq!(again.complete(0), Some(5));
    }
}

/// Requirements: S3-12, G3-cc
#[test]
fn s3_12_what_pci_defines_works_in_every_mode() {
    let mut rig = Rig::new(1);
    for party in 0..2 {
        for held in mode::ALL {
            let vf = rig.drive(1);
            let function = vf.transport.function().clone();
            rig.both()[party].set_mode(VF, held).unwrap();
            let before = rig.function(1).save();
            // Bus mastering.
            for (set, clear) in [(0, command::BUS_MASTER), (command::BUS_MASTER, 0)] {
                change_command(&function, set, clear);
                let now: u16 = function.config(0x04);
                assert_eq!(now & command::BUS_MASTER, set);
            }
            // MSI-X: the function mask, and an entry of the table.
            let msix = vf.transport.msix().unwrap();
            for masked in [true, false] {
                msix.set_control(&function, true, masked);
                let entry = VectorEntry {
                    address: conformance::MESSAGE_ADDRESS,
                    data: 0x55,
                    masked,
                };
                msix.set_entry(&function, 1, entry);
                assert_eq!(msix.entry(&function, 1), entry);
            }
            // None of that is the context's (G3-cc).
            assert_eq!(rig.function(1).save(), before);
            // FLR.
            assert!(request_flr(&function));
            rig.settle();
            assert_eq!(rig.function(1).save().registers.status, 0);
            assert_eq!(
                rig.both()[party].mode(VF),
                Ok(held),
                "the mode stays (G3-z)"
            );
            rig.both()[party].set_mode(VF, ACTIVE).unwrap();
            let mut vf = rig.drive(1);
            assert_eq!(vf.request(0, b"fresh", 8), b"fresh");
        }
    }
}

/// VFs have no power management capability, so there is neither an event to send nor a transition to wait for.
///
/// Requirements: S3-13, S3-21
#[test]
fn s3_13_vfs_send_no_power_management_events_and_change_no_power_states() {
    let mut rig = Rig::new(2);
    for held in mode::ALL {
        rig.guest.set_mode(VF, held).unwrap();
        for number in [1, 2] {
            let vf = rig.group.vf(number);
            assert_eq!(find_capability(&vf, id::POWER_MANAGEMENT), Ok(None));
        }
    }
}

/// Requirements: S3-14, S3-17, S3-48, G3-aa
#[test]
fn s3_17_in_freeze_no_register_takes_a_write() {
    for party in 0..2 {
        let mut rig = Rig::new(1);
        let mut vf = rig.drive(1);
        // ISR status has something to clear, and queue 1 is free to be written.
        vf.request(0, b"used", 8);
        vf.transport.reset_queue(1).unwrap();
        rig.both()[party].set_mode(VF, FREEZE).unwrap();
        let before = rig.function(1).save();
        let t = &vf.transport;
        for value in [0, 1, 2, 0x1f, 0x80, 0xff] {
            t.set(common::DEVICE_STATUS, value);
        }
        for select in [0, 1, 7] {
            t.set(common::DEVICE_FEATURE_SELECT, select);
            t.set(common::DRIVER_FEATURE_SELECT, select);
            t.set(common::DRIVER_FEATURE, 0);
            t.set(common::QUEUE_SELECT, select as u16);
            t.set(common::QUEUE_SIZE, 4);
            t.set(common::QUEUE_MSIX_VECTOR, 2);
            t.set(common::QUEUE_DESC, 0x5000);
            t.set(common::QUEUE_DRIVER, 0x6000);
            t.set(common::QUEUE_DEVICE, 0x7000);
            t.set(common::QUEUE_ENABLE, 1);
            t.set(common::QUEUE_RESET, 1);
            t.set(common::CONFIG_MSIX_VECTOR, 1);
            t.notify(select as u16);
        }
        t.device_set(driver::access::Register::<u32>::at(0), u32::MAX);
        t.isr();
        rig.settle();
        assert_eq!(rig.function(1).save(), before);
        assert_eq!(rig.both()[party].mode(VF), Ok(FREEZE));
        // The driver that broke the rule gets on all the same.
        rig.both()[party].set_mode(VF, ACTIVE).unwrap();
        assert_eq!(vf.transport.isr(), 1, "the read in Freeze took nothing");
        assert_eq!(vf.request(0, b"goes on", 8), b"goes on");
        assert_eq!(vf.transport.status() & status::NEEDS_RESET, 0);
    }
}

/// Requirements: S3-18, S3-48
#[test]
fn s3_18_in_freeze_the_access_window_takes_no_writes_and_reads_as_ever() {
    let mut rig = Rig::new(1);
    let vf = rig.drive(1);
    let t = &vf.transport;
    let window = t.window().unwrap();
    let function = t.function();
    let region = t.common_region();
    let status = region.offset as u32 + 20;
    let select = region.offset as u32 + 22;
    for party in 0..2 {
        // It aims at device_status.
        let running: u8 = t.window_get(region.bar, status).unwrap();
        assert_eq!(running, t.status());
        let aimed = conformance::config_bytes(function, window..window + 20);
        rig.both()[party].set_mode(VF, STOP).unwrap();
        assert_eq!(function.config::<u8>(window + 16), running);
        t.window_set::<u16>(region.bar, select, 1).unwrap();
        assert_eq!(rig.function(1).save().registers.queue_select, 1, "Stop");
        t.window_set::<u16>(region.bar, select, 0).unwrap();
        let _: u8 = t.window_get(region.bar, status).unwrap();
        rig.both()[party].set_mode(VF, FREEZE).unwrap();
        let before = rig.function(1).save();
        // Aim and data both are left as they are, in any width.
        t.window_set::<u16>(region.bar, select, 1).unwrap();
        t.window_set::<u8>(region.bar, status, 0).unwrap();
        for at in 4..20 {
            function.write_config(window + at, &[0]);
        }
        rig.settle();
        assert_eq!(rig.function(1).save(), before);
        let frozen = conformance::config_bytes(function, window..window + 20);
        assert_eq!(frozen, aimed);
        rig.both()[party].set_mode(VF, ACTIVE).unwrap();
        assert_eq!(function.config::<u8>(window + 16), running);
    }
}

/// Requirements: S3-8, S3-14, S3-17
#[test]
fn s3_8_the_stops_of_both_drivers_hold_until_both_are_gone() {
    let mut rig = Rig::new(1);
    let mut vf = rig.drive(1);
    for held in mode::ALL {
        for other in [STOP, FREEZE] {
            rig.guest.set_mode(VF, held).unwrap();
            rig.monitor.set_mode(VF, other).unwrap();
            assert_eq!(rig.guest.mode(VF), Ok(held), "the guest's is its own");
            assert_eq!(rig.monitor.mode(VF), Ok(other));
            vf.submit(0, b"waits", 8);
            assert_eq!(vf.complete(0), None);
            rig.guest.set_mode(VF, ACTIVE).unwrap();
            assert_eq!(vf.complete(0), None, "the monitor's holds");
            rig.guest.set_mode(VF, held).unwrap();
            rig.monitor.set_mode(VF, ACTIVE).unwrap();
            assert_eq!(vf.complete(0), (held == ACTIVE).then_some(5));
            rig.guest.set_mode(VF, ACTIVE).unwrap();
            assert_eq!(vf.complete(0), (held != ACTIVE).then_some(5));
        }
    }
}
