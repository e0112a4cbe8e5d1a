//! virtio-console: one port (virtio 1.4, "Console Device").
//!
//! Input is read when the driver has buffers for it, never ahead. Output goes to a thread of its own, since a
//! terminal may be stopped and a pipe full; while its bounded buffer is full, chains stay on the ring. Input that was read
//! and not yet given to the driver is state; output that was taken is written by the process that took it.

use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::parameters::{BadParameter, queue_size};
use crate::state::{DeviceState, Unsavable};
use crate::virtio::{DeviceType, Io, Progress, RingError, Source, VirtioDevice};

/// Queue on which the driver receives.
const RX: u16 = 0;
/// Queue on which the driver transmits.
const TX: u16 = 1;

/// The configuration has a size in columns and rows.
const F_SIZE: u64 = 1 << 0;
/// Length of the configuration: le16 cols @0, le16 rows @2, le32 max_nr_ports @4, le32 emerg_wr @8.
const CONFIG_LEN: usize = 12;

const INPUT: u16 = 0;
const ROOM: u16 = 1;

/// Output that waits for the terminal before chains are left on the ring.
const BUFFERED: usize = 64 * 1024;
/// The most output one chain may carry; the rest of a longer one is dropped. Linux sends at most 32 KiB.
const CHAIN_MAX: usize = 64 * 1024;
/// Input read at once.
const INPUT_CHUNK: usize = 4096;
/// How long the last output may take when the console is dropped.
const LAST_WORDS: Duration = Duration::from_secs(1);
const STACK_BYTES: usize = 128 * 1024;

/// Parameters of a console; see [`parameters`](crate::parameters).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Entries of each virtqueue: a power of two, 2 to 1024.
    pub queue_size: u16,
    /// Size of the terminal, if the driver is told one.
    pub size: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

impl Default for Parameters {
    fn default() -> Self {
        Self {
            queue_size: 64,
            size: None,
        }
    }
}

impl Parameters {
    /// Whether a console can be built with these.
    pub fn check(&self) -> Result<(), BadParameter> {
        queue_size(self.queue_size, 2)
    }
}

/// A console with one port.
pub struct Console {
    queue_size: u16,
    config: [u8; CONFIG_LEN],
    has_size: bool,
    input: Option<OwnedFd>,
    /// Read from the input and not yet given to the driver.
    pending: Vec<u8>,
    output: Output,
}

impl Console {
    /// A console that reads `input` (none: a console without a keyboard) and writes `output`.
    ///
    /// The mode of `input` is left alone: it may be shared with other processes, so it is only read when a poll says
    /// that it has something.
    pub fn new(input: Option<OwnedFd>, output: Box<dyn Write + Send>) -> std::io::Result<Self> {
        Ok(Self {
            queue_size: Parameters::default().queue_size,
            config: [0; CONFIG_LEN],
            has_size: false,
            input,
            pending: Vec::new(),
            output: Output::new(output)?,
        })
    }

    /// The same device with other parameters. To be called before it is put behind a function.
    pub fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, BadParameter> {
        parameters.check()?;
        self.queue_size = parameters.queue_size;
        self.has_size = parameters.size.is_some();
        let size = parameters.size.map_or((0, 0), |s| (s.columns, s.rows));
        let ([c0, c1], [r0, r1]) = (size.0.to_le_bytes(), size.1.to_le_bytes());
        self.config = [c0, c1, r0, r1, 0, 0, 0, 0, 0, 0, 0, 0];
        Ok(self)
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(chain) = io.pop(RX)? {
            if self.pending.is_empty() && !self.read_input() {
                io.unpop(RX, chain);
                return Ok(Progress::Waiting);
            }
            let written = chain.write(io.memory(), 0, &self.pending);
            let len = *written.as_ref().unwrap_or(&0);
            io.push(RX, chain.ticket(), len as u32)?;
            self.pending.drain(..len);
            written?;
        }
        Ok(Progress::Exhausted)
    }

    /// Reads what the input has, without waiting. False if it has nothing, or has ended.
    fn read_input(&mut self) -> bool {
        let Some(input) = &self.input else {
            return false;
        };
        let mut fds = [PollFd::new(input, PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&Timespec::default())), Ok(n) if n > 0) {
            return false;
        }
        let mut chunk = [0; INPUT_CHUNK];
        match rustix::io::read(input, &mut chunk) {
            Ok(n) if n > 0 => {
                self.pending
                    .extend_from_slice(chunk.get(..n).unwrap_or_default());
                true
            }
            // The end of a pipe is final; that of a terminal (^D typed in its line mode) is not.
            Ok(_) => false,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            Err(error) => {
                tracing::debug!(%error, "console input ended");
                false
            }
        }
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        loop {
            if !self.output.has_room() {
                return Ok(Progress::Waiting);
            }
            let Some(chain) = io.pop(TX)? else {
                return Ok(Progress::Exhausted);
            };
            let mut bytes = vec![0; chain.readable_len().min(CHAIN_MAX as u64) as usize];
            let read = chain.read(io.memory(), 0, &mut bytes);
            io.push(TX, chain.ticket(), 0)?;
            read?;
            self.output.write(&bytes);
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        if self.has_size { F_SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; 2]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.pending.clear();
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::Console {
            input: self.pending.clone(),
        })
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        match state {
            DeviceState::Console { input } if input.len() <= INPUT_CHUNK => Ok(()),
            DeviceState::Console { .. } => Err("more input than a console reads at once"),
            DeviceState::None => Err("it is missing; this is a console"),
        }
    }

    fn restore_state(&mut self, state: &DeviceState) {
        if let DeviceState::Console { input } = state {
            self.pending.clone_from(input);
        }
    }

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        match queue {
            RX => self.receive(io),
            _ => self.transmit(io),
        }
    }

    fn sources(&self) -> Vec<Source> {
        let input = self.input.as_ref().map(|fd| Source {
            fd: fd.as_raw_fd(),
            token: INPUT,
        });
        let room = Source {
            fd: self.output.shared.room.as_raw_fd(),
            token: ROOM,
        };
        input.into_iter().chain([room]).collect()
    }

    fn on_event(&mut self, token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        match token {
            INPUT => self.receive(io)?,
            _ => self.transmit(io)?,
        };
        Ok(())
    }
}

/// The thread that writes, and the buffer in front of it.
struct Output {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// Work for the thread, or the thread's end.
    changed: Condvar,
    /// Signalled when a full buffer has room again.
    room: EventFd,
}

#[derive(Default)]
struct State {
    buffered: Vec<u8>,
    /// The device found the buffer full and waits for `room`.
    stalled: bool,
    stop: bool,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    fn new(sink: Box<dyn Write + Send>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            room: EventFd::new(EFD_NONBLOCK)?,
        });
        let theirs = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("console".into())
            .stack_size(STACK_BYTES)
            .spawn(move || write_out(&theirs, sink))?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// True if more output may be given. If not, `room` is signalled once it may.
    fn has_room(&self) -> bool {
        let mut state = self.shared.lock();
        state.stalled = state.buffered.len() >= BUFFERED;
        !state.stalled
    }

    fn write(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        state.buffered.extend_from_slice(bytes);
        self.shared.changed.notify_all();
    }
}

impl Drop for Output {
    /// Lets the thread finish. One that is stuck in a stopped terminal is left behind.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stop = true;
        self.shared.changed.notify_all();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, LAST_WORDS, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let ended = state.ended;
        drop(state);
        if let Some(thread) = self.thread.take().filter(|_| ended) {
            // A panic on the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}

fn write_out(shared: &Shared, mut sink: Box<dyn Write + Send>) {
    let mut batch = Vec::new();
    let mut failed = false;
    loop {
        let mut state = shared.lock();
        while state.buffered.is_empty() && !state.stop {
            state = shared
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        batch.clear();
        std::mem::swap(&mut batch, &mut state.buffered);
        if std::mem::take(&mut state.stalled) {
            // Edge-triggered: a signal that is already there is still an event.
            let _ = shared.room.write(1);
        }
        if batch.is_empty() {
            state.ended = true;
            shared.changed.notify_all();
            return;
        }
        drop(state);
        if let Err(error) = sink.write_all(&batch).and_then(|()| sink.flush())
            && !std::mem::replace(&mut failed, true)
        {
            tracing::warn!(%error, "console output is lost");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buf, Driver};
    use std::sync::mpsc;

    /// Where a test sees the output.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// A terminal that shows nothing until it is let go.
    struct Stopped(mpsc::Receiver<()>, Screen);

    impl Write for Stopped {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            // An error means the test has let go for good.
            let _ = self.0.recv();
            self.1.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn keyboard() -> (OwnedFd, std::fs::File) {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        (reader, writer.into())
    }

    #[test]
    fn output_of_several_chains_appears_in_order() {
        let screen = Screen::default();
        let console = Console::new(None, Box::new(screen.clone())).unwrap();
        let mut driver = Driver::live(console, 0);
        driver.add(TX, &[Buf::Out(b"hel".into()), Buf::Out(b"lo ".into())]);
        driver.add(TX, &[Buf::Out(b"world".into())]);
        driver.kick(TX);
        assert_eq!(driver.wait_used(TX).1, 0);
        driver.wait_used(TX);
        driver.until("output", |_| *screen.0.lock().unwrap() == b"hello world");
    }

    #[test]
    fn dropping_the_console_writes_what_is_buffered() {
        let screen = Screen::default();
        let console = Console::new(None, Box::new(screen.clone())).unwrap();
        let mut driver = Driver::live(console, 0);
        driver.request(TX, &[Buf::Out(b"last words".into())]);
        drop(driver);
        assert_eq!(*screen.0.lock().unwrap(), b"last words");
    }

    #[test]
    fn a_stopped_terminal_leaves_chains_on_the_ring_and_nothing_is_lost() {
        let (go, stopped) = mpsc::channel();
        let screen = Screen::default();
        let sink = Stopped(stopped, screen.clone());
        let mut driver = Driver::live(Console::new(None, Box::new(sink)).unwrap(), 0);
        let page = vec![b'x'; 16 * 1024];
        for _ in 0..32 {
            driver.add(TX, &[Buf::Out(page.clone())]);
        }
        driver.kick(TX);
        let mut used = 0;
        while driver.used(TX).is_some() {
            used += 1;
        }
        assert!((1..32).contains(&used), "{used} chains were taken");
        drop(go);
        driver.until("all output", |d| {
            while d.used(TX).is_some() {
                used += 1;
            }
            used == 32 && screen.0.lock().unwrap().len() == 32 * page.len()
        });
    }

    #[test]
    fn input_before_buffers_waits_for_them() {
        let (reader, mut writer) = keyboard();
        let console = Console::new(Some(reader), Box::new(Screen::default())).unwrap();
        let mut driver = Driver::live(console, 0);
        writer.write_all(b"abcdef").unwrap();
        driver.turn();
        let (len, bytes) = driver.request(RX, &[Buf::In(2), Buf::In(2)]);
        assert_eq!((len, bytes.as_slice()), (4, &b"abcd"[..]));
        let (len, bytes) = driver.request(RX, &[Buf::In(3)]);
        assert_eq!((len, bytes.as_slice()), (2, &b"ef\xee"[..]));
    }

    #[test]
    fn buffers_before_input_stay_on_the_ring_until_a_key() {
        let (reader, mut writer) = keyboard();
        let console = Console::new(Some(reader), Box::new(Screen::default())).unwrap();
        let mut driver = Driver::live(console, 0);
        let added = driver.add(RX, &[Buf::In(4)]);
        driver.kick(RX);
        assert_eq!(driver.used(RX), None);
        writer.write_all(b"k").unwrap();
        assert_eq!(driver.wait_used(RX), (added.head, 1));
    }

    #[test]
    fn a_keyboard_that_hung_up_is_no_input() {
        let (reader, writer) = keyboard();
        drop(writer);
        let console = Console::new(Some(reader), Box::new(Screen::default())).unwrap();
        let mut driver = Driver::live(console, 0);
        driver.add(RX, &[Buf::In(4)]);
        driver.kick(RX);
        assert_eq!(driver.used(RX), None);
    }

    #[test]
    fn reset_forgets_input_that_was_not_delivered() {
        let (reader, mut writer) = keyboard();
        let console = Console::new(Some(reader), Box::new(Screen::default())).unwrap();
        let mut driver = Driver::live(console, 0);
        writer.write_all(b"old").unwrap();
        driver.request(RX, &[Buf::In(1)]);
        driver.status(0);
        driver.start(0);
        writer.write_all(b"new").unwrap();
        assert_eq!(driver.request(RX, &[Buf::In(3)]).1, b"new");
    }

    #[test]
    fn the_size_is_offered_and_shown_only_if_known() {
        let console = || Console::new(None, Box::new(Screen::default())).unwrap();
        let driver = Driver::new(console());
        assert_eq!(driver.function.device_features(0) & 1, 0);
        let size = Size {
            columns: 132,
            rows: 43,
        };
        let parameters = Parameters {
            queue_size: 8,
            size: Some(size),
        };
        let driver = Driver::new(console().with_parameters(&parameters).unwrap());
        assert_eq!(driver.function.queue(1).unwrap().max_size, 8);
        assert_eq!(driver.function.device_features(0) & 1, 1);
        let mut config = [0; 4];
        driver.function.read_config(0, &mut config);
        assert_eq!(config, [132, 0, 43, 0]);
    }

    #[test]
    fn input_that_was_read_and_not_delivered_moves_with_the_console() {
        use crate::state::TransientState;
        let (read, write) = std::io::pipe().unwrap();
        let mut driver = Driver::live(
            Console::new(Some(read.into()), Box::new(std::io::sink())).unwrap(),
            0,
        );
        (&write).write_all(b"hello, world").unwrap();
        driver.add(0, &[Buf::In(5)]);
        driver.kick(0);
        driver.wait_used(0);
        driver.function.close(crate::gate::Reasons::PAUSED);
        let state = driver.function.save();
        let transient = driver.function.save_transient().unwrap();
        let input = b", world".to_vec();
        assert_eq!(transient.device, DeviceState::Console { input });

        let mut other = Driver::new(Console::new(None, Box::new(std::io::sink())).unwrap());
        let function = &other.function;
        let with = |device| TransientState {
            device,
            ..TransientState::default()
        };
        for device in [
            DeviceState::None,
            DeviceState::Console {
                input: vec![0; INPUT_CHUNK + 1],
            },
        ] {
            let idle = function.save();
            assert!(function.restore_exact(&idle, &with(device)).is_err());
        }
        // A driver of its own, as the memory is not that of the other.
        other.start(0);
        other.function.close(crate::gate::Reasons::PAUSED);
        let mut mine = other.function.save();
        mine.config = state.config;
        other
            .function
            .restore_exact(&mine, &with(transient.device.clone()))
            .unwrap();
        assert_eq!(
            other.function.save_transient().unwrap().device,
            transient.device
        );
        other.function.reopen(crate::gate::Reasons::PAUSED);
        assert_eq!(other.request(0, &[Buf::In(64)]).1[..7], b", world"[..]);
    }
}
