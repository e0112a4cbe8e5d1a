//! The same requests on split and on packed virtqueues: the same results, in the same order.

use std::collections::VecDeque;

use conformance::{ALL, Rig, SIMPLE, enable_msix};
use devices::gate::Reasons;
use devices::virtio::{Doors, Offer};
use driver::access::DmaExt;
use driver::host::{HostDma, HostFunction, Place, Shape};
use driver::virtio::{Buffer, Queue, QueueError, Transport, feature, status};
use proptest::prelude::*;

const SIZE: u16 = 16;

/// What a driver or its device does.
#[derive(Clone, Debug)]
enum Step {
    /// A chain of this many buffers that are read and that are written, with so many bytes for each direction.
    Add(u8, u8, u16, bool),
    /// The driver makes what it added available.
    Publish,
    /// Chains are kept from now on, or not.
    Hold(bool),
    /// So many come back, the oldest or the newest first.
    Release(u8, bool),
    /// The driver wants to be interrupted, or not.
    WantInterrupts(bool),
    /// The function is paused, saved, restored, and goes on.
    Save,
    /// The queue is reset and set up anew.
    Reset,
}

/// A device and its driver.
struct Side {
    rig: Rig,
    transport: Transport<HostFunction>,
    queue: Queue<HostDma>,
    features: u64,
    /// Chains the device has or will have: head, where the echo goes, and what that is.
    out: Vec<(u16, u64, Vec<u8>)>,
    /// How many chains were added.
    count: u8,
}

/// What a step came to.
#[derive(Debug, PartialEq)]
struct Seen {
    added: Option<Result<(), QueueError>>,
    /// What came back, in order.
    echoes: Vec<Vec<u8>>,
    interrupts: Vec<u16>,
    in_flight: usize,
    status: u8,
}

impl Side {
    fn new(features: u64) -> Self {
        let shape = Shape {
            queues: vec![SIZE],
            ..Shape::default()
        };
        let offer = Offer {
            doors: Doors::default(),
            packed: true,
        };
        let rig = Rig::offering(shape, Place::RootBus, offer);
        let transport = rig.transport();
        let features = transport.negotiate(features).unwrap();
        enable_msix(&transport);
        let queue = Queue::new(rig.machine.dma().clone(), SIZE, features).unwrap();
        transport.enable_queue(0, &queue.layout(), 1).unwrap();
        transport.start();
        rig.settle();
        Self {
            rig,
            transport,
            queue,
            features,
            out: Vec::new(),
            count: 0,
        }
    }

    fn step(&mut self, step: &Step) -> Seen {
        let mut added = None;
        match *step {
            Step::Add(outs, ins, len, indirect) => added = Some(self.add(outs, ins, len, indirect)),
            Step::Publish => {
                if self.queue.publish() {
                    self.transport.notify(0);
                }
            }
            Step::Hold(hold) => self.rig.controls.hold(hold),
            Step::Release(count, true) => self.rig.controls.release(count.into()),
            Step::Release(count, false) => self.rig.controls.release_newest(count.into()),
            Step::WantInterrupts(wanted) => self.queue.want_interrupts(wanted),
            Step::Save => self.save(),
            Step::Reset => self.reset(),
        }
        self.rig.settle();
        let mut echoes = Vec::new();
        while let Some(used) = self.queue.take().unwrap() {
            let at = self.out.iter().position(|(head, ..)| *head == used.head);
            let (_, to, bytes) = self.out.remove(at.expect("a chain comes back once"));
            assert_eq!(used.len as usize, bytes.len());
            assert_eq!(self.rig.machine.dma().bytes(to, bytes.len()), bytes);
            echoes.push(bytes);
        }
        Seen {
            added,
            echoes,
            interrupts: self.rig.machine.msi().take_vectors(),
            in_flight: self.rig.controls.held(),
            status: self.transport.status(),
        }
    }

    fn add(&mut self, outs: u8, ins: u8, len: u16, indirect: bool) -> Result<(), QueueError> {
        let dma = self.rig.machine.dma();
        let bytes = vec![self.count; len.into()];
        let from = dma.place(&bytes).unwrap();
        let to = dma.place(&vec![0xee; len.into()]).unwrap();
        let cut = |at: u64, parts: u8, new: fn(u64, u32) -> Buffer| {
            let edge = move |part: u8| u64::from(part) * u64::from(len) / u64::from(parts);
            (0..parts).map(move |n| new(at + edge(n), (edge(n + 1) - edge(n)) as u32))
        };
        let chain = cut(from, outs, Buffer::readable).chain(cut(to, ins, Buffer::writable));
        let chain: Vec<_> = chain.collect();
        let head = match indirect {
            true => self.queue.add_indirect(&chain)?,
            false => self.queue.add(&chain)?,
        };
        self.out.push((head, to, bytes));
        self.count = self.count.wrapping_add(1);
        Ok(())
    }

    /// Chains that the device has are given up unbegun, and executed anew.
    fn save(&mut self) {
        let function = &self.rig.plugged.function;
        function.close(Reasons::PAUSED);
        self.rig.controls.give_up(true);
        function.recall();
        self.rig.controls.give_up(false);
        let (state, rest) = (function.save(), function.save_transient().unwrap());
        function.restore_exact(&state, &rest).unwrap();
        assert_eq!(
            (function.save(), function.save_transient().unwrap()),
            (state, rest)
        );
        function.reopen(Reasons::PAUSED);
    }

    fn reset(&mut self) {
        self.rig.controls.hold(false);
        self.rig.controls.release(usize::MAX);
        self.transport.reset_queue(0).unwrap();
        self.queue = Queue::new(self.rig.machine.dma().clone(), SIZE, self.features).unwrap();
        self.out.clear();
        self.transport
            .enable_queue(0, &self.queue.layout(), 1)
            .unwrap();
    }
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u8..4, 1u8..4, 1u16..300, any::<bool>()).prop_map(|(o, i, l, t)| Step::Add(o, i, l, t)),
        4 => Just(Step::Publish),
        2 => any::<bool>().prop_map(Step::Hold),
        3 => (1u8..5, any::<bool>()).prop_map(|(n, oldest)| Step::Release(n, oldest)),
        1 => any::<bool>().prop_map(Step::WantInterrupts),
        1 => Just(Step::Save),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Requirements: G3-i
    #[test]
    fn split_and_packed_queues_have_the_same_results(
        events: bool,
        steps in prop::collection::vec(any_step(), 1..80),
    ) {
        let features = if events { ALL } else { SIMPLE };
        let mut split = Side::new(features & !feature::RING_PACKED);
        let mut packed = Side::new(features | feature::RING_PACKED);
        // What the driver has added, in order, and did not get back.
        let mut model = VecDeque::new();
        for step in &steps {
            let (mut a, mut b) = (split.step(step), packed.step(step));
            if events {
                // Each kind says in its own way when it wants one.
                a.interrupts.clear();
                b.interrupts.clear();
            }
            prop_assert_eq!(&a, &b, "{:?}", step);
            prop_assert_eq!(a.status & status::NEEDS_RESET, 0);
            if let Step::Reset = step {
                model.clear();
            }
            if a.added == Some(Ok(())) {
                model.push_back(split.count.wrapping_sub(1));
            }
            for echo in &a.echoes {
                let at = model.iter().position(|number| number == &echo[0]);
                prop_assert!(at.is_some(), "{} came back and was not there", echo[0]);
                model.remove(at.unwrap_or(0));
            }
        }
        for side in [&mut split, &mut packed] {
            side.step(&Step::Hold(false));
            side.step(&Step::Release(u8::MAX, true));
        }
        let mut last = [split.step(&Step::Publish), packed.step(&Step::Publish)];
        prop_assert_eq!(&last[0].echoes, &last[1].echoes);
        for seen in &mut last {
            prop_assert_eq!(seen.in_flight, 0);
        }
        prop_assert!(split.out.is_empty() && packed.out.is_empty(), "a chain was lost");
    }
}
