//! `sriov-block`: each virtual function has a disk of its own.

use super::super::Found;
use super::super::block::Disk;
use super::Owner;
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::pattern::{self, CHUNK};
use crate::{Failure, Result, check};

/// Checksums of the first MiB of each disk, in the order of the virtual functions; then writes `mib` MiB of another
/// stream to each, all at once, and reads them back.
pub fn run(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let chunks: u64 = request.number("mib", 0)?;
    let log = Mark::now()?;
    let members = owner.ensure(Some(request.number("n", 4)?))?;
    let disks: Vec<Disk> = members
        .iter()
        .map(|member| Ok(Disk::new(&member.disk()?)))
        .collect::<Result<_>>()?;
    let found = checksums(&disks, 1)?;
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..)
            .zip(&disks)
            .map(|(seed, disk)| scope.spawn(move || disk.write_pattern(seed, chunks)))
            .collect();
        for writer in writers {
            writer
                .join()
                .map_err(|_| Failure("a writer panicked".into()))??;
        }
        Ok::<_, Failure>(())
    })?;
    for (seed, disk) in (1..).zip(&disks) {
        let (there, expected) = (disk.checksum(chunks)?, pattern::checksum(seed, chunks));
        check(there == expected, || {
            format!("disk {seed} has crc32={there:08x} instead of {expected:08x}")
        })?;
    }
    log.check_clean()?;
    Ok(Found::default()
        .with("disks", disks.len())
        .with("crc32", found)
        .with("bytes", disks.len() as u64 * chunks * CHUNK as u64)
        .with("written", checksums(&disks, chunks)?))
}

/// The checksums of the first `chunks` MiB of each, joined by `+`.
fn checksums(disks: &[Disk], chunks: u64) -> Result<String> {
    let one = |disk: &Disk| Ok(format!("{:08x}", disk.checksum(chunks)?));
    Ok(disks.iter().map(one).collect::<Result<Vec<_>>>()?.join("+"))
}
