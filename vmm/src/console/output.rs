//! Console output: vCPUs fill a buffer, a thread empties it.
//!
//! A serial port delivers one byte at a time. Writing each to the terminal at once costs a system call per byte and,
//! worse, lets a terminal that does not read stop a vCPU inside a system call. The thread waits a few milliseconds after
//! the first byte so that a line becomes one write. A reader that stays away for long holds the guest back, as a real
//! serial line with flow control would, but never the rest of the machine.
//!
//! Output that cannot be written, to a full disk or to a pipe whose reader has gone, does not end the guest: its disks
//! and its work are worth more. It is said once when it begins ([`Loss`]), and again by the exit status.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long output may wait for more of it.
const GATHER: Duration = Duration::from_millis(3);
/// Bytes after which a vCPU waits for the reader.
const HIGH_WATER: usize = 64 << 10;
/// How long a full buffer holds a vCPU back at a time, so that it can still be paused and stopped.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long a reader may take for the rest when the output ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How soon a sink is tried again that would make a write wait: one that somebody else has made non-blocking.
const RETRY: Duration = Duration::from_millis(5);

/// Console output that was lost: the first reason counts. Shared by everything that writes some.
#[derive(Clone, Debug, Default)]
pub struct Loss(Arc<OnceLock<String>>);

impl Loss {
    /// Notes and reports, once, that output of `console` is lost.
    pub fn note(&self, console: &str, reason: &dyn std::fmt::Display) {
        let mut first = false;
        let text = self.0.get_or_init(|| {
            first = true;
            format!("{console}: {reason}")
        });
        if first {
            tracing::warn!("console output is lost: {text}; the guest goes on running");
        }
    }

    /// Which console lost output, and why; `None` if nothing was lost.
    pub fn reason(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

/// A sink that reports what it cannot write to a [`Loss`], and to its writer that all is well.
///
/// Every write is tried: a disk that was full may have room again.
#[derive(Debug)]
pub struct Reporting<W> {
    sink: W,
    console: String,
    loss: Loss,
}

impl<W: Write> Reporting<W> {
    /// Writes to `sink`, which people know as `console`.
    pub fn new(sink: W, console: &str, loss: &Loss) -> Self {
        Self {
            sink,
            console: console.to_owned(),
            loss: loss.clone(),
        }
    }
}

impl<W: Write> Write for Reporting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let error = match self.sink.write(bytes) {
                Ok(0) if !bytes.is_empty() => io::ErrorKind::WriteZero.into(),
                Ok(written) => return Ok(written),
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => std::thread::sleep(RETRY),
                _ => {
                    self.loss.note(&self.console, &error);
                    return Ok(bytes.len());
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Err(error) = self.sink.flush() {
            self.loss.note(&self.console, &error);
        }
        Ok(())
    }
}

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
    console: String,
    loss: Loss,
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

    fn lose(&self) {
        self.loss.note(&self.console, &"nobody reads it");
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
    /// Starts the thread, which writes to `sink`, known as `console`. What cannot be written goes to `loss`.
    pub fn spawn(
        sink: impl Write + Send + 'static,
        console: &str,
        loss: &Loss,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            console: console.to_owned(),
            loss: loss.clone(),
            ..Shared::default()
        });
        let other = Arc::clone(&shared);
        let sink = Reporting::new(sink, console, loss);
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

    /// Waits until everything is written, but not longer than `patience`: a reader may have gone away for good. True
    /// if everything is.
    pub fn flush(&self, patience: Duration) -> bool {
        self.flush_buffer(self.shared.lock(), patience)
    }

    fn flush_buffer(&self, mut buffer: MutexGuard<'_, Buffer>, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        while !buffer.bytes.is_empty() || buffer.writing {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            buffer = self
                .shared
                .changed
                .wait_timeout(buffer, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut buffer = self.shared.lock();
        buffer.closed = true;
        self.shared.changed.notify_all();
        let written = self.flush_buffer(buffer, LAST_WORDS);
        if !written {
            self.shared.lose();
        }
        if let Some(thread) = self.thread.take().filter(|_| written) {
            let _ = thread.join();
        }
    }
}

fn drain(shared: &Shared, mut sink: impl Write) {
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
        // What goes wrong has been reported by the sink.
        let _ = sink.write_all(&taken).and_then(|()| sink.flush());
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
        if buffer.bytes.len() >= 4 * HIGH_WATER {
            self.shared.lose();
        } else {
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
        let (sink, loss) = (Sink::default(), Loss::default());
        let output = Output::spawn(sink.clone(), "a sink", &loss).unwrap();
        let mut sender = output.sender();
        let bytes: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        for chunk in bytes.chunks(7) {
            sender.write_all(chunk).unwrap();
        }
        drop(output);
        assert!(*sink.0.lock().unwrap() == bytes);
        assert_eq!(loss.reason(), None);
    }

    #[test]
    fn a_reader_that_never_reads_stops_neither_writer_nor_exit() {
        let (hold, stuck) = mpsc::channel();
        let loss = Loss::default();
        let output = Output::spawn(Stuck(stuck), "a sink", &loss).unwrap();
        let mut sender = output.sender();
        for _ in 0..6 {
            sender.write_all(&[0; HIGH_WATER]).unwrap();
        }
        assert!(!output.flush(Duration::from_millis(10)));
        assert_eq!(loss.reason(), Some("a sink: nobody reads it"));
        drop(hold);
    }

    /// Answers each write with the next of these; then takes everything.
    struct Script(Vec<io::Result<usize>>, Sink);

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0.pop() {
                Some(Ok(count)) => self.1.write(&bytes[..count]),
                Some(error) => error,
                None => self.1.write(bytes),
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_sink_that_makes_writers_wait_or_takes_a_part_loses_nothing() {
        let (sink, loss) = (Sink::default(), Loss::default());
        let answers = vec![
            Err(io::ErrorKind::Interrupted.into()),
            Ok(2),
            Err(io::ErrorKind::WouldBlock.into()),
        ];
        let mut reporting = Reporting::new(Script(answers, sink.clone()), "a sink", &loss);
        reporting.write_all(b"abcd").unwrap();
        assert_eq!(*sink.0.lock().unwrap(), b"abcd");
        assert_eq!(loss.reason(), None);
    }

    #[test]
    fn what_a_full_disk_does_not_take_is_reported_once_and_it_is_tried_again() {
        let (sink, loss) = (Sink::default(), Loss::default());
        let errors = [io::ErrorKind::BrokenPipe, io::ErrorKind::StorageFull];
        let answers = errors.map(|kind| Err(kind.into())).into();
        let mut reporting = Reporting::new(Script(answers, sink.clone()), "x.log", &loss);
        for text in [b"ab", b"cd", b"ef"] {
            reporting.write_all(text).unwrap();
        }
        assert_eq!(*sink.0.lock().unwrap(), b"ef");
        assert_eq!(loss.reason(), Some("x.log: no storage space"));
    }

    #[test]
    fn output_to_a_full_device_is_lost_and_not_silently() {
        let loss = Loss::default();
        let full = std::fs::File::options().write(true).open("/dev/full");
        let output = Output::spawn(full.unwrap(), "/dev/full", &loss).unwrap();
        output.sender().write_all(b"lost").unwrap();
        drop(output);
        let reason = loss.reason().unwrap();
        assert!(reason.contains("No space left"), "{reason}");
    }
}
