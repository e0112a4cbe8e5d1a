//! One virtio function: the registers every transport shows, the gate, and the device behind them.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Io, Progress, Source, VirtioDevice};
use super::queue::{NO_VECTOR, QueueRegisters, RingError, Virtqueue};
use super::{DeviceType, Status, Warnings, feature};
use crate::admin::{self, AdminQueue, Member, Owner};
use crate::bus::Effect;
use crate::gate::{Gate, Reasons};
use crate::memory::View;

/// Chains one call may fetch, however often it looks at its ring, before others get their turn at the function: its
/// other queues, and vCPUs that wait for its lock.
const BUDGET: u32 = 1024;

/// ISR status bit: a virtqueue was used.
const ISR_QUEUE: u8 = 1;
/// ISR status bit: the configuration changed, or the device needs a reset.
const ISR_CONFIG: u8 = 2;

/// How a function interrupts the guest. Implemented by the transport.
///
/// Called with the function's lock held: an implementation must not call back into the function, and must not hold,
/// while it calls the function, a lock it takes here.
pub trait Interrupt: Send + Sync {
    /// Sends the message of `vector`. Never called with [`NO_VECTOR`]; a vector out of range is ignored.
    fn signal(&self, vector: u16);
}

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
    device_type: DeviceType,
    config_len: usize,
    /// Queues of the device; the administration virtqueue of an owner comes after them.
    device_queues: u16,
    owner: Option<Arc<Owner>>,
    /// About its driver. A reset does not start them over.
    warnings: Warnings,
}

struct Core {
    device: Box<dyn VirtioDevice>,
    view: View,
    queues: Vec<Virtqueue>,
    /// Of an owner: what serves its administration virtqueue, the last of `queues`.
    admin: Option<AdminQueue>,
    gate: Gate,
    status: Status,
    driver_features: u64,
    config_vector: u16,
    config_generation: u8,
    isr: u8,
    /// The configuration changed while the gate was closed; announced when it opens.
    config_pending: bool,
}

impl VirtioFunction {
    /// Puts `device` behind a function. `name` is used in messages. Bus mastering starts out enabled: a transport
    /// that has such a control closes the gate for it.
    pub fn new(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
    ) -> std::io::Result<Arc<Self>> {
        Self::build(name.into(), device, view, None)
    }

    /// The same for a device that owns others. It has an administration virtqueue after those of the device, and
    /// offers VIRTIO_F_ADMIN_VQ and VIRTIO_F_SR_IOV.
    pub fn new_owner(
        name: impl Into<String>,
        device: Box<dyn VirtioDevice>,
        view: View,
        owner: Arc<Owner>,
    ) -> std::io::Result<Arc<Self>> {
        Self::build(name.into(), device, view, Some(owner))
    }

    fn build(
        name: String,
        device: Box<dyn VirtioDevice>,
        view: View,
        owner: Option<Arc<Owner>>,
    ) -> std::io::Result<Arc<Self>> {
        let mut sizes = device.queue_sizes();
        let device_queues = sizes.len() as u16;
        sizes.extend(owner.as_ref().map(|_| admin::queue::QUEUE_SIZE));
        let queues: Vec<_> = sizes.into_iter().map(Virtqueue::new).collect();
        let kicks = queues
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<std::io::Result<_>>()?;
        Ok(Arc::new(Self {
            name,
            device_type: device.device_type(),
            config_len: device.config().len(),
            core: Mutex::new(Core {
                device,
                view,
                queues,
                admin: owner.clone().map(AdminQueue::new),
                gate: Gate::closed_for(Reasons::NO_DRIVER),
                status: Status::empty(),
                driver_features: 0,
                config_vector: NO_VECTOR,
                config_generation: 0,
                isr: 0,
                config_pending: false,
            }),
            drained: Condvar::new(),
            kicks,
            interrupt: OnceLock::new(),
            device_queues,
            owner,
            warnings: Warnings::default(),
        }))
    }

    /// Connects the transport's interrupts. Only the first call counts.
    pub fn set_interrupt(&self, interrupt: Arc<dyn Interrupt>) {
        // A second transport for one function is a wiring mistake that shows as missing interrupts at once.
        let _ = self.interrupt.set(interrupt);
    }

    /// The name given at construction.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device type.
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// The owner it is, if it is one.
    pub fn owner(&self) -> Option<&Arc<Owner>> {
        self.owner.as_ref()
    }

    // Feature negotiation ------------------------------------------------------------------------------------------

    /// The 32 offered feature bits starting at `32 * select`; 0 beyond what is defined.
    pub fn device_features(&self, select: u32) -> u32 {
        window(self.lock().offered(), select)
    }

    /// The 32 bits the driver wrote at `32 * select`.
    pub fn driver_features(&self, select: u32) -> u32 {
        window(self.lock().driver_features, select)
    }

    /// The driver accepts `value` at `32 * select`. Ignored once FEATURES_OK is set, and for bits beyond 63, which
    /// are never offered.
    pub fn set_driver_features(&self, select: u32, value: u32) {
        let mut core = self.lock();
        if select < 2 && !core.status.contains(Status::FEATURES_OK) {
            let shift = 32 * select;
            core.driver_features =
                core.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    // Device status ------------------------------------------------------------------------------------------------

    /// The device status. After a reset was requested it stays as it was until nothing is in flight; when it reads
    /// 0, the function will touch neither guest memory nor interrupts.
    pub fn status(&self) -> u8 {
        self.lock().status.bits()
    }

    /// The driver writes the device status. 0 requests a reset; other values set bits, and never clear any.
    pub fn write_status(&self, value: u8) -> Effect {
        let mut core = self.lock();
        if value == 0 {
            core.gate.close(Reasons::RESET);
            // The gate is closed, so this fetches nothing.
            let (device, _, mut io) = core.io(0);
            device.call_off(&mut io);
            self.settle(&mut core);
            return Effect::LayoutChanged;
        }
        if core.gate.reasons().contains(Reasons::RESET) {
            return Effect::None;
        }
        let mut asked = Status::from_bits_truncate(value) - Status::NEEDS_RESET - core.status;
        if asked.contains(Status::FEATURES_OK) && !core.features_acceptable() {
            if let Some(count) = self.warnings.another() {
                tracing::warn!(function = %self.name, features = %format_args!("{:#x}", core.driver_features), count,
                    "driver asked for features that are not offered, or not for VIRTIO_F_VERSION_1");
            }
            asked -= Status::FEATURES_OK | Status::DRIVER_OK;
        }
        core.status |=
            asked & (Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::FAILED);
        if !asked.contains(Status::DRIVER_OK) || !core.status.contains(Status::FEATURES_OK) {
            return Effect::None;
        }
        core.status |= Status::DRIVER_OK;
        let features = core.driver_features;
        let event_index = core.event_index();
        for queue in &mut core.queues {
            queue.set_event_index(event_index);
        }
        core.device.activate(features);
        self.open(&mut core, Reasons::NO_DRIVER);
        Effect::LayoutChanged
    }

    /// Requests the same reset as writing status 0. Used for a function level reset.
    pub fn request_reset(&self) -> Effect {
        self.write_status(0)
    }

    /// Waits until a requested reset is complete. False if that takes longer than `patience`.
    #[must_use]
    pub fn wait_for_reset(&self, patience: Duration) -> bool {
        let waits = |core: &Core| core.gate.reasons().contains(Reasons::RESET);
        self.wait_while(self.lock(), patience, waits)
    }

    /// True while a requested reset waits for requests in flight.
    pub fn is_resetting(&self) -> bool {
        self.lock().gate.reasons().contains(Reasons::RESET)
    }

    /// True from DRIVER_OK until a reset.
    pub fn is_live(&self) -> bool {
        self.lock().status.contains(Status::DRIVER_OK)
    }

    /// Reads and clears the ISR status.
    pub fn take_isr(&self) -> u8 {
        std::mem::take(&mut self.lock().isr)
    }

    // Queues -------------------------------------------------------------------------------------------------------

    /// `num_queues`: virtqueues, without the administration virtqueue (B-9).
    pub fn num_queues(&self) -> u16 {
        self.device_queues
    }

    /// `admin_queue_index`: the first administration virtqueue, or 0 if there is none (B-9).
    pub fn admin_queue_index(&self) -> u16 {
        self.owner.as_ref().map_or(0, |_| self.device_queues)
    }

    /// `admin_queue_num`: the number of administration virtqueues (B-9).
    pub fn admin_queue_num(&self) -> u16 {
        self.total_queues() - self.device_queues
    }

    /// All virtqueues, numbered from 0: those of the device and the administration virtqueue.
    pub fn total_queues(&self) -> u16 {
        self.kicks.len() as u16
    }

    /// What the driver sees of queue `index`, or `None` if there is no such queue. The administration virtqueue is
    /// there for a driver that accepted VIRTIO_F_ADMIN_VQ.
    pub fn queue(&self, index: u16) -> Option<QueueInfo> {
        let core = self.lock();
        let queue = core.queues.get(usize::from(index));
        queue.filter(|_| !core.hides(index)).map(|q| QueueInfo {
            registers: *q.registers(),
            max_size: q.max_size(),
            enabled: q.is_enabled(),
            resetting: q.is_resetting(),
        })
    }

    /// Lets the driver change the registers of queue `index`. While the queue is enabled only the vector changes;
    /// a size that is not a power of two within the maximum is ignored, as is an index out of range.
    pub fn update_queue(&self, index: u16, change: impl FnOnce(&mut QueueRegisters)) {
        let mut core = self.lock();
        let hidden = core.hides(index);
        let queue = core.queues.get_mut(usize::from(index));
        let Some(queue) = queue.filter(|_| !hidden) else {
            return;
        };
        let mut new = *queue.registers();
        change(&mut new);
        let max_size = queue.max_size();
        let enabled = queue.is_enabled();
        let registers = queue.registers_mut();
        registers.vector = new.vector;
        if enabled {
            return;
        }
        if !new.size.is_power_of_two() || new.size > max_size {
            new.size = registers.size;
        }
        *registers = new;
    }

    /// The driver wrote 1 to `queue_enable`. A ring outside guest memory makes the device ask for a reset.
    pub fn enable_queue(&self, index: u16) -> Effect {
        let mut core = self.lock();
        let core = &mut *core;
        let event_index = core.event_index();
        let hidden = core.hides(index);
        let queue = core.queues.get_mut(usize::from(index));
        let Some(queue) = queue.filter(|_| !hidden) else {
            return Effect::None;
        };
        if queue.is_enabled() || core.gate.reasons().contains(Reasons::RESET) {
            return Effect::None;
        }
        match queue.enable(&core.view, event_index) {
            Ok(()) => self.kick(index),
            Err(error) => self.needs_reset(core, index, &error),
        }
        Effect::LayoutChanged
    }

    /// The driver wrote 1 to `queue_reset`. [`QueueInfo::resetting`] tells when it is done.
    pub fn reset_queue(&self, index: u16) -> Effect {
        let mut core = self.lock();
        if core.driver_features & feature::RING_RESET == 0 {
            return Effect::None;
        }
        if let Some(queue) = core.queues.get_mut(usize::from(index)) {
            queue.request_reset();
            self.settle(&mut core);
        }
        Effect::LayoutChanged
    }

    /// The event whose signal is a kick of queue `index`, for an ioeventfd.
    pub fn kick_event(&self, index: u16) -> Option<&Arc<EventFd>> {
        self.kicks.get(usize::from(index))
    }

    /// The driver notified queue `index` by a register write. Work happens on the I/O thread.
    pub fn kick(&self, index: u16) {
        if let Some(event) = self.kick_event(index) {
            // An eventfd refuses only when its counter is full, and then it is already signalled.
            let _ = event.write(1);
        }
    }

    /// The MSI-X vector for configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.lock().config_vector
    }

    /// The driver sets the MSI-X vector for configuration changes; the transport has checked that it exists.
    pub fn set_config_vector(&self, vector: u16) {
        self.lock().config_vector = vector;
    }

    // Device configuration -----------------------------------------------------------------------------------------

    /// Length of the device configuration in bytes.
    pub fn config_len(&self) -> usize {
        self.config_len
    }

    /// Reads the device configuration; bytes beyond its end read 0.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let core = self.lock();
        let rest = core.device.config().get(offset..).unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    /// The driver writes the device configuration. A write that leaves it is ignored.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let mut core = self.lock();
        let fits = offset
            .checked_add(data.len())
            .is_some_and(|end| end <= self.config_len);
        if fits && !core.gate.reasons().contains(Reasons::RESET) {
            core.device.write_config(offset, data);
        }
    }

    /// `config_generation`: differs whenever the device changed its configuration in between.
    pub fn config_generation(&self) -> u8 {
        self.lock().config_generation
    }

    // The gate -----------------------------------------------------------------------------------------------------

    /// Stops the function for `reason`: nothing more is fetched. What is in flight still completes.
    pub fn close(&self, reason: Reasons) {
        self.lock().gate.close(reason);
    }

    /// Stops the function for `reason` and waits until nothing is in flight. False if that takes longer than
    /// `patience`; the reason stays.
    #[must_use]
    pub fn close_and_drain(&self, reason: Reasons, patience: Duration) -> bool {
        let mut core = self.lock();
        core.gate.close(reason);
        self.wait_while(core, patience, |core| !core.drained())
    }

    /// Waits for the drain as long as `unfinished` says so. False if that takes longer than `patience`.
    fn wait_while(
        &self,
        mut core: MutexGuard<'_, Core>,
        patience: Duration,
        unfinished: impl Fn(&Core) -> bool,
    ) -> bool {
        let deadline = Instant::now() + patience;
        while unfinished(&core) {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            core = self
                .drained
                .wait_timeout(core, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
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

    /// Descriptors to watch for the device.
    pub fn sources(&self) -> Vec<Source> {
        self.lock().device.sources()
    }

    /// Queue `index` was kicked: works on it until it is empty or waits for its backend.
    pub fn service(&self, index: u16) {
        let mut core = self.lock();
        if !core.gate.is_open() {
            return;
        }
        let outcome = self.work(&mut core, index);
        self.conclude(&mut core, index, outcome);
    }

    /// The device's source `token` became readable.
    pub fn on_event(&self, token: u16) {
        let mut guard = self.lock();
        let core = &mut *guard;
        let (device, _, mut io) = core.io(BUDGET);
        let outcome = device.on_event(token, &mut io);
        let (more, changed) = (io.more, io.config_changed);
        core.note_config(changed);
        if more {
            (0..self.num_queues()).for_each(|q| self.kick(q));
        }
        self.conclude(core, 0, outcome);
    }

    fn work(&self, core: &mut Core, index: u16) -> Result<(), RingError> {
        let slot = usize::from(index);
        // A queue that waits for its reset has chains nobody may fetch; they must not count as work.
        let usable = |queue: &Virtqueue| queue.is_enabled() && !queue.is_resetting();
        if core.hides(index) || !core.queues.get(slot).is_some_and(usable) {
            return Ok(());
        }
        let mut budget = BUDGET;
        loop {
            if let Some(queue) = core.queues.get_mut(slot) {
                queue.disable_kicks(&core.view)?;
            }
            let is_admin = core.is_admin(index);
            let (device, admin, mut io) = core.io(budget);
            let progress = match admin.filter(|_| is_admin) {
                Some(admin) => admin.process(index, &mut io)?,
                None => device.process(index, &mut io)?,
            };
            let (more, changed) = (io.more, io.config_changed);
            // A driver that keeps adding chains does not get a new budget with each of them.
            budget = io.budget;
            core.note_config(changed);
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
                    let vector = queue.registers().vector;
                    core.isr |= ISR_QUEUE;
                    self.send(core, vector);
                }
                Err(error) => self.needs_reset(core, slot as u16, &error),
            }
        }
        if core.config_pending && core.gate.is_open() {
            self.announce_config(core);
        }
        self.settle(core);
    }

    /// Completes what waits for the drain: queue resets, a device reset, a thread in [`Self::close_and_drain`].
    fn settle(&self, core: &mut Core) {
        for queue in &mut core.queues {
            queue.finish_reset();
        }
        if !core.drained() {
            return;
        }
        if core.gate.reasons().contains(Reasons::RESET) {
            core.reset();
        }
        self.drained.notify_all();
    }

    fn open(&self, core: &mut Core, reason: Reasons) {
        if !core.gate.open(reason) {
            return;
        }
        if core.config_pending {
            self.announce_config(core);
        }
        for (index, queue) in core.queues.iter().enumerate() {
            if queue.is_enabled() {
                self.kick(index as u16);
            }
        }
    }

    fn announce_config(&self, core: &mut Core) {
        core.config_pending = false;
        core.isr |= ISR_CONFIG;
        let vector = core.config_vector;
        self.send(core, vector);
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
            core.isr |= ISR_CONFIG;
            let vector = core.config_vector;
            self.send(core, vector);
        }
    }

    fn send(&self, core: &Core, vector: u16) {
        if vector == NO_VECTOR || !core.may_reach_out() {
            return;
        }
        if let Some(interrupt) = self.interrupt.get() {
            interrupt.signal(vector);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member for VirtioFunction {
    fn name(&self) -> &str {
        Self::name(self)
    }
}

impl Core {
    fn offered(&self) -> u64 {
        let owner = match self.admin {
            Some(_) => feature::ADMIN_VQ | feature::SR_IOV,
            None => 0,
        };
        self.device.features() | feature::TRANSPORT | owner
    }

    fn is_admin(&self, index: u16) -> bool {
        self.admin.is_some() && usize::from(index) + 1 == self.queues.len()
    }

    /// True for an administration virtqueue the driver did not ask for.
    fn hides(&self, index: u16) -> bool {
        self.is_admin(index) && self.driver_features & feature::ADMIN_VQ == 0
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered() == 0
            && self.driver_features & feature::VERSION_1 != 0
    }

    fn event_index(&self) -> bool {
        self.status.contains(Status::FEATURES_OK) && self.driver_features & feature::EVENT_IDX != 0
    }

    /// Notes that the device changed its configuration. The generation moves at once, so that a driver that is
    /// reading sees it; the interrupt may have to wait for the gate.
    fn note_config(&mut self, changed: bool) {
        if changed {
            self.config_pending = true;
            self.config_generation = self.config_generation.wrapping_add(1);
        }
    }

    /// Splits the core into the device and what it may touch, to fetch at most `budget` chains.
    fn io(&mut self, budget: u32) -> (&mut dyn VirtioDevice, Option<&mut AdminQueue>, Io<'_>) {
        let io = Io {
            view: &self.view,
            queues: &mut self.queues,
            gate: &self.gate,
            budget,
            more: false,
            config_changed: false,
        };
        (&mut *self.device, self.admin.as_mut(), io)
    }

    /// False when neither rings nor messages are within reach. Without bus mastering, whoever opens the gate comes back
    /// for them; and when a reset was asked for, nobody waits for them any more.
    fn may_reach_out(&self) -> bool {
        let unreachable = Reasons::BUS_MASTER | Reasons::RESET;
        !self.gate.reasons().intersects(unreachable)
    }

    /// True if nothing is in flight; with a closed gate, nothing more will happen.
    fn drained(&self) -> bool {
        self.queues.iter().all(Virtqueue::is_drained)
    }

    fn reset(&mut self) {
        self.device.reset();
        if let Some(admin) = &mut self.admin {
            admin.reset();
        }
        for queue in &mut self.queues {
            *queue = Virtqueue::new(queue.max_size());
        }
        self.status = Status::empty();
        self.driver_features = 0;
        self.config_vector = NO_VECTOR;
        self.isr = 0;
        self.config_pending = false;
        self.gate.close(Reasons::NO_DRIVER);
        // NO_DRIVER is set, so this cannot be the last reason.
        let _ = self.gate.open(Reasons::RESET | Reasons::BROKEN);
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
