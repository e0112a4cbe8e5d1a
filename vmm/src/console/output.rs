//! Console output: vCPUs fill a buffer, a thread empties it.
//!
//! A serial port delivers one byte at a time. Writing each to the terminal at once costs a system call per byte and,
//! worse, lets a terminal that does not read stop a vCPU inside a system call. The thread waits a few milliseconds after
//! the first byte so that a line becomes one write. A reader that stays away for long holds the guest back, as a real
//! serial line with flow control would, but never the rest of the machine.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long output may wait for more of it.
const GATHER: Duration = Duration::from_millis(3);
/// Bytes after which a vCPU waits for the reader.
const HIGH_WATER: usize = 64 << 10;
/// How long a full buffer holds a vCPU back at a time, so that it can still be paused and stopped.
const PATIENCE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The thread has taken bytes and is writing them.
    writing: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, guard: MutexGuard<'a, Buffer>) -> MutexGuard<'a, Buffer> {
        self.changed
            .wait(guard)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The filling end. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Sender {
    shared: Arc<Shared>,
}

/// Owns the thread.
#[derive(Debug)]
pub struct Output {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Output {
    /// Starts the thread, which writes to `sink`. A sink that fails is not written to again; output is then dropped.
    pub fn spawn(sink: impl Write + Send + 'static) -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let other = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("console".to_owned())
            .stack_size(128 << 10)
            .spawn(move || drain(&other, sink))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// A filling end.
    pub fn sender(&self) -> Sender {
        Sender {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Waits until everything is written, but not longer than `patience`: a reader may have gone away for good.
    pub fn flush(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut buffer = self.shared.lock();
        buffer.closed = true;
        self.shared.changed.notify_all();
        while !buffer.bytes.is_empty() || buffer.writing {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            buffer = self
                .shared
                .changed
                .wait_timeout(buffer, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.flush(Duration::from_secs(1));
        let idle = {
            let buffer = self.shared.lock();
            buffer.bytes.is_empty() && !buffer.writing
        };
        if let Some(thread) = self.thread.take().filter(|_| idle) {
            let _ = thread.join();
        }
    }
}

fn drain(shared: &Shared, mut sink: impl Write) {
    let mut failed = false;
    let mut taken = Vec::new();
    let mut buffer = shared.lock();
    loop {
        while buffer.bytes.is_empty() {
            if buffer.closed {
                return;
            }
            buffer = shared.wait(buffer);
        }
        if !buffer.closed && buffer.bytes.len() < HIGH_WATER {
            drop(buffer);
            std::thread::sleep(GATHER);
            buffer = shared.lock();
        }
        std::mem::swap(&mut buffer.bytes, &mut taken);
        buffer.writing = true;
        drop(buffer);
        if !failed && sink.write_all(&taken).and_then(|()| sink.flush()).is_err() {
            failed = true;
        }
        taken.clear();
        taken.shrink_to(4096);
        buffer = shared.lock();
        buffer.writing = false;
        shared.changed.notify_all();
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = self.shared.lock();
        if buffer.bytes.len() >= HIGH_WATER && !buffer.closed {
            buffer = self
                .shared
                .changed
                .wait_timeout(buffer, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        // Still full: the reader is away. Console output is not worth more than this.
        if buffer.bytes.len() < 4 * HIGH_WATER {
            let was_empty = buffer.bytes.is_empty();
            buffer.bytes.extend_from_slice(bytes);
            if was_empty {
                self.shared.changed.notify_all();
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Blocks until its channel is closed.
    struct Stuck(mpsc::Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_arrives_in_order() {
        let sink = Sink::default();
        let output = Output::spawn(sink.clone()).unwrap();
        let mut sender = output.sender();
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        for chunk in bytes.chunks(7) {
            sender.write_all(chunk).unwrap();
        }
        drop(output);
        assert!(*sink.0.lock().unwrap() == bytes);
    }

    #[test]
    fn a_reader_that_never_reads_stops_neither_writer_nor_exit() {
        let (hold, stuck) = mpsc::channel();
        let output = Output::spawn(Stuck(stuck)).unwrap();
        let mut sender = output.sender();
        for _ in 0..5 {
            sender.write_all(&[0; HIGH_WATER]).unwrap();
        }
        output.flush(Duration::from_millis(10));
        drop(hold);
    }
}
