//! virtio-net (virtio 1.4, "Network Device"): one pair of queues and a control virtqueue, on a [`Link`].
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
//! A machine that was moved has every driver that negotiated VIRTIO_NET_F_GUEST_ANNOUNCE asked to announce itself
//! (VIRTIO_NET_S_ANNOUNCE), and besides speaks for all of them ([`Announcements`]). Whether a driver was asked and has not
//! answered yet is in the device configuration, and so in every saved form of it.
//!
//! Frames that wait in a link for a driver with buffers are no part of the state of a device: after a restore they are
//! gone, as frames may be.

mod announce;
mod control;
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

use control::{Ack, Command};
use link::{HEADER_LEN, NUM_BUFFERS};

use crate::parameters::{BadParameter, queue_size};
use crate::state::{DeviceState, Unsavable};
use crate::virtio::{Chain, DeviceType, Io, Progress, RingError, Source, VirtioDevice};

/// Queue on which the driver receives.
const RX: u16 = 0;
/// Queue on which the driver transmits.
const TX: u16 = 1;
/// Control virtqueue. It comes after the only pair of queues, since there is no VIRTIO_NET_F_MQ.
const CONTROL: u16 = 2;

const F_MAC: u64 = 1 << 5;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_GUEST_ANNOUNCE: u64 = 1 << 21;
/// What a driver needs that is to be asked to announce itself: the status with the question, and a way to answer.
const ANNOUNCING: u64 = F_GUEST_ANNOUNCE | F_CTRL_VQ | F_STATUS;

/// Length of the configuration: u8 mac[6] @0, le16 status @6.
const CONFIG_LEN: usize = 8;
/// Offset of the lower byte of the status.
const STATUS: usize = 6;
/// VIRTIO_NET_S_LINK_UP: the link is up.
const S_LINK_UP: u8 = 1;
/// VIRTIO_NET_S_ANNOUNCE: the driver is asked to announce itself.
const S_ANNOUNCE: u8 = 2;

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
    /// There is a control virtqueue.
    has_control: bool,
    link: Box<dyn Link>,
    /// Feature bits that the driver accepted, once it is ready.
    features: u64,
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
    /// A network device with address `mac` on `link`, and a control virtqueue.
    pub fn new(mac: MacAddress, link: impl Link + 'static) -> Self {
        let [a, b, c, d, e, f] = mac.octets();
        Self {
            config: [a, b, c, d, e, f, S_LINK_UP, 0],
            queue_size: Parameters::default().queue_size,
            has_control: true,
            link: Box::new(link),
            features: 0,
            chains: Vec::new(),
        }
    }

    /// The same device with other parameters. To be called before it is put behind a function.
    pub fn with_parameters(mut self, parameters: &Parameters) -> Result<Self, BadParameter> {
        parameters.check()?;
        self.queue_size = parameters.queue_size;
        Ok(self)
    }

    /// The same device with or without a control virtqueue. To be called before it is put behind a function.
    #[must_use]
    pub fn with_control_queue(mut self, has_control: bool) -> Self {
        self.has_control = has_control;
        self
    }

    /// Whether a driver that accepted `features` can be asked to announce itself.
    fn can_announce(&self, features: u64) -> bool {
        self.has_control && features & ANNOUNCING == ANNOUNCING
    }

    fn receive(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        let mergeable = self.features & F_MRG_RXBUF != 0;
        while let Some(frame) = self.link.peek() {
            let len = frame.len();
            match deliver(frame, mergeable, &mut self.chains, io)? {
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
            io.push(TX, chain.ticket(), 0)?;
            since_wake += 1;
            if since_wake == WAKE_EVERY {
                since_wake = 0;
                self.link.flush();
            }
        }
        Ok(Progress::Exhausted)
    }

    /// Answers commands. Each costs the same, however long its chain is.
    fn control(&mut self, io: &mut Io<'_>) -> Result<Progress, RingError> {
        if self.features & F_CTRL_VQ == 0 {
            // For this driver there is no such queue.
            return Ok(Progress::Waiting);
        }
        while let Some(chain) = io.pop(CONTROL)? {
            let outcome = self.command(&chain, io);
            // The chain goes back even if its buffers could not be reached: none is ever dropped (E13).
            io.push(CONTROL, chain.ticket(), *outcome.as_ref().unwrap_or(&0))?;
            outcome?;
        }
        Ok(Progress::Exhausted)
    }

    /// Executes the command in `chain`, and returns how many bytes its answer has: none without room for one, and then nothing
    /// is executed.
    fn command(&mut self, chain: &Chain, io: &mut Io<'_>) -> Result<u32, RingError> {
        if chain.writable_len() == 0 {
            return Ok(0);
        }
        let ack = match Command::read(chain, io.memory())? {
            Command::AnnounceAck if self.can_announce(self.features) => {
                self.end_announcement(io);
                Ack::Ok
            }
            Command::AnnounceAck | Command::Unknown => Ack::Err,
        };
        let written = chain.write(io.memory(), 0, &[ack as u8])?;
        Ok(written as u32)
    }

    fn end_announcement(&mut self, io: &mut Io<'_>) {
        if self.config[STATUS] & S_ANNOUNCE != 0 {
            self.config[STATUS] &= !S_ANNOUNCE;
            io.config_changed_on_request();
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let control = if self.has_control {
            F_CTRL_VQ | F_GUEST_ANNOUNCE
        } else {
            0
        };
        F_MAC | F_STATUS | F_MRG_RXBUF | control | self.link.offloads()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![self.queue_size; 2 + usize::from(self.has_control)]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.link.up(features);
    }

    fn reset(&mut self) {
        self.features = 0;
        self.config[STATUS] &= !S_ANNOUNCE;
        self.link.down();
    }

    fn accepts_config(&self, config: &[u8], features: u64) -> bool {
        let asked = match config.get(STATUS) {
            Some(status) if self.can_announce(features) => status & S_ANNOUNCE,
            _ => 0,
        };
        let mut own = self.config;
        own[STATUS] = own[STATUS] & !S_ANNOUNCE | asked;
        config == own
    }

    fn restore_config(&mut self, config: &[u8]) {
        // It was accepted, and so is of this length.
        if let Ok(config) = config.try_into() {
            self.config = config;
        }
    }

    fn save_state(&self) -> Result<DeviceState, Unsavable> {
        Ok(DeviceState::None)
    }

    fn check_state(&self, state: &DeviceState) -> Result<(), &'static str> {
        state.must_be_none()
    }

    fn restore_state(&mut self, _state: &DeviceState) {}

    fn process(&mut self, queue: u16, io: &mut Io<'_>) -> Result<Progress, RingError> {
        match queue {
            RX => self.receive(io),
            TX => {
                let progress = self.transmit(io);
                // Also after an error: frames sent before it have no other wake-up.
                self.link.flush();
                progress
            }
            _ => self.control(io),
        }
    }

    fn request_announcement(&mut self, io: &mut Io<'_>) {
        if !self.can_announce(self.features) {
            return;
        }
        self.config[STATUS] |= S_ANNOUNCE;
        io.config_changed();
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
    let used = chains.drain(..).map(|chain| {
        let len = chain.writable_len().min(rest);
        rest -= len;
        (chain.ticket(), len as u32)
    });
    // A driver that polls would take a part of them for the whole frame.
    io.push_all(RX, used).map(|()| Delivered::Yes)
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
