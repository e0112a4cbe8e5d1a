//! A small network driver (virtio 1.4, "Network Device"): one receive and one transmit queue, no offloads.

use std::collections::HashMap;
use std::time::Duration;

use super::{Buffer, QueueError, SplitQueue, Transport, TransportError, feature};
use crate::access::{Dma, DmaExt, Function, FunctionExt, Register, Scratch};

/// Feature bits.
pub mod net_feature {
    /// The configuration has the largest frame.
    pub const MTU: u64 = 1 << 3;
    /// The configuration has the MAC address.
    pub const MAC: u64 = 1 << 5;
    /// Receive buffers can be joined.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// The configuration has the link status.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control virtqueue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// The driver can be asked to announce itself.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
}

/// Receive queue.
pub const RECEIVE: u16 = 0;
/// Transmit queue.
pub const TRANSMIT: u16 = 1;
/// Bytes of the header before every frame.
pub const HEADER: usize = 12;
/// Bytes of a receive buffer: the header, and the longest frame without offloads.
pub const RECEIVE_BUFFER: u32 = 12 + 1514;

/// How long a frame may wait for the device to take it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why an operation failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetError {
    /// The transport.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// No memory for buffers.
    #[error("no memory for buffers")]
    NoMemory,
    /// The device did not take a frame in time.
    #[error("frame was not sent in time")]
    Timeout,
    /// The device received less than a header.
    #[error("frame of {0} bytes has no header")]
    Short(u32),
}

/// A network device.
#[derive(Debug)]
pub struct Net<F, D> {
    transport: Transport<F>,
    dma: D,
    receive: SplitQueue<D>,
    transmit: SplitQueue<D>,
    /// Address of the buffer of each receive chain.
    buffers: HashMap<u16, u64>,
    features: u64,
    outgoing: Scratch,
}

impl<F: Function, D: Dma + Clone> Net<F, D> {
    /// Resets and starts the device, with those of `wanted` that it offers, and fills the receive queue.
    pub fn start(transport: Transport<F>, dma: D, wanted: u64) -> Result<Self, NetError> {
        let features = transport.negotiate(wanted & !net_feature::MRG_RXBUF)?;
        let queue = |index| {
            let size = transport.queue_size(index).min(64);
            let event_index = features & feature::EVENT_IDX != 0;
            let queue =
                SplitQueue::new(dma.clone(), size, event_index).ok_or(NetError::NoMemory)?;
            transport.enable_queue(index, queue.layout(), super::NO_VECTOR)?;
            Ok::<_, NetError>(queue)
        };
        let (receive, transmit) = (queue(RECEIVE)?, queue(TRANSMIT)?);
        transport.start();
        let mut net = Self {
            transport,
            dma,
            receive,
            transmit,
            buffers: HashMap::new(),
            features,
            outgoing: Scratch::default(),
        };
        for _ in 0..net.receive.layout().size {
            let buffer = net
                .dma
                .allocate(RECEIVE_BUFFER as usize, 16)
                .ok_or(NetError::NoMemory)?;
            net.offer(buffer)?;
        }
        if net.receive.publish() {
            net.transport.notify(RECEIVE);
        }
        Ok(net)
    }

    /// The features agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The transport underneath.
    pub fn transport(&self) -> &Transport<F> {
        &self.transport
    }

    /// The MAC address in the configuration.
    pub fn mac(&self) -> [u8; 6] {
        self.transport
            .device_read(|t| std::array::from_fn(|i| t.device_get(Register::<u8>::at(i as u64))))
    }

    /// The status in the configuration: bit 0, the link is up; bit 1, the driver is asked to announce itself.
    pub fn status(&self) -> u16 {
        self.transport.device_get(Register::at(6))
    }

    /// Sends one Ethernet frame and waits until the device took it.
    pub fn send(&mut self, frame: &[u8]) -> Result<(), NetError> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        let address = self
            .outgoing
            .reserve(&self.dma, bytes.len())
            .ok_or(NetError::NoMemory)?;
        self.dma.write(address, &bytes);
        self.transmit
            .add(&[Buffer::readable(address, bytes.len() as u32)])?;
        if self.transmit.publish() {
            self.transport.notify(TRANSMIT);
        }
        let mut outcome = Ok(None);
        let queue = &mut self.transmit;
        self.transport.function().wait_until(PATIENCE, || {
            outcome = queue.take();
            outcome != Ok(None)
        });
        outcome?.map(drop).ok_or(NetError::Timeout)
    }

    /// The next received frame, if one comes within `patience`.
    pub fn receive(&mut self, patience: Duration) -> Result<Option<Vec<u8>>, NetError> {
        let mut outcome = Ok(None);
        let queue = &mut self.receive;
        self.transport.function().wait_until(patience, || {
            outcome = queue.take();
            outcome != Ok(None)
        });
        let Some(used) = outcome? else {
            return Ok(None);
        };
        let buffer = self
            .buffers
            .remove(&used.head)
            .ok_or(QueueError::NotInFlight(used.head.into()))?;
        let mut frame = self.dma.bytes(buffer, used.len as usize);
        self.offer(buffer)?;
        if self.receive.publish() {
            self.transport.notify(RECEIVE);
        }
        if frame.len() < HEADER {
            return Err(NetError::Short(used.len));
        }
        Ok(Some(frame.split_off(HEADER)))
    }

    fn offer(&mut self, buffer: u64) -> Result<(), NetError> {
        let head = self
            .receive
            .add(&[Buffer::writable(buffer, RECEIVE_BUFFER)])?;
        self.buffers.insert(head, buffer);
        Ok(())
    }
}
