//! `cargo xtask fuzz`: the fuzz targets, guided by coverage. `tests/fuzz` builds and runs them.

use anyhow::Result;
use clap::Args;

use crate::{packages, tools, workspace};

/// `cargo xtask fuzz`
#[derive(Debug, Args)]
pub struct Fuzz {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Targets; all if none is named
    targets: Vec<String>,
}

impl Fuzz {
    pub fn run(self) -> Result<i32> {
        run(self.seconds, &self.targets)?;
        Ok(0)
    }
}

/// Runs fuzz targets, all if none is named, for so many seconds each.
pub fn run(seconds: u32, targets: &[String]) -> Result<()> {
    packages::ensure(&[packages::FUZZ])?;
    let mut command = workspace::cargo();
    command
        .args([
            "run",
            "--quiet",
            "--package",
            "fuzz",
            "--",
            "--seconds",
            &seconds.to_string(),
        ])
        .args(targets);
    tools::visible(&mut command)
}
