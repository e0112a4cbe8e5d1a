//! What a machine is made of: the JSON file of `--config`, the command line over it, and the checks before anything
//! starts.
//!
//! | module | what it does |
//! |---|---|
//! | [`options`] | one disk, one network interface: their text and JSON forms |
//! | [`pf`] | one SR-IOV owner with its members, in both forms |
//! | [`manager`] | one management device with its managed devices, in both forms |
//! | [`offer`] | what a device offers its driver besides: what to stop it with, and packed rings |
//! | [`object`] | JSON objects, not arrays in their place |
//! | [`conflicts`] | options that exclude each other |
//! | [`check`] | asks the host whether everything named exists and may be used |

pub mod check;
mod conflicts;
pub mod manager;
pub mod object;
pub mod offer;
pub mod options;
pub mod pf;

use std::path::{Path, PathBuf};

use devices::net::MacAddress;
use serde::{Deserialize, Serialize};

use crate::console::Target;
use crate::layout;
pub use manager::{Manager, ManagerDevice};
use object::Object;
pub use options::{Disk, Net, NetBackend, Slot};
pub use pf::{Pf, PfDevice};

/// Memory of a guest that asks for none in particular.
pub const DEFAULT_MEMORY: u64 = 256 * layout::MIB;
/// Command line of a guest that asks for none in particular.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";
/// The most vCPUs: local APIC ids of 8 bits, of which 255 means all.
pub const MAX_CPUS: u8 = 254;
/// The most virtio devices, owners included and members not: one bus has 32 places, one of which is the host bridge's.
const MAX_DEVICES: usize = 31;

/// The configuration file, and the command line in the same form. Everything is optional; unknown keys are errors.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// bzImage (`vmlinuz`) or ELF (`vmlinux`) kernel.
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line; [`DEFAULT_CMDLINE`] if absent.
    pub cmdline: Option<String>,
    /// Number of vCPUs; 1 if absent.
    pub cpus: Option<u32>,
    /// Memory, as in `256M`; [`DEFAULT_MEMORY`] if absent.
    pub memory: Option<String>,
    /// What that memory is kept in; see [`Config::memory_backing`] if absent.
    pub memory_backing: Option<MemoryBacking>,
    /// Disks, in the order the guest sees them.
    #[serde(deserialize_with = "object::list")]
    pub disks: Vec<Disk>,
    /// Network interfaces, in the order the guest sees them.
    #[serde(deserialize_with = "object::list")]
    pub nets: Vec<Net>,
    /// SR-IOV owners, in the order the guest sees them.
    #[serde(deserialize_with = "object::list")]
    pub pfs: Vec<Pf>,
    /// Management devices, in the order the guest sees them.
    #[serde(deserialize_with = "object::list")]
    pub managers: Vec<Manager>,
    /// An entropy device; there is one if absent.
    pub rng: Option<bool>,
    /// The serial console; stdio if absent.
    pub console: Option<Target>,
    /// A virtio console; there is none if absent.
    pub virtio_console: Option<Target>,
    /// Unix socket of the control API.
    pub api_socket: Option<PathBuf>,
}

/// What the memory of a new guest is kept in. No guest sees it, so it is no part of a [`MachineSpec`].
///
/// Guests boot faster with anonymous memory: hosts do not give a memfd large pages as it is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBacking {
    /// Memory of this process alone; on most hosts in large pages, with which guests are faster
    Anonymous,
    /// A memfd, which another process on this host can take over without copying it
    Memfd,
}

/// Specification of a machine: plain, with every default filled in and every choice made, so that the same machine can be
/// built from it again, also by another process in another directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSpec {
    /// What to boot.
    pub boot: crate::boot::load::Sources,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u8,
    /// Bytes of memory.
    pub memory: u64,
    /// Disks.
    pub disks: Vec<Disk>,
    /// Network interfaces.
    pub nets: Vec<Net>,
    /// SR-IOV owners.
    pub pfs: Vec<Pf>,
    /// Management devices.
    pub managers: Vec<Manager>,
    /// An entropy device.
    pub rng: bool,
    /// The serial console.
    pub console: Target,
    /// The virtio console.
    pub virtio_console: Option<Target>,
    /// Where a guest finds its devices, and what they are made of.
    pub layout: Layout,
    /// What drivers see of devices and no option asks for.
    pub parameters: Parameters,
}

/// Version of the guest physical address map, the order of devices on the PCI bus, and the virtqueues they have. A new
/// machine has the newest; one that is restored has that it was saved with, since its drivers have set it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Layout {
    /// The first.
    V1 = 1,
    /// Network devices have a control virtqueue.
    #[default]
    V2 = 2,
}

impl Layout {
    /// Every version, ascending.
    pub const ALL: [Self; 2] = [Self::V1, Self::V2];

    /// Its number.
    pub fn number(self) -> u32 {
        self as u32
    }

    /// The layout with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|layout| layout.number() == number)
    }

    /// Whether network devices have a control virtqueue.
    pub fn has_net_control(self) -> bool {
        self >= Self::V2
    }

    /// Virtqueues of a network device.
    pub fn net_queues(self) -> u16 {
        2 + u16::from(self.has_net_control())
    }
}

/// Parameters of the devices of a machine, by type. Those of a new machine are the defaults; one that is restored has those
/// it was saved with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// Of disks.
    pub block: devices::block::Parameters,
    /// Of network devices.
    pub net: devices::net::Parameters,
    /// Of the entropy device.
    pub rng: devices::rng::Parameters,
    /// Of the virtio console.
    pub console: devices::console::Parameters,
}

/// Why a configuration cannot be meant. Exit status 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("--config {path}: {reason}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host says.
        reason: String,
    },
    /// The file is not what it should be.
    #[error("--config {path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A value in the file is out of range or malformed.
    #[error("--config {path}: \"{field}\": {reason}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// No kernel.
    #[error("no kernel; give one with --kernel PATH, or \"kernel\" in the file of --config")]
    NoKernel,
    /// A number or size out of range or malformed.
    #[error("{option}: {reason}")]
    Value {
        /// The option.
        option: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Two options that exclude each other.
    #[error("{first} and {second} contradict each other: {reason}")]
    Contradiction {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// Why they cannot both be.
        reason: &'static str,
    },
}

/// The number of vCPUs, if it is one a guest can have.
fn cpus(given: Option<u32>) -> Result<u8, String> {
    let given = given.unwrap_or(1);
    let cpus = u8::try_from(given).ok();
    cpus.filter(|n| (1..=MAX_CPUS).contains(n)).ok_or_else(|| {
        format!("{given} is out of range; a guest has between 1 and {MAX_CPUS} vCPUs")
    })
}

/// Bytes of memory, if a guest can have so many.
fn memory(given: Option<&str>) -> Result<u64, String> {
    match given {
        None => Ok(DEFAULT_MEMORY),
        Some(text) => layout::parse_memory_size(text).map_err(|e| e.to_string()),
    }
}

/// Longest configuration file in bytes; a machine with everything there is needs a small part of that.
const MAX_FILE: u64 = 1 << 20;

impl Config {
    /// What the memory of the guest is kept in: unless it is said, a memfd for a guest that can be asked to move, since it
    /// has a control API, and anonymous memory for any other.
    pub fn memory_backing(&self) -> MemoryBacking {
        match (self.memory_backing, &self.api_socket) {
            (Some(backing), _) => backing,
            (None, Some(_)) => MemoryBacking::Memfd,
            (None, None) => MemoryBacking::Anonymous,
        }
    }

    /// Reads a configuration file.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let refuse = |reason: String| ConfigError::Read {
            path: path.to_owned(),
            reason,
        };
        let explain = |e: std::io::Error| refuse(crate::boot::load::explain(&e));
        let metadata = std::fs::metadata(path).map_err(explain)?;
        // Opening a FIFO would wait for a writer, and a device need not end.
        if !metadata.is_file() {
            return Err(refuse("is not a regular file; give a JSON file".to_owned()));
        }
        if metadata.len() > MAX_FILE {
            let limit = MAX_FILE >> 10;
            return Err(refuse(format!(
                "is longer than {limit} KiB; is it a configuration?"
            )));
        }
        let text = std::fs::read(path).map_err(explain)?;
        let parsed = serde_json::from_slice::<Object<Self>>(&text);
        let Object(config) = parsed.map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })?;
        // Here, because later nobody knows any more what came from the file.
        config
            .check_values()
            .map_err(|(field, reason)| ConfigError::Field {
                path: path.to_owned(),
                field,
                reason,
            })?;
        Ok(config)
    }

    /// Checks the values that types cannot; the error is the JSON name of the first wrong one, and what is wrong.
    fn check_values(&self) -> Result<(), (String, String)> {
        cpus(self.cpus).map_err(|reason| ("cpus".to_owned(), reason))?;
        memory(self.memory.as_deref()).map_err(|reason| ("memory".to_owned(), reason))?;
        for (index, disk) in self.disks.iter().enumerate() {
            let name = |reason| (format!("disks[{index}]"), reason);
            disk.validate().map_err(name)?;
        }
        Ok(())
    }

    /// `self`, where `over` does not say otherwise. Disks, interfaces, owners and management devices of `over` come after those
    /// of `self`.
    pub fn overlaid(self, over: Self) -> Self {
        let mut disks = self.disks;
        disks.extend(over.disks);
        let mut nets = self.nets;
        nets.extend(over.nets);
        let mut pfs = self.pfs;
        pfs.extend(over.pfs);
        let mut managers = self.managers;
        managers.extend(over.managers);
        Self {
            kernel: over.kernel.or(self.kernel),
            initrd: over.initrd.or(self.initrd),
            cmdline: over.cmdline.or(self.cmdline),
            cpus: over.cpus.or(self.cpus),
            memory: over.memory.or(self.memory),
            memory_backing: over.memory_backing.or(self.memory_backing),
            disks,
            nets,
            pfs,
            managers,
            rng: over.rng.or(self.rng),
            console: over.console.or(self.console),
            virtio_console: over.virtio_console.or(self.virtio_console),
            api_socket: over.api_socket.or(self.api_socket),
        }
    }

    /// Fills in the defaults and checks everything that can be checked without asking the host.
    /// MAC addresses that were not given are derived from names, the same each time on one host; relative paths are
    /// those of the current directory.
    pub fn resolve(self) -> Result<MachineSpec, ConfigError> {
        let value = |option, reason: String| ConfigError::Value { option, reason };
        let cpus = cpus(self.cpus).map_err(|e| value("--cpus", e))?;
        let memory = memory(self.memory.as_deref()).map_err(|e| value("--memory", e))?;
        let mut spec = MachineSpec {
            boot: crate::boot::load::Sources {
                kernel: self.kernel.ok_or(ConfigError::NoKernel)?,
                initrd: self.initrd,
                cmdline: self.cmdline.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()),
            },
            cpus,
            memory,
            disks: self.disks,
            nets: self.nets,
            pfs: self.pfs,
            managers: self.managers,
            rng: self.rng.unwrap_or(true),
            console: self.console.unwrap_or_default(),
            virtio_console: self.virtio_console.filter(|t| *t != Target::None),
            layout: Layout::default(),
            parameters: Parameters::default(),
        };
        // As they were written: the messages are about that.
        spec.check_contradictions()?;
        spec.decide();
        Ok(spec)
    }
}

impl MachineSpec {
    /// Decides what was left open: MAC addresses, and what relative paths are relative to.
    fn decide(&mut self) {
        for path in self.paths_mut() {
            // Only an empty path or a current directory that is gone is refused; both are noticed when it is opened.
            if let Ok(absolute) = std::path::absolute(&*path) {
                *path = absolute;
            }
        }
        for (index, net) in self.nets.iter_mut().enumerate() {
            let (kind, name) = match &net.backend {
                NetBackend::Tap(name) => ("tap", name),
                NetBackend::Switch(name) => ("switch", name),
            };
            let seed = seed(&[&format!("net{index}"), kind, name]);
            net.mac.get_or_insert(MacAddress::derive(seed, 0));
        }
        for (index, pf) in self.pfs.iter_mut().enumerate() {
            match &mut pf.device {
                PfDevice::Net {
                    uplink_tap, mac, ..
                } => {
                    let uplink = uplink_tap.as_deref().unwrap_or_default();
                    let seed = seed(&[&format!("pf{index}"), uplink]);
                    mac.get_or_insert(MacAddress::derive(seed, 0));
                }
                PfDevice::Block { vf_path, .. } => {
                    if let Some(absolute) = absolute_pattern(vf_path) {
                        *vf_path = absolute;
                    }
                }
            }
        }
        for (index, manager) in self.managers.iter_mut().enumerate() {
            match &mut manager.device {
                ManagerDevice::Net { mac, .. } => {
                    let seed = seed(&[&format!("manager{index}")]);
                    mac.get_or_insert(MacAddress::derive(seed, 0));
                }
                ManagerDevice::Block { path, .. } => {
                    if let Some(absolute) = absolute_pattern(path) {
                        *path = absolute;
                    }
                }
            }
        }
    }

    /// Every path of the specification, but for patterns of several disks.
    fn paths_mut(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let consoles = std::iter::once(&mut self.console).chain(&mut self.virtio_console);
        let consoles = consoles.filter_map(|target| match target {
            Target::File(path) => Some(path),
            Target::Stdio | Target::None => None,
        });
        let owners = self.pfs.iter_mut().flat_map(|pf| match &mut pf.device {
            PfDevice::Block { path, .. } => path.as_mut(),
            PfDevice::Net { .. } => None,
        });
        std::iter::once(&mut self.boot.kernel)
            .chain(&mut self.boot.initrd)
            .chain(self.disks.iter_mut().map(|disk| &mut disk.path))
            .chain(owners)
            .chain(consoles)
    }

    /// The files the guest is booted from, which nothing may write to.
    pub fn boot_files(&self) -> Vec<&Path> {
        let initrd = self.boot.initrd.as_deref();
        std::iter::once(self.boot.kernel.as_path())
            .chain(initrd)
            .collect()
    }

    /// Number of virtio devices, owners and management devices included, and what these have not.
    pub fn device_count(&self) -> usize {
        self.disks.len()
            + self.nets.len()
            + self.pfs.len()
            + self.managers.len()
            + usize::from(self.rng)
            + usize::from(self.virtio_console.is_some())
    }

    /// Number of PCI buses: the root bus and one behind each root port.
    ///
    /// The configuration space window covers no more than these, because Linux probes 32 places on every bus it
    /// covers, whether or not there is one.
    pub fn bus_count(&self) -> u16 {
        let slots = self.disks.iter().map(|d| d.bus);
        let slots = slots.chain(self.nets.iter().map(|n| n.bus));
        let ports = slots.filter(|slot| *slot == Slot::Port).count();
        (1 + ports + self.pfs.len()) as u16
    }
}

/// `pattern` as an absolute path, if it can be made one.
fn absolute_pattern(pattern: &str) -> Option<String> {
    let path = std::path::absolute(pattern).ok()?;
    path.into_os_string().into_string().ok()
}

/// A number that is the same each time for the same parts on the same host: FNV-1a.
fn seed(parts: &[&str]) -> u64 {
    let host = rustix::system::uname();
    let host = host.nodename().to_bytes();
    let parts = parts.iter().map(|part| part.as_bytes());
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for part in std::iter::once(host).chain(parts) {
        // A part never has this byte, so that it separates them.
        for byte in part.iter().chain(&[0]) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash
}

#[cfg(test)]
mod tests;
