//! State of a function beyond what a device context carries, and the restore of all of it without a sign: what is saved
//! afterwards is what was restored.

use std::any::Any;

use super::saved::{Restoration, RestoreError};
use super::{Core, ISR_CONFIG, ISR_QUEUE, VirtioFunction, format};
use crate::gate::Reasons;
use crate::state::{FunctionState, ServiceState, TransientState, Unsavable};
use crate::virtio::queue::{Format, Virtqueue};
use crate::virtio::service::{Service, ServiceQueue};
use crate::virtio::{Cause, NO_VECTOR, Status};

/// A state that was found good. Nothing can fail any more.
pub(super) struct CheckedTransient<'a> {
    state: &'a TransientState,
    /// Of the services.
    queues: Vec<Virtqueue>,
}

impl<'a> CheckedTransient<'a> {
    /// Apart: the virtqueues of services, and what it takes to apply the rest.
    pub(super) fn take_queues(self) -> (&'a TransientState, Vec<Virtqueue>) {
        (self.state, self.queues)
    }
}

impl VirtioFunction {
    /// What [`Self::save`] leaves out of the state of this function, which is at rest.
    ///
    /// # Errors
    ///
    /// It is not at rest, or its device has state that it cannot give away.
    pub fn save_transient(&self) -> Result<TransientState, Unsavable> {
        let core = self.lock();
        if core.at_rest().is_err() {
            return Err(Unsavable("requests are in flight".into()));
        }
        let owed = |(_, queue): &(u16, &Virtqueue)| queue.is_unsignalled();
        let unsignalled = (0..).zip(&core.queues).filter(owed);
        let served = (0..).zip(&core.queues).skip(core.device_queues());
        let served = served.map(|(index, queue)| queue.save(self.vector(Cause::Queue(index))));
        let services = core.services.iter().map(ServiceQueue::service);
        let services = services.zip(served).map(|(service, queue)| {
            let kept = service.save();
            (service.name(), ServiceState { queue, kept })
        });
        Ok(TransientState {
            isr: core.isr,
            config_pending: core.config_pending,
            unsignalled: unsignalled.map(|(index, _)| index).collect(),
            services: services.collect(),
            device: core.device.save_state()?,
        })
    }

    /// Whether a function without services could be put into `state`, given the virtqueues it has enabled now.
    ///
    /// # Errors
    ///
    /// As [`Self::restore_transient`].
    pub fn check_transient(&self, state: &TransientState) -> Result<(), RestoreError> {
        let core = self.lock();
        core.serves_nobody()?;
        self.checked_transient(&core, state, core.format(), None, |index| {
            core.is_enabled(index)
        })
        .map(|_| ())
    }

    /// Puts a function whose [`FunctionState`] was restored, as the context of a member is by administration commands, into
    /// the rest of its state; all of it or nothing. The function stands still.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong. [`RestoreError::Inexact`] for a function with services, which is restored as a whole.
    pub fn restore_transient(&self, state: &TransientState) -> Result<(), RestoreError> {
        self.lock().serves_nobody()?;
        let mut core = self.lock();
        core.at_rest()?;
        if core.gate.is_open() {
            return Err(RestoreError::Busy);
        }
        self.checked_transient(&core, state, core.format(), None, |index| {
            core.is_enabled(index)
        })?;
        core.apply_transient(state);
        Ok(())
    }

    /// Whether the function could be put into this state.
    ///
    /// # Errors
    ///
    /// As [`Self::restore_exact`].
    pub fn check_exact(
        &self,
        state: &FunctionState,
        transient: &TransientState,
    ) -> Result<(), RestoreError> {
        let core = self.lock();
        self.checked(&core, state)?;
        self.checked_with(&core, state, transient).map(|_| ())
    }

    /// Puts the function into this state, all of it or none of it, so that neither its driver nor another save sees a
    /// difference. A command that waited is executed anew when the function goes on. Reasons to be stopped
    /// that are not the driver's stay as they are.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn restore_exact(
        &self,
        state: &FunctionState,
        transient: &TransientState,
    ) -> Result<(), RestoreError> {
        let mut core = self.lock();
        core.at_rest()?;
        let checked = self.checked(&core, state)?;
        let transient = self.checked_with(&core, state, transient)?;
        self.commit(
            &mut core,
            state,
            checked,
            Restoration::Exact,
            Some(transient),
        );
        Ok(())
    }

    /// A live function notifies its driver of everything once more when its gate opens, or now if it is open: by the vector
    /// of each enabled virtqueue, and by that of the configuration if there ever was something to notify of. For messages
    /// that may have been lost on their way to the guest.
    pub fn signal_again(&self) {
        let mut core = self.lock();
        core.signal_again = core.status.contains(Status::DRIVER_OK);
        core.owe_again();
        self.announce_config(&mut core);
        if core.gate.is_open() {
            self.kick(0);
        }
    }

    /// Lets `act` have the service of this type, and tells it whether a command is in its virtqueue that will be executed when
    /// the function goes on.
    pub(crate) fn with_service<S: Service, R>(
        &self,
        act: impl FnOnce(&mut S, bool) -> R,
    ) -> Option<R> {
        let mut core = self.lock();
        let core = &mut *core;
        let served = core.queues.iter().skip(core.device_queues());
        let mut services = core.services.iter_mut().zip(served);
        let (service, queue) = services.find_map(|(service, queue)| {
            let service: &mut dyn Any = service.service_mut();
            Some((service.downcast_mut()?, queue))
        })?;
        Some(act(service, queue.owns_chains()))
    }

    fn checked_with<'a>(
        &self,
        core: &Core,
        state: &FunctionState,
        transient: &'a TransientState,
    ) -> Result<CheckedTransient<'a>, RestoreError> {
        let services = core.services.iter().map(|queue| queue.service().name());
        let served = services.map(|name| {
            transient
                .services
                .get(name)
                .is_some_and(|s| s.queue.enabled)
        });
        let enabled = state.queues.iter().map(|queue| queue.enabled);
        let enabled: Vec<_> = enabled.chain(served).collect();
        let status = Status::from_bits_truncate(state.registers.status);
        let format = format(status, state.accepted as u64);
        let ready = status.contains(Status::DRIVER_OK);
        let driver = ready.then_some(state.accepted as u64);
        self.checked_transient(core, transient, format, driver, |index| {
            enabled
                .get(usize::from(index))
                .is_some_and(|enabled| *enabled)
        })
    }

    fn checked_transient<'a>(
        &self,
        core: &Core,
        state: &'a TransientState,
        format: Format,
        driver: Option<u64>,
        is_enabled: impl Fn(u16) -> bool,
    ) -> Result<CheckedTransient<'a>, RestoreError> {
        if state.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return Err(RestoreError::Isr(state.isr));
        }
        let is_there = |name: &str| core.services.iter().any(|own| own.service().name() == name);
        if let Some(name) = state.services.keys().find(|name| !is_there(name)) {
            return Err(RestoreError::NoService(name));
        }
        let mut queues = Vec::with_capacity(core.services.len());
        let served = (0..).zip(&core.queues).skip(core.device_queues());
        for (service, (index, queue)) in core.services.iter().zip(served) {
            let name = service.service().name();
            let saved = state.services.get(name);
            let saved = saved.ok_or(RestoreError::ServiceMissing(name))?;
            queues.push(self.checked_queue(core, index, &saved.queue, queue, format)?);
            let checked = service.service().check(&saved.kept, driver);
            checked.map_err(|what| RestoreError::Service { name, what })?;
        }
        let mut least = 0;
        for index in state.unsignalled.iter().copied() {
            if index < least || !is_enabled(index) {
                return Err(RestoreError::Unsignalled(index));
            }
            least = index.saturating_add(1);
        }
        core.device
            .check_state(&state.device)
            .map_err(RestoreError::Device)?;
        Ok(CheckedTransient { state, queues })
    }
}

impl Core {
    pub(super) fn is_enabled(&self, index: u16) -> bool {
        let queue = self.queues.get(usize::from(index));
        queue.is_some_and(Virtqueue::is_enabled)
    }

    /// What a state says of the interrupts of services' virtqueues; nothing without one.
    pub(super) fn served_vectors(&self, state: Option<&TransientState>) -> Vec<u16> {
        let saved = |name| state.and_then(|state| state.services.get(name));
        let names = self.services.iter().map(|queue| queue.service().name());
        names
            .map(|name| saved(name).map_or(NO_VECTOR, |saved| saved.queue.vector))
            .collect()
    }

    /// All of a state that was checked but the virtqueues of services.
    pub(super) fn apply_transient(&mut self, state: &TransientState) {
        self.isr = state.isr;
        self.config_pending = state.config_pending;
        for (index, queue) in (0..).zip(&mut self.queues) {
            queue.set_unsignalled(state.unsignalled.contains(&index));
        }
        self.device.restore_state(&state.device);
        for queue in &mut self.services {
            if let Some(saved) = state.services.get(queue.service().name()) {
                queue.service_mut().restore(&saved.kept);
            }
        }
    }

    /// What [`VirtioFunction::signal_again`] asked for falls due once messages may leave the function.
    pub(super) fn owe_again(&mut self) {
        // That a broken device needs a reset can be told as long as it is closed for nothing else.
        if !(self.gate.reasons() - Reasons::BROKEN).is_empty() {
            return;
        }
        if !std::mem::take(&mut self.signal_again) {
            return;
        }
        if self.gate.is_open() {
            for queue in &mut self.queues {
                queue.signal_again();
            }
        }
        self.config_pending |= self.isr & ISR_CONFIG != 0;
    }
}
