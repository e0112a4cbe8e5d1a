//! Split virtqueues: what a driver that keeps to the rules gets, and one that does not.

use conformance::{ALL, Live, QUIET, Rig, SIMPLE};
use driver::access::{Dma, DmaExt};
use driver::virtio::{
    Buffer, Descriptor, Layout, common, descriptor_flag, feature, isr, status, used_flag,
};

const END: u64 = driver::host::RAM as u64;

/// Requirements: ring
#[test]
fn ring_chains_of_many_buffers_are_echoed_whole() {
    for indirect in [false, true] {
        let rig = Rig::new();
        let mut live = rig.live(ALL);
        let dma = rig.machine.dma();
        let mut chain = Vec::new();
        for piece in [&b"one "[..], b"", b"two ", b"three"] {
            chain.push(Buffer::readable(
                dma.place(piece).unwrap(),
                piece.len() as u32,
            ));
        }
        let to = dma.allocate(64, 1).unwrap();
        for (offset, len) in [(0, 1), (1, 0), (1, 9), (10, 20)] {
            chain.push(Buffer::writable(to + offset, len));
        }
        let queue = &mut live.queues[0];
        let head = match indirect {
            true => queue.add_indirect(&chain),
            false => queue.add(&chain),
        };
        live.publish(0);
        rig.settle();
        let used = live.queues[0].take().unwrap().unwrap();
        assert_eq!((Ok(used.head), used.len), (head, 13));
        assert_eq!(dma.bytes(to, 13), b"one two three");
        assert_eq!(dma.bytes(to + 13, 4), [0; 4]);
    }
}

/// Requirements: D4
#[test]
fn d4_an_indirect_table_may_be_longer_than_the_queue() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    let dma = rig.machine.dma();
    let from = dma.place(&[7; 40]).unwrap();
    let to = dma.allocate(40, 1).unwrap();
    let mut chain: Vec<_> = (0..40).map(|i| Buffer::readable(from + i, 1)).collect();
    chain.extend((0..40).map(|i| Buffer::writable(to + i, 1)));
    live.queues[1].add_indirect(&chain).unwrap();
    live.publish(1);
    assert_eq!(live.complete(1), 1);
    assert_eq!(dma.bytes(to, 40), [7; 40]);
}

/// Requirements: ring
#[test]
fn ring_indices_wrap() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    for round in 0..70_000u32 {
        if round < 2 || round > 65_530 && round < 65_545 {
            live.echo(0, &round.to_le_bytes());
        } else {
            turn(&mut live);
        }
    }
    assert_eq!(live.queues[0].available(), (70_000u32 % 65_536) as u16);
}

/// A chain without memory of its own.
fn turn(live: &mut Live<'_>) {
    live.queues[0].add(&[Buffer::writable(0x100, 0)]).unwrap();
    live.publish(0);
    assert_eq!(live.complete(0), 1);
}

/// Requirements: ring
#[test]
fn ring_a_full_queue_comes_back_in_one_go() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    for n in 0..8 {
        live.add(0, &[n]);
    }
    live.publish(0);
    assert_eq!(live.complete(0), 8);
    assert_eq!(live.interrupts(), [1], "one interrupt for all");
}

/// Requirements: ring
#[test]
fn ring_no_interrupt_flag_is_honoured() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    live.queues[0].want_interrupts(false);
    live.echo(0, b"quiet");
    assert_eq!(live.interrupts(), QUIET);
    live.queues[0].want_interrupts(true);
    live.echo(0, b"loud");
    assert_eq!(live.interrupts(), [1]);
}

/// Requirements: ring
#[test]
fn ring_used_event_is_honoured() {
    let rig = Rig::new();
    let mut live = rig.live(ALL);
    live.queues[0].want_interrupt_at(2);
    for (n, expected) in [(0, &[][..]), (1, &[]), (2, &[1]), (3, &[])] {
        live.echo(0, &[n]);
        assert_eq!(live.interrupts(), expected, "chain {n}");
    }
    live.queues[0].want_interrupt_at(5);
    for n in 4..8 {
        live.add(0, &[n]);
    }
    live.publish(0);
    assert_eq!(live.complete(0), 4);
    assert_eq!(live.interrupts(), [1], "the event lies within the batch");
}

/// Requirements: ring
#[test]
fn ring_an_idle_device_wants_to_be_notified() {
    for features in [SIMPLE, ALL] {
        let rig = Rig::new();
        let mut live = rig.live(features);
        for n in 0..20u8 {
            live.add(0, &[n]);
            assert!(live.queues[0].publish(), "chain {n}");
            live.transport.notify(0);
            assert_eq!(live.complete(0), 1);
        }
        let flags = rig.machine.dma().load(live.queues[0].layout().used_flags());
        assert_eq!(flags & used_flag::NO_NOTIFY, 0);
    }
}

/// Requirements: ring
#[test]
fn ring_chains_can_come_back_late() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    rig.controls.hold(true);
    for n in 0..3 {
        live.submit(0, &[n]);
    }
    assert_eq!(live.complete(0), 0);
    assert_eq!(rig.controls.held(), 3);
    rig.controls.release(2);
    assert_eq!(live.complete(0), 2);
    rig.controls.release(1);
    assert_eq!(live.complete(0), 1);
    assert_eq!(live.interrupts(), [1, 1]);
}

/// A way to break the rules.
type Break = fn(&Rig, &Layout);

fn descriptor(
    rig: &Rig,
    layout: &Layout,
    index: u16,
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
) {
    let descriptor = Descriptor {
        address,
        len,
        flags,
        next,
    };
    descriptor.store(rig.machine.dma(), layout.descriptor(index));
}

fn offer(rig: &Rig, layout: &Layout, head: u16) {
    let dma = rig.machine.dma();
    let index = dma.load(layout.avail_index());
    dma.set(layout.avail_entry(index), head);
    dma.store(layout.avail_index(), index.wrapping_add(1));
}

/// Ways for a driver to break a ring, by name.
const BREAKS: [(&str, Break); 10] = [
    ("loop", |rig, layout| {
        descriptor(rig, layout, 0, 0x1000, 4, descriptor_flag::NEXT, 1);
        descriptor(rig, layout, 1, 0x1000, 4, descriptor_flag::NEXT, 0);
        offer(rig, layout, 0);
    }),
    ("next outside the table", |rig, layout| {
        descriptor(rig, layout, 0, 0x1000, 4, descriptor_flag::NEXT, 16);
        offer(rig, layout, 0);
    }),
    ("head outside the table", |rig, layout| {
        offer(rig, layout, 16);
    }),
    ("buffer outside memory", |rig, layout| {
        descriptor(rig, layout, 0, END - 2, 4, 0, 0);
        offer(rig, layout, 0);
    }),
    ("buffer that wraps", |rig, layout| {
        descriptor(rig, layout, 0, u64::MAX - 1, 4, descriptor_flag::WRITE, 0);
        offer(rig, layout, 0);
    }),
    ("readable after writable", |rig, layout| {
        let flags = descriptor_flag::WRITE | descriptor_flag::NEXT;
        descriptor(rig, layout, 0, 0x1000, 4, flags, 1);
        descriptor(rig, layout, 1, 0x1000, 4, 0, 0);
        offer(rig, layout, 0);
    }),
    ("indirect table outside memory", |rig, layout| {
        descriptor(rig, layout, 0, END, 32, descriptor_flag::INDIRECT, 0);
        offer(rig, layout, 0);
    }),
    ("indirect table of odd length", |rig, layout| {
        descriptor(rig, layout, 0, 0x1000, 17, descriptor_flag::INDIRECT, 0);
        offer(rig, layout, 0);
    }),
    ("indirect in indirect", |rig, layout| {
        let inner = Descriptor {
            address: 0x2000,
            len: 16,
            flags: descriptor_flag::INDIRECT,
            next: 0,
        };
        inner.store(rig.machine.dma(), 0x3000);
        descriptor(rig, layout, 0, 0x3000, 16, descriptor_flag::INDIRECT, 0);
        offer(rig, layout, 0);
    }),
    ("available index too far ahead", |rig, layout| {
        rig.machine.dma().store(layout.avail_index(), 17);
    }),
];

/// Requirements: ring
#[test]
fn ring_a_broken_ring_makes_the_device_ask_for_a_reset() {
    for (name, break_it) in BREAKS {
        let rig = Rig::new();
        let live = rig.live(SIMPLE);
        break_it(&rig, live.queues[0].layout());
        live.transport.notify(0);
        rig.settle();
        assert!(live.needs_reset(), "{name}");
        assert_eq!(live.interrupts(), [0], "{name}: configuration interrupt");
        assert_eq!(live.transport.isr() & isr::CONFIG, isr::CONFIG, "{name}");
    }
}

/// Requirements: ring
#[test]
fn ring_a_device_that_needs_reset_touches_no_ring() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE);
    let avail = live.queues[0].layout().avail_index();
    rig.machine.dma().store(avail, 100);
    live.transport.notify(0);
    rig.settle();
    live.interrupts();
    live.submit(1, b"other queue");
    live.transport.notify(1);
    assert_eq!(live.complete(1), 0);
    assert_eq!(live.interrupts(), QUIET);
}

/// Requirements: ring
#[test]
fn ring_areas_outside_memory_make_the_device_ask_for_a_reset() {
    let areas: [fn(&mut Layout); 6] = [
        |l| l.descriptors = END - 16,
        |l| l.available = END - 2,
        |l| l.used = END - 4,
        |l| l.descriptors += 8,
        |l| l.used = u64::MAX - 3,
        |l| l.available += 1,
    ];
    for (case, damage) in areas.into_iter().enumerate() {
        let rig = Rig::new();
        let transport = rig.transport();
        transport.negotiate(SIMPLE).unwrap();
        let mut layout = Layout::allocate(rig.machine.dma(), 16).unwrap();
        damage(&mut layout);
        transport.enable_queue(0, &layout, 0xffff).unwrap();
        transport.start();
        rig.settle();
        let asks = transport.status() & status::NEEDS_RESET != 0;
        assert!(asks, "case {case}");
        transport.reset().unwrap();
        assert_eq!(transport.get(common::DEVICE_STATUS), 0);
    }
}

/// Requirements: ring
#[test]
fn ring_indirect_descriptors_need_their_feature() {
    let rig = Rig::new();
    let mut live = rig.live(SIMPLE & !feature::INDIRECT_DESC);
    live.echo(0, b"direct chains do not");
}
