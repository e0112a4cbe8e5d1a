//! Kernel modules in the order in which they can be loaded.
//!
//! A Debian kernel package has no `modules.dep`: depmod writes that when the package is installed. What a module needs
//! is read from its own `.modinfo` section, so neither depmod nor an installation is necessary.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::tools;

/// The modules of one kernel: what there is, and what the kernel has built in.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// A module, decompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// As `lsmod` prints it: with underscores.
    pub name: String,
    pub image: Vec<u8>,
}

impl Modules {
    /// Looks through `/lib/modules/RELEASE`.
    pub fn scan(directory: &Path) -> Result<Self> {
        let builtin = directory.join("modules.builtin");
        let builtin =
            fs::read_to_string(&builtin).with_context(|| builtin.display().to_string())?;
        let mut files = BTreeMap::new();
        collect(&directory.join("kernel"), &mut files)?;
        Ok(Self {
            files,
            builtin: builtin
                .lines()
                .filter_map(|line| name_of(Path::new(line)))
                .collect(),
        })
    }

    /// The modules called `wanted` and all they depend on, each after its dependencies. What is built in is left out.
    pub fn resolve(&self, wanted: &[&str]) -> Result<Vec<Module>> {
        let load = |name: &str| -> Result<Option<Module>> {
            if self.builtin.contains(name) {
                return Ok(None);
            }
            let path = self
                .files
                .get(name)
                .with_context(|| format!("the kernel has no module {name}"))?;
            let bytes = fs::read(path).with_context(|| path.display().to_string())?;
            let image = match path.extension().and_then(|e| e.to_str()) {
                Some("xz") => tools::filter("xz", &["-dc"], &bytes)?,
                Some("zst") => tools::filter("zstd", &["-dqc"], &bytes)?,
                Some("gz") => tools::filter("gzip", &["-dc"], &bytes)?,
                _ => bytes,
            };
            Ok(Some(Module {
                name: name.to_owned(),
                image,
            }))
        };
        in_order(wanted, load)
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = name_of(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is the module `virtio_rng`.
fn name_of(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, rest) = file.split_once(".ko")?;
    (rest.is_empty() || rest.starts_with('.')).then(|| name.replace('-', "_"))
}

/// Depth first, dependencies before dependents. `load` gives nothing for what is built in.
fn in_order(wanted: &[&str], load: impl Fn(&str) -> Result<Option<Module>>) -> Result<Vec<Module>> {
    fn visit(
        name: &str,
        load: &impl Fn(&str) -> Result<Option<Module>>,
        seen: &mut BTreeSet<String>,
        ordered: &mut Vec<Module>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(module) = load(name)? else {
            return Ok(());
        };
        for dependency in dependencies(&module.image).with_context(|| format!("module {name}"))? {
            visit(&dependency, load, seen, ordered)?;
        }
        ordered.push(module);
        Ok(())
    }
    let mut seen = BTreeSet::new();
    let mut ordered = Vec::new();
    for name in wanted {
        visit(&name.replace('-', "_"), &load, &mut seen, &mut ordered)?;
    }
    Ok(ordered)
}

/// Names in the `depends=` entry of a module.
fn dependencies(image: &[u8]) -> Result<Vec<String>> {
    let info = section(image, b".modinfo")?;
    let entry = info
        .split(|&b| b == 0)
        .find_map(|entry| entry.strip_prefix(b"depends="));
    let list = String::from_utf8_lossy(entry.unwrap_or_default()).replace('-', "_");
    Ok(list
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect())
}

/// The bytes of a section of a 64-bit little-endian ELF image.
fn section<'a>(image: &'a [u8], name: &[u8]) -> Result<&'a [u8]> {
    let number = |at: usize, width: usize| -> Result<usize> {
        let bytes = at
            .checked_add(width)
            .and_then(|end| image.get(at..end))
            .context("truncated ELF image")?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | usize::from(byte)))
    };
    if !image.starts_with(b"\x7fELF\x02\x01") {
        bail!("not a 64-bit ELF image");
    }
    let (table, entry_size, count, names) = (
        number(0x28, 8)?,
        number(0x3a, 2)?,
        number(0x3c, 2)?,
        number(0x3e, 2)?,
    );
    let header = |index: usize| {
        table
            .checked_add(index * entry_size)
            .context("truncated ELF image")
    };
    let content = |index: usize| -> Result<&'a [u8]> {
        let at = header(index)?;
        let (start, size) = (number(at + 0x18, 8)?, number(at + 0x20, 8)?);
        start
            .checked_add(size)
            .and_then(|end| image.get(start..end))
            .context("truncated ELF image")
    };
    let strings = content(names)?;
    for index in 0..count {
        let label = strings
            .get(number(header(index)?, 4)?..)
            .unwrap_or_default();
        if label.split(|&b| b == 0).next() == Some(name) {
            return content(index);
        }
    }
    bail!("no section {}", String::from_utf8_lossy(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The smallest ELF image with a `.modinfo` section.
    fn image(info: &[u8]) -> Vec<u8> {
        let strings = b"\0.modinfo\0.names\0";
        let mut image = vec![0; 64];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        let info_at = image.len() as u64;
        image.extend_from_slice(info);
        let strings_at = image.len() as u64;
        image.extend_from_slice(strings);
        let table_at = image.len() as u64;
        for (name, at, size) in [
            (0, 0, 0),
            (1u32, info_at, info.len() as u64),
            (10, strings_at, strings.len() as u64),
        ] {
            let mut header = [0; 64];
            header[..4].copy_from_slice(&name.to_le_bytes());
            header[0x18..0x20].copy_from_slice(&at.to_le_bytes());
            header[0x20..0x28].copy_from_slice(&size.to_le_bytes());
            image.extend_from_slice(&header);
        }
        image[0x28..0x30].copy_from_slice(&table_at.to_le_bytes());
        for (at, value) in [(0x3a, 64u16), (0x3c, 3), (0x3e, 2)] {
            image[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        image
    }

    fn ordered(wanted: &[&str], table: &[(&str, &str)], builtin: &[&str]) -> Result<Vec<String>> {
        let load = |name: &str| {
            if builtin.contains(&name) {
                return Ok(None);
            }
            let (_, depends) = table
                .iter()
                .find(|(n, _)| *n == name)
                .with_context(|| format!("no {name}"))?;
            let info = format!("license=GPL\0depends={depends}\0name={name}\0");
            Ok(Some(Module {
                name: name.to_owned(),
                image: image(info.as_bytes()),
            }))
        };
        Ok(in_order(wanted, load)?
            .into_iter()
            .map(|module| module.name)
            .collect())
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let table = [
            ("virtio_net", "net_failover,virtio"),
            ("net_failover", "failover"),
            ("failover", ""),
            ("virtio_blk", "virtio"),
            ("virtio", ""),
        ];
        let expected = [
            "failover",
            "net_failover",
            "virtio",
            "virtio_net",
            "virtio_blk",
        ];
        assert_eq!(
            ordered(&["virtio-net", "virtio_blk", "virtio_net"], &table, &[]).unwrap(),
            expected
        );
    }

    #[test]
    fn what_is_built_in_is_left_out() {
        let table = [("virtio_blk", "virtio")];
        assert_eq!(
            ordered(&["virtio_blk"], &table, &["virtio"]).unwrap(),
            ["virtio_blk"]
        );
        assert!(
            ordered(&["virtio"], &table, &["virtio"])
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_missing_module_is_named() {
        assert_eq!(ordered(&["9p"], &[], &[]).unwrap_err().to_string(), "no 9p");
    }

    #[test]
    fn dependencies_on_each_other_end() {
        let table = [("a", "b"), ("b", "a")];
        assert_eq!(ordered(&["a"], &table, &[]).unwrap(), ["b", "a"]);
    }

    #[test]
    fn module_names_come_from_file_names() {
        let cases = [
            (
                "kernel/drivers/char/hw_random/virtio-rng.ko",
                Some("virtio_rng"),
            ),
            ("a/9p.ko.xz", Some("9p")),
            ("modules.order", None),
            ("x.konfig", None),
        ];
        for (path, name) in cases {
            assert_eq!(name_of(Path::new(path)).as_deref(), name, "{path}");
        }
    }

    #[test]
    fn damaged_modules_are_errors() {
        let whole = image(b"depends=\0");
        // Nothing is read from the last 24 bytes of the last section header.
        for length in 0..whole.len() - 24 {
            assert!(dependencies(&whole[..length]).is_err(), "{length}");
        }
        assert!(dependencies(&whole).unwrap().is_empty());
    }
}
