//! Small drivers that go on with a device wherever it is.

use std::collections::HashMap;
use std::time::Duration;

use driver::access::{Dma, DmaExt, FunctionExt};
use driver::host::HostDma;
use driver::pci::MsiX;
use driver::virtio::admin::{AdminError, AdminQueue, Answer, Shape};
use driver::virtio::migration::Commands;
use driver::virtio::{Buffer, NO_VECTOR, SplitQueue, Transport, feature};
use vmm::machine::owner::Group;

use super::rig::Seat;

const PATIENCE: Duration = Duration::from_secs(20);

/// A started device with some of its queues.
pub struct Device {
    pub transport: Transport<Seat>,
    pub dma: HostDma,
    pub queues: Vec<SplitQueue<HostDma>>,
    /// Chains that are out, by queue and head.
    out: HashMap<(u16, u16), Chain>,
}

/// Where the parts of a chain are that the device writes.
struct Chain {
    data: u64,
    len: u32,
    /// Status byte of a block request.
    status: Option<u64>,
}

/// A chain that came back.
#[derive(Debug, PartialEq, Eq)]
pub struct Done {
    pub status: Option<u8>,
    pub data: Vec<u8>,
}

impl Device {
    /// Starts the device with `features` and a queue of `size` entries for each of `vectors`.
    pub fn start(seat: Seat, dma: &HostDma, features: u64, size: u16, vectors: &[u16]) -> Self {
        let mut device = Self::prepare(seat, dma, features);
        for vector in vectors {
            device.add_queue(size, *vector);
        }
        device.transport.start();
        device
    }

    /// A device at FEATURES_OK.
    pub fn prepare(seat: Seat, dma: &HostDma, features: u64) -> Self {
        let transport = Transport::new(seat).unwrap();
        transport.negotiate(features).unwrap();
        Self {
            transport,
            dma: dma.clone(),
            queues: Vec::new(),
            out: HashMap::new(),
        }
    }

    pub fn add_queue(&mut self, size: u16, vector: u16) {
        let event_index = self.transport.accepted() & feature::EVENT_IDX != 0;
        let queue = SplitQueue::new(self.dma.clone(), size, event_index).unwrap();
        let index = self.queues.len() as u16;
        let layout = queue.layout();
        self.transport.enable_queue(index, layout, vector).unwrap();
        self.queues.push(queue);
    }

    pub fn msix(&self) -> (MsiX, &Seat) {
        (*self.transport.msix().unwrap(), self.transport.function())
    }

    /// Hands out a block request.
    pub fn request(&mut self, queue: u16, kind: u32, sector: u64, out: &[u8], room: u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let header = self.dma.place(&header).unwrap();
        let status = self.dma.place(&[0xff]).unwrap();
        let data = self.dma.allocate(room.max(1) as usize, 16).unwrap();
        let mut chain = vec![Buffer::readable(header, 16)];
        if !out.is_empty() {
            let from = self.dma.place(out).unwrap();
            chain.push(Buffer::readable(from, out.len() as u32));
        }
        if room != 0 {
            chain.push(Buffer::writable(data, room));
        }
        chain.push(Buffer::writable(status, 1));
        let status = Some(status);
        self.give(
            queue,
            &chain,
            Chain {
                data,
                len: room,
                status,
            },
        );
    }

    /// Hands out `bytes` to read.
    pub fn send(&mut self, queue: u16, bytes: &[u8]) {
        let data = self.dma.place(bytes).unwrap();
        let chain = [Buffer::readable(data, bytes.len() as u32)];
        let none = Chain {
            data,
            len: 0,
            status: None,
        };
        self.give(queue, &chain, none);
    }

    /// Hands out `len` bytes to write.
    pub fn receive(&mut self, queue: u16, len: u32) {
        let data = self.dma.allocate(len as usize, 16).unwrap();
        let chain = [Buffer::writable(data, len)];
        let status = None;
        self.give(queue, &chain, Chain { data, len, status });
    }

    fn give(&mut self, queue: u16, buffers: &[Buffer], chain: Chain) {
        let ring = &mut self.queues[usize::from(queue)];
        let head = ring.add(buffers).unwrap();
        self.out.insert((queue, head), chain);
        if ring.publish() {
            self.transport.notify(queue);
        }
    }

    /// Chains that are out.
    pub fn waiting(&self, queue: u16) -> usize {
        self.queues[usize::from(queue)].in_flight()
    }

    /// The next chain that comes back from `queue`.
    pub fn next(&mut self, queue: u16) -> Option<Done> {
        self.next_within(queue, PATIENCE)
    }

    pub fn next_within(&mut self, queue: u16, patience: Duration) -> Option<Done> {
        let ring = &mut self.queues[usize::from(queue)];
        let mut used = None;
        self.transport.function().wait_until(patience, || {
            // A chain that comes back a second time is an error.
            used = ring.take().unwrap();
            used.is_some()
        });
        let used = used?;
        let chain = self.out.remove(&(queue, used.head)).unwrap();
        let written = used.len.saturating_sub(u32::from(chain.status.is_some()));
        Some(Done {
            status: chain.status.map(|at| self.dma.get(at)),
            data: self.dma.bytes(chain.data, written.min(chain.len) as usize),
        })
    }

    /// A command on the control virtqueue of a network device, and its answer.
    pub fn ask(&mut self, command: &[u8]) -> Option<u8> {
        const CONTROL: u16 = 2;
        let from = self.dma.place(command).unwrap();
        let data = self.dma.place(&[0xff]).unwrap();
        let chain = [
            Buffer::readable(from, command.len() as u32),
            Buffer::writable(data, 1),
        ];
        let status = None;
        let len = 1;
        self.give(CONTROL, &chain, Chain { data, len, status });
        self.next(CONTROL)?.data.first().copied()
    }

    /// A block request, from beginning to end.
    pub fn transact(&mut self, kind: u32, sector: u64, out: &[u8], room: u32) -> Vec<u8> {
        self.request(0, kind, sector, out, room);
        let done = self.next(0).expect("the request comes back");
        assert_eq!(done.status, Some(0));
        done.data
    }
}

/// The guest's driver of an owner.
pub struct Guest {
    pub device: Device,
    queue: AdminQueue<HostDma>,
}

impl Guest {
    /// Starts the owner, with `queues` queues of its own and its administration queue.
    pub fn start(seat: Seat, dma: &HostDma, queues: usize) -> Self {
        let wanted = feature::ADMIN_VQ | feature::SR_IOV | feature::EVENT_IDX;
        let mut device = Device::prepare(seat, dma, wanted);
        for _ in 0..queues {
            device.add_queue(16, NO_VECTOR);
        }
        let queue = AdminQueue::new(&device.transport, dma.clone()).unwrap();
        device.transport.start();
        Self { device, queue }
    }
}

impl Commands for Guest {
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError> {
        let transport = &self.device.transport;
        self.queue.send(transport, request, room, Shape::Direct)
    }
}

/// The monitor's driver of an owner.
pub struct Monitor<'a>(pub &'a Group);

impl Commands for Monitor<'_> {
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError> {
        let reply = self.0.execute_within(request, room.saturating_sub(8));
        Ok(Answer {
            bytes: reply.encode(),
        })
    }
}
