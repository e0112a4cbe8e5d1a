//! `entropy`: random numbers from virtio-rng.

use std::fs::{self, File};
use std::io::Read;

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Result, check};

const BYTES: usize = 4096;

pub fn run(_: &Request) -> Result<Found> {
    let source = source()?;
    check(source.starts_with("virtio_rng"), || {
        format!("the source of random numbers is {source}")
    })?;
    let mut bytes = [0; BYTES];
    File::open("/dev/hwrng")
        .and_then(|mut device| device.read_exact(&mut bytes))
        .context("/dev/hwrng")?;
    let distinct = distinct(&bytes);
    // Of 256 values, 4096 random bytes miss so many once in a number of universes.
    check(distinct > 200, || {
        format!("{BYTES} bytes have only {distinct} values")
    })?;
    Ok(Found::default()
        .with("source", source)
        .with("bytes", BYTES)
        .with("distinct", distinct))
}

/// What feeds `/dev/hwrng`.
pub fn source() -> Result<String> {
    let name = "/sys/class/misc/hw_random/rng_current";
    Ok(fs::read_to_string(name).context(name)?.trim().to_owned())
}

fn distinct(bytes: &[u8]) -> usize {
    let mut seen = [false; 256];
    bytes
        .iter()
        .for_each(|&byte| seen[usize::from(byte)] = true);
    seen.iter().filter(|&&seen| seen).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted() {
        assert_eq!(distinct(&[0; 10]), 1);
        assert_eq!(distinct(&[1, 2, 3, 2]), 3);
    }
}
