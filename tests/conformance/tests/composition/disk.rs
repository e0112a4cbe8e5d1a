//! A disk in memory whose requests wait for the test.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use devices::block::Backend;
use devices::memory::{GuestRead, GuestWrite};

pub const SECTORS: usize = 256;
pub const SECTOR: usize = 512;

/// How long a request may take to get to the disk.
const PATIENCE: Duration = Duration::from_secs(10);

pub struct Disk {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    bytes: Vec<u8>,
    hold: bool,
    /// Requests that may pass although others are held.
    passes: usize,
    /// A request waits.
    waiting: bool,
    /// How often each sector was written.
    writes: Vec<u32>,
}

impl Disk {
    pub fn new() -> Self {
        let bytes = (0..SECTORS * SECTOR).map(|at| (at / SECTOR) as u8 ^ 0x5a);
        Self {
            state: Mutex::new(State {
                bytes: bytes.collect(),
                hold: false,
                passes: 0,
                waiting: false,
                writes: vec![0; SECTORS],
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn hold(&self, hold: bool) {
        self.lock().hold = hold;
        self.changed.notify_all();
    }

    pub fn release(&self, count: usize) {
        self.lock().passes += count;
        self.changed.notify_all();
    }

    /// Waits until a request is held, and nothing may pass. False if that takes too long.
    pub fn wait_for_one(&self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !state.waiting || state.passes > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
        true
    }

    pub fn writes(&self, sector: usize) -> u32 {
        self.lock().writes[sector]
    }

    pub fn sector(&self, sector: usize) -> Vec<u8> {
        self.lock().bytes[sector * SECTOR..][..SECTOR].to_vec()
    }

    /// The disk, when the test lets a request pass.
    fn enter(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while state.hold && state.passes == 0 {
            state.waiting = true;
            self.changed.notify_all();
            state = self.changed.wait(state).unwrap();
        }
        state.waiting = false;
        state.passes = state.passes.saturating_sub(1);
        state
    }
}

impl Backend for Disk {
    fn len(&self) -> u64 {
        (SECTORS * SECTOR) as u64
    }

    fn read(&self, offset: u64, buffers: &[GuestWrite<'_>]) -> io::Result<()> {
        let state = self.enter();
        let mut at = offset as usize;
        for buffer in buffers {
            buffer.copy_from(&state.bytes[at..at + buffer.len()]);
            at += buffer.len();
        }
        Ok(())
    }

    fn write(&self, offset: u64, buffers: &[GuestRead<'_>]) -> io::Result<()> {
        let mut state = self.enter();
        let mut at = offset as usize;
        state.writes[at / SECTOR] += 1;
        for buffer in buffers {
            let end = at + buffer.len();
            buffer.copy_to(&mut state.bytes[at..end]);
            at = end;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Ok(())
    }
}
