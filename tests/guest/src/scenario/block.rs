//! `block-*`: disks, from their identity to their last byte.
//!
//! Data goes to and comes from the device itself (O_DIRECT), so that nothing is ever proved about the page cache.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::Found;
use crate::cmdline::Request;
use crate::pattern::{self, Buffer, CHUNK};
use crate::{Context, Result, check, sys};

/// Size, serial number, queues.
pub fn info(request: &Request) -> Result<Found> {
    let disk = Disk::named(request);
    let serial = fs::read_to_string(disk.attribute("serial")).unwrap_or_default();
    let queues = fs::read_dir(disk.attribute("mq"))
        .context("queues")?
        .count();
    Ok(Found::default()
        .with("bytes", disk.bytes()?)
        .with("serial", serial.trim())
        .with("queues", queues)
        .with("readonly", disk.flag("ro")?)
        .with("sector", disk.flag("queue/logical_block_size")?)
        .with("cache", disk.text("queue/write_cache")?)
        .with("discard_max", disk.flag("queue/discard_max_bytes")?)
        .with("zeroes_max", disk.flag("queue/write_zeroes_max_bytes")?))
}

/// Writes `mib` MiB of the stream `seed` to the start of the disk, and flushes.
pub fn write(request: &Request) -> Result<Found> {
    let (disk, seed, chunks) = (
        Disk::named(request),
        request.number("seed", 1)?,
        request.number("mib", 8)?,
    );
    let checksum = disk.write_pattern(seed, chunks)?;
    Ok(Found::default()
        .with("crc32", format_args!("{checksum:08x}"))
        .with("bytes", chunks * CHUNK as u64))
}

/// Reads `mib` MiB back and compares them with the stream `seed`.
pub fn verify(request: &Request) -> Result<Found> {
    let (disk, seed, chunks) = (
        Disk::named(request),
        request.number("seed", 1)?,
        request.number("mib", 8)?,
    );
    let checksum = disk.checksum(chunks)?;
    let expected = pattern::checksum(seed, chunks);
    check(checksum == expected, || {
        format!("the disk has crc32={checksum:08x} instead of {expected:08x}")
    })?;
    Ok(Found::default()
        .with("crc32", format_args!("{checksum:08x}"))
        .with("bytes", chunks * CHUNK as u64))
}

/// A disk that must not be written says so, and cannot be.
pub fn read_only(request: &Request) -> Result<Found> {
    let disk = Disk::named(request);
    let device = disk.open(OFlags::empty())?;
    check(sys::is_read_only(&device).context("BLKROGET")?, || {
        "BLKROGET says it can be written".into()
    })?;
    check(disk.flag("ro")? == 1, || {
        "sysfs says it can be written".into()
    })?;
    let written = File::options()
        .write(true)
        .open(&disk.device)
        .and_then(|mut device| {
            device.write_all(&[0; 4096])?;
            device.sync_all()
        });
    let error = match written {
        Ok(()) => return Err(crate::Failure("a write was accepted".into())),
        Err(error) => error,
    };
    disk.checksum(1)?;
    Ok(Found::default().with("error", error.raw_os_error().unwrap_or_default()))
}

/// Discards one range and zeroes another; both, and nothing beside them, must read as zeroes.
pub fn discard(request: &Request) -> Result<Found> {
    const MIB: u64 = CHUNK as u64;
    let disk = Disk::named(request);
    disk.write_pattern(SEED, 6)?;
    let device = disk.open(OFlags::DIRECT)?;
    sys::discard(&device, MIB, MIB).context("BLKDISCARD")?;
    sys::write_zeroes(&device, 3 * MIB, MIB).context("BLKZEROOUT")?;
    device.sync_all().context("flush")?;
    sys::drop_cache(&device).context("BLKFLSBUF")?;
    let mut found = Buffer::new();
    let mut expected = Buffer::new();
    for chunk in 0..6 {
        device
            .read_exact_at(found.bytes_mut(), chunk * MIB)
            .context("reading back")?;
        match chunk {
            1 | 3 => expected.bytes_mut().fill(0),
            _ => pattern::fill(expected.bytes_mut(), SEED, chunk * MIB),
        }
        check(found.bytes() == expected.bytes(), || {
            format!("MiB {chunk} is not what it should be")
        })?;
    }
    Ok(Found::default().with("discarded", MIB).with("zeroed", MIB))
}

const SEED: u64 = 0xd15c;

/// A block device.
pub struct Disk {
    name: String,
    pub device: PathBuf,
}

impl Disk {
    /// The one that `dev=` names, or the first.
    fn named(request: &Request) -> Self {
        Self::new(request.text("dev", "vda"))
    }

    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            device: Path::new("/dev").join(name),
        }
    }

    /// Capacity.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.flag("size")? * 512)
    }

    pub fn is_writable(&self) -> Result<bool> {
        Ok(self.flag("ro")? == 0)
    }

    fn attribute(&self, name: &str) -> PathBuf {
        Path::new("/sys/block").join(&self.name).join(name)
    }

    fn text(&self, name: &str) -> Result<String> {
        let text = fs::read_to_string(self.attribute(name))
            .context(format_args!("{} {name}", self.name))?;
        Ok(text.trim().to_owned())
    }

    fn flag(&self, name: &str) -> Result<u64> {
        self.text(name)?
            .parse()
            .context(format_args!("{} {name}", self.name))
    }

    /// Opens it for reading, and for writing unless it is read-only.
    pub fn open(&self, flags: OFlags) -> Result<File> {
        let writable = self.is_writable()?;
        let opened = File::options()
            .read(true)
            .write(writable)
            .custom_flags(flags.bits() as i32)
            .open(&self.device);
        opened.context(self.device.display())
    }

    /// Writes `chunks` times [`CHUNK`] bytes, flushes, and returns their checksum.
    pub fn write_pattern(&self, seed: u64, chunks: u64) -> Result<u32> {
        let wanted = chunks * CHUNK as u64;
        let capacity = self.bytes()?;
        check(wanted <= capacity, || {
            format!("{wanted} bytes do not fit on a disk of {capacity}")
        })?;
        let mut device = self.open(OFlags::DIRECT)?;
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = Buffer::new();
        for chunk in 0..chunks {
            pattern::fill(buffer.bytes_mut(), seed, chunk * CHUNK as u64);
            hasher.update(buffer.bytes());
            device.write_all(buffer.bytes()).context("writing")?;
        }
        device.sync_all().context("flush")?;
        Ok(hasher.finalize())
    }

    /// The checksum of the first `chunks` times [`CHUNK`] bytes.
    pub fn checksum(&self, chunks: u64) -> Result<u32> {
        let mut device = self.open(OFlags::DIRECT)?;
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = Buffer::new();
        for _ in 0..chunks {
            device.read_exact(buffer.bytes_mut()).context("reading")?;
            hasher.update(buffer.bytes());
        }
        Ok(hasher.finalize())
    }
}
