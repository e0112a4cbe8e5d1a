//! A small driver for unit tests: rings in guest memory, and the turns the I/O thread would take.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::admin::queue::QUEUE_SIZE;
use crate::memory::{GuestRam, RamRange, View};
use crate::virtio::{Cause, Interrupt, NO_VECTOR, VirtioDevice, VirtioFunction, feature};

/// Descriptor flags (virtio 1.4, "The Virtqueue Descriptor Table").
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Device status values on the way to a live device.
pub const ACKNOWLEDGE: u8 = 1;
pub const DRIVER: u8 = 2;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;

/// Bytes of guest RAM.
pub const RAM: usize = 16 << 20;
/// Where ring areas start; each queue has 64 KiB.
const RINGS: u64 = 0x10_0000;
const RING_STRIDE: u64 = 0x1_0000;
/// Where buffers start.
const BUFFERS: u64 = 0x40_0000;

/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A transport that remembers the vectors that were signalled.
#[derive(Default)]
pub struct Recorder(Mutex<Recorded>);

#[derive(Default)]
struct Recorded {
    signalled: Vec<u16>,
    /// Where interrupts go that go anywhere.
    vectors: HashMap<Cause, u16>,
}

impl Recorder {
    pub fn take(&self) -> Vec<u16> {
        std::mem::take(&mut self.0.lock().unwrap().signalled)
    }

    /// Has `cause` interrupt with `vector`.
    pub fn set(&self, cause: Cause, vector: u16) {
        self.0.lock().unwrap().vectors.insert(cause, vector);
    }
}

impl Interrupt for Recorder {
    fn signal(&self, cause: Cause) {
        let mut recorded = self.0.lock().unwrap();
        let vector = recorded.vectors.get(&cause).copied();
        recorded.signalled.extend(vector);
    }

    fn deliver_pending(&self) {}

    fn reset(&self) {
        self.0.lock().unwrap().vectors.clear();
    }

    fn reset_queue(&self, queue: u16) {
        let mut recorded = self.0.lock().unwrap();
        recorded.vectors.remove(&Cause::Queue(queue));
    }

    fn vectors(&self) -> u16 {
        1024
    }

    fn vector(&self, cause: Cause) -> u16 {
        let recorded = self.0.lock().unwrap();
        recorded.vectors.get(&cause).copied().unwrap_or(NO_VECTOR)
    }

    fn assign(&self, config: u16, queues: &mut dyn Iterator<Item = u16>) {
        let queues = (0..).map(Cause::Queue).zip(queues);
        let all = std::iter::once((Cause::Config, config)).chain(queues);
        self.0.lock().unwrap().vectors = all.filter(|(_, vector)| *vector != NO_VECTOR).collect();
    }
}

/// One buffer of a chain.
#[derive(Clone, Debug)]
pub enum Buf {
    /// Device-readable, with these bytes.
    Out(Vec<u8>),
    /// Device-writable, of this length, filled with 0xee.
    In(usize),
}

/// A chain the driver made available.
#[derive(Clone, Debug)]
pub struct Added {
    pub head: u16,
    /// Address and length of each device-writable buffer.
    pub writable: Vec<(u64, usize)>,
}

/// The driver's side of one ring.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    next_desc: u16,
    pub avail_idx: u16,
    used_idx: u16,
}

impl Ring {
    fn new(index: u16, size: u16) -> Self {
        let base = RINGS + RING_STRIDE * u64::from(index);
        Self {
            size,
            table: base,
            avail: base + 0x4000,
            used: base + 0x8000,
            next_desc: 0,
            avail_idx: 0,
            used_idx: 0,
        }
    }
}

/// A driver and the function it drives.
pub struct Driver {
    pub function: Arc<VirtioFunction>,
    pub view: View,
    pub interrupts: Arc<Recorder>,
    pub rings: Vec<Ring>,
    next_buffer: u64,
    /// Watches the sources as the I/O thread does. One without a descriptor is always ready.
    epoll: Epoll,
}

pub fn ram() -> Arc<GuestRam> {
    let start = GuestAddress(0);
    GuestRam::new(&[RamRange { start, len: RAM }]).unwrap()
}

impl Driver {
    /// Puts `device` behind a function, untouched by any driver.
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let ram = ram();
        let function = VirtioFunction::new("test", Box::new(device), ram.view().unwrap()).unwrap();
        Self::of(function, &ram)
    }

    /// A driver for `function`, whose memory is `ram`.
    pub fn of(function: Arc<VirtioFunction>, ram: &Arc<GuestRam>) -> Self {
        let interrupts = Arc::new(Recorder::default());
        function.set_interrupt(Arc::clone(&interrupts) as _);
        // The administration virtqueue cannot be seen before it was negotiated.
        let size = |i| function.queue(i).map_or(QUEUE_SIZE, |q| q.max_size);
        let rings = (0..function.total_queues())
            .map(|i| Ring::new(i, size(i)))
            .collect();
        let epoll = Epoll::new().unwrap();
        for source in function.sources().iter().filter(|s| s.fd >= 0) {
            let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(set, u64::from(source.token));
            epoll.ctl(ControlOperation::Add, source.fd, event).unwrap();
        }
        Self {
            function,
            view: ram.view().unwrap(),
            interrupts,
            rings,
            next_buffer: BUFFERS,
            epoll,
        }
    }

    /// A live device with every offered feature of `wanted` (and VERSION_1).
    pub fn live(device: impl VirtioDevice + 'static, wanted: u64) -> Self {
        let mut driver = Self::new(device);
        driver.start(wanted);
        driver
    }

    /// Drives the function from a reset to DRIVER_OK; returns the features in force.
    pub fn start(&mut self, wanted: u64) -> u64 {
        let f = &self.function;
        let _ = f.write_status(ACKNOWLEDGE);
        let _ = f.write_status(ACKNOWLEDGE | DRIVER);
        let offered = u64::from(f.device_features(0)) | u64::from(f.device_features(1)) << 32;
        let features = offered & (wanted | feature::VERSION_1);
        f.set_driver_features(0, features as u32);
        f.set_driver_features(1, (features >> 32) as u32);
        let _ = f.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(f.status() & FEATURES_OK, 0, "features refused");
        self.interrupts.set(Cause::Config, 100);
        for index in 0..self.rings.len() as u16 {
            self.enable(index);
        }
        let _ = self
            .function
            .write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        features
    }

    /// Sets up and enables one queue with a fresh ring; its vector is its index.
    pub fn enable(&mut self, index: u16) {
        let size = self.rings[usize::from(index)].size;
        let ring = Ring::new(index, size);
        self.view
            .write_slice(&vec![0; RING_STRIDE as usize], GuestAddress(ring.table))
            .unwrap();
        self.rings[usize::from(index)] = ring;
        self.function.update_queue(index, |q| {
            q.size = size;
            q.descriptor_area = ring.table;
            q.driver_area = ring.avail;
            q.device_area = ring.used;
        });
        self.interrupts.set(Cause::Queue(index), index);
        let _ = self.function.enable_queue(index);
    }

    /// Writes the device status.
    pub fn status(&self, value: u8) {
        let _ = self.function.write_status(value);
    }

    /// Reserves `len` bytes of guest memory.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += len as u64;
        if self.next_buffer >= RAM as u64 {
            self.next_buffer = BUFFERS + len as u64;
            return BUFFERS;
        }
        at
    }

    /// Writes descriptor `slot` of the table at `table`.
    pub fn descriptor(&self, table: u64, slot: u16, addr: u64, len: usize, flags: u16, next: u16) {
        let at = table + 16 * u64::from(slot);
        self.view.write_obj(addr, GuestAddress(at)).unwrap();
        self.view
            .write_obj(len as u32, GuestAddress(at + 8))
            .unwrap();
        self.view.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.view.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Copies `bufs` to guest memory: (address, length, flags) of each.
    pub fn place(&mut self, bufs: &[Buf]) -> Vec<(u64, usize, u16)> {
        let mut placed = Vec::new();
        for buf in bufs {
            let (bytes, flags) = match buf {
                Buf::Out(bytes) => (bytes.clone(), 0),
                Buf::In(len) => (vec![0xee; *len], WRITE),
            };
            let at = self.alloc(bytes.len());
            self.view.write_slice(&bytes, GuestAddress(at)).unwrap();
            placed.push((at, bytes.len(), flags));
        }
        placed
    }

    /// Makes `bufs` available as one chain, without a kick.
    pub fn add(&mut self, queue: u16, bufs: &[Buf]) -> Added {
        let placed = self.place(bufs);
        let mut ring = self.rings[usize::from(queue)];
        let head = ring.next_desc % ring.size;
        for (i, (addr, len, flags)) in placed.iter().enumerate() {
            let slot = ring.next_desc % ring.size;
            ring.next_desc = ring.next_desc.wrapping_add(1);
            let last = i + 1 == placed.len();
            let flags = flags | if last { 0 } else { NEXT };
            self.descriptor(
                ring.table,
                slot,
                *addr,
                *len,
                flags,
                ring.next_desc % ring.size,
            );
        }
        self.rings[usize::from(queue)] = ring;
        self.publish(queue, head);
        let writable = placed.iter().filter(|(_, _, flags)| flags & WRITE != 0);
        Added {
            head,
            writable: writable.map(|(addr, len, _)| (*addr, *len)).collect(),
        }
    }

    /// Puts `head` on the available ring.
    pub fn publish(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        self.view.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        self.view
            .write_obj(ring.avail_idx, GuestAddress(ring.avail + 2))
            .unwrap();
    }

    /// The next used element, if there is one: (head, length).
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let ring = &mut self.rings[usize::from(queue)];
        let index: u16 = self.view.read_obj(GuestAddress(ring.used + 2)).unwrap();
        if index == ring.used_idx {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.used_idx % ring.size);
        ring.used_idx = ring.used_idx.wrapping_add(1);
        let id: u32 = self.view.read_obj(GuestAddress(at)).unwrap();
        let len = self.view.read_obj(GuestAddress(at + 4)).unwrap();
        Some((id as u16, len))
    }

    /// True if the device wants to hear of the chain that was added last.
    pub fn kick_wanted(&self, queue: u16, event_index: bool) -> bool {
        let ring = &self.rings[usize::from(queue)];
        if event_index {
            let at = ring.used + 4 + 8 * u64::from(ring.size);
            let event: u16 = self.view.read_obj(GuestAddress(at)).unwrap();
            event == ring.avail_idx.wrapping_sub(1)
        } else {
            let flags: u16 = self.view.read_obj(GuestAddress(ring.used)).unwrap();
            flags & 1 == 0
        }
    }

    /// Sets `used_event`: the driver wants an interrupt once the used index passes it.
    pub fn set_used_event(&self, queue: u16, index: u16) {
        let ring = &self.rings[usize::from(queue)];
        let at = ring.avail + 4 + 2 * u64::from(ring.size);
        self.view.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Sets the available ring's flags.
    pub fn set_avail_flags(&self, queue: u16, flags: u16) {
        let ring = &self.rings[usize::from(queue)];
        self.view
            .write_obj(flags, GuestAddress(ring.avail))
            .unwrap();
    }

    /// Kicks `queue` and takes one turn as the I/O thread.
    pub fn kick(&self, queue: u16) {
        self.function.kick(queue);
        self.turn();
    }

    /// One turn as the I/O thread: pending kicks, then the sources that are ready.
    pub fn turn(&self) {
        for index in 0..self.function.total_queues() {
            if self.was_kicked(index) {
                self.function.service(index);
            }
        }
        let mut events = [EpollEvent::default(); 8];
        let ready = self.epoll.wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            self.function.on_event(event.data() as u16);
        }
        for source in self.function.sources().iter().filter(|s| s.fd < 0) {
            self.function.on_event(source.token);
        }
    }

    /// Takes a pending kick of `queue` away; false if there was none.
    pub fn was_kicked(&self, queue: u16) -> bool {
        self.function.kick_event(queue).unwrap().read().is_ok()
    }

    /// Takes turns until `done` or the patience runs out.
    pub fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            self.turn();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for the next used element of `queue`.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let mut used = None;
        self.until("a used chain", |d| {
            used = d.used(queue);
            used.is_some()
        });
        used.unwrap()
    }

    /// Adds a chain, kicks, waits for it, and returns (used length, device-writable bytes).
    pub fn request(&mut self, queue: u16, bufs: &[Buf]) -> (u32, Vec<u8>) {
        let added = self.add(queue, bufs);
        self.kick(queue);
        let (head, len) = self.wait_used(queue);
        assert_eq!(head, added.head);
        (len, self.written(&added))
    }

    /// The device-writable bytes of a chain, as they are now.
    pub fn written(&self, added: &Added) -> Vec<u8> {
        let mut out = Vec::new();
        for (addr, len) in &added.writable {
            out.extend(self.bytes(*addr, *len));
        }
        out
    }

    /// `len` bytes of guest memory.
    pub fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view
            .read_slice(&mut bytes, GuestAddress(addr))
            .unwrap();
        bytes
    }
}
