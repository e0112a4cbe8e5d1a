//! One virtqueue: the registers a transport shows, and the ring once the queue is enabled.
//!
//! What a ring is, is in [`split`] and [`packed`], with [`ring`] as the face of both. This module has what is the same for any:
//! reset and stop as processes, which chains are in flight, and whether the driver was notified of those
//! that are not any more.
//!
//! A chain that was fetched is in flight until it is returned, or until its device gives it up unbegun. In that case the
//! function still owns it: it is fetched once more before any other.

mod packed;
mod ring;
mod split;

use std::collections::VecDeque;

pub use packed::Position;
pub(crate) use ring::Format;
use ring::{Held, Ring, Start};
use vm_memory::GuestAddress;

use super::chain::{Chain, ChainError, Ticket};
use crate::memory::View;
use crate::state::{PackedState, QueueState, RingState, SplitState};

/// Why a ring cannot be used. Each is the driver's doing, and answered with DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// A ring area is misaligned or outside guest memory.
    #[error("{area} at {address:#x} is misaligned or outside guest memory")]
    Area {
        /// What it is, such as "used ring".
        area: &'static str,
        /// The guest physical address the driver gave.
        address: u64,
    },
    /// The available index is further ahead than the ring is long, or the ring cannot be reached.
    #[error("available ring is unusable: {0}")]
    Available(virtio_queue::Error),
    /// The used ring cannot be written.
    #[error("used ring is unusable: {0}")]
    Used(virtio_queue::Error),
    /// A chain is made available while the device still has it.
    #[error("descriptor or buffer {0} is made available again before it was used")]
    Again(u16),
    /// The driver wants a packed ring to go on where it cannot.
    #[error("the ring cannot go on at {:#x}, offset {} of it", .0, .0 & 0x7fff)]
    Position(u16),
    /// Rings of one format have the state of the other one.
    #[error("the ring is not of the format that the driver negotiated")]
    Format,
    /// A chain is malformed.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// A buffer could not be reached although its chain was checked.
    #[error("buffer is unusable: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The request itself breaks its device's format so badly that there is nowhere to put an error.
    #[error("{0}")]
    Request(&'static str),
}

/// What a driver reads and writes of one queue in the common configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueRegisters {
    /// Entries; a power of two of split rings that are enabled.
    pub size: u16,
    /// Guest physical address of the descriptor table, or of the packed ring.
    pub descriptor_area: u64,
    /// Guest physical address of the available ring, or of the driver's event suppression.
    pub driver_area: u64,
    /// Guest physical address of the used ring, or of the device's event suppression.
    pub device_area: u64,
}

/// A virtqueue. See the [module documentation](self).
#[derive(Debug)]
pub struct Virtqueue {
    max_size: u16,
    format: Format,
    registers: QueueRegisters,
    /// Where the driver wants the queue to start, or to go on after a stop (S0-10).
    start: Option<Start>,
    /// From `queue_enable` until the queue or the device is reset.
    enabled: Option<Enabled>,
}

#[derive(Debug)]
struct Enabled {
    ring: Ring,
    phase: Phase,
    /// The chains that were fetched and not yet returned, in order. The only record of them.
    in_flight: VecDeque<Held>,
    /// The chains that were fetched and given up, in order.
    owned: VecDeque<Held>,
    signal: Signal,
}

/// What the driver wants of a queue it enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// It stopped the queue, by `queue_status` (S0).
    Stopped,
    /// It disabled the queue, which its transport can do without a reset (S4-28), and requests are still in flight.
    Disabling,
    /// It asked for a reset of the queue, and requests are still in flight.
    Resetting,
}

/// What the driver is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Signal {
    Nothing,
    /// Chains were used since it was last notified: it is, if it wants to be.
    Used,
    /// It is notified, whatever it wants: the queue comes from a saved state, which does not tell whether it was notified of
    /// everything.
    Owed,
}

impl Enabled {
    fn new(ring: Ring) -> Self {
        Self {
            ring,
            phase: Phase::Running,
            in_flight: VecDeque::new(),
            owned: VecDeque::new(),
            signal: Signal::Nothing,
        }
    }

    /// True while the queue may be worked on, as far as it is concerned. One that is to stop still has to do what it was
    /// given back.
    fn is_usable(&self) -> bool {
        match self.phase {
            Phase::Running => true,
            Phase::Stopped | Phase::Disabling => !self.owned.is_empty(),
            Phase::Resetting => false,
        }
    }

    /// A chain is no longer in flight. `None` if it was not: the device returns what it does not have.
    fn leave(&mut self, ticket: Ticket) -> Option<Held> {
        leave(&mut self.in_flight, ticket)
    }
}

impl Virtqueue {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            format: Format::default(),
            registers: default_registers(max_size),
            start: None,
            enabled: None,
        }
    }

    /// The driver accepted features that say which rings it has. Of a queue that is not enabled.
    pub(super) fn set_format(&mut self, format: Format) {
        self.format = format;
    }

    /// True if the driver may choose this size.
    pub(super) fn allows(&self, size: u16) -> bool {
        size <= self.max_size && self.format.allows(size)
    }

    /// The largest size the driver may choose.
    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    /// The registers as the driver sees them.
    pub fn registers(&self) -> &QueueRegisters {
        &self.registers
    }

    /// The registers, for a driver's write. They only take effect, and should only be written, while the queue is
    /// disabled.
    pub(super) fn registers_mut(&mut self) -> &mut QueueRegisters {
        &mut self.registers
    }

    /// True from `queue_enable` until the queue or the device is reset.
    pub fn is_enabled(&self) -> bool {
        self.enabled.is_some()
    }

    fn is_in(&self, phase: Phase) -> bool {
        self.enabled
            .as_ref()
            .is_some_and(|queue| queue.phase == phase)
    }

    /// True while a reset of this queue waits for requests in flight.
    pub fn is_resetting(&self) -> bool {
        self.is_in(Phase::Resetting)
    }

    /// True while the queue may be worked on, as far as it is concerned.
    pub(super) fn is_usable(&self) -> bool {
        self.enabled.as_ref().is_some_and(Enabled::is_usable)
    }

    /// `queue_status`: false if the queue is disabled, or stopped with nothing in flight (S0-4, S0-5). Chains that were
    /// given up are none the driver may do without: `last_avail_idx` is beyond them.
    pub fn is_running(&self) -> bool {
        let stands = |queue: &Enabled| {
            queue.phase == Phase::Stopped && queue.in_flight.is_empty() && queue.owned.is_empty()
        };
        self.enabled.as_ref().is_some_and(|queue| !stands(queue))
    }

    /// Where a queue that does not run goes on.
    fn place(&self) -> Start {
        let ring = self.enabled.as_ref().map(|queue| queue.ring.place());
        let place = self.start.or(ring);
        place.unwrap_or_else(|| self.format.start())
    }

    /// `last_avail_idx` of a queue that does not run: the available-ring entry that is fetched next (S0-9), or the position in
    /// a packed ring (G0-i).
    pub fn next_available(&self) -> u16 {
        self.place().available
    }

    /// `last_used_off_wrap` of a queue that does not run: the position in a packed ring that is used next (G0-i); 0 of a split
    /// one.
    pub fn next_used(&self) -> u16 {
        match self.format {
            Format::Split => 0,
            Format::Packed => self.place().used,
        }
    }

    /// The driver sets `last_avail_idx` of a queue that does not run (S0-8, G0-g). A packed one has nothing in flight there.
    pub(super) fn set_next_available(&mut self, place: u16) {
        if !self.is_running() {
            self.start = Some(Start::at(place));
        }
    }

    /// The driver sets `last_used_off_wrap` of a packed queue that does not run (G0-i).
    pub(super) fn set_next_used(&mut self, used: u16) {
        if !self.is_running() && self.format == Format::Packed {
            let Start { available, .. } = self.place();
            self.start = Some(Start { available, used });
        }
    }

    /// The driver writes 0 to `queue_status`. Nothing happens while the queue is disabled (S0-6), and to one that is being
    /// reset.
    pub(super) fn stop(&mut self) {
        if let Some(queue) = &mut self.enabled
            && queue.phase == Phase::Running
        {
            queue.phase = Phase::Stopped;
        }
    }

    /// The driver writes 1 to `queue_status`, or enables a queue that is about to be disabled. True if the queue goes on.
    pub(super) fn resume(&mut self) -> bool {
        match &mut self.enabled {
            Some(queue) if matches!(queue.phase, Phase::Stopped | Phase::Disabling) => {
                queue.phase = Phase::Running;
                true
            }
            _ => false,
        }
    }

    /// The driver disables the queue; [`Self::finish_disabling`] completes it once nothing is in flight. False if it is being
    /// reset.
    pub(super) fn disable(&mut self) -> bool {
        match &mut self.enabled {
            Some(queue) if queue.phase == Phase::Resetting => return false,
            Some(queue) => queue.phase = Phase::Disabling,
            None => {}
        }
        true
    }

    /// Completes what [`Self::disable`] began if nothing is in flight, nor given up, and its driver was told of all that was
    /// used. The registers stay, and the queue goes on where it was unless the driver says otherwise.
    pub(super) fn finish_disabling(&mut self) -> bool {
        let at_rest = |queue: &Enabled| {
            queue.in_flight.is_empty() && queue.owned.is_empty() && queue.signal == Signal::Nothing
        };
        let ready = self.is_in(Phase::Disabling) && self.enabled.as_ref().is_some_and(at_rest);
        if ready {
            self.start = Some(self.place());
            self.enabled = None;
        }
        ready
    }

    /// A queue that is not enabled gets its default registers back, and begins at its start.
    pub(super) fn reset_disabled(&mut self) {
        *self = Self {
            format: self.format,
            ..Self::new(self.max_size)
        };
    }

    /// True if it can be enabled where its driver said that it begins.
    pub(super) fn begins_in_its_ring(&self) -> bool {
        let within = |place| Position::from_raw(place).offset() < self.registers.size;
        match (self.format, self.start) {
            (Format::Packed, Some(start)) => within(start.available) && within(start.used),
            _ => true,
        }
    }

    /// Where it goes on, or is going on now: the next available place and, in a packed ring, the next used one.
    pub(super) fn position(&self) -> (u16, u16) {
        let Start { available, used } = self.place();
        (available, used)
    }

    /// Starts the ring with the addresses in the registers, at index 0 or where the driver said.
    pub(super) fn enable(&mut self, view: &View, event_index: bool) -> Result<(), RingError> {
        let ring = Ring::new(self.format, self.max_size, &self.registers, view)?;
        self.enabled = Some(Enabled::new(ring));
        self.set_event_index(event_index);
        Ok(())
    }

    /// What moves with this queue, whose interrupt has `vector`. Chains in flight are the function's, as those it gave up.
    pub(super) fn save(&self, vector: u16) -> QueueState {
        let registers = self.registers;
        let enabled = self.enabled.as_ref();
        let held = enabled
            .iter()
            .flat_map(|queue| queue.in_flight.iter().chain(&queue.owned));
        let mut ring = match &self.enabled {
            Some(queue) => queue.ring.save(held),
            None => RingState::start(self.format),
        };
        if let Some(start) = self.start {
            match &mut ring {
                // Where it is used next is where the driver left it.
                RingState::Split(state) => state.next_available = start.available,
                RingState::Packed(state) => {
                    state.next_available = Position::from_raw(start.available);
                    state.next_used = Position::from_raw(start.used);
                }
            }
        }
        QueueState {
            size: registers.size,
            vector,
            descriptor_area: registers.descriptor_area,
            driver_area: registers.driver_area,
            device_area: registers.device_area,
            enabled: self.is_enabled(),
            stopped: self.is_in(Phase::Stopped) || self.is_in(Phase::Disabling),
            restarts: self.start.is_some(),
            ring,
        }
    }

    /// A queue in the state `saved`. Event suppression is left for [`Self::set_event_index`].
    pub(super) fn restored(
        max_size: u16,
        saved: &QueueState,
        view: &View,
    ) -> Result<Self, RingError> {
        let mut queue = Self::new(max_size);
        queue.format = saved.ring.format();
        queue.registers = QueueRegisters {
            size: saved.size,
            descriptor_area: saved.descriptor_area,
            driver_area: saved.driver_area,
            device_area: saved.device_area,
        };
        if saved.restarts {
            queue.start = Some(match &saved.ring {
                RingState::Split(state) => Start::at(state.next_available),
                RingState::Packed(state) => Start {
                    available: state.next_available.raw(),
                    used: state.next_used.raw(),
                },
            });
        }
        if saved.enabled {
            let mut ring = Ring::new(queue.format, max_size, &queue.registers, view)?;
            let held = match &saved.ring {
                // The driver may have said anything. It is looked at when the queue goes on.
                RingState::Packed(_) if saved.restarts => Vec::new(),
                state => ring.restore(state, view)?,
            };
            let mut enabled = Enabled::new(ring);
            if saved.stopped {
                enabled.phase = Phase::Stopped;
            }
            enabled.owned = held.into();
            queue.enabled = Some(enabled);
        }
        Ok(queue)
    }

    pub(super) fn set_event_index(&mut self, enabled: bool) {
        if let Some(queue) = &mut self.enabled {
            queue.ring.set_event_index(enabled);
        }
    }

    /// The driver may not have been notified of everything that was used: it is notified once more.
    pub(super) fn signal_again(&mut self) {
        if let Some(queue) = &mut self.enabled {
            queue.signal = Signal::Owed;
        }
    }

    /// True if the driver was not notified of everything that was used, or perhaps not.
    pub(super) fn is_unsignalled(&self) -> bool {
        let signal = self.enabled.as_ref().map(|queue| queue.signal);
        signal.is_some_and(|signal| signal != Signal::Nothing)
    }

    /// The driver was notified of everything that was used, but not if this `owes` it that.
    pub(super) fn set_unsignalled(&mut self, owes: bool) {
        if let Some(queue) = &mut self.enabled {
            queue.signal = if owes { Signal::Owed } else { Signal::Nothing };
        }
    }

    /// Asks for a reset of this queue; [`Self::finish_reset`] completes it once nothing is in flight.
    pub(super) fn request_reset(&mut self) {
        if let Some(queue) = &mut self.enabled {
            queue.phase = Phase::Resetting;
        }
        self.start = None;
    }

    /// Completes a requested reset if nothing is in flight. The registers return to their defaults.
    pub(super) fn finish_reset(&mut self) -> bool {
        let ready = self.is_resetting() && self.is_drained();
        if ready {
            *self = Self {
                format: self.format,
                ..Self::new(self.max_size)
            };
        }
        ready
    }

    /// Fetches the next chain: one the function still owns, or the next available one. `None` if there is neither, or the
    /// queue may not be worked on.
    pub(super) fn pop(&mut self, view: &View) -> Result<Option<Chain>, RingError> {
        let Some(queue) = self.enabled.as_mut().filter(|queue| queue.is_usable()) else {
            return Ok(None);
        };
        // The used ring may not be looked at before the queue is worked on.
        if let Some(start) = self.start.take() {
            queue.ring.start_at(view, start)?;
        }
        let found = match queue.owned.front() {
            Some(held) => {
                let chain = queue.ring.again(view, held)?;
                queue.owned.pop_front().map(|held| (chain, held))
            }
            None if queue.phase != Phase::Running => None,
            None => queue.ring.next(view, queue.in_flight.iter())?,
        };
        Ok(found.map(|(chain, held)| {
            queue.in_flight.push_back(held);
            chain
        }))
    }

    /// Takes back the chain that was popped last, as if it had not been fetched.
    pub(super) fn unpop(&mut self, chain: &Chain) {
        let Some(queue) = &mut self.enabled else {
            return;
        };
        let Some(held) = queue.leave(chain.ticket()) else {
            return;
        };
        if chain.was_fetched_again() {
            queue.owned.push_front(held);
        } else {
            queue.ring.put_back(held.ticket);
        }
    }

    /// The device gives up a chain whose execution has not begun; it stays the function's.
    pub(super) fn recall(&mut self, chain: &Chain) {
        if let Some(queue) = &mut self.enabled
            && let Some(held) = queue.leave(chain.ticket())
        {
            queue.owned.push_front(held);
        }
    }

    /// True if chains were fetched that the device is to execute anew.
    pub(super) fn owns_chains(&self) -> bool {
        self.enabled
            .as_ref()
            .is_some_and(|queue| !queue.owned.is_empty())
    }

    /// True if no chain is in flight.
    pub(super) fn is_drained(&self) -> bool {
        self.enabled
            .as_ref()
            .is_none_or(|queue| queue.in_flight.is_empty())
    }

    /// Lets go of a chain without the driver hearing of it.
    pub(super) fn forget(&mut self, ticket: Ticket) {
        if let Some(queue) = &mut self.enabled {
            queue.leave(ticket);
        }
    }

    /// Returns chains to the driver, with so many bytes written. It sees all of them or none.
    pub(super) fn push(
        &mut self,
        view: &View,
        used: impl Iterator<Item = (Ticket, u32)>,
    ) -> Result<(), RingError> {
        let Some(queue) = &mut self.enabled else {
            return Ok(());
        };
        let in_flight = &mut queue.in_flight;
        let used = used.filter(|(ticket, _)| leave(in_flight, *ticket).is_some());
        queue.ring.push(view, used)?;
        if queue.signal == Signal::Nothing {
            queue.signal = Signal::Used;
        }
        Ok(())
    }

    /// Tells the driver not to kick while the ring is being worked on.
    pub(super) fn disable_kicks(&mut self, view: &View) -> Result<(), RingError> {
        match &mut self.enabled {
            Some(queue) => queue.ring.disable_kicks(view),
            None => Ok(()),
        }
    }

    /// True if the device found the ring empty since kicks were last asked for, or declined.
    pub(super) fn is_starved(&self) -> bool {
        let queue = self.enabled.as_ref();
        queue.is_some_and(|queue| queue.ring.is_starved() && queue.is_usable())
    }

    /// Asks for a kick when the next chain is made available. True if one already is that the device has not seen.
    pub(super) fn enable_kicks(&mut self, view: &View) -> Result<bool, RingError> {
        match &mut self.enabled {
            Some(queue) => queue.ring.enable_kicks(view),
            None => Ok(false),
        }
    }

    /// True if chains were used since the last call and the driver wants to hear of it.
    pub(super) fn take_signal(&mut self, view: &View) -> Result<bool, RingError> {
        let Some(queue) = &mut self.enabled else {
            return Ok(false);
        };
        match std::mem::replace(&mut queue.signal, Signal::Nothing) {
            Signal::Nothing => Ok(false),
            Signal::Used => queue.ring.wants_signal(view),
            Signal::Owed => {
                // It hears of everything now.
                queue.ring.wants_signal(view)?;
                Ok(true)
            }
        }
    }
}

/// A chain is no longer one of `in_flight`.
fn leave(in_flight: &mut VecDeque<Held>, ticket: Ticket) -> Option<Held> {
    // Devices that work in order, as most do, return the first.
    let found = in_flight.iter().position(|held| held.ticket == ticket);
    debug_assert!(found.is_some(), "a chain left that was never fetched");
    found.and_then(|at| in_flight.remove(at))
}

impl RingState {
    /// That of rings that are not enabled.
    fn start(format: Format) -> Self {
        match format {
            Format::Split => Self::Split(SplitState::default()),
            Format::Packed => Self::Packed(PackedState::default()),
        }
    }

    /// Which kind of rings it is of.
    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Split(_) => Format::Split,
            Self::Packed(_) => Format::Packed,
        }
    }
}

/// A part of a ring: at `address`, if it is aligned and guest memory.
fn area(
    view: &View,
    area: &'static str,
    address: u64,
    align: u64,
    len: u64,
) -> Result<GuestAddress, RingError> {
    let usable = address.is_multiple_of(align)
        && address != 0
        && view.contains(GuestAddress(address), len as usize);
    usable
        .then_some(GuestAddress(address))
        .ok_or(RingError::Area { area, address })
}

fn default_registers(max_size: u16) -> QueueRegisters {
    QueueRegisters {
        size: max_size,
        descriptor_area: 0,
        driver_area: 0,
        device_area: 0,
    }
}
