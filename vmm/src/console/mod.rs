//! The guest's serial console on this side: where its output goes and where its input comes from.
//!
//! | module | what it does |
//! |---|---|
//! | [`escape`] | finds the escape sequences in what is typed |
//! | [`output`] | a buffer that vCPUs fill and a thread that empties it |
//! | [`terminal`] | raw mode, and the way back on every exit path |

pub mod escape;
pub mod output;
pub mod terminal;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where a console is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Target {
    /// Standard input and output of the process.
    #[default]
    Stdio,
    /// Output goes to a file, which is created or truncated; there is no input.
    File(PathBuf),
    /// Output is dropped; there is no input.
    None,
}

impl Target {
    /// Where output goes, for people.
    pub fn place(&self) -> String {
        match self {
            Self::Stdio => "standard output".to_owned(),
            Self::File(path) => path.display().to_string(),
            Self::None => "nowhere".to_owned(),
        }
    }
}

/// Standard output without a buffer of its own: what a write does not take is known at once.
pub fn stdout() -> io::Result<File> {
    Ok(io::stdout().as_fd().try_clone_to_owned()?.into())
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!(
                "'{text}' is no console; write stdio, file=PATH or none"
            )),
        }
    }
}

impl TryFrom<String> for Target {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        match target {
            Target::Stdio => "stdio".to_owned(),
            Target::File(path) => format!("file={}", path.display()),
            Target::None => "none".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_parsed_and_printed() {
        for (text, target) in [
            ("stdio", Target::Stdio),
            ("none", Target::None),
            ("file=/tmp/x", Target::File("/tmp/x".into())),
            ("file=a=b", Target::File("a=b".into())),
        ] {
            assert_eq!(text.parse(), Ok(target.clone()));
            assert_eq!(String::from(target), text);
        }
        for text in ["", "file", "file=", "tty", "stdio=1", "STDIO"] {
            assert!(text.parse::<Target>().is_err(), "{text}");
        }
    }
}
