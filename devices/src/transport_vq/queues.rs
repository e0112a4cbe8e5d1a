//! Commands for one virtqueue of a managed device: classes 8 to 14.

use super::body::Body;
use super::envelope::{Command, Error, Wire};
use super::manager::{Exchange, Refusal, switch};
use crate::virtio::{Position, QueueError, VirtioFunction};

/// Bytes of a doorbell: a write of the virtqueue's index.
const DOORBELL_LEN: u64 = 2;

/// The only address space there is, that of the management device.
const ASID: u32 = 0;

/// Executes a command for virtqueue `index`, which exists, of `function`. Its doorbells are at `page`; what comes after the index
/// is in `body`.
pub(super) fn execute(
    exchange: &Exchange,
    function: &VirtioFunction,
    index: u16,
    page: Option<u64>,
    command: Command,
    body: &mut Body<'_>,
) -> Result<Vec<u8>, Refusal> {
    let info = function.queue(index).ok_or(Error::Queue)?;
    let done = |outcome: Result<(), QueueError>| match outcome {
        Ok(()) => Ok(Vec::new()),
        Err(error) => Err(Refusal::Failed(refused(&error))),
    };
    // The answers to GET begin with the index where SET does (M24), but not as the proposal has them.
    let with_index = exchange.wire == Wire::Aligned;
    match command {
        Command::VqAddrSet => {
            let (descriptor, device, driver) = (body.u64()?, body.u64()?, body.u64()?);
            done(function.set_queue(index, |queue| {
                queue.descriptor_area = descriptor;
                queue.device_area = device;
                queue.driver_area = driver;
            }))
        }
        Command::VqSizeSet => {
            let size = body.u16()?;
            done(function.set_queue(index, |queue| queue.size = size))
        }
        Command::VqEnableSet => match switch(body)? {
            true if info.enabled => done(function.go_on_with_queue(index)),
            true => done(function.try_enable_queue(index)),
            false => later(function.disable_queue(index)),
        },
        Command::VqReset => {
            if !function.resets_queues() {
                return Err(Error::State.into());
            }
            later(function.try_reset_queue(index))
        }
        Command::VqStateSet => {
            let (available, used) = match function.is_packed() {
                false => (body.u16()?, 0),
                true => {
                    let available = position(body, info.registers.size)?;
                    (available, position(body, info.registers.size)?)
                }
            };
            if function.is_packed() && available != used {
                // Nothing is in flight, so that there is one place.
                return Err(Error::Value.into());
            }
            done(function.set_queue_position(index, available, used))
        }
        Command::VqAsidSet => {
            let asid = body.u32()?;
            if info.enabled {
                return Err(Error::State.into());
            }
            match asid {
                ASID => done(Ok(())),
                _ => Err(Error::Value.into()),
            }
        }
        Command::VqNotifyGet => {
            let page = page.ok_or(Error::State)?;
            let fields = exchange.fields(|f| {
                f.u64(page).u64(DOORBELL_LEN);
            });
            Ok(fields?)
        }
        _ => {
            let position = function.queue_position(index).ok_or(Error::Queue)?;
            let packed = function.is_packed();
            let registers = info.registers;
            let fields = exchange.fields(|f| {
                if with_index {
                    f.u16(index);
                }
                match command {
                    Command::VqAddrGet => {
                        f.u64(registers.descriptor_area);
                        f.u64(registers.device_area).u64(registers.driver_area);
                    }
                    Command::VqSizeGet => {
                        f.u16(registers.size);
                    }
                    Command::VqEnableGet => {
                        f.u8(u8::from(info.enabled));
                    }
                    Command::VqAsidGet => {
                        f.u32(ASID);
                    }
                    _ if packed => {
                        for place in [position.0, position.1].map(Position::from_raw) {
                            f.u16(place.wrap().into()).u16(place.offset());
                        }
                    }
                    _ => {
                        f.u16(position.0);
                    }
                }
            });
            Ok(fields?)
        }
    }
}

/// What became of a command that may have to wait.
fn later(outcome: Result<bool, QueueError>) -> Result<Vec<u8>, Refusal> {
    match outcome {
        Ok(true) => Ok(Vec::new()),
        Ok(false) => Err(Refusal::Later),
        Err(error) => Err(Refusal::Failed(refused(&error))),
    }
}

fn refused(error: &QueueError) -> Error {
    match error {
        QueueError::Missing => Error::Queue,
        QueueError::Busy => Error::State,
        QueueError::Size | QueueError::Ring(_) => Error::Value,
    }
}

/// A place in a packed ring of `size` descriptors: the wrap counter, and the index.
fn position(body: &mut Body<'_>, size: u16) -> Result<u16, Error> {
    let (wrap, offset) = (body.u16()?, body.u16()?);
    if wrap > 1 || offset >= size {
        return Err(Error::Value);
    }
    Ok(wrap << 15 | offset)
}
