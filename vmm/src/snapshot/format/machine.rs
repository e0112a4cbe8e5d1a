//! The specification of a machine: everything it is built from, with nothing left to defaults.

mod files;
mod manager;

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use devices::admin::{Drain, Profile};
use devices::net::MacAddress;
use devices::virtio::{Doors, Offer, Suspend};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::hex::Hex;
pub use super::parameters::Parameters;
use crate::boot::load::Sources;
use crate::config::{self, Layout, MachineSpec, NetBackend, PfDevice, Slot};
use crate::layout;
pub use manager::{Manager, ManagerKind};

/// What a machine is made of. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Version of the guest physical address map, of the order of devices on the PCI bus, and of the virtqueues they have: 1,
    /// or 2, in which network devices have a control virtqueue.
    pub layout: u32,
    /// Number of vCPUs.
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// What the guest was booted from. Not needed again.
    pub boot: Boot,
    /// Disks, in the order the guest sees them: `disk0` and so on.
    pub disks: Vec<Disk>,
    /// Network interfaces, in the order the guest sees them: `net0` and so on.
    pub nets: Vec<Net>,
    /// SR-IOV owners, in the order the guest sees them: `pf0` and so on.
    pub pfs: Vec<Pf>,
    /// Management devices, in the order the guest sees them: `manager0` and so on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub managers: Vec<Manager>,
    /// There is an entropy device, `rng`.
    pub rng: bool,
    /// The serial console: `stdio`, `file=PATH` or `none`.
    pub console: String,
    /// The virtio console, `console`, if there is one.
    pub virtio_console: Option<String>,
    /// What drivers see of devices and no option asks for.
    pub parameters: Parameters,
}

/// What a guest was booted from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Boot {
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// A file that belongs to the machine, as it was when the guest stood still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Its path.
    pub path: PathBuf,
    /// Its contents at that time, as far as metadata tell.
    pub identity: Option<Identity>,
}

/// What tells whether a file has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    /// Bytes.
    pub size: u64,
    /// Time of the last change of its contents, in seconds since 1970.
    pub modified_s: i64,
    /// Nanoseconds of that time.
    pub modified_ns: u32,
}

/// What a driver can stop a device with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Stops {
    /// SUSPEND: `v5` or `v1.4`.
    pub suspend: Option<String>,
    /// Feature bit of DEVICE_STOPPED.
    pub device_stop: Option<u8>,
    /// The device-state capability.
    pub device_state_cap: bool,
}

/// Where a device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Bus {
    /// On the root bus.
    Root,
    /// Behind a root port of its own.
    Port,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Image file or block device.
    pub file: File,
    /// The guest cannot write.
    pub readonly: bool,
    /// Serial number.
    pub serial: Option<String>,
    /// Number of request queues.
    pub queues: u16,
    /// Where it sits.
    pub bus: Bus,
    /// What its driver can stop it with.
    pub stops: Stops,
    /// Its drivers may choose packed rings.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
}

/// What a network interface is connected to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// A tap device of the host.
    Tap(String),
    /// The switch of that name inside the monitor.
    Switch(String),
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// What it is connected to.
    pub peer: Peer,
    /// MAC address.
    pub mac: String,
    /// Where it sits.
    pub bus: Bus,
    /// What its driver can stop it with.
    pub stops: Stops,
    /// Its drivers may choose packed rings.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
}

/// An SR-IOV owner and its members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pf {
    /// What is particular to the device type.
    pub device: PfKind,
    /// The most members there can be.
    pub vfs: u16,
    /// Administration commands are taken to the letter of virtio 1.4.
    pub strict_admin: bool,
    /// The set of administration commands: `draft` or `v1.4`.
    pub admin: String,
    /// Milliseconds after which a member that is to stop recalls requests that have not begun.
    pub drain_ms: u32,
    /// The monitor keeps the owner; the guest has its members as plain devices.
    pub passthrough: bool,
    /// What drivers of the members can stop them with.
    pub stops: Stops,
    /// Its drivers may choose packed rings.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packed: bool,
}

/// What is particular to the device type of an owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum PfKind {
    /// Network devices on one switch.
    Net {
        /// The switch of that name; one of its own if null.
        switch: Option<String>,
        /// A tap of the host that is plugged into the switch.
        uplink_tap: Option<String>,
        /// MAC address of the owner; those of the members follow it.
        mac: String,
    },
    /// Disks.
    Block {
        /// The owner's file; null if the monitor keeps the owner.
        file: Option<File>,
        /// The members' files; `%d` stands for the number of the member.
        vf_path: String,
        /// Members' files as they were, by member.
        vf_files: BTreeMap<u16, Identity>,
        /// The guest can write none of them.
        readonly: bool,
    },
}

/// Why the specification in a snapshot was rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("machine.{field}: {reason}")]
pub struct MachineError {
    /// Where.
    pub field: String,
    /// What is wrong, and the cure.
    pub reason: String,
}

pub(super) fn wrong(field: impl Into<String>, reason: impl ToString) -> MachineError {
    MachineError {
        field: field.into(),
        reason: reason.to_string(),
    }
}

impl Identity {
    /// That of the file at `path` now; `None` for one that is not there, and for a block device, which does not say when
    /// it was written to.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok().filter(|m| m.is_file())?;
        Some(Self {
            size: metadata.len(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec() as u32,
        })
    }
}

impl File {
    fn of(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            identity: Identity::of(path),
        }
    }
}

impl Machine {
    /// The JSON form of `spec`, with what its files are now.
    pub fn of(spec: &MachineSpec) -> Self {
        Self {
            layout: spec.layout.number(),
            cpus: spec.cpus,
            memory: spec.memory,
            boot: Boot {
                kernel: spec.boot.kernel.clone(),
                initrd: spec.boot.initrd.clone(),
                cmdline: spec.boot.cmdline.clone(),
            },
            disks: spec.disks.iter().map(Disk::of).collect(),
            nets: spec.nets.iter().map(Net::of).collect(),
            pfs: spec.pfs.iter().map(Pf::of).collect(),
            managers: spec.managers.iter().map(Manager::of).collect(),
            rng: spec.rng,
            console: spec.console.clone().into(),
            virtio_console: spec.virtio_console.clone().map(Into::into),
            parameters: Parameters::of(&spec.parameters),
        }
    }

    /// The specification, checked as one that was given on the command line.
    pub fn to_spec(&self) -> Result<MachineSpec, MachineError> {
        let layout = Layout::from_number(self.layout).ok_or_else(|| {
            let (found, newest) = (self.layout, Layout::default().number());
            let reason = format!("{found} is unknown; this tern builds layouts 1 to {newest}");
            wrong("layout", reason)
        })?;
        if !(1..=config::MAX_CPUS).contains(&self.cpus) {
            let (cpus, most) = (self.cpus, config::MAX_CPUS);
            return Err(wrong("cpus", format!("{cpus} is not between 1 and {most}")));
        }
        let sizes = layout::MIN_RAM..=layout::MAX_RAM;
        if !sizes.contains(&self.memory) || !self.memory.is_multiple_of(layout::MIB) {
            let memory = self.memory;
            return Err(wrong(
                "memory",
                format!("{memory} is not a number of MiB from 64M to 256G, in bytes"),
            ));
        }
        self.check_files()?;
        let each = |field: &str, index: usize| format!("{field}[{index}]");
        let mut spec = MachineSpec {
            boot: Sources {
                kernel: self.boot.kernel.clone(),
                initrd: self.boot.initrd.clone(),
                cmdline: self.boot.cmdline.clone(),
            },
            cpus: self.cpus,
            memory: self.memory,
            disks: Vec::new(),
            nets: Vec::new(),
            pfs: Vec::new(),
            managers: Vec::new(),
            rng: self.rng,
            console: self.console.parse().map_err(|e| wrong("console", e))?,
            virtio_console: match &self.virtio_console {
                Some(text) => Some(text.parse().map_err(|e| wrong("virtio_console", e))?),
                None => None,
            },
            layout,
            parameters: self.parameters.to_config()?,
        };
        for (index, disk) in self.disks.iter().enumerate() {
            let disk = disk.to_config().and_then(checked);
            spec.disks
                .push(disk.map_err(|e| wrong(each("disks", index), e))?);
        }
        for (index, net) in self.nets.iter().enumerate() {
            let net = net.to_config().and_then(checked);
            spec.nets
                .push(net.map_err(|e| wrong(each("nets", index), e))?);
        }
        for (index, pf) in self.pfs.iter().enumerate() {
            let pf = pf.to_config().and_then(checked);
            spec.pfs.push(pf.map_err(|e| wrong(each("pfs", index), e))?);
        }
        for (index, manager) in self.managers.iter().enumerate() {
            let manager = manager.to_config().and_then(checked);
            spec.managers
                .push(manager.map_err(|e| wrong(each("managers", index), e))?);
        }
        spec.check_contradictions()
            .map_err(|e| wrong("disks, nets, pfs, managers", e))?;
        Ok(spec)
    }

    /// Every file that a guest writes to or reads from: its name on the command line, and whether it is only read.
    pub fn files(&self) -> Vec<(String, File, bool)> {
        let disks = self.disks.iter().enumerate();
        let disks =
            disks.map(|(index, disk)| (format!("disk{index}"), disk.file.clone(), disk.readonly));
        let members = self.pfs.iter().enumerate().flat_map(|(index, pf)| {
            let PfKind::Block {
                file,
                vf_path,
                vf_files,
                readonly,
            } = &pf.device
            else {
                return Vec::new();
            };
            let own = file
                .iter()
                .map(|file| (format!("pf{index}"), file.clone(), *readonly));
            let members = (1..=pf.vfs).map(|number| {
                let file = File {
                    path: config::pf::member_path(vf_path, number),
                    identity: vf_files.get(&number).copied(),
                };
                (format!("pf{index}-vf{number}"), file, *readonly)
            });
            own.chain(members).collect()
        });
        let managers = self.managers.iter().enumerate();
        let managed = managers.flat_map(|(index, manager)| manager.files(index));
        disks.chain(members).chain(managed).collect()
    }
}

/// `value`, if the configuration file could have it: its JSON form is read back by the same rules.
fn checked<T: Serialize + DeserializeOwned + PartialEq>(value: T) -> Result<T, String> {
    let json = serde_json::to_value(&value).map_err(|e| e.to_string())?;
    let back: T = serde_json::from_value(json).map_err(|e| e.to_string())?;
    if back != value {
        return Err("has values that no machine can have".to_owned());
    }
    Ok(value)
}

impl Stops {
    fn of(doors: Doors) -> Self {
        Self {
            suspend: doors.suspend.map(|suspend| suspend.name().to_owned()),
            device_stop: doors.device_stop,
            device_state_cap: doors.queue_status,
        }
    }

    fn to_config(&self) -> Result<Doors, String> {
        let suspend = |name: &String| {
            Suspend::from_name(name).ok_or_else(|| format!("stops.suspend: {name} is unknown"))
        };
        Ok(Doors {
            suspend: self.suspend.as_ref().map(suspend).transpose()?,
            device_stop: self.device_stop,
            queue_status: self.device_state_cap,
        })
    }
}

fn offer(stops: &Stops, packed: bool) -> Result<Offer, String> {
    let doors = stops.to_config()?;
    Ok(Offer { doors, packed })
}

impl Bus {
    fn of(slot: Slot) -> Self {
        match slot {
            Slot::Root => Self::Root,
            Slot::Port => Self::Port,
        }
    }

    fn to_config(self) -> Slot {
        match self {
            Self::Root => Slot::Root,
            Self::Port => Slot::Port,
        }
    }
}

impl Disk {
    fn of(disk: &config::Disk) -> Self {
        Self {
            file: File::of(&disk.path),
            readonly: disk.readonly,
            serial: disk.serial.clone(),
            queues: disk.queues,
            bus: Bus::of(disk.bus),
            stops: Stops::of(disk.offer.doors),
            packed: disk.offer.packed,
        }
    }

    fn to_config(&self) -> Result<config::Disk, String> {
        let disk = config::Disk {
            path: self.file.path.clone(),
            readonly: self.readonly,
            serial: self.serial.clone(),
            queues: self.queues,
            bus: self.bus.to_config(),
            offer: offer(&self.stops, self.packed)?,
        };
        disk.validate()?;
        Ok(disk)
    }
}

fn mac(text: &str) -> Result<MacAddress, String> {
    text.parse().map_err(|e| format!("mac: {e}"))
}

impl Net {
    fn of(net: &config::Net) -> Self {
        Self {
            peer: match &net.backend {
                NetBackend::Tap(name) => Peer::Tap(name.clone()),
                NetBackend::Switch(name) => Peer::Switch(name.clone()),
            },
            mac: net.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            bus: Bus::of(net.bus),
            stops: Stops::of(net.offer.doors),
            packed: net.offer.packed,
        }
    }

    fn to_config(&self) -> Result<config::Net, String> {
        Ok(config::Net {
            backend: match &self.peer {
                Peer::Tap(name) => NetBackend::Tap(name.clone()),
                Peer::Switch(name) => NetBackend::Switch(name.clone()),
            },
            mac: Some(mac(&self.mac)?),
            bus: self.bus.to_config(),
            offer: offer(&self.stops, self.packed)?,
        })
    }
}

impl Pf {
    fn of(pf: &config::Pf) -> Self {
        let device = match &pf.device {
            PfDevice::Net {
                switch,
                uplink_tap,
                mac,
            } => PfKind::Net {
                switch: switch.clone(),
                uplink_tap: uplink_tap.clone(),
                mac: mac.map(|mac| mac.to_string()).unwrap_or_default(),
            },
            PfDevice::Block {
                path,
                vf_path,
                readonly,
            } => PfKind::Block {
                file: path.as_deref().map(File::of),
                vf_path: vf_path.clone(),
                vf_files: pf
                    .paths()
                    .into_iter()
                    .filter(|(number, _)| *number > 0)
                    .filter_map(|(number, path)| Some((number, Identity::of(&path)?)))
                    .collect(),
                readonly: *readonly,
            },
        };
        Self {
            device,
            vfs: pf.vfs,
            strict_admin: pf.strict_admin,
            admin: pf.admin.name().to_owned(),
            drain_ms: pf.drain.0.as_millis() as u32,
            passthrough: pf.passthrough,
            stops: Stops::of(pf.offer.doors),
            packed: pf.offer.packed,
        }
    }

    fn to_config(&self) -> Result<config::Pf, String> {
        let device = match &self.device {
            PfKind::Net {
                switch,
                uplink_tap,
                mac,
            } => PfDevice::Net {
                switch: switch.clone(),
                uplink_tap: uplink_tap.clone(),
                mac: Some(self::mac(mac)?),
            },
            PfKind::Block {
                file,
                vf_path,
                readonly,
                ..
            } => PfDevice::Block {
                path: file.as_ref().map(|file| file.path.clone()),
                vf_path: vf_path.clone(),
                readonly: *readonly,
            },
        };
        let admin: Result<Profile, _> = self.admin.parse();
        Ok(config::Pf {
            device,
            vfs: self.vfs,
            strict_admin: self.strict_admin,
            admin: admin.map_err(|e| format!("admin: {e}"))?,
            drain: Drain(Duration::from_millis(self.drain_ms.into())),
            offer: offer(&self.stops, self.packed)?,
            passthrough: self.passthrough,
        })
    }
}

/// A number that names a snapshot, so that no file of another one is taken for one of its own.
pub type SnapshotId = Hex<u128>;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn spec() -> MachineSpec {
        let config = Config {
            kernel: Some("/k".into()),
            cmdline: Some("a b".to_owned()),
            disks: vec![
                "path=/d0,serial=S,queues=4,bus=port,suspend=v1.4"
                    .parse()
                    .unwrap(),
                "path=/d1,readonly,device-stop,device-state-cap"
                    .parse()
                    .unwrap(),
            ],
            nets: vec![
                "tap=t0".parse().unwrap(),
                "switch=lan,mac=02:00:00:00:00:07".parse().unwrap(),
            ],
            pfs: vec![
                "net,vfs=3,switch=lan,strict-admin".parse().unwrap(),
                "block,vfs=2,vf-path=/v%d,passthrough,drain-ms=7,admin=v1.4"
                    .parse()
                    .unwrap(),
            ],
            virtio_console: Some("file=/c".parse().unwrap()),
            ..Config::default()
        };
        config.resolve().unwrap()
    }

    #[test]
    fn a_specification_survives_json() {
        let spec = spec();
        let json = serde_json::to_string(&Machine::of(&spec)).unwrap();
        let back: Machine = serde_json::from_str(&json).unwrap();
        assert_eq!(back.to_spec().unwrap(), spec);
    }

    #[test]
    fn a_machine_keeps_the_layout_it_was_saved_with() {
        for layout in Layout::ALL {
            let saved = Machine {
                layout: layout.number(),
                ..Machine::of(&spec())
            };
            let restored = saved.to_spec().unwrap();
            assert_eq!(restored.layout, layout);
            assert_eq!(Machine::of(&restored), saved);
        }
    }

    #[test]
    fn what_no_machine_can_have_is_refused_by_name() {
        let good = serde_json::to_value(Machine::of(&spec())).unwrap();
        for (pointer, value, part) in [
            ("/layout", 0.into(), "machine.layout"),
            ("/layout", 3.into(), "machine.layout"),
            ("/cpus", 0.into(), "machine.cpus"),
            ("/cpus", 255.into(), "machine.cpus"),
            ("/memory", 1.into(), "machine.memory"),
            ("/memory", u64::MAX.into(), "machine.memory"),
            ("/console", "tty".into(), "machine.console"),
            ("/disks/0/queues", 65.into(), "machine.disks[0]"),
            ("/disks/0/serial", "\u{e9}".into(), "machine.disks[0]"),
            ("/disks/1/stops/device_stop", 3.into(), "machine.disks[1]"),
            ("/disks/1/file/path", "/d0".into(), "contradict"),
            (
                "/disks/0/file/path",
                "d0".into(),
                "machine.disks[0].file.path: d0 is relative",
            ),
            (
                "/console",
                "file=c".into(),
                "machine.console: c is relative",
            ),
            (
                "/pfs/1/device/block/vf_path",
                "v%d".into(),
                "machine.pfs[1].device.block.vf_path: v%d is relative",
            ),
            (
                "/pfs/1/device/block/vf_files",
                serde_json::json!({ "3": { "size": 1, "modified_s": 1, "modified_ns": 1 } }),
                "machine.pfs[1].device.block.vf_files: there is no member 3",
            ),
            ("/nets/0/mac", "01:00:00:00:00:00".into(), "machine.nets[0]"),
            ("/nets/0/peer/tap", "a/b".into(), "machine.nets[0]"),
            ("/pfs/0/vfs", 256.into(), "machine.pfs[0]"),
            ("/pfs/1/drain_ms", 5001.into(), "machine.pfs[1]"),
            ("/pfs/1/device/block/vf_path", "/v".into(), "machine.pfs[1]"),
            ("/pfs/1/admin", "v2".into(), "machine.pfs[1]"),
            (
                "/parameters/block/queue_size",
                3.into(),
                "machine.parameters.block: queue_size",
            ),
            (
                "/parameters/net/queue_size",
                2048.into(),
                "machine.parameters.net: queue_size",
            ),
        ] {
            let mut json = good.clone();
            *json.pointer_mut(pointer).unwrap() = value;
            let machine: Machine = serde_json::from_value(json).unwrap();
            let message = machine.to_spec().unwrap_err().to_string();
            assert!(message.contains(part), "{pointer}: {message}");
        }
    }

    #[test]
    fn every_file_of_a_machine_has_a_name() {
        let names: Vec<_> = Machine::of(&spec())
            .files()
            .into_iter()
            .map(|(name, _, _)| name)
            .collect();
        assert_eq!(names, ["disk0", "disk1", "pf1-vf1", "pf1-vf2"]);
    }
}
