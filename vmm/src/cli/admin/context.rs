//! `tern admin … context`.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use devices::admin::Migration;
use devices::context::{self, FieldType};
use serde_json::json;

use super::member::{Member, Refused};
use crate::cli::print::say;
use crate::snapshot::format::context::Context;

/// Bytes of a context that are written with one command: as hexadecimal digits, they fit into a request.
const CHUNK: usize = 256 << 10;
/// Longest file that is read: no context of any device is nearly as long.
const FILE_MAX: u64 = 64 << 20;

#[derive(Debug, Args)]
pub struct ContextCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show how many bytes of the context are left to read
    Size {
        /// How many there would be in mode freeze
        #[arg(long)]
        in_freeze: bool,
    },
    /// Show which fields a context of this device has
    Fields,
    /// Read the context into a file, which is replaced when all of it is there. It can be read once; then again after a
    /// discard, or a change of the mode
    Read {
        /// The file
        file: PathBuf,
    },
    /// Write the context of a file; it takes effect when mode freeze ends
    Write {
        /// The file
        file: PathBuf,
    },
    /// Drop what was read or written
    Discard,
    /// Show the context field by field: that of a file, or without one that of the virtual function, which reads it
    Show {
        /// The file
        file: Option<PathBuf>,
    },
}

impl ContextCommand {
    /// The file to show, if that is all that is asked for: it takes no guest.
    pub fn shown_file(&self) -> Option<&Path> {
        match &self.action {
            Action::Show { file } => file.as_deref(),
            _ => None,
        }
    }

    pub fn run(&self, member: &Member, in_json: bool) -> anyhow::Result<()> {
        match &self.action {
            Action::Size { in_freeze } => size(member, *in_freeze, in_json),
            Action::Fields => fields(member, in_json),
            Action::Read { file } => {
                let target = Target::new(file)?;
                let bytes = read(member)?;
                target.keep(&bytes).map_err(|error| {
                    let name = &member.name;
                    anyhow!("{error:#}; to read the context again, `{name} context discard` first")
                })?;
                tell(member, bytes.len(), in_json);
                Ok(())
            }
            Action::Write { file } => {
                let bytes = load(file)?;
                write(member, &bytes)?;
                tell(member, bytes.len(), in_json);
                Ok(())
            }
            Action::Discard => {
                member.command(Migration::ContextDiscard, &[])?;
                match in_json {
                    true => say!("{}", json!({ "member": member.name })),
                    false => say!("discarded"),
                }
                Ok(())
            }
            // A file is shown without a guest.
            Action::Show { .. } => show(&read(member)?, in_json),
        }
    }
}

fn tell(member: &Member, bytes: usize, in_json: bool) {
    match in_json {
        true => say!("{}", json!({ "member": member.name, "bytes": bytes })),
        false => say!("context  {bytes} bytes"),
    }
}

fn size(member: &Member, in_freeze: bool, in_json: bool) -> anyhow::Result<()> {
    let done = member.command(Migration::ContextSize, &[in_freeze.into()])?;
    tell(member, done.number(0) as usize, in_json);
    Ok(())
}

fn fields(member: &Member, in_json: bool) -> anyhow::Result<()> {
    let done = member.command(Migration::ContextFields, &[])?;
    let entries = done.result.chunks_exact(16).map(|entry| {
        let raw = entry.first_chunk().copied().map_or(0, u16::from_le_bytes);
        let len = entry.last_chunk().copied().map_or(0, u64::from_le_bytes);
        (raw, len)
    });
    if in_json {
        let entries: Vec<_> = entries
            .map(|(raw, len)| json!({ "type": raw, "name": type_name(raw), "bytes": len }))
            .collect();
        say!("{}", json!({ "member": member.name, "fields": entries }));
        return Ok(());
    }
    for (raw, len) in entries {
        say!("{raw:#06x}  {:<22} {len:>6} bytes", type_name(raw));
    }
    Ok(())
}

fn type_name(raw: u16) -> &'static str {
    FieldType::from_raw(raw).map_or("unknown", FieldType::name)
}

/// Reads all there is, which is to be a context.
fn read(member: &Member) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let done = member.command(Migration::ContextRead, &[])?;
        let part = done.result.get(..done.output as usize).unwrap_or_default();
        if part.is_empty() {
            break;
        }
        bytes.extend_from_slice(part);
    }
    let name = &member.name;
    if bytes.is_empty() {
        bail!(
            "the context of {name} was read to its end before; `{name} context discard` starts anew"
        );
    }
    if context::parse(&bytes).is_err() {
        bail!(
            "a part of the context of {name} was read before; `{name} context discard` starts anew"
        );
    }
    Ok(bytes)
}

/// Writes all of a context, or nothing.
fn write(member: &Member, bytes: &[u8]) -> anyhow::Result<()> {
    for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
        let written = member.command(Migration::ContextWrite, chunk);
        if let Err(error) = written {
            let refused = error.downcast_ref::<Refused>();
            let begun = refused.is_some_and(|r| r.answer.qualifier_name == "INVALID_FIELD");
            // A piece that is refused leaves no trace, but those before it would keep the mode from changing. What was
            // written earlier, by another command, is nobody's to drop unasked.
            if begun && index > 0 {
                member.command(Migration::ContextDiscard, &[])?;
            }
            return Err(error);
        }
    }
    Ok(())
}

/// The bytes of `file`, which are a context of some device.
fn load(file: &Path) -> anyhow::Result<Vec<u8>> {
    let place = || file.display().to_string();
    let metadata = fs::metadata(file).with_context(place)?;
    // Opening a FIFO would wait for a writer, and a device need not end.
    if !metadata.is_file() {
        bail!("{} is not a regular file", place());
    }
    let mut bytes = Vec::new();
    let open = File::open(file).with_context(place)?;
    open.take(FILE_MAX)
        .read_to_end(&mut bytes)
        .with_context(place)?;
    let wrong = || format!("{} is not a device context", place());
    context::parse(&bytes).with_context(wrong)?;
    Ok(bytes)
}

/// Shows the context in `file`.
pub fn show_file(file: &Path, in_json: bool) -> anyhow::Result<()> {
    show(&load(file)?, in_json)
}

fn show(bytes: &[u8], in_json: bool) -> anyhow::Result<()> {
    // Refuses what no device has; the form of snapshots keeps anything that is framed.
    let fields = context::parse(bytes)?;
    if in_json {
        say!("{}", json!({ "fields": Context::decode(bytes)? }));
        return Ok(());
    }
    for field in fields {
        say!("{field}");
    }
    Ok(())
}

/// A file that is there in whole or not at all: until then, its bytes are in one beside it.
struct Target<'a> {
    path: &'a Path,
    beside: PathBuf,
    file: File,
    kept: bool,
}

impl<'a> Target<'a> {
    /// Claims the place, before anything is read that could not be kept.
    fn new(path: &'a Path) -> anyhow::Result<Self> {
        let place = || path.display().to_string();
        let Some(name) = path.file_name().filter(|_| !path.is_dir()) else {
            bail!("{} is a directory; give a file", place());
        };
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}", std::process::id()));
        let beside = path.with_file_name(hidden);
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(&beside)
            .with_context(place)?;
        Ok(Self {
            path,
            beside,
            file,
            kept: false,
        })
    }

    fn keep(mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let place = || self.path.display().to_string();
        let mut file = &self.file;
        file.write_all(bytes).with_context(place)?;
        self.file.sync_all().with_context(place)?;
        fs::rename(&self.beside, self.path).with_context(place)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // It may be gone; there is nothing more to do about it.
            let _ = fs::remove_file(&self.beside);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::context::{Field, assemble};

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_there_in_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vf1.ctx");
        fs::write(&path, "old").unwrap();
        drop(Target::new(&path).unwrap());
        assert_eq!(names(dir.path()), ["vf1.ctx"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
        let target = Target::new(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        target.keep(b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["vf1.ctx"]);
        for path in [dir.path().to_owned(), dir.path().join("no/where")] {
            assert!(Target::new(&path).is_err(), "{}", path.display());
        }
    }

    #[test]
    fn files_that_are_no_context_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut good = assemble(&[Field::DeviceFeatures(3)]);
        fs::write(&path, &good).unwrap();
        assert_eq!(load(&path).unwrap(), good);
        good.pop();
        for bytes in [&good[..], b"", b"{\"fields\": []}"] {
            fs::write(&path, bytes).unwrap();
            let message = load(&path).unwrap_err().to_string();
            assert!(message.contains("is not a device context"), "{message}");
        }
        let message = load(dir.path()).unwrap_err().to_string();
        assert!(message.contains("is not a regular file"), "{message}");
        assert!(load(&dir.path().join("nothing")).is_err());
    }
}
