//! An SR-IOV owner and its members as the command line and the configuration file write them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use devices::admin::{self, Drain, Profile, Strictness};
use devices::net::MacAddress;
use devices::virtio::{DeviceType, Offer};
use serde::{Deserialize, Serialize};

use super::offer;
use super::options::{fields, interface_name, interface_name_rule, unknown};

/// The most virtual functions: with their owner they fill a bus.
pub const MAX_VFS: u16 = 255;
/// What the number of a virtual function is put in place of.
const PLACEHOLDER: &str = "%d";
/// How an owner is written.
const FORM: &str = "net,vfs=N[,switch=NAME][,uplink-tap=NAME][,mac=MAC] or block,vfs=N,path=PATH,vf-path=PATH-WITH-%d\
                    [,readonly], each with [,strict-admin][,admin=draft|v1.4][,drain-ms=N][,passthrough], and for the \
                    virtual functions";
/// The longest time that can be given for `drain-ms`; commands of the monitor wait longer.
const MAX_DRAIN_MS: u32 = 5000;

/// An owner, its members, and how both are shown: `net,vfs=N,…` or `block,vfs=N,…`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawPf", into = "RawPf")]
pub struct Pf {
    /// What the owner and its members are.
    pub device: PfDevice,
    /// Number of members, 1 to [`MAX_VFS`].
    pub vfs: u16,
    /// Administration commands to the letter of virtio 1.4, where Linux needs some latitude.
    pub strict_admin: bool,
    /// The administration commands it has.
    pub admin: Profile,
    /// How long a member that is to stop waits for what is in flight before it takes back what has not begun.
    pub drain: Drain,
    /// What members offer their drivers besides. Of it, the owner offers its own only packed rings.
    pub offer: Offer,
    /// The monitor keeps the owner; the guest gets the members, as plain endpoints.
    pub passthrough: bool,
}

/// What is particular to the device type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PfDevice {
    /// Network devices on one switch.
    Net {
        /// The switch of that name, which `--net` can join too; one of its own if absent.
        switch: Option<String>,
        /// A tap of the host that is plugged into the switch.
        uplink_tap: Option<String>,
        /// The address of the owner; those of the members follow it. Made up if absent, the same each time.
        mac: Option<MacAddress>,
    },
    /// Disks.
    Block {
        /// The owner's file; `None` exactly if the monitor keeps the owner.
        path: Option<PathBuf>,
        /// The members' files; has one [`PLACEHOLDER`].
        vf_path: String,
        /// The guest can write none of them.
        readonly: bool,
    },
}

impl Pf {
    /// The device type of the owner and its members.
    pub fn device_type(&self) -> DeviceType {
        match self.device {
            PfDevice::Net { .. } => DeviceType::Net,
            PfDevice::Block { .. } => DeviceType::Block,
        }
    }

    /// How the owner takes administration commands.
    pub fn admin_options(&self) -> admin::Options {
        admin::Options {
            profile: self.admin,
            drain: self.drain,
            strictness: match self.strict_admin {
                true => Strictness::Strict,
                false => Strictness::Lenient,
            },
        }
    }

    /// Files the owner (number 0) and its members (from 1) keep their bytes in.
    pub fn paths(&self) -> Vec<(u16, PathBuf)> {
        let PfDevice::Block { path, vf_path, .. } = &self.device else {
            return Vec::new();
        };
        let own = path.iter().map(|path| (0, path.clone()));
        let members = (1..=self.vfs).map(|n| (n, member_path(vf_path, n)));
        own.chain(members).collect()
    }

    /// The addresses of the owner, if it is shown, and of its members, if they were given.
    pub fn given_macs(&self) -> Vec<MacAddress> {
        match self.device {
            PfDevice::Net { mac: Some(mac), .. } => {
                let first = u16::from(self.passthrough);
                (first..=self.vfs).map(|n| nth_mac(mac, n)).collect()
            }
            _ => Vec::new(),
        }
    }
}

/// Why `vfs=given` was refused.
fn vfs_rule(given: &str) -> String {
    format!("vfs={given} is not possible; an owner has between 1 and {MAX_VFS} virtual functions")
}

/// Whole milliseconds; they are at most [`MAX_DRAIN_MS`].
fn milliseconds(drain: Drain) -> u32 {
    drain.0.as_millis().try_into().unwrap_or(MAX_DRAIN_MS)
}

/// Why `drain-ms=given` was refused.
fn drain_rule(given: &str) -> String {
    format!("drain-ms={given} is not possible; it takes milliseconds from 0 to {MAX_DRAIN_MS}")
}

/// The file of member `number`.
pub fn member_path(pattern: &str, number: u16) -> PathBuf {
    pattern.replacen(PLACEHOLDER, &number.to_string(), 1).into()
}

/// The address `number` after `mac`: the last three octets count, the others say whose they are.
pub fn nth_mac(mac: MacAddress, number: u16) -> MacAddress {
    let [a, b, c, d, e, f] = mac.octets();
    let [_, d, e, f] = u32::from_be_bytes([0, d, e, f])
        .wrapping_add(u32::from(number))
        .to_be_bytes();
    MacAddress::new([a, b, c, d, e, f])
}

/// Which device type, as both forms write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Net,
    Block,
}

/// The JSON form of [`Pf`], and the text form before it is checked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPf {
    #[serde(rename = "type")]
    kind: Kind,
    vfs: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    switch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uplink_tap: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddress>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vf_path: Option<String>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    strict_admin: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    admin: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drain_ms: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    suspend: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device_stop: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    device_state_cap: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    packed: bool,
    #[serde(default)]
    passthrough: bool,
}

impl RawPf {
    fn new(kind: Kind) -> Self {
        Self {
            kind,
            vfs: 0,
            switch: None,
            uplink_tap: None,
            mac: None,
            path: None,
            vf_path: None,
            readonly: false,
            strict_admin: false,
            admin: None,
            drain_ms: None,
            suspend: None,
            device_stop: None,
            device_state_cap: false,
            packed: false,
            passthrough: false,
        }
    }

    /// Options that belong to the other device type, as they are written.
    fn foreign(&self) -> Vec<String> {
        let text = |name: &str, value: &Option<String>| {
            let value = value.as_ref()?;
            Some(format!("{name}={value}"))
        };
        let path = self.path.as_ref().map(|p| p.display().to_string());
        let mac = self.mac.map(|mac| mac.to_string());
        match self.kind {
            Kind::Net => [text("path", &path), text("vf-path", &self.vf_path)]
                .into_iter()
                .chain([self.readonly.then(|| "readonly".to_owned())])
                .flatten()
                .collect(),
            Kind::Block => [
                text("switch", &self.switch),
                text("uplink-tap", &self.uplink_tap),
                text("mac", &mac),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
    }

    fn net(self) -> Result<PfDevice, String> {
        if self.switch.as_deref() == Some("") {
            return Err("switch= is empty; write switch=NAME".to_owned());
        }
        if let Some(tap) = self.uplink_tap.as_deref().filter(|t| !interface_name(t)) {
            return Err(interface_name_rule("uplink-tap", tap));
        }
        Ok(PfDevice::Net {
            switch: self.switch,
            uplink_tap: self.uplink_tap,
            mac: self.mac,
        })
    }

    fn block(self) -> Result<PfDevice, String> {
        let path = match self.path {
            Some(path) if path.as_os_str().is_empty() => {
                return Err("path= is empty; write path=PATH".to_owned());
            }
            Some(path) if self.passthrough => {
                return Err(format!(
                    "path={} and passthrough contradict each other: the guest does not see the owner, so it has no \
                     disk",
                    path.display()
                ));
            }
            None if !self.passthrough => {
                return Err(
                    "no path=PATH, the owner's own disk; write one, or passthrough".to_owned(),
                );
            }
            path => path,
        };
        let vf_path = self
            .vf_path
            .ok_or("no vf-path=PATH-WITH-%d, the disks of the virtual functions; write one")?;
        if vf_path.matches(PLACEHOLDER).count() != 1 {
            return Err(format!(
                "vf-path={vf_path} does not have {PLACEHOLDER} once, where the number of the virtual function goes; \
                 write it as in vf-path=vf%d.raw"
            ));
        }
        Ok(PfDevice::Block {
            path,
            vf_path,
            readonly: self.readonly,
        })
    }
}

impl TryFrom<RawPf> for Pf {
    type Error = String;

    fn try_from(raw: RawPf) -> Result<Self, String> {
        let (kind, other) = match raw.kind {
            Kind::Net => ("net", "block"),
            Kind::Block => ("block", "net"),
        };
        if let Some(foreign) = raw.foreign().first() {
            return Err(format!(
                "{kind} and {foreign} contradict each other: that option is for {other}"
            ));
        }
        let vfs = u16::try_from(raw.vfs)
            .ok()
            .filter(|n| (1..=MAX_VFS).contains(n))
            .ok_or_else(|| vfs_rule(&raw.vfs.to_string()))?;
        let admin = match &raw.admin {
            Some(name) => name.parse().map_err(|e| format!("admin={name}: {e}"))?,
            None => Profile::default(),
        };
        let drain = match raw.drain_ms {
            Some(ms) if ms <= MAX_DRAIN_MS => Drain(Duration::from_millis(ms.into())),
            Some(ms) => return Err(drain_rule(&ms.to_string())),
            None => Drain::default(),
        };
        let given = offer::Given {
            suspend: raw.suspend.clone(),
            device_stop: raw.device_stop,
            device_state_cap: raw.device_state_cap,
            packed: raw.packed,
        };
        Ok(Self {
            vfs,
            admin,
            drain,
            offer: given.try_into()?,
            strict_admin: raw.strict_admin,
            passthrough: raw.passthrough,
            device: match raw.kind {
                Kind::Net => raw.net()?,
                Kind::Block => raw.block()?,
            },
        })
    }
}

impl From<Pf> for RawPf {
    fn from(pf: Pf) -> Self {
        let given = offer::Given::from(pf.offer);
        let mut raw = Self {
            vfs: pf.vfs.into(),
            strict_admin: pf.strict_admin,
            admin: (pf.admin != Profile::default()).then(|| pf.admin.name().to_owned()),
            drain_ms: (pf.drain != Drain::default()).then(|| milliseconds(pf.drain)),
            suspend: given.suspend,
            device_stop: given.device_stop,
            device_state_cap: given.device_state_cap,
            packed: given.packed,
            passthrough: pf.passthrough,
            ..Self::new(Kind::Net)
        };
        match pf.device {
            PfDevice::Net {
                switch,
                uplink_tap,
                mac,
            } => (raw.switch, raw.uplink_tap, raw.mac) = (switch, uplink_tap, mac),
            PfDevice::Block {
                path,
                vf_path,
                readonly,
            } => {
                raw.kind = Kind::Block;
                (raw.path, raw.vf_path, raw.readonly) = (path, Some(vf_path), readonly);
            }
        }
        raw
    }
}

impl FromStr for Pf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
        let kind = match kind {
            "net" => Kind::Net,
            "block" => Kind::Block,
            _ => return Err(unknown(kind, None, &format!("{FORM} {}", offer::FORM))),
        };
        let mut vfs = None;
        let mut raw = RawPf::new(kind);
        let mut offered = Offer::default();
        let given = if rest.is_empty() {
            Vec::new()
        } else {
            fields(rest)?
        };
        for (key, value) in given {
            match (key, value) {
                ("vfs", Some(value)) => {
                    let number = value.parse::<u32>();
                    vfs = Some(number.map_err(|_| vfs_rule(value))?);
                }
                ("switch", Some(value)) => raw.switch = Some(value.to_owned()),
                ("uplink-tap", Some(value)) => raw.uplink_tap = Some(value.to_owned()),
                ("mac", Some(value)) => {
                    raw.mac = Some(value.parse().map_err(|e| format!("mac={value}: {e}"))?);
                }
                ("path", Some(value)) => raw.path = Some(value.into()),
                ("vf-path", Some(value)) => raw.vf_path = Some(value.to_owned()),
                ("readonly", None) => raw.readonly = true,
                ("strict-admin", None) => raw.strict_admin = true,
                ("admin", Some(value)) => raw.admin = Some(value.to_owned()),
                ("drain-ms", Some(value)) => {
                    raw.drain_ms = Some(value.parse().map_err(|_| drain_rule(value))?);
                }
                ("passthrough", None) => raw.passthrough = true,
                _ if offer::take(&mut offered, key, value)? => {}
                _ => return Err(unknown(key, value, &format!("{FORM} {}", offer::FORM))),
            }
        }
        raw.vfs = vfs.ok_or("no vfs=N, the number of virtual functions; write one")?;
        let pf = Self::try_from(raw)?;
        Ok(Self {
            offer: offered,
            ..pf
        })
    }
}

impl fmt::Display for Pf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},vfs={}", self.device_type().name(), self.vfs)?;
        let option = |f: &mut fmt::Formatter<'_>, name: &str, value: Option<&dyn fmt::Display>| {
            value.map_or(Ok(()), |value| write!(f, ",{name}={value}"))
        };
        let flag = |f: &mut fmt::Formatter<'_>, name: &str, set: bool| match set {
            true => write!(f, ",{name}"),
            false => Ok(()),
        };
        match &self.device {
            PfDevice::Net {
                switch,
                uplink_tap,
                mac,
            } => {
                option(f, "switch", switch.as_ref().map(|s| s as _))?;
                option(f, "uplink-tap", uplink_tap.as_ref().map(|t| t as _))?;
                option(f, "mac", mac.as_ref().map(|m| m as _))?;
            }
            PfDevice::Block {
                path,
                vf_path,
                readonly,
            } => {
                let path = path.as_ref().map(|path| path.display());
                option(f, "path", path.as_ref().map(|p| p as _))?;
                option(f, "vf-path", Some(vf_path))?;
                flag(f, "readonly", *readonly)?;
            }
        }
        flag(f, "strict-admin", self.strict_admin)?;
        if self.admin != Profile::default() {
            write!(f, ",admin={}", self.admin.name())?;
        }
        if self.drain != Drain::default() {
            write!(f, ",drain-ms={}", milliseconds(self.drain))?;
        }
        flag(f, "passthrough", self.passthrough)?;
        offer::write(f, self.offer)
    }
}

#[cfg(test)]
mod tests;
