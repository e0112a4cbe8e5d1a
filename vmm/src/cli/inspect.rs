//! `tern inspect`: what is in a snapshot, and what differs between two.

mod memory;
mod summary;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use migration::Reader;
use migration::directory::STATE;
use serde_json::{Value, json};

use crate::cli::print::{self, say};
use crate::exit;
use crate::snapshot::format::diff::{self, Difference, What};
use crate::snapshot::format::state::State;
use crate::snapshot::format::{self};
use crate::snapshot::restore::{Described, StateFault};
use memory::Memory;

const EXAMPLES: &str = "\
Examples:
  tern inspect before
  tern inspect before --verify
  tern inspect before --json | jq '.state.functions[] | select(.name == \"disk0\").context'
  tern inspect before after
  tern inspect before after --ignore id --ignore created --ignore memory

Objects in lists are compared with those of the same name, place, index, or type and queue. Of memory, digests are compared.

Exit status:
  0   the snapshot can be read; of two, nothing differs. A restore checks more: that each device is there and can have its
      state, and that the base of an incremental snapshot is
  1   a snapshot cannot be read, or is malformed: the message names the field or the file
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

    /// Read all of the memory, that of bases included, and compare it with its digests
    #[arg(long)]
    verify: bool,

    /// Leave out the field at this path and all below it, as in `id` or `functions[disk0].context`; can be given again
    #[arg(long, value_name = "PATH", requires = "other")]
    ignore: Vec<String>,

    /// Show at most so many fields of device contexts, or differences; 0 for all
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
}

/// A snapshot that is well formed.
struct Snapshot {
    path: PathBuf,
    state: Value,
    memory: Memory,
}

impl Inspect {
    /// Shows the snapshot, or what differs.
    pub fn run(&self) -> anyhow::Result<u8> {
        let first = Snapshot::open(&self.directory, self.verify)?;
        let Some(other) = &self.other else {
            if self.json {
                say!("{}", first.in_json());
            } else {
                print::text(format_args!("{}", summary::describe(&first, self.limit())));
            }
            return Ok(0);
        };
        let second = Snapshot::open(other, self.verify)?;
        let found = diff::compare(&first.state, &second.state, &self.ignore, self.limit());
        if self.json {
            let differences: Vec<_> = found.shown.iter().map(difference).collect();
            say!(
                "{}",
                json!({ "differences": differences, "left_out": found.more })
            );
        } else {
            for difference in &found.shown {
                say!("{}", summary::printable(&difference.to_string()));
            }
            if found.more > 0 {
                say!("{} more differences; --limit 0 shows all", found.more);
            }
        }
        Ok(if found.is_empty() { 0 } else { exit::DIFFERENT })
    }

    fn limit(&self) -> usize {
        match self.limit {
            0 => usize::MAX,
            limit => limit,
        }
    }
}

impl Snapshot {
    /// Reads and checks what [`Source::open`](crate::snapshot::restore::Source::open) does, but for what depends on the host:
    /// its processor, and the files of disks and consoles.
    fn open(path: &Path, verify: bool) -> anyhow::Result<Self> {
        let reader = Reader::open(path)?;
        let bytes = reader.state()?;
        let state: State =
            format::parse(&bytes).map_err(|error| StateFault::from(error).at(path))?;
        let described = Described::of(&state).map_err(|fault| fault.at(path))?;
        let memory = Memory::open(&reader, &described.memory, verify)?;
        let place = || path.join(STATE).display().to_string();
        let state = serde_json::from_slice(&bytes).with_context(place)?;
        Ok(Self {
            path: path.to_owned(),
            state,
            memory,
        })
    }

    fn in_json(&self) -> Value {
        json!({ "path": self.path, "memory": self.memory.in_json(), "state": self.state })
    }
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
