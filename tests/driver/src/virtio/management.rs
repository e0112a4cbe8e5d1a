//! A small driver of the transport virtqueue, and of managed devices through it (proposal 004).

use std::time::Duration;

use super::admin::{AdminError, AdminQueue, Posted, Shape};
use super::{Layout, Transport, common, status};
use crate::access::{Dma, Function, FunctionExt};
use crate::pci::header;

/// How fields are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// At multiples of their size, padded to eight bytes.
    Aligned,
    /// One after the other.
    Packed,
}

/// Commands, as class and number.
pub mod command {
    /// Counts what is left.
    pub const AVAIL_RES_GET: (u16, u16) = (1, 0);
    /// Makes a device.
    pub const CREATE: (u16, u16) = (2, 0);
    /// Ends one.
    pub const DESTROY: (u16, u16) = (2, 1);
    /// Features that are offered.
    pub const DEVICE_FEATURES: (u16, u16) = (3, 0);
    /// Accepts features.
    pub const ACCEPT_FEATURES: (u16, u16) = (3, 1);
    /// Features that were accepted.
    pub const DRIVER_FEATURES: (u16, u16) = (3, 2);
    /// Writes the device status.
    pub const SET_STATUS: (u16, u16) = (4, 0);
    /// Reads it.
    pub const GET_STATUS: (u16, u16) = (4, 1);
    /// Generation of the configuration.
    pub const GENERATION: (u16, u16) = (5, 0);
    /// Reads the configuration.
    pub const GET_CONFIG: (u16, u16) = (6, 0);
    /// Writes it.
    pub const SET_CONFIG: (u16, u16) = (6, 1);
    /// The message of a queue.
    pub const SET_QUEUE_MSI: (u16, u16) = (7, 0);
    /// Enables it.
    pub const ENABLE_QUEUE_MSI: (u16, u16) = (7, 1);
    /// Masks it: 0 masks, 1 unmasks.
    pub const MASK_QUEUE_MSI: (u16, u16) = (7, 2);
    /// The message of the configuration.
    pub const SET_CONFIG_MSI: (u16, u16) = (7, 3);
    /// Enables it.
    pub const ENABLE_CONFIG_MSI: (u16, u16) = (7, 4);
    /// Masks it.
    pub const MASK_CONFIG_MSI: (u16, u16) = (7, 5);
    /// Reads the message of a queue.
    pub const GET_QUEUE_MSI: (u16, u16) = (7, 6);
    /// Reads the message of the configuration.
    pub const GET_CONFIG_MSI: (u16, u16) = (7, 7);
    /// Where the ring is.
    pub const SET_ADDRESS: (u16, u16) = (8, 0);
    /// Reads that.
    pub const GET_ADDRESS: (u16, u16) = (8, 1);
    /// Enables or disables a queue.
    pub const SET_ENABLE: (u16, u16) = (9, 0);
    /// Whether it is enabled.
    pub const GET_ENABLE: (u16, u16) = (9, 1);
    /// Chooses the size of a queue.
    pub const SET_SIZE: (u16, u16) = (10, 0);
    /// Reads it.
    pub const GET_SIZE: (u16, u16) = (10, 1);
    /// Where kicks are written.
    pub const GET_NOTIFY: (u16, u16) = (11, 1);
    /// Where a queue begins.
    pub const SET_STATE: (u16, u16) = (12, 0);
    /// Where it is.
    pub const GET_STATE: (u16, u16) = (12, 1);
    /// The address space of a queue.
    pub const SET_ASID: (u16, u16) = (13, 1);
    /// Reads it.
    pub const GET_ASID: (u16, u16) = (13, 2);
    /// Resets a queue.
    pub const RESET: (u16, u16) = (14, 1);
}

/// Errors, by their codes in the aligned layout.
pub mod code {
    /// No such command.
    pub const COMMAND: u8 = 1;
    /// No such device, or not for it.
    pub const DEVICE: u8 = 2;
    /// No such queue.
    pub const QUEUE: u8 = 3;
    /// Too little data.
    pub const LENGTH: u8 = 4;
    /// A value that cannot be.
    pub const VALUE: u8 = 5;
    /// Not in this state.
    pub const STATE: u8 = 6;
    /// Nothing left.
    pub const RESOURCE: u8 = 7;
    /// No room for the answer.
    pub const ROOM: u8 = 8;
}

/// Room for an answer that nobody knows the length of.
const ROOM: usize = 256;
/// How long a device may take to accept features.
const PATIENCE: Duration = Duration::from_secs(30);

/// Command-out-data, field by field.
#[derive(Clone, Debug)]
pub struct Out {
    wire: Wire,
    bytes: Vec<u8>,
}

impl Out {
    /// Nothing yet.
    pub fn new(wire: Wire) -> Self {
        Self {
            wire,
            bytes: Vec::new(),
        }
    }

    fn put<const N: usize>(mut self, field: [u8; N]) -> Self {
        while self.wire == Wire::Aligned && !self.bytes.len().is_multiple_of(N) {
            self.bytes.push(0);
        }
        self.bytes.extend(field);
        self
    }

    /// A byte.
    #[must_use]
    pub fn byte(self, value: u8) -> Self {
        self.put([value])
    }

    /// Two bytes.
    #[must_use]
    pub fn half(self, value: u16) -> Self {
        self.put(value.to_le_bytes())
    }

    /// Four bytes.
    #[must_use]
    pub fn word(self, value: u32) -> Self {
        self.put(value.to_le_bytes())
    }

    /// Eight bytes.
    #[must_use]
    pub fn long(self, value: u64) -> Self {
        self.put(value.to_le_bytes())
    }

    /// Bytes as they are.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    /// All of it, padded if its layout is.
    pub fn bytes(mut self) -> Vec<u8> {
        while self.wire == Wire::Aligned && !self.bytes.len().is_multiple_of(8) {
            self.bytes.push(0);
        }
        self.bytes
    }
}

/// Why a managed device could not be driven.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManagementError {
    /// The queue, or its buffers.
    #[error(transparent)]
    Queue(#[from] AdminError),
    /// The management device refused a command.
    #[error("command {command:?} for device {device} failed with code {code}")]
    Failed {
        /// The device.
        device: u64,
        /// Class and number.
        command: (u16, u16),
        /// The error code; 0 in a layout without.
        code: u8,
    },
    /// The answer is none.
    #[error("the answer to command {0:?} is malformed")]
    Malformed((u16, u16)),
    /// The device refused the features.
    #[error("device {0} refused the features it had offered")]
    Features(u64),
}

/// A transport virtqueue, used without interrupts.
pub struct Management<D> {
    queue: AdminQueue<D>,
    wire: Wire,
}

/// A number in little-endian order, however long.
pub fn number(bytes: &[u8]) -> u64 {
    let bytes = bytes.iter().rev();
    bytes.fold(0, |number, byte| number << 8 | u64::from(*byte))
}

impl<D: Dma + Clone> Management<D> {
    /// Sets up the transport virtqueue, which is behind those of the device, of a device that is at FEATURES_OK.
    pub fn new<F: Function>(
        transport: &Transport<F>,
        dma: D,
        wire: Wire,
    ) -> Result<Self, AdminError> {
        let index = transport.get(common::NUM_QUEUES);
        let queue = AdminQueue::at(transport, dma, index)?;
        Ok(Self { queue, wire })
    }

    /// Its layout.
    pub fn wire(&self) -> Wire {
        self.wire
    }

    /// Command-out-data to be written.
    pub fn out(&self) -> Out {
        Out::new(self.wire)
    }

    /// The device-readable part of a command.
    pub fn request(&self, device: u64, command: (u16, u16), data: &[u8]) -> Vec<u8> {
        let head = self.out().long(device).half(command.0).half(command.1);
        head.bytes()
            .into_iter()
            .chain(data.iter().copied())
            .collect()
    }

    /// What a device wrote: command-in-data, or an error code.
    pub fn parse(
        &self,
        command: (u16, u16),
        bytes: &[u8],
    ) -> Result<Result<Vec<u8>, u8>, ManagementError> {
        let malformed = ManagementError::Malformed(command);
        let (header, code) = match self.wire {
            Wire::Aligned => (8, bytes.get(1).copied()),
            Wire::Packed => (1, Some(0)),
        };
        match bytes.first() {
            Some(0) => {
                let data = bytes.get(header..).ok_or(malformed)?;
                let announced = match self.wire {
                    Wire::Aligned => number(bytes.get(4..8).ok_or(malformed)?),
                    Wire::Packed => data.len() as u64,
                };
                let exact = announced == data.len() as u64;
                exact.then(|| Ok(data.to_vec())).ok_or(malformed)
            }
            Some(1) => Ok(Err(code.ok_or(malformed)?)),
            _ => Err(malformed),
        }
    }

    /// Sends a command with `room` bytes for the whole answer; what came back.
    pub fn send<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        command: (u16, u16),
        data: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, AdminError> {
        let request = self.request(device, command, data);
        self.send_raw(transport, &request, room)
    }

    /// Sends any bytes as a command.
    pub fn send_raw<F: Function>(
        &mut self,
        transport: &Transport<F>,
        request: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, AdminError> {
        let answer = self.queue.send(transport, request, room, Shape::Direct)?;
        Ok(answer.bytes)
    }

    /// Executes a command: command-in-data, or the error code.
    pub fn call<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        command: (u16, u16),
        data: &[u8],
    ) -> Result<Result<Vec<u8>, u8>, ManagementError> {
        let bytes = self.send(transport, device, command, data, ROOM)?;
        self.parse(command, &bytes)
    }

    /// Executes a command that is to succeed.
    pub fn execute<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        command: (u16, u16),
        data: &[u8],
    ) -> Result<Vec<u8>, ManagementError> {
        let answer = self.call(transport, device, command, data)?;
        answer.map_err(|code| ManagementError::Failed {
            device,
            command,
            code,
        })
    }

    /// Sends a command and does not wait.
    pub fn post<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        command: (u16, u16),
        data: &[u8],
    ) -> Result<Posted, AdminError> {
        let request = self.request(device, command, data);
        self.queue.post(transport, &request, ROOM)
    }

    /// What a command that was posted wrote, if it is done. Once only.
    pub fn poll(&mut self, posted: &Posted) -> Result<Option<Vec<u8>>, AdminError> {
        Ok(self.queue.poll(posted)?.map(|answer| answer.bytes))
    }

    /// Makes a device that offers `features`.
    pub fn create<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device_type: u32,
        features: u64,
        config: &[u8],
    ) -> Result<u64, ManagementError> {
        let data = self
            .out()
            .word(device_type)
            .long(features)
            .raw(config)
            .bytes();
        let answer = self.execute(transport, 0, command::CREATE, &data)?;
        Ok(number(&answer))
    }

    /// The device status.
    pub fn status<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
    ) -> Result<u8, ManagementError> {
        let answer = self.execute(transport, device, command::GET_STATUS, &[])?;
        answer
            .first()
            .copied()
            .ok_or(ManagementError::Malformed(command::GET_STATUS))
    }

    /// Writes the device status.
    pub fn set_status<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        value: u8,
    ) -> Result<(), ManagementError> {
        let data = self.out().byte(value).bytes();
        self.execute(transport, device, command::SET_STATUS, &data)
            .map(drop)
    }

    /// Brings a device that was reset to FEATURES_OK, with those of the `wanted` features that it offers.
    pub fn negotiate<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        wanted: u64,
    ) -> Result<u64, ManagementError> {
        let mut now = status::ACKNOWLEDGE | status::DRIVER;
        self.set_status(transport, device, now)?;
        let offered = self.execute(transport, device, command::DEVICE_FEATURES, &[])?;
        let features = number(offered.get(..8).unwrap_or_default()) & wanted;
        let data = self.out().long(features).bytes();
        self.execute(transport, device, command::ACCEPT_FEATURES, &data)?;
        now |= status::FEATURES_OK;
        self.set_status(transport, device, now)?;
        let mut accepted = Ok(0);
        transport.function().wait_until(PATIENCE, || {
            accepted = self.status(transport, device);
            accepted.is_err() || accepted == Ok(now)
        });
        match accepted? & status::FEATURES_OK {
            0 => Err(ManagementError::Features(device)),
            _ => Ok(features),
        }
    }

    /// Says where the ring of a queue is, and enables it.
    pub fn enable_queue<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        queue: u16,
        layout: &Layout,
    ) -> Result<(), ManagementError> {
        let size = self.out().half(queue).half(layout.size).bytes();
        self.execute(transport, device, command::SET_SIZE, &size)?;
        let address = self.out().half(queue).long(layout.descriptors);
        let address = address.long(layout.used).long(layout.available).bytes();
        self.execute(transport, device, command::SET_ADDRESS, &address)?;
        self.switch_queue(transport, device, queue, true)
    }

    /// Enables or disables a queue.
    pub fn switch_queue<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        queue: u16,
        on: bool,
    ) -> Result<(), ManagementError> {
        let data = self.out().half(queue).byte(on.into()).bytes();
        self.execute(transport, device, command::SET_ENABLE, &data)
            .map(drop)
    }

    /// Has a queue interrupt with this message.
    pub fn enable_interrupt<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        queue: u16,
        address: u64,
        data: u32,
    ) -> Result<(), ManagementError> {
        let message = self.out().half(queue).long(address).word(data).bytes();
        self.execute(transport, device, command::SET_QUEUE_MSI, &message)?;
        let on = self.out().half(queue).byte(1).bytes();
        self.execute(transport, device, command::ENABLE_QUEUE_MSI, &on)
            .map(drop)
    }

    /// The device goes live.
    pub fn start<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
    ) -> Result<(), ManagementError> {
        let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.set_status(transport, device, ready)
    }

    /// Where the doorbell of a queue is: an offset in BAR 0 of the management device.
    pub fn doorbell<F: Function>(
        &mut self,
        transport: &Transport<F>,
        device: u64,
        queue: u16,
    ) -> Result<u64, ManagementError> {
        let data = self.out().half(queue).bytes();
        let answer = self.execute(transport, device, command::GET_NOTIFY, &data)?;
        let address = number(answer.get(..8).unwrap_or_default());
        let low: u32 = transport.function().config(header::BAR0);
        let high: u32 = transport.function().config(header::BAR0 + 4);
        let base = u64::from(high) << 32 | u64::from(low & !0xf);
        address
            .checked_sub(base)
            .ok_or(ManagementError::Malformed(command::GET_NOTIFY))
    }
}
