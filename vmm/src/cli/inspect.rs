//! `tern inspect`: what is in a snapshot, and what differs between two.

mod summary;

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::Args;
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

use crate::exit;
use crate::snapshot::format::diff::{self, Difference, What};
use crate::snapshot::format::document::MAX_LEN;
use crate::snapshot::format::state::State;
use crate::snapshot::format::{self};

/// File of a snapshot with its state.
const STATE: &str = "state.json";
/// File of a snapshot with the memory of the guest.
const MEMORY: &str = "memory.bin";

const EXAMPLES: &str = "\
Examples:
  tern inspect before
  tern inspect before --json | jq '.state.functions[] | select(.name == \"disk0\").context'
  tern inspect before after
  tern inspect before after --ignore id --ignore created

Objects in lists are compared with those of the same name, place, index, or type and queue. Memory is not compared.

Exit status:
  0   the snapshot is well formed; of two, nothing differs
  1   a snapshot cannot be read, or is malformed: the message names the field
  2   the command line is wrong
  10  two snapshots differ";

/// Show what is in a snapshot, or what differs between two.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Inspect {
    /// Directory of the snapshot
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Directory of another one: show what differs
    #[arg(value_name = "DIR2")]
    other: Option<PathBuf>,

    /// Answer in JSON
    #[arg(long)]
    json: bool,

    /// Leave out the field at this path and all below it, as in `id` or `functions[disk0].context`; can be given again
    #[arg(long, value_name = "PATH", requires = "other")]
    ignore: Vec<String>,

    /// Show at most so many lines of device contexts, or differences; 0 for all
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
}

/// A snapshot that is well formed.
struct Snapshot {
    state: Value,
    memory: Option<Extents>,
}

/// Bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extents {
    /// Its length.
    pub bytes: u64,
    /// Those that are not in holes.
    pub data: u64,
}

impl Inspect {
    /// Shows the snapshot, or what differs.
    pub fn run(&self) -> anyhow::Result<u8> {
        let limit = match self.limit {
            0 => usize::MAX,
            limit => limit,
        };
        let first = Snapshot::open(&self.directory)?;
        let Some(other) = &self.other else {
            if self.json {
                println!("{}", first.in_json(&self.directory));
            } else {
                print!(
                    "{}",
                    summary::describe(&self.directory, &first.state, first.memory, limit)
                );
            }
            return Ok(0);
        };
        let second = Snapshot::open(other)?;
        let found = diff::compare(&first.state, &second.state, &self.ignore, limit);
        if self.json {
            let differences: Vec<_> = found.shown.iter().map(difference).collect();
            println!(
                "{}",
                json!({ "differences": differences, "left_out": found.more })
            );
        } else {
            for difference in &found.shown {
                println!("{}", summary::printable(&difference.to_string()));
            }
            if found.more > 0 {
                println!("{} more differences; --limit 0 shows all", found.more);
            }
        }
        Ok(if found.is_empty() { 0 } else { exit::DIFFERENT })
    }
}

impl Snapshot {
    fn open(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.join(STATE);
        let bytes = read(&path)?;
        let place = || path.display().to_string();
        format::parse::<State>(&bytes).with_context(place)?;
        let state = serde_json::from_slice(&bytes).with_context(place)?;
        Ok(Self {
            state,
            memory: extents(&directory.join(MEMORY))?,
        })
    }

    fn in_json(&self, directory: &Path) -> Value {
        let memory = self.memory.map(
            |memory| json!({ "bytes": memory.bytes, "data": memory.data, "holes": memory.holes() }),
        );
        json!({ "path": directory, "memory_file": memory, "state": self.state })
    }
}

/// A regular file, opened.
fn open(path: &Path) -> anyhow::Result<File> {
    let place = || path.display().to_string();
    // Opening a FIFO would wait for a writer.
    if !fs::metadata(path).with_context(place)?.is_file() {
        bail!("{} is not a regular file", place());
    }
    File::open(path).with_context(place)
}

/// All bytes of a state, as far as any has so many.
fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = MAX_LEN as u64 + 1;
    let file = open(path)?.take(most);
    let mut file = file;
    file.read_to_end(&mut bytes)
        .with_context(|| path.display().to_string())?;
    Ok(bytes)
}

impl Extents {
    /// Bytes in holes, which read as zero.
    pub fn holes(self) -> u64 {
        self.bytes - self.data
    }
}

/// How much of a file is data; `None` if it is not there.
fn extents(path: &Path) -> anyhow::Result<Option<Extents>> {
    if !path.exists() {
        return Ok(None);
    }
    let file = open(path)?;
    let place = || path.display().to_string();
    let bytes = file.metadata().with_context(place)?.len();
    let (mut data, mut at) = (0, 0);
    while at < bytes {
        let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(start) => start.min(bytes),
            // No data from here on.
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error).with_context(place),
        };
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start)).with_context(place)?;
        // It always goes on, whatever the file system says.
        let end = end.clamp(start + 1, bytes.max(start + 1));
        data += end.min(bytes) - start;
        at = end;
    }
    Ok(Some(Extents { bytes, data }))
}

fn difference(difference: &Difference) -> Value {
    let path = &difference.path;
    match &difference.what {
        What::Changed(first, second) => json!({ "path": path, "first": first, "second": second }),
        What::Order(first, second) => {
            json!({ "path": path, "first_order": first, "second_order": second })
        }
        What::First(value) => json!({ "path": path, "first": value }),
        What::Second(value) => json!({ "path": path, "second": value }),
        What::Bytes { runs, more } => {
            let runs = runs.iter().map(
                |(at, first, second)| json!({ "offset": at, "first": first, "second": second }),
            );
            json!({ "path": path, "bytes": runs.collect::<Vec<_>>(), "left_out": more })
        }
    }
}

#[cfg(test)]
mod tests;
