//! Where things are: the source tree, the build directory, the cache; and building for the machines.

use std::env;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::tools;

/// The target of binaries that run as PID 1. Naming it keeps their flags away from build scripts and macros.
const STATIC_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The root of the source tree.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Cargo's build directory.
pub fn target() -> Result<PathBuf> {
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    // Cargo takes it relative to where it was called.
    std::path::absolute(&target).with_context(|| target.display().to_string())
}

/// The directory for what is downloaded or made from downloads. It outlives `cargo clean`.
pub fn cache() -> Result<PathBuf> {
    let base = env::var_os("XDG_CACHE_HOME")
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .context(
            "neither XDG_CACHE_HOME nor HOME is set, so there is no place to keep downloads",
        )?;
    let cache = base.join("tern");
    fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    Ok(cache)
}

/// Held while something in the cache is made, so that two invocations do not make it twice or half.
pub fn lock_cache() -> Result<File> {
    let path = cache()?.join("lock");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    if file.try_lock().is_err() {
        let step = tools::Step::begin("waiting for another xtask");
        file.lock().with_context(|| path.display().to_string())?;
        step.done();
    }
    Ok(file)
}

/// A `cargo` command in the root of the tree.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")));
    command.current_dir(root());
    command
}

/// Builds a binary of the workspace as it is released, and returns its path.
pub fn release_binary(package: &str, binary: &str) -> Result<PathBuf> {
    build(package, binary, &["--release"])?;
    Ok(target()?.join("release").join(binary))
}

/// Builds a binary of the workspace as the native tests do, and returns its path.
pub fn test_binary(package: &str, binary: &str) -> Result<PathBuf> {
    build(package, binary, &[])?;
    Ok(target()?.join("debug").join(binary))
}

/// Builds the unit tests of a library of the workspace, and returns the path of the program.
pub fn unit_tests(package: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command
        .args(["test", "--package", package, "--lib", "--no-run"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let output = command.output().context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "building the tests of {package} failed"
    );
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = messages.lines().rev().find_map(|line| {
        let message: Value = serde_json::from_str(line).ok()?;
        let program = message.get("executable")?.as_str()?;
        Some(PathBuf::from(program))
    });
    program.with_context(|| format!("cargo names no tests of {package}"))
}

fn build(package: &str, binary: &str, profile: &[&str]) -> Result<()> {
    let mut command = cargo();
    command
        .args(["build", "--package", package, "--bin", binary])
        .args(profile);
    tools::visible(&mut command).with_context(|| format!("building {binary}"))
}

/// Builds a binary without dynamic libraries, for an initial file tree that has none, and returns its path.
pub fn static_binary(package: &str, binary: &str) -> Result<PathBuf> {
    // A directory of its own: other flags in the same one would rebuild everything on every change of mind.
    let directory = target()?.join("static");
    let mut command = cargo();
    command
        .args([
            "build",
            "--quiet",
            "--release",
            "--package",
            package,
            "--bin",
            binary,
            "--target",
            STATIC_TARGET,
        ])
        .arg("--target-dir")
        .arg(&directory)
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_LTO", "off");
    tools::visible(&mut command).with_context(|| format!("building {binary}"))?;
    Ok(directory.join(STATIC_TARGET).join("release").join(binary))
}

/// Where to make something that is then renamed to `path`, so that nobody ever sees half of it.
pub fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_keeps_the_whole_name() {
        assert_eq!(
            partial(Path::new("/c/kernel-6.12-cloud")),
            Path::new("/c/kernel-6.12-cloud.partial")
        );
    }
}
