//! A management device as the command line and the configuration file write it: a device with a transport virtqueue, and what
//! the devices that it manages can be made of.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::net::MacAddress;
use devices::transport_vq::{MAX_DEVICES, Options, Wire};
use devices::virtio::{DeviceType, Offer};
use serde::{Deserialize, Serialize};

use super::offer;
use super::options::{fields, unknown};
use super::pf::nth_mac;

/// What the number of a device is put in place of.
const PLACEHOLDER: &str = "%d";
/// How a management device is written.
const FORM: &str = "net,devices=N[,switch=NAME][,mac=MAC] or block,devices=N,path=PATH-WITH-%d[,readonly], each with \
                    [,wire=aligned|packed][,queue-feature=BIT][,devices-feature=BIT], and for the managed devices \
                    [,suspend=v5|v1.4][,device-stop[=BIT]][,packed]";

/// A management device and what it can make: `net,devices=N,…` or `block,devices=N,…`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawManager", into = "RawManager")]
pub struct Manager {
    /// What it and its devices are.
    pub device: ManagerDevice,
    /// The most managed devices there can be, 1 to [`MAX_DEVICES`].
    pub devices: u16,
    /// How its commands are laid out, and the numbers of its features.
    pub transport: Options,
    /// What managed devices can offer their drivers. Of it, the management device offers its own only packed rings.
    pub offer: Offer,
}

/// What is particular to the device type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManagerDevice {
    /// Network devices on one switch.
    Net {
        /// The switch of that name, which `--net` and `--pf` can join too; one of its own if absent.
        switch: Option<String>,
        /// The address of the management device; those of its devices follow it. Made up if absent, the same each time.
        mac: Option<MacAddress>,
    },
    /// Disks.
    Block {
        /// Their files; has one [`PLACEHOLDER`], for 0 in the file of the management device, and 1 and on.
        path: String,
        /// The guest can write none of them.
        readonly: bool,
    },
}

impl Manager {
    /// The device type of the management device and its devices.
    pub fn device_type(&self) -> DeviceType {
        match self.device {
            ManagerDevice::Net { .. } => DeviceType::Net,
            ManagerDevice::Block { .. } => DeviceType::Block,
        }
    }

    /// The number of the management device, 0, and those of its devices.
    pub fn numbers(&self) -> std::ops::RangeInclusive<u16> {
        0..=self.devices
    }

    /// The files of disks, by number.
    pub fn paths(&self) -> Vec<(u16, PathBuf)> {
        match &self.device {
            ManagerDevice::Block { path, .. } => self
                .numbers()
                .map(|number| (number, numbered_path(path, number)))
                .collect(),
            ManagerDevice::Net { .. } => Vec::new(),
        }
    }

    /// The addresses, if they were given.
    pub fn given_macs(&self) -> Vec<MacAddress> {
        match self.device {
            ManagerDevice::Net { mac: Some(mac), .. } => {
                self.numbers().map(|number| nth_mac(mac, number)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// The name of device `number` of the management device `manager`; number 0 is that itself.
pub fn device_name(manager: &str, number: u16) -> String {
    match number {
        0 => manager.to_owned(),
        number => format!("{manager}-{number}"),
    }
}

/// The file of device `number`.
pub fn numbered_path(pattern: &str, number: u16) -> PathBuf {
    pattern.replacen(PLACEHOLDER, &number.to_string(), 1).into()
}

/// Why `devices=given` was refused.
fn devices_rule(given: &str) -> String {
    format!(
        "devices={given} is not possible; a management device has between 1 and {MAX_DEVICES} managed devices"
    )
}

fn feature(option: &str, given: u32) -> Result<u8, String> {
    let small = u8::try_from(given).ok();
    small
        .filter(|bit| Options::FEATURES.contains(bit))
        .ok_or_else(|| feature_rule(option, &given.to_string()))
}

/// Why `option=given` was refused.
fn feature_rule(option: &str, given: &str) -> String {
    let (first, last) = (Options::FEATURES.start(), Options::FEATURES.end());
    format!(
        "{option}={given} is not possible; virtio 1.4 leaves the feature bits {first} to {last} free"
    )
}

/// Which device type, as both forms write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Net,
    Block,
}

/// The JSON form of [`Manager`], and the text form before it is checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawManager {
    #[serde(rename = "type")]
    kind: Kind,
    devices: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    #[serde(default)]
    readonly: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    wire: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queue_feature: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    devices_feature: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    suspend: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_stop: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    packed: bool,
}

impl RawManager {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            devices: 0,
            switch: None,
            mac: None,
            path: None,
            readonly: false,
            wire: None,
            queue_feature: None,
            devices_feature: None,
            suspend: None,
            device_stop: None,
            packed: false,
        }
    }

    /// The first option that belongs to the other device type, as it is written.
    fn foreign(&self) -> Option<String> {
        match self.kind {
            Kind::Net => self
                .path
                .as_ref()
                .map(|path| format!("path={path}"))
                .or_else(|| self.readonly.then(|| "readonly".to_owned())),
            Kind::Block => self
                .switch
                .as_ref()
                .map(|switch| format!("switch={switch}"))
                .or_else(|| self.mac.map(|mac| format!("mac={mac}"))),
        }
    }

    fn device(&self) -> Result<ManagerDevice, String> {
        match self.kind {
            Kind::Net if self.switch.as_deref() == Some("") => {
                Err("switch= is empty; write switch=NAME".to_owned())
            }
            Kind::Net => Ok(ManagerDevice::Net {
                switch: self.switch.clone(),
                mac: self.mac,
            }),
            Kind::Block => {
                let path = self.path.clone().ok_or(
                    "no path=PATH-WITH-%d, the disks of the management device and its devices; write one",
                )?;
                if path.matches(PLACEHOLDER).count() != 1 {
                    return Err(format!(
                        "path={path} does not have {PLACEHOLDER} once, where the number of the device goes; write it as \
                         in path=disk%d.raw"
                    ));
                }
                Ok(ManagerDevice::Block {
                    path,
                    readonly: self.readonly,
                })
            }
        }
    }

    fn transport(&self) -> Result<Options, String> {
        let default = Options::default();
        let bit = |option, given: Option<u32>, default| {
            given.map_or(Ok(default), |given| feature(option, given))
        };
        let options = Options {
            wire: match &self.wire {
                None => default.wire,
                Some(name) => Wire::from_name(name).ok_or_else(|| {
                    format!("wire={name} is unknown; write wire=aligned or wire=packed")
                })?,
            },
            queue_feature: bit("queue-feature", self.queue_feature, default.queue_feature)?,
            devices_feature: bit(
                "devices-feature",
                self.devices_feature,
                default.devices_feature,
            )?,
        };
        if options.queue_feature == options.devices_feature {
            let bit = options.queue_feature;
            return Err(format!(
                "queue-feature and devices-feature are both {bit}; each needs a bit of its own"
            ));
        }
        Ok(options)
    }
}

impl TryFrom<RawManager> for Manager {
    type Error = String;

    fn try_from(raw: RawManager) -> Result<Self, String> {
        let (kind, other) = match raw.kind {
            Kind::Net => ("net", "block"),
            Kind::Block => ("block", "net"),
        };
        if let Some(foreign) = raw.foreign() {
            return Err(format!(
                "{kind} and {foreign} contradict each other: that option is for {other}"
            ));
        }
        let devices = u16::try_from(raw.devices)
            .ok()
            .filter(|n| (1..=MAX_DEVICES).contains(n))
            .ok_or_else(|| devices_rule(&raw.devices.to_string()))?;
        let (device, transport) = (raw.device()?, raw.transport()?);
        let given = offer::Given {
            suspend: raw.suspend,
            device_stop: raw.device_stop,
            device_state_cap: false,
            packed: raw.packed,
        };
        Ok(Self {
            device,
            devices,
            transport,
            offer: given.try_into()?,
        })
    }
}

impl From<Manager> for RawManager {
    fn from(manager: Manager) -> Self {
        let given = offer::Given::from(manager.offer);
        let Options {
            wire,
            queue_feature,
            devices_feature,
        } = manager.transport;
        let default = Options::default();
        let bit = |bit: u8, default| (bit != default).then(|| bit.into());
        let kind = match manager.device {
            ManagerDevice::Net { .. } => Kind::Net,
            ManagerDevice::Block { .. } => Kind::Block,
        };
        let mut raw = Self {
            devices: manager.devices.into(),
            wire: (wire != default.wire).then(|| wire.name().to_owned()),
            queue_feature: bit(queue_feature, default.queue_feature),
            devices_feature: bit(devices_feature, default.devices_feature),
            suspend: given.suspend,
            device_stop: given.device_stop,
            packed: given.packed,
            ..Self::new(kind)
        };
        match manager.device {
            ManagerDevice::Net { switch, mac } => (raw.switch, raw.mac) = (switch, mac),
            ManagerDevice::Block { path, readonly } => {
                (raw.path, raw.readonly) = (Some(path), readonly);
            }
        }
        raw
    }
}

impl FromStr for Manager {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
        let kind = match kind {
            "net" => Kind::Net,
            "block" => Kind::Block,
            _ => return Err(unknown(kind, None, FORM)),
        };
        let mut raw = RawManager::new(kind);
        let mut devices = None;
        let mut offered = Offer::default();
        let given = match rest {
            "" => Vec::new(),
            rest => fields(rest)?,
        };
        let bit = |option: &str, value: &str| {
            let bit = value.parse::<u32>();
            bit.map_err(|_| feature_rule(option, value))
        };
        for (key, value) in given {
            match (key, value) {
                ("devices", Some(value)) => {
                    let number = value.parse::<u32>();
                    devices = Some(number.map_err(|_| devices_rule(value))?);
                }
                ("switch", Some(value)) => raw.switch = Some(value.to_owned()),
                ("mac", Some(value)) => {
                    raw.mac = Some(value.parse().map_err(|e| format!("mac={value}: {e}"))?);
                }
                ("path", Some(value)) => raw.path = Some(value.to_owned()),
                ("readonly", None) => raw.readonly = true,
                ("wire", Some(value)) => raw.wire = Some(value.to_owned()),
                ("queue-feature", Some(value)) => raw.queue_feature = Some(bit(key, value)?),
                ("devices-feature", Some(value)) => raw.devices_feature = Some(bit(key, value)?),
                ("device-state-cap", None) => {
                    return Err(
                        "device-state-cap is a PCI capability, which managed devices cannot have; VQ_ENABLE and VQ_STATE \
                         do the same"
                            .to_owned(),
                    );
                }
                _ if offer::take(&mut offered, key, value)? => {}
                _ => return Err(unknown(key, value, FORM)),
            }
        }
        raw.devices = devices.ok_or("no devices=N, the number of managed devices; write one")?;
        let manager = Self::try_from(raw)?;
        Ok(Self {
            offer: offered,
            ..manager
        })
    }
}

impl fmt::Display for Manager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},devices={}", self.device_type().name(), self.devices)?;
        match &self.device {
            ManagerDevice::Net { switch, mac } => {
                if let Some(switch) = switch {
                    write!(f, ",switch={switch}")?;
                }
                if let Some(mac) = mac {
                    write!(f, ",mac={mac}")?;
                }
            }
            ManagerDevice::Block { path, readonly } => {
                write!(f, ",path={path}")?;
                if *readonly {
                    f.write_str(",readonly")?;
                }
            }
        }
        let (own, default) = (self.transport, Options::default());
        if own.wire != default.wire {
            write!(f, ",wire={}", own.wire.name())?;
        }
        for (option, bit, default) in [
            ("queue-feature", own.queue_feature, default.queue_feature),
            (
                "devices-feature",
                own.devices_feature,
                default.devices_feature,
            ),
        ] {
            if bit != default {
                write!(f, ",{option}={bit}")?;
            }
        }
        offer::write(f, self.offer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_written_again_in_both_forms() {
        for text in [
            "net,devices=1",
            "net,devices=255,switch=lan,mac=02:00:00:00:00:01",
            "block,devices=3,path=/d%d.raw",
            "block,devices=3,path=/d%d.raw,readonly,wire=packed,queue-feature=47,devices-feature=48",
            "net,devices=2,suspend=v5,device-stop=44,packed",
        ] {
            let manager: Manager = text.parse().unwrap();
            assert_eq!(manager.to_string(), text);
            let json = serde_json::to_string(&manager).unwrap();
            assert_eq!(
                serde_json::from_str::<Manager>(&json).unwrap(),
                manager,
                "{json}"
            );
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_part_and_the_cure() {
        for (text, part) in [
            ("", "'' is not understood; write net,devices=N"),
            ("rng,devices=1", "'rng' is not understood"),
            ("net", "no devices=N"),
            ("net,devices=0", "devices=0 is not possible"),
            ("net,devices=256", "between 1 and 255"),
            ("net,devices=-1", "devices=-1 is not possible"),
            ("net,devices=1,devices=2", "devices is given twice"),
            ("net,devices=1,path=a", "net and path=a contradict"),
            ("block,devices=1", "no path=PATH-WITH-%d"),
            ("block,devices=1,path=a", "does not have %d once"),
            ("block,devices=1,path=%d%d", "does not have %d once"),
            (
                "block,devices=1,path=%d,switch=s",
                "block and switch=s contradict",
            ),
            ("net,devices=1,wire=loose", "wire=aligned or wire=packed"),
            ("net,devices=1,queue-feature=43", "44 to 49"),
            ("net,devices=1,queue-feature=x", "44 to 49"),
            ("net,devices=1,queue-feature=46", "both 46"),
            ("net,devices=1,device-state-cap", "VQ_STATE"),
            ("net,devices=1,switch=", "switch= is empty"),
            ("net,devices=1,vfs=2", "'vfs=2' is not understood"),
        ] {
            let error = text.parse::<Manager>().unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn devices_have_files_and_addresses_that_follow_each_other() {
        let disks: Manager = "block,devices=2,path=/d%d".parse().unwrap();
        let paths: Vec<_> = disks.paths().into_iter().map(|(_, path)| path).collect();
        assert_eq!(paths, ["/d0", "/d1", "/d2"].map(PathBuf::from));
        let nets: Manager = "net,devices=2,mac=02:00:00:00:00:ff".parse().unwrap();
        let macs: Vec<_> = nets.given_macs().iter().map(ToString::to_string).collect();
        assert_eq!(macs[1..], ["02:00:00:00:01:00", "02:00:00:00:01:01"]);
        assert_eq!(device_name("manager0", 0), "manager0");
        assert_eq!(device_name("manager0", 2), "manager0-2");
    }
}
