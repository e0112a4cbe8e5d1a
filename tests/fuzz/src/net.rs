//! Frames between two functions on a switch.

use std::collections::HashMap;

use devices::net::Switch;
use devices::virtio::{QueueRegisters, VirtioFunction};
use driver::access::{Dma, DmaExt};
use driver::host::HostDma;
use driver::virtio::{Buffer, Queue, status};

use crate::fixture::{Rig, net};
use crate::input::Input;
use crate::queues::{Apply, negotiate, offered};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const HEADER: u32 = 12;

/// Where a receive chain may put bytes.
type Room = Vec<(u64, u32)>;

struct End {
    rig: Rig,
    receive: Queue<HostDma>,
    transmit: Queue<HostDma>,
    rooms: HashMap<u16, Room>,
}

impl End {
    /// A device that is live, with offered features except those in `without`, and packed virtqueues except with bit 24 of it.
    fn new(switch: &Switch, last: u8, dma: &HostDma, without: u64) -> Self {
        let rig = Rig::new(Box::new(net(switch, last)), dma);
        let mut features = offered(&rig.function) & !(without & 0x00ff_ffff);
        if without & 1 << 24 != 0 {
            features &= !driver::virtio::feature::RING_PACKED;
        }
        assert!(negotiate(&rig.function, features), "offered features");
        let queue = |index| {
            let queue = Queue::new(dma.clone(), 64, features).expect("memory");
            enable(&rig.function, index, &queue);
            queue
        };
        let (receive, transmit) = (queue(RECEIVE), queue(TRANSMIT));
        rig.function.write_status(status::DRIVER_OK).apply();
        Self {
            rig,
            receive,
            transmit,
            rooms: HashMap::new(),
        }
    }

    fn publish(&mut self, index: u16) {
        let queue = match index {
            RECEIVE => &mut self.receive,
            _ => &mut self.transmit,
        };
        if queue.publish() {
            self.rig.function.kick(index);
        }
    }
}

fn enable(function: &VirtioFunction, index: u16, queue: &Queue<HostDma>) {
    let layout = queue.layout();
    function.update_queue(index, |registers| {
        *registers = QueueRegisters {
            size: layout.size,
            descriptor_area: layout.descriptors,
            driver_area: layout.available,
            device_area: layout.used,
        };
    });
    function.enable_queue(index).apply();
}

/// One driver sends any bytes as frames, in chains of any shape; the other receives into buffers of any shape. Every
/// sent chain comes back, and what is received has a header and lies within its buffers.
pub fn net_frames(data: &[u8]) {
    let mut input = Input::new(data);
    let dma = HostDma::new(0, 4 << 20).expect("RAM");
    let switch = Switch::new();
    let mut ends = [1, 2].map(|last| End::new(&switch, last, &dma, input.dword().into()));
    while !input.is_empty() {
        let choice = input.byte();
        let (a, b) = ends.split_at_mut(1);
        let (from, to) = match choice & 1 {
            0 => (&mut a[0], &mut b[0]),
            _ => (&mut b[0], &mut a[0]),
        };
        if choice & 2 == 0 {
            offer(&mut input, &dma, from);
        } else {
            send(&mut input, &dma, from);
        }
        for end in [&*from, &*to, &*from] {
            end.rig.settle();
        }
        collect(&dma, from);
        collect(&dma, to);
    }
    for end in &ends {
        assert_eq!(end.transmit.in_flight(), 0, "a frame was kept");
        end.rig.drain();
    }
}

fn offer(input: &mut Input<'_>, dma: &HostDma, end: &mut End) {
    let mut room = Room::new();
    for _ in 0..=input.pick(3) {
        // A driver must give room for the header at least.
        let least = if room.is_empty() { HEADER } else { 0 };
        let len = least + u32::from(input.word() % 2048);
        let Some(address) = dma.allocate(len.max(1) as usize, 1) else {
            return;
        };
        room.push((address, len));
    }
    let chain: Vec<_> = room
        .iter()
        .map(|(address, len)| Buffer::writable(*address, *len))
        .collect();
    if let Ok(head) = end.receive.add(&chain) {
        end.rooms.insert(head, room);
    }
    end.publish(RECEIVE);
}

fn send(input: &mut Input<'_>, dma: &HostDma, end: &mut End) {
    let mut chain = Vec::new();
    for _ in 0..=input.pick(3) {
        let len = usize::from(input.byte());
        let repeat = 1 + usize::from(input.pick(4));
        let piece = input.slice(len).repeat(repeat);
        let Some(address) = dma.place(&piece) else {
            return;
        };
        chain.push(Buffer::readable(address, piece.len() as u32));
    }
    // A full ring is no failure: what is on it comes back below.
    let _ = end.transmit.add(&chain);
    end.publish(TRANSMIT);
}

fn collect(dma: &HostDma, end: &mut End) {
    assert_eq!(
        end.rig.function.status() & status::NEEDS_RESET,
        0,
        "rules were kept"
    );
    while let Some(used) = end.transmit.take().unwrap_or_else(|e| panic!("{e}")) {
        assert_eq!(used.len, 0, "nothing is written to a frame that is sent");
    }
    let mut rest = 0u16;
    while let Some(used) = end.receive.take().unwrap_or_else(|e| panic!("{e}")) {
        let room = end.rooms.remove(&used.head).expect("each head comes once");
        if rest > 0 {
            rest -= 1;
            continue;
        }
        if used.len == 0 {
            // A buffer that was of no use.
            continue;
        }
        assert!(used.len >= HEADER, "a frame without a header");
        let header: Vec<u8> = room
            .iter()
            .flat_map(|(address, len)| dma.bytes(*address, *len as usize))
            .take(HEADER as usize)
            .collect();
        let buffers = u16::from_le_bytes([header[10], header[11]]);
        assert!(buffers >= 1, "a frame in no buffers");
        rest = buffers - 1;
    }
    assert_eq!(rest, 0, "a frame that ends early");
}
