//! The registers a driver sees, one function each. Those that a stop keeps from changing say so in
//! [`doors`](super::doors).

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{Core, QueueInfo, VirtioFunction, config_end, config_start, window};
use crate::bus::Effect;
use crate::gate::Reasons;
use crate::virtio::queue::{Format, QueueRegisters};
use crate::virtio::service::ServiceQueue;
use crate::virtio::{Cause, Status, feature};

/// What selects the part of a register that the driver sees. A reset sets them to 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Selectors {
    /// `device_feature_select`.
    pub device_feature: u32,
    /// `driver_feature_select`.
    pub driver_feature: u32,
    /// `queue_select` of the common configuration.
    pub queue: u16,
    /// `queue_select` of the device-state capability, which is another register (G0-b).
    pub state_queue: u16,
}

impl VirtioFunction {
    // Selectors ----------------------------------------------------------------------------------------------------

    /// The selectors.
    pub fn selectors(&self) -> Selectors {
        self.lock().selectors
    }

    /// The driver writes a selector.
    pub fn select(&self, change: impl FnOnce(&mut Selectors)) {
        let mut core = self.lock();
        if !core.ignores_writes() {
            change(&mut core.selectors);
        }
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
        let open = !core.ignores_writes() && !core.status.contains(Status::FEATURES_OK);
        if select < 2 && open {
            let shift = 32 * select;
            core.driver_features =
                core.driver_features & !(0xffff_ffff << shift) | u64::from(value) << shift;
        }
    }

    // Device status ------------------------------------------------------------------------------------------------

    /// The device status. After a reset was requested it stays as it was until nothing is in flight; when it reads
    /// 0, the function will touch neither guest memory nor interrupts.
    pub fn status(&self) -> u8 {
        self.lock().shown_status().bits()
    }

    /// The driver writes the device status. 0 requests a reset; other values set bits, and clear none but those of the
    /// doors. Ignored in mode Freeze, even a reset (G3-aa).
    pub fn write_status(&self, value: u8) -> Effect {
        let mut core = self.lock();
        if core.gate.reasons().intersects(Reasons::FREEZE) {
            return Effect::None;
        }
        if value == 0 {
            self.start_reset(&mut core);
            return Effect::LayoutChanged;
        }
        if core.gate.reasons().contains(Reasons::RESET) {
            return Effect::None;
        }
        let value = Status::from_bits_truncate(value);
        if core.status.contains(Status::DRIVER_OK) {
            self.turn_doors(&mut core, value);
        }
        let mut asked = value - Status::NEEDS_RESET - core.status;
        if asked.contains(Status::FEATURES_OK) && !core.features_acceptable() {
            if let Some(count) = self.warnings.another() {
                tracing::warn!(function = %self.name, features = %format_args!("{:#x}", core.driver_features), count,
                    "driver asked for features that are not offered, not for VIRTIO_F_VERSION_1, or for packed rings after it \
                     enabled a virtqueue");
            }
            asked -= Status::FEATURES_OK | Status::DRIVER_OK;
        }
        core.status |=
            asked & (Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK | Status::FAILED);
        if asked.contains(Status::FEATURES_OK) && core.format() == Format::Packed {
            let queues = core.queues.iter_mut();
            queues.for_each(|queue| queue.set_format(Format::Packed));
        }
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
        for queue in &mut core.services {
            queue.service_mut().activate(features);
        }
        self.open(&mut core, Reasons::NO_DRIVER);
        Effect::LayoutChanged
    }

    /// Requests the reset of a function level reset or of its bus. It differs from status 0 in that it works in every
    /// mode, and that what an owner's driver had written to the function is forgotten (G3-z).
    pub fn request_reset(&self) -> Effect {
        let mut core = self.lock();
        core.epoch.resets += 1;
        self.start_reset(&mut core);
        Effect::LayoutChanged
    }

    /// Waits until a requested reset is complete. False if that takes longer than `patience`.
    #[must_use]
    pub fn wait_for_reset(&self, patience: Duration) -> bool {
        let waits = |core: &Core| core.gate.reasons().contains(Reasons::RESET);
        self.wait_while(self.lock(), Instant::now(), patience, waits)
            .1
    }

    /// True while a requested reset waits for requests in flight.
    pub fn is_resetting(&self) -> bool {
        self.lock().gate.reasons().contains(Reasons::RESET)
    }

    /// True from DRIVER_OK until a reset.
    pub fn is_live(&self) -> bool {
        self.lock().status.contains(Status::DRIVER_OK)
    }

    /// True if its driver uses packed rings.
    pub fn is_packed(&self) -> bool {
        self.lock().format() == Format::Packed
    }

    /// Reads and clears the ISR status. In mode Freeze, it stays.
    pub fn take_isr(&self) -> u8 {
        let mut core = self.lock();
        if core.gate.reasons().intersects(Reasons::FREEZE) {
            return core.isr;
        }
        std::mem::take(&mut core.isr)
    }

    // Queues -------------------------------------------------------------------------------------------------------

    /// `num_queues`: virtqueues of the device, without those of services (B-9).
    pub fn num_queues(&self) -> u16 {
        self.device_queues
    }

    /// The virtqueues of services whose feature this is: one after the other, behind those of the device.
    pub fn service_queues(&self, feature: u64) -> Range<u16> {
        let core = self.lock();
        let is_one = |queue: &ServiceQueue| queue.service().feature() == feature;
        let before = core
            .services
            .iter()
            .take_while(|queue| !is_one(queue))
            .count();
        let count = core.services.iter().filter(|queue| is_one(queue)).count();
        let start = self.device_queues + before as u16;
        start..start + count as u16
    }

    /// All virtqueues, numbered from 0: those of the device, then those of services.
    pub fn total_queues(&self) -> u16 {
        self.kicks.len() as u16
    }

    /// What the driver sees of queue `index`, or `None` if there is no such queue. That of a service is there for a driver
    /// that accepted its feature.
    pub fn queue(&self, index: u16) -> Option<QueueInfo> {
        self.lock().visible(index).map(|q| QueueInfo {
            registers: *q.registers(),
            max_size: q.max_size(),
            enabled: q.is_enabled(),
            resetting: q.is_resetting(),
        })
    }

    /// Lets the driver change the registers of queue `index`, unless it is enabled. A size beyond the maximum, or that is not a
    /// power of two though the rings are split, is ignored, as is an index out of range.
    pub fn update_queue(&self, index: u16, change: impl FnOnce(&mut QueueRegisters)) {
        let mut core = self.lock();
        let closed = core.hides(index) || core.ignores_writes();
        let queue = core.queues.get_mut(usize::from(index));
        let Some(queue) = queue.filter(|queue| !closed && !queue.is_enabled()) else {
            return;
        };
        let mut new = *queue.registers();
        change(&mut new);
        if !queue.allows(new.size) {
            new.size = queue.registers().size;
        }
        *queue.registers_mut() = new;
    }

    /// Lets the driver change where interrupts of `cause` go, which the transport knows, at any time. It does not if its writes
    /// have no effect now, or if it has no such virtqueue.
    pub fn change_interrupt(&self, cause: Cause, change: impl FnOnce()) {
        let core = self.lock();
        let is_there = match cause {
            Cause::Queue(index) => core.visible(index).is_some(),
            Cause::Config => true,
        };
        if is_there && !core.ignores_writes() {
            change();
        }
    }

    /// The driver wrote 1 to `queue_enable`. A ring outside guest memory makes the device ask for a reset.
    pub fn enable_queue(&self, index: u16) -> Effect {
        let mut core = self.lock();
        let core = &mut *core;
        let event_index = core.event_index();
        let closed = core.hides(index) || core.ignores_writes();
        let queue = core.queues.get_mut(usize::from(index));
        let Some(queue) = queue.filter(|_| !closed) else {
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
        if core.driver_features & feature::RING_RESET == 0 || core.ignores_writes() {
            return Effect::None;
        }
        if let Some(slot) = core.service_behind(index) {
            core.call_off_command(slot);
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

    // Device configuration -----------------------------------------------------------------------------------------

    /// Length of the device configuration in bytes, with that of services behind it.
    pub fn config_len(&self) -> usize {
        self.config_len
    }

    /// Reads the device configuration; bytes beyond its end read 0.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let core = self.lock();
        copy_overlap(core.device.config(), 0, offset, data);
        let mut end = self.device_config_len;
        for queue in &core.services {
            let config = queue.service().config();
            copy_overlap(config, config_start(end), offset, data);
            end = config_end(end, config);
        }
    }

    /// The driver writes the device configuration. A write that leaves it is ignored; what is behind it is read-only.
    pub fn write_config(&self, offset: usize, data: &[u8]) {
        let mut core = self.lock();
        let fits = offset
            .checked_add(data.len())
            .is_some_and(|end| end <= self.device_config_len);
        let closed = core.ignores_config_writes() || core.gate.reasons().contains(Reasons::RESET);
        if fits && !closed {
            core.device.write_config(offset, data);
        }
    }

    /// `config_generation`: differs whenever the device changed its configuration in between.
    pub fn config_generation(&self) -> u8 {
        self.lock().config_generation
    }
}

/// Copies the bytes of `config`, which lies at `start`, that are in `data`, which is read from `offset` on.
fn copy_overlap(config: &[u8], start: usize, offset: usize, data: &mut [u8]) {
    let from = config.get(offset.saturating_sub(start)..);
    let to = data.get_mut(start.saturating_sub(offset)..);
    if let (Some(from), Some(to)) = (from, to) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = *from;
        }
    }
}
