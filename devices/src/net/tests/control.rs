//! The control virtqueue, and announcements it ends.

use super::*;
use crate::context::{self, Decoder};
use crate::gate::{Patience, Reasons};
use crate::state::FunctionState;
use crate::testing::NEEDS_RESET;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};

const ACK: [u8; 2] = [3, 0];
const OK: u8 = 0;
const ERR: u8 = 1;
const CONFIG_VECTOR: u16 = 100;
const UP: u8 = S_LINK_UP;
const ASKED: u8 = S_LINK_UP | S_ANNOUNCE;

fn net(n: u8) -> Net {
    Net::new(mac(n), port(&Switch::new(), n, false))
}

fn live(features: u64) -> Driver {
    Driver::live(net(1), features)
}

fn status(driver: &Driver) -> u8 {
    let mut status = [0; 2];
    driver.function.read_config(STATUS, &mut status);
    assert_eq!(status[1], 0);
    status[0]
}

fn command(driver: &mut Driver, bytes: &[u8]) -> u8 {
    let (len, answer) = driver.request(CONTROL, &[Buf::Out(bytes.into()), Buf::In(1)]);
    assert_eq!(len, 1);
    answer[0]
}

fn is_broken(driver: &Driver) -> bool {
    driver.function.status() & NEEDS_RESET != 0
}

#[test]
fn a_control_queue_is_offered_with_what_it_is_for() {
    let features = F_CTRL_VQ | F_GUEST_ANNOUNCE;
    assert_eq!(net(1).features() & features, features);
    assert_eq!(net(1).queue_sizes(), [256; 3]);
    let without = net(1).with_control_queue(false);
    assert_eq!(without.features() & features, 0);
    assert_eq!(without.queue_sizes(), [256; 2]);
}

#[test]
fn whatever_is_no_acknowledgement_is_an_error() {
    let mut driver = live(ALL);
    driver.function.request_announcement();
    for bytes in [
        vec![],
        vec![3],
        vec![3, 1],
        vec![3, 255],
        vec![0, 0, 1],
        vec![1, 1, 2, 0, 0, 0, 0, 1],
        vec![2, 0, 0, 0],
        vec![4, 0, 1, 0],
        vec![255; 4096],
    ] {
        assert_eq!(command(&mut driver, &bytes), ERR, "{bytes:?}");
        assert_eq!(status(&driver), ASKED, "{bytes:?}");
    }
    assert_eq!(command(&mut driver, &ACK), OK);
    assert_eq!(status(&driver), UP);
}

#[test]
fn the_shape_of_a_chain_does_not_matter() {
    let out = |bytes: &[u8]| Buf::Out(bytes.into());
    for (name, bufs, len, answer) in [
        ("in pieces", vec![out(&[3]), out(&[0]), Buf::In(1)], 1, OK),
        ("with data", vec![out(&[3, 0, 9, 9]), Buf::In(1)], 1, OK),
        (
            "with room for a result",
            vec![out(&ACK), Buf::In(1), Buf::In(64)],
            1,
            OK,
        ),
        ("nothing to read", vec![Buf::In(2)], 1, ERR),
        ("no room", vec![out(&ACK)], 0, 0xee),
    ] {
        let mut driver = live(ALL);
        driver.function.request_announcement();
        let (used, mut written) = driver.request(CONTROL, &bufs);
        written.push(0xee);
        assert_eq!((used, written[0]), (len, answer), "{name}");
        assert!(written[1..].iter().all(|byte| *byte == 0xee), "{name}");
        let asked = status(&driver) == ASKED;
        assert_eq!(asked, answer != OK, "{name}");
        assert!(!is_broken(&driver), "{name}");
    }
}

#[test]
fn a_command_outside_memory_breaks_the_device() {
    let mut driver = live(ALL);
    let table = driver.rings[usize::from(CONTROL)].table;
    driver.descriptor(table, 0, u64::MAX - 8, 2, 1, 1);
    driver.descriptor(table, 1, 0x1000, 1, 2, 0);
    driver.publish(CONTROL, 0);
    driver.kick(CONTROL);
    assert!(is_broken(&driver));
}

#[test]
fn a_command_before_one_that_breaks_the_device_counts() {
    let mut driver = live(ALL);
    driver.function.request_announcement();
    let asked = driver.function.config_generation();
    driver.add(CONTROL, &[Buf::Out(ACK.into()), Buf::In(1)]);
    driver.publish(CONTROL, u16::MAX);
    driver.kick(CONTROL);
    assert!(is_broken(&driver));
    assert_eq!(status(&driver), UP);
    assert_ne!(driver.function.config_generation(), asked);
}

#[test]
fn a_driver_without_a_control_queue_has_none() {
    let mut driver = live(ALL & !F_CTRL_VQ);
    driver.add(CONTROL, &[Buf::Out(ACK.into()), Buf::In(1)]);
    driver.kick(CONTROL);
    assert_eq!(driver.used(CONTROL), None);
    assert!(!is_broken(&driver));
}

#[test]
fn commands_wait_while_the_device_is_stopped() {
    let mut driver = live(ALL);
    driver.function.request_announcement();
    let patience = Patience::prompt(Duration::ZERO);
    assert!(driver.function.stop(Reasons::DEVICE_STOPPED, patience));
    driver.add(CONTROL, &[Buf::Out(ACK.into()), Buf::In(1)]);
    driver.kick(CONTROL);
    assert_eq!(driver.used(CONTROL), None);
    assert_eq!(status(&driver), ASKED);
    driver.function.reopen(Reasons::DEVICE_STOPPED);
    driver.turn();
    assert_eq!(driver.used(CONTROL).map(|(_, len)| len), Some(1));
    assert_eq!(status(&driver), UP);
}

#[test]
fn a_driver_is_asked_once_and_acknowledges() {
    let mut driver = live(ALL);
    let before = driver.function.config_generation();
    driver.function.request_announcement();
    assert_eq!(status(&driver), ASKED);
    let asked = driver.function.config_generation();
    assert_ne!(asked, before);
    assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR]);
    assert_eq!(driver.function.take_isr(), 2);

    assert_eq!(command(&mut driver, &ACK), OK);
    assert_eq!(status(&driver), UP);
    // It knows, but whoever reads the configuration meanwhile must notice.
    assert_ne!(driver.function.config_generation(), asked);
    assert_eq!(driver.interrupts.take(), [CONTROL]);

    let acknowledged = driver.function.config_generation();
    assert_eq!(command(&mut driver, &ACK), OK, "once more");
    assert_eq!(driver.function.config_generation(), acknowledged);
}

#[test]
fn who_cannot_answer_is_not_asked() {
    for missing in [F_GUEST_ANNOUNCE, F_CTRL_VQ, F_STATUS] {
        let driver = live(ALL & !missing);
        driver.function.request_announcement();
        assert_eq!(status(&driver), UP, "{missing:#x}");
        assert!(driver.interrupts.take().is_empty(), "{missing:#x}");
    }
    let mut driver = live(ALL & !F_GUEST_ANNOUNCE);
    assert_eq!(command(&mut driver, &ACK), ERR);
    let without = Driver::live(net(1).with_control_queue(false), ALL);
    without.function.request_announcement();
    assert_eq!(status(&without), UP);
    let idle = Driver::new(net(1));
    idle.function.request_announcement();
    assert_eq!(status(&idle), UP, "no driver");
}

/// Requirements: S1-14, S2-10, S3-14, S3-16
#[test]
fn s1_14_a_driver_of_a_stopped_device_is_asked_when_it_goes_on() {
    for reason in [
        Reasons::PAUSED,
        Reasons::SUSPENDED,
        Reasons::DEVICE_STOPPED,
        Reasons::GUEST_FREEZE,
    ] {
        let driver = live(ALL);
        let before = driver.function.config_generation();
        driver.function.close(reason);
        driver.function.request_announcement();
        assert_eq!(status(&driver), UP, "{reason:?}");
        assert_eq!(driver.function.config_generation(), before, "{reason:?}");
        driver.function.reopen(reason);
        driver.turn();
        assert_eq!(status(&driver), ASKED, "{reason:?}");
        assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR], "{reason:?}");
    }
}

#[test]
fn a_reset_ends_an_announcement() {
    let mut driver = live(ALL);
    driver.function.request_announcement();
    driver.status(0);
    assert_eq!(status(&driver), UP);
    driver.start(ALL);
    assert_eq!(status(&driver), UP);

    // One that its driver was not told of yet.
    driver.function.close(Reasons::PAUSED);
    driver.function.request_announcement();
    driver.status(0);
    driver.function.reopen(Reasons::PAUSED);
    driver.start(ALL);
    driver.turn();
    assert_eq!(status(&driver), UP);
}

/// A driver and a twin of its function, with the same memory.
fn twins(device: Net, features: u64) -> (Driver, Driver) {
    let ram = crate::testing::ram();
    let function = |device: Net| {
        let view = ram.view().unwrap();
        crate::virtio::VirtioFunction::new("test", Box::new(device), view).unwrap()
    };
    let mut driver = Driver::of(function(device), &ram);
    driver.start(features);
    let mut other = Driver::of(function(net(1)), &ram);
    other.rings.clone_from(&driver.rings);
    (driver, other)
}

fn stopped(driver: &Driver) -> FunctionState {
    let patience = Patience::prompt(Duration::ZERO);
    assert!(driver.function.stop(Reasons::PAUSED, patience));
    driver.function.save()
}

#[test]
fn an_announcement_that_was_not_acknowledged_is_state() {
    let (driver, mut other) = twins(net(1), ALL);
    driver.function.request_announcement();
    let state = stopped(&driver);
    assert_eq!(state.config[STATUS], ASKED);
    let transient = driver.function.save_transient().unwrap();
    other.function.close(Reasons::PAUSED);
    other.function.restore_exact(&state, &transient).unwrap();
    assert_eq!(other.function.save(), state);
    other.function.reopen(Reasons::PAUSED);
    other.turn();
    assert_eq!(status(&other), ASKED);
    assert_eq!(command(&mut other, &ACK), OK);
    assert_eq!(status(&other), UP);
}

#[test]
fn an_announcement_is_in_the_device_context() {
    let (driver, other) = twins(net(1), ALL);
    driver.function.request_announcement();
    let state = stopped(&driver);
    let shape = driver.function.shape();
    let mut decoder = Decoder::new(&shape);
    decoder.push(&context::encode(&state, &shape)).unwrap();
    assert_eq!(decoder.latest(), Some(&state));
    other.function.close(Reasons::PAUSED);
    other.function.restore(&state).unwrap();
    assert!(other.interrupts.take().is_empty());
    other.function.reopen(Reasons::PAUSED);
    assert!(other.interrupts.take().contains(&CONFIG_VECTOR));
    assert_eq!(status(&other), ASKED);
}

#[test]
fn a_configuration_that_this_device_cannot_have_is_refused() {
    let with_status = |features: u64, status: [u8; 2]| {
        let (driver, other) = twins(net(1), features);
        let mut state = stopped(&driver);
        state.config[STATUS..].copy_from_slice(&status);
        other.function.close(Reasons::PAUSED);
        let outcome = other.function.restore(&state);
        outcome.map_err(|error| error.to_string())
    };
    assert_eq!(with_status(ALL, [ASKED, 0]), Ok(()));
    for (features, status) in [
        (ALL & !F_GUEST_ANNOUNCE, [ASKED, 0]),
        (ALL & !F_CTRL_VQ, [ASKED, 0]),
        (ALL & !F_STATUS, [ASKED, 0]),
        (ALL, [S_ANNOUNCE, 0]),
        (ALL, [ASKED | 4, 0]),
        (ALL, [ASKED, 1]),
    ] {
        let refused = with_status(features, status).unwrap_err();
        assert!(refused.contains("device configuration"), "{refused}");
    }
}

#[test]
fn a_state_of_a_device_without_a_control_queue_needs_one_without() {
    let (driver, other) = twins(net(1).with_control_queue(false), PLAIN);
    let state = stopped(&driver);
    other.function.close(Reasons::PAUSED);
    let refused = other.function.restore(&state).unwrap_err();
    assert_eq!(refused.to_string(), "2 queues; this device has 3");
    let same = Driver::new(net(1).with_control_queue(false));
    same.function.close(Reasons::PAUSED);
    same.function.restore(&state).unwrap();
    assert_eq!(same.function.save().queues, state.queues);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver puts on the control queue, each chain comes back once or the device asks for a reset, and nothing
    /// but an acknowledgement is one.
    #[test]
    fn hostile_commands_come_back_once(
        chains in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..6), prop::collection::vec(0usize..70, 0..4)),
            0..40,
        ),
        broken in prop::option::of(any::<[u64; 4]>()),
    ) {
        let mut driver = live(ALL);
        driver.function.request_announcement();
        let count = chains.len();
        let mut acknowledged = false;
        for (bytes, room) in chains {
            acknowledged |= bytes.starts_with(&ACK) && room.iter().sum::<usize>() > 0;
            let mut bufs = vec![Buf::Out(bytes)];
            bufs.extend(room.into_iter().map(Buf::In));
            driver.add(CONTROL, &bufs);
        }
        driver.kick(CONTROL);
        let mut heads = Vec::new();
        while let Some((head, len)) = driver.used(CONTROL) {
            prop_assert!(len <= 1);
            heads.push(head);
        }
        prop_assert_eq!(heads.len(), count);
        prop_assert_eq!(status(&driver) == UP, acknowledged);
        if let Some([addr, len, flags, next]) = broken {
            let table = driver.rings[usize::from(CONTROL)].table;
            let bytes = [addr.to_le_bytes(), len.to_le_bytes(), flags.to_le_bytes(), next.to_le_bytes()];
            driver.view.write_slice(&bytes.concat(), GuestAddress(table)).unwrap();
            driver.publish(CONTROL, 0);
            driver.kick(CONTROL);
            prop_assert!(driver.used(CONTROL).is_some() || is_broken(&driver));
        }
        driver.status(0);
        prop_assert_eq!(driver.function.status(), 0);
    }
}
