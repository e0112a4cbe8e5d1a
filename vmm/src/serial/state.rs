//! Saved form of the port: what its driver wrote, what it was told, and what it has not read yet.

use vm_superio::serial;

/// Interrupts a driver can enable.
const IER_VALID: u8 = 0xf;
/// Interrupt identification: none.
const IIR_NONE: u8 = 1;
/// Interrupt identification: the transmitter is empty.
const IIR_TRANSMIT: u8 = 1 << 1;
/// Interrupt identification: there is input.
const IIR_RECEIVE: u8 = 1 << 2;
/// Line status: the transmitter is empty, as always here.
const LSR_TRANSMIT: u8 = 0x60;
/// Line status: there is input.
const LSR_RECEIVE: u8 = 1;

/// Bytes of input the port holds.
const FIFO: usize = 64;

/// Saved form of the port. What the other registers read follows from these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable.
    pub interrupt_enable: u8,
    /// Interrupt identification, without the two bits that say that there is a FIFO.
    pub interrupt_identification: u8,
    /// Line control.
    pub line_control: u8,
    /// Modem control.
    pub modem_control: u8,
    /// Scratch.
    pub scratch: u8,
    /// Input that the driver has not read, oldest first; at most 64 bytes.
    pub input: Vec<u8>,
}

/// Why a saved form of the port was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SerialStateError {
    /// Interrupts that the port does not have.
    #[error("interrupt enable of the serial port is {0:#x}, and has bits 3:0 only")]
    Enable(u8),
    /// Not what the register can read.
    #[error("interrupt identification of the serial port is {0:#x}, and can be 1, 2, 4 or 6")]
    Identification(u8),
    /// An interrupt for input that is not there.
    #[error("the serial port has an interrupt for input, and no input")]
    NothingReceived,
    /// More input than the port holds.
    #[error("the serial port has {0} bytes of input, and can hold {FIFO}")]
    Input(usize),
}

impl SerialState {
    pub(super) fn of(registers: &serial::SerialState) -> Self {
        let divisor = [registers.baud_divisor_low, registers.baud_divisor_high];
        Self {
            divisor: u16::from_le_bytes(divisor),
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            modem_control: registers.modem_control,
            scratch: registers.scratch,
            input: registers.in_buffer.clone(),
        }
    }

    /// Every register, if a guest can bring about this state.
    pub(super) fn checked(&self) -> Result<serial::SerialState, SerialStateError> {
        if self.interrupt_enable & !IER_VALID != 0 {
            return Err(SerialStateError::Enable(self.interrupt_enable));
        }
        let causes = self.interrupt_identification & (IIR_TRANSMIT | IIR_RECEIVE);
        let expected = if causes == 0 { IIR_NONE } else { causes };
        if self.interrupt_identification != expected {
            return Err(SerialStateError::Identification(
                self.interrupt_identification,
            ));
        }
        if self.input.len() > FIFO {
            return Err(SerialStateError::Input(self.input.len()));
        }
        if causes & IIR_RECEIVE != 0 && self.input.is_empty() {
            return Err(SerialStateError::NothingReceived);
        }
        let received = if self.input.is_empty() {
            0
        } else {
            LSR_RECEIVE
        };
        let [baud_divisor_low, baud_divisor_high] = self.divisor.to_le_bytes();
        Ok(serial::SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: LSR_TRANSMIT | received,
            modem_control: self.modem_control,
            scratch: self.scratch,
            in_buffer: self.input.clone(),
            // Modem status is what it is after reset: no line ever changes.
            ..serial::SerialState::default()
        })
    }
}

/// Whether there is an interrupt that the driver has not acknowledged. That it is disabled at the moment says nothing: Linux
/// disables all while its kernel writes a message, and waits for what was under way once it has enabled them again. The
/// port would not raise it then, since it raises nothing twice.
pub(super) fn owes_interrupt(registers: &serial::SerialState) -> bool {
    registers.interrupt_identification & (IIR_TRANSMIT | IIR_RECEIVE) != 0
}
