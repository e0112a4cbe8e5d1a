//! Storage of a disk that does what a test says: it answers at once, late, with an error, or not at all.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::block::Backend;
use devices::memory::{GuestRead, GuestWrite};

/// What storage was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read so many bytes at an offset.
    Read(u64, usize),
    /// Write.
    Write(u64, usize),
    /// Make writes durable.
    Flush,
    /// Forget.
    Discard(u64, u64),
    /// Fill with zeroes.
    Zero(u64, u64),
}

/// A disk in memory, and its controls.
///
/// An access that has to wait does so before it reads or writes anything. When this goes, all wait no longer,
/// so that no thread is left behind.
pub struct Storage {
    disk: Arc<Disk>,
}

struct Disk {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    /// How many accesses may go on; `None`: all.
    admitted: Option<usize>,
    fail: usize,
    pause: Duration,
    waiting: usize,
    done: Vec<Access>,
}

impl Storage {
    /// A disk with these contents, a multiple of 512 bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        let state = State {
            bytes,
            ..State::default()
        };
        Self {
            disk: Arc::new(Disk {
                state: Mutex::new(state),
                changed: Condvar::new(),
            }),
        }
    }

    /// For the device.
    pub fn backend(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.disk) as _
    }

    /// From now on accesses wait.
    pub fn block(&self) {
        self.disk.lock().admitted = Some(0);
    }

    /// `count` of those that wait, or come, go on.
    pub fn admit(&self, count: usize) {
        let mut state = self.disk.lock();
        state.admitted = state.admitted.map(|left| left + count);
        self.disk.changed.notify_all();
    }

    /// All go on.
    pub fn unblock(&self) {
        self.disk.lock().admitted = None;
        self.disk.changed.notify_all();
    }

    /// The next `count` accesses fail.
    pub fn fail(&self, count: usize) {
        self.disk.lock().fail = count;
    }

    /// Every access takes this long.
    pub fn slow_down(&self, pause: Duration) {
        self.disk.lock().pause = pause;
    }

    /// Accesses that have begun and wait.
    pub fn waiting(&self) -> usize {
        self.disk.lock().waiting
    }

    /// Waits until an access waits; false if none does for a long time.
    #[must_use]
    pub fn wait_for_access(&self, patience: Duration) -> bool {
        let state = self.disk.lock();
        let none = |state: &mut State| state.waiting == 0;
        let waited = self.disk.changed.wait_timeout_while(state, patience, none);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// Accesses that were carried out, in their order; failed ones are not among them.
    pub fn done(&self) -> Vec<Access> {
        self.disk.lock().done.clone()
    }

    /// The contents.
    pub fn bytes(&self) -> Vec<u8> {
        self.disk.lock().bytes.clone()
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        self.unblock();
    }
}

impl Disk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits as long as the access has to, and carries it out.
    fn access(&self, access: Access, act: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut state = self.lock();
        state.waiting += 1;
        self.changed.notify_all();
        let blocked = |state: &mut State| state.admitted == Some(0);
        state = self
            .changed
            .wait_while(state, blocked)
            .unwrap_or_else(PoisonError::into_inner);
        state.admitted = state.admitted.map(|left| left - 1);
        let pause = state.pause;
        if !pause.is_zero() {
            drop(state);
            std::thread::sleep(pause);
            state = self.lock();
        }
        state.waiting -= 1;
        if state.fail > 0 {
            state.fail -= 1;
            return Err(io::Error::other("the test wants this access to fail"));
        }
        state.done.push(access);
        act(&mut state.bytes);
        Ok(())
    }
}

/// The part of `bytes` at `offset`, which the device has checked.
fn part(bytes: &mut [u8], offset: u64, len: usize) -> &mut [u8] {
    let from = offset as usize;
    bytes.get_mut(from..from + len).unwrap_or_default()
}

/// Writes `bytes` to `buffer`, which is as long, the way a kernel does that reads a file: nothing but the type
/// of the buffer marks the pages.
#[allow(unsafe_code)]
fn fill(buffer: &GuestWrite<'_>, bytes: &[u8]) {
    let memory = buffer.iovec();
    let len = memory.iov_len.min(bytes.len());
    // SAFETY: the buffer is `len` bytes or more of mapped guest memory, which no Rust reference points to, and `bytes` is
    // memory of this process's own, so that the two do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory.iov_base.cast(), len) }
}

impl Backend for Disk {
    fn len(&self) -> u64 {
        self.lock().bytes.len() as u64
    }

    fn read(&self, offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        let len = buffers.iter().map(GuestWrite::len).sum();
        self.access(Access::Read(offset, len), |bytes| {
            let mut from = &*part(bytes, offset, len);
            for buffer in buffers {
                let (head, rest) = from.split_at(buffer.len());
                fill(buffer, head);
                from = rest;
            }
        })
    }

    fn write(&self, offset: u64, buffers: &[GuestRead<'_>]) -> io::Result<()> {
        let len = buffers.iter().map(GuestRead::len).sum();
        self.access(Access::Write(offset, len), |bytes| {
            let mut to = part(bytes, offset, len);
            for buffer in buffers {
                let (head, rest) = std::mem::take(&mut to).split_at_mut(buffer.len());
                buffer.copy_to(head);
                to = rest;
            }
        })
    }

    fn flush(&self) -> io::Result<()> {
        self.access(Access::Flush, |_| ())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.access(Access::Discard(offset, len), |_| ())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.access(Access::Zero(offset, len), |bytes| {
            part(bytes, offset, len as usize).fill(0);
        })
    }
}
