//! virtio-block: data that survives the guest, and disks that refuse.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use tempfile::TempDir;

use crate::trial;
use crate::vm::Vm;

pub const MIB: u64 = 1 << 20;

pub fn trials() -> Vec<Trial> {
    vec![
        trial(
            "block::data_survives_a_reboot_and_equals_the_file",
            data_survives,
        ),
        trial("block::packed_virtqueues_carry_the_same_data", packed),
        trial("block::a_read_only_disk_refuses_writes", read_only),
        trial("block::serial_size_and_queues_reach_the_guest", identity),
        trial(
            "block::discard_and_write_zeroes_read_back_as_zeroes",
            discard,
        ),
        trial("block::a_disk_behind_a_root_port_works", root_port),
        trial("block::a_disk_in_use_is_refused_to_a_second_guest", in_use),
    ]
}

fn disk(dir: &TempDir, mib: u64) -> Result<std::path::PathBuf> {
    let path = dir.path().join("disk.raw");
    File::create(&path)?.set_len(mib * MIB)?;
    Ok(path)
}

fn option(path: &Path, more: &str) -> String {
    format!("path={}{more}", path.display())
}

/// The CRC-32 of the first `mib` MiB of the file.
pub fn checksum(path: &Path, mib: u64) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut file = File::open(path)?.take(mib * MIB);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}

fn data_survives() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 64)?;
    let disk = option(&path, ",queues=2");
    let written = Vm::new("block-write:seed=7:mib=32")
        .args(["--cpus", "2", "--disk", &disk])
        .run_ok()?
        .value("block-write", "crc32")?;
    ensure!(
        written == format!("{:08x}", checksum(&path, 32)?),
        "the file differs from what the guest wrote"
    );
    let read = Vm::new("block-verify:seed=7:mib=32")
        .kernel("vmlinuz-6.1", "6.1")
        .args(["--disk", &disk])
        .run_ok()?
        .value("block-verify", "crc32")?;
    ensure!(written == read, "wrote {written}, read {read}");
    Ok(())
}

/// Written by one kind of virtqueues, read by the other, on either kernel.
fn packed() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 64)?;
    let (split, packed) = (
        option(&path, ",queues=2"),
        option(&path, ",queues=2,packed"),
    );
    let written = Vm::new("packed:devices=1,block-write:seed=9:mib=32,dmesg-clean")
        .args(["--cpus", "2", "--disk", &packed])
        .run_ok()?
        .value("block-write", "crc32")?;
    ensure!(
        written == format!("{:08x}", checksum(&path, 32)?),
        "the file differs from what the guest wrote"
    );
    let (old, new) = (("vmlinuz-6.1", "6.1"), ("vmlinuz-6.12", "6.12"));
    for ((kernel, version), disk, devices) in [(old, &packed, 1), (new, &split, 0)] {
        let scenario = format!("packed:devices={devices},block-verify:seed=9:mib=32");
        let read = Vm::new(&scenario)
            .kernel(kernel, version)
            .args(["--disk", disk])
            .run_ok()?
            .value("block-verify", "crc32")?;
        ensure!(written == read, "wrote {written}, read {read}");
    }
    Ok(())
}

fn read_only() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 8)?;
    let before = checksum(&path, 8)?;
    Vm::new("block-readonly")
        .args(["--disk", &option(&path, ",readonly")])
        .run_ok()?;
    ensure!(checksum(&path, 8)? == before, "a read-only disk changed");
    Ok(())
}

fn identity() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 16)?;
    let outcome = Vm::new("block-info")
        .args([
            "--cpus",
            "2",
            "--disk",
            &option(&path, ",serial=TERN-0042,queues=2"),
        ])
        .run_ok()?;
    ensure!(outcome.value("block-info", "serial")? == "TERN-0042");
    ensure!(outcome.number("block-info", "bytes")? == 16 * MIB);
    ensure!(outcome.number("block-info", "queues")? == 2);
    Ok(())
}

fn discard() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 16)?;
    Vm::new("block-write:seed=3:mib=16,block-discard")
        .args(["--disk", &option(&path, "")])
        .run_ok()?;
    // The rest of the disk is still there.
    let mut last = [0; 4096];
    let mut file = File::open(&path)?;
    file.seek(SeekFrom::End(-4096))?;
    file.read_exact(&mut last)?;
    ensure!(
        last.iter().any(|b| *b != 0),
        "discard took more than its range"
    );
    Ok(())
}

fn root_port() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 16)?;
    let written = Vm::new("block-write:seed=5:mib=8")
        .args(["--disk", &option(&path, ",bus=port")])
        .run_ok()?
        .value("block-write", "crc32")?;
    ensure!(written == format!("{:08x}", checksum(&path, 8)?));
    Ok(())
}

fn in_use() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = disk(&dir, 8)?;
    let disk = option(&path, "");
    let mut first = Vm::new("hang").args(["--disk", &disk]).spawn()?;
    first.wait_for("tern-guest: tick", 0)?;
    let second = Vm::new("boot").args(["--disk", &disk]).run()?;
    ensure!(second.code() == 1, "{second:?}");
    ensure!(second.stderr.contains("disk.raw"), "{}", second.stderr);
    Ok(())
}
