//! What the API says about management devices and their managed devices.

use serde::{Deserialize, Serialize};

use super::owners::{self, Function};
use crate::machine::Machine;
use crate::machine::manager;

/// A management device and its managed devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manager {
    /// Its name.
    pub name: String,
    /// `net` or `block`.
    pub device: String,
    /// The layout of its commands: `aligned` or `packed`.
    pub wire: String,
    /// Its function.
    pub function: Function,
    /// The most managed devices there can be.
    pub total_devices: u16,
    /// The managed devices there are.
    pub devices: Vec<Managed>,
}

/// A managed device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Managed {
    /// Its device id, which commands have.
    pub id: u64,
    /// The function. It has no place on the bus.
    #[serde(flatten)]
    pub function: Function,
}

/// The management devices of a machine as they are now.
pub fn describe(machine: &Machine) -> Vec<Manager> {
    let managers = machine.functions().managers().iter();
    managers.map(describe_one).collect()
}

fn describe_one(manager: &manager::Manager) -> Manager {
    let devices = manager.devices();
    let device = |(id, function)| Managed {
        id,
        function: owners::function(&function, None),
    };
    Manager {
        name: manager.name.clone(),
        device: manager.declaration.device_type().name().to_owned(),
        wire: manager.declaration.transport.wire.name().to_owned(),
        function: owners::function(&manager.function, Some(manager.place)),
        total_devices: manager.declaration.devices,
        devices: devices.into_iter().map(device).collect(),
    }
}
