//! `cargo xtask test`: every test, from the quickest to the slowest.

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::image::{self, Kernel};
use crate::tools::{self, Step};
use crate::{fuzz, kvm, packages, workspace};

/// `cargo xtask test`
#[derive(Debug, Args)]
pub struct Test {
    /// Only the tests that need no guest
    #[arg(long, conflicts_with = "e2e")]
    native: bool,
    /// Only the end-to-end tests, with guests under tern
    #[arg(long)]
    e2e: bool,
    /// How long each fuzz target runs; 0 leaves them out
    #[arg(long, value_name = "SECONDS", default_value_t = 20)]
    fuzz: u32,
    /// Only tests whose name contains this; leaves the fuzz targets out
    filter: Option<String>,
    #[command(flatten)]
    machine: kvm::Options,
}

/// How long the end-to-end tests of one module may take before something is called hung.
const END_TO_END_LIMIT: u64 = 15 * 60;
/// Tests that run only when asked for by name. They keep an emulated host busy for minutes on all its CPUs, and it does not
/// survive that reliably yet: its kernel has died of a corrupted stack under them.
const ON_DEMAND: &str = "sriov::";
/// Memory of the emulated host for them: guests of 4 GiB, two at a time, of which few touch all they have.
const END_TO_END_MEMORY: u64 = 8 * 1024;

impl Test {
    pub fn run(self) -> Result<i32> {
        if !self.e2e {
            self.native()?;
            if self.fuzz > 0 && self.filter.is_none() {
                let step = Step::begin(format!("fuzzing, {} s per target", self.fuzz));
                fuzz::run(self.fuzz, &[])?;
                step.done();
            }
        }
        if self.native {
            Ok(0)
        } else {
            self.end_to_end()
        }
    }

    fn native(&self) -> Result<()> {
        let step = Step::begin("native tests");
        let mut command = workspace::cargo();
        if tools::installed("cargo-nextest") {
            command
                .args(["nextest", "run", "--workspace", "--no-tests", "pass"])
                .args(&self.filter);
            tools::visible(&mut command)?;
            // Which nextest leaves out.
            command = workspace::cargo();
            command
                .args(["test", "--quiet", "--workspace", "--doc"])
                .args(&self.filter);
        } else {
            command
                .args(["test", "--quiet", "--workspace"])
                .args(&self.filter);
        }
        tools::visible(&mut command)?;
        step.done();
        Ok(())
    }

    fn end_to_end(self) -> Result<i32> {
        packages::ensure(&packages::END_TO_END)?;
        let step = Step::begin("building tern and its end-to-end tests");
        let tern = workspace::release_binary("vmm", "tern")?;
        let tests = workspace::test_binary("e2e", "e2e")?;
        step.done();
        image::guests(&Kernel::ALL, false)?;
        let mut machine = self.machine;
        machine.timeout = machine.timeout.or(Some(END_TO_END_LIMIT));
        machine.memory = machine.memory.max(END_TO_END_MEMORY);
        let mut variable = |name: &str, value: OsString| {
            let mut text = OsString::from(name);
            text.push("=");
            text.push(value);
            machine.variables.push(text);
        };
        variable("TERN", tern.into());
        variable("TERN_IMAGES", image::directory()?.into());
        let step = Step::begin("end-to-end tests");
        let filters = match self.filter {
            Some(filter) => vec![filter],
            None => {
                eprintln!(
                    "xtask: {ON_DEMAND} tests are left out; run them with: cargo xtask test --e2e {ON_DEMAND}"
                );
                groups(&tests)?
            }
        };
        let mut status = 0;
        let mut lost = 0;
        for filter in filters {
            let command = [tests.clone().into(), filter.clone().into()];
            let mut group = kvm::run(&machine, &command)?;
            if group == kvm::NO_SESSION {
                // No test has failed: the machine under them is gone, which is the emulator's fault or its end.
                lost += 1;
                eprintln!("xtask: {filter} has no result; it runs once more, in a new machine");
                group = kvm::run(&machine, &command)?;
            }
            status = status.max(group);
        }
        step.done();
        if lost > 0 {
            eprintln!(
                "xtask: WARNING: {lost} machines were lost under the end-to-end tests and replaced"
            );
        }
        Ok(status)
    }
}

/// The modules of the end-to-end tests, as filters. Each gets a machine of its own, so that what one leaves behind is not
/// there for the next.
fn groups(tests: &Path) -> Result<Vec<String>> {
    let mut list = Command::new(tests);
    list.arg("--list");
    let output = list.output().context("listing the end-to-end tests")?;
    let mut groups: Vec<String> = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| Some(format!("{}::", line.split_once("::")?.0)))
        .collect();
    groups.dedup();
    groups.retain(|group| group != ON_DEMAND);
    ensure!(!groups.is_empty(), "there are no end-to-end tests");
    Ok(groups)
}
