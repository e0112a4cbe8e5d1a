//! What is booted: the test guest (`cargo xtask image`), and the emulated host of the KVM machine.
//!
//! Everything made is kept in the cache under a hash of all that went into it, so nothing is made twice, nothing is
//! ever out of date, and two source trees do not disturb each other.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;

use crate::apt::sha256;
use crate::bzimage;
use crate::cpio::Archive;
use crate::modules::{Module, Modules};
use crate::packages::{self, Tree, Unpacked};
use crate::tools::{self, Step};
use crate::workspace;

/// Part of every hash; to be raised when the making changes.
const RECIPE: u32 = 1;
/// Made things that nobody used for so long are removed when new ones are made.
const KEPT: Duration = Duration::from_secs(24 * 3600);

/// Devices the test guest has drivers for, whether its kernel has them built in or not. The recipe is
/// `resources/guest/modules`.
const GUEST_MODULES: &str = include_str!("../../resources/guest/modules");
/// What the emulated host needs to see the file tree (first), and to run guests (second).
const MACHINE_MODULES: [&[&str]; 2] = [
    &["9pnet_virtio", "9p", "overlay"],
    &["kvm_amd", "tun", "bridge"],
];

/// A kernel of the test guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Kernel {
    /// Debian's 6.12 cloud kernel.
    #[value(name = "6.12")]
    V6_12,
    /// Debian 12's own cloud kernel.
    #[value(name = "6.1")]
    V6_1,
}

impl Kernel {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::V6_12, Self::V6_1];

    /// As it is called in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        }
    }

    fn package(self) -> Unpacked {
        match self {
            Self::V6_12 => packages::GUEST_KERNEL_6_12,
            Self::V6_1 => packages::GUEST_KERNEL_6_1,
        }
    }
}

/// A test guest, ready to boot.
#[derive(Debug, Clone, Serialize)]
pub struct GuestImage {
    /// The kernel as Debian ships it, a bzImage.
    pub vmlinuz: PathBuf,
    /// The same kernel as an ELF image.
    pub vmlinux: PathBuf,
    /// The initial file tree.
    pub initramfs: PathBuf,
    /// Package and version of the kernel.
    pub kernel: String,
}

/// Makes the test guests that are missing, with these kernels.
///
/// All their files also have links in [`directory`], which is what tests are told.
pub fn guests(kernels: &[Kernel], update: bool) -> Result<BTreeMap<String, GuestImage>> {
    packages::ensure(&packages::UNPACKERS)?;
    let init = workspace::static_binary("guest", "guest")?;
    let _lock = workspace::lock_cache()?;
    let made = |&kernel: &Kernel| Ok((kernel.name().to_owned(), guest(kernel, &init, update)?));
    let guests: BTreeMap<_, _> = kernels.iter().map(made).collect::<Result<_>>()?;
    for guest in guests.values() {
        for file in [&guest.vmlinuz, &guest.vmlinux, &guest.initramfs] {
            link(file, &directory()?)?;
        }
    }
    Ok(guests)
}

/// One directory with the latest test guests of this source tree: `vmlinuz-6.12`, `initramfs-6.12.cpio` and so on.
pub fn directory() -> Result<PathBuf> {
    Ok(workspace::target()?.join("xtask/images"))
}

/// Puts a link to `file` into `directory`, in place of any that was there.
fn link(file: &Path, directory: &Path) -> Result<()> {
    let name = file.file_name().context("a file without a name")?;
    let link = directory.join(name);
    if fs::read_link(&link).is_ok_and(|target| target == file) {
        return Ok(());
    }
    fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    let partial = workspace::partial(&link);
    if partial.is_symlink() {
        fs::remove_file(&partial)?;
    }
    symlink(file, &partial).with_context(|| partial.display().to_string())?;
    fs::rename(&partial, &link).with_context(|| link.display().to_string())
}

fn guest(kernel: Kernel, init: &Path, update: bool) -> Result<GuestImage> {
    let tree = kernel.package().obtain(update)?;
    let busybox = packages::BUSYBOX.obtain(update)?;
    let init = fs::read(init).with_context(|| init.display().to_string())?;
    let inputs = [
        &sha256(&init),
        &tree.package.sha256,
        &busybox.package.sha256,
        GUEST_MODULES,
    ];
    let name = kernel.name();
    let image = Made::of("guest", name, &inputs)?;
    let paths = GuestImage {
        vmlinuz: image.directory.join(format!("vmlinuz-{name}")),
        vmlinux: image.directory.join(format!("vmlinux-{name}")),
        initramfs: image.directory.join(format!("initramfs-{name}.cpio")),
        kernel: format!("{} {}", tree.package.name, tree.package.version),
    };
    image.make(
        &format!("making the test guest with Linux {name}"),
        |directory| {
            let vmlinuz = fs::read(tree.vmlinuz()?)?;
            fs::write(
                directory.join(format!("vmlinux-{name}")),
                elf_kernel(&vmlinuz)?,
            )?;
            fs::write(directory.join(format!("vmlinuz-{name}")), vmlinuz)?;
            let wanted: Vec<&str> = module_names(GUEST_MODULES).collect();
            let modules = Modules::scan(&tree.modules()?)?.resolve(&wanted)?;
            let archive = guest_archive(&init, &busybox, &modules)?;
            fs::write(directory.join(format!("initramfs-{name}.cpio")), archive)?;
            Ok(())
        },
    )?;
    Ok(paths)
}

/// One name per line; `#` begins a comment.
fn module_names(list: &str) -> impl Iterator<Item = &str> {
    list.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
}

fn guest_archive(init: &[u8], busybox: &Tree, modules: &[Module]) -> Result<Vec<u8>> {
    let busybox = busybox.file(&["bin/busybox", "usr/bin/busybox"])?;
    let mut archive = Archive::default();
    for directory in [
        "bin", "dev", "etc", "mnt", "modules", "proc", "root", "run", "sys", "tmp",
    ] {
        archive.directory(directory);
    }
    // The kernel opens it for init before anything is mounted.
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, init);
    archive.file("bin/busybox", 0o755, &fs::read(&busybox)?);
    let applets = tools::output(&busybox.to_string_lossy(), &["--list"])?;
    for applet in applets
        .lines()
        .filter(|applet| *applet != "busybox" && !applet.contains('/'))
    {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    archive.symlink("sbin", "bin");
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    archive.file("etc/hostname", 0o644, b"tern-guest\n");
    let mut order = String::new();
    for module in modules {
        let path = format!("/modules/{}.ko", module.name);
        archive.file(&path, 0o644, &module.image);
        order.push_str(&path);
        order.push('\n');
    }
    archive.file("etc/modules", 0o644, order.as_bytes());
    Ok(archive.finish())
}

/// The emulated host, ready to boot.
#[derive(Debug, Clone)]
pub struct MachineImage {
    /// Its kernel, an ELF image.
    pub vmlinux: PathBuf,
    /// Its initial file tree: `machine-init` and modules.
    pub initramfs: PathBuf,
}

/// Makes the emulated host if it is missing.
pub fn machine() -> Result<MachineImage> {
    packages::ensure(&packages::UNPACKERS)?;
    let init = workspace::static_binary("machine", "machine-init")?;
    let _lock = workspace::lock_cache()?;
    let tree = packages::MACHINE_KERNEL.obtain(false)?;
    let init = fs::read(&init).with_context(|| init.display().to_string())?;
    let wanted = MACHINE_MODULES.map(|names| names.join(" ")).join("; ");
    let image = Made::of(
        "machine",
        "6.12",
        &[&sha256(&init), &tree.package.sha256, &wanted],
    )?;
    let paths = MachineImage {
        vmlinux: image.directory.join("vmlinux"),
        initramfs: image.directory.join("initramfs.cpio"),
    };
    image.make("making the emulated host", |directory| {
        fs::write(
            directory.join("vmlinux"),
            elf_kernel(&fs::read(tree.vmlinuz()?)?)?,
        )?;
        let modules = Modules::scan(&tree.modules()?)?;
        fs::write(
            directory.join("initramfs.cpio"),
            machine_archive(&init, &modules)?,
        )?;
        Ok(())
    })?;
    Ok(paths)
}

fn machine_archive(init: &[u8], modules: &Modules) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, init);
    let early = modules.resolve(MACHINE_MODULES[0])?;
    let mut late = modules.resolve(MACHINE_MODULES[1])?;
    late.retain(|module| !early.contains(module));
    let mut list = String::new();
    for (mark, module) in early
        .iter()
        .map(|m| ("+", m))
        .chain(late.iter().map(|m| ("", m)))
    {
        archive.file(&format!("modules/{}.ko", module.name), 0o644, &module.image);
        list.push_str(&format!("{mark}{}.ko\n", module.name));
    }
    archive.file("modules/list", 0o644, list.as_bytes());
    Ok(archive.finish())
}

fn elf_kernel(vmlinuz: &[u8]) -> Result<Vec<u8>> {
    let payload = bzimage::payload(vmlinuz)?;
    let kernel = match payload.compression.program() {
        Some((program, arguments)) => tools::filter(program, arguments, payload.bytes)?,
        None => payload.bytes.to_vec(),
    };
    bzimage::check_kernel(&kernel, payload.uncompressed)?;
    Ok(kernel)
}

/// A directory of the cache whose name tells what it was made from.
struct Made {
    directory: PathBuf,
}

impl Made {
    fn of(kind: &str, name: &str, inputs: &[&str]) -> Result<Self> {
        let hash = sha256(format!("{RECIPE}\n{kind}\n{name}\n{}", inputs.join("\n")).as_bytes());
        Ok(Self {
            directory: workspace::cache()?
                .join("made")
                .join(format!("{kind}-{name}-{}", &hash[..16])),
        })
    }

    /// Fills the directory unless it is there.
    fn make(&self, what: &str, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        if self.directory.is_dir() {
            // Marks it as used.
            fs::File::open(&self.directory)?.set_modified(SystemTime::now())?;
            return Ok(());
        }
        let step = Step::begin(what);
        let partial = workspace::partial(&self.directory);
        if partial.exists() {
            fs::remove_dir_all(&partial)?;
        }
        fs::create_dir_all(&partial).with_context(|| partial.display().to_string())?;
        fill(&partial)?;
        fs::rename(&partial, &self.directory)
            .with_context(|| self.directory.display().to_string())?;
        remove_unused(&self.directory)?;
        step.done();
        Ok(())
    }
}

fn remove_unused(new: &Path) -> Result<()> {
    let Some(parent) = new.parent() else {
        return Ok(());
    };
    for entry in fs::read_dir(parent)?.flatten() {
        let unused = entry
            .metadata()?
            .modified()?
            .elapsed()
            .is_ok_and(|age| age > KEPT);
        if unused && entry.path() != new {
            fs::remove_dir_all(entry.path()).with_context(|| entry.path().display().to_string())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_list_ignores_comments_and_blank_lines() {
        let names: Vec<&str> = module_names("# all\n\nvirtio_blk # disks\n  evdev\n").collect();
        assert_eq!(names, ["virtio_blk", "evdev"]);
    }

    #[test]
    fn guest_recipe_names_every_device_class() {
        let names: Vec<&str> = module_names(GUEST_MODULES).collect();
        for name in [
            "virtio_pci",
            "virtio_blk",
            "virtio_net",
            "virtio_rng",
            "virtio_console",
            "button",
            "evdev",
        ] {
            assert!(names.contains(&name), "{name}");
        }
    }

    #[test]
    fn links_follow_the_latest_file() {
        let directory = tempfile::tempdir().unwrap();
        let links = directory.path().join("links");
        for content in ["old", "new"] {
            let file = directory.path().join(content).join("vmlinuz");
            fs::create_dir(file.parent().unwrap()).unwrap();
            fs::write(&file, content).unwrap();
            link(&file, &links).unwrap();
            assert_eq!(fs::read_to_string(links.join("vmlinuz")).unwrap(), content);
        }
        assert_eq!(fs::read_dir(&links).unwrap().count(), 1);
    }

    #[test]
    fn only_a_change_of_an_input_changes_the_name() {
        let made = |inputs: &[&str]| Made::of("guest", "6.12", inputs).unwrap().directory;
        assert_eq!(made(&["a", "b"]), made(&["a", "b"]));
        assert_ne!(made(&["a", "b"]), made(&["a", "c"]));
        assert_ne!(made(&["a", "b"]), made(&["b", "a"]));
    }
}
