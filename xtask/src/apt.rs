//! Debian packages: looking them up, downloading them without installing them, installing those that must be.
//!
//! Kernels and busybox are only unpacked, into the cache: installing a kernel would touch the boot loader of the host
//! that happens to run the tests. apt's own lists say which hash a package must have.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::tools::{self, Step};
use crate::workspace;

/// One version of a package, as apt's lists describe it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Package {
    pub name: String,
    pub version: String,
    pub sha256: String,
    /// Bytes to download.
    pub size: u64,
    /// The `Depends` field, as it is.
    pub depends: String,
}

impl Package {
    /// Reads the first stanza of what `apt-cache show` prints.
    fn parse(text: &str) -> Result<Self> {
        let stanza = text.trim_start().split("\n\n").next().unwrap_or_default();
        let optional = |field: &str| {
            let line = |line: &'_ str| {
                let (key, value) = line.split_once(':')?;
                (key == field).then(|| value.trim().to_owned())
            };
            stanza.lines().find_map(line)
        };
        let required =
            |field: &str| optional(field).with_context(|| format!("apt does not tell its {field}"));
        let sha256 = required("SHA256")?;
        ensure!(
            sha256.len() == 64 && sha256.bytes().all(|b| b.is_ascii_hexdigit()),
            "apt tells a strange SHA256: {sha256}"
        );
        Ok(Self {
            name: required("Package")?,
            version: required("Version")?,
            sha256: sha256.to_ascii_lowercase(),
            size: required("Size")?
                .parse()
                .context("apt tells a strange Size")?,
            depends: optional("Depends").unwrap_or_default(),
        })
    }

    /// The version it depends on exactly, of the first package whose name begins with `prefix`: what a meta package
    /// stands for.
    pub fn stands_for(&self, prefix: &str) -> Option<(String, String)> {
        self.depends.split(',').find_map(|dependency| {
            let (name, constraint) = dependency.trim().split_once(' ')?;
            let version = constraint.trim().strip_prefix("(=")?.strip_suffix(')')?;
            name.starts_with(prefix)
                .then(|| (name.to_owned(), version.trim().to_owned()))
        })
    }
}

/// The version apt would install, if it knows the package at all.
pub fn candidate(name: &str) -> Result<Option<Package>> {
    show(&["--no-all-versions", name], name)
}

/// One version of a package.
pub fn exact(name: &str, version: &str) -> Result<Option<Package>> {
    show(&[&format!("{name}={version}")], name)
}

fn show(arguments: &[&str], name: &str) -> Result<Option<Package>> {
    let output = Command::new("apt-cache")
        .arg("show")
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .context("cannot run apt-cache; the kernels of the test guest are Debian packages")?;
    // apt exits with 100 when it knows no such package.
    if !output.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    if text.trim().is_empty() {
        return Ok(None);
    }
    Package::parse(&text)
        .map(Some)
        .with_context(|| format!("package {name}"))
}

/// Downloads a package, checks its hash, and unpacks it into `tree`, which appears only when it is complete.
pub fn unpack(package: &Package, tree: &Path) -> Result<()> {
    let work = workspace::partial(tree);
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| work.display().to_string())?;
    }
    fs::create_dir_all(&work).with_context(|| work.display().to_string())?;
    let archive = download(package, &work)?;
    let step = Step::begin(format!("unpacking {}", package.name));
    let unpacked = work.join("tree");
    tools::logged(
        "unpack",
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(&archive)
            .arg(&unpacked),
    )?;
    fs::write(
        unpacked.join("package.json"),
        serde_json::to_vec_pretty(package)?,
    )?;
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| tree.display().to_string())?;
    }
    fs::rename(&unpacked, tree).with_context(|| tree.display().to_string())?;
    fs::remove_dir_all(&work).with_context(|| work.display().to_string())?;
    step.done();
    Ok(())
}

fn download(package: &Package, directory: &Path) -> Result<std::path::PathBuf> {
    let wanted = format!("{}={}", package.name, package.version);
    let step = Step::begin(format!(
        "downloading {wanted} ({} MB)",
        package.size.div_ceil(1_000_000)
    ));
    let mut command = Command::new("apt-get");
    command
        // The user that apt would switch to cannot write into a home directory.
        .args([
            "-o",
            "APT::Sandbox::User=root",
            "-o",
            "Acquire::Retries=3",
            "download",
            &wanted,
        ])
        .current_dir(directory);
    tools::logged("download", &mut command).with_context(|| {
        format!("cannot download {wanted}; `apt-get update` helps if the lists are old")
    })?;
    let archive = fs::read_dir(directory)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .context("apt-get downloaded nothing")?;
    let found = sha256(&fs::read(&archive)?);
    ensure!(
        found == package.sha256,
        "{wanted} has the SHA256 {found}, but apt's lists say {}; nothing of it was used",
        package.sha256
    );
    step.done();
    Ok(archive)
}

/// A hash as apt writes it.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Whether this process may install packages.
pub fn can_install() -> bool {
    rustix::process::geteuid().is_root() && tools::installed("apt-get")
}

/// Refreshes the lists, or says how.
pub fn update() -> Result<()> {
    if !can_install() {
        bail!("apt has no lists of packages; as root, run: apt-get update");
    }
    let step = Step::begin("refreshing the lists of packages");
    tools::logged("apt-update", apt_get().arg("update"))?;
    step.done();
    Ok(())
}

/// Installs packages, or says how.
pub fn install(packages: &[&str]) -> Result<()> {
    let command = format!(
        "apt-get install --no-install-recommends -y {}",
        packages.join(" ")
    );
    if !can_install() {
        bail!("packages are missing; as root, run: {command}");
    }
    let try_once = || {
        tools::logged(
            "apt-install",
            apt_get()
                .args(["install", "--no-install-recommends", "-y"])
                .args(packages),
        )
    };
    let step = Step::begin(format!("installing {}", packages.join(" ")));
    // Without lists, or with old ones, apt fails at once; with good ones there is no need to fetch them.
    if try_once().is_err() {
        update()?;
        try_once().with_context(|| format!("`{command}` failed"))?;
    }
    step.done();
    Ok(())
}

/// Installs a package and what it needs from `release`, one that only the source list in `list` names.
pub fn install_from(list: &Path, release: &str, package: &str) -> Result<()> {
    let mut source = OsString::from("Dir::Etc::SourceList=");
    source.push(list);
    if !can_install() {
        bail!(
            "as root, run: apt-get -o {0} update; apt-get -o {0} install -t {release} {package}",
            source.display()
        );
    }
    let step = Step::begin(format!("installing {package} from {release}"));
    let with_list = || {
        let mut command = apt_get();
        command.arg("-o").arg(&source);
        command
    };
    tools::logged("apt-update", with_list().arg("update"))?;
    tools::logged(
        "apt-install",
        with_list()
            .args(["install", "--no-install-recommends", "-y", "-t", release])
            .arg(package),
    )?;
    step.done();
    Ok(())
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Package: linux-image-6.12-cloud-amd64
Source: linux-signed-6.12-amd64
Version: 6.12.117-1~deb12u1
Depends: linux-base, linux-image-6.12.117+deb12-cloud-amd64 (= 6.12.117-1~deb12u1)
Description: Linux for clouds
 SHA256: not a field, but part of the description
Size: 1480
SHA256: AB2bd6d92fedce96f7fb3f51a0dfefadf069a32023927150d7ddaeb3aed1464c

Package: linux-image-6.12-cloud-amd64
Version: 6.12.1-1
Size: 1
SHA256: 0000000000000000000000000000000000000000000000000000000000000000
";

    #[test]
    fn first_stanza_is_read() {
        let package = Package::parse(SHOWN).unwrap();
        assert_eq!(package.name, "linux-image-6.12-cloud-amd64");
        assert_eq!(package.version, "6.12.117-1~deb12u1");
        assert_eq!(package.size, 1480);
        assert_eq!(
            package.sha256,
            "ab2bd6d92fedce96f7fb3f51a0dfefadf069a32023927150d7ddaeb3aed1464c"
        );
    }

    #[test]
    fn meta_package_names_the_real_one() {
        let real = Package::parse(SHOWN).unwrap().stands_for("linux-image-");
        let expected = (
            "linux-image-6.12.117+deb12-cloud-amd64".to_owned(),
            "6.12.117-1~deb12u1".to_owned(),
        );
        assert_eq!(real, Some(expected));
        assert_eq!(
            Package::parse(SHOWN).unwrap().stands_for("linux-headers-"),
            None
        );
    }

    #[test]
    fn incomplete_stanzas_are_errors_that_name_the_field() {
        for field in ["Package", "Version", "Size", "SHA256"] {
            let without: String = SHOWN
                .lines()
                .filter(|line| !line.starts_with(&format!("{field}:")))
                .map(|l| format!("{l}\n"))
                .collect();
            let first = without.split("\n\n").next().unwrap();
            assert_eq!(
                Package::parse(first).unwrap_err().to_string(),
                format!("apt does not tell its {field}")
            );
        }
        assert!(Package::parse("").is_err());
        let short = SHOWN.replace("AB2bd6d9", "");
        assert!(
            Package::parse(&short)
                .unwrap_err()
                .to_string()
                .starts_with("apt tells a strange SHA256")
        );
    }

    #[test]
    fn hashes_are_written_as_apt_writes_them() {
        assert_eq!(
            sha256(b""),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
    }
}
