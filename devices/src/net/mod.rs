//! virtio-net (virtio 1.4, "Network Device"): one pair of queues, on a [`Link`].
//!
//! | link | carries frames |
//! |---|---|
//! | [`Tap`] | to and from a tap interface of the host |
//! | [`SwitchPort`] | between functions, through a [`Switch`] in this process; needs no privilege |
//!
//! An [`Uplink`] connects the two: a tap as a port of a switch.
//!
//! Every frame, on the ring and in the links, has the 12-byte `virtio_net_hdr` in front of it.
//!
//! Frames that wait in a link for a driver with buffers are no part of the state of a device: after a restore they are
//! gone, as frames may be.

mod announce;
mod link;
mod mac;
mod offload;
mod switch;
mod tap;
mod uplink;

#[cfg(test)]
mod tests;

pub use announce::{AnnouncementControl, Announcements, Announcer};
pub use link::{Counters, Link, Stats};
pub use mac::{MacAddress, MacError};
pub use switch::{PortConfig, PortInfo, Switch, SwitchError, SwitchPort};
pub use tap::{Tap, TapError, TapHandle};
pub use uplink::{Uplink, UplinkControl};

use link::{HEADER_LEN, NUM_BUFFERS};

use crate::parameters::{BadParameter, queue_size};
use crate::state::{DeviceState, Unsavable};
use crate::virtio::{Chain, DeviceType, Io, Progress, RingError, Source, VirtioDevice};

/// Queue on which the driver receives.
const RX: u16 = 0;
/// Queue on which the driver transmits.
const TX: u16 = 1;

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;

/// Length of the configuration: u8 mac[6] @0, le16 status @6.
const CONFIG_LEN: usize = 8;
/// The link is up.
const S_LINK_UP: u8 = 1;

/// Frames a sending driver may hand over before their receivers are woken.
const WAKE_EVERY: u32 = 64;

/// Parameters of a network device; see [`parameters`](crate::parameters).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parameters {
    /// Entries of each virtqueue: a power of two, 2 to 1024.
    pub queue_size: u16,
}

impl Default for Parameters {
    fn default() -> Self {
        Self { queue_size: 256 }
    }
}

impl Parameters {
    /// Whether a network device can be built with these.
    pub fn check(&self) -> Result<(), BadParameter> {
        queue_size(self.queue_size, 2)
    }
}

/// A network device.
pub struct Net {
    config: [u8; CONFIG_LEN],
    queue_size: u16,
    link: Box<dyn Link>,
    mergeable: bool,
    /// Chains gathered for one frame. Kept for its capacity.
    chains: Vec<Chain>,
}

/// What became of a frame for the driver.
enum Delivered {
    Yes,
    /// The driver must first add buffers.
    NoRoom,
    /// It fits in no buffers this driver can give.
    TooLarge,
}

impl Net {
    /// A network device with address `mac` on `link`.
    pub fn new(mac: MacAddress, link: impl Link + 'static) -> Self {
        let [a, b, c, d, e, f] = mac.octets();
        Self {
            config: [a, b, c, d, e, f, S_LINK_UP, 0],
            queue_size: Parameters::default().queue_size,
            link: Box::new(link),
            mergeable: false,
            chains: Vec::new(),
        }
    }

    /// The same device with other parameters. To be called before it is put behind a function.
    pub fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, BadParameter> {
        parameters.check()?;
        self.queue_size = parameters.queue_size;
        Ok(self)
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        while let Some(frame) = self.link.peek() {
            let len = frame.len();
            match deliver(frame, self.mergeable, &mut self.chains, io)? {
                Delivered::Yes => self.link.counters().received(len - HEADER_LEN),
                Delivered::TooLarge => self.link.counters().oversize(),
                Delivered::NoRoom => return Ok(Progress::Exhausted),
            }
            self.link.consume();
        }
        Ok(Progress::Waiting)
    }

    fn transmit(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        let mut since_wake = 0;
        while let Some(chain) = io.pop(TX)? {
            self.link.send(io.memory(), &chain);
            io.push(TX, chain.head(), 0)?;
            since_wake += 1;
            if since_wake == WAKE_EVERY {
                since_wake = 0;
                self.link.flush();
            }
        }
        Ok(Progress::Exhausted)
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        F_MAC | F_STATUS | F_MRG_RXBUF | self.link.offloads()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; 2]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.mergeable = features & F_MRG_RXBUF != 0;
        self.link.up(features);
    }

    fn reset(&mut self) {
        self.mergeable = false;
        self.link.down();
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        if queue == RX {
            return self.receive(io);
        }
        let progress = self.transmit(io);
        // Also after an error: frames sent before it have no other wake-up.
        self.link.flush();
        progress
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source {
            fd: self.link.event_fd(),
            token: 0,
        }]
    }

    fn on_event(&mut self, _token: u16, io: &mut Io<'_>) -> Result<(), RingError> {
        self.receive(io).map(|_| ())
    }
}

/// Puts `frame` into one chain, or with `mergeable` buffers into as many as it takes; into all or none of them.
fn deliver(
    frame: &mut [u8],
    mergeable: bool,
    chains: &mut Vec<Chain>,
    io: &mut Io<'_>,
) -> Result<Delivered, RingError> {
    chains.clear();
    let mut room = 0;
    let shortage = loop {
        match io.pop(RX) {
            Ok(Some(chain)) => {
                room += chain.writable_len();
                chains.push(chain);
            }
            Ok(None) if chains.len() >= usize::from(io.queue_size(RX)) => {
                break Ok(Some(Delivered::TooLarge));
            }
            Ok(None) => break Ok(Some(Delivered::NoRoom)),
            Err(error) => break Err(error),
        }
        if room >= frame.len() as u64 {
            break Ok(None);
        }
        if !mergeable {
            break Ok(Some(Delivered::TooLarge));
        }
    };
    let filled = match shortage {
        Ok(None) => fill(frame, chains, io),
        Ok(Some(shortage)) => {
            put_back(chains, io);
            return Ok(shortage);
        }
        Err(error) => Err(error),
    };
    if let Err(error) = filled {
        put_back(chains, io);
        return Err(error);
    }
    let mut rest = frame.len() as u64;
    let mut outcome = Ok(());
    for chain in chains.drain(..) {
        let len = chain.writable_len().min(rest);
        rest -= len;
        outcome = outcome.and(io.push(RX, chain.head(), len as u32));
    }
    outcome.map(|()| Delivered::Yes)
}

fn fill(frame: &mut [u8], chains: &[Chain], io: &Io<'_>) -> Result<(), RingError> {
    if let Some(count) = frame.get_mut(NUM_BUFFERS) {
        count.copy_from_slice(&(chains.len() as u16).to_le_bytes());
    }
    let mut done = 0;
    for chain in chains {
        let rest = frame.get(done..).unwrap_or_default();
        done += chain.write(io.memory(), 0, rest)?;
    }
    Ok(())
}

fn put_back(chains: &mut Vec<Chain>, io: &mut Io<'_>) {
    while let Some(chain) = chains.pop() {
        io.unpop(RX, chain);
    }
}
