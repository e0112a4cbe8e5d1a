//! Packed virtqueues: what a driver that keeps to the rules gets, and one that does not.

use std::time::Duration;

use conformance::{ALL, QUIET, Rig, SIMPLE, enable_msix};
use devices::context::{Decoder, encode, parse};
use devices::gate::{Patience, Reasons};
use devices::state::{FunctionState, OwnedKind, PackedState, RingState};
use devices::virtio::{Doors, Offer, Position};
use driver::access::{Dma, DmaExt, Register};
use driver::host::{HostDma, HostFunction, Place, Shape};
use driver::virtio::{
    Buffer, PackedQueue, Transport, common, descriptor_flag, event_flag, feature, status,
};

const PACKED: u64 = SIMPLE | feature::RING_PACKED;
const WITH_EVENTS: u64 = ALL | feature::RING_PACKED;

/// Descriptor flags that make one available in the first round.
const AVAILABLE: u16 = 1 << 7;

fn rig(size: u16) -> Rig {
    let shape = Shape {
        queues: vec![size],
        ..Shape::default()
    };
    let doors = Doors {
        queue_status: true,
        ..Doors::default()
    };
    let packed = true;
    Rig::offering(shape, Place::RootBus, Offer { doors, packed })
}

/// A live device and its one queue.
struct Live<'a> {
    rig: &'a Rig,
    transport: Transport<HostFunction>,
    queue: PackedQueue<HostDma>,
}

/// A chain that was added: its buffer id, where its echo goes, and what that is.
type Added = (u16, u64, Vec<u8>);

impl<'a> Live<'a> {
    /// A device whose queue has `size` entries.
    fn new(rig: &'a Rig, features: u64, size: u16) -> Self {
        let transport = rig.transport();
        let features = transport.negotiate(features).unwrap();
        assert_ne!(features & feature::RING_PACKED, 0);
        enable_msix(&transport);
        let events = features & feature::EVENT_IDX != 0;
        let queue = PackedQueue::new(rig.machine.dma().clone(), size, events).unwrap();
        let mut live = Self {
            rig,
            transport,
            queue,
        };
        live.enable();
        live.transport.start();
        rig.settle();
        live
    }

    fn enable(&mut self) {
        let areas = self.queue.layout().areas();
        self.transport.enable_queue(0, &areas, 1).unwrap();
    }

    /// Adds a chain of `outs` buffers that are read and `ins` that are written.
    fn add(&mut self, bytes: &[u8], outs: usize, ins: usize, indirect: bool) -> Added {
        let dma = self.rig.machine.dma();
        let from = dma.place(bytes).unwrap();
        let to = dma.place(&vec![0; bytes.len()]).unwrap();
        let cut = |at: u64, parts: usize, new: fn(u64, u32) -> Buffer| {
            let (len, parts) = (bytes.len() as u64, parts as u64);
            let edge = move |part: u64| part * len / parts;
            (0..parts).map(move |n| new(at + edge(n), (edge(n + 1) - edge(n)) as u32))
        };
        let chain = cut(from, outs, Buffer::readable).chain(cut(to, ins, Buffer::writable));
        let chain: Vec<_> = chain.collect();
        let id = match indirect {
            true => self.queue.add_indirect(&chain),
            false => self.queue.add(&chain),
        };
        (id.unwrap(), to, bytes.to_vec())
    }

    fn publish(&mut self) {
        if self.queue.publish() {
            self.transport.notify(0);
        }
    }

    /// Lets the device work; the chains that came back are these, in this order.
    fn comes_back(&mut self, chains: &[&Added]) {
        self.rig.settle();
        for (id, to, bytes) in chains {
            let used = self.queue.take().unwrap().expect("a used chain");
            assert_eq!((used.head, used.len as usize), (*id, bytes.len()));
            assert_eq!(self.rig.machine.dma().bytes(*to, bytes.len()), *bytes);
        }
        assert_eq!(self.queue.take(), Ok(None));
    }

    fn needs_reset(&self) -> bool {
        self.rig.settle();
        self.transport.status() & status::NEEDS_RESET != 0
    }

    fn save(&self) -> FunctionState {
        self.rig.plugged.function.save()
    }

    /// Writes descriptor `at` of the ring, as it is.
    fn descriptor(&self, at: u16, address: u64, len: u32, id: u16, flags: u16) {
        let dma = self.rig.machine.dma();
        let place = self.queue.layout().descriptor(at);
        dma.set(place, address);
        dma.set(place + 8, len);
        dma.set(place + 12, id);
        dma.store(place + 14, flags);
    }
}

fn ring(state: &FunctionState) -> &PackedState {
    match &state.queues[0].ring {
        RingState::Packed(ring) => ring,
        RingState::Split(_) => panic!("split"),
    }
}

/// Requirements: ring
#[test]
fn ring_packed_chains_of_any_shape_are_echoed_round_after_round() {
    for features in [PACKED, WITH_EVENTS] {
        // Not only powers of two.
        for size in [1, 2, 3, 5, 8, 16] {
            let rig = rig(16);
            let mut live = Live::new(&rig, features, size);
            for round in 0..200usize {
                let bytes: Vec<u8> = (0..round % 23 + 4).map(|n| (n + round) as u8).collect();
                let indirect = size < 4 || round % 5 == 0;
                let (outs, ins) = (round % 2 + 1, round % 3 + 1);
                let fits = indirect || outs + ins <= size.into();
                let (outs, ins) = if fits { (outs, ins) } else { (1, 1) };
                let chain = live.add(&bytes, outs, ins, indirect);
                live.publish();
                live.comes_back(&[&chain]);
            }
            assert!(!live.needs_reset());
        }
    }
}

/// Requirements: ring
#[test]
fn ring_packed_chains_come_back_in_any_order() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 5);
    rig.controls.hold(true);
    for round in 0..40u8 {
        let a = live.add(&[round; 9], 1, 1, false);
        let b = live.add(&[round + 1; 5], 1, 1, false);
        let c = live.add(&[round + 2; 7], 2, 1, true);
        live.publish();
        rig.settle();
        rig.controls.release_newest(1);
        live.comes_back(&[&c]);
        rig.controls.release_newest(1);
        live.comes_back(&[&b]);
        // Where the oldest began, the device wrote what it used, and the driver a new chain.
        let d = live.add(&[round + 3; 3], 1, 1, false);
        live.publish();
        rig.settle();
        rig.controls.release(2);
        live.comes_back(&[&a, &d]);
    }
    assert!(!live.needs_reset());
}

/// Requirements: ring
#[test]
fn ring_packed_drivers_are_notified_as_they_wish() {
    let rig_ = rig(8);
    let mut live = Live::new(&rig_, PACKED, 8);
    let vectors = || rig_.machine.msi().take_vectors();
    vectors();
    for wanted in [true, false, true] {
        live.queue.want_interrupts(wanted);
        let chain = live.add(&[1; 4], 1, 1, false);
        live.publish();
        live.comes_back(&[&chain]);
        assert_eq!(vectors(), if wanted { vec![1] } else { QUIET.to_vec() });
    }
    let rig_ = rig(8);
    let mut live = Live::new(&rig_, WITH_EVENTS, 6);
    let vectors = || rig_.machine.msi().take_vectors();
    vectors();
    for _ in 0..20 {
        // Two chains of two: the third descriptor that is used is one of the second.
        live.queue.want_interrupt_ahead(2);
        let first = live.add(&[1; 4], 1, 1, false);
        live.publish();
        live.comes_back(&[&first]);
        assert_eq!(vectors(), QUIET);
        let second = live.add(&[2; 4], 1, 1, false);
        live.publish();
        live.comes_back(&[&second]);
        assert_eq!(vectors(), [1]);
    }
}

/// Requirements: ring
#[test]
fn ring_packed_devices_ask_for_the_kicks_they_need() {
    for features in [PACKED, WITH_EVENTS] {
        let rig = rig(8);
        let mut live = Live::new(&rig, features, 8);
        let dma = rig.machine.dma();
        for _ in 0..30 {
            let chain = live.add(&[1; 4], 1, 1, false);
            assert!(live.queue.publish(), "an idle device wants a kick");
            // Not a second one before it looked.
            let another = live.add(&[2; 4], 1, 1, false);
            let again = live.queue.publish();
            assert_eq!(again, features & feature::EVENT_IDX == 0);
            live.transport.notify(0);
            live.comes_back(&[&chain, &another]);
            let events: u32 = dma.get(live.queue.layout().device_events);
            let expected = match features & feature::EVENT_IDX {
                0 => u32::from(event_flag::ENABLE) << 16,
                _ => u32::from(event_flag::AT) << 16 | u32::from(live.queue.position()),
            };
            assert_eq!(events, expected);
        }
    }
}

/// Requirements: G3-i, G3-g
#[test]
fn g3_i_chains_whose_descriptors_were_overwritten_are_executed_anew() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 4);
    let function = &rig.plugged.function;
    rig.controls.hold(true);
    rig.controls.give_up(true);
    let a = live.add(b"overwritten", 1, 1, false);
    let b = live.add(b"second", 1, 1, false);
    live.publish();
    rig.settle();
    rig.controls.release_newest(1);
    live.comes_back(&[&b]);
    // Its descriptors take the places of those of `a`.
    let c = live.add(b"a table", 2, 2, true);
    let d = live.add(b"", 0, 1, false);
    live.publish();
    rig.settle();
    assert_eq!(rig.controls.held(), 3);
    assert!(function.stop(Reasons::MONITOR_FREEZE, Patience::prompt(Duration::ZERO)));
    assert_eq!(rig.controls.held(), 0);
    let saved = live.save();
    let owned = &ring(&saved).owned;
    let shape = |index: usize| {
        let kinds = owned[index].buffers.iter().map(|buffer| buffer.kind);
        (owned[index].descriptors, kinds.collect::<Vec<_>>())
    };
    assert_eq!(owned.len(), 3);
    assert_eq!(
        shape(0),
        (2, vec![OwnedKind::Readable, OwnedKind::Writable])
    );
    assert_eq!(shape(1), (1, vec![OwnedKind::Table]));
    assert_eq!(shape(2), (1, vec![]));
    // As a context, which is what travels.
    let context = encode(&saved, &function.shape());
    parse(&context).unwrap();
    let mut decoder = Decoder::new(&function.shape());
    decoder.push(&context).unwrap();
    let state = decoder.take_latest().unwrap();
    assert_eq!(state, saved);
    let _ = function.request_reset();
    function.restore(&state).unwrap();
    assert_eq!(live.save().queues, saved.queues);
    rig.controls.hold(false);
    function.reopen(Reasons::MONITOR_FREEZE);
    live.comes_back(&[&a, &c, &d]);
    let chain = live.add(b"and so on", 2, 1, false);
    live.publish();
    live.comes_back(&[&chain]);
    assert!(!live.needs_reset());
}

/// Requirements: G3-i, G3-h
#[test]
fn g3_i_states_that_no_packed_queue_can_have_are_refused() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 4);
    let function = &rig.plugged.function;
    rig.controls.hold(true);
    rig.controls.give_up(true);
    live.add(b"one", 1, 1, false);
    live.add(b"two", 1, 1, true);
    live.publish();
    rig.settle();
    assert!(function.stop(Reasons::MONITOR_FREEZE, Patience::prompt(Duration::ZERO)));
    let good = live.save();
    assert!(function.check(&good).is_ok());
    type Change = fn(&mut PackedState);
    let cases: [(&str, Change); 12] = [
        ("between the two positions", |ring| {
            ring.owned.pop();
        }),
        ("between the two positions", |ring| {
            ring.owned[0].descriptors = 3
        }),
        ("none of these", |ring| ring.owned[0].descriptors = 0),
        ("more buffers than descriptors", |ring| {
            let buffer = ring.owned[1].buffers[0];
            ring.owned[1].buffers.push(buffer);
        }),
        ("owned twice", |ring| ring.owned[1].id = ring.owned[0].id),
        ("outside guest memory", |ring| {
            ring.owned[0].buffers[1].address = u64::MAX;
        }),
        ("outside guest memory", |ring| {
            ring.owned[0].buffers[0].len = u32::MAX;
        }),
        ("device-readable descriptor after", |ring| {
            ring.owned[0].buffers.reverse();
        }),
        ("does not end", |ring| ring.owned[1].buffers[0].len = 17),
        ("does not end", |ring| {
            ring.owned[0].buffers[1].kind = OwnedKind::Table;
        }),
        ("cannot go on", |ring| {
            // As far apart as before, but beyond the ring.
            ring.next_used = Position::from_raw(0x8005);
            ring.next_available = Position::from_raw(0x8008);
        }),
        ("between the two positions", |ring| {
            ring.next_available = Position::from_raw(ring.next_available.raw() ^ 0x8000);
        }),
    ];
    for (expected, change) in cases {
        let mut state = good.clone();
        match &mut state.queues[0].ring {
            RingState::Packed(ring) => change(ring),
            RingState::Split(_) => unreachable!(),
        }
        let error = function.restore(&state).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert_eq!(live.save(), good);
    }
    let mut split = good.clone();
    split.accepted &= !u128::from(feature::RING_PACKED);
    let error = function.restore(&split).unwrap_err().to_string();
    assert!(error.contains("kind that the driver negotiated"), "{error}");
    let mut sized = good.clone();
    sized.queues[0].size = 9;
    let error = function.restore(&sized).unwrap_err().to_string();
    assert!(error.contains("beyond the maximum"), "{error}");
}

/// Requirements: S0-3, S0-8, S0-9, S0-10, G0-i
#[test]
fn g0_i_a_packed_queue_is_stopped_and_goes_on_elsewhere() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 4);
    for _ in 0..3 {
        let chain = live.add(b"abc", 2, 1, false);
        live.publish();
        live.comes_back(&[&chain]);
    }
    let state = live.transport.device_state().unwrap();
    assert_eq!(state.region().len, 16);
    let (available, used) = (Register::<u16>::at(8), Register::<u16>::at(10));
    assert_eq!((state.get(available), state.get(used)), (0, 0), "it runs");
    state.stop(0).unwrap();
    // Nine descriptors are two rounds and one.
    let expected = 0x8001;
    assert_eq!(live.queue.position(), expected);
    assert_eq!(
        (state.get(available), state.get(used)),
        (expected, expected)
    );
    assert_eq!(state.index(0), expected);
    let chain = live.add(b"later", 1, 1, false);
    live.publish();
    live.comes_back(&[]);
    // Somewhere else, and back.
    let state = live.transport.device_state().unwrap();
    state.set(available, 3u16);
    assert_eq!((state.get(available), state.get(used)), (3, 3));
    state.set(used, 2u16);
    assert_eq!((state.get(available), state.get(used)), (3, 2));
    state.set_index(0, expected);
    assert_eq!(
        (state.get(available), state.get(used)),
        (expected, expected)
    );
    let saved = live.save();
    assert!(saved.queues[0].restarts);
    rig.plugged.function.close(Reasons::PAUSED);
    rig.plugged.function.restore(&saved).unwrap();
    assert_eq!(live.save().queues, saved.queues);
    rig.plugged.function.reopen(Reasons::PAUSED);
    let state = live.transport.device_state().unwrap();
    state.start(0);
    live.comes_back(&[&chain]);
    // Where there is nothing: the driver broke the ring.
    let state = live.transport.device_state().unwrap();
    state.stop(0).unwrap();
    state.set_index(0, 0x7ffe);
    let saved = live.save();
    rig.plugged
        .function
        .check(&saved)
        .expect("what a driver wrote can be saved");
    state.start(0);
    live.transport.notify(0);
    assert!(live.needs_reset());
}

/// Requirements: S0-10, G0-i
#[test]
fn g0_i_positions_between_which_nothing_is_in_flight_break_the_ring() {
    let rig = rig(8);
    let live = Live::new(&rig, PACKED, 4);
    let (available, used) = (Register::<u16>::at(8), Register::<u16>::at(10));
    let state = live.transport.device_state().unwrap();
    state.stop(0).unwrap();
    state.set(available, 0x8003u16);
    state.set(used, 0x8002u16);
    let check = |saved: FunctionState| {
        let checked = rig.plugged.function.check(&saved);
        checked.expect("what a driver wrote can be saved");
    };
    check(live.save());
    state.start(0);
    check(live.save());
    live.transport.notify(0);
    assert!(live.needs_reset());
    check(live.save());
}

/// Requirements: G0-g, G0-i
#[test]
fn g0_i_a_place_that_was_set_before_the_features_is_one_in_the_packed_ring() {
    let rig = rig(8);
    let transport = rig.transport();
    transport.reset().unwrap();
    let state = transport.device_state().unwrap();
    state.set_index(0, 0x8002);
    transport.add_status(status::ACKNOWLEDGE | status::DRIVER);
    transport.accept(PACKED);
    transport.add_status(status::FEATURES_OK);
    assert_ne!(transport.status() & status::FEATURES_OK, 0);
    let state = transport.device_state().unwrap();
    let (available, used) = (Register::<u16>::at(8), Register::<u16>::at(10));
    assert_eq!((state.get(available), state.get(used)), (0x8002, 0x8002));
}

/// Requirements: ring
#[test]
fn ring_packed_chains_that_break_the_rules_break_the_device() {
    type Case = (&'static str, fn(&Live<'_>, u64));
    let cases: [Case; 9] = [
        (
            "every descriptor says that the chain goes on",
            |live, at| {
                for slot in 0..4 {
                    live.descriptor(slot, at, 1, 0, AVAILABLE | descriptor_flag::NEXT);
                }
            },
        ),
        ("a table that is not alone", |live, at| {
            live.descriptor(
                0,
                at,
                16,
                0,
                AVAILABLE | descriptor_flag::INDIRECT | descriptor_flag::NEXT,
            );
        }),
        ("a table behind a buffer", |live, at| {
            live.descriptor(1, at, 16, 0, AVAILABLE | descriptor_flag::INDIRECT);
            live.descriptor(0, at, 1, 0, AVAILABLE | descriptor_flag::NEXT);
        }),
        ("a table of a part of a descriptor", |live, at| {
            live.descriptor(0, at, 17, 0, AVAILABLE | descriptor_flag::INDIRECT);
        }),
        ("a table of nothing", |live, at| {
            live.descriptor(0, at, 0, 0, AVAILABLE | descriptor_flag::INDIRECT);
        }),
        ("a table in a table", |live, at| {
            let dma = live.rig.machine.dma();
            dma.set(at + 14, descriptor_flag::INDIRECT);
            live.descriptor(0, at, 16, 0, AVAILABLE | descriptor_flag::INDIRECT);
        }),
        ("a buffer outside memory", |live, _| {
            live.descriptor(0, 1 << 40, 1, 0, AVAILABLE);
        }),
        ("a buffer to read after one to write", |live, at| {
            live.descriptor(1, at, 1, 0, AVAILABLE);
            live.descriptor(
                0,
                at,
                1,
                0,
                AVAILABLE | descriptor_flag::NEXT | descriptor_flag::WRITE,
            );
        }),
        ("a buffer id that is in flight", |live, at| {
            live.descriptor(1, at, 1, 5, AVAILABLE);
            live.descriptor(0, at, 1, 5, AVAILABLE);
        }),
    ];
    for (what, write) in cases {
        let rig = rig(8);
        let live = Live::new(&rig, PACKED, 4);
        rig.controls.hold(true);
        let at = rig.machine.dma().allocate(64, 16).unwrap();
        write(&live, at);
        live.transport.notify(0);
        assert!(live.needs_reset(), "{what}");
        rig.controls.hold(false);
        rig.controls.release(8);
        rig.settle();
        live.transport.reset().unwrap();
        let mut live = Live::new(&rig, PACKED, 4);
        let chain = live.add(b"again", 1, 1, false);
        live.publish();
        live.comes_back(&[&chain]);
    }
}

/// Requirements: ring
#[test]
fn ring_packed_a_driver_cannot_fill_places_that_the_device_has() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 2);
    rig.controls.hold(true);
    live.add(b"x", 1, 1, false);
    live.publish();
    rig.settle();
    assert_eq!(rig.controls.held(), 1);
    let at = rig.machine.dma().allocate(16, 16).unwrap();
    // Both places are taken. In the second round, available means the other value of both flags.
    live.descriptor(0, at, 1, 7, 1 << 15);
    live.transport.notify(0);
    assert!(live.needs_reset());
}

/// Requirements: ring, E5
#[test]
fn ring_packed_sizes_need_not_be_powers_of_two_and_a_reset_queue_stays_packed() {
    let rig = rig(8);
    let mut live = Live::new(&rig, PACKED, 7);
    assert_eq!(live.transport.queue_size(0), 7);
    let chain = live.add(b"before", 1, 1, false);
    live.publish();
    live.comes_back(&[&chain]);
    live.transport.reset_queue(0).unwrap();
    assert_eq!(live.transport.queue_size(0), 8);
    let dma = rig.machine.dma().clone();
    live.queue = PackedQueue::new(dma, 3, false).unwrap();
    live.enable();
    let chain = live.add(b"after", 1, 1, false);
    live.publish();
    live.comes_back(&[&chain]);
}

/// Requirements: ring
#[test]
fn ring_packed_rings_cannot_be_agreed_on_when_split_ones_are_in_use() {
    let rig = rig(8);
    let transport = rig.transport();
    transport.reset().unwrap();
    transport.set(common::DEVICE_STATUS, status::ACKNOWLEDGE | status::DRIVER);
    let layout = driver::virtio::Layout::allocate(rig.machine.dma(), 8).unwrap();
    transport.enable_queue(0, &layout, 1).unwrap();
    for (select, features) in [(0, PACKED as u32), (1, (PACKED >> 32) as u32)] {
        transport.set(common::DRIVER_FEATURE_SELECT, select);
        transport.set(common::DRIVER_FEATURE, features);
    }
    let wanted = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
    transport.set(common::DEVICE_STATUS, wanted);
    assert_eq!(transport.status() & status::FEATURES_OK, 0);
    // Without them it can.
    transport.set(common::DRIVER_FEATURE, (SIMPLE >> 32) as u32);
    transport.set(common::DEVICE_STATUS, wanted);
    assert_ne!(transport.status() & status::FEATURES_OK, 0);
}
