//! Asks the host whether everything a configuration names exists and may be used, before anything is started.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::{Disk, Machine};
use crate::boot::load::explain;
use crate::console::Target;

/// Bytes of a disk sector.
pub const SECTOR: u64 = 512;

/// Something the host does not have or does not allow. Exit status 1.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A disk.
    #[error("disk {path}: {reason}")]
    Disk {
        /// Its path.
        path: PathBuf,
        /// What is wrong, and the cure.
        reason: String,
    },
    /// A console's file.
    #[error("console {path}: {reason}")]
    Console {
        /// Its path.
        path: PathBuf,
        /// What is wrong, and the cure.
        reason: String,
    },
    /// Memory.
    #[error("--memory: {0}")]
    Memory(String),
    /// vCPUs.
    #[error("--cpus: {0}")]
    Cpus(String),
}

/// A disk's file, opened and checked.
#[derive(Debug)]
pub struct OpenDisk {
    /// What was asked for.
    pub disk: Disk,
    /// The file, open for writing unless the disk is read-only.
    pub file: File,
    /// Its length in bytes, a multiple of [`SECTOR`].
    pub len: u64,
}

/// Opens the disks of a machine.
pub fn disks(machine: &Machine) -> Result<Vec<OpenDisk>, HostError> {
    machine.disks.iter().map(disk).collect()
}

fn disk(disk: &Disk) -> Result<OpenDisk, HostError> {
    let path = &disk.path;
    let error = |reason: String| HostError::Disk {
        path: path.clone(),
        reason,
    };
    disk.validate().map_err(error)?;
    let kind = std::fs::metadata(path)
        .map_err(|e| error(explain(&e)))?
        .file_type();
    if kind.is_dir() {
        return Err(error("is a directory; give a raw image file".to_owned()));
    }
    if !kind.is_file() && !kind.is_block_device() {
        return Err(error(
            "is neither a file nor a block device; give a raw image file".to_owned(),
        ));
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!disk.readonly)
        .open(path)
        .map_err(|e| {
            error(match e.kind() {
                std::io::ErrorKind::PermissionDenied if !disk.readonly => {
                    "is not writable; run `chmod u+w` on it, or add ,readonly".to_owned()
                }
                std::io::ErrorKind::ReadOnlyFilesystem => {
                    "is on a read-only file system; add ,readonly".to_owned()
                }
                _ => explain(&e),
            })
        })?;
    let len = file
        .seek(SeekFrom::End(0))
        .map_err(|e| error(explain(&e)))?;
    if len == 0 {
        return Err(error(
            "is empty; make it larger, as with `truncate -s 1G`".to_owned(),
        ));
    }
    if !len.is_multiple_of(SECTOR) {
        return Err(error(format!(
            "its {len} bytes are not a multiple of {SECTOR}; round it up with `truncate -s %{SECTOR}`"
        )));
    }
    Ok(OpenDisk {
        disk: disk.clone(),
        file,
        len,
    })
}

/// Opens the file a console writes to, if it does.
pub fn console_file(target: &Target) -> Result<Option<File>, HostError> {
    match target {
        Target::Stdio | Target::None => Ok(None),
        Target::File(path) => create(path).map(Some),
    }
}

fn create(path: &Path) -> Result<File, HostError> {
    File::create(path).map_err(|e| HostError::Console {
        path: path.to_owned(),
        reason: match e.kind() {
            std::io::ErrorKind::NotFound => "its directory does not exist; create it".to_owned(),
            std::io::ErrorKind::IsADirectory => "is a directory; give a file".to_owned(),
            _ => explain(&e),
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: PathBuf, readonly: bool) -> Result<OpenDisk, HostError> {
        let text = format!(
            "path={}{}",
            path.display(),
            if readonly { ",readonly" } else { "" }
        );
        disk(&text.parse().unwrap())
    }

    #[test]
    fn a_good_disk_is_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::write(&path, [0; 1024]).unwrap();
        assert_eq!(check(path, false).unwrap().len, 1024);
    }

    #[test]
    fn bad_disks_are_refused_with_the_cure() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str, len: usize| {
            let path = directory.path().join(name);
            std::fs::write(&path, vec![0; len]).unwrap();
            path
        };
        let cases = [
            (directory.path().join("missing"), "no such file"),
            (directory.path().to_owned(), "is a directory"),
            (
                PathBuf::from("/dev/null"),
                "neither a file nor a block device",
            ),
            (file("empty", 0), "is empty"),
            (file("odd", 513), "not a multiple of 512"),
        ];
        for (path, reason) in cases {
            let message = check(path.clone(), false).unwrap_err().to_string();
            assert!(message.contains(reason), "{message}");
            assert!(message.contains(&path.display().to_string()), "{message}");
        }
    }

    #[test]
    fn a_console_file_needs_a_directory() {
        let target = Target::File("/nonexistent/file".into());
        let message = console_file(&target).unwrap_err().to_string();
        assert!(message.contains("directory does not exist"), "{message}");
    }
}
