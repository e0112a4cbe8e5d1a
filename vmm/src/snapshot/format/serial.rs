//! The serial port.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{At, Invalid};
use super::hex::HexBytes;
use super::version::Version;
use crate::serial::SerialState;

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
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register, without the two bits that say that there is a FIFO.
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
        at_most(&self.receive_fifo, FIFO).field("receive_fifo")?;
        at_most(&self.waiting, MAX_WAITING).field("waiting")?;
        let state = SerialState {
            divisor: self.divisor,
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            modem_control: self.modem_control,
            scratch: self.scratch,
            input: self.receive_fifo.0.clone(),
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
pub(super) mod tests {
    use super::*;

    pub fn sample() -> SerialState {
        SerialState {
            divisor: 0x0c,
            interrupt_enable: 5,
            interrupt_identification: 4,
            line_control: 3,
            modem_control: 11,
            scratch: 9,
            input: b"ls".to_vec(),
        }
    }

    #[test]
    fn the_port_is_the_same_after_json() {
        let text = serde_json::to_string(&Serial::of(&sample(), b"\n")).unwrap();
        let read: Serial = serde_json::from_str(&text).unwrap();
        assert_eq!(read.plain(), Ok((sample(), b"\n".to_vec())));
    }

    #[test]
    fn no_more_input_than_fits_is_taken() {
        let refusal = |fifo, waiting| {
            let mut serial = Serial::of(&sample(), &vec![0; waiting]);
            serial.receive_fifo = HexBytes(vec![0; fifo]);
            serial
                .plain()
                .map(|_| ())
                .map_err(|error| error.to_string())
        };
        assert_eq!(refusal(64, 1 << 20), Ok(()));
        let message = |text: &str| Err(text.to_owned());
        let expected = message("receive_fifo: 65 bytes are more than 64");
        assert_eq!(refusal(65, 0), expected);
        let expected = message("waiting: 1048577 bytes are more than 1048576");
        assert_eq!(refusal(0, (1 << 20) + 1), expected);
    }
}
