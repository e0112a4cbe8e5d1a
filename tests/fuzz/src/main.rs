//! Runs the fuzz targets, guided by coverage: `cargo run -p fuzz -- --seconds 30 [TARGET…]`.
//!
//! Builds the target binaries with libFuzzer and coverage instrumentation, in a target directory of their own, and
//! runs each for the given time over the seeds in `corpus/`. What a run finds stays outside the tree.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use clap::Parser;

/// Coverage as libFuzzer wants it, from a stable compiler: what `-fsanitize=fuzzer-no-link` turns on.
const COVERAGE: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks --cfg fuzzing";

/// The instrumented target: naming it keeps the flags away from build scripts and macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

#[derive(Parser)]
struct Options {
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Targets; all if none is named.
    targets: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let known: Vec<_> = fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
    if let Some(unknown) = options
        .targets
        .iter()
        .find(|t| !known.contains(&t.as_str()))
    {
        bail!("no target {unknown}; there are {}", known.join(", "));
    }
    let targets = if options.targets.is_empty() {
        known.iter().map(|t| (*t).to_owned()).collect()
    } else {
        options.targets
    };
    let directory = target_directory();
    build(&directory, &targets)?;
    for target in &targets {
        run(&directory, target, options.seconds)?;
    }
    Ok(())
}

/// Where cargo builds, with a directory of its own for the instrumented binaries.
fn target_directory() -> PathBuf {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
    let base = std::env::var_os("CARGO_TARGET_DIR").map_or(tree, PathBuf::from);
    base.join("fuzz")
}

fn build(directory: &Path, targets: &[String]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(["build", "--locked", "--release", "--package", "fuzz"])
        .args(["--features", "libfuzzer", "--target", TRIPLE])
        .args(targets.iter().flat_map(|target| ["--bin", target]))
        .env("CARGO_TARGET_DIR", directory)
        .env("RUSTFLAGS", COVERAGE)
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the targets do not build; libFuzzer needs a C++ compiler (apt-get install g++)");
    }
    Ok(())
}

fn run(directory: &Path, target: &str, seconds: u32) -> anyhow::Result<()> {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let found = directory.join("corpus").join(target);
    let artifacts = directory.join("artifacts").join(target);
    for path in [&found, &artifacts, &directory.join("logs")] {
        std::fs::create_dir_all(path).with_context(|| format!("cannot create {path:?}"))?;
    }
    eprintln!("{target}: {seconds} s");
    let mut command = Command::new(directory.join(TRIPLE).join("release").join(target));
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-max_len=4096", "-timeout=10", "-rss_limit_mb=1024"])
        .arg("-print_final_stats=1")
        .arg(&found);
    if seeds.is_dir() {
        command.arg(&seeds);
    }
    let log = directory.join("logs").join(format!("{target}.log"));
    let file = std::fs::File::create(&log).with_context(|| format!("cannot create {log:?}"))?;
    let status = command
        .stderr(file)
        .status()
        .with_context(|| format!("cannot run target {target}"))?;
    let text = std::fs::read_to_string(&log).unwrap_or_default();
    if !status.success() {
        let lines: Vec<_> = text.lines().collect();
        let tail = lines.len().saturating_sub(40);
        eprintln!("{}", lines.get(tail..).unwrap_or_default().join("\n"));
        bail!(
            "{target} found a failure; the input is in {}, and belongs into tests/fuzz/corpus/{target} with the cure",
            artifacts.display()
        );
    }
    for line in text
        .lines()
        .filter(|l| l.contains(" DONE ") || l.starts_with("stat::"))
    {
        eprintln!("  {}", line.trim_start_matches("stat::"));
    }
    Ok(())
}
