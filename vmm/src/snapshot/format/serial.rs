//! The serial port.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{At, Invalid};
use super::hex::HexBytes;
use super::version::Version;
use crate::serial::SerialState;

/// The most input that waits for the port, in bytes.
const MAX_WAITING: usize = 1 << 20;

/// The 16550A at COM1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// Version of this section.
    pub version: Version<1>,
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Modem control register.
    pub modem_control: u8,
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
        let SerialState {
            divisor,
            interrupt_enable,
            interrupt_identification,
            line_control,
            modem_control,
            scratch,
            input,
        } = state;
        Self {
            version: Version::default(),
            divisor: *divisor,
            interrupt_enable: *interrupt_enable,
            interrupt_identification: *interrupt_identification,
            line_control: *line_control,
            modem_control: *modem_control,
            scratch: *scratch,
            receive_fifo: HexBytes(input.clone()),
            waiting: HexBytes(waiting.to_vec()),
        }
    }

    /// The state, which the port looks at once more, and the input that waits.
    ///
    /// # Errors
    ///
    /// More input than there can be.
    pub fn plain(&self) -> Result<(SerialState, Vec<u8>), Invalid> {
        let waiting = &self.waiting.0;
        if waiting.len() > MAX_WAITING {
            let reason = format!("{} bytes are more than {MAX_WAITING}", waiting.len());
            return Err(Invalid::new(reason)).field("waiting");
        }
        let state = SerialState {
            divisor: self.divisor,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            modem_control: self.modem_control,
            scratch: self.scratch,
            input: self.receive_fifo.0.clone(),
        };
        Ok((state, waiting.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> SerialState {
        SerialState {
            divisor: 0x201,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            modem_control: 7,
            scratch: 9,
            input: vec![b'l', b's'],
        }
    }

    #[test]
    fn the_port_is_the_same_after_json() {
        let text = serde_json::to_string(&Serial::of(&state(), b"\n")).unwrap();
        let read: Serial = serde_json::from_str(&text).unwrap();
        assert_eq!(read.plain(), Ok((state(), b"\n".to_vec())));
    }

    #[test]
    fn no_more_input_than_is_read_ahead_is_taken() {
        let serial = |waiting| Serial::of(&state(), &vec![0; waiting]).plain();
        assert!(serial(1 << 20).is_ok());
        let error = serial((1 << 20) + 1).unwrap_err().to_string();
        assert_eq!(error, "waiting: 1048577 bytes are more than 1048576");
    }
}
