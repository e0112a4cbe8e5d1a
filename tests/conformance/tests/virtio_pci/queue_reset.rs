//! Reset of a single queue.

use conformance::{ALL, QUIET, Rig, SIMPLE};
use driver::access::Dma;
use driver::virtio::{NO_VECTOR, SplitQueue, common, feature};

/// Requirements: B-51, E5
#[test]
fn b51_an_idle_queue_is_reset_and_disabled_at_once() {
    let rig = Rig::new();
    let live = rig.live(ALL);
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    assert_eq!(live.transport.get(common::QUEUE_RESET), 0);
    assert_eq!(live.transport.get(common::QUEUE_ENABLE), 0);
}

/// Requirements: B-51, E5
#[test]
fn b51_queue_reset_reads_1_until_nothing_is_in_flight() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    assert_eq!(live.transport.get(common::QUEUE_RESET), 1);
    rig.settle();
    assert_eq!(live.transport.get(common::QUEUE_RESET), 1);
    rig.controls.release(1);
    rig.settle();
    assert_eq!(live.transport.get(common::QUEUE_RESET), 0);
    assert_eq!(live.transport.get(common::QUEUE_ENABLE), 0);
}

/// Requirements: B-51
#[test]
fn b51_nothing_new_is_fetched_from_a_queue_that_is_being_reset() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    live.submit(0, b"not any more");
    live.transport.notify(0);
    rig.settle();
    assert_eq!(rig.controls.held(), 1);
}

/// Requirements: B-51
#[test]
fn b51_a_reset_queue_is_quiet() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    live.transport.reset_queue(0).unwrap();
    live.interrupts();
    live.submit(0, b"nobody listens");
    live.transport.notify(0);
    rig.settle();
    assert_eq!(
        rig.machine.dma().load(live.queues[0].layout().used_index()),
        0
    );
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: B-51
#[test]
fn b51_other_queues_go_on() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    rig.controls.hold(false);
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    live.echo(1, b"while the reset waits");
    rig.controls.release(1);
    rig.settle();
    live.echo(1, b"and after it");
}

/// Requirements: E5
#[test]
fn e5_the_size_of_a_reset_queue_is_the_maximum_again() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.negotiate(ALL).unwrap();
    let queue = SplitQueue::new(rig.machine.dma().clone(), 4, false).unwrap();
    transport
        .enable_queue(0, queue.layout(), NO_VECTOR)
        .unwrap();
    transport.start();
    assert_eq!(transport.queue_size(0), 4);
    transport.reset_queue(0).unwrap();
    assert_eq!(transport.queue_size(0), 16);
    assert_eq!(transport.get(common::QUEUE_MSIX_VECTOR), NO_VECTOR);
}

/// Requirements: E5, B-51
#[test]
fn e5_a_reset_queue_can_be_set_up_elsewhere_with_another_size() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.echo(0, b"in the first ring");
    for size in [4, 16, 1, 8] {
        live.transport.reset_queue(0).unwrap();
        live.queues[0] = SplitQueue::new(rig.machine.dma().clone(), size, true).unwrap();
        let layout = *live.queues[0].layout();
        live.transport.enable_queue(0, &layout, 1).unwrap();
        let bytes = [size as u8; 33];
        let to = live.queues[0]
            .add_indirect(&echo_chain(&rig, &bytes))
            .map(|_| ());
        assert_eq!(to, Ok(()));
        live.publish(0);
        assert_eq!(live.complete(0), 1, "size {size}");
    }
}

fn echo_chain(rig: &Rig, bytes: &[u8]) -> [driver::virtio::Buffer; 2] {
    use driver::access::DmaExt;
    use driver::virtio::Buffer;
    let dma = rig.machine.dma();
    let len = bytes.len() as u32;
    [
        Buffer::readable(dma.place(bytes).unwrap(), len),
        Buffer::writable(dma.place(bytes).unwrap(), len),
    ]
}

/// Requirements: B-51
#[test]
fn b51_queue_reset_is_ignored_if_it_was_not_negotiated() {
    let rig = Rig::new();
    let mut live = rig.live(ALL & !feature::RING_RESET);
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    assert_eq!(live.transport.get(common::QUEUE_RESET), 0);
    assert_eq!(live.transport.get(common::QUEUE_ENABLE), 1);
    live.echo(0, b"as before");
}

/// Requirements: B-51
#[test]
fn b51_a_queue_that_is_not_enabled_has_nothing_to_reset() {
    let rig = Rig::new();
    let transport = rig.transport();
    transport.negotiate(ALL).unwrap();
    transport.start();
    for queue in [0, 1, 7] {
        transport.select(queue);
        transport.set(common::QUEUE_RESET, 1);
        assert_eq!(transport.get(common::QUEUE_RESET), 0);
    }
}

/// Requirements: E1, B-51
#[test]
fn e1_a_device_reset_ends_a_queue_reset_that_waits() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    live.submit(0, b"held");
    rig.settle();
    live.transport.select(0);
    live.transport.set(common::QUEUE_RESET, 1);
    live.transport.set(common::DEVICE_STATUS, 0);
    rig.controls.release(1);
    rig.settle();
    assert_eq!(live.transport.status(), 0);
    live.transport.select(0);
    assert_eq!(live.transport.get(common::QUEUE_RESET), 0);
    rig.controls.hold(false);
    rig.live(ALL).echo(0, b"again");
}
