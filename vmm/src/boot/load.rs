//! Putting kernel, initial RAM disk and command line into guest memory.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use devices::memory::View;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader, load_cmdline};
use vm_memory::{Bytes, GuestAddress};

use super::Entry;
use super::image::{self, Format, Image, ImageError};
use super::params;
use crate::layout;

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sources {
    /// bzImage or ELF kernel.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
}

/// Why a guest could not be loaded. Every message names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be opened or read.
    #[error("{what} {path}: {reason}")]
    File {
        /// `kernel` or `initrd`.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// What the host says, and what to do.
        reason: String,
    },
    /// Not a kernel that can be booted.
    #[error("kernel {path}: {source}")]
    Image {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        source: ImageError,
    },
    /// The kernel does not fit.
    #[error(
        "kernel {path}: it needs {need}M of memory below 3G and the guest has {have}M there; raise --memory"
    )]
    KernelTooLarge {
        /// Its path.
        path: PathBuf,
        /// MiB needed.
        need: u64,
        /// MiB there are.
        have: u64,
    },
    /// The initial RAM disk does not fit.
    #[error(
        "initrd {path}: its {need} bytes do not fit behind the kernel, where {have} bytes are free; raise --memory to {suggest} or more"
    )]
    InitrdTooLarge {
        /// Its path.
        path: PathBuf,
        /// Bytes needed.
        need: u64,
        /// Bytes there are.
        have: u64,
        /// A memory size that would do.
        suggest: String,
    },
    /// The command line does not fit.
    #[error(
        "command line: it has {len} bytes and kernel {path} takes at most {max}; shorten --cmdline"
    )]
    CmdlineTooLong {
        /// The kernel.
        path: PathBuf,
        /// Bytes of the command line.
        len: usize,
        /// Bytes the kernel takes.
        max: u32,
    },
    /// The command line has bytes it cannot have.
    #[error("command line: only printable ASCII characters are possible in --cmdline")]
    CmdlineCharacters,
    /// Guest memory could not be written, which the checks before should have excluded.
    #[error("cannot write to guest memory: {0}")]
    Memory(String),
}

/// Kernel and initial RAM disk, open, and everything about them checked that needs no guest memory.
#[derive(Debug)]
pub struct Prepared {
    ram: u64,
    sources: Sources,
    kernel: File,
    image: Image,
    initrd: Option<(File, Range<u64>)>,
}

impl Prepared {
    /// Opens and checks what `sources` names, for a guest with `ram` bytes of memory.
    pub fn open(ram: u64, sources: &Sources) -> Result<Self, LoadError> {
        let path = &sources.kernel;
        let mut kernel = open("kernel", path)?;
        let image = image::identify(&mut kernel).map_err(|source| LoadError::Image {
            path: path.clone(),
            source,
        })?;
        let low_end = layout::low_ram_end(ram);
        if image.end > low_end {
            return Err(LoadError::KernelTooLarge {
                path: path.clone(),
                need: image.end.div_ceil(layout::MIB),
                have: low_end / layout::MIB,
            });
        }
        check_cmdline(sources, &image)?;
        let initrd = match &sources.initrd {
            Some(path) => Some(open_initrd(path, &image, low_end)?),
            None => None,
        };
        Ok(Self {
            ram,
            sources: sources.clone(),
            kernel,
            image,
            initrd,
        })
    }

    /// Loads everything into guest memory and writes the zero page.
    pub fn load(mut self, memory: &View) -> Result<Entry, LoadError> {
        let initrd = match self.initrd.take() {
            Some((mut file, place)) => {
                let len = (place.end - place.start) as usize;
                memory.ram().enlarge(GuestAddress(place.start), len as u64);
                memory
                    .read_exact_volatile_from(GuestAddress(place.start), &mut file, len)
                    .map_err(|e| LoadError::File {
                        what: "initrd",
                        path: self.sources.initrd.clone().unwrap_or_default(),
                        reason: format!("cannot be read: {e}"),
                    })?;
                Some(place)
            }
            None => None,
        };
        let path = &self.sources.kernel;
        let (rip, header) = load_kernel(memory, path, &mut self.kernel, &self.image)?;
        load_cmdline_text(memory, &self.sources.cmdline)?;
        let zero_page = params::zero_page(self.ram, header, &self.sources.cmdline, initrd);
        params::write(memory, &zero_page).map_err(LoadError::Memory)?;
        Ok(Entry {
            rip,
            zero_page: layout::ZERO_PAGE,
        })
    }
}

fn open(what: &'static str, path: &Path) -> Result<File, LoadError> {
    let error = |reason: String| LoadError::File {
        what,
        path: path.to_owned(),
        reason,
    };
    // Opening a FIFO would wait for a writer: look before opening.
    let metadata = std::fs::metadata(path).map_err(|e| error(explain(&e)))?;
    if metadata.is_dir() {
        return Err(error("is a directory; give a file".to_owned()));
    }
    if !metadata.is_file() {
        return Err(error("is not a regular file".to_owned()));
    }
    File::open(path).map_err(|e| error(explain(&e)))
}

/// What the host says about a file, and the cure if there is a plain one.
pub(crate) fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file; check the path".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; run `chmod` on it or use an account that may open it".to_owned()
        }
        _ => error.to_string(),
    }
}

fn check_cmdline(sources: &Sources, image: &Image) -> Result<(), LoadError> {
    let text = &sources.cmdline;
    if text.len() > image.cmdline_max as usize {
        return Err(LoadError::CmdlineTooLong {
            path: sources.kernel.clone(),
            len: text.len(),
            max: image.cmdline_max,
        });
    }
    if !text.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err(LoadError::CmdlineCharacters);
    }
    Ok(())
}

fn load_cmdline_text(memory: &View, text: &str) -> Result<(), LoadError> {
    let failed = |e: &dyn std::fmt::Display| LoadError::Memory(e.to_string());
    // Capacity counts the NUL; an empty line still needs room for one character.
    let mut cmdline = Cmdline::new(text.len().max(1) + 1).map_err(|e| failed(&e))?;
    if !text.is_empty() {
        cmdline.insert_str(text).map_err(|e| failed(&e))?;
    }
    load_cmdline(&**memory, GuestAddress(layout::CMDLINE), &cmdline).map_err(|e| failed(&e))
}

fn load_kernel(
    memory: &View,
    path: &Path,
    file: &mut File,
    image: &Image,
) -> Result<(u64, setup_header), LoadError> {
    let failed = |e: linux_loader::loader::Error| LoadError::File {
        what: "kernel",
        path: path.to_owned(),
        reason: e.to_string(),
    };
    // Not to the end of the image: much of that may never be touched.
    let len = file.metadata().map_or(0, |metadata| metadata.len());
    let len = len.min(image.end.saturating_sub(image.start));
    memory.ram().enlarge(GuestAddress(image.start), len);
    match image.format {
        Format::BzImage => {
            let start = GuestAddress(image.start);
            let loaded = BzImage::load(&**memory, Some(start), file, None).map_err(failed)?;
            let header = loaded.setup_header.unwrap_or_default();
            // The 64-bit entry point stands 512 bytes after the start of the protected-mode code.
            Ok((image.start + 0x200, header))
        }
        Format::Elf { entry } => {
            // An explicit offset keeps the loader from reading the notes of the file, which we do not need.
            Elf::load(&**memory, Some(GuestAddress(0)), file, None).map_err(failed)?;
            Ok((entry, params::default_header()))
        }
    }
}

/// Opens the initial RAM disk and finds the highest page-aligned place the kernel allows.
fn open_initrd(path: &Path, image: &Image, low_end: u64) -> Result<(File, Range<u64>), LoadError> {
    let error = |reason: String| LoadError::File {
        what: "initrd",
        path: path.to_owned(),
        reason,
    };
    let file = open("initrd", path)?;
    let len = file.metadata().map_err(|e| error(explain(&e)))?.len();
    if len == 0 {
        return Err(error(
            "is empty; leave --initrd out or rebuild it".to_owned(),
        ));
    }
    let start = place_initrd(len, image, low_end).ok_or_else(|| {
        let room = low_end.min(image.initrd_max.saturating_add(1));
        let need = image.end.saturating_add(len).div_ceil(layout::MIB) + 1;
        LoadError::InitrdTooLarge {
            path: path.to_owned(),
            need: len,
            have: room.saturating_sub(image.end),
            suggest: format!("{need}M"),
        }
    })?;
    Ok((file, start..start + len))
}

fn place_initrd(len: u64, image: &Image, low_end: u64) -> Option<u64> {
    let room_end = low_end.min(image.initrd_max.saturating_add(1));
    let start = room_end.checked_sub(len)? & !0xfff;
    (start >= image.end).then_some(start)
}

#[cfg(test)]
mod tests;
