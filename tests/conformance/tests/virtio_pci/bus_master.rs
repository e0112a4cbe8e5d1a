//! Bus Master Enable and Memory Space Enable.

use conformance::{ALL, QUIET, Rig, SIMPLE};
use devices::gate::Reasons;
use driver::access::{Dma, DmaExt};
use driver::host::{Place, Shape};
use driver::pci::{bars, change_command, command, set_bar_address};
use driver::virtio::common;

/// Requirements: E10
#[test]
fn e10_without_bus_mastering_nothing_is_fetched() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    change_command(&rig.function(), 0, command::BUS_MASTER);
    live.submit(0, b"waits");
    assert_eq!(live.complete(0), 0);
    assert_eq!(live.interrupts(), QUIET);
    change_command(&rig.function(), command::BUS_MASTER, 0);
    assert_eq!(live.complete(0), 1, "rings are looked at again");
    assert_eq!(live.interrupts(), [1]);
}

/// Requirements: E10
#[test]
fn e10_bus_mastering_is_off_after_power_on() {
    let rig = Rig::new();
    change_command(&rig.function(), 0, command::BUS_MASTER);
    let mut live = rig.live(SIMPLE);
    live.submit(0, b"waits");
    live.transport.notify(0);
    assert_eq!(live.complete(0), 0);
}

/// Clears Bus Master Enable while the device holds a chain, and lets the chain come back only when the write was
/// seen to wait for it.
fn clear_with_one_in_flight(rig: &Rig) {
    std::thread::scope(|scope| {
        let clear = || change_command(&rig.function(), 0, command::BUS_MASTER);
        let write = scope.spawn(clear);
        while !rig.plugged.function.reasons().contains(Reasons::NO_DMA) {
            std::thread::yield_now();
        }
        assert!(!write.is_finished(), "the write did not wait");
        rig.controls.release(1);
        while !write.is_finished() {
            rig.machine.pump();
        }
    });
}

/// Requirements: E10
#[test]
fn e10_memory_is_not_written_after_bus_mastering_was_cleared() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    let to = live.submit(0, b"in flight");
    rig.settle();
    clear_with_one_in_flight(&rig);
    let dma = rig.machine.dma();
    assert_eq!(dma.load(live.queues[0].layout().used_index()), 1);
    assert_eq!(dma.bytes(to, 9), b"in flight");
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: E10
#[test]
fn e10_interrupts_that_fell_due_without_bus_mastering_are_sent_afterwards() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"in flight");
    rig.settle();
    clear_with_one_in_flight(&rig);
    rig.controls.change_config(vec![9; 16]);
    rig.settle();
    assert_eq!(live.interrupts(), QUIET);
    change_command(&rig.function(), command::BUS_MASTER, 0);
    assert_eq!(live.complete(0), 1);
    let mut vectors = live.interrupts();
    vectors.sort_unstable();
    assert_eq!(vectors, [0, 1]);
}

/// Requirements: E10
#[test]
fn e10_without_memory_decoding_the_bar_does_not_answer() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let running = live.transport.status();
    change_command(&rig.function(), 0, command::MEMORY);
    assert_eq!(live.transport.status(), 0xff);
    live.transport.set(common::DEVICE_STATUS, 0);
    change_command(&rig.function(), command::MEMORY, 0);
    assert_eq!(live.transport.status(), running);
    live.echo(0, b"unharmed");
}

/// Requirements: D1
#[test]
fn d1_a_bar_answers_where_it_was_moved_to() {
    for place in [Place::RootBus, Place::BehindPort] {
        let rig = Rig::with(Shape::default(), place);
        let mut live = rig.live(ALL);
        let function = rig.function();
        let bar = bars(&function)[0];
        let old = function.bar_address(0, 20);
        // Within the smallest bridge window, 1 MiB.
        set_bar_address(&function, &bar, bar.address + bar.size);
        let mut byte = [0];
        rig.machine.read(old, &mut byte);
        assert_eq!(byte, [0xff]);
        live.echo(0, b"moved");
    }
}

/// Requirements: D1
#[test]
fn d1_sizing_a_bar_does_not_disturb_the_device() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let first = bars(&rig.function());
    assert_eq!(bars(&rig.function()), first);
    live.echo(0, b"unharmed");
}
