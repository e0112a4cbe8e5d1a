//! Lets functions work, in the caller's thread.

use devices::virtio::VirtioFunction;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::BorrowedFd;

/// What the I/O thread does when it wakes up, once: serves every queue that was kicked and every source that has
/// input. True if there was anything to do.
pub fn pump(function: &VirtioFunction) -> bool {
    let mut worked = false;
    for index in 0..function.num_queues() {
        let kicked = function.kick_event(index).is_some_and(|e| e.read().is_ok());
        if kicked {
            function.service(index);
            worked = true;
        }
    }
    for source in function.sources() {
        if is_readable(source.fd) {
            function.on_event(source.token);
            worked = true;
        }
    }
    worked
}

/// Pumps until there is nothing to do, or `rounds` times; true if there is nothing to do.
pub fn run_until_idle(function: &VirtioFunction, rounds: usize) -> bool {
    (0..rounds).any(|_| !pump(function))
}

#[allow(unsafe_code)]
fn is_readable(fd: std::os::fd::RawFd) -> bool {
    // SAFETY: a `Source` promises that its descriptor is open for as long as its device lives, and the caller of
    // `pump` holds the function that owns the device.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    let at_once = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&at_once)).is_ok_and(|ready| ready > 0)
}
