//! Large pages for a guest whose memory is in a memfd.
//!
//! Hosts give large pages to anonymous memory as it is touched, and to a memfd, by default, never. So a thread looks for
//! large pages of which the guest has touched at least half, and has the kernel put one in place of the small ones. It
//! looks ever more rarely as long as it finds nothing. Not while writes are logged: that takes small pages anyway.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::memory::{GuestRam, LARGE_PAGE};
use vm_memory::GuestAddress;

use crate::kvm::slots::Slots;

/// Time between two looks, at first and when something was found last time.
const SOON: Duration = Duration::from_millis(200);
/// And at most.
const LATE: Duration = Duration::from_secs(10);
/// How many bytes of a large page must have been touched: what the guest costs the host at most doubles.
const ENOUGH: usize = LARGE_PAGE / 2;
/// How often the kernel is asked for one large page: it does not do it while somebody uses one of the small ones.
const TRIES: u8 = 8;
/// Stack of the thread.
const STACK: usize = 64 << 10;

/// The thread that makes large pages. It ends when this is dropped.
#[derive(Debug)]
pub struct LargePages {
    /// Nothing is ever sent: dropping it wakes the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LargePages {
    /// For the memory of `slots`. None if the host's kernel cares for it.
    pub fn spawn(slots: &Arc<Slots>) -> io::Result<Option<Self>> {
        if slots.ram().memfd().is_none() {
            return Ok(None);
        }
        let (end, ended) = channel();
        let slots = Arc::clone(slots);
        let thread = std::thread::Builder::new()
            .name("large-pages".to_owned())
            .stack_size(STACK)
            .spawn(move || run(&slots, &ended))?;
        Ok(Some(Self {
            end: Some(end),
            thread: Some(thread),
        }))
    }
}

impl Drop for LargePages {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(slots: &Slots, ended: &Receiver<()>) {
    let mut search = Search::new(slots.ram());
    let mut pause = SOON;
    while ended.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
        let go_on =
            || !slots.is_logging() && ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty);
        pause = match search.look(slots.ram(), go_on) {
            0 => (2 * pause).min(LATE),
            _ => SOON,
        };
    }
}

/// What was asked of the kernel.
struct Search {
    /// For each large page of each range of RAM, how often it may still be asked for.
    left: Vec<Vec<u8>>,
}

impl Search {
    fn new(ram: &GuestRam) -> Self {
        let pages = |len: usize| vec![TRIES; len / LARGE_PAGE];
        let left = ram.ranges().iter().map(|range| pages(range.len)).collect();
        Self { left }
    }

    /// Makes large pages where there is reason to, until `go_on` says no; returns how many.
    fn look(&mut self, ram: &GuestRam, go_on: impl Fn() -> bool) -> usize {
        let mut made = 0;
        for (index, (range, left)) in ram.ranges().iter().zip(&mut self.left).enumerate() {
            let mut at = 0;
            while let Some(piece) = ram.occupied(index, at) {
                // From the large page on in which it begins.
                let page = piece.start / LARGE_PAGE;
                at = (page + 1) * LARGE_PAGE;
                let Some(tries) = left.get_mut(page) else {
                    break;
                };
                if *tries == 0 || ram.occupied_bytes(index, page * LARGE_PAGE..at) < ENOUGH {
                    continue;
                }
                if !go_on() {
                    return made;
                }
                let start = GuestAddress(range.start.0 + (page * LARGE_PAGE) as u64);
                match ram.collapse(start, LARGE_PAGE as u64) {
                    0 => *tries -= 1,
                    _ => {
                        *tries = 0;
                        made += 1;
                    }
                }
            }
        }
        made
    }
}

#[cfg(test)]
mod tests {
    use devices::memory::{Backing, PAGE_SIZE, RamRange};

    use super::*;

    #[test]
    fn what_is_half_touched_becomes_large_and_nothing_else() {
        let range = RamRange {
            start: GuestAddress(0),
            len: 4 * LARGE_PAGE + PAGE_SIZE,
        };
        let backing = Backing::memfd(range.len as u64).unwrap();
        let ram = GuestRam::with_backing(&[range], backing).unwrap();
        let view = ram.view().unwrap();
        let touch = |page: usize, count: usize| {
            for n in 0..count {
                let at = page * LARGE_PAGE + n * PAGE_SIZE;
                view.write_obj(n as u32 + 1, GuestAddress(at as u64))
                    .unwrap();
            }
        };
        touch(1, 512);
        touch(2, 255);
        touch(3, 256);
        touch(4, 1);
        let mut search = Search::new(&ram);
        assert_eq!(search.look(&ram, || false), 0);
        let made = search.look(&ram, || true);
        if made == 0 {
            // The kernel cannot.
            return;
        }
        let bytes = |page: usize| ram.occupied_bytes(0, page * LARGE_PAGE..(page + 1) * LARGE_PAGE);
        assert_eq!(bytes(0), 0);
        assert_eq!(bytes(2), 255 * PAGE_SIZE);
        assert!(made == 2 && bytes(3) == LARGE_PAGE || made == 1);
        let value: u32 = view
            .read_obj(GuestAddress((LARGE_PAGE + 511 * PAGE_SIZE) as u64))
            .unwrap();
        assert_eq!(value, 512);
    }
}
