//! What a function interrupts its driver for. Where such an interrupt goes, whether it is masked, and what waits behind a mask
//! belong to the transport.

/// The vector of a cause that interrupts nobody (VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// Why a function interrupts its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// Buffers of this virtqueue were used.
    Queue(u16),
    /// The configuration changed, or the device needs a reset.
    Config,
}

/// How a function interrupts its driver. Implemented by the transport.
///
/// Called with the function's lock held: an implementation must not call back into the function, and must not hold,
/// while it calls the function, a lock it takes here.
pub trait Interrupt: Send + Sync {
    /// Sends the message of `cause`, if its driver wants one.
    fn signal(&self, cause: Cause);

    /// Sends the messages that were held back by masks which are gone. Called when the function may send again.
    fn deliver_pending(&self);

    /// The device was reset: no cause interrupts any more, and the messages that masks hold back are dropped, since what they
    /// were about is gone (E1).
    fn reset(&self);

    /// Virtqueue `queue` was reset: it does not interrupt any more.
    fn reset_queue(&self, queue: u16);

    /// How many vectors a saved form can name: those from 0 on. None of a transport that has no numbers for them.
    fn vectors(&self) -> u16;

    /// The vector that a saved form names for `cause`; [`NO_VECTOR`] if it does not interrupt.
    fn vector(&self, cause: Cause) -> u16;

    /// Takes the vectors of a saved form, those of the virtqueues in order. They were found to be below [`Self::vectors`], or to
    /// be [`NO_VECTOR`].
    fn assign(&self, config: u16, queues: &mut dyn Iterator<Item = u16>);
}
