//! Lets functions work, in the caller's thread.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use devices::virtio::VirtioFunction;
use rustix::event::Timespec;
use rustix::event::epoll::{CreateFlags, Event, EventData, EventFlags, add, create, wait};

/// Events taken at once; a device has a source or two.
const BATCH: usize = 16;

/// The turns an I/O thread would take for one function. Like that thread it looks at sources edge-triggered, so that
/// a device that is called and leaves input where it is will not be called for it again.
pub struct Pump {
    function: Arc<VirtioFunction>,
    epoll: OwnedFd,
}

impl Pump {
    /// A pump for `function`.
    pub fn new(function: Arc<VirtioFunction>) -> io::Result<Self> {
        let epoll = create(CreateFlags::CLOEXEC)?;
        for source in function.sources() {
            let data = EventData::new_u64(source.token.into());
            add(
                &epoll,
                borrow(source.fd),
                data,
                EventFlags::IN | EventFlags::ET,
            )?;
        }
        Ok(Self { function, epoll })
    }

    /// The function.
    pub fn function(&self) -> &Arc<VirtioFunction> {
        &self.function
    }

    /// Serves every queue that was kicked and every source that has news. True if there was any.
    pub fn turn(&self) -> bool {
        let mut worked = false;
        for index in 0..self.function.total_queues() {
            let kick = self.function.kick_event(index);
            if kick.is_some_and(|event| event.read().is_ok()) {
                self.function.service(index);
                worked = true;
            }
        }
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = Vec::with_capacity(BATCH);
        let space = rustix::buffer::spare_capacity(&mut events);
        if wait(&self.epoll, space, Some(&at_once)).is_err() {
            return worked;
        }
        for Event { data, .. } in events {
            self.function.on_event(data.u64() as u16);
            worked = true;
        }
        worked
    }

    /// Takes turns until there is nothing to do, `turns` at most; true if there is nothing to do.
    pub fn rest(&self, turns: usize) -> bool {
        (0..turns).any(|_| !self.turn())
    }
}

#[allow(unsafe_code)]
fn borrow<'fd>(fd: std::os::fd::RawFd) -> BorrowedFd<'fd> {
    // SAFETY: a `Source` promises that its descriptor is open for as long as its device lives, and the pump holds
    // the function that owns the device.
    unsafe { BorrowedFd::borrow_raw(fd) }
}
