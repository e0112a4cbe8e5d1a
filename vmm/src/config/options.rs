//! Disks and network interfaces as the command line and the configuration file write them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use devices::net::MacAddress;
use devices::virtio::Offer;
use serde::{Deserialize, Serialize};

use super::offer;

/// Longest serial number of a virtio disk in bytes (virtio 1.4, 5.2.6).
const SERIAL_MAX: usize = 20;
/// Longest name of a network interface in bytes, as Linux has it.
const IFNAME_MAX: usize = 15;
/// The most queues of a disk.
const MAX_QUEUES: u16 = 64;

/// How a disk is written, but for its doors.
const DISK_FORM: &str = "path=PATH[,readonly][,serial=ID][,queues=N][,bus=root|port]";
/// The same of a network interface.
const NET_FORM: &str = "tap=NAME|switch=NAME[,mac=MAC][,bus=root|port]";

/// Where a device sits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// On the root bus.
    #[default]
    Root,
    /// Behind a root port of its own.
    Port,
}

impl FromStr for Slot {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "root" => Ok(Self::Root),
            "port" => Ok(Self::Port),
            _ => Err(format!("bus={text} is unknown; write bus=root or bus=port")),
        }
    }
}

/// A disk: `path=PATH[,readonly][,serial=ID][,queues=N][,bus=root|port]`, and what it offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawDisk", into = "RawDisk")]
pub struct Disk {
    /// A raw image file or a block device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub readonly: bool,
    /// Serial number shown to the guest; at most 20 bytes of ASCII.
    pub serial: Option<String>,
    /// Number of request queues.
    pub queues: u16,
    /// Where it sits.
    pub bus: Slot,
    /// What it offers its driver besides.
    pub offer: Offer,
}

/// The JSON form of [`Disk`].
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawDisk {
    path: PathBuf,
    #[serde(default)]
    readonly: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    #[serde(default = "one", skip_serializing_if = "is_one")]
    queues: u16,
    #[serde(default)]
    bus: Slot,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    suspend: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_stop: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    device_state_cap: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    packed: bool,
}

impl TryFrom<RawDisk> for Disk {
    type Error = String;

    fn try_from(raw: RawDisk) -> Result<Self, String> {
        let given = offer::Given {
            suspend: raw.suspend,
            device_stop: raw.device_stop,
            device_state_cap: raw.device_state_cap,
            packed: raw.packed,
        };
        Ok(Self {
            path: raw.path,
            readonly: raw.readonly,
            serial: raw.serial,
            queues: raw.queues,
            bus: raw.bus,
            offer: given.try_into()?,
        })
    }
}

impl From<Disk> for RawDisk {
    fn from(disk: Disk) -> Self {
        let given = offer::Given::from(disk.offer);
        Self {
            path: disk.path,
            readonly: disk.readonly,
            serial: disk.serial,
            queues: disk.queues,
            bus: disk.bus,
            suspend: given.suspend,
            device_stop: given.device_stop,
            device_state_cap: given.device_state_cap,
            packed: given.packed,
        }
    }
}

fn one() -> u16 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_one(n: &u16) -> bool {
    *n == 1
}

impl Disk {
    /// Checks what text and JSON cannot express.
    pub fn validate(&self) -> Result<(), String> {
        if self.path.as_os_str().is_empty() {
            return Err("path= is empty; write path=PATH".to_owned());
        }
        if !(1..=MAX_QUEUES).contains(&self.queues) {
            return Err(queues_rule(&self.queues.to_string()));
        }
        match &self.serial {
            Some(serial)
                if serial.is_empty() || serial.len() > SERIAL_MAX || !printable(serial) =>
            {
                Err(format!(
                    "serial={serial} is not possible; it takes 1 to {SERIAL_MAX} printable ASCII characters"
                ))
            }
            _ => Ok(()),
        }
    }
}

/// Why `queues=given` was refused.
fn queues_rule(given: &str) -> String {
    format!("queues={given} is not possible; a disk has between 1 and {MAX_QUEUES} queues")
}

fn printable(text: &str) -> bool {
    text.bytes().all(|b| (0x20..0x7f).contains(&b))
}

impl FromStr for Disk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut disk = Self {
            path: PathBuf::new(),
            readonly: false,
            serial: None,
            queues: 1,
            bus: Slot::Root,
            offer: Offer::default(),
        };
        for (key, value) in fields(text)? {
            match (key, value) {
                ("path", Some(value)) => disk.path = value.into(),
                ("readonly", None) => disk.readonly = true,
                ("serial", Some(value)) => disk.serial = Some(value.to_owned()),
                ("queues", Some(value)) => {
                    disk.queues = value.parse().map_err(|_| queues_rule(value))?;
                }
                ("bus", Some(value)) => disk.bus = value.parse()?,
                _ if offer::take(&mut disk.offer, key, value)? => {}
                _ => return Err(unknown(key, value, &format!("{DISK_FORM}{}", offer::FORM))),
            }
        }
        disk.validate()?;
        Ok(disk)
    }
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path={}", self.path.display())?;
        if self.readonly {
            f.write_str(",readonly")?;
        }
        if let Some(serial) = &self.serial {
            write!(f, ",serial={serial}")?;
        }
        if self.queues != 1 {
            write!(f, ",queues={}", self.queues)?;
        }
        if self.bus == Slot::Port {
            f.write_str(",bus=port")?;
        }
        offer::write(f, self.offer)
    }
}

/// What a network interface is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NetBackend {
    /// A tap device of the host.
    Tap(String),
    /// The switch of that name inside this process.
    Switch(String),
}

/// A network interface: `tap=NAME|switch=NAME[,mac=MAC][,bus=root|port]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawNet", into = "RawNet")]
pub struct Net {
    /// What it is connected to.
    pub backend: NetBackend,
    /// Its address; one is made up if absent.
    pub mac: Option<MacAddress>,
    /// Where it sits.
    pub bus: Slot,
    /// What it offers its driver besides.
    pub offer: Offer,
}

/// The JSON form of [`Net`]: `tap` or `switch` as a key.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNet {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tap: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddress>,
    #[serde(default)]
    bus: Slot,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    suspend: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_stop: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    device_state_cap: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    packed: bool,
}

impl TryFrom<RawNet> for Net {
    type Error = String;

    fn try_from(raw: RawNet) -> Result<Self, String> {
        let backend = match (raw.tap, raw.switch) {
            (Some(tap), None) if interface_name(&tap) => NetBackend::Tap(tap),
            (Some(tap), None) => {
                return Err(interface_name_rule("tap", &tap));
            }
            (None, Some(switch)) if !switch.is_empty() => NetBackend::Switch(switch),
            (None, Some(_)) => return Err("switch= is empty; write switch=NAME".to_owned()),
            (Some(tap), Some(switch)) => {
                return Err(format!(
                    "tap={tap} and switch={switch} contradict each other: an interface has one peer"
                ));
            }
            (None, None) => {
                return Err("neither tap=NAME nor switch=NAME; write one of them".to_owned());
            }
        };
        let given = offer::Given {
            suspend: raw.suspend,
            device_stop: raw.device_stop,
            device_state_cap: raw.device_state_cap,
            packed: raw.packed,
        };
        Ok(Self {
            backend,
            mac: raw.mac,
            bus: raw.bus,
            offer: given.try_into()?,
        })
    }
}

impl From<Net> for RawNet {
    fn from(net: Net) -> Self {
        let (tap, switch) = match net.backend {
            NetBackend::Tap(name) => (Some(name), None),
            NetBackend::Switch(name) => (None, Some(name)),
        };
        let given = offer::Given::from(net.offer);
        Self {
            tap,
            switch,
            mac: net.mac,
            bus: net.bus,
            suspend: given.suspend,
            device_stop: given.device_stop,
            device_state_cap: given.device_state_cap,
            packed: given.packed,
        }
    }
}

pub(super) fn interface_name(name: &str) -> bool {
    (1..=IFNAME_MAX).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
}

/// Why `option=name` was refused.
pub(super) fn interface_name_rule(option: &str, name: &str) -> String {
    format!(
        "{option}={name} is not the name of an interface: 1 to {IFNAME_MAX} bytes, no slash, no space"
    )
}

impl FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut raw = RawNet {
            tap: None,
            switch: None,
            mac: None,
            bus: Slot::Root,
            suspend: None,
            device_stop: None,
            device_state_cap: false,
            packed: false,
        };
        let mut offered = Offer::default();
        for (key, value) in fields(text)? {
            match (key, value) {
                ("tap", Some(value)) => raw.tap = Some(value.to_owned()),
                ("switch", Some(value)) => raw.switch = Some(value.to_owned()),
                ("mac", Some(value)) => {
                    raw.mac = Some(value.parse().map_err(|e| format!("mac={value}: {e}"))?)
                }
                ("bus", Some(value)) => raw.bus = value.parse()?,
                _ if offer::take(&mut offered, key, value)? => {}
                _ => return Err(unknown(key, value, &format!("{NET_FORM}{}", offer::FORM))),
            }
        }
        let net = Self::try_from(raw)?;
        Ok(Self {
            offer: offered,
            ..net
        })
    }
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            NetBackend::Tap(name) => write!(f, "tap={name}")?,
            NetBackend::Switch(name) => write!(f, "switch={name}")?,
        }
        if let Some(mac) = self.mac {
            write!(f, ",mac={mac}")?;
        }
        if self.bus == Slot::Port {
            f.write_str(",bus=port")?;
        }
        offer::write(f, self.offer)
    }
}

/// Splits `key=value,flag,...`. A key may occur once.
pub(super) fn fields(text: &str) -> Result<Vec<(&str, Option<&str>)>, String> {
    let mut found: Vec<(&str, Option<&str>)> = Vec::new();
    for part in text.split(',') {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        if found.iter().any(|(other, _)| *other == key) {
            return Err(format!("{key} is given twice"));
        }
        found.push((key, value));
    }
    Ok(found)
}

pub(super) fn unknown(key: &str, value: Option<&str>, form: &str) -> String {
    match value {
        Some(value) => format!("'{key}={value}' is not understood; write {form}"),
        None => format!("'{key}' is not understood; write {form}"),
    }
}
