//! What the API says about management devices and their managed devices.

use std::time::Duration;

use devices::transport_vq::{Command, Error, Request};
use serde::{Deserialize, Serialize};

use super::owners::{self, Function, from_hex, to_hex};
use crate::machine::Machine;
use crate::machine::lease::Busy;
use crate::machine::manager;

/// How long a command waits for what a device has in flight.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// Body of `POST /api/v1/managed`: one command for a managed device, or for its management device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagedCommand {
    /// Name of the management device.
    pub manager: String,
    /// Device id; 0 is the management device itself.
    #[serde(default)]
    pub device: u64,
    /// Class of the command.
    pub class: u16,
    /// Its number in the class.
    pub command: u16,
    /// Command-out-data in hexadecimal digits, in the layout of the management device.
    #[serde(default)]
    pub data: String,
}

/// Answer to `POST /api/v1/managed`: what the management device answered, be it good or bad.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManagedAnswer {
    /// Error code; 0 is success.
    pub error: u8,
    /// What that means.
    pub error_name: String,
    /// Command-in-data in hexadecimal digits.
    pub data: String,
}

/// Why a command was not executed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManagedError {
    /// No such management device.
    #[error("there is no management device {name}; {there}")]
    Manager {
        /// What was asked for.
        name: String,
        /// Those there are.
        there: String,
    },
    /// Only the guest's driver does that.
    #[error(
        "devices are made and destroyed by the driver of {0} in the guest; from here they are looked at and stopped"
    )]
    Lifecycle(String),
    /// No command has these numbers.
    #[error(
        "class {class} has no command {command}; the table in devices/src/transport_vq/mod.rs lists them"
    )]
    Command {
        /// The class.
        class: u16,
        /// The number.
        command: u16,
    },
    /// Somebody else has the guest for himself.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Data that are no bytes.
    #[error("'{0}' is not an even number of hexadecimal digits")]
    Data(String),
    /// It waited too long.
    #[error("the device still has requests in flight after {} s; what the command began goes on", PATIENCE.as_secs())]
    Waits,
}

/// Hands `command` to its management device.
pub fn execute(machine: &Machine, command: &ManagedCommand) -> Result<ManagedAnswer, ManagedError> {
    let managers = machine.functions().managers();
    let manager = managers.iter().find(|m| m.name == command.manager);
    let manager = manager.ok_or_else(|| {
        let names: Vec<_> = managers.iter().map(|m| m.name.as_str()).collect();
        ManagedError::Manager {
            name: command.manager.clone(),
            there: match names.as_slice() {
                [] => "this guest has none (tern run --manager)".to_owned(),
                names => format!("there is {}", names.join(", ")),
            },
        }
    })?;
    let (class, number) = (command.class, command.command);
    let data = from_hex(&command.data).ok_or_else(|| ManagedError::Data(command.data.clone()))?;
    let found = Command::from_raw(class, number).ok_or(ManagedError::Command {
        class,
        command: number,
    })?;
    if matches!(found, Command::Create | Command::Destroy) {
        return Err(ManagedError::Lifecycle(manager.name.clone()));
    }
    let request = Request {
        device: command.device,
        command: found,
        data: &data,
    };
    let _under_way = machine.command()?;
    let answer = manager.function.execute_managed(request, PATIENCE);
    Ok(ManagedAnswer::of(answer.ok_or(ManagedError::Waits)?))
}

impl ManagedAnswer {
    fn of(answer: Result<Vec<u8>, Error>) -> Self {
        match answer {
            Ok(data) => Self {
                error: 0,
                error_name: "OK".to_owned(),
                data: to_hex(&data),
            },
            Err(error) => Self {
                error: error as u8,
                error_name: error.to_string(),
                data: String::new(),
            },
        }
    }
}
