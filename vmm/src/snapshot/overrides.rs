//! What is to be different in a machine that is restored: files, taps and switches by other names, other consoles.

pub mod check;

use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::format::machine::{File, Identity, Machine, ManagerKind, Peer, PfKind};
use crate::console::Target;

/// `NAME=PATH`: the file of a disk. NAME is `disk0`, `pf0`, or one that stands for several, whose PATH then has `%d` in it as
/// well: `pf0-vf%d` for all members of an owner, `manager0-%d` for a management device and all that it manages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOverride {
    name: String,
    path: PathBuf,
}

/// `NAME=tap=TAP` or `NAME=switch=SWITCH`: the other end of a network interface; `NAME=uplink-tap=TAP` for an owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOverride {
    name: String,
    kind: NetKind,
    peer: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NetKind {
    Tap,
    Switch,
    UplinkTap,
}

impl FromStr for DiskOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => (name, path),
            _ => {
                return Err(format!(
                    "'{text}' is not understood; write NAME=PATH, as in disk0=copy.raw"
                ));
            }
        };
        let owner = name.strip_suffix(MEMBERS);
        let manager = name.strip_suffix(MANAGED);
        let known = match (owner, manager) {
            (Some(owner), _) => is_numbered(owner, "pf"),
            (None, Some(manager)) => is_numbered(manager, "manager"),
            (None, None) => is_numbered(name, "disk") || is_numbered(name, "pf"),
        };
        if !known {
            return Err(format!(
                "no disk is called '{name}'; names are disk0, pf0, pf0-vf%d for all virtual functions of pf0, and \
                 manager0-%d for manager0 and all its devices"
            ));
        }
        if (owner.is_some() || manager.is_some()) && path.matches("%d").count() != 1 {
            return Err(format!(
                "'{text}': write %d once where the number of the device goes in PATH"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            path: path.into(),
        })
    }
}

/// End of the name that stands for all members of an owner.
const MEMBERS: &str = "-vf%d";
/// The same for a management device and all that it manages.
const MANAGED: &str = "-%d";

/// The name that stands for disk `name` and others.
fn name_of_all(name: &str) -> Option<String> {
    if let Some((owner, _)) = name.split_once("-vf") {
        return Some(format!("{owner}{MEMBERS}"));
    }
    let (manager, _) = name.split_once('-').unwrap_or((name, ""));
    is_numbered(manager, "manager").then(|| format!("{manager}{MANAGED}"))
}

/// True if `name` is `kind` and a number, as devices are named.
fn is_numbered(name: &str, kind: &str) -> bool {
    let number = name.strip_prefix(kind);
    let index = number.and_then(|number| number.parse::<u16>().ok());
    // `disk01` and `disk+1` are numbers as well, and no names.
    index.is_some_and(|index| number == Some(index.to_string().as_str()))
}

impl FromStr for NetOverride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, '=');
        let (name, kind, peer) = (parts.next(), parts.next(), parts.next());
        let kind = match kind {
            Some("tap") => Some(NetKind::Tap),
            Some("switch") => Some(NetKind::Switch),
            Some("uplink-tap") => Some(NetKind::UplinkTap),
            _ => None,
        };
        let (name, kind, peer) = match (name, kind, peer) {
            (Some(name), Some(kind), Some(peer)) if !name.is_empty() && !peer.is_empty() => {
                (name, kind, peer)
            }
            _ => {
                return Err(format!(
                    "'{text}' is not understood; write NAME=tap=TAP, NAME=switch=SWITCH or NAME=uplink-tap=TAP, as in \
                     net0=tap=tap5"
                ));
            }
        };
        if !["net", "pf", "manager"]
            .iter()
            .any(|kind| is_numbered(name, kind))
        {
            return Err(format!(
                "no interface is called '{name}'; names are net0 (tap, switch), pf0 (switch, uplink-tap) and manager0 \
                 (switch)"
            ));
        }
        Ok(Self {
            name: name.to_owned(),
            kind,
            peer: peer.to_owned(),
        })
    }
}

/// Everything that is to be different.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Files of disks.
    pub disks: Vec<DiskOverride>,
    /// Other ends of network interfaces.
    pub nets: Vec<NetOverride>,
    /// Serial console.
    pub console: Option<Target>,
    /// Virtio console.
    pub virtio_console: Option<Target>,
}

/// Why an override cannot be applied, or what has to be overridden.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// No device of this name.
    #[error("{option}: this guest has no {what} called {name}; {there}")]
    Name {
        /// The option.
        option: &'static str,
        /// What kind of device.
        what: &'static str,
        /// The name.
        name: String,
        /// Those there are.
        there: String,
    },
    /// The guest has no virtio console.
    #[error("--virtio-console: this guest has none")]
    NoVirtioConsole,
    /// Paths of a snapshot that is somebody else's.
    #[error(
        "the snapshot belongs to somebody else or may be written by others, so its paths are not followed: name the files \
         of {0} with --disk NAME=PATH, taps with --net NAME=tap=TAP, consoles with --console TARGET, or take the \
         snapshot over (chown, chmod go-w)"
    )]
    Untrusted(String),
    /// Files that are not where they were.
    #[error("{0}; put it back, or say where it is now with --disk NAME=PATH")]
    Missing(String),
    /// A file that is given for a disk of another size.
    #[error(
        "--disk {name}: {path} has {now} bytes, and the disk had {then} when the guest was saved; its driver knows that size"
    )]
    Size {
        /// Name of the disk.
        name: String,
        /// What is given for it.
        path: String,
        /// Its size.
        now: u64,
        /// That of the disk.
        then: u64,
    },
    /// Files that are not what they were.
    #[error(
        "{0}; a guest that finds its disk changed destroys it: give a copy made when the snapshot was taken with \
         --disk NAME=PATH, or name the file itself there if the change does no harm"
    )]
    Changed(String),
}

fn there(names: Vec<String>) -> String {
    if names.is_empty() {
        "there is none".to_owned()
    } else {
        format!("there is {}", names.join(", "))
    }
}

impl Overrides {
    /// Applies everything to `machine`.
    ///
    /// # Errors
    ///
    /// All names of devices that are not there.
    pub fn apply(&self, machine: &mut Machine) -> Result<(), Vec<OverrideError>> {
        let mut errors = Vec::new();
        let disks = self.disks.iter().map(|disk| disk.apply(machine));
        errors.extend(disks.filter_map(Result::err));
        let nets = self.nets.iter().map(|net| net.apply(machine));
        errors.extend(nets.filter_map(Result::err));
        if let Some(target) = &self.console {
            machine.console = absolute(target).into();
        }
        match (&self.virtio_console, &mut machine.virtio_console) {
            (Some(target), Some(console)) => *console = absolute(target).into(),
            (Some(_), None) => errors.push(OverrideError::NoVirtioConsole),
            (None, _) => {}
        }
        if errors.is_empty() {
            return Ok(());
        }
        Err(errors)
    }

    /// Refuses paths that only the snapshot names, for one that is somebody else's. To be asked before [`Self::apply`].
    pub fn check_trust(&self, machine: &Machine) -> Result<(), OverrideError> {
        let open = self.unnamed(machine);
        if open.is_empty() {
            return Ok(());
        }
        Err(OverrideError::Untrusted(open.join(", ")))
    }

    /// What no option names of that which the host gives to `machine`: disks, taps and consoles. To be asked before
    /// [`Self::apply`].
    pub fn unnamed(&self, machine: &Machine) -> Vec<String> {
        let files = machine.files().into_iter().map(|(name, _, _)| name);
        let mut open: Vec<_> = files.filter(|name| !self.names_file(name)).collect();
        // An owner that is put onto another switch keeps its uplink.
        let net = |name: &str, kinds: &[NetKind]| {
            let mut nets = self.nets.iter();
            nets.any(|net| net.name == name && kinds.contains(&net.kind))
        };
        let taps = machine.nets.iter().enumerate();
        let taps = taps.filter(|(_, net)| matches!(net.peer, Peer::Tap(_)));
        let taps = taps.map(|(index, _)| format!("net{index}"));
        let uplinks = machine.pfs.iter().enumerate().filter(|(_, pf)| {
            matches!(
                pf.device,
                PfKind::Net {
                    uplink_tap: Some(_),
                    ..
                }
            )
        });
        let uplinks = uplinks.map(|(index, _)| format!("pf{index}"));
        open.extend(taps.filter(|name| !net(name, &[NetKind::Tap, NetKind::Switch])));
        open.extend(uplinks.filter(|name| !net(name, &[NetKind::UplinkTap])));
        let is_file = |target: &str| target.starts_with("file=");
        if self.console.is_none() && is_file(&machine.console) {
            open.push("--console".to_owned());
        }
        let virtio = machine.virtio_console.as_deref();
        if self.virtio_console.is_none() && virtio.is_some_and(is_file) {
            open.push("--virtio-console".to_owned());
        }
        open
    }

    /// True if there is an option for what the host gives to `name`: a disk, an interface, or an uplink (`pf0-uplink`).
    pub fn replaces(&self, name: &str) -> bool {
        let net = |net: &NetOverride| match net.kind {
            NetKind::Tap | NetKind::Switch => net.name == name,
            NetKind::UplinkTap => name.strip_suffix("-uplink") == Some(&net.name),
        };
        self.names_file(name) || self.nets.iter().any(net)
    }

    /// True if there is an option for the file of disk `name`.
    fn names_file(&self, name: &str) -> bool {
        let all = name_of_all(name);
        let is = |disk: &DiskOverride| disk.name == name || Some(&disk.name) == all.as_ref();
        self.disks.iter().any(is)
    }

    /// Refuses files of another size than those they are given for had when the guest was saved. To be asked before
    /// [`Self::apply`].
    pub fn check_sizes(&self, machine: &Machine) -> Result<(), OverrideError> {
        machine.files().into_iter().try_for_each(|(name, file, _)| {
            let given = self.disks.iter().find(|disk| disk.name == name);
            given.map_or(Ok(()), |disk| check_size(&name, &file, &disk.path))
        })
    }

    /// Refuses files that are not what they were when the guest was saved. Those that were named by an option are taken as
    /// they are. To be asked after [`Self::apply`].
    pub fn check_files(&self, machine: &Machine) -> Result<(), OverrideError> {
        let files = machine.files().into_iter();
        let files: Vec<_> = files
            .filter(|(name, _, _)| !self.names_file(name))
            .collect();
        let missing: Vec<_> = files
            .iter()
            .filter(|(_, file, _)| file.path.metadata().is_err_and(is_not_found))
            .map(|(name, file, _)| format!("{name}: {} is not there", file.path.display()))
            .collect();
        if !missing.is_empty() {
            return Err(OverrideError::Missing(missing.join("; ")));
        }
        let changed: Vec<_> = files
            .into_iter()
            .filter_map(|(name, file, readonly)| {
                let what = changed(&file, readonly)?;
                Some(format!("{name}: {} {what}", file.path.display()))
            })
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        Err(OverrideError::Changed(changed.join("; ")))
    }
}

/// `target`, with the path of a file as that of a saved machine has to be.
fn absolute(target: &Target) -> Target {
    match target {
        // A lost current directory is refused when the file is opened.
        Target::File(path) => Target::File(std::path::absolute(path).unwrap_or(path.clone())),
        other => other.clone(),
    }
}

fn is_not_found(error: std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

/// An error if `path`, which is given for disk `name`, is not of the size that `file` had, as far as both are known.
fn check_size(name: &str, file: &File, path: &Path) -> Result<(), OverrideError> {
    const SECTOR: u64 = 512;
    match (file.identity, Identity::of(path)) {
        (Some(then), Some(now)) if now.size / SECTOR != then.size / SECTOR => {
            Err(OverrideError::Size {
                name: name.to_owned(),
                path: path.display().to_string(),
                now: now.size,
                then: then.size,
            })
        }
        _ => Ok(()),
    }
}

/// In what way `file` is not what it was when the guest was saved.
fn changed(file: &File, readonly: bool) -> Option<String> {
    let now = Identity::of(&file.path);
    match (file.identity, now) {
        (Some(then), Some(now)) if now == then => None,
        (Some(then), Some(now)) if now.size != then.size => {
            Some(format!("has {} bytes and had {}", now.size, then.size))
        }
        (Some(_), Some(_)) => Some("was written to since".to_owned()),
        (None, _) if !readonly => {
            Some("is a block device, which does not say whether it was written to since".to_owned())
        }
        _ => None,
    }
}

impl DiskOverride {
    fn apply(&self, machine: &mut Machine) -> Result<(), OverrideError> {
        // An empty path or a lost current directory is refused when the file is opened.
        let path = std::path::absolute(&self.path).unwrap_or_else(|_| self.path.clone());
        let named = |index: usize, kind: &str| self.name == format!("{kind}{index}");
        for (index, disk) in machine.disks.iter_mut().enumerate() {
            if named(index, "disk") {
                disk.file = File {
                    path,
                    identity: None,
                };
                return Ok(());
            }
        }
        for (index, pf) in machine.pfs.iter_mut().enumerate() {
            let PfKind::Block {
                file,
                vf_path,
                vf_files,
                ..
            } = &mut pf.device
            else {
                continue;
            };
            if let Some(file) = file.as_mut().filter(|_| named(index, "pf")) {
                *file = File {
                    path,
                    identity: None,
                };
                return Ok(());
            }
            if self.name == format!("pf{index}-vf%d") {
                *vf_path = path.to_string_lossy().into_owned();
                vf_files.clear();
                return Ok(());
            }
        }
        for (index, manager) in machine.managers.iter_mut().enumerate() {
            if let ManagerKind::Block {
                path: own, files, ..
            } = &mut manager.device
                && self.name == format!("manager{index}{MANAGED}")
            {
                *own = path.to_string_lossy().into_owned();
                files.clear();
                return Ok(());
            }
        }
        Err(OverrideError::Name {
            option: "--disk",
            what: "disk",
            name: self.name.clone(),
            there: there(disk_names(machine)),
        })
    }
}

/// The names `--disk` takes.
fn disk_names(machine: &Machine) -> Vec<String> {
    let disks = (0..machine.disks.len()).map(|index| format!("disk{index}"));
    let owners = machine.pfs.iter().enumerate().flat_map(|(index, pf)| {
        let PfKind::Block { file, .. } = &pf.device else {
            return Vec::new();
        };
        let own = file.iter().map(|_| format!("pf{index}"));
        own.chain([format!("pf{index}-vf%d")]).collect()
    });
    let managers = machine.managers.iter().enumerate();
    let disks_managed = managers.filter(|(_, m)| matches!(m.device, ManagerKind::Block { .. }));
    let managers = disks_managed.map(|(index, _)| format!("manager{index}{MANAGED}"));
    disks.chain(owners).chain(managers).collect()
}

impl NetOverride {
    fn apply(&self, machine: &mut Machine) -> Result<(), OverrideError> {
        for (index, net) in machine.nets.iter_mut().enumerate() {
            if self.name != format!("net{index}") {
                continue;
            }
            net.peer = match self.kind {
                NetKind::Tap => Peer::Tap(self.peer.clone()),
                NetKind::Switch => Peer::Switch(self.peer.clone()),
                NetKind::UplinkTap => break,
            };
            return Ok(());
        }
        for (index, pf) in machine.pfs.iter_mut().enumerate() {
            let PfKind::Net {
                switch, uplink_tap, ..
            } = &mut pf.device
            else {
                continue;
            };
            if self.name != format!("pf{index}") {
                continue;
            }
            match self.kind {
                NetKind::UplinkTap => *uplink_tap = Some(self.peer.clone()),
                NetKind::Switch => *switch = Some(self.peer.clone()),
                NetKind::Tap => break,
            }
            return Ok(());
        }
        for (index, manager) in machine.managers.iter_mut().enumerate() {
            if let ManagerKind::Net { switch, .. } = &mut manager.device
                && self.name == format!("manager{index}")
                && self.kind == NetKind::Switch
            {
                *switch = Some(self.peer.clone());
                return Ok(());
            }
        }
        let nets = (0..machine.nets.len()).map(|index| format!("net{index} (tap, switch)"));
        let owners = machine.pfs.iter().enumerate();
        let owners = owners.filter(|(_, pf)| matches!(pf.device, PfKind::Net { .. }));
        let owners = owners.map(|(index, _)| format!("pf{index} (switch, uplink-tap)"));
        let managers = machine.managers.iter().enumerate();
        let managers = managers.filter(|(_, m)| matches!(m.device, ManagerKind::Net { .. }));
        let managers = managers.map(|(index, _)| format!("manager{index} (switch)"));
        Err(OverrideError::Name {
            option: "--net",
            what: "interface with such an end",
            name: self.name.clone(),
            there: there(nets.chain(owners).chain(managers).collect()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn machine() -> Machine {
        let config = Config {
            kernel: Some("/k".into()),
            disks: vec!["path=/d0".parse().unwrap()],
            nets: vec!["tap=t0".parse().unwrap()],
            pfs: vec![
                "block,vfs=2,path=/p,vf-path=/v%d".parse().unwrap(),
                "net,vfs=1".parse().unwrap(),
            ],
            console: Some("file=/c".parse().unwrap()),
            ..Config::default()
        };
        Machine::of(&config.resolve().unwrap())
    }

    pub fn overrides(disks: &[&str], nets: &[&str]) -> Overrides {
        Overrides {
            disks: disks.iter().map(|text| text.parse().unwrap()).collect(),
            nets: nets.iter().map(|text| text.parse().unwrap()).collect(),
            ..Overrides::default()
        }
    }

    #[test]
    fn files_taps_and_switches_get_other_names() {
        let mut machine = machine();
        overrides(
            &["disk0=/e0", "pf0=/q", "pf0-vf%d=/w%d"],
            &["net0=switch=lan", "pf1=uplink-tap=t1"],
        )
        .apply(&mut machine)
        .unwrap();
        let files = machine.files().into_iter();
        let files: Vec<_> = files
            .map(|(name, file, _)| format!("{name}={}", file.path.display()))
            .collect();
        assert_eq!(files, ["disk0=/e0", "pf0=/q", "pf0-vf1=/w1", "pf0-vf2=/w2"]);
        let spec = machine.to_spec().unwrap();
        assert!(spec.nets[0].to_string().starts_with("switch=lan,mac="));
        assert!(spec.pfs[1].to_string().contains("uplink-tap=t1"));
    }

    #[test]
    fn options_replace_what_they_name_and_nothing_else() {
        let given = overrides(
            &["disk0=/e0", "pf0-vf%d=/w%d"],
            &["net0=switch=lan", "pf1=uplink-tap=t1"],
        );
        for (name, replaced) in [
            ("disk0", true),
            ("disk1", false),
            ("pf0", false),
            ("pf0-vf2", true),
            ("net0", true),
            ("pf1", false),
            ("pf1-uplink", true),
        ] {
            assert_eq!(given.replaces(name), replaced, "{name}");
        }
    }

    #[test]
    fn relative_paths_of_options_become_absolute() {
        let mut machine = machine();
        machine.virtio_console = Some("none".to_owned());
        Overrides {
            console: Some("file=a".parse().unwrap()),
            virtio_console: Some("file=b".parse().unwrap()),
            ..overrides(&["disk0=e0", "pf0=q", "pf0-vf%d=w%d"], &[])
        }
        .apply(&mut machine)
        .unwrap();
        machine.to_spec().unwrap();
    }

    #[test]
    fn what_is_not_there_is_refused_with_what_is() {
        for (disks, nets, part) in [
            (&["disk1=/x"][..], &[][..], "there is disk0, pf0, pf0-vf%d"),
            (&["pf1=/x"], &[], "there is disk0"),
            (&[], &["net0=uplink-tap=t"], "net0 (tap, switch)"),
            (&[], &["pf0=switch=s"], "pf1 (switch, uplink-tap)"),
        ] {
            let errors = overrides(disks, nets).apply(&mut machine()).unwrap_err();
            let [error] = errors.as_slice() else {
                panic!("{errors:?}");
            };
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn all_that_is_not_there_is_refused_at_once() {
        let mut all = overrides(&["disk7=/x", "disk0=/e0", "disk8=/x"], &["net5=tap=t"]);
        all.virtio_console = Some(Target::None);
        let errors = all.apply(&mut machine()).unwrap_err();
        let text: Vec<_> = errors.iter().map(ToString::to_string).collect();
        let text = text.join("\n");
        for part in ["disk7", "disk8", "net5", "--virtio-console"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(errors.len(), 4, "{text}");
    }

    #[test]
    fn names_that_no_device_can_have_are_refused_with_those_that_one_can() {
        for (text, part) in [
            ("disk=/x", "no disk is called 'disk'"),
            ("disk01=/x", "no disk is called 'disk01'"),
            ("disk+1=/x", "names are disk0"),
            ("sda=/x", "names are disk0"),
            ("pf0-vf1=/x", "pf0-vf%d for all"),
            ("disk0-vf%d=/x%d", "names are disk0"),
            ("pf0-vf%d=/x", "write %d once"),
            ("pf0-vf%d=/%d/%d", "write %d once"),
            ("disk0=", "write NAME=PATH"),
            ("=/x", "write NAME=PATH"),
        ] {
            let error = text.parse::<DiskOverride>().unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        for text in ["eth0=tap=t", "net00=tap=t", "disk0=switch=s"] {
            let error = text.parse::<NetOverride>().unwrap_err();
            assert!(error.contains("names are net0"), "{error}");
        }
    }

    #[test]
    fn paths_of_a_snapshot_that_is_not_ones_own_must_all_be_named() {
        let mut machine = machine();
        let PfKind::Net { uplink_tap, .. } = &mut machine.pfs[1].device else {
            panic!("pf1 is a network owner");
        };
        *uplink_tap = Some("t1".to_owned());
        let open = |all: &Overrides, part: &str| {
            let error = all.check_trust(&machine).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        let mut all = overrides(&["disk0=/e0", "pf0-vf%d=/w%d"], &[]);
        open(&all, "files of pf0, net0, pf1, --console with");
        all.disks.push("pf0=/q".parse().unwrap());
        all.console = Some(Target::None);
        all.nets.push("net0=switch=lan".parse().unwrap());
        open(&all, "files of pf1 with");
        // Its uplink is still the one that the snapshot names.
        all.nets.push("pf1=switch=lan".parse().unwrap());
        open(&all, "files of pf1 with");
        all.nets.push("pf1=uplink-tap=t2".parse().unwrap());
        assert_eq!(all.check_trust(&machine), Ok(()));
    }

    #[test]
    fn a_file_that_changed_is_refused_unless_it_was_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d");
        std::fs::write(&path, "before").unwrap();
        let config = Config {
            kernel: Some("/k".into()),
            disks: vec![format!("path={}", path.display()).parse().unwrap()],
            ..Config::default()
        };
        let mut machine = Machine::of(&config.resolve().unwrap());
        let none = Overrides::default();
        assert_eq!(none.check_files(&machine), Ok(()));
        std::fs::write(&path, "longer than before").unwrap();
        let error = none.check_files(&machine).unwrap_err().to_string();
        assert!(
            error.contains("disk0") && error.contains("had 6"),
            "{error}"
        );
        let other = dir.path().join("other");
        std::fs::rename(&path, &other).unwrap();
        let error = none.check_files(&machine).unwrap_err().to_string();
        assert!(
            error.contains("disk0") && error.contains("is not there; put it back"),
            "{error}"
        );
        std::fs::write(&path, vec![0; 4096]).unwrap();
        let larger = overrides(&[&format!("disk0={}", path.display())], &[]);
        let error = larger.check_sizes(&machine).unwrap_err().to_string();
        assert!(
            error.contains("has 4096 bytes, and the disk had 6"),
            "{error}"
        );
        std::fs::rename(&other, &path).unwrap();
        let named = overrides(&[&format!("disk0={}", path.display())], &[]);
        named.apply(&mut machine).unwrap();
        assert_eq!(named.check_files(&machine), Ok(()));
        // What a block device would be: nothing says what it was.
        let error = none.check_files(&machine).unwrap_err().to_string();
        assert!(error.contains("block device"), "{error}");
        machine.disks[0].readonly = true;
        assert_eq!(none.check_files(&machine), Ok(()));
    }
}
