//! Managed devices of a management device.

use devices::state::{ManagedState, ManagerState, MessageState};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::error::{At, Invalid, check_name, convert_all};
use super::hex::Hex;

/// Which managed devices a management device has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Managed {
    /// The id that the next device gets.
    pub next_id: u64,
    /// The devices.
    pub devices: Vec<Device>,
}

/// A managed device. The rest of its state is that of its function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Device id.
    pub id: u64,
    /// Name of its function, as `manager0-1`.
    pub name: String,
    /// Feature bits that it offers.
    pub features: Hex<u64>,
    /// Interrupt of the configuration.
    pub config: Message,
    /// Interrupts of its virtqueues.
    pub queues: Vec<Message>,
}

/// A message that is an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Guest physical address that it is written to.
    pub address: Hex<u64>,
    /// What is written.
    pub data: u32,
    /// It is sent.
    pub enabled: bool,
    /// It is held back.
    pub masked: bool,
    /// It waits behind the mask.
    pub pending: bool,
}

impl Managed {
    /// The JSON of `state`.
    pub fn of(state: &ManagerState) -> Self {
        Self {
            next_id: state.next_id,
            devices: state.devices.iter().map(Device::of).collect(),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// A value that is out of range in every machine.
    pub fn plain(&self) -> Result<ManagerState, Invalid> {
        Ok(ManagerState {
            next_id: self.next_id,
            devices: convert_all(&self.devices, Device::plain).field("devices")?,
        })
    }
}

impl Device {
    fn of(state: &ManagedState) -> Self {
        Self {
            id: state.id,
            name: state.name.clone(),
            features: Hex(state.features),
            config: Message::of(&state.config),
            queues: state.queues.iter().map(Message::of).collect(),
        }
    }

    fn plain(&self) -> Result<ManagedState, Invalid> {
        check_name(&self.name)?;
        Ok(ManagedState {
            id: self.id,
            name: self.name.clone(),
            features: self.features.0,
            config: self.config.plain(),
            queues: self.queues.iter().map(Message::plain).collect(),
        })
    }
}

impl Message {
    fn of(state: &MessageState) -> Self {
        Self {
            address: Hex(state.address),
            data: state.data,
            enabled: state.enabled,
            masked: state.masked,
            pending: state.pending,
        }
    }

    fn plain(&self) -> MessageState {
        MessageState {
            address: self.address.0,
            data: self.data,
            enabled: self.enabled,
            masked: self.masked,
            pending: self.pending,
        }
    }
}
