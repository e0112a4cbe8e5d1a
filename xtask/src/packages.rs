//! What the build host must have installed, and what is only unpacked into the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Package};
use crate::tools;
use crate::workspace;

/// A program of the host, and the package it comes in.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    pub name: &'static str,
    pub package: &'static str,
}

/// The emulator of the KVM machine.
pub const QEMU: Program = Program {
    name: "qemu-system-x86_64",
    package: "qemu-system-x86",
};
/// Unpacks kernels and modules.
pub const UNPACKERS: [Program; 2] = [
    Program {
        name: "xz",
        package: "xz-utils",
    },
    Program {
        name: "zstd",
        package: "zstd",
    },
];
/// Links the fuzzing runtime, which is C++.
pub const FUZZ: Program = Program {
    name: "g++",
    package: "g++",
};
/// What the end-to-end tests use to look at tern from the outside.
pub const END_TO_END: [Program; 3] = [
    Program {
        name: "ip",
        package: "iproute2",
    },
    Program {
        name: "curl",
        package: "curl",
    },
    Program {
        name: "jq",
        package: "jq",
    },
];

/// Installs those of `programs` that are missing, or says what to run.
pub fn ensure(programs: &[Program]) -> Result<()> {
    let missing: Vec<&str> = programs
        .iter()
        .filter(|p| !tools::installed(p.name))
        .map(|p| p.package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    apt::install(&missing)?;
    match programs.iter().find(|p| !tools::installed(p.name)) {
        Some(program) => bail!(
            "{} was installed, but there is still no {}",
            program.package,
            program.name
        ),
        None => Ok(()),
    }
}

/// A package that is unpacked, not installed.
#[derive(Debug, Clone, Copy)]
pub struct Unpacked {
    /// Its directory in the cache.
    pub directory: &'static str,
    /// Meta packages that stand for it, or its own name; the first one that apt knows is taken.
    pub names: &'static [&'static str],
    /// What its version must begin with.
    pub version: &'static str,
}

/// Kernel of the emulated host: it has 9p and kvm-amd, which the cloud kernels lack one of.
pub const MACHINE_KERNEL: Unpacked = Unpacked {
    directory: "kernel-6.12-machine",
    names: &["linux-image-6.12-amd64", "linux-image-amd64"],
    version: "6.12.",
};
/// Kernels of the test guest.
pub const GUEST_KERNEL_6_12: Unpacked = Unpacked {
    directory: "kernel-6.12-cloud",
    names: &["linux-image-6.12-cloud-amd64", "linux-image-cloud-amd64"],
    version: "6.12.",
};
/// The kernel of Debian 12 itself.
pub const GUEST_KERNEL_6_1: Unpacked = Unpacked {
    directory: "kernel-6.1-cloud",
    names: &["linux-image-cloud-amd64"],
    version: "6.1.",
};
/// User space of the test guest.
pub const BUSYBOX: Unpacked = Unpacked {
    directory: "busybox",
    names: &["busybox-static"],
    version: "",
};

/// What was unpacked where.
#[derive(Debug, Clone)]
pub struct Tree {
    pub directory: PathBuf,
    pub package: Package,
}

impl Unpacked {
    /// The unpacked package. The network is needed only the first time, or when `update` asks for the latest version.
    ///
    /// The caller holds the lock of the cache.
    pub fn obtain(&self, update: bool) -> Result<Tree> {
        let directory = workspace::cache()?.join(self.directory);
        let cached = cached(&directory);
        if !update && let Some(package) = cached {
            return Ok(Tree { directory, package });
        }
        if update {
            apt::update()?;
        }
        let package = match self.resolve()? {
            Some(package) => package,
            None if update => bail!("{}", self.unknown()),
            // A fresh system has no lists yet.
            None => {
                apt::update()?;
                self.resolve()?.with_context(|| self.unknown())?
            }
        };
        if cached.as_ref() != Some(&package) {
            apt::unpack(&package, &directory)?;
        }
        Ok(Tree { directory, package })
    }

    fn unknown(&self) -> String {
        let version = self.version;
        format!(
            "apt knows no package {} of version {version}*; are bookworm-security or trixie among its sources?",
            self.names.join(" or ")
        )
    }

    /// The package that is to be unpacked: what a meta package stands for, or the named package itself.
    fn resolve(&self) -> Result<Option<Package>> {
        for name in self.names {
            let Some(package) = apt::candidate(name)? else {
                continue;
            };
            if !package.version.starts_with(self.version) {
                continue;
            }
            let Some((real, version)) = package.stands_for("linux-image-") else {
                return Ok(Some(package));
            };
            for name in [real.clone(), format!("{real}-unsigned")] {
                if let Some(package) = apt::exact(&name, &version)? {
                    return Ok(Some(package));
                }
            }
        }
        Ok(None)
    }
}

fn cached(directory: &Path) -> Option<Package> {
    serde_json::from_slice(&fs::read(directory.join("package.json")).ok()?).ok()
}

impl Tree {
    /// The compressed kernel, as a boot loader would load it.
    pub fn vmlinuz(&self) -> Result<PathBuf> {
        self.find(&["boot"], "vmlinuz-")
    }

    /// `/lib/modules/RELEASE`.
    pub fn modules(&self) -> Result<PathBuf> {
        self.find(&["lib/modules", "usr/lib/modules"], "")
    }

    /// A file of the package.
    pub fn file(&self, candidates: &[&str]) -> Result<PathBuf> {
        let found = candidates
            .iter()
            .map(|path| self.directory.join(path))
            .find(|path| path.is_file());
        found.with_context(|| format!("{} has no {}", self.package.name, candidates.join(" or ")))
    }

    fn find(&self, directories: &[&str], prefix: &str) -> Result<PathBuf> {
        for directory in directories {
            let Ok(entries) = fs::read_dir(self.directory.join(directory)) else {
                continue;
            };
            let matches = |path: &PathBuf| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
            };
            if let Some(found) = entries.flatten().map(|entry| entry.path()).find(matches) {
                return Ok(found);
            }
        }
        bail!(
            "{} has no {prefix}* in {}",
            self.package.name,
            directories.join(" or ")
        )
    }
}
