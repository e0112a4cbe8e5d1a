//! The virtio core, driven through a device that does what a test tells it.

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

mod exact;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::*;
use crate::gate::{Patience, Reasons};
use crate::state::{DeviceState, Unsavable};
use crate::testing::{
    ACKNOWLEDGE, Buf, DRIVER, DRIVER_OK, Driver, FEATURES_OK, INDIRECT, NEEDS_RESET, NEXT, RAM,
    WRITE,
};

/// A feature of the probe's own.
const F_OWN: u64 = 1 << 3;
const CONFIG_VECTOR: u16 = 100;
const LIVE: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// Token of the source that returns what is held.
const RELEASE: u16 = 0;
/// Token of the source that works on queue 1.
const FEED: u16 = 1;

/// What a test sees and sets of a probe.
#[derive(Default)]
struct Control {
    /// Keep chains of queue 0 until released.
    hold: bool,
    held: Vec<(u16, Chain)>,
    release: bool,
    /// Work on queue 1 when the source says so.
    feed: bool,
    change_config: bool,
    /// Take the chains of queue 0 only when there are as many.
    together: usize,
    popped: u32,
    /// Called when queue 0 was found empty.
    refill: Option<Box<dyn FnMut() + Send>>,
    resets: u32,
    activated: Option<u64>,
}

/// Returns every chain of queue 0, unless told to hold it; those of queue 1 when its source is fed.
#[derive(Clone, Default)]
struct Probe(Arc<Mutex<Control>>);

impl Probe {
    fn control(&self) -> MutexGuard<'_, Control> {
        self.0.lock().unwrap()
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        F_OWN
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![16, 16]
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.control().activated = Some(features);
    }

    fn reset(&mut self) {
        let mut control = self.control();
        assert!(control.held.is_empty(), "reset with chains in flight");
        control.resets += 1;
        control.activated = None;
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        if queue == 1 {
            return Ok(Progress::Waiting);
        }
        let mut control = self.control();
        let mut gathered = Vec::new();
        while gathered.len() < control.together {
            let Some(chain) = io.pop(queue)? else {
                while let Some(chain) = gathered.pop() {
                    io.unpop(queue, chain);
                }
                return Ok(Progress::Exhausted);
            };
            gathered.push(chain);
        }
        for chain in gathered {
            io.push(queue, chain.ticket(), 0)?;
        }
        if control.together != 0 {
            return Ok(Progress::Waiting);
        }
        while let Some(chain) = io.pop(queue)? {
            control.popped += 1;
            if control.hold {
                control.held.push((queue, chain));
            } else {
                io.push(queue, chain.ticket(), chain.writable_len() as u32)?;
            }
        }
        if let Some(refill) = &mut control.refill {
            refill();
        }
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        [RELEASE, FEED].map(|token| Source { fd: -1, token }).into()
    }

    fn on_event(&mut self, token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        let mut control = self.control();
        if std::mem::take(&mut control.change_config) {
            io.config_changed();
        }
        if token == RELEASE && control.release {
            for (queue, chain) in std::mem::take(&mut control.held) {
                io.push(queue, chain.ticket(), 0)?;
            }
        }
        if token == FEED && control.feed {
            while let Some(chain) = io.pop(1)? {
                io.push(1, chain.ticket(), 0)?;
            }
        }
        Ok(())
    }
}

fn live(wanted: u64) -> (Probe, Driver) {
    let probe = Probe::default();
    let driver = Driver::live(probe.clone(), wanted);
    (probe, driver)
}

fn one() -> [Buf; 2] {
    [Buf::Out(vec![1; 8]), Buf::In(8)]
}

/// Fails if `work` does not come to an end.
fn in_time(work: impl FnOnce() + Send + 'static) {
    let (done, finished) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        work();
        // The test may have given up.
        let _ = done.send(());
    });
    let outcome = finished.recv_timeout(crate::testing::PATIENCE);
    assert!(outcome.is_ok(), "it spins");
}

// Status and features ----------------------------------------------------------------------------------------------

#[test]
fn the_status_follows_its_state_machine() {
    const A: u8 = ACKNOWLEDGE;
    const AD: u8 = A | DRIVER;
    const ADF: u8 = AD | FEATURES_OK;
    const FAILED: u8 = 128;
    let cases: &[(&str, &[u8], u8)] = &[
        ("after construction", &[], 0),
        ("step by step", &[A, AD, ADF, LIVE], LIVE),
        ("bits are never cleared", &[A, AD, A, ADF, A], ADF),
        ("all at once", &[LIVE], LIVE),
        ("DRIVER_OK needs FEATURES_OK", &[AD | DRIVER_OK], AD),
        ("the driver cannot set NEEDS_RESET", &[AD | NEEDS_RESET], AD),
        ("unassigned bits do not stick", &[AD | 16 | 32], AD),
        ("giving up", &[AD, AD | FAILED], AD | FAILED),
        ("0 resets", &[LIVE, 0], 0),
        ("and again", &[LIVE, 0, 0, A], A),
    ];
    for (name, writes, status) in cases {
        let driver = Driver::new(Probe::default());
        driver.function.set_driver_features(1, 1);
        for value in *writes {
            driver.status(*value);
        }
        assert_eq!(driver.function.status(), *status, "{name}");
    }
}

#[test]
fn features_are_refused_unless_offered_and_of_version_1() {
    let cases: &[(&str, u32, u32, bool)] = &[
        ("version 1 alone", 0, 1, true),
        (
            "own and transport",
            F_OWN as u32 | 3 << 28,
            1 | 1 << 8,
            true,
        ),
        ("no version 1", F_OWN as u32, 0, false),
        ("nothing", 0, 0, false),
        ("a device bit that is not offered", 1, 1, false),
        ("a transport bit that is not offered", 0, 1 | 1 << 2, false),
    ];
    for (name, low, high, accepted) in cases {
        let probe = Probe::default();
        let driver = Driver::new(probe.clone());
        driver.status(ACKNOWLEDGE | DRIVER);
        driver.function.set_driver_features(0, *low);
        driver.function.set_driver_features(1, *high);
        driver.status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let ok = driver.function.status() & FEATURES_OK != 0;
        assert_eq!(ok, *accepted, "{name}");
        driver.status(LIVE);
        assert_eq!(driver.function.is_live(), *accepted, "{name}");
        assert_eq!(probe.control().activated.is_some(), *accepted, "{name}");
    }
}

#[test]
fn features_do_not_change_once_they_are_ok() {
    let (probe, driver) = live(F_OWN);
    driver.function.set_driver_features(0, 0);
    assert_eq!(driver.function.driver_features(0), F_OWN as u32);
    assert_eq!(probe.control().activated, Some(F_OWN | feature::VERSION_1));
    driver.function.set_driver_features(2, 7);
    assert_eq!(driver.function.driver_features(2), 0);
    assert_eq!(driver.function.device_features(2), 0);
}

#[test]
fn a_reset_waits_for_what_is_in_flight_and_then_reads_0() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    driver.status(0);
    assert_eq!(driver.function.status(), LIVE);
    assert!(driver.function.is_resetting());
    assert_eq!(probe.control().resets, 0);
    // Nothing gets through meanwhile.
    driver.status(LIVE);
    driver.add(0, &one());
    driver.kick(0);
    assert_eq!(probe.control().popped, 1);
    probe.control().release = true;
    driver.turn();
    assert_eq!(driver.function.status(), 0);
    assert_eq!(probe.control().resets, 1);
    assert!(!driver.function.queue(0).unwrap().enabled);
    assert_eq!(driver.function.driver_features(1), 0);
    // And the device works again.
    *probe.control() = Control::default();
    driver.start(0);
    assert_eq!(driver.request(0, &one()).0, 8);
}

#[test]
fn what_comes_back_during_a_reset_is_neither_used_nor_signalled() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.add(0, &one());
    driver.kick(0);
    driver.status(0);
    probe.control().release = true;
    driver.turn();
    assert_eq!(driver.function.status(), 0);
    assert_eq!(driver.used(0), None);
    assert!(driver.interrupts.take().is_empty());
}

// Queues -----------------------------------------------------------------------------------------------------------

#[test]
fn a_queue_reset_waits_for_what_is_in_flight_and_leaves_the_other_queue_alone() {
    let (probe, mut driver) = live(feature::RING_RESET);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    let _ = driver.function.reset_queue(0);
    let info = driver.function.queue(0).unwrap();
    assert!(info.enabled && info.resetting);
    probe.control().release = true;
    driver.turn();
    let info = driver.function.queue(0).unwrap();
    assert!(!info.enabled && !info.resetting);
    assert_eq!(info.registers.descriptor_area, 0);
    assert!(driver.function.queue(1).unwrap().enabled);
    *probe.control() = Control::default();
    driver.enable(0);
    assert_eq!(driver.request(0, &one()).0, 8);
}

#[test]
fn a_kick_of_a_queue_that_waits_for_its_reset_does_nothing() {
    let (probe, mut driver) = live(feature::RING_RESET);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    let _ = driver.function.reset_queue(0);
    driver.add(0, &one());
    let function = Arc::clone(&driver.function);
    in_time(move || function.service(0));
    assert_eq!(probe.control().popped, 1);
}

#[test]
fn a_queue_reset_needs_its_feature() {
    let (_, driver) = live(0);
    let _ = driver.function.reset_queue(0);
    assert!(driver.function.queue(0).unwrap().enabled);
}

#[test]
fn an_enabled_queue_does_not_change() {
    let (_, driver) = live(0);
    let before = driver.function.queue(0).unwrap().registers;
    driver.function.update_queue(0, |q| {
        q.size = 2;
        q.descriptor_area = 0;
    });
    let after = driver.function.queue(0).unwrap().registers;
    assert_eq!(after, before);
}

#[test]
fn sizes_that_are_no_power_of_two_or_too_large_are_ignored() {
    let driver = Driver::new(Probe::default());
    for (size, kept) in [(8, 8), (0, 8), (3, 8), (32, 8), (16, 16)] {
        driver.function.update_queue(0, |q| q.size = size);
        assert_eq!(driver.function.queue(0).unwrap().registers.size, kept);
    }
    driver.function.update_queue(7, |q| q.size = 8);
    assert!(driver.function.queue(7).is_none());
}

#[test]
fn rings_that_are_misaligned_or_outside_memory_need_a_reset() {
    let end = RAM as u64;
    let cases: &[(&str, u64, u64, u64)] = &[
        ("descriptor table at 0", 0, 0x2000, 0x3000),
        ("descriptor table misaligned", 0x1008, 0x2000, 0x3000),
        ("descriptor table outside", end, 0x2000, 0x3000),
        ("descriptor table half outside", end - 16, 0x2000, 0x3000),
        ("descriptor table that wraps", u64::MAX - 15, 0x2000, 0x3000),
        ("available ring misaligned", 0x1000, 0x2001, 0x3000),
        ("available ring outside", 0x1000, end - 2, 0x3000),
        ("used ring misaligned", 0x1000, 0x2000, 0x3002),
        ("used ring outside", 0x1000, 0x2000, end - 4),
        ("used ring that wraps", 0x1000, 0x2000, u64::MAX - 3),
    ];
    for (name, table, avail, used) in cases {
        let driver = Driver::new(Probe::default());
        driver.status(ACKNOWLEDGE | DRIVER);
        driver.function.update_queue(0, |q| {
            q.descriptor_area = *table;
            q.driver_area = *avail;
            q.device_area = *used;
        });
        let _ = driver.function.enable_queue(0);
        assert_ne!(driver.function.status() & NEEDS_RESET, 0, "{name}");
        assert!(!driver.function.queue(0).unwrap().enabled, "{name}");
        driver.status(0);
        assert_eq!(driver.function.status(), 0, "{name}");
    }
}

// The gate ---------------------------------------------------------------------------------------------------------

#[test]
fn a_closed_gate_fetches_nothing_and_looks_again_when_it_opens() {
    for reason in [Reasons::PAUSED, Reasons::NO_DMA] {
        let (probe, mut driver) = live(0);
        driver.function.close(reason);
        driver.add(0, &one());
        driver.kick(0);
        assert_eq!(probe.control().popped, 0, "{reason:?}");
        assert_eq!(driver.used(0), None);
        driver.function.reopen(reason);
        driver.turn();
        assert!(driver.used(0).is_some(), "the kick was lost: {reason:?}");
    }
}

#[test]
fn chains_from_before_driver_ok_are_found_at_driver_ok() {
    let mut driver = Driver::new(Probe::default());
    driver.function.set_driver_features(1, 1);
    driver.status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    driver.enable(0);
    driver.add(0, &one());
    driver.kick(0);
    assert_eq!(driver.used(0), None);
    driver.status(LIVE);
    driver.turn();
    assert!(driver.used(0).is_some());
}

#[test]
fn draining_waits_for_what_is_in_flight() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    let soon = Duration::from_millis(20);
    assert!(
        !driver
            .function
            .stop(Reasons::PAUSED, Patience::complete(soon))
    );
    probe.control().release = true;
    let function = Arc::clone(&driver.function);
    let io = std::thread::spawn(move || function.on_event(RELEASE));
    assert!(driver.function.stop(
        Reasons::PAUSED,
        Patience::complete(crate::testing::PATIENCE)
    ));
    io.join().unwrap();
    assert!(driver.used(0).is_some());
}

#[test]
fn a_configuration_change_behind_a_closed_gate_is_announced_when_it_opens() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    driver.turn();
    let before = driver.function.config_generation();
    // A request is in flight, so that the device does not stand still yet.
    driver.function.close(Reasons::PAUSED);
    probe.control().change_config = true;
    driver.turn();
    // Whoever reads the configuration now must notice that it changed under him.
    assert_ne!(driver.function.config_generation(), before);
    assert!(driver.interrupts.take().is_empty());
    driver.function.reopen(Reasons::PAUSED);
    assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR]);
    assert_eq!(driver.function.take_isr(), 2);
}

/// Requirements: S1-14, S2-10, S3-14, G1-e
#[test]
fn s1_14_the_configuration_of_a_device_that_stands_still_changes_when_it_goes_on() {
    for reason in [
        Reasons::PAUSED,
        Reasons::SUSPENDED,
        Reasons::DEVICE_STOPPED,
        Reasons::GUEST_STOP,
        Reasons::MONITOR_FREEZE,
        Reasons::ENGINE_STOP,
    ] {
        let (probe, driver) = live(0);
        let before = driver.function.config_generation();
        driver.function.close(reason);
        probe.control().change_config = true;
        driver.turn();
        assert_eq!(driver.function.config_generation(), before);
        assert!(driver.interrupts.take().is_empty());
        driver.function.reopen(reason);
        driver.turn();
        assert_ne!(driver.function.config_generation(), before);
        assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR]);
    }
}

#[test]
fn a_function_is_drained_when_each_of_its_queues_is() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    for _ in 0..2 {
        driver.add(0, &one());
        driver.kick(0);
    }
    // Another queue that comes to rest says nothing about this one.
    driver.add(1, &one());
    probe.control().feed = true;
    driver.turn();
    assert!(driver.used(1).is_some());
    let drained = |driver: &Driver| {
        driver
            .function
            .stop(Reasons::PAUSED, Patience::complete(Duration::ZERO))
    };
    assert!(!drained(&driver));
    probe.control().release = true;
    driver.turn();
    assert!(drained(&driver));
}

// Notifications ----------------------------------------------------------------------------------------------------

#[test]
fn one_interrupt_answers_a_batch() {
    let (_, mut driver) = live(0);
    for _ in 0..5 {
        driver.add(0, &one());
    }
    driver.kick(0);
    assert_eq!(driver.interrupts.take(), [0]);
    assert_eq!(driver.function.take_isr(), 1);
    assert_eq!(driver.function.take_isr(), 0);
}

#[test]
fn the_driver_can_ask_for_no_interrupts() {
    let (_, mut driver) = live(0);
    driver.set_avail_flags(0, 1);
    driver.request(0, &one());
    assert!(driver.interrupts.take().is_empty());
    driver.set_avail_flags(0, 0);
    driver.request(0, &one());
    assert_eq!(driver.interrupts.take(), [0]);
}

#[test]
fn the_event_index_says_when_to_interrupt() {
    let (_, mut driver) = live(feature::EVENT_IDX);
    // The flag means nothing with this feature.
    driver.set_avail_flags(0, 1);
    driver.set_used_event(0, 2);
    for expected in [&[][..], &[], &[0], &[]] {
        driver.request(0, &one());
        assert_eq!(driver.interrupts.take(), expected);
    }
}

#[test]
fn a_source_that_empties_a_ring_asks_for_a_kick() {
    for event_index in [false, true] {
        let wanted = if event_index { feature::EVENT_IDX } else { 0 };
        let (probe, mut driver) = live(wanted);
        driver.add(1, &one());
        driver.kick(1);
        driver.add(1, &one());
        probe.control().feed = true;
        driver.turn();
        assert!(driver.used(1).is_some() && driver.used(1).is_some());
        driver.add(1, &one());
        assert!(
            driver.kick_wanted(1, event_index),
            "event index: {event_index}"
        );
    }
}

#[test]
fn a_device_that_needs_more_chains_hears_of_the_next() {
    for event_index in [false, true] {
        let wanted = if event_index { feature::EVENT_IDX } else { 0 };
        let (probe, mut driver) = live(wanted);
        probe.control().together = 3;
        for _ in 0..2 {
            driver.add(0, &one());
            assert!(
                driver.kick_wanted(0, event_index),
                "event index: {event_index}"
            );
            let function = Arc::clone(&driver.function);
            in_time(move || function.service(0));
            assert_eq!(driver.used(0), None);
        }
        driver.add(0, &one());
        assert!(
            driver.kick_wanted(0, event_index),
            "event index: {event_index}"
        );
        driver.kick(0);
        assert_eq!(std::iter::from_fn(|| driver.used(0)).count(), 3);
    }
}

#[test]
fn an_empty_ring_asks_for_a_kick() {
    for event_index in [false, true] {
        let wanted = if event_index { feature::EVENT_IDX } else { 0 };
        let (_, mut driver) = live(wanted);
        driver.request(0, &one());
        driver.add(0, &one());
        assert!(
            driver.kick_wanted(0, event_index),
            "event index: {event_index}"
        );
    }
}

#[test]
fn a_ring_that_is_fed_without_end_is_left_after_the_budget() {
    for event_index in [false, true] {
        let wanted = if event_index { feature::EVENT_IDX } else { 0 };
        let (probe, mut driver) = live(wanted);
        driver.add(0, &one());
        let (view, ring) = (driver.view.clone(), driver.rings[0]);
        let mut index = ring.avail_idx;
        // The ring's only chain, again and again.
        probe.control().refill = Some(Box::new(move || {
            index = index.wrapping_add(1);
            view.write_obj(index, GuestAddress(ring.avail + 2)).unwrap();
        }));
        while driver.was_kicked(0) {}
        let function = Arc::clone(&driver.function);
        in_time(move || function.service(0));
        assert_eq!(probe.control().popped, 1024);
        assert!(driver.was_kicked(0), "nobody would come back for the rest");
    }
}

// Chains -----------------------------------------------------------------------------------------------------------

/// After the driver broke its ring: the device asks for a reset, says so, stops, and can be reset.
fn assert_broken(name: &str, probe: &Probe, driver: &mut Driver) {
    assert_eq!(driver.function.status(), LIVE | NEEDS_RESET, "{name}");
    assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR], "{name}");
    assert_eq!(driver.function.take_isr(), 2, "{name}");
    let popped = probe.control().popped;
    driver.add(0, &one());
    driver.kick(0);
    assert_eq!(probe.control().popped, popped, "{name}: it goes on");
    driver.status(0);
    assert_eq!(driver.function.status(), 0, "{name}");
    driver.start(0);
    assert_eq!(driver.request(0, &one()).0, 8, "{name}");
}

#[test]
fn malformed_chains_need_a_reset() {
    let buffer = 0x40_0000;
    let outside = RAM as u64;
    /// Slot, address, length, flags, next.
    type Descriptors = [(u16, u64, usize, u16, u16)];
    let cases: &[(&str, &Descriptors)] = &[
        ("points to itself", &[(0, buffer, 8, NEXT, 0)]),
        (
            "loop of two",
            &[(0, buffer, 8, NEXT, 1), (1, buffer, 8, NEXT, 0)],
        ),
        ("next beyond the table", &[(0, buffer, 8, NEXT, 16)]),
        (
            "readable after writable",
            &[(0, buffer, 8, WRITE | NEXT, 1), (1, buffer, 8, 0, 0)],
        ),
        ("buffer outside memory", &[(0, outside, 8, WRITE, 0)]),
        ("buffer half outside", &[(0, outside - 4, 8, 0, 0)]),
        ("buffer that wraps", &[(0, u64::MAX - 3, 8, 0, 0)]),
        (
            "longer than 4 GiB",
            &[(0, 0, RAM, NEXT, 1), (1, 0, 0xffff_ffff, 0, 0)],
        ),
        (
            "indirect table of no descriptor",
            &[(0, buffer, 0, INDIRECT, 0)],
        ),
        (
            "indirect table of half a descriptor",
            &[(0, buffer, 24, INDIRECT, 0)],
        ),
        (
            "indirect table outside memory",
            &[(0, outside, 16, INDIRECT, 0)],
        ),
        (
            "indirect table that is too long",
            &[(0, 0, 1 << 20, INDIRECT, 0)],
        ),
    ];
    for (name, descriptors) in cases {
        let (probe, mut driver) = live(feature::INDIRECT_DESC);
        let table = driver.rings[0].table;
        for (slot, addr, len, flags, next) in *descriptors {
            driver.descriptor(table, *slot, *addr, *len, *flags, *next);
        }
        driver.publish(0, 0);
        driver.kick(0);
        assert_broken(name, &probe, &mut driver);
    }
}

#[test]
fn an_indirect_table_in_an_indirect_table_needs_a_reset() {
    let (probe, mut driver) = live(feature::INDIRECT_DESC);
    let outer = driver.alloc(16);
    driver.descriptor(outer, 0, outer, 16, INDIRECT, 0);
    let table = driver.rings[0].table;
    driver.descriptor(table, 0, outer, 16, INDIRECT, 0);
    driver.publish(0, 0);
    driver.kick(0);
    assert_broken("nested", &probe, &mut driver);
}

#[test]
fn an_indirect_table_may_be_longer_than_the_ring() {
    let (_, mut driver) = live(feature::INDIRECT_DESC);
    let count = 40u16;
    let inner = driver.alloc(16 * usize::from(count));
    for slot in 0..count {
        let buffer = driver.alloc(4);
        let last = slot + 1 == count;
        let flags = if last { WRITE } else { WRITE | NEXT };
        driver.descriptor(inner, slot, buffer, 4, flags, slot + 1);
    }
    let table = driver.rings[0].table;
    driver.descriptor(table, 0, inner, 16 * usize::from(count), INDIRECT, 0);
    driver.publish(0, 0);
    driver.kick(0);
    assert_eq!(driver.used(0), Some((0, 160)));
}

#[test]
fn a_chain_may_fill_the_ring() {
    let (_, mut driver) = live(0);
    let bufs: Vec<_> = (0..16).map(|_| Buf::In(3)).collect();
    assert_eq!(driver.request(0, &bufs).0, 48);
}

#[test]
fn a_head_outside_the_table_needs_a_reset() {
    for head in [16, u16::MAX] {
        let (probe, mut driver) = live(0);
        driver.publish(0, head);
        driver.kick(0);
        assert_broken("head", &probe, &mut driver);
    }
}

#[test]
fn an_available_index_that_jumps_needs_a_reset() {
    for index in [17, 0x8000, u16::MAX] {
        let (probe, mut driver) = live(0);
        let at = GuestAddress(driver.rings[0].avail + 2);
        driver.view.write_obj(index, at).unwrap();
        driver.kick(0);
        assert_broken("index", &probe, &mut driver);
    }
}

#[test]
fn indices_wrap() {
    let (_, mut driver) = live(feature::EVENT_IDX);
    for i in 0..70_000u32 {
        driver.add(0, &[Buf::In(1)]);
        driver.function.service(0);
        assert!(driver.used(0).is_some(), "request {i}");
    }
}

/// Counts the warnings of a thread.
#[derive(Clone, Default)]
struct Log(Arc<AtomicU32>);

impl tracing::Subscriber for Log {
    fn enabled(&self, _metadata: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _span: &tracing::span::Id, _values: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _span: &tracing::span::Id, _follows: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        if *event.metadata().level() == tracing::Level::WARN {
            self.0.fetch_add(1, SeqCst);
        }
    }

    fn enter(&self, _span: &tracing::span::Id) {}

    fn exit(&self, _span: &tracing::span::Id) {}
}

#[test]
fn a_driver_that_breaks_its_rings_in_a_loop_does_not_fill_the_log() {
    let (_, mut driver) = live(0);
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), || {
        for _ in 0..100 {
            driver.publish(0, u16::MAX);
            driver.kick(0);
            assert_ne!(driver.function.status() & NEEDS_RESET, 0);
            driver.status(0);
            driver.start(0);
        }
    });
    // 1, 2, 3, 4, 8, 16, 32, 64.
    assert_eq!(log.0.load(SeqCst), 8);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the rings hold, the core survives, and the device can be reset and works afterwards.
    #[test]
    fn hostile_rings_never_harm_the_core(
        table in prop::collection::vec(
            (
                prop_oneof![0..RAM as u64, any::<u64>()],
                prop_oneof![0u32..5000, any::<u32>()],
                0u16..8,
                0u16..20,
            ),
            16,
        ),
        heads in prop::collection::vec(0u16..18, 16),
        index in prop_oneof![0u16..18, any::<u16>()],
        event_index: bool,
    ) {
        let wanted = feature::INDIRECT_DESC | if event_index { feature::EVENT_IDX } else { 0 };
        let (probe, mut driver) = live(wanted);
        let ring = driver.rings[0];
        for (slot, (addr, len, flags, next)) in table.into_iter().enumerate() {
            driver.descriptor(ring.table, slot as u16, addr, len as usize, flags, next);
        }
        for (slot, head) in heads.into_iter().enumerate() {
            let at = GuestAddress(ring.avail + 4 + 2 * slot as u64);
            driver.view.write_obj(head, at).unwrap();
        }
        driver.view.write_obj(index, GuestAddress(ring.avail + 2)).unwrap();
        driver.kick(0);
        let popped = probe.control().popped;
        let mut used = 0;
        while driver.used(0).is_some() {
            used += 1;
        }
        prop_assert!(used <= 16);
        prop_assert!(popped >= used);
        driver.status(0);
        prop_assert_eq!(driver.function.status(), 0);
        driver.start(0);
        prop_assert_eq!(driver.request(0, &one()).0, 8);
    }
}

/// Requirements: S3-32, G3-d
#[test]
fn s3_32_features_that_were_refused_do_not_keep_a_device_from_being_restored() {
    let (_, driver) = live(0);
    let function = &driver.function;
    let _ = function.write_status(0);
    let _ = function.write_status(ACKNOWLEDGE | DRIVER);
    function.set_driver_features(0, u32::MAX);
    function.set_driver_features(1, u32::MAX);
    let _ = function.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
    assert_eq!(function.status(), ACKNOWLEDGE | DRIVER);
    let saved = function.save();
    assert_eq!(saved.accepted, u64::MAX.into());
    function.restore(&saved).unwrap();
    assert_eq!(function.driver_features(0), u32::MAX);
    let mut settled = saved;
    settled.registers.status |= FEATURES_OK;
    assert!(matches!(
        function.restore(&settled),
        Err(RestoreError::Features(_))
    ));
}

/// Requirements: G3-g
#[test]
fn g3_g_a_descriptor_that_is_made_available_again_while_it_is_in_flight_breaks_the_ring() {
    let (probe, mut driver) = live(0);
    probe.control().hold = true;
    let added = driver.add(0, &one());
    driver.kick(0);
    driver.turn();
    driver.publish(0, added.head);
    driver.kick(0);
    driver.turn();
    assert_ne!(driver.function.status() & NEEDS_RESET, 0);
    let saved = driver.function.save();
    assert_eq!(saved.queues[0].split().unwrap().owned, [added.head]);
}

/// Requirements: S1-12, S3-32
#[test]
fn s3_32_a_driver_that_may_have_missed_an_interrupt_gets_another_when_the_device_goes_on() {
    let (_, mut driver) = live(0);
    driver.add(0, &one());
    driver.kick(0);
    driver.turn();
    driver.interrupts.take();
    let function = &driver.function;
    function.close(Reasons::MONITOR_FREEZE);
    function.restore(&function.save()).unwrap();
    assert!(driver.interrupts.take().is_empty());
    function.reopen(Reasons::MONITOR_FREEZE);
    driver.turn();
    let vectors = driver.interrupts.take();
    assert!(vectors.contains(&0), "{vectors:?}");
}

#[test]
fn a_driver_that_was_notified_once_more_is_not_notified_of_the_same_again() {
    let (_, mut driver) = live(feature::EVENT_IDX);
    let function = Arc::clone(&driver.function);
    function.close(Reasons::MONITOR_FREEZE);
    function.restore(&function.save()).unwrap();
    driver.add(0, &one());
    function.reopen(Reasons::MONITOR_FREEZE);
    driver.turn();
    assert!(driver.used(0).is_some());
    assert!(driver.interrupts.take().contains(&0));
    // It wants to hear of the first, of which it did.
    driver.set_used_event(0, 0);
    driver.add(0, &one());
    driver.kick(0);
    assert!(driver.used(0).is_some());
    assert!(driver.interrupts.take().is_empty());
}
