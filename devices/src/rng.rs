//! virtio-rng: the host's entropy (virtio 1.4, "Entropy Device").

use rustix::rand::{GetRandomFlags, getrandom};

use crate::parameters::{BadParameter, queue_size};
use crate::state::{DeviceState, Unsavable};
use crate::virtio::{DeviceType, Io, Progress, RingError, Source, VirtioDevice};

/// Random bytes for one request; a larger buffer is filled in part, as the device may. Bounds the time that a guest
/// which asks for entropy in a loop takes from the other devices.
const BYTES_PER_REQUEST: usize = 4096;

/// Parameters of an entropy source; see [`parameters`](crate::parameters).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Entries of the request queue: a power of two, 2 to 1024.
    pub queue_size: u16,
}

impl Default for Parameters {
    fn default() -> Self {
        Self { queue_size: 64 }
    }
}

impl Parameters {
    /// Whether an entropy source can be built with these.
    pub fn check(&self) -> Result<(), BadParameter> {
        queue_size(self.queue_size, 2)
    }
}

/// An entropy source. It has no state and no configuration.
#[derive(Debug, Default)]
pub struct Rng {
    parameters: Parameters,
}

impl Rng {
    /// An entropy source that draws from the host's.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same device with other parameters. To be called before it is put behind a function.
    pub fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, BadParameter> {
        parameters.check()?;
        self.parameters = *parameters;
        Ok(self)
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.parameters.queue_size]
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        let mut entropy = [0; BYTES_PER_REQUEST];
        while let Some(chain) = io.pop(queue)? {
            let wanted = chain.writable_len().min(BYTES_PER_REQUEST as u64) as usize;
            let filled = match entropy.get_mut(..wanted) {
                Some(bytes) => fill(bytes),
                None => 0,
            };
            let bytes = entropy.get(..filled).unwrap_or_default();
            let written = chain.write(io.memory(), 0, bytes);
            // The chain goes back whatever happened to it, or the function could never be reset.
            io.push(queue, chain.ticket(), filled as u32)?;
            written?;
        }
        Ok(Progress::Exhausted)
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn on_event(&mut self, _token: u16, _io: &mut Io<'_>) -> Result<(), RingError> {
        Ok(())
    }
}

/// Fills `bytes` from the start; returns how many were filled. Fewer than asked only on a host that has gathered no
/// entropy since it booted.
fn fill(bytes: &mut [u8]) -> usize {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match getrandom(rest, GetRandomFlags::NONBLOCK) {
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "the host gives no entropy yet");
                break;
            }
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Buf, Driver};

    #[test]
    fn a_request_is_filled_with_bytes_that_differ_from_the_last() {
        let mut driver = Driver::live(Rng::new(), 0);
        let (len, first) = driver.request(0, &[Buf::In(32), Buf::In(32)]);
        assert_eq!(len, 64);
        let (_, second) = driver.request(0, &[Buf::In(64)]);
        assert_ne!(first, second);
        assert_ne!(first, vec![0xee; 64]);
    }

    #[test]
    fn a_large_request_is_filled_up_to_the_bound_and_not_beyond() {
        let mut driver = Driver::live(Rng::new(), 0);
        let (len, bytes) = driver.request(0, &[Buf::In(3 * BYTES_PER_REQUEST)]);
        assert_eq!(len as usize, BYTES_PER_REQUEST);
        assert!(bytes[BYTES_PER_REQUEST..].iter().all(|b| *b == 0xee));
    }

    #[test]
    fn the_queue_is_as_long_as_the_parameters_say() {
        let of = |queue_size| Rng::new().with_parameters(&Parameters { queue_size });
        assert_eq!(Rng::new().queue_sizes(), [64]);
        assert_eq!(of(8).unwrap().queue_sizes(), [8]);
        assert_eq!(of(9).unwrap_err().field, "queue_size");
    }

    #[test]
    fn a_request_without_a_writable_buffer_is_returned_empty() {
        let mut driver = Driver::live(Rng::new(), 0);
        assert_eq!(driver.request(0, &[Buf::Out(vec![1; 8])]).0, 0);
    }
}
