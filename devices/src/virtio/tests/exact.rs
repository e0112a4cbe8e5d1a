//! A state put into another function: what can be seen of it is the same, and what cannot be is refused.

use super::*;
use crate::state::{FunctionState, Kept, QueueState, ServiceState, TransientState};

/// A function that has seen nothing, over the memory of `driver`, stopped as by a pause.
fn twin(driver: &Driver) -> (Probe, Driver) {
    let probe = Probe::default();
    let ram = Arc::clone(driver.view.ram());
    let device = Box::new(probe.clone());
    let function = VirtioFunction::new("twin", device, ram.view().unwrap()).unwrap();
    function.close(Reasons::PAUSED);
    let mut twin = Driver::of(function, &ram);
    twin.rings.clone_from(&driver.rings);
    (probe, twin)
}

type Whole = (FunctionState, TransientState);

fn save(driver: &Driver) -> Whole {
    let function = &driver.function;
    (function.save(), function.save_transient().unwrap())
}

const AT_ONCE: Patience = Patience::prompt(Duration::ZERO);

/// A function that owes its driver a used buffer of queue 0 and a change of its configuration, and has told it of another
/// of each that the driver has not looked at.
fn owing() -> Driver {
    let (probe, mut driver) = live(feature::EVENT_IDX);
    driver.request(0, &one());
    probe.control().change_config = true;
    driver.turn();
    assert_eq!(driver.interrupts.take(), [0, CONFIG_VECTOR]);
    probe.control().hold = true;
    driver.add(0, &one());
    driver.set_used_event(0, 1);
    driver.kick(0);
    driver.function.close(Reasons::NO_DMA);
    probe.control().release = true;
    probe.control().change_config = true;
    driver.turn();
    assert!(driver.function.stop(Reasons::PAUSED, AT_ONCE));
    assert!(driver.interrupts.take().is_empty());
    driver
}

#[test]
fn an_exact_restore_keeps_what_the_driver_was_told_and_what_it_was_not() {
    let driver = owing();
    let saved = save(&driver);
    let TransientState {
        isr,
        config_pending,
        unsignalled,
        ..
    } = &saved.1;
    assert_eq!((*isr, *config_pending), (3, true));
    assert_eq!(*unsignalled, [0]);

    let (_, mut other) = twin(&driver);
    other
        .function
        .restore_exact(&saved.0, &saved.1)
        .expect("its own state");
    assert_eq!(save(&other), saved);
    other.turn();
    assert!(other.interrupts.take().is_empty(), "paused");
    other.function.reopen(Reasons::PAUSED);
    other.turn();
    let mut told = other.interrupts.take();
    told.sort_unstable();
    assert_eq!(told, [0, CONFIG_VECTOR]);
    assert_eq!(other.used(0).map(|(head, _)| head), Some(2));
    other.request(0, &one());
}

#[test]
fn a_restore_in_two_steps_is_the_same() {
    let driver = owing();
    let saved = save(&driver);
    let (_, other) = twin(&driver);
    let member: &dyn crate::admin::Member = &*other.function;
    member
        .restore(&saved.0, None, member.epoch(), Restoration::Exact)
        .unwrap();
    assert_eq!(other.function.save(), saved.0);
    other.function.check_transient(&saved.1).unwrap();
    other.function.restore_transient(&saved.1).unwrap();
    assert_eq!(save(&other), saved);
}

/// Requirements: G3-f
#[test]
fn g3_f_a_restore_that_is_announced_changes_the_generation() {
    let driver = owing();
    let (state, _) = save(&driver);
    let (_, other) = twin(&driver);
    other.function.restore(&state).unwrap();
    let (found, transient) = save(&other);
    let generation = state.registers.config_generation.wrapping_add(1);
    assert_eq!(found.registers.config_generation, generation);
    assert_eq!((transient.isr, transient.config_pending), (1, true));
    assert_eq!(transient.unsignalled, [0, 1]);
}

#[test]
fn a_device_that_broke_is_restored_as_broken() {
    let (_, mut driver) = live(0);
    driver.publish(0, 99);
    driver.kick(0);
    assert!(driver.function.stop(Reasons::PAUSED, AT_ONCE));
    let saved = save(&driver);
    assert_ne!(saved.0.registers.status & NEEDS_RESET, 0);
    let (_, mut other) = twin(&driver);
    other.function.restore_exact(&saved.0, &saved.1).unwrap();
    assert_eq!(save(&other), saved);
    other.function.reopen(Reasons::PAUSED);
    assert_eq!(other.function.reasons(), Reasons::BROKEN);
    other.status(0);
    other.start(0);
    other.request(0, &one());
}

#[test]
fn requests_that_were_recalled_are_executed_once_by_the_other_function() {
    let (_, mut driver) = live(0);
    let chains: Vec<_> = (0..3).map(|_| driver.add(0, &one()).head).collect();
    driver.function.close(Reasons::PAUSED);
    let (mut state, transient) = save(&driver);
    // As if the device had fetched two of them and given them up.
    state.queues[0].split_mut().unwrap().next_available = 2;
    state.queues[0].split_mut().unwrap().owned = chains[..2].to_vec();
    let (_, mut other) = twin(&driver);
    other.function.restore_exact(&state, &transient).unwrap();
    other.function.reopen(Reasons::PAUSED);
    other.turn();
    let used: Vec<_> = std::iter::from_fn(|| other.used(0))
        .map(|(head, _)| head)
        .collect();
    assert_eq!(used, chains);
}

#[test]
fn a_state_that_cannot_be_is_refused_and_changes_nothing() {
    let driver = owing();
    let saved = save(&driver);
    let (_, other) = twin(&driver);
    let before = save(&other);
    type Spoil = fn(&mut Whole);
    let cases: [(Spoil, &str); 12] = [
        (|s| s.1.isr = 4, "ISR status 0x4"),
        (|s| s.1.unsignalled = vec![2], "unsignalled: queue 2"),
        (|s| s.1.unsignalled = vec![1, 0], "unsignalled: queue 0"),
        (|s| s.1.unsignalled = vec![0, 0], "unsignalled: queue 0"),
        (
            |s| s.1.unsignalled = vec![u16::MAX; 2],
            "unsignalled: queue 65535",
        ),
        (
            |s| {
                s.0.queues[1] = other_queue();
                s.1.unsignalled = vec![0, 1];
            },
            "unsignalled: queue 1",
        ),
        (
            |s| {
                drop(s.1.services.insert(
                    "administration virtqueue",
                    ServiceState {
                        queue: other_queue(),
                        kept: Kept::Nothing,
                    },
                ))
            },
            "has an administration virtqueue",
        ),
        (
            |s| s.1.device = DeviceState::Console { input: Vec::new() },
            "another type",
        ),
        (|s| s.0.queues[0].vector = 1024, "MSI-X vector"),
        (
            |s| s.0.queues[0].split_mut().unwrap().owned = vec![16],
            "out of range",
        ),
        (|s| s.0.queues[0].device_area = 1 << 40, "used ring"),
        (|s| s.0.config.push(0), "configuration"),
    ];
    for (spoil, message) in cases {
        let mut state = saved.clone();
        spoil(&mut state);
        let function = &other.function;
        let error = function.check_exact(&state.0, &state.1).unwrap_err();
        assert!(error.to_string().contains(message), "{message}: {error}");
        function.restore_exact(&state.0, &state.1).unwrap_err();
        assert_eq!(save(&other), before, "{message}");
    }
    // Of a function without queues, none can have been used.
    let error = other.function.restore_transient(&saved.1).unwrap_err();
    assert!(error.to_string().contains("unsignalled"), "{error}");
    assert_eq!(save(&other), before);
}

/// A queue of the probe after a reset.
fn other_queue() -> QueueState {
    Driver::new(Probe::default()).function.save().queues[1].clone()
}

#[test]
fn a_function_that_works_is_neither_saved_whole_nor_restored() {
    let (probe, mut driver) = live(0);
    let saved = save(&driver);
    let busy = |driver: &Driver| {
        let exact = driver.function.restore_exact(&saved.0, &saved.1);
        assert!(matches!(exact, Err(RestoreError::Busy)));
    };
    // It is at rest, but may stop being that at any time.
    let transient = driver.function.restore_transient(&saved.1);
    assert!(matches!(transient, Err(RestoreError::Busy)));
    probe.control().hold = true;
    driver.add(0, &one());
    driver.kick(0);
    let error = driver.function.save_transient().unwrap_err();
    assert_eq!(error.to_string(), "cannot be saved: requests are in flight");
    busy(&driver);
    let _ = driver.function.request_reset();
    busy(&driver);
}

#[test]
fn a_live_function_signals_every_vector_once_more_when_it_goes_on() {
    let (probe, mut driver) = live(feature::EVENT_IDX);
    driver.set_used_event(0, 99);
    driver.request(0, &one());
    assert!(driver.interrupts.take().is_empty());
    driver.function.close(Reasons::PAUSED);
    let before = save(&driver);
    driver.function.signal_again();
    assert_eq!(save(&driver), before, "it is no state");
    driver.turn();
    assert!(driver.interrupts.take().is_empty());
    driver.function.reopen(Reasons::PAUSED);
    driver.turn();
    assert_eq!(driver.interrupts.take(), [0, 1], "queues only");
    driver.turn();
    assert!(driver.interrupts.take().is_empty(), "once");

    probe.control().change_config = true;
    driver.turn();
    assert_eq!(driver.interrupts.take(), [CONFIG_VECTOR]);
    let generation = driver.function.config_generation();
    driver.function.signal_again();
    driver.turn();
    let mut told = driver.interrupts.take();
    told.sort_unstable();
    assert_eq!(told, [0, 1, CONFIG_VECTOR], "also of one that runs");
    assert_eq!(driver.function.config_generation(), generation);

    driver.status(0);
    driver.function.signal_again();
    driver.turn();
    driver.start(0);
    driver.turn();
    assert!(driver.interrupts.take().is_empty(), "a driver that is new");
}
