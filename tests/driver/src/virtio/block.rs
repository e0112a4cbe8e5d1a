//! A small block driver (virtio 1.4, "Block Device").

use std::time::Duration;

use super::{Buffer, QueueError, SplitQueue, Transport, TransportError, feature};
use crate::access::{Dma, DmaExt, Function, FunctionExt, Register, Scratch};

/// Feature bits.
pub mod block_feature {
    /// The configuration has the largest segment.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// The configuration has the largest number of segments.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The device cannot be written.
    pub const RO: u64 = 1 << 5;
    /// The configuration has the block size.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// There is a flush request.
    pub const FLUSH: u64 = 1 << 9;
    /// There are several queues.
    pub const MQ: u64 = 1 << 12;
    /// There is a discard request.
    pub const DISCARD: u64 = 1 << 13;
    /// There is a write zeroes request.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types.
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Read the serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Bytes in a sector, whatever the block size.
pub const SECTOR: u64 = 512;
/// Bytes of a serial number.
pub const ID_LEN: u32 = 20;

/// Status byte values.
pub mod request_status {
    /// Done.
    pub const OK: u8 = 0;
    /// The device or its medium failed.
    pub const IOERR: u8 = 1;
    /// The device does not know the request.
    pub const UNSUPPORTED: u8 = 2;
}

/// Capacity in sectors.
pub const CAPACITY: [Register<u32>; 2] = [Register::at(0), Register::at(4)];

/// How long a request may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// The transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// No memory for buffers.
    #[error("no memory for buffers")]
    NoMemory,
    /// The device did not answer in time.
    #[error("request did not finish in time")]
    Timeout,
    /// The device answered with this status byte.
    #[error("request failed with status {0}")]
    Status(u8),
}

/// A block device with one request in flight at a time, on queue 0.
#[derive(Debug)]
pub struct Block<F, D> {
    transport: Transport<F>,
    dma: D,
    queue: SplitQueue<D>,
    features: u64,
    /// Header and status byte, data to the device, data from it.
    scratch: [Scratch; 3],
}

impl<F: Function, D: Dma + Clone> Block<F, D> {
    /// Resets and starts the device, with those of `wanted` that it offers.
    pub fn start(transport: Transport<F>, dma: D, wanted: u64) -> Result<Self, BlockError> {
        let features = transport.negotiate(wanted)?;
        let size = transport.queue_size(0).min(64);
        let queue = SplitQueue::new(dma.clone(), size, features & feature::EVENT_IDX != 0)
            .ok_or(BlockError::NoMemory)?;
        transport.enable_queue(0, queue.layout(), super::NO_VECTOR)?;
        transport.start();
        Ok(Self {
            transport,
            dma,
            queue,
            features,
            scratch: Default::default(),
        })
    }

    /// The features agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The transport underneath.
    pub fn transport(&self) -> &Transport<F> {
        &self.transport
    }

    /// Capacity in sectors.
    pub fn capacity(&self) -> u64 {
        self.transport.device_read(|t| {
            let [low, high] = CAPACITY.map(|half| u64::from(t.device_get(half)));
            high << 32 | low
        })
    }

    /// Sends a request: `out` is what the device reads after the header, the result what it wrote before the status
    /// byte, `room` bytes at most.
    pub fn request(
        &mut self,
        kind: u32,
        sector: u64,
        out: &[u8],
        room: u32,
    ) -> Result<Vec<u8>, BlockError> {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        let [ends, to, from] = &mut self.scratch;
        let ends = ends.reserve(&self.dma, 17).ok_or(BlockError::NoMemory)?;
        let status = ends + 16;
        self.dma.write(ends, &header);
        self.dma.write(status, &[0xff]);
        let mut chain = vec![Buffer::readable(ends, 16)];
        if !out.is_empty() {
            let to = to
                .reserve(&self.dma, out.len())
                .ok_or(BlockError::NoMemory)?;
            self.dma.write(to, out);
            chain.push(Buffer::readable(to, out.len() as u32));
        }
        let data = from
            .reserve(&self.dma, room as usize)
            .ok_or(BlockError::NoMemory)?;
        if room != 0 {
            self.dma.write(data, &vec![0; room as usize]);
            chain.push(Buffer::writable(data, room));
        }
        chain.push(Buffer::writable(status, 1));
        if self.features & feature::INDIRECT_DESC != 0 {
            self.queue.add_indirect(&chain)?;
        } else {
            self.queue.add(&chain)?;
        }
        if self.queue.publish() {
            self.transport.notify(0);
        }
        let mut outcome = Ok(None);
        let queue = &mut self.queue;
        self.transport.function().wait_until(PATIENCE, || {
            outcome = queue.take();
            outcome != Ok(None)
        });
        let used = outcome?.ok_or(BlockError::Timeout)?;
        match self.dma.get::<u8>(status) {
            request_status::OK => {
                let len = (used.len.saturating_sub(1)).min(room);
                Ok(self.dma.bytes(data, len as usize))
            }
            code => Err(BlockError::Status(code)),
        }
    }

    /// Reads `sectors` sectors.
    pub fn read(&mut self, sector: u64, sectors: u32) -> Result<Vec<u8>, BlockError> {
        self.request(request::IN, sector, &[], sectors * SECTOR as u32)
    }

    /// Writes `data`, a multiple of [`SECTOR`] bytes.
    pub fn write(&mut self, sector: u64, data: &[u8]) -> Result<(), BlockError> {
        self.request(request::OUT, sector, data, 0).map(drop)
    }

    /// Makes what was written durable.
    pub fn flush(&mut self) -> Result<(), BlockError> {
        self.request(request::FLUSH, 0, &[], 0).map(drop)
    }

    /// The serial number, up to its first zero byte.
    pub fn id(&mut self) -> Result<Vec<u8>, BlockError> {
        let mut id = self.request(request::GET_ID, 0, &[], ID_LEN)?;
        id.truncate(id.iter().position(|b| *b == 0).unwrap_or(id.len()));
        Ok(id)
    }

    /// Discards or zeroes `sectors` sectors: `kind` is [`request::DISCARD`] or [`request::WRITE_ZEROES`].
    pub fn range(
        &mut self,
        kind: u32,
        sector: u64,
        sectors: u32,
        flags: u32,
    ) -> Result<(), BlockError> {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.request(kind, 0, &segment, 0).map(drop)
    }
}
