//! State of a function beyond what a device context carries, and the restore of all of it without a sign: what is saved
//! afterwards is what was restored.

use super::saved::{Restoration, RestoreError};
use super::{Core, ISR_CONFIG, ISR_QUEUE, VirtioFunction};
use crate::admin::AdminQueue;
use crate::gate::Reasons;
use crate::state::{FunctionState, TransientState, Unsavable};
use crate::virtio::Status;
use crate::virtio::queue::Virtqueue;

/// A state that was found good. Nothing can fail any more.
pub(super) struct CheckedTransient<'a> {
    state: &'a TransientState,
    admin: Option<Virtqueue>,
}

impl<'a> CheckedTransient<'a> {
    /// Apart: the administration virtqueue, and what it takes to apply the rest.
    pub(super) fn take_queue(self) -> (&'a TransientState, Option<Virtqueue>) {
        (self.state, self.admin)
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
        let admin = core.admin.as_ref().and(core.queues.last());
        Ok(TransientState {
            isr: core.isr,
            config_pending: core.config_pending,
            unsignalled: unsignalled.map(|(index, _)| index).collect(),
            admin_queue: admin.map(Virtqueue::save),
            device: core.device.save_state()?,
        })
    }

    /// Whether a function that is no owner could be put into `state`, given the virtqueues it has enabled now.
    ///
    /// # Errors
    ///
    /// As [`Self::restore_transient`].
    pub fn check_transient(&self, state: &TransientState) -> Result<(), RestoreError> {
        self.not_an_owner()?;
        let core = self.lock();
        self.checked_transient(&core, state, |index| core.is_enabled(index))
            .map(|_| ())
    }

    /// Puts a function whose [`FunctionState`] was restored, as the context of a member is by administration commands, into
    /// the rest of its state; all of it or nothing. The function stands still.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong. [`RestoreError::Owner`] for an owner, which is restored as a whole.
    pub fn restore_transient(&self, state: &TransientState) -> Result<(), RestoreError> {
        self.not_an_owner()?;
        let mut core = self.lock();
        core.at_rest()?;
        if core.gate.is_open() {
            return Err(RestoreError::Busy);
        }
        self.checked_transient(&core, state, |index| core.is_enabled(index))?;
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
    /// difference. An administration command that waited is executed anew when the function goes on. Reasons to be stopped
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

    /// Lets `act` have the administration virtqueue of an owner, and tells it whether a command is in it that will be executed
    /// when the function goes on.
    pub(crate) fn with_admin<R>(&self, act: impl FnOnce(&mut AdminQueue, bool) -> R) -> Option<R> {
        let mut core = self.lock();
        let core = &mut *core;
        let owns = core.queues.last().is_some_and(Virtqueue::owns_chains);
        let admin = core.admin.as_mut()?;
        Some(act(admin, owns))
    }

    fn checked_with<'a>(
        &self,
        core: &Core,
        state: &FunctionState,
        transient: &'a TransientState,
    ) -> Result<CheckedTransient<'a>, RestoreError> {
        let queues = state.queues.iter().chain(&transient.admin_queue);
        let enabled: Vec<_> = queues.map(|queue| queue.enabled).collect();
        self.checked_transient(core, transient, |index| {
            enabled
                .get(usize::from(index))
                .is_some_and(|enabled| *enabled)
        })
    }

    fn checked_transient<'a>(
        &self,
        core: &Core,
        state: &'a TransientState,
        is_enabled: impl Fn(u16) -> bool,
    ) -> Result<CheckedTransient<'a>, RestoreError> {
        if state.isr & !(ISR_QUEUE | ISR_CONFIG) != 0 {
            return Err(RestoreError::Isr(state.isr));
        }
        let admin = match (&state.admin_queue, &core.admin) {
            (None, None) => None,
            (Some(saved), Some(_)) => {
                let index = self.device_queues;
                let max_size = core.queues.last().map_or(0, Virtqueue::max_size);
                Some(self.checked_queue(core, index, saved, max_size)?)
            }
            (Some(_), None) => {
                let what = "has an administration virtqueue; this function is no owner";
                return Err(RestoreError::AdminQueue(what));
            }
            (None, Some(_)) => {
                let what = "lacks the administration virtqueue of this owner";
                return Err(RestoreError::AdminQueue(what));
            }
        };
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
        Ok(CheckedTransient { state, admin })
    }
}

impl Core {
    fn is_enabled(&self, index: u16) -> bool {
        let queue = self.queues.get(usize::from(index));
        queue.is_some_and(Virtqueue::is_enabled)
    }

    /// All of a state that was checked but the administration virtqueue.
    pub(super) fn apply_transient(&mut self, state: &TransientState) {
        self.isr = state.isr;
        self.config_pending = state.config_pending;
        for (index, queue) in (0..).zip(&mut self.queues) {
            queue.set_unsignalled(state.unsignalled.contains(&index));
        }
        self.device.restore_state(&state.device);
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
