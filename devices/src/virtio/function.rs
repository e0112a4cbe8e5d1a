//! One virtio function: the gate, and the device behind it, in its turns on the I/O thread. What drivers, hypervisors and
//! saved forms see of it is in the submodules.

mod commands;
mod construct;
mod doors;
mod exact;
mod member;
mod registers;
mod saved;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::device::{ConfigChange, Io, Progress, Source, VirtioDevice};
use super::interrupt::{Cause, Interrupt};
use super::queue::{Format, QueueRegisters, RingError, Virtqueue};
use super::service::ServiceQueue;
use super::{DeviceType, Status, Warnings, feature};
use crate::gate::{Gate, Patience, Reasons};
use crate::memory::View;
pub use commands::QueueError;
pub use construct::Offer;
pub use doors::{Doors, Suspend};
pub use member::{Epoch, Rest, Wake};
pub use registers::Selectors;
pub use saved::{CheckedState, Restoration, RestoreError};

/// Chains one call may fetch, however often it looks at its ring, before others get their turn at the function: its
/// other queues, and vCPUs that wait for its lock.
const BUDGET: u32 = 1024;

/// Token of the sources of the first service. Those of the others follow, up to [`ANNOUNCE_TOKEN`].
const SERVICE_TOKEN: u16 = 0xff00;
/// Stands for [`VirtioFunction::request_announcement`] where tokens of sources do.
const ANNOUNCE_TOKEN: u16 = u16::MAX;

/// ISR status bit: a virtqueue was used.
const ISR_QUEUE: u8 = 1;
/// ISR status bit: the configuration changed, or the device needs a reset.
const ISR_CONFIG: u8 = 2;

/// What a driver sees of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueInfo {
    /// The registers.
    pub registers: QueueRegisters,
    /// The largest size the driver may choose.
    pub max_size: u16,
    /// `queue_enable`.
    pub enabled: bool,
    /// `queue_reset`: a reset of this queue is under way.
    pub resetting: bool,
}

/// A virtio function. Shared by the transport (vCPU threads) and the I/O thread; see the module documentation of
/// [`virtio`](super) for who calls what.
pub struct VirtioFunction {
    name: String,
    core: Mutex<Core>,
    /// Signalled whenever the last request in flight was returned.
    drained: Condvar,
    kicks: Vec<Arc<EventFd>>,
    interrupt: OnceLock<Arc<dyn Interrupt>>,
    /// Signalled when it became live without a write of its driver.
    revived: OnceLock<Arc<EventFd>>,
    device_type: DeviceType,
    /// Of the device, and of its services behind that.
    config_len: usize,
    /// Of the device.
    device_config_len: usize,
    /// Queues of the device; those of services come after them.
    device_queues: u16,
    doors: Doors,
    /// Of a member: who wants to know when it comes to rest.
    wake: OnceLock<Arc<dyn Wake>>,
    /// About its driver. A reset does not start them over.
    warnings: Warnings,
}

struct Core {
    device: Box<dyn VirtioDevice>,
    view: View,
    queues: Vec<Virtqueue>,
    /// What serves the last of `queues`, one each.
    services: Vec<ServiceQueue>,
    /// Features that the transport has, apart from those of every transport.
    transport_features: u64,
    /// Of all features, those that may be offered: all, unless whoever made the device for its driver chose some.
    allowed_features: u64,
    /// Its driver can stop single virtqueues and say where they go on, by the device-state capability or by commands.
    has_queue_status: bool,
    gate: Gate,
    doors: Doors,
    /// Without the bits of the doors, which the gate has.
    status: Status,
    selectors: Selectors,
    driver_features: u64,
    config_generation: u8,
    isr: u8,
    /// The configuration changed while the gate was closed; announced when it opens.
    config_pending: bool,
    /// Tokens of the sources that became readable while the device was to be still, and [`ANNOUNCE_TOKEN`]. They are handed
    /// to it when the gate opens.
    missed: Vec<u16>,
    /// The driver is to be notified of everything once more when the gate opens.
    signal_again: bool,
    /// The gate opened, and the rings were not looked at since. A kick of the first queue is under way.
    rescan: bool,
    /// Someone asked whether nothing is in flight, and wants to be woken when that is so.
    awaited: bool,
    /// Function level resets and the like.
    epoch: Epoch,
}

impl VirtioFunction {
    /// The name given at construction.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device type.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// The doors it offers its driver.
    pub fn doors(&self) -> Doors {
        self.doors
    }

    /// True if it offers its driver packed rings.
    pub fn offers_packed(&self) -> bool {
        self.lock().offered() & feature::RING_PACKED != 0
    }

    // The gate -----------------------------------------------------------------------------------------------------

    /// Stops the function for `reason`: nothing more is fetched. What is in flight still completes; [`Self::stop`] waits
    /// for it.
    pub fn close(&self, reason: Reasons) {
        self.lock().gate.close(reason);
    }

    /// Stops the function for `reason` and waits until nothing is in flight, with `patience`. False if it runs out; the
    /// reason stays.
    #[must_use]
    pub fn stop(&self, reason: Reasons, patience: Patience) -> bool {
        // With nothing in flight, a reset waits for what a service is responsible for.
        let in_flight =
            |core: &Core| !core.drained() || core.gate.reasons().contains(Reasons::RESET);
        let stopped = Instant::now();
        let mut core = self.lock();
        core.gate.close(reason);
        let Patience {
            recall_after,
            give_up_after,
        } = patience;
        let first = recall_after.min(give_up_after);
        let (mut core, drained) = self.wait_while(core, stopped, first, in_flight);
        if drained || recall_after > give_up_after {
            return drained;
        }
        self.recall_unbegun(&mut core);
        self.wait_while(core, stopped, give_up_after, in_flight).1
    }

    /// Recalls requests whose execution has not begun, as [`Self::stop`] does when they took too long. Whoever stops many
    /// functions does this for all of them before it waits for one. Without effect on a function that runs.
    pub fn recall(&self) {
        self.recall_unbegun(&mut self.lock());
    }

    fn recall_unbegun(&self, core: &mut Core) {
        if core.gate.is_open() {
            return;
        }
        // The gate is closed, so this fetches nothing.
        let (device, _, mut io) = core.io(0);
        device.recall(&mut io);
        self.settle(core);
    }

    /// Waits for as long as `unfinished` says so, until `patience` after `since`. Whether it no longer does.
    fn wait_while<'a>(
        &self,
        mut core: MutexGuard<'a, Core>,
        since: Instant,
        patience: Duration,
        unfinished: impl Fn(&Core) -> bool,
    ) -> (MutexGuard<'a, Core>, bool) {
        while unfinished(&core) {
            let Some(left) = patience.checked_sub(since.elapsed()) else {
                return (core, false);
            };
            core = self
                .drained
                .wait_timeout(core, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        (core, true)
    }

    /// Removes `reason`. If it was the last, every enabled ring is looked at again.
    pub fn reopen(&self, reason: Reasons) {
        let mut core = self.lock();
        self.open(&mut core, reason);
    }

    /// Why the function is stopped; empty while it runs.
    pub fn reasons(&self) -> Reasons {
        self.lock().gate.reasons()
    }

    // The I/O thread -----------------------------------------------------------------------------------------------

    /// Descriptors to watch for the device, and for services.
    pub fn sources(&self) -> Vec<Source> {
        let core = self.lock();
        let mut sources = core.device.sources();
        for (token, service) in (SERVICE_TOKEN..ANNOUNCE_TOKEN).zip(&core.services) {
            let fds = service.wake_fds().into_iter();
            sources.extend(fds.map(|fd| Source { fd, token }));
        }
        sources
    }

    /// Queue `index` was kicked: works on it until it is empty or waits for its backend.
    pub fn service(&self, index: u16) {
        let mut core = self.lock();
        if !core.gate.is_open() {
            return;
        }
        self.scan(&mut core, index);
        for token in std::mem::take(&mut core.missed) {
            self.handle(&mut core, token);
        }
        let outcome = self.work(&mut core, index);
        self.conclude(&mut core, index, outcome);
    }

    /// The device's source `token` became readable.
    pub fn on_event(&self, token: u16) {
        let mut core = self.lock();
        if core.gate.reasons().contains(Reasons::RESET) && core.service_of(token).is_some() {
            // Commands were called off. What else the service does may have come to its end.
            return self.settle(&mut core);
        }
        // What a command waits for may come while no memory can be reached for the answer, or while nothing of the guest may
        // happen.
        let waits = match core.service_of(token) {
            Some(_) => core
                .gate
                .reasons()
                .intersects(Reasons::NO_DMA | Reasons::PAUSED),
            None => core.is_acknowledged(Reasons::STILL),
        };
        if waits {
            if !core.missed.contains(&token) {
                core.missed.push(token);
            }
            return;
        }
        self.handle(&mut core, token);
    }

    /// The machine is at another place of its networks: a driver that can announce itself there is asked to, now or when the
    /// function is not to be still any more.
    pub fn request_announcement(&self) {
        self.on_event(ANNOUNCE_TOKEN);
    }

    fn handle(&self, core: &mut Core, token: u16) {
        let served = core.service_of(token);
        let (device, services, mut io) = core.io(BUDGET);
        let service = served.and_then(|slot| Some((slot, services.get_mut(slot)?)));
        let outcome = match (token, service) {
            (_, Some((slot, service))) => service.resume(self.device_queues + slot as u16, &mut io),
            (ANNOUNCE_TOKEN, None) => {
                device.request_announcement(&mut io);
                Ok(())
            }
            _ => device.on_event(token, &mut io),
        };
        let (more, change) = (io.more, io.config);
        core.note_config(change);
        if more {
            (0..self.total_queues()).for_each(|q| self.kick(q));
        }
        self.conclude(core, 0, outcome);
    }

    fn work(&self, core: &mut Core, index: u16) -> Result<(), RingError> {
        let slot = usize::from(index);
        let mut budget = BUDGET;
        // A queue that is stopped or waits for its reset has chains nobody may fetch; they must not count as work.
        while core.visible(index).is_some_and(Virtqueue::is_usable) {
            if let Some(queue) = core.queues.get_mut(slot) {
                queue.disable_kicks(&core.view)?;
            }
            let served = core.service_behind(index);
            let (device, services, mut io) = core.io(budget);
            let progress = match served.and_then(|slot| services.get_mut(slot)) {
                Some(service) => service.process(index, &mut io),
                None => device.process(index, &mut io),
            };
            let (more, change) = (io.more, io.config);
            // A driver that keeps adding chains does not get a new budget with each of them.
            budget = io.budget;
            // Also after an error: what changed before it stays changed.
            core.note_config(change);
            let progress = progress?;
            if more {
                self.kick(index);
                return Ok(());
            }
            if progress == Progress::Waiting {
                return Ok(());
            }
            let Some(queue) = core.queues.get_mut(slot) else {
                return Ok(());
            };
            if !queue.enable_kicks(&core.view)? || !core.gate.is_open() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// After a device had its turn: interrupts, errors, and whatever waited for the drain.
    fn conclude(&self, core: &mut Core, index: u16, outcome: Result<(), RingError>) {
        if let Err(error) = outcome {
            self.needs_reset(core, index, &error);
        }
        let reachable = core.may_reach_out();
        for slot in (0..core.queues.len()).filter(|_| reachable) {
            let Some(queue) = core.queues.get_mut(slot) else {
                continue;
            };
            // A source emptied the ring: without a kick its device would not learn of the next chain.
            if queue.is_starved() {
                match queue.enable_kicks(&core.view) {
                    Ok(false) => {}
                    Ok(true) => self.kick(slot as u16),
                    Err(error) => self.needs_reset(core, slot as u16, &error),
                }
            }
            let Some(queue) = core.queues.get_mut(slot) else {
                continue;
            };
            match queue.take_signal(&core.view) {
                Ok(false) => {}
                Ok(true) => {
                    core.isr |= ISR_QUEUE;
                    self.send(core, Cause::Queue(slot as u16));
                }
                Err(error) => self.needs_reset(core, slot as u16, &error),
            }
        }
        self.announce_config(core);
        self.settle(core);
    }

    /// Asks for the reset of the device: nothing more is fetched, what can be called off is, and when nothing is in flight
    /// any more it happens.
    fn start_reset(&self, core: &mut Core) {
        core.gate.close(Reasons::RESET);
        // The gate is closed, so this fetches nothing.
        let (device, _, mut io) = core.io(0);
        device.call_off(&mut io);
        core.call_off_commands();
        for queue in &mut core.services {
            queue.service_mut().begin_reset();
        }
        self.settle(core);
    }

    /// Completes what waits for the drain: a queue that is reset or disabled, a device reset, a thread in [`Self::stop`].
    fn settle(&self, core: &mut Core) {
        let mut settled = false;
        for (index, queue) in (0..).zip(&mut core.queues) {
            settled |= queue.finish_disabling();
            if queue.finish_reset() {
                settled = true;
                if let Some(interrupt) = self.interrupt.get() {
                    interrupt.reset_queue(index);
                }
            }
        }
        if !core.drained() {
            // Who asked for one queue does not wait for the others.
            if settled {
                self.wake(core);
            }
            return;
        }
        let mut services = core.services.iter();
        if core.gate.reasons().contains(Reasons::RESET)
            && services.all(|queue| queue.service().is_at_rest())
        {
            core.reset();
            if let Some(interrupt) = self.interrupt.get() {
                interrupt.reset();
            }
        }
        self.drained.notify_all();
        self.wake(core);
    }

    fn wake(&self, core: &mut Core) {
        if std::mem::take(&mut core.awaited)
            && let Some(wake) = self.wake.get()
        {
            wake.wake();
        }
    }

    fn open(&self, core: &mut Core, reason: Reasons) {
        let opened = core.gate.open(reason);
        core.owe_again();
        self.send_pending(core);
        self.announce_config(core);
        if !opened {
            return;
        }
        // However many queues there are: whoever opens the gate may be one who counts the microseconds.
        core.rescan = true;
        self.kick(0);
    }

    /// If the gate opened since the rings were last looked at, they all are: queue `current` now, the others in turns of
    /// their own.
    fn scan(&self, core: &mut Core, current: u16) {
        if !std::mem::take(&mut core.rescan) {
            return;
        }
        for (index, queue) in (0..).zip(&core.queues) {
            if queue.is_enabled() && index != current {
                self.kick(index);
            }
        }
    }

    /// Tells the driver of a change of the configuration, or that the device needs a reset, unless that has to wait.
    fn announce_config(&self, core: &mut Core) {
        let closed = core.gate.reasons() - Reasons::BROKEN;
        if !core.config_pending || !closed.is_empty() {
            return;
        }
        core.config_pending = false;
        core.isr |= ISR_CONFIG;
        self.send(core, Cause::Config);
    }

    /// The driver broke a ring. Nothing more is fetched until it resets the device.
    fn needs_reset(&self, core: &mut Core, index: u16, error: &RingError) {
        if core.gate.reasons().contains(Reasons::BROKEN) {
            return;
        }
        if let Some(count) = self.warnings.another() {
            tracing::warn!(function = %self.name, queue = index, %error, count,
                "driver broke a virtqueue; device needs reset");
        }
        core.gate.close(Reasons::BROKEN);
        core.status |= Status::NEEDS_RESET;
        if core.status.contains(Status::DRIVER_OK) {
            core.config_pending = true;
            self.announce_config(core);
        }
    }

    /// Vectors were unmasked that had been signalled: their messages are sent, now or when the gate lets them pass.
    pub fn deliver_pending(&self) {
        self.send_pending(&self.lock());
    }

    fn send_pending(&self, core: &Core) {
        if let Some(interrupt) = self.interrupt.get().filter(|_| core.may_send()) {
            interrupt.deliver_pending();
        }
    }

    fn send(&self, core: &Core, cause: Cause) {
        if let Some(interrupt) = self.interrupt.get().filter(|_| core.may_reach_out()) {
            interrupt.signal(cause);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Core {
    fn offered(&self) -> u64 {
        self.all_features() & self.allowed_features
    }

    /// All features that it has, whether or not they may be offered.
    fn all_features(&self) -> u64 {
        let services = self.services.iter();
        let served = services.fold(0, |all, queue| all | queue.service().feature());
        let transport = feature::TRANSPORT | self.transport_features;
        self.device.features() | transport | self.doors.features() | served
    }

    /// Queues of the device.
    fn device_queues(&self) -> usize {
        self.queues.len() - self.services.len()
    }

    /// Which of the services serves queue `index`.
    fn service_behind(&self, index: u16) -> Option<usize> {
        let slot = usize::from(index).checked_sub(self.device_queues())?;
        (slot < self.services.len()).then_some(slot)
    }

    /// The service whose sources have this token.
    fn service_of(&self, token: u16) -> Option<usize> {
        let slot = usize::from(token.checked_sub(SERVICE_TOKEN)?);
        (slot < self.services.len()).then_some(slot)
    }

    /// True for the virtqueue of a service that the driver did not ask for.
    fn hides(&self, index: u16) -> bool {
        let service = self.service_behind(index);
        let service = service.and_then(|slot| self.services.get(slot));
        service.is_some_and(|queue| self.driver_features & queue.service().feature() == 0)
    }

    /// Queue `index`, if there is one for this driver.
    fn visible(&self, index: u16) -> Option<&Virtqueue> {
        let queue = self.queues.get(usize::from(index));
        queue.filter(|_| !self.hides(index))
    }

    /// The commands that services wait for are abandoned.
    fn call_off_commands(&mut self) {
        (0..self.services.len()).for_each(|slot| self.call_off_command(slot));
    }

    /// The command that a service waits for is abandoned.
    fn call_off_command(&mut self, slot: usize) {
        let index = (self.device_queues() + slot) as u16;
        let (_, services, mut io) = self.io(0);
        if let Some(service) = services.get_mut(slot) {
            service.call_off(index, &mut io);
        }
    }

    fn features_acceptable(&self) -> bool {
        // A ring that is in use already is of the kind that goes without an agreement.
        let in_use = self.queues.iter().any(Virtqueue::is_enabled);
        self.driver_features & !self.offered() == 0
            && self.driver_features & feature::VERSION_1 != 0
            && (self.driver_features & feature::RING_PACKED == 0 || !in_use)
            && self
                .services
                .iter()
                .all(|queue| queue.service().agrees(self.driver_features))
    }

    fn event_index(&self) -> bool {
        event_index(self.status, self.driver_features)
    }

    /// Which rings its driver uses.
    fn format(&self) -> Format {
        format(self.status, self.driver_features)
    }

    /// Notes that the device changed its configuration. The generation moves at once, so that a driver that is
    /// reading sees it; the interrupt may have to wait for the gate.
    fn note_config(&mut self, change: ConfigChange) {
        if change > ConfigChange::None {
            self.config_generation = self.config_generation.wrapping_add(1);
        }
        if change == ConfigChange::Unexpected {
            self.config_pending = true;
        }
    }

    /// Splits the core into the device, the services, and what they may touch, to fetch at most `budget` chains.
    fn io(&mut self, budget: u32) -> (&mut dyn VirtioDevice, &mut [ServiceQueue], Io<'_>) {
        let io = Io {
            view: &self.view,
            queues: &mut self.queues,
            gate: &self.gate,
            budget,
            more: false,
            config: ConfigChange::None,
        };
        (&mut *self.device, &mut self.services, io)
    }

    /// False when neither rings nor messages are within reach. Without bus mastering, whoever opens the gate comes back
    /// for them; and when a reset was asked for, nobody waits for them any more.
    fn may_reach_out(&self) -> bool {
        let unreachable = Reasons::NO_DMA | Reasons::RESET;
        !self.gate.reasons().intersects(unreachable)
    }

    /// False while no message may leave the function, not even one that only a mask held back: without bus mastering, and
    /// once a stop is acknowledged (S1-14, S3-8, S3-16).
    fn may_send(&self) -> bool {
        self.may_reach_out() && !self.is_acknowledged(Reasons::STILL)
    }

    /// True if nothing is in flight; with a closed gate, nothing more will happen. A command that waits does not count. It is
    /// the only one of its queue, since those behind it stay on the ring.
    fn drained(&self) -> bool {
        let (own, served) = self.queues.split_at(self.device_queues());
        let mut served = served.iter().zip(&self.services);
        own.iter().all(Virtqueue::is_drained)
            && served.all(|(queue, service)| service.is_waiting() || queue.is_drained())
    }

    fn reset(&mut self) {
        for queue in &mut self.queues {
            *queue = Virtqueue::new(queue.max_size());
        }
        self.reset_registers();
    }

    /// Everything but the queues.
    fn reset_registers(&mut self) {
        self.device.reset();
        self.services.iter_mut().for_each(ServiceQueue::reset);
        self.status = Status::empty();
        self.selectors = Selectors::default();
        self.driver_features = 0;
        self.isr = 0;
        self.config_pending = false;
        self.signal_again = false;
        // The driver that would have been asked is gone.
        self.missed.retain(|token| *token != ANNOUNCE_TOKEN);
        self.gate.close(Reasons::NO_DRIVER);
        // NO_DRIVER is set, so this cannot be the last reason.
        let _ = self.gate.open(Reasons::UNTIL_RESET);
    }
}

/// Whether indices of events say when to notify, for a driver with these features.
fn event_index(status: Status, driver_features: u64) -> bool {
    status.contains(Status::FEATURES_OK) && driver_features & feature::EVENT_IDX != 0
}

/// Which rings a driver with these features uses.
fn format(status: Status, driver_features: u64) -> Format {
    match status.contains(Status::FEATURES_OK) && driver_features & feature::RING_PACKED != 0 {
        true => Format::Packed,
        false => Format::Split,
    }
}

/// The 32 bits of `features` at `32 * select`.
fn window(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

/// The configuration of a service begins here, behind that of the device and of the services before it, `len` bytes in all.
fn config_start(len: usize) -> usize {
    len.next_multiple_of(8)
}

/// Where `config`, that of a service, ends behind `len` bytes. One without any takes no place.
fn config_end(len: usize, config: &[u8]) -> usize {
    match config {
        [] => len,
        config => config_start(len) + config.len(),
    }
}
