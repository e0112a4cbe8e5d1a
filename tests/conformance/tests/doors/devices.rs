//! Devices that have backends of their own: a disk whose storage is slow, and a network interface whose peers go on
//! sending.

use std::io;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use conformance::QUIET;
use devices::block::{Backend, Block, BlockConfig};
use devices::memory::{GuestRead, GuestWrite};
use devices::net::{MacAddress, Net, PortConfig, Switch};
use devices::virtio::{Doors, VirtioDevice};
use driver::access::{Dma, DmaExt, Function, FunctionExt};
use driver::host::{HostDma, Machine, RAM};
use driver::virtio::net::{HEADER, RECEIVE, RECEIVE_BUFFER, TRANSMIT};
use driver::virtio::{Buffer, Door, SplitQueue, Transport, common};

use super::checks::RUNNING;
use super::rig::{CASES, Kind, only, plug};

/// How long a thread of a device may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A machine with one device of some type.
struct Bench {
    machine: Machine,
    transport: Transport<Rc<dyn Function>>,
    queues: Vec<SplitQueue<HostDma>>,
}

impl Bench {
    /// The device, live, with its first `queues` queues of 64 entries, and a vector for each.
    fn new(
        kind: Kind,
        device: Box<dyn VirtioDevice>,
        spare: &dyn Fn() -> Box<dyn VirtioDevice>,
        doors: Doors,
        features: u64,
        queues: u16,
    ) -> Self {
        let machine = Machine::new().unwrap();
        let (_, _, pci) = plug(&machine, kind, device, doors, spare);
        let transport = Transport::new(pci).unwrap();
        let features = transport.negotiate(features).unwrap();
        conformance::enable_msix(&transport);
        let event_index = features & driver::virtio::feature::EVENT_IDX != 0;
        let queues = (0..queues).map(|index| {
            let queue = SplitQueue::new(machine.dma().clone(), 64, event_index).unwrap();
            transport
                .enable_queue(index, queue.layout(), 1 + index)
                .unwrap();
            queue
        });
        let queues = queues.collect();
        transport.start();
        machine.settle();
        Self {
            machine,
            transport,
            queues,
        }
    }

    /// Makes a chain available on `queue`, with a kick.
    fn submit(&mut self, queue: u16, chain: &[Buffer]) -> u16 {
        let ring = &mut self.queues[usize::from(queue)];
        let head = ring.add(chain).unwrap();
        let _ = ring.publish();
        self.transport.notify(queue);
        head
    }

    fn place(&self, bytes: &[u8]) -> u64 {
        self.machine.dma().place(bytes).unwrap()
    }

    /// Lets the device work until `done`.
    fn wait(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let function = self.transport.function().clone();
        assert!(function.wait_until(PATIENCE, || done(self)), "{what}");
    }

    fn write_status(&self, value: u8) {
        self.transport.set(common::DEVICE_STATUS, value);
    }

    /// Kicks and lets the device work: not a byte of memory changes, and no interrupt comes.
    fn stays_still(&self) {
        let before = self.machine.dma().bytes(0, RAM);
        self.machine.msi().take();
        self.disturb();
        assert!(before == self.machine.dma().bytes(0, RAM), "memory changed");
        assert_eq!(self.machine.msi().take_vectors(), QUIET);
    }

    fn disturb(&self) {
        for _ in 0..3 {
            let notify = self.transport.notify_region();
            for queue in 0..self.queues.len() as u16 {
                let at = u64::from(self.transport.notify_multiplier()) * u64::from(queue);
                let register = driver::access::Register::<u16>::at(at);
                self.transport.function().set(notify, register, queue);
            }
            assert!(self.machine.settle());
            std::thread::yield_now();
        }
    }
}

// A disk ---------------------------------------------------------------------------------------------------------

/// Storage that reads as sevens, but only when it is told to go.
#[derive(Default)]
struct Slow {
    state: Mutex<SlowState>,
    changed: Condvar,
}

#[derive(Default)]
struct SlowState {
    /// Reads that may still begin to write.
    allowed: usize,
    started: usize,
}

impl Slow {
    fn allow(&self, reads: usize) {
        self.state.lock().unwrap().allowed += reads;
        self.changed.notify_all();
    }

    fn started(&self) -> usize {
        self.state.lock().unwrap().started
    }
}

impl Backend for Slow {
    fn len(&self) -> u64 {
        64 * 512
    }

    fn read(&self, _offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.started += 1;
        let stuck = |state: &mut SlowState| state.allowed == 0;
        let mut state = self.changed.wait_while(state, stuck).unwrap();
        state.allowed -= 1;
        drop(state);
        for buffer in buffers {
            buffer.copy_from(&vec![7; buffer.len()]);
        }
        Ok(())
    }

    fn write(&self, _offset: u64, _buffers: &[GuestRead<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}

fn disk(storage: Arc<Slow>) -> Box<dyn VirtioDevice> {
    Box::new(Block::with_backend(storage, &BlockConfig::new("slow")).unwrap())
}

/// A disk with reads on their way.
struct Disk {
    bench: Bench,
    storage: Arc<Slow>,
    /// Where the reads go that have not come back: data, then status.
    reads: std::collections::HashMap<u16, u64>,
}

impl Disk {
    fn new(kind: Kind, door: Door, features: u64) -> Self {
        let storage = Arc::new(Slow::default());
        let spare = || disk(Arc::default());
        let device = disk(Arc::clone(&storage));
        Self {
            bench: Bench::new(kind, device, &spare, only(door), features, 1),
            storage,
            reads: Default::default(),
        }
    }

    /// Asks for a sector.
    fn read(&mut self) {
        let header = self.bench.place(&[0; 16]);
        let data = self.bench.place(&[0xee; 513]);
        let chain = [
            Buffer::readable(header, 16),
            Buffer::writable(data, 512),
            Buffer::writable(data + 512, 1),
        ];
        let head = self.bench.submit(0, &chain);
        assert_eq!(self.reads.insert(head, data), None);
    }

    /// Waits until storage has begun with `count` reads.
    fn busy(&mut self, count: usize) {
        let storage = Arc::clone(&self.storage);
        self.bench
            .wait("the disk works", |_| storage.started() == count);
        assert!(self.bench.machine.settle());
    }

    /// Takes back what was used and checks it.
    fn collect(&mut self) -> usize {
        let mut count = 0;
        while let Some(used) = self.bench.queues[0].take().unwrap() {
            let data = self.reads.remove(&used.head).unwrap();
            let bytes = self.bench.machine.dma().bytes(data, 513);
            assert_eq!(bytes, [vec![7; 512], vec![0]].concat());
            count += 1;
        }
        self.bench.queues[0].want_interrupts(true);
        count
    }

    /// Waits until all reads have come back.
    fn all_come_back(&mut self) {
        self.storage.allow(self.reads.len());
        let function = self.bench.transport.function().clone();
        let done = function.wait_until(PATIENCE, || {
            self.collect();
            self.reads.is_empty()
        });
        assert!(done, "reads are lost");
        self.bench.disturb();
        assert_eq!(self.collect(), 0);
    }
}

fn for_each_disk(test: impl Fn(Door, Disk)) {
    for door in Door::ALL {
        for (kind, features) in CASES {
            test(door, Disk::new(kind, door, features));
        }
    }
}

/// Requirements: S1-16, S2-9, S2-11, B-47
#[test]
fn s1_16_a_disk_stops_when_its_storage_has_answered_everything() {
    for_each_disk(|door, mut disk| {
        for _ in 0..3 {
            disk.read();
        }
        disk.busy(1);
        disk.bench.write_status(door.stop(RUNNING));
        disk.read();
        for done in 1..=2 {
            disk.storage.allow(1);
            disk.busy(1 + done);
            assert_eq!(disk.bench.transport.status(), RUNNING);
        }
        disk.storage.allow(1);
        let stopped = door.stopped(RUNNING);
        disk.bench
            .wait("the stop", |bench| bench.transport.status() == stopped);
        assert!(disk.bench.machine.msi().take_vectors().contains(&1));
        assert_eq!(disk.collect(), 3);
        disk.storage.allow(1);
        disk.bench.stays_still();
        assert_eq!(disk.storage.started(), 3, "the last was not fetched");
        disk.bench.transport.resume(door).unwrap();
        disk.all_come_back();
        assert_eq!(disk.storage.started(), 4);
    });
}

/// Requirements: S1-6, G1-f, G2-d
#[test]
fn s1_6_a_stop_is_called_off_while_storage_is_stuck() {
    for (kind, features) in CASES {
        for door in [Door::SuspendV5, Door::DeviceStop] {
            let mut disk = Disk::new(kind, door, features);
            disk.read();
            disk.busy(1);
            disk.bench.write_status(door.stop(RUNNING));
            disk.read();
            disk.bench.disturb();
            assert_eq!(disk.bench.transport.status(), RUNNING);
            disk.bench.write_status(RUNNING);
            assert_eq!(disk.bench.transport.status(), RUNNING);
            disk.all_come_back();
            assert_eq!(disk.storage.started(), 2);
            disk.bench.transport.stop(door).unwrap();
            disk.bench.stays_still();
        }
    }
}

/// Requirements: G2-e, S1-19, S1-6
#[test]
fn g2_e_a_reset_while_a_disk_stops_waits_for_what_storage_has_begun() {
    for_each_disk(|door, mut disk| {
        disk.read();
        disk.read();
        disk.busy(1);
        disk.bench.write_status(door.stop(RUNNING));
        disk.bench.write_status(0);
        disk.bench.disturb();
        assert_ne!(disk.bench.transport.status(), 0);
        disk.storage.allow(2);
        disk.bench
            .wait("the reset", |bench| bench.transport.status() == 0);
        disk.bench.stays_still();
        assert_eq!(
            disk.storage.started(),
            1,
            "what had not begun was called off"
        );
    });
}

// A network interface --------------------------------------------------------------------------------------------

/// Two interfaces on one switch, in machines of their own: what one sends does not touch the memory of the other.
struct Pair {
    /// The one that is stopped.
    us: Bench,
    peer: Bench,
    switch: Switch,
    /// Our receive buffers, by head.
    buffers: std::collections::HashMap<u16, u64>,
}

fn interface(switch: &Switch, octets: [u8; 6]) -> Box<dyn VirtioDevice> {
    let mac = MacAddress::new(octets);
    let port = switch.port(PortConfig {
        name: format!("{mac}"),
        mac,
        check_source: false,
    });
    Box::new(Net::new(mac, port.unwrap()))
}

const US: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER: [u8; 6] = [2, 0, 0, 0, 0, 2];

impl Pair {
    fn new(kind: Kind, door: Door, features: u64) -> Self {
        let switch = Switch::new();
        let spare = || interface(&Switch::new(), US);
        let us = Bench::new(
            kind,
            interface(&switch, US),
            &spare,
            only(door),
            features,
            2,
        );
        let doors = Doors::default();
        let peer = interface(&switch, PEER);
        let peer = Bench::new(Kind::Plain, peer, &spare, doors, features, 2);
        let mut pair = Self {
            us,
            peer,
            switch,
            buffers: Default::default(),
        };
        for _ in 0..64 {
            let buffer = pair.us.machine.dma().allocate(RECEIVE_BUFFER as usize, 16);
            pair.offer(buffer.unwrap());
        }
        pair.us.machine.settle();
        pair
    }

    fn offer(&mut self, buffer: u64) {
        let chain = [Buffer::writable(buffer, RECEIVE_BUFFER)];
        let head = self.us.submit(RECEIVE, &chain);
        self.buffers.insert(head, buffer);
    }

    /// A frame from one to the other, with a number in it.
    fn frame(to: [u8; 6], from: [u8; 6], number: u32) -> Vec<u8> {
        let mut frame = [&to[..], &from, &[0x88, 0xb5], &number.to_be_bytes()].concat();
        frame.resize(60, 0x33);
        frame
    }

    /// The peer sends us frames with these numbers, and its device is done with them.
    fn peer_sends(&mut self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            let frame = Self::frame(US, PEER, number);
            let bytes = [vec![0; HEADER], frame].concat();
            let at = self.peer.place(&bytes);
            let chain = [Buffer::readable(at, bytes.len() as u32)];
            self.peer.submit(TRANSMIT, &chain);
            assert!(self.peer.machine.settle());
            assert!(
                self.peer.queues[usize::from(TRANSMIT)]
                    .take()
                    .unwrap()
                    .is_some()
            );
        }
    }

    /// The numbers of the frames that we were given; their buffers are offered again.
    fn received(&mut self) -> Vec<u32> {
        let mut numbers = Vec::new();
        assert!(self.us.machine.settle());
        while let Some(used) = self.us.queues[usize::from(RECEIVE)].take().unwrap() {
            let buffer = self.buffers.remove(&used.head).unwrap();
            let bytes = self.us.machine.dma().bytes(buffer, used.len as usize);
            let frame = &bytes[HEADER..];
            let number = u32::from_be_bytes(frame[14..18].try_into().unwrap());
            assert_eq!(frame, Self::frame(US, PEER, number));
            numbers.push(number);
            self.offer(buffer);
            assert!(self.us.machine.settle());
        }
        numbers
    }

    /// Frames that wait for us in the switch, and those that were dropped because there were too many.
    fn waiting(&self) -> (usize, u64) {
        let ports = self.switch.ports();
        (ports[0].waiting, ports[0].stats.rx_overflow)
    }
}

fn for_each_pair(test: impl Fn(Door, Pair)) {
    for door in Door::ALL {
        for (kind, features) in CASES {
            test(door, Pair::new(kind, door, features));
        }
    }
}

/// Requirements: S1-14, S1-16, G2-b, B-45, B-47
#[test]
fn s1_14_frames_that_come_while_an_interface_is_stopped_are_received_after_the_resume() {
    for_each_pair(|door, mut pair| {
        pair.peer_sends(0..10);
        assert_eq!(pair.received(), Vec::from_iter(0..10));
        // Its receive buffers stay in the ring, and do not hold up the stop.
        pair.us.write_status(door.stop(RUNNING));
        assert_eq!(pair.us.transport.status(), door.stopped(RUNNING));
        let memory = pair.us.machine.dma().bytes(0, RAM);
        pair.us.machine.msi().take();
        pair.peer_sends(10..50);
        pair.us.disturb();
        pair.peer_sends(50..60);
        pair.us.stays_still();
        assert!(
            memory == pair.us.machine.dma().bytes(0, RAM),
            "memory changed"
        );
        assert_eq!(pair.us.machine.msi().take_vectors(), QUIET);
        assert_eq!(pair.waiting(), (50, 0));
        pair.us.transport.resume(door).unwrap();
        assert_eq!(pair.received(), Vec::from_iter(10..60));
        pair.peer_sends(60..70);
        assert_eq!(pair.received(), Vec::from_iter(60..70));
    });
}

/// Requirements: S1-14, S1-17, S2-10, B-45
#[test]
fn s1_14_a_stopped_interface_keeps_a_bounded_number_of_frames() {
    for_each_pair(|door, mut pair| {
        pair.us.transport.stop(door).unwrap();
        let memory = pair.us.machine.dma().bytes(0, RAM);
        pair.peer_sends(0..2000);
        pair.us.disturb();
        assert!(
            memory == pair.us.machine.dma().bytes(0, RAM),
            "memory changed"
        );
        let (waiting, dropped) = pair.waiting();
        assert_eq!(waiting as u64 + dropped, 2000);
        assert!(dropped > 0);
        pair.us.transport.resume(door).unwrap();
        assert_eq!(pair.received(), Vec::from_iter(0..waiting as u32));
        pair.peer_sends(5000..5001);
        assert_eq!(pair.received(), [5000]);
    });
}

/// Requirements: S1-9, S1-14, S2-8, B-48
#[test]
fn s1_9_what_a_stopped_interface_is_to_send_leaves_after_the_resume() {
    for_each_pair(|door, mut pair| {
        let peers = 16;
        for _ in 0..peers {
            let buffer = pair.peer.place(&[0; RECEIVE_BUFFER as usize]);
            let chain = [Buffer::writable(buffer, RECEIVE_BUFFER)];
            pair.peer.submit(RECEIVE, &chain);
        }
        pair.us.transport.stop(door).unwrap();
        for number in 0..peers {
            let bytes = [vec![0; HEADER], Pair::frame(PEER, US, number)].concat();
            let at = pair.us.place(&bytes);
            let chain = [Buffer::readable(at, bytes.len() as u32)];
            pair.us.submit(TRANSMIT, &chain);
        }
        pair.us.stays_still();
        assert!(pair.peer.machine.settle());
        assert_eq!(pair.peer.queues[usize::from(RECEIVE)].take(), Ok(None));
        pair.us.transport.resume(door).unwrap();
        assert!(pair.us.machine.settle() && pair.peer.machine.settle());
        let taken = |bench: &mut Bench, queue: u16| {
            let ring = &mut bench.queues[usize::from(queue)];
            std::iter::from_fn(|| ring.take().unwrap()).count()
        };
        assert_eq!(taken(&mut pair.us, TRANSMIT), peers as usize);
        assert_eq!(taken(&mut pair.peer, RECEIVE), peers as usize, "each once");
    });
}
