//! What only the host can say about a configuration.
//!
//! Disks and taps check themselves when they are opened, which is before anything of the guest exists
//! ([`crate::machine::functions::Backends`]).

use std::fs::{File, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::boot::load::explain;
use crate::console::Target;

/// Something the host does not have or does not allow. Exit status 1.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
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

/// Files that were made for consoles of a guest that does not run yet, so that an end of the process that drops nothing
/// can remove them.
static MADE: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Removes files that were made for consoles of a guest that does not run yet.
pub fn remove_made() {
    let made = std::mem::take(&mut *MADE.lock().unwrap_or_else(PoisonError::into_inner));
    for path in made {
        // Made a moment ago and locked since; one that is gone needs no removal.
        let _ = std::fs::remove_file(path);
    }
}

/// Takes `path` off the list of what [`remove_made`] removes; false if it is not on it.
fn take_made(path: &Path) -> bool {
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = made.len();
    made.retain(|p| p != path);
    made.len() != before
}

/// The guest runs: files that were made for its consoles stay.
pub fn keep_made() {
    MADE.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

/// A file a console writes to, locked for it. What was in it stays; a file made for it goes again unless the guest
/// comes to run, see [`keep_made`].
#[derive(Debug)]
pub struct ConsoleFile {
    file: File,
    /// Its path, if it was made here.
    made: Option<PathBuf>,
}

impl Write for ConsoleFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for ConsoleFile {
    fn drop(&mut self) {
        if let Some(path) = self.made.take().filter(|path| take_made(path)) {
            // See `remove_made`.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens the file a console writes to, if it does. It is appended to, so that a mistyped path destroys nothing; and it
/// cannot be one of `others`, files the guest is made from, nor one that a disk or another console has locked.
pub fn console_file(target: &Target, others: &[&Path]) -> Result<Option<ConsoleFile>, HostError> {
    match target {
        Target::Stdio | Target::None => Ok(None),
        Target::File(path) => open(path, others).map(Some).map_err(|reason| {
            let path = path.to_owned();
            HostError::Console { path, reason }
        }),
    }
}

fn open(path: &Path, others: &[&Path]) -> Result<ConsoleFile, String> {
    let explained = |e: io::Error| match e.kind() {
        io::ErrorKind::NotFound => "its directory does not exist; create it".to_owned(),
        io::ErrorKind::IsADirectory => "is a directory; give a file".to_owned(),
        _ => explain(&e),
    };
    let existing = std::fs::metadata(path).ok();
    if let Some(existing) = &existing {
        let kind = existing.file_type();
        // Opening a FIFO would wait for a reader.
        if !kind.is_file() && !kind.is_char_device() && !kind.is_dir() {
            return Err("is neither a file nor a terminal; give a file".to_owned());
        }
        let is_this = |other: &&&Path| {
            std::fs::metadata(other)
                .is_ok_and(|m| (m.dev(), m.ino()) == (existing.dev(), existing.ino()))
        };
        if let Some(other) = others.iter().find(is_this) {
            return Err(format!(
                "is {}, which the guest needs; give another file",
                other.display()
            ));
        }
    }
    let file = File::options()
        .append(true)
        .create(true)
        .open(path)
        .map_err(explained)?;
    let made = existing.is_none().then(|| path.to_owned());
    if let Some(path) = &made {
        let mut all = MADE.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(path.clone());
    }
    let console = ConsoleFile { made, file };
    let is_file = console.file.metadata().is_ok_and(|m| m.is_file());
    match console.file.try_lock() {
        Err(TryLockError::WouldBlock) if is_file => {
            Err("is in use, as a disk or by another console; give another file".to_owned())
        }
        // Terminals need no lock, and a file system without locks is no reason to refuse.
        _ => Ok(console),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_file_needs_a_directory() {
        let target = Target::File("/nonexistent/file".into());
        let message = console_file(&target, &[]).unwrap_err().to_string();
        assert!(message.contains("directory does not exist"), "{message}");
    }

    #[test]
    fn what_is_in_a_console_file_stays_and_what_was_made_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join("old"), dir.path().join("new"));
        std::fs::write(&old, "precious").unwrap();
        for path in [&old, &new] {
            drop(console_file(&Target::File(path.clone()), &[]).unwrap());
        }
        assert_eq!(std::fs::read_to_string(&old).unwrap(), "precious");
        assert!(!new.exists());
        let kept = console_file(&Target::File(new.clone()), &[]).unwrap();
        keep_made();
        drop(kept);
        assert!(new.exists());
    }

    #[test]
    fn a_file_in_use_a_fifo_and_the_kernel_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, link, fifo) = (
            dir.path().join("vmlinuz"),
            dir.path().join("link"),
            dir.path().join("fifo"),
        );
        std::fs::write(&kernel, "kernel").unwrap();
        std::os::unix::fs::symlink(&kernel, &link).unwrap();
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        let refuse = |path: &Path, others: &[&Path], part: &str| {
            let message = console_file(&Target::File(path.to_owned()), others)
                .unwrap_err()
                .to_string();
            assert!(message.contains(part), "{message}");
        };
        refuse(&link, &[&kernel], "which the guest needs");
        refuse(&fifo, &[], "neither a file");
        let first = console_file(&Target::File(kernel.clone()), &[]).unwrap();
        refuse(&link, &[], "in use");
        drop(first);
    }
}
