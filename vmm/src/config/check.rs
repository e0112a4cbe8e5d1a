//! What only the host can say about a configuration.
//!
//! Disks and taps check themselves when they are opened, which is before anything of the guest exists
//! ([`crate::machine::functions::Backends`]).

use std::fs::File;
use std::path::{Path, PathBuf};

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

    #[test]
    fn a_console_file_needs_a_directory() {
        let target = Target::File("/nonexistent/file".into());
        let message = console_file(&target).unwrap_err().to_string();
        assert!(message.contains("directory does not exist"), "{message}");
    }
}
