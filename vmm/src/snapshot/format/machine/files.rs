//! What the specification says about files, beyond what a command line can say.

use std::path::Path;

use super::{Machine, MachineError, Pf, PfKind, wrong};
use crate::console::Target;

impl Machine {
    /// Rejects relative paths: the directory they were relative to is not that of the process which restores. An option
    /// that replaces a path makes it absolute.
    pub(super) fn check_files(&self) -> Result<(), MachineError> {
        for (index, disk) in self.disks.iter().enumerate() {
            absolute(&disk.file.path, || format!("disks[{index}].file.path"))?;
        }
        for (index, pf) in self.pfs.iter().enumerate() {
            pf.check_files(index)?;
        }
        for (index, manager) in self.managers.iter().enumerate() {
            manager.check_files(index)?;
        }
        console(&self.console, "console")?;
        match &self.virtio_console {
            Some(target) => console(target, "virtio_console"),
            None => Ok(()),
        }
    }
}

impl Pf {
    fn check_files(&self, index: usize) -> Result<(), MachineError> {
        let PfKind::Block {
            file,
            vf_path,
            vf_files,
            ..
        } = &self.device
        else {
            return Ok(());
        };
        let field = |name: &str| format!("pfs[{index}].device.block.{name}");
        if let Some(file) = file {
            absolute(&file.path, || field("file.path"))?;
        }
        absolute(Path::new(vf_path), || field("vf_path"))?;
        let members = 1..=self.vfs;
        match vf_files.keys().find(|number| !members.contains(number)) {
            Some(number) => Err(wrong(
                field("vf_files"),
                format!("there is no member {number}; this owner has {}", self.vfs),
            )),
            None => Ok(()),
        }
    }
}

/// An empty path is reported as what it is, elsewhere.
pub(super) fn absolute(path: &Path, field: impl Fn() -> String) -> Result<(), MachineError> {
    if path.is_absolute() || path.as_os_str().is_empty() {
        return Ok(());
    }
    let reason = format!(
        "{} is relative; paths in a snapshot are absolute",
        path.display()
    );
    Err(wrong(field(), reason))
}

fn console(target: &str, field: &str) -> Result<(), MachineError> {
    match target.parse() {
        Ok(Target::File(path)) => absolute(&path, || field.to_owned()),
        _ => Ok(()),
    }
}
