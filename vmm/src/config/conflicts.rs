//! Options that exclude each other. Every message names both.

use std::collections::HashMap;
use std::hash::Hash;
use std::path::Path;

use super::{ConfigError, MAX_DEVICES, MachineSpec, ManagerDevice, NetBackend, PfDevice};
use crate::console::Target;

fn contradiction(first: String, second: String, reason: &'static str) -> ConfigError {
    ConfigError::Contradiction {
        first,
        second,
        reason,
    }
}

/// Things of which each belongs to one option.
struct Claims<K> {
    taken: HashMap<K, String>,
    reason: &'static str,
}

impl<K: Eq + Hash> Claims<K> {
    fn new(reason: &'static str) -> Self {
        Self {
            taken: HashMap::new(),
            reason,
        }
    }

    fn claim(&mut self, thing: K, option: String) -> Result<(), ConfigError> {
        match self.taken.get(&thing) {
            Some(first) => Err(contradiction(first.clone(), option, self.reason)),
            None => {
                self.taken.insert(thing, option);
                Ok(())
            }
        }
    }
}

impl MachineSpec {
    /// Checks everything that two or more options say together.
    pub(crate) fn check_contradictions(&self) -> Result<(), ConfigError> {
        self.check_places()?;
        self.check_consoles()?;
        self.check_files()?;
        self.check_networks()
    }

    fn check_places(&self) -> Result<(), ConfigError> {
        if self.device_count() > MAX_DEVICES {
            return Err(ConfigError::Value {
                option: "--disk, --net, --pf and --manager",
                reason: format!(
                    "{} devices are too many; a guest has at most {MAX_DEVICES}",
                    self.device_count()
                ),
            });
        }
        Ok(())
    }

    fn check_consoles(&self) -> Result<(), ConfigError> {
        match &self.virtio_console {
            Some(Target::Stdio) if self.console == Target::Stdio => Err(contradiction(
                "--console stdio".to_owned(),
                "--virtio-console stdio".to_owned(),
                "there is one standard input; give one of them file=PATH or none",
            )),
            Some(Target::File(path)) if self.console == Target::File(path.clone()) => {
                Err(contradiction(
                    format!("--console file={}", path.display()),
                    format!("--virtio-console file={}", path.display()),
                    "each needs a file of its own",
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_files(&self) -> Result<(), ConfigError> {
        let mut taken: HashMap<&Path, (String, bool)> = HashMap::new();
        let members: Vec<_> = self.pfs.iter().map(|pf| (pf, pf.paths())).collect();
        let disks = self.disks.iter().map(|disk| {
            let option = format!("--disk {disk}");
            (disk.path.as_path(), option, disk.readonly)
        });
        let members = members.iter().flat_map(|(pf, paths)| {
            let readonly = matches!(pf.device, PfDevice::Block { readonly: true, .. });
            paths.iter().map(move |(number, path)| {
                let option = match number {
                    0 => format!("--pf {pf}"),
                    number => format!("--pf {pf} (virtual function {number})"),
                };
                (path.as_path(), option, readonly)
            })
        });
        let managers = self
            .managers
            .iter()
            .map(|manager| (manager, manager.paths()));
        let managers: Vec<_> = managers.collect();
        let managed = managers.iter().flat_map(|(manager, paths)| {
            let readonly = matches!(manager.device, ManagerDevice::Block { readonly: true, .. });
            paths.iter().map(move |(number, path)| {
                let option = format!("--manager {manager} (device {number})");
                (path.as_path(), option, readonly)
            })
        });
        for (path, option, readonly) in disks.chain(members).chain(managed) {
            match taken.get(path) {
                Some((first, read)) if !(*read && readonly) => {
                    return Err(contradiction(
                        first.clone(),
                        option,
                        "a file that is written belongs to one disk; make both readonly or give each its own",
                    ));
                }
                Some(_) => {}
                None => {
                    taken.insert(path, (option, readonly));
                }
            }
        }
        Ok(())
    }

    fn check_networks(&self) -> Result<(), ConfigError> {
        let mut taps = Claims::new("a tap device belongs to one interface");
        let mut macs = Claims::new("two interfaces cannot have one MAC address");
        for net in &self.nets {
            if let NetBackend::Tap(tap) = &net.backend {
                taps.claim(tap, format!("--net {net}"))?;
            }
            if let Some(mac) = net.mac {
                macs.claim(mac, format!("--net {net}"))?;
            }
        }
        for pf in &self.pfs {
            if let PfDevice::Net {
                uplink_tap: Some(tap),
                ..
            } = &pf.device
            {
                taps.claim(tap, format!("--pf {pf}"))?;
            }
            for mac in pf.given_macs() {
                macs.claim(mac, format!("--pf {pf}"))?;
            }
        }
        for manager in &self.managers {
            for mac in manager.given_macs() {
                macs.claim(mac, format!("--manager {manager}"))?;
            }
        }
        Ok(())
    }
}
