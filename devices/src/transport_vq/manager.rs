//! The management device's side: which managed devices there are, and the execution of commands.

use std::os::fd::RawFd;
use std::sync::{Arc, OnceLock};

use super::body::{Body, Fields};
use super::envelope::{Answer, Command, Error, Request, Wire, encode_reply};
use super::interrupts::{Entry, Interrupts};
use super::queues;
use crate::gate::Reasons;
use crate::msi::{MsiController, MsiMessage};
use crate::virtio::{Cause, Executed, Rest, VirtioFunction, Wakeups};

/// Managed devices that one management device can have.
pub const MAX_DEVICES: u16 = 255;

/// How a management device behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Options {
    /// The layout of its commands.
    pub wire: Wire,
    /// Number of the feature VIRTIO_F_TRANSPT_VQ: there is a transport virtqueue (G4-b).
    pub queue_feature: u8,
    /// Number of the feature VIRTIO_F_TRANSPT_VQ_MDEV: it has the commands for managed devices (G4-b).
    pub devices_feature: u8,
}

impl Options {
    /// The numbers that the features can have: those that virtio 1.4 reserves.
    pub const FEATURES: std::ops::RangeInclusive<u8> = 44..=49;
}

impl Default for Options {
    fn default() -> Self {
        Self {
            wire: Wire::Aligned,
            queue_feature: 45,
            devices_feature: 46,
        }
    }
}

/// Where drivers reach the doorbells of managed devices: a page for each seat. Implemented by the transport of the management
/// device. Called with the lock of its function held.
pub trait Doorbells: Send + Sync {
    /// Guest physical address of the page of seat `index`; `None` while there is none.
    fn page(&self, index: u16) -> Option<u64>;
}

/// What the host has ready for one managed device: a backend behind a function, and messages for its interrupts. The driver
/// sees of it what CREATE gives a name to.
pub struct Seat {
    function: Arc<VirtioFunction>,
    interrupts: Arc<Interrupts>,
    id: Option<u64>,
}

impl Seat {
    /// The device id, while there is a device.
    pub fn id(&self) -> Option<u64> {
        self.id
    }

    /// The function, whether or not it is a device now.
    pub fn function(&self) -> &Arc<VirtioFunction> {
        &self.function
    }

    /// Its interrupts.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// There is no device any more, or not yet: the function is as it was made. It is at rest.
    fn vacate(&mut self) {
        self.id = None;
        let _is_reset = self.function.offer_only(u64::MAX);
    }

    /// A driver cannot reach it before it has `id`.
    pub(super) fn occupy(&mut self, id: u64, features: u64) {
        self.id = Some(id);
        let _is_reset = self.function.offer_only(features);
    }
}

/// Why a command has no answer yet.
pub(super) enum Refusal {
    Failed(Error),
    Later,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The counters of AVAIL_RES, which are in the configuration of the management device as well (M6): num_avail_vqs @0,
/// min_mdev_vqs @2, max_mdev_vqs @4, num_avail_mdev @6.
pub(super) const COUNTERS_LEN: usize = 8;

/// The managed devices of one management device.
pub struct Manager {
    seats: Vec<Seat>,
    options: Options,
    /// Never used again, also after a reset (G4-f).
    next_id: u64,
    doorbells: OnceLock<Arc<dyn Doorbells>>,
    wakeups: Arc<Wakeups>,
    counters: [u8; COUNTERS_LEN],
}

impl Manager {
    /// A manager that can make a device of each of `functions`, which have no transport yet, with messages from `msi`. No
    /// function reaches memory before that of the management device may. Fails if the system has no descriptor left.
    pub fn new(
        functions: Vec<Arc<VirtioFunction>>,
        msi: &dyn MsiController,
        options: Options,
    ) -> std::io::Result<Self> {
        let wakeups = Arc::new(Wakeups::new()?);
        let seat = |function: Arc<VirtioFunction>| {
            let queues = function.total_queues();
            let sink = msi.sink(Interrupts::count(queues));
            let interrupts = Arc::new(Interrupts::new(queues, sink));
            function.set_interrupt(Arc::clone(&interrupts) as _);
            function.set_wake(Arc::clone(&wakeups) as _);
            function.let_queues_be_placed();
            function.close(Reasons::NO_DMA);
            Seat {
                function,
                interrupts,
                id: None,
            }
        };
        let seats = functions.into_iter().map(seat).collect();
        let mut manager = Self {
            seats,
            options,
            next_id: 1,
            doorbells: OnceLock::new(),
            wakeups,
            counters: [0; COUNTERS_LEN],
        };
        manager.count();
        Ok(manager)
    }

    /// How it behaves.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Says where doorbells are. Only the first call counts.
    pub fn set_doorbells(&self, doorbells: Arc<dyn Doorbells>) {
        // A second transport for one function is a wiring mistake that shows as doorbells nobody hears.
        let _ = self.doorbells.set(doorbells);
    }

    /// What there is for managed devices, in order of the pages of doorbells.
    pub fn seats(&self) -> &[Seat] {
        &self.seats
    }

    pub(super) fn seats_mut(&mut self) -> &mut [Seat] {
        &mut self.seats
    }

    pub(super) fn next_id(&self) -> u64 {
        self.next_id
    }

    /// Takes what a saved state has; devices were made of seats.
    pub(super) fn set_next_id(&mut self, next_id: u64) {
        self.next_id = next_id;
        self.count();
    }

    pub(super) fn counters(&self) -> &[u8] {
        &self.counters
    }

    pub(super) fn wake_fd(&self) -> RawFd {
        self.wakeups.fd()
    }

    /// Resets all devices, since the management device is reset.
    pub(super) fn begin_reset(&mut self) {
        for seat in self.seats.iter().filter(|seat| seat.id.is_some()) {
            let _ = seat.function.request_reset();
            seat.function.doorbells_changed();
        }
    }

    /// True if no device has anything in flight.
    pub(super) fn is_at_rest(&self) -> bool {
        let mut devices = self.seats.iter().filter(|seat| seat.id.is_some());
        devices.all(|seat| seat.function.rest() == Rest::AtRest)
    }

    /// There are no devices any more (G4-m). All are at rest.
    pub(super) fn reset(&mut self) {
        self.seats.iter_mut().for_each(Seat::vacate);
        self.count();
    }

    /// Executes the command in `bytes`, the device-readable part, for which there are `room` bytes of an answer. Any bytes are
    /// a command. One that fails has no effect, and one that waits is executed again, from the same bytes: what it began goes
    /// on, and is not begun anew. `negotiated` says that the driver has the commands at all (S4-2).
    pub fn execute(&mut self, bytes: &[u8], room: usize, negotiated: bool) -> Executed {
        match self.attempt(bytes, room, negotiated) {
            Some(answer) => Executed::Done(encode_reply(self.options.wire, &answer, room)),
            None => Executed::Later,
        }
    }

    /// The same; `None` if it waits.
    pub(super) fn attempt(
        &mut self,
        bytes: &[u8],
        room: usize,
        negotiated: bool,
    ) -> Option<Answer> {
        let answer = match self.answer(bytes, room, negotiated) {
            Ok(data) => Ok(data),
            Err(Refusal::Failed(error)) => Err(error),
            Err(Refusal::Later) => return None,
        };
        self.count();
        Some(answer)
    }

    /// What tells that a device or a virtqueue came to rest.
    pub(super) fn wakeups(&self) -> &Arc<Wakeups> {
        &self.wakeups
    }

    fn answer(&mut self, bytes: &[u8], room: usize, negotiated: bool) -> Result<Vec<u8>, Refusal> {
        let wire = self.options.wire;
        let request = Request::parse(wire, bytes)?;
        if !negotiated {
            return Err(Error::Command.into());
        }
        let room = room
            .checked_sub(wire.reply_header_len())
            .ok_or(Error::ReplyTooShort)?;
        let exchange = Exchange {
            wire,
            reply_len: room,
        };
        if request.command.is_for_manager() {
            if request.device != 0 {
                return Err(Error::Device.into());
            }
            return match request.command {
                Command::Create => self.create(&exchange, request.data).map_err(Into::into),
                _ => exchange.reply(self.counters.to_vec()).map_err(Into::into),
            };
        }
        let found = self
            .seats
            .iter()
            .position(|seat| seat.id == Some(request.device));
        let index = found.ok_or(Error::Device)?;
        let Some(seat) = self.seats.get_mut(index) else {
            return Err(Error::Device.into());
        };
        if request.command == Command::Destroy {
            let _ = seat.function.request_reset();
            seat.function.doorbells_changed();
            if seat.function.rest() != Rest::AtRest {
                return Err(Refusal::Later);
            }
            seat.vacate();
            return Ok(Vec::new());
        }
        let page = self.doorbells.get().and_then(|d| d.page(index as u16));
        exchange.execute(seat, page, request.command, request.data)
    }

    /// Makes a device of the first seat that fits.
    fn create(&mut self, exchange: &Exchange, data: &[u8]) -> Answer {
        let mut body = Body::new(exchange.wire, data);
        let device_type = body.u32()?;
        let features = body.u64()?;
        let config = body.rest();
        let of_type = |seat: &&mut Seat| seat.function.device_type() as u32 == device_type;
        let mut known = false;
        let mut permitted = false;
        for seat in self.seats.iter_mut().filter(of_type) {
            known = true;
            let all = seat.function.all_features();
            if features & !all != 0 || !seat.has_config(exchange.wire, config) {
                continue;
            }
            permitted = true;
            if seat.id.is_some() {
                continue;
            }
            exchange.expect_reply_len(8)?;
            let id = self.next_id;
            // A saved state can have come to the last.
            self.next_id = id.checked_add(1).ok_or(Error::Resource)?;
            seat.occupy(id, features);
            return Ok(id.to_le_bytes().to_vec());
        }
        Err(match known && permitted {
            true => Error::Resource,
            false => Error::Value,
        })
    }

    /// Counts what is left, for AVAIL_RES.
    fn count(&mut self) {
        let queues = |seat: &Seat| seat.function.total_queues();
        let free = self.seats.iter().filter(|seat| seat.id.is_none());
        let left = free
            .clone()
            .map(|seat| u32::from(queues(seat)))
            .sum::<u32>();
        let all = self.seats.iter().map(queues);
        let fields = [
            u16::try_from(left).unwrap_or(u16::MAX),
            all.clone().min().unwrap_or(0),
            all.max().unwrap_or(0),
            free.count() as u16,
        ];
        self.counters = fields
            .map(u16::to_le_bytes)
            .as_flattened()
            .try_into()
            .unwrap_or_default();
    }
}

impl Seat {
    /// True if the device would have `config`, the beginning of a device configuration, and perhaps padding. Zeroes ask for
    /// nothing in particular.
    fn has_config(&self, wire: Wire, config: &[u8]) -> bool {
        let padding = match wire {
            Wire::Aligned => 7,
            Wire::Packed => 0,
        };
        if config.len() > self.function.config_len() + padding {
            return false;
        }
        let mut own = vec![0; config.len()];
        self.function.read_config(0, &mut own);
        let same = own
            .iter()
            .zip(config)
            .take_while(|(own, asked)| own == asked);
        let rest = config.get(same.count()..).unwrap_or_default();
        let zeroes = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
        zeroes(config) || rest.len() <= padding && zeroes(rest)
    }
}

/// What one command and its answer are written in.
pub(super) struct Exchange {
    pub wire: Wire,
    /// Bytes for command-in-data.
    pub reply_len: usize,
}

impl Exchange {
    /// Fails if there are no `len` bytes for the answer.
    pub fn expect_reply_len(&self, len: usize) -> Result<(), Error> {
        match len <= self.reply_len {
            true => Ok(()),
            false => Err(Error::ReplyTooShort),
        }
    }

    /// An answer, if it fits.
    pub fn reply(&self, data: Vec<u8>) -> Answer {
        self.expect_reply_len(data.len())?;
        Ok(data)
    }

    /// An answer made of fields.
    pub fn fields(&self, write: impl FnOnce(&mut Fields)) -> Answer {
        let mut fields = Fields::new(self.wire);
        write(&mut fields);
        self.reply(fields.bytes())
    }

    /// Executes a command for the device of `seat`, whose doorbells are at `page`.
    fn execute(
        &self,
        seat: &Seat,
        page: Option<u64>,
        command: Command,
        data: &[u8],
    ) -> Result<Vec<u8>, Refusal> {
        let function = &seat.function;
        let mut body = Body::new(self.wire, data);
        let none = Ok(Vec::new());
        let outcome = match command {
            Command::FeatDeviceGet => self.features(function.features().0),
            Command::FeatDriverGet => self.features(function.features().1),
            Command::FeatDriverSet => {
                let features = words(data)?;
                if features & !function.features().0 != 0 {
                    return Err(Error::Value.into());
                }
                if !function.accept_features(features) {
                    return Err(Error::State.into());
                }
                none
            }
            Command::StatusSet => {
                let status = body.u8()?;
                if status != 0 && function.is_resetting() {
                    return Err(Error::State.into());
                }
                let _ = function.write_status(status);
                function.doorbells_changed();
                if status == 0 && function.rest() == Rest::Resetting {
                    return Err(Refusal::Later);
                }
                none
            }
            Command::StatusGet => self.fields(|f| {
                f.u8(function.status());
            }),
            Command::GenerationGet => self.fields(|f| {
                f.u8(function.config_generation());
            }),
            Command::ConfigGet => {
                let (offset, size) = config_range(function, &mut body)?;
                let mut bytes = vec![0; size];
                function.read_config(offset, &mut bytes);
                self.reply(bytes)
            }
            Command::ConfigSet => {
                let (offset, size) = config_range(function, &mut body)?;
                let bytes = body.rest().get(..size).ok_or(Error::Length)?;
                function.write_config(offset, bytes);
                none
            }
            Command::MsiVqSet | Command::MsiVqEnable | Command::MsiVqMask | Command::MsiVqGet => {
                let index = queue_index(function, &mut body)?;
                let cause = Cause::Queue(index);
                match command {
                    Command::MsiVqGet => {
                        let index = (self.wire == Wire::Aligned).then_some(index);
                        self.message(seat, cause, index)
                    }
                    _ => set_message(seat, cause, command, &mut body),
                }
            }
            Command::MsiConfigGet => self.message(seat, Cause::Config, None),
            Command::MsiConfigSet | Command::MsiConfigEnable | Command::MsiConfigMask => {
                set_message(seat, Cause::Config, command, &mut body)
            }
            _ => {
                let index = queue_index(function, &mut body)?;
                return queues::execute(self, function, index, page, command, &mut body);
            }
        };
        outcome.map_err(Into::into)
    }

    /// As many words of features as there is room for, and at least one (M12).
    fn features(&self, features: u64) -> Answer {
        self.expect_reply_len(8)?;
        let mut bytes = features.to_le_bytes().to_vec();
        // Words beyond the first are zero, however many the driver asks for, up to a bound.
        bytes.resize((self.reply_len / 8 * 8).min(MAX_FEATURE_BYTES), 0);
        Ok(bytes)
    }

    /// The message of `cause`, as its driver set it up, with its pending bit (G4-h).
    fn message(&self, seat: &Seat, cause: Cause, index: Option<u16>) -> Answer {
        let (entry, pending) = seat.interrupts.get(cause).ok_or(Error::Queue)?;
        self.fields(|f| {
            if let Some(index) = index {
                f.u16(index);
            }
            f.u64(entry.message.address).u32(entry.message.data);
            f.u8(u8::from(entry.enabled));
            // As MASK has it, where 0 masks (G4-c).
            f.u8(u8::from(!entry.masked)).u8(u8::from(pending));
        })
    }
}

/// Bytes of features that are returned at most.
const MAX_FEATURE_BYTES: usize = 64;

/// Features, as words of 64 bits; those that are missing are zero (M12).
fn words(data: &[u8]) -> Result<u64, Error> {
    let first = data.first_chunk().ok_or(Error::Length)?;
    let beyond = data.get(8..).unwrap_or_default();
    match beyond.iter().all(|byte| *byte == 0) {
        true => Ok(u64::from_le_bytes(*first)),
        // There are no such features.
        false => Err(Error::Value),
    }
}

/// The index of a virtqueue of `function` (M23).
fn queue_index(function: &VirtioFunction, body: &mut Body<'_>) -> Result<u16, Error> {
    let index = body.u16()?;
    match index < function.total_queues() {
        true => Ok(index),
        false => Err(Error::Queue),
    }
}

/// A part of the device configuration: what a driver could access over PCI in one piece or in several (M15, M16).
fn config_range(function: &VirtioFunction, body: &mut Body<'_>) -> Result<(usize, usize), Error> {
    let (offset, size) = (body.u32()?, body.u32()?);
    let end = u64::from(offset) + u64::from(size);
    let aligned = match size {
        1 => true,
        2 => offset.is_multiple_of(2),
        3 => false,
        _ => offset.is_multiple_of(4),
    };
    if !aligned || end > function.config_len() as u64 {
        return Err(Error::Value);
    }
    // Both are within a configuration.
    Ok((offset as usize, size as usize))
}

/// A switch that is 0 or 1.
pub(super) fn switch(body: &mut Body<'_>) -> Result<bool, Error> {
    match body.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Error::Value),
    }
}

/// Sets up the message of `cause`.
fn set_message(seat: &Seat, cause: Cause, command: Command, body: &mut Body<'_>) -> Answer {
    let change: Box<dyn FnOnce(&mut Entry)> = match command {
        Command::MsiVqSet | Command::MsiConfigSet => {
            let (address, data) = (body.u64()?, body.u32()?);
            if !address.is_multiple_of(4) {
                return Err(Error::Value);
            }
            Box::new(move |entry| entry.message = MsiMessage { address, data })
        }
        Command::MsiVqEnable | Command::MsiConfigEnable => {
            let enabled = switch(body)?;
            Box::new(move |entry| entry.enabled = enabled)
        }
        _ => {
            let unmasked = switch(body)?;
            Box::new(move |entry| entry.masked = !unmasked)
        }
    };
    let mut owed = false;
    let mut done = false;
    seat.function.change_interrupt(cause, || {
        owed = seat.interrupts.change(cause, change);
        done = true;
    });
    if owed {
        seat.function.deliver_pending();
    }
    match done {
        true => Ok(Vec::new()),
        false => Err(Error::State),
    }
}
