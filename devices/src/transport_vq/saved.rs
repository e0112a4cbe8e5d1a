//! Managed devices as state: which there are, what they offer, and their messages. What else there is to them is in the state
//! of their functions.

use std::collections::HashSet;

use super::interrupts::{Entry, Interrupts};
use super::manager::{Manager, Seat};
use crate::msi::MsiMessage;
use crate::state::{ManagedState, ManagerState, MessageState};
use crate::virtio::Cause;

/// Why a state was rejected. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The manager has devices.
    #[error("there are managed devices already")]
    Busy,
    /// No device can have this id.
    #[error("device id {0} is zero, there twice, or not below next_id")]
    Id(u64),
    /// There is nothing a device of this name could be made of.
    #[error("this management device cannot have {0:?}, or not twice")]
    Unknown(String),
    /// Features that the device does not have.
    #[error("{name}: features {features:#x} are none that it has")]
    Features {
        /// The name of the device.
        name: String,
        /// Those it does not have.
        features: u64,
    },
    /// Another number of virtqueues.
    #[error("{name}: {found} messages for virtqueues; it has {expected} of these")]
    Count {
        /// The name of the device.
        name: String,
        /// In the state.
        found: usize,
        /// Its virtqueues.
        expected: u16,
    },
    /// A message that no driver could have set up.
    #[error("{name}: a message has the address {address:#x}, which is not a multiple of 4")]
    Address {
        /// The name of the device.
        name: String,
        /// The address.
        address: u64,
    },
    /// A message that is disabled has nothing to wait for.
    #[error("{0}: a message is pending and disabled")]
    Pending(String),
}

impl Manager {
    /// Which devices there are. Nothing of the guest happens meanwhile.
    pub fn save(&self) -> ManagerState {
        let device = |seat: &Seat| {
            let message = |cause| {
                let (entry, pending) = seat.interrupts().get(cause).unwrap_or_default();
                MessageState {
                    address: entry.message.address,
                    data: entry.message.data,
                    enabled: entry.enabled,
                    masked: entry.masked,
                    pending,
                }
            };
            let queues = 0..seat.function().total_queues();
            Some(ManagedState {
                id: seat.id()?,
                name: seat.function().name().to_owned(),
                features: seat.function().features().0,
                config: message(Cause::Config),
                queues: queues.map(|index| message(Cause::Queue(index))).collect(),
            })
        };
        ManagerState {
            next_id: self.next_id(),
            devices: self.seats().iter().filter_map(device).collect(),
        }
    }

    /// Whether `state` can be restored.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn check(&self, state: &ManagerState) -> Result<(), StateError> {
        if self.seats().iter().any(|seat| seat.id().is_some()) {
            return Err(StateError::Busy);
        }
        if state.next_id == 0 {
            return Err(StateError::Id(0));
        }
        let (mut ids, mut names) = (HashSet::new(), HashSet::new());
        for device in &state.devices {
            let ManagedState { id, name, .. } = device;
            if *id == 0 || *id >= state.next_id || !ids.insert(*id) {
                return Err(StateError::Id(*id));
            }
            let seat = self.seat(name).filter(|_| names.insert(name));
            let seat = seat.ok_or_else(|| StateError::Unknown(name.clone()))?;
            let features = device.features & !seat.function().all_features();
            if features != 0 {
                let name = name.clone();
                return Err(StateError::Features { name, features });
            }
            let expected = seat.function().total_queues();
            if device.queues.len() != usize::from(expected) {
                return Err(StateError::Count {
                    name: name.clone(),
                    found: device.queues.len(),
                    expected,
                });
            }
            for message in std::iter::once(&device.config).chain(&device.queues) {
                let address = message.address;
                if !address.is_multiple_of(4) {
                    let name = name.clone();
                    return Err(StateError::Address { name, address });
                }
                if message.pending && !message.enabled {
                    return Err(StateError::Pending(name.clone()));
                }
            }
        }
        Ok(())
    }

    /// Makes the devices of `state`, all of it or nothing. The state of their functions is restored afterwards, and what they
    /// owe their drivers goes out when they go on.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong.
    pub fn restore(&mut self, state: &ManagerState) -> Result<(), StateError> {
        self.check(state)?;
        for device in &state.devices {
            let mut seats = self.seats_mut().iter_mut();
            let Some(seat) = seats.find(|seat| seat.function().name() == device.name) else {
                continue;
            };
            seat.occupy(device.id, device.features);
            restore(seat.interrupts(), Cause::Config, &device.config);
            for (index, message) in (0..).zip(&device.queues) {
                restore(seat.interrupts(), Cause::Queue(index), message);
            }
        }
        self.set_next_id(state.next_id);
        Ok(())
    }

    fn seat(&self, name: &str) -> Option<&Seat> {
        let mut seats = self.seats().iter();
        seats.find(|seat| seat.function().name() == name)
    }
}

fn restore(interrupts: &Interrupts, cause: Cause, message: &MessageState) {
    let entry = Entry {
        message: MsiMessage {
            address: message.address,
            data: message.data,
        },
        enabled: message.enabled,
        masked: message.masked,
    };
    interrupts.restore(cause, entry, message.pending);
}
