//! What can be said of options before the machine is known that they are for.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use rustix::fs::{Access, AtFlags, CWD};

use super::{MANAGED, MEMBERS, NetKind, Overrides};
use crate::boot::load::explain;
use crate::config::ConfigError;
use crate::config::check::console_file;
use crate::console::Target;

impl Overrides {
    /// Refuses options that no machine can take together.
    pub fn check_contradictions(&self) -> Result<(), ConfigError> {
        let twice = |option, name: &str| ConfigError::Value {
            option,
            reason: format!("{name} is given twice; leave one out"),
        };
        let mut seen = BTreeSet::new();
        for disk in &self.disks {
            if !seen.insert(disk.name.as_str()) {
                return Err(twice("--disk", &disk.name));
            }
        }
        let mut seen = BTreeSet::new();
        for net in &self.nets {
            // An owner has a switch and an uplink.
            if !seen.insert((net.name.as_str(), net.kind == NetKind::UplinkTap)) {
                return Err(twice("--net", &net.name));
            }
        }
        let (Some(one), Some(other)) = (&self.console, &self.virtio_console) else {
            return Ok(());
        };
        if one != other || *one == Target::None {
            return Ok(());
        }
        Err(ConfigError::Contradiction {
            first: format!("--console {}", String::from(one.clone())),
            second: format!("--virtio-console {}", String::from(other.clone())),
            reason: "each needs one of its own; give one of them another file, or none",
        })
    }

    /// What is wrong with the files that options name, on this host and now.
    pub fn unusable(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        for disk in &self.disks {
            // How many members there are is not known yet.
            if disk.name.ends_with(MEMBERS) || disk.name.ends_with(MANAGED) {
                continue;
            }
            // Nor whether the guest writes to it.
            if let Err(why) = disk_file(&disk.path, false) {
                let path = disk.path.display();
                reasons.push(format!("--disk {}: {path}: {why}", disk.name));
            }
        }
        for (option, target) in [
            ("--console", &self.console),
            ("--virtio-console", &self.virtio_console),
        ] {
            // A file that is made for it goes again.
            if let Some(Err(error)) = target.as_ref().map(|target| console_file(target, &[])) {
                reasons.push(format!("{option}: {error}"));
            }
        }
        reasons
    }
}

/// The file of a disk, if it can be read, and with `write` be written, by this process.
pub fn disk_file(path: &Path, write: bool) -> Result<Metadata, String> {
    let metadata = std::fs::metadata(path).map_err(|error| explain(&error))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err("is neither a file nor a block device; give one of these".to_owned());
    }
    // Without opening it: to open a block device for writing is seen by others.
    let access = if write {
        Access::READ_OK | Access::WRITE_OK
    } else {
        Access::READ_OK
    };
    match rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS) {
        Ok(()) => Ok(metadata),
        Err(error) => Err(explain(&error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::overrides;
    use super::*;

    #[test]
    fn what_is_given_twice_is_refused_by_name() {
        for (disks, nets, part) in [
            (&["disk0=/a", "disk1=/b", "disk0=/c"][..], &[][..], "disk0"),
            (&["pf0-vf%d=/%d", "pf0-vf%d=/b%d"], &[], "pf0-vf%d"),
            (&[], &["net0=tap=t", "net0=switch=s"], "net0"),
        ] {
            let error = overrides(disks, nets).check_contradictions().unwrap_err();
            let error = error.to_string();
            assert!(error.contains(&format!("{part} is given twice")), "{error}");
        }
        let different = overrides(
            &["disk0=/a", "pf0=/a", "pf0-vf%d=/%d"],
            &["pf0=switch=s", "pf0=uplink-tap=t"],
        );
        different.check_contradictions().unwrap();
    }

    #[test]
    fn two_consoles_need_a_place_each() {
        for (text, good) in [("stdio", false), ("file=/c", false), ("none", true)] {
            let target: Target = text.parse().unwrap();
            let both = Overrides {
                console: Some(target.clone()),
                virtio_console: Some(target),
                ..Overrides::default()
            };
            assert_eq!(both.check_contradictions().is_ok(), good, "{text}");
        }
    }

    #[test]
    fn all_files_that_cannot_be_used_are_named_and_nothing_is_left_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("good"), "").unwrap();
        let disks = [
            format!("disk0={}", path("good")),
            format!("disk1={}", path("missing")),
            format!("pf0={}", dir.path().display()),
            format!("pf0-vf%d={}", path("missing%d")),
        ];
        let disks: Vec<_> = disks.iter().map(String::as_str).collect();
        let mut all = overrides(&disks, &[]);
        all.console = Some(Target::File(path("nowhere/c").into()));
        all.virtio_console = Some(Target::File(path("new").into()));
        let reasons = all.unusable();
        let [disk, pf, console] = reasons.as_slice() else {
            panic!("{reasons:?}");
        };
        assert!(disk.contains("--disk disk1: ") && disk.contains("no such file"));
        assert!(pf.contains("--disk pf0: ") && pf.contains("neither a file"));
        assert!(console.contains("--console: ") && console.contains("directory"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(overrides(&disks[..1], &[]).unusable().is_empty());
    }
}
