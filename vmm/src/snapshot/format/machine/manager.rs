//! A management device in the specification of a machine.

use std::collections::BTreeMap;
use std::path::Path;

use devices::transport_vq::{Options, Wire};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::files::absolute;
use super::{File, Identity, MachineError, Stops, mac, offer, wrong};
use crate::config::manager::{device_name, numbered_path};
use crate::config::{self, ManagerDevice};

/// A management device, and what its managed devices can be made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manager {
    /// What is particular to the device type.
    pub device: ManagerKind,
    /// The most managed devices there can be.
    pub devices: u16,
    /// The layout of its commands: `aligned` or `packed`.
    pub wire: String,
    /// Number of the feature that there is a transport virtqueue.
    pub queue_feature: u8,
    /// Number of the feature that it has the commands for managed devices.
    pub devices_feature: u8,
    /// What drivers of managed devices can stop them with.
    pub stops: Stops,
    /// Its drivers may choose packed rings.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
}

/// What is particular to the device type of a management device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum ManagerKind {
    /// Network devices on one switch.
    Net {
        /// The switch of that name; one of its own if null.
        switch: Option<String>,
        /// MAC address of the management device; those of its devices follow it.
        mac: String,
    },
    /// Disks.
    Block {
        /// Their files; `%d` stands for 0 in that of the management device, and for the number of each of its devices.
        path: String,
        /// The files as they were, by number.
        files: BTreeMap<u16, Identity>,
        /// The guest can write none of them.
        readonly: bool,
    },
}

impl Manager {
    pub(super) fn of(manager: &config::Manager) -> Self {
        let device = match &manager.device {
            ManagerDevice::Net { switch, mac } => ManagerKind::Net {
                switch: switch.clone(),
                mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
            },
            ManagerDevice::Block { path, readonly } => ManagerKind::Block {
                path: path.clone(),
                files: manager
                    .paths()
                    .into_iter()
                    .filter_map(|(number, path)| Some((number, Identity::of(&path)?)))
                    .collect(),
                readonly: *readonly,
            },
        };
        Self {
            device,
            devices: manager.devices,
            wire: manager.transport.wire.name().to_owned(),
            queue_feature: manager.transport.queue_feature,
            devices_feature: manager.transport.devices_feature,
            stops: Stops::of(manager.offer.doors),
            packed: manager.offer.packed,
        }
    }

    pub(super) fn to_config(&self) -> Result<config::Manager, String> {
        let wire = Wire::from_name(&self.wire);
        if self.stops.device_state_cap {
            return Err("stops.device_state_cap: managed devices have no capabilities".to_owned());
        }
        Ok(config::Manager {
            device: match &self.device {
                ManagerKind::Net { switch, mac: text } => ManagerDevice::Net {
                    switch: switch.clone(),
                    mac: Some(mac(text)?),
                },
                ManagerKind::Block { path, readonly, .. } => ManagerDevice::Block {
                    path: path.clone(),
                    readonly: *readonly,
                },
            },
            devices: self.devices,
            transport: Options {
                wire: wire.ok_or_else(|| format!("wire: {} is unknown", self.wire))?,
                queue_feature: self.queue_feature,
                devices_feature: self.devices_feature,
            },
            offer: offer(&self.stops, self.packed)?,
        })
    }

    /// Every file of it, as management device `index`: names, and whether they are only read.
    pub(super) fn files(&self, index: usize) -> Vec<(String, File, bool)> {
        let ManagerKind::Block {
            path,
            files,
            readonly,
        } = &self.device
        else {
            return Vec::new();
        };
        let name = format!("manager{index}");
        let file = |number| {
            let file = File {
                path: numbered_path(path, number),
                identity: files.get(&number).copied(),
            };
            (device_name(&name, number), file, *readonly)
        };
        (0..=self.devices).map(file).collect()
    }

    /// As [`Machine::check_files`](super::Machine::check_files).
    pub(super) fn check_files(&self, index: usize) -> Result<(), MachineError> {
        let ManagerKind::Block { path, files, .. } = &self.device else {
            return Ok(());
        };
        let field = |name: &str| format!("managers[{index}].device.block.{name}");
        absolute(Path::new(path), || field("path"))?;
        match files.keys().find(|number| **number > self.devices) {
            Some(number) => Err(wrong(
                field("files"),
                format!(
                    "there is no device {number}; this management device has {}",
                    self.devices
                ),
            )),
            None => Ok(()),
        }
    }
}
