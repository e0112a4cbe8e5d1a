//! `cargo xtask schema`: the JSON Schema of snapshots. The test that compares it writes it.

use anyhow::Result;
use clap::Args;

use crate::{tools, workspace};

/// The test, and what makes it write the schema.
const TEST: &str = "snapshot::format::schema::tests::the_schema_in_the_tree_is_that_of_the_types";
const WRITE: &str = "TERN_WRITE_SCHEMA";

/// `cargo xtask schema`
#[derive(Debug, Args)]
pub struct Schema {
    /// Change nothing, and fail if the schema is stale
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
            TEST,
        ]);
        if !self.check {
            command.env(WRITE, "1");
        }
        tools::visible(&mut command)?;
        Ok(0)
    }
}
