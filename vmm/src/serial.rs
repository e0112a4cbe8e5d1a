//! COM1: a 16550A at port `0x3f8`, interrupt line 4.
//!
//! Input is given to the port only while its driver has enabled the receive interrupt. Before that, Linux reads and
//! drops what it finds in the FIFO, and input from a pipe would lose its first bytes.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::{Bus, BusDevice, BusError, Effect};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::chipset::COM1_PORT;
use crate::console::output::Sender;

/// Ports of a 16550.
const PORTS: u64 = 8;
/// Offset of the interrupt enable register.
const IER: u64 = 1;
/// The receive interrupt, in the interrupt enable register.
const IER_RECEIVE: u8 = 1;
/// Divisor latch access: offset 1 is something else.
const LCR_DLAB: u8 = 0x80;

/// Signals the interrupt line on each event of the port.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
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
        Ok(Arc::new(Self {
            serial: Mutex::new(Serial::with_events(Line(line), events, out)),
            hungry,
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

    /// Gives input to the port; returns how many bytes it took. The rest may be offered again after [`Self::hungry`].
    pub fn offer(&self, input: &[u8]) -> usize {
        let mut serial = self.lock();
        if serial.state().interrupt_enable & IER_RECEIVE == 0 {
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
mod tests {
    use super::*;

    fn port() -> Arc<SerialPort> {
        SerialPort::new(EventFd::new(libc::EFD_NONBLOCK).unwrap(), None).unwrap()
    }

    fn read(port: &SerialPort, offset: u64) -> u8 {
        let mut byte = [0];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn input_waits_for_a_driver() {
        let port = port();
        assert_eq!(port.offer(b"abc"), 0);
        let _ = port.write(1, &[IER_RECEIVE]);
        assert!(port.hungry().read().is_ok());
        assert_eq!(port.offer(b"abc"), 3);
        assert_eq!([(); 3].map(|()| read(&port, 0)), *b"abc");
        assert!(port.hungry().read().is_ok());
    }

    #[test]
    fn no_input_is_lost_when_the_fifo_is_full() {
        let port = port();
        let _ = port.write(1, &[IER_RECEIVE]);
        let input: Vec<u8> = (0..200).collect();
        let (mut given, mut got) = (0, Vec::new());
        while got.len() < input.len() {
            given += port.offer(&input[given..]);
            while read(&port, 5) & 1 != 0 {
                got.push(read(&port, 0));
            }
        }
        assert_eq!(got, input);
    }

    #[test]
    fn odd_accesses_are_answered() {
        let port = port();
        for len in [0, 2, 4, 8] {
            let mut data = vec![0; len];
            port.read(0, &mut data);
            assert!(data.iter().all(|b| *b == 0xff));
            let _ = port.write(7, &data);
        }
    }
}
