//! The serial port.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState;

use super::error::{At, Invalid};
use super::hex::HexBytes;
use super::version::Version;

/// Bytes of the receive FIFO.
const FIFO: usize = 64;
/// The most input that waits for the port, in bytes.
const MAX_WAITING: usize = 1 << 20;

/// The 16550A at COM1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Version of this section.
    pub version: Version<1>,
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Receive FIFO, the oldest byte first: at most 64.
    pub receive_fifo: HexBytes,
    /// Input that was read and that the port has not taken, the oldest byte first.
    pub waiting: HexBytes,
}

impl Serial {
    /// The JSON of a port in `state`, for which the input in `waiting` was read.
    pub fn of(state: &SerialState, waiting: &[u8]) -> Self {
        Self {
            version: Version::default(),
            divisor_low: state.baud_divisor_low,
            divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            receive_fifo: HexBytes(state.in_buffer.clone()),
            waiting: HexBytes(waiting.to_vec()),
        }
    }

    /// The state, and the input that waits.
    ///
    /// # Errors
    ///
    /// More input than there can be.
    pub fn plain(&self) -> Result<(SerialState, Vec<u8>), Invalid> {
        at_most(&self.receive_fifo, FIFO).field("receive_fifo")?;
        at_most(&self.waiting, MAX_WAITING).field("waiting")?;
        let state = SerialState {
            baud_divisor_low: self.divisor_low,
            baud_divisor_high: self.divisor_high,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.receive_fifo.0.clone(),
        };
        Ok((state, self.waiting.0.clone()))
    }
}

fn at_most(bytes: &HexBytes, most: usize) -> Result<(), Invalid> {
    if bytes.0.len() > most {
        let reason = format!("{} bytes are more than {most}", bytes.0.len());
        return Err(Invalid::new(reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_the_same_after_json() {
        let state = SerialState {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            in_buffer: vec![b'l', b's'],
        };
        let text = serde_json::to_string(&Serial::of(&state, b"\n")).unwrap();
        let read: Serial = serde_json::from_str(&text).unwrap();
        assert_eq!(read.plain(), Ok((state, b"\n".to_vec())));
    }

    #[test]
    fn no_more_input_than_fits_is_taken() {
        let refusal = |fifo, waiting| {
            let mut serial = Serial::of(&SerialState::default(), &vec![0; waiting]);
            serial.receive_fifo = HexBytes(vec![0; fifo]);
            serial
                .plain()
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        assert_eq!(refusal(64, 1 << 20), Ok(()));
        let message = |text: &str| Err(text.to_owned());
        assert_eq!(
            refusal(65, 0),
            message("receive_fifo: 65 bytes are more than 64")
        );
        assert_eq!(
            refusal(0, (1 << 20) + 1),
            message("waiting: 1048577 bytes are more than 1048576")
        );
    }
}
