//! A small driver of the first administration virtqueue (virtio 1.4, "Administration Virtqueues").

use std::time::Duration;

use super::{Buffer, NO_VECTOR, QueueError, SplitQueue, Transport, TransportError, common};
use crate::access::{Dma, DmaExt, Function, FunctionExt, Scratch};

/// Group types.
pub mod group {
    /// The device itself.
    pub const SELF: u16 = 0;
    /// Its virtual functions.
    pub const SR_IOV: u16 = 1;
}

/// Opcodes every group has.
pub mod opcode {
    /// Which commands are there?
    pub const LIST_QUERY: u16 = 0;
    /// These commands will be used.
    pub const LIST_USE: u16 = 1;
}

/// Outcomes: status and qualifier.
pub mod outcome {
    /// Done.
    pub const OK: (u16, u16) = (0, 0);
    /// EINVAL: not in the present state.
    pub const INVALID_COMMAND: (u16, u16) = (22, 1);
    /// EAGAIN: it may work later.
    pub const TRY_AGAIN: (u16, u16) = (11, 7);
    /// EINVAL: the group does not have this command, or the driver did not say that it would use it.
    pub const INVALID_OPCODE: (u16, u16) = (22, 2);
    /// EINVAL: the command-specific data.
    pub const INVALID_FIELD: (u16, u16) = (22, 3);
    /// EINVAL: there is no such group now.
    pub const INVALID_GROUP: (u16, u16) = (22, 4);
    /// EINVAL: the group has no such member now.
    pub const INVALID_MEMBER: (u16, u16) = (22, 5);
}

/// Entries of the queue, or fewer if the device has fewer.
const ENTRIES: u16 = 64;
/// Bytes before the command-specific result.
const HEADER: usize = 8;
/// How long a command may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// The transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// There is no administration queue, or not where it has to be.
    #[error("administration queues {index} to {index} + {count} are none")]
    NoQueue {
        /// The first.
        index: u16,
        /// How many.
        count: u16,
    },
    /// No memory for buffers.
    #[error("no memory for buffers")]
    NoMemory,
    /// The device did not answer in time.
    #[error("administration command did not finish in time")]
    Timeout,
}

/// What a device answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// All it wrote.
    pub bytes: Vec<u8>,
}

impl Answer {
    /// Status and qualifier, as far as they were written.
    pub fn outcome(&self) -> (u16, u16) {
        let half = |at: usize| {
            let byte = |at| u16::from(self.bytes.get(at).copied().unwrap_or(0));
            byte(at) | byte(at + 1) << 8
        };
        (half(0), half(2))
    }

    /// The command-specific output.
    pub fn output(&self) -> u32 {
        let bytes = self.bytes.iter().skip(4).take(4).rev();
        bytes.fold(0, |word, byte| word << 8 | u32::from(*byte))
    }

    /// The command-specific result.
    pub fn result(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or_default()
    }
}

/// The device-readable part of a command.
pub fn command(opcode: u16, group: u16, member: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24 + data.len());
    bytes.extend_from_slice(&opcode.to_le_bytes());
    bytes.extend_from_slice(&group.to_le_bytes());
    bytes.extend_from_slice(&[0; 12]);
    bytes.extend_from_slice(&member.to_le_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// How a command's buffers are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One buffer for each direction, in the descriptor table.
    Direct,
    /// An indirect table with buffers of this many bytes.
    Indirect(usize),
}

/// A command that was sent and whose answer is not yet taken.
#[derive(Debug, PartialEq, Eq)]
pub struct Posted {
    head: u16,
    /// Where the answer goes.
    to: u64,
}

/// An administration queue, or another that takes commands, used without interrupts.
pub struct AdminQueue<D> {
    queue: SplitQueue<D>,
    dma: D,
    index: u16,
    request: Scratch,
    answer: Scratch,
    /// Heads and used lengths of commands that came back, in order.
    finished: Vec<(u16, u32)>,
}

impl<D: Dma + Clone> AdminQueue<D> {
    /// Sets up the first administration queue of a device that is at FEATURES_OK, with VIRTIO_F_ADMIN_VQ.
    pub fn new<F: Function>(transport: &Transport<F>, dma: D) -> Result<Self, AdminError> {
        let index = transport.get(common::ADMIN_QUEUE_INDEX);
        let count = transport.get(common::ADMIN_QUEUE_NUM);
        if count == 0 || index < transport.get(common::NUM_QUEUES) {
            return Err(AdminError::NoQueue { index, count });
        }
        Self::at(transport, dma, index)
    }

    /// Sets up virtqueue `index`, which takes commands as well.
    pub fn at<F: Function>(
        transport: &Transport<F>,
        dma: D,
        index: u16,
    ) -> Result<Self, AdminError> {
        let size = transport.queue_size(index).min(ENTRIES);
        let queue = SplitQueue::new(dma.clone(), size, false).ok_or(AdminError::NoMemory)?;
        transport.enable_queue(index, queue.layout(), NO_VECTOR)?;
        Ok(Self {
            queue,
            dma,
            index,
            request: Scratch::default(),
            answer: Scratch::default(),
            finished: Vec::new(),
        })
    }

    /// Sends `request` with room for `room` bytes of answer, and waits for it.
    pub fn send<F: Function>(
        &mut self,
        transport: &Transport<F>,
        request: &[u8],
        room: usize,
        shape: Shape,
    ) -> Result<Answer, AdminError> {
        let none = AdminError::NoMemory;
        let from = self.request.reserve(&self.dma, request.len()).ok_or(none)?;
        let to = self.answer.reserve(&self.dma, room).ok_or(none)?;
        let posted = self.submit(transport, request, room, shape, from, to)?;
        let mut answer = Ok(None);
        transport.function().wait_until(PATIENCE, || {
            answer = self.poll(&posted);
            answer != Ok(None)
        });
        answer?.ok_or(AdminError::Timeout)
    }

    /// Sends `request` and does not wait. Its buffers are its own.
    pub fn post<F: Function>(
        &mut self,
        transport: &Transport<F>,
        request: &[u8],
        room: usize,
    ) -> Result<Posted, AdminError> {
        let none = AdminError::NoMemory;
        let from = self.dma.allocate(request.len().max(1), 16).ok_or(none)?;
        let to = self.dma.allocate(room.max(1), 16).ok_or(none)?;
        self.submit(transport, request, room, Shape::Direct, from, to)
    }

    /// The answer to a command, if it came. Once only.
    pub fn poll(&mut self, posted: &Posted) -> Result<Option<Answer>, AdminError> {
        while let Some(used) = self.queue.take()? {
            self.finished.push((used.head, used.len));
        }
        let found = self
            .finished
            .iter()
            .position(|(head, _)| *head == posted.head);
        let answer = found.map(|at| {
            let (_, len) = self.finished.remove(at);
            Answer {
                bytes: self.dma.bytes(posted.to, len as usize),
            }
        });
        Ok(answer)
    }

    fn submit<F: Function>(
        &mut self,
        transport: &Transport<F>,
        request: &[u8],
        room: usize,
        shape: Shape,
        from: u64,
        to: u64,
    ) -> Result<Posted, AdminError> {
        self.dma.write(from, request);
        self.dma.write(to, &vec![0xee; room]);
        let step = match shape {
            Shape::Direct => usize::MAX,
            Shape::Indirect(step) => step.max(1),
        };
        let mut chain = pieces(from, request.len(), step, false);
        chain.extend(pieces(to, room, step, true));
        let head = match shape {
            Shape::Direct => self.queue.add(&chain)?,
            Shape::Indirect(_) => self.queue.add_indirect(&chain)?,
        };
        if self.queue.publish() {
            transport.notify(self.index);
        }
        Ok(Posted { head, to })
    }

    /// Its index.
    pub fn index(&self) -> u16 {
        self.index
    }
}

/// Buffers of at most `step` bytes.
fn pieces(address: u64, len: usize, step: usize, writable: bool) -> Vec<Buffer> {
    (0..len)
        .step_by(step)
        .map(|at| Buffer {
            address: address + at as u64,
            len: step.min(len - at) as u32,
            writable,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_everything_once() {
        let lens = |step| -> Vec<_> {
            let list = pieces(0x1000, 10, step, true);
            list.iter().map(|b| (b.address, b.len)).collect()
        };
        assert_eq!(lens(usize::MAX), [(0x1000, 10)]);
        assert_eq!(lens(4), [(0x1000, 4), (0x1004, 4), (0x1008, 2)]);
        assert!(pieces(0x1000, 0, 4, false).is_empty());
    }

    #[test]
    fn answers_that_are_cut_off_have_zeroes() {
        let answer = |bytes: &[u8]| Answer {
            bytes: bytes.to_vec(),
        };
        assert_eq!(answer(&[22, 0, 2]).outcome(), (22, 2));
        assert!(answer(&[22, 0, 2]).result().is_empty());
        assert_eq!(answer(&[0, 0, 0, 0, 0, 0, 0, 0, 3]).result(), [3]);
    }
}
