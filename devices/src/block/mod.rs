//! virtio-block (virtio 1.4, "Block Device").
//!
//! ```text
//! ring ──► parse (I/O thread) ──► Worker (a thread of a pool) ──► Backend
//!   ▲                                   │ event
//!   └────────── status byte, used ◄─────┘
//! ```
//!
//! Requests that need no storage (GET_ID, and all that make no sense) are answered at once. All others go through
//! a thread, each disk's in order. A disk has one of its own, or shares those of a [`Pool`] with others. A read or write goes straight between the backend and guest memory.

mod backend;
mod file;
mod parameters;
mod request;
mod worker;

#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use backend::Backend;
pub use file::RawFile;
pub use parameters::Parameters;
use request::{ID_LEN, Limits, Request, SECTOR, Status};
pub use worker::Pool;
use worker::{Done, Job, Worker};

use crate::parameters::BadParameter;
use crate::state::{DeviceState, Unsavable};
use crate::virtio::{Chain, DeviceType, Io, Progress, RingError, Source, VirtioDevice};

/// The most queues a disk can have.
pub const MAX_QUEUES: u16 = 64;
/// Guest buffers held in flight. An indirect table may have 65535 of them, so counting chains bounds too little.
const BUFFERS_IN_FLIGHT: usize = 64 * 1024;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Device configuration, up to the fields of the features that are offered.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Config {
    /// In 512-byte sectors.
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    /// In bytes.
    blk_size: U32,
    /// log2 of the blocks in a physical block.
    physical_block_exp: u8,
    alignment_offset: u8,
    /// In blocks.
    min_io_size: U16,
    /// In blocks; 0: none.
    opt_io_size: U32,
    /// Belongs to CONFIG_WCE, which is not offered.
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    /// In 512-byte sectors.
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

/// What a disk is made of.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// An image file or a block device.
    pub path: PathBuf,
    /// The guest may not change it.
    pub read_only: bool,
    /// Answer to GET_ID; only the first 20 bytes are shown.
    pub serial: String,
    /// Number of virtqueues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
}

impl BlockConfig {
    /// A writable disk with one queue and no serial.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            serial: String::new(),
            queues: 1,
        }
    }
}

/// Why a disk could not be opened. Each names the disk and what to do.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// No such file.
    #[error("disk {0} does not exist; create one with `truncate -s 1G {0}`")]
    Missing(PathBuf),
    /// A directory.
    #[error("disk {0} is a directory; give an image file or a block device")]
    Directory(PathBuf),
    /// A pipe, a socket, a character device.
    #[error("disk {0} is neither a file nor a block device; give one of these")]
    Kind(PathBuf),
    /// No permission to read.
    #[error("disk {0} may not be read; change its permissions or run as its owner")]
    NotReadable(PathBuf),
    /// No permission to write, or a read-only file system.
    #[error("disk {0} is not writable; change its permissions, or add `readonly`")]
    NotWritable(PathBuf),
    /// A length that is no whole number of sectors.
    #[error(
        "disk {path} has {len} bytes, not a multiple of 512; round it up with `truncate -s %512 {path}`"
    )]
    Length {
        /// The disk.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// Not a single sector.
    #[error("disk {0} is empty; give it a size with `truncate -s 1G {0}`")]
    Empty(PathBuf),
    /// Another process has it, and one of the two wants to write.
    #[error(
        "disk {0} is in use by another VM; stop that one, give this one a copy, or open it `readonly` in both"
    )]
    InUse(PathBuf),
    /// A descriptor of another process that is not open as it has to be.
    #[error("disk {path}, as another process gave it, {what}")]
    Received {
        /// The disk.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The number of queues is out of range.
    #[error("a disk has 1 to {MAX_QUEUES} queues, not {0}")]
    Queues(u16),
    /// Anything else.
    #[error("cannot open disk {path}")]
    Other {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A disk.
pub struct Block {
    config: Config,
    features: u64,
    limits: Limits,
    id: [u8; ID_LEN],
    queues: u16,
    queue_size: u16,
    backend: Arc<dyn Backend>,
    completed: Arc<EventFd>,
    /// Where its thread comes from, with the first request: a disk no driver uses costs none.
    pool: Pool,
    worker: Option<Worker>,
    /// FLUSH was not negotiated: writes are durable when they complete.
    write_through: bool,
    /// Guest buffers of the chains in flight.
    held: usize,
    /// Queues whose chains wait for others to complete, as a bit mask.
    stalled: u64,
    /// Kept for its capacity.
    batch: Vec<Job>,
}

impl Block {
    /// Opens and locks the image file or block device of `config`.
    pub fn open(config: &BlockConfig) -> Result<Self, BlockError> {
        let file = RawFile::open(&config.path, config.read_only)?;
        Self::with_backend(Arc::new(file), config)
    }

    /// A disk on any storage; `config.path` only appears in messages.
    pub fn with_backend(
        backend: Arc<dyn Backend>,
        config: &BlockConfig,
    ) -> Result<Self, BlockError> {
        if !(1..=MAX_QUEUES).contains(&config.queues) {
            return Err(BlockError::Queues(config.queues));
        }
        let completed = worker::completion_event().map_err(|source| BlockError::Other {
            path: config.path.clone(),
            source,
        })?;
        let parameters = Parameters::default();
        let limits = Limits::new(backend.len(), config.read_only, &parameters);
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        Ok(Self {
            config: layout(limits, config.queues, &parameters),
            features: offered(config),
            limits,
            id,
            queues: config.queues,
            queue_size: parameters.queue_size,
            backend,
            completed,
            pool: Pool::new(1),
            worker: None,
            write_through: false,
            held: 0,
            stalled: 0,
            batch: Vec::new(),
        })
    }

    /// The same disk with other parameters. To be called before it is put behind a function.
    pub fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, BadParameter> {
        parameters.check()?;
        self.limits = Limits::new(self.limits.capacity, self.limits.read_only, parameters);
        self.config = layout(self.limits, self.queues, parameters);
        self.queue_size = parameters.queue_size;
        Ok(self)
    }

    /// The same disk, served by the threads of `pool` instead of one of its own.
    #[must_use]
    pub fn sharing(mut self, pool: &Pool) -> Self {
        self.pool = pool.clone();
        self
    }

    /// Fetches requests of `queue` into the batch, and answers those that need no storage.
    fn fetch(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        loop {
            if self.held >= BUFFERS_IN_FLIGHT {
                self.stalled |= 1 << queue;
                return Ok(Progress::Waiting);
            }
            let Some(chain) = io.pop(queue)? else {
                return Ok(Progress::Exhausted);
            };
            self.take(queue, chain, io)?;
        }
    }

    fn take(&mut self, queue: u16, chain: Chain, io: &mut Io<'_>) -> Result<(), RingError> {
        let status = match request::parse(io.memory(), &chain, self.limits) {
            Ok(Ok(Request::GetId)) => match chain.write(io.memory(), 0, &self.id) {
                Ok(_) => Status::Ok,
                Err(_) => Status::IoErr,
            },
            Ok(Ok(request)) => {
                self.held += chain.buffer_count();
                self.batch.push(Job {
                    queue,
                    chain,
                    request,
                    write_through: self.write_through,
                });
                return Ok(());
            }
            Ok(Err(status)) => status,
            Err(error) => {
                // Nowhere to put an answer, but the chain must go back or the device could not be reset.
                io.push(queue, chain.ticket(), 0)?;
                return Err(error);
            }
        };
        answer(queue, &chain, status, io)
    }

    /// Hands the batch to the worker. Fails it if there is no thread.
    fn submit(&mut self, io: &mut Io<'_>) -> Result<(), RingError> {
        if self.batch.is_empty() {
            return Ok(());
        }
        let worker = self.worker.get_or_insert_with(|| {
            let backend = Arc::clone(&self.backend);
            let completed = Arc::clone(&self.completed);
            Worker::new(backend, io.memory().clone(), completed, self.pool.clone())
        });
        let Err(error) = worker.submit(&mut self.batch) else {
            return Ok(());
        };
        tracing::error!(%error, "cannot start the thread of a disk; its requests fail");
        let failed = std::mem::take(&mut self.batch).into_iter().map(|job| Done {
            queue: job.queue,
            chain: job.chain,
            status: Status::IoErr,
        });
        self.finish(failed, io)
    }

    /// Returns every chain of `done`, also if one of them cannot be.
    fn finish(
        &mut self,
        done: impl IntoIterator<Item = Done>,
        io: &mut Io<'_>,
    ) -> Result<(), RingError> {
        let mut outcome = Ok(());
        for done in done {
            self.held = self.held.saturating_sub(done.chain.buffer_count());
            outcome = outcome.and(answer(done.queue, &done.chain, done.status, io));
        }
        outcome
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; usize::from(self.queues)]
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.write_through = features & F_FLUSH == 0;
    }

    fn reset(&mut self) {
        self.write_through = false;
        self.held = 0;
        self.stalled = 0;
    }

    fn call_off(&mut self, io: &mut Io<'_>) {
        let Some(worker) = &self.worker else {
            return;
        };
        let waiting = worker.call_off();
        if let Err(error) = self.finish(waiting, io) {
            // During a reset no ring is written to, so there is nothing that could fail.
            tracing::debug!(%error, "a request that was called off");
        }
    }

    fn recall(&mut self, io: &mut Io<'_>) {
        let Some(worker) = &self.worker else {
            return;
        };
        for job in worker.recall().into_iter().rev() {
            self.held = self.held.saturating_sub(job.chain.buffer_count());
            io.recall(job.queue, job.chain);
        }
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        // What was fetched before an error is submitted all the same: it is in flight.
        let progress = self.fetch(queue, io);
        self.submit(io)?;
        progress
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.completed.as_raw_fd(),
            token: 0,
        }]
    }

    fn on_event(&mut self, _token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        let Some(worker) = &self.worker else {
            return Ok(());
        };
        let done = worker.completions();
        self.finish(done, io)?;
        let stalled = std::mem::take(&mut self.stalled);
        for queue in (0..self.queues).filter(|queue| stalled & 1 << queue != 0) {
            self.process(queue, io)?;
        }
        Ok(())
    }
}

/// Writes the status byte, unless nobody waits for it any more, and returns the chain, whatever happens.
fn answer(queue: u16, chain: &Chain, status: Status, io: &mut Io<'_>) -> Result<(), RingError> {
    if io.is_resetting() {
        return io.push(queue, chain.ticket(), 0);
    }
    let len = chain.writable_len();
    let written = chain.write(io.memory(), len.saturating_sub(1), &[status as u8]);
    // The status is the last byte, so a driver that believes the length must find all of them covered.
    io.push(queue, chain.ticket(), len as u32)?;
    written?;
    Ok(())
}

fn offered(config: &BlockConfig) -> u64 {
    let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
    if config.read_only {
        features |= F_RO;
    } else {
        features |= F_DISCARD | F_WRITE_ZEROES;
    }
    if config.queues > 1 {
        features |= F_MQ;
    }
    features
}

fn layout(limits: Limits, queues: u16, parameters: &Parameters) -> Config {
    let mut config = Config {
        capacity: U64::new(limits.capacity / SECTOR),
        seg_max: U32::new(parameters.seg_max),
        blk_size: U32::new(SECTOR as u32),
        physical_block_exp: parameters.physical_block_exp,
        min_io_size: U16::new(parameters.min_io_size),
        num_queues: U16::new(queues),
        ..Config::default()
    };
    if !limits.read_only {
        config.max_discard_sectors = U32::new(parameters.max_discard_sectors);
        config.max_discard_seg = U32::new(parameters.max_discard_seg);
        config.discard_sector_alignment = U32::new(parameters.discard_sector_alignment);
        config.max_write_zeroes_sectors = U32::new(parameters.max_write_zeroes_sectors);
        config.max_write_zeroes_seg = U32::new(parameters.max_write_zeroes_seg);
        config.write_zeroes_may_unmap = parameters.write_zeroes_may_unmap.into();
    }
    config
}
