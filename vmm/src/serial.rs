//! COM1: a 16550A at port `0x3f8`, interrupt line 4.
//!
//! Input is given to the port only while its driver has enabled the receive interrupt. Before that, Linux reads and
//! drops what it finds in the FIFO, and input from a pipe would lose its first bytes.
//!
//! While it is paused the port takes no input and raises no interrupt, so that its state stands still; it is saved and
//! restored like that. What it owes its driver it raises when it is resumed.

mod state;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::{Bus, BusDevice, BusError, Effect};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::chipset::COM1_PORT;
use crate::console::output::Sender;
pub use state::{SerialState, SerialStateError};

/// Ports of a 16550.
const PORTS: u64 = 8;
/// Offset of the interrupt enable register.
const IER: u64 = 1;
/// The receive interrupt, in the interrupt enable register.
const IER_RECEIVE: u8 = 1;
/// Divisor latch access: offset 1 is something else.
const LCR_DLAB: u8 = 0x80;

/// Signals the interrupt line on each event of the port, but while the port is paused.
#[derive(Clone)]
struct Line {
    event: Arc<EventFd>,
    paused: Arc<AtomicBool>,
}

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        if self.paused.load(Ordering::Acquire) {
            return Ok(());
        }
        self.event.write(1)
    }
}

/// Signals that the port has room for more input.
struct Hungry(Arc<EventFd>);

impl SerialEvents for Hungry {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

/// Where output goes.
type Out = Box<dyn io::Write + Send>;

/// The port. See the [module documentation](self).
pub struct SerialPort {
    serial: Mutex<Serial<Line, Hungry, Out>>,
    hungry: Arc<EventFd>,
    paused: Arc<AtomicBool>,
}

impl SerialPort {
    /// A port that signals `line` for interrupts and sends output to `output`, or drops it.
    pub fn new(line: EventFd, output: Option<Sender>) -> io::Result<Arc<Self>> {
        let hungry = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let out: Out = match output {
            Some(sender) => Box::new(sender),
            None => Box::new(io::sink()),
        };
        let events = Hungry(Arc::clone(&hungry));
        let paused = Arc::new(AtomicBool::new(false));
        let line = Line {
            event: Arc::new(line),
            paused: Arc::clone(&paused),
        };
        Ok(Arc::new(Self {
            serial: Mutex::new(Serial::with_events(line, events, out)),
            hungry,
            paused,
        }))
    }

    /// Maps the port.
    pub fn attach(self: &Arc<Self>, ports: &Bus) -> Result<(), BusError> {
        let start = u64::from(COM1_PORT);
        ports.insert(start..start + PORTS, Arc::clone(self) as _)
    }

    fn lock(&self) -> MutexGuard<'_, Serial<Line, Hungry, Out>> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the port may take input again.
    pub fn hungry(&self) -> &EventFd {
        &self.hungry
    }

    /// Has the port take no input and raise no interrupt from now on. To be called when no vCPU runs.
    pub fn pause(&self) {
        // With the lock, so that no input is half taken.
        let _serial = self.lock();
        self.paused.store(true, Ordering::Release);
    }

    /// Undoes [`Self::pause`]. Raises the interrupt of what the port has for its driver, once: whoever restored the
    /// interrupt controllers may have lost it. Input may be offered again.
    pub fn resume(&self) {
        let serial = self.lock();
        self.paused.store(false, Ordering::Release);
        if state::owes_interrupt(&serial.state()) {
            // An eventfd refuses only when its counter is full, and then it is already signalled.
            let _ = serial.interrupt_evt().trigger();
        }
        let _ = self.hungry.write(1);
    }

    /// Saved form of the port. It stands still only while it is paused.
    pub fn save(&self) -> SerialState {
        SerialState::of(&self.lock().state())
    }

    /// Pauses the port and puts it into `state`, all of it or none of it.
    pub fn restore(&self, state: &SerialState) -> Result<(), SerialStateError> {
        let registers = state.checked()?;
        self.pause();
        let mut serial = self.lock();
        let line = serial.interrupt_evt().clone();
        let events = Hungry(Arc::clone(&self.hungry));
        let nothing: Out = Box::new(io::sink());
        let out = std::mem::replace(serial.writer_mut(), nothing);
        // What can fail is a FIFO that is too long, which was checked, and the line, which is silent.
        *serial = Serial::from_state(&registers, line, events, out)
            .map_err(|_| SerialStateError::Input(registers.in_buffer.len()))?;
        Ok(())
    }

    /// Gives input to the port; returns how many bytes it took, none while it is paused. The rest may be offered again
    /// after [`Self::hungry`].
    pub fn offer(&self, input: &[u8]) -> usize {
        let mut serial = self.lock();
        let paused = self.paused.load(Ordering::Acquire);
        if paused || serial.state().interrupt_enable & IER_RECEIVE == 0 {
            return 0;
        }
        let room = serial.fifo_capacity().min(input.len());
        match input.get(..room) {
            None | Some([]) => 0,
            Some(bytes) => serial.enqueue_raw_bytes(bytes).unwrap_or(0),
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.lock().read(offset as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        if let [byte] = data {
            let mut serial = self.lock();
            if let Err(error) = serial.write(offset as u8, *byte) {
                tracing::debug!(%error, "serial port");
            }
            let latch = offset == IER && serial.state().line_control & LCR_DLAB == 0;
            if latch && byte & IER_RECEIVE != 0 {
                let _ = self.hungry.write(1);
            }
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests;
