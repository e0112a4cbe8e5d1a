//! `cargo xtask schema`: the JSON Schema of snapshots, and the state that fuzzing begins with. The tests that compare them
//! write them.

use anyhow::Result;
use clap::Args;

use crate::{tools, workspace};

/// The tests, and what makes them write.
const TESTS: [&str; 2] = [
    "snapshot::format::schema::tests::the_schema_in_the_tree_is_that_of_the_types",
    "snapshot::format::schema::tests::fuzzing_begins_with_a_good_state",
];
const WRITE: &str = "TERN_WRITE_SCHEMA";

/// `cargo xtask schema`
#[derive(Debug, Args)]
pub struct Schema {
    /// Change nothing, and fail if one of the two is stale
    #[arg(long)]
    check: bool,
}

impl Schema {
    pub fn run(self) -> Result<i32> {
        let mut command = workspace::cargo();
        command.args([
            "test",
            "--quiet",
            "--package",
            "vmm",
            "--lib",
            "--",
            "--exact",
        ]);
        command.args(TESTS);
        if !self.check {
            command.env(WRITE, "1");
        }
        tools::visible(&mut command)?;
        Ok(0)
    }
}
