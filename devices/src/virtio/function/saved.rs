//! A function's state, taken out and put in: see [`state`](crate::state).

use std::collections::HashSet;

use super::exact::CheckedTransient;
use super::{Core, ISR_QUEUE, Suspend, VirtioFunction, event_index, format};
use crate::gate::Reasons;
use crate::state::{
    FunctionState, PackedState, QueueState, RegisterState, RingState, Shape, SplitState,
};
use crate::virtio::queue::{Format, RingError, Virtqueue};
use crate::virtio::{Cause, NO_VECTOR, Status, feature};

/// Whether a restored state announces itself to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restoration {
    /// As the migration commands want it, whose context does not tell what the driver was told: it gets a configuration
    /// change with a new generation (G3-f), and is notified of used buffers once more.
    Announced,
    /// Not at all: everything is as it was when the state was saved.
    Exact,
}

/// Why a state was rejected. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Requests are in flight, or a reset is under way.
    #[error("the function is not at rest")]
    Busy,
    /// The function was reset since the state was given to it.
    #[error("the function was reset in between")]
    Stale,
    /// Features the device does not offer.
    #[error("the driver accepted features {0:#x}, which this device does not offer")]
    Features(u128),
    /// Device status bits that cannot be set together, or whose features were not negotiated.
    #[error("device_status {0:#x} is none this device can have")]
    Status(u8),
    /// An MSI-X vector the function does not have.
    #[error("MSI-X vector {vector:#x} of {of} is out of range")]
    Vector {
        /// "the configuration", or the queue.
        of: String,
        /// The vector.
        vector: u16,
    },
    /// Another number of queues.
    #[error("{found} queues; this device has {expected}")]
    QueueCount {
        /// In the state.
        found: usize,
        /// Of the device.
        expected: u16,
    },
    /// A register of a queue that cannot have this value.
    #[error("queue {index}: {what}")]
    Queue {
        /// The queue.
        index: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A ring that does not lie in guest memory.
    #[error("queue {index}: {source}")]
    Ring {
        /// The queue.
        index: u16,
        /// What is wrong with it.
        source: RingError,
    },
    /// A device configuration this device cannot have.
    #[error("the device configuration differs from that of this device where it cannot be changed")]
    Config,
    /// A function whose services have a virtqueue that would be lost.
    #[error("the function has an {0}; restore it exactly, together with that")]
    Inexact(&'static str),
    /// The virtqueue of a service that the function does not have.
    #[error("the state has an {0}, and this function has none")]
    NoService(&'static str),
    /// No virtqueue of a service that the function has.
    #[error("the state lacks the {0} of this function")]
    ServiceMissing(&'static str),
    /// ISR status bits that are not defined.
    #[error("ISR status {0:#x} has bits other than 0 and 1")]
    Isr(u8),
    /// The list of queues whose driver is to be notified.
    #[error("unsignalled: queue {0} is not enabled, does not exist, or is not in ascending order")]
    Unsignalled(u16),
    /// What a service keeps besides its virtqueue.
    #[error("{name}: {what}")]
    Service {
        /// The service.
        name: &'static str,
        /// What is wrong.
        what: String,
    },
    /// State of the device type's own.
    #[error("the state of the device type's own: {0}")]
    Device(&'static str),
}

/// What was found out about a state when it was checked: that it is good, and its queues in running form. It stays true of
/// the function that found it out, whatever happens to that.
#[derive(Debug)]
pub struct CheckedState {
    driver_features: u64,
    status: Status,
    queues: Vec<Virtqueue>,
}

impl VirtioFunction {
    /// What bounds the saved forms of this function.
    pub fn shape(&self) -> Shape {
        let core = self.lock();
        let queues = core.queues.iter().take(self.device_queues.into());
        Shape {
            queue_sizes: queues.map(Virtqueue::max_size).collect(),
            config_len: self.device_config_len,
            queue_status: core.has_queue_status,
            packed: core.offered() & feature::RING_PACKED != 0,
        }
    }

    /// The function's state now. Chains that are in flight are in it as owned by the device; of a function at rest, none
    /// are but those it gave up.
    pub fn save(&self) -> FunctionState {
        let core = self.lock();
        let queues = (0..self.device_queues).zip(&core.queues);
        let queues = queues.map(|(index, queue)| queue.save(self.vector(Cause::Queue(index))));
        FunctionState {
            offered: core.offered().into(),
            accepted: core.driver_features.into(),
            registers: RegisterState {
                device_feature_select: core.selectors.device_feature,
                driver_feature_select: core.selectors.driver_feature,
                config_vector: self.vector(Cause::Config),
                num_queues: self.device_queues,
                status: core.shown_status().bits(),
                config_generation: core.config_generation,
                queue_select: core.selectors.queue,
                state_queue_select: core.selectors.state_queue,
            },
            queues: queues.collect(),
            config: core.device.config().to_vec(),
        }
    }

    /// Whether the function could be put into `state`, which announces itself; what it would be then.
    ///
    /// # Errors
    ///
    /// As [`Self::restore`].
    pub fn check(&self, state: &FunctionState) -> Result<CheckedState, RestoreError> {
        let core = self.lock();
        core.serves_nobody()?;
        self.checked(&core, state)
    }

    /// Puts the function into `state`, all of it or none of it, and announces that to its driver. It starts to work when its
    /// gate opens; reasons that are not the driver's stay as they are.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong; [`RestoreError::Inexact`] for a function with services, which only
    /// [`Self::restore_exact`] restores whole.
    pub fn restore(&self, state: &FunctionState) -> Result<(), RestoreError> {
        self.restore_locked(&mut self.lock(), state, None, Restoration::Announced)
    }

    pub(super) fn restore_locked(
        &self,
        core: &mut Core,
        state: &FunctionState,
        checked: Option<CheckedState>,
        how: Restoration,
    ) -> Result<(), RestoreError> {
        core.serves_nobody()?;
        core.at_rest()?;
        let checked = match checked {
            Some(checked) => checked,
            None => self.checked(core, state)?,
        };
        self.commit(core, state, checked, how, None);
        Ok(())
    }

    pub(super) fn checked(
        &self,
        core: &Core,
        state: &FunctionState,
    ) -> Result<CheckedState, RestoreError> {
        let offered = core.offered();
        let accepted = u64::try_from(state.accepted).ok();
        // Before FEATURES_OK they are what the driver wrote, and nothing says that it will get them.
        let settled = state.registers.status & Status::FEATURES_OK.bits() != 0;
        let driver_features = accepted
            .filter(|features| !settled || features & !offered == 0)
            .ok_or(RestoreError::Features(
                state.accepted & !u128::from(offered),
            ))?;
        let status = core.checked_status(state.registers.status, driver_features)?;
        self.check_vector(state.registers.config_vector, || "the configuration".into())?;
        if state.queues.len() != usize::from(self.device_queues) {
            return Err(RestoreError::QueueCount {
                found: state.queues.len(),
                expected: self.device_queues,
            });
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        let event_index = event_index(status, driver_features);
        let format = format(status, driver_features);
        for (index, (saved, queue)) in (0..).zip(state.queues.iter().zip(&core.queues)) {
            let mut queue = self.checked_queue(core, index, saved, queue, format)?;
            queue.set_event_index(event_index);
            queues.push(queue);
        }
        let fits = state.config.len() == self.device_config_len;
        if !fits || !core.device.accepts_config(&state.config, driver_features) {
            return Err(RestoreError::Config);
        }
        Ok(CheckedState {
            driver_features,
            status,
            queues,
        })
    }

    /// What a saved form says of where interrupts of `cause` go.
    pub(super) fn vector(&self, cause: Cause) -> u16 {
        self.interrupt.get().map_or(NO_VECTOR, |i| i.vector(cause))
    }

    fn check_vector(&self, vector: u16, of: impl Fn() -> String) -> Result<(), RestoreError> {
        let vectors = self.interrupt.get().map_or(0, |i| i.vectors());
        if vector == NO_VECTOR || vector < vectors {
            return Ok(());
        }
        Err(RestoreError::Vector { of: of(), vector })
    }

    /// The queue that `saved` is.
    pub(super) fn checked_queue(
        &self,
        core: &Core,
        index: u16,
        saved: &QueueState,
        queue: &Virtqueue,
        format: Format,
    ) -> Result<Virtqueue, RestoreError> {
        self.check_vector(saved.vector, || format!("queue {index}"))?;
        check_queue(saved, queue, format, core.has_queue_status)
            .map_err(|what| RestoreError::Queue { index, what })?;
        Virtqueue::restored(queue.max_size(), saved, &core.view)
            .map_err(|source| RestoreError::Ring { index, source })
    }

    /// Puts the function into a state that was `checked`. What is not in it is as after a reset, unless it is in `transient`.
    pub(super) fn commit(
        &self,
        core: &mut Core,
        state: &FunctionState,
        checked: CheckedState,
        how: Restoration,
        transient: Option<CheckedTransient<'_>>,
    ) {
        let CheckedState {
            driver_features,
            status,
            queues,
        } = checked;
        // Those that wait are executed anew if they are in the state.
        core.call_off_commands();
        // All of them are replaced, whatever they are. There may be hundreds, and a guest waits for them.
        let replaced = std::mem::replace(&mut core.queues, queues);
        // Those of services come after those of the device.
        let (transient, served) = transient.map(CheckedTransient::take_queues).unzip();
        let served_vectors = core.served_vectors(transient);
        let others = replaced.iter().skip(core.queues.len());
        let reset = others.map(|queue| Virtqueue::new(queue.max_size()));
        match served {
            Some(served) => core.queues.extend(served),
            None => core.queues.extend(reset),
        }
        core.reset_registers();
        core.driver_features = driver_features;
        let registers = &state.registers;
        core.selectors.device_feature = registers.device_feature_select;
        core.selectors.driver_feature = registers.driver_feature_select;
        core.selectors.queue = registers.queue_select;
        if core.doors.queue_status {
            core.selectors.state_queue = registers.state_queue_select;
        }
        if let Some(interrupt) = self.interrupt.get() {
            let own = state.queues.iter().map(|queue| queue.vector);
            let mut vectors = own.chain(served_vectors);
            interrupt.assign(registers.config_vector, &mut vectors);
        }
        core.config_generation = match how {
            // Whoever was reading the configuration reads it again (G3-f).
            Restoration::Announced => registers.config_generation.wrapping_add(1),
            Restoration::Exact => registers.config_generation,
        };
        core.device.restore_config(&state.config);
        let suspended = status.contains(Status::SUSPEND);
        let doors = Status::SUSPEND | Status::DEVICE_STOPPED;
        core.status = status - doors;
        if suspended {
            core.gate.close(Reasons::SUSPENDED);
            // The SUSPEND of virtio 1.4 hides it.
            core.status |= Status::DRIVER_OK;
        }
        if status.contains(Status::DEVICE_STOPPED) {
            core.gate.close(Reasons::DEVICE_STOPPED);
        }
        if status.contains(Status::NEEDS_RESET) {
            core.gate.close(Reasons::BROKEN);
        }
        let live = core.status.contains(Status::DRIVER_OK);
        if live {
            let event_index = core.event_index();
            let served = core.queues.iter_mut().skip(self.device_queues.into());
            served.for_each(|queue| queue.set_event_index(event_index));
            core.device.activate(driver_features);
            for queue in &mut core.services {
                queue.service_mut().activate(driver_features);
            }
        }
        if let Some(transient) = transient {
            core.apply_transient(transient);
        }
        if live && how == Restoration::Announced {
            // What was not announced when the state was saved is not in it, and so is announced again.
            for queue in &mut core.queues {
                queue.signal_again();
            }
            core.isr = ISR_QUEUE;
            core.config_pending = true;
        }
        if live {
            self.open(core, Reasons::NO_DRIVER);
        }
        self.doorbells_changed();
    }
}

impl Core {
    /// An error if there are services, whose virtqueues are a part of no [`FunctionState`].
    pub(super) fn serves_nobody(&self) -> Result<(), RestoreError> {
        match self.services.first() {
            Some(queue) => Err(RestoreError::Inexact(queue.service().name())),
            None => Ok(()),
        }
    }

    /// An error unless nothing is in flight and no reset is under way.
    pub(super) fn at_rest(&self) -> Result<(), RestoreError> {
        if self.gate.reasons().contains(Reasons::RESET) || !self.drained() {
            return Err(RestoreError::Busy);
        }
        Ok(())
    }

    /// The bits of a saved device status, if the device can show them together.
    fn checked_status(&self, raw: u8, driver_features: u64) -> Result<Status, RestoreError> {
        let refused = RestoreError::Status(raw);
        let Some(status) = Status::from_bits(raw) else {
            return Err(refused);
        };
        let accepted =
            |number: Option<u8>| number.is_some_and(|n| n < 64 && driver_features & 1 << n != 0);
        let has = |bit| status.contains(bit);
        let live = has(Status::DRIVER_OK);
        let negotiated = has(Status::FEATURES_OK);
        let suspend_fits = match self.doors.suspend {
            _ if !has(Status::SUSPEND) => true,
            Some(Suspend::V5) => live,
            Some(Suspend::V1_4) => !live && negotiated,
            None => false,
        };
        let suspend_number = self.doors.suspend.map(Suspend::feature);
        // The suspended device of virtio 1.4 is live behind its status.
        let runs = live || has(Status::SUSPEND);
        let good = (!negotiated || driver_features & feature::VERSION_1 != 0)
            && (!live || negotiated)
            && suspend_fits
            && (!has(Status::SUSPEND) || accepted(suspend_number))
            && (!has(Status::DEVICE_STOPPED) || (runs && accepted(self.doors.device_stop)));
        good.then_some(status).ok_or(refused)
    }
}

/// What is wrong with a saved queue, but for its addresses.
fn check_queue(
    saved: &QueueState,
    queue: &Virtqueue,
    format: Format,
    can_stop: bool,
) -> Result<(), &'static str> {
    if saved.ring.format() != format {
        return Err("its rings are not of the kind that the driver negotiated");
    }
    if !format.allows(saved.size) || saved.size > queue.max_size() {
        return Err(match format {
            Format::Split => "queue_size is not a power of two within the maximum",
            Format::Packed => "queue_size is 0 or beyond the maximum",
        });
    }
    if !saved.enabled && saved.stopped {
        return Err("stopped without being enabled");
    }
    if (saved.stopped || saved.restarts) && !can_stop {
        return Err(match saved.enabled {
            true => "stopped, which this device does not offer",
            false => "a place to go on at, which this device does not offer",
        });
    }
    match &saved.ring {
        RingState::Split(ring) => check_split(saved, ring),
        RingState::Packed(ring) => check_packed(saved, ring),
    }
}

fn check_split(saved: &QueueState, ring: &SplitState) -> Result<(), &'static str> {
    if !saved.enabled {
        let start = SplitState {
            next_available: ring.next_available,
            ..SplitState::default()
        };
        return match ring {
            SplitState { owned, .. } if !owned.is_empty() => {
                Err("descriptors owned without being enabled")
            }
            _ if ring.next_available != 0 && !saved.restarts => {
                Err("an available index without being enabled")
            }
            _ if *ring != start => Err("a used index without being enabled"),
            _ => Ok(()),
        };
    }
    let mut seen = HashSet::with_capacity(ring.owned.len());
    let once = |head: &u16| *head < saved.size && seen.insert(*head);
    match ring.owned.iter().all(once) {
        true => Ok(()),
        false => Err("an owned descriptor is out of range or listed twice"),
    }
}

fn check_packed(saved: &QueueState, ring: &PackedState) -> Result<(), &'static str> {
    if !saved.enabled {
        return match (saved.restarts, ring) {
            (_, PackedState { owned, .. }) if !owned.is_empty() => {
                Err("chains owned without being enabled")
            }
            (false, ring) if *ring != PackedState::default() => {
                Err("positions without being enabled")
            }
            _ => Ok(()),
        };
    }
    let mut ids = HashSet::with_capacity(ring.owned.len());
    let mut descriptors = 0;
    for chain in &ring.owned {
        let size = usize::from(chain.descriptors);
        if size == 0 || chain.buffers.len() > size {
            return Err("an owned chain has more buffers than descriptors, or none of these");
        }
        if !ids.insert(chain.id) {
            return Err("a buffer id is owned twice");
        }
        descriptors += u32::from(chain.descriptors);
    }
    let between = ring.next_used.distance(ring.next_available, saved.size);
    match saved.restarts {
        true if descriptors > 0 => Err("chains owned where the driver said that it goes on"),
        false if between != descriptors => {
            Err("the owned chains are not what is between the two positions")
        }
        _ => Ok(()),
    }
}
