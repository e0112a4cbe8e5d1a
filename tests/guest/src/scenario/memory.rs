//! `memory-touch`: memory that keeps what is written to it, each page its own.

use super::{Found, boot, console};
use crate::cmdline::Request;
use crate::{Failure, Result, check, pattern};

const MIB: u64 = 1 << 20;
const WORDS_PER_PAGE: usize = 512;
const SEED: u64 = 0x7e57;

/// Fills `mib` MiB (default: three quarters of what is free), one word in every page, then checks all of them. A page
/// that is mapped twice, or not at all, does not hold its word.
pub fn touch(request: &Request) -> Result<Found> {
    let available = boot::meminfo("MemAvailable")? / 1024;
    let mib = request.number("mib", available * 3 / 4)?;
    check(mib <= available, || {
        format!("{mib} MiB are more than the {available} MiB that are free")
    })?;
    let length = usize::try_from(mib * MIB / 8).map_err(|_| Failure("too much".into()))?;
    // Zeroed memory is taken from the kernel page by page, when it is written.
    let mut words = vec![0u64; length];
    for (page, words) in (0..).zip(words.chunks_mut(WORDS_PER_PAGE)) {
        words[0] = pattern::word(SEED, page);
    }
    for (page, words) in (0..).zip(words.chunks(WORDS_PER_PAGE)) {
        check(words[0] == pattern::word(SEED, page), || {
            format!("page {page} holds {:#x}", words[0])
        })?;
    }
    Ok(Found::default()
        .with("mib", mib)
        .with("pages", length / WORDS_PER_PAGE))
}

/// Fills `mib` MiB, waits for a line on the console, zeroes them, waits for another line, and looks whether they are zero.
pub fn zero(request: &Request) -> Result<Found> {
    let mib: u64 = request.number("mib", 16)?;
    let length = usize::try_from(mib * MIB / 8).map_err(|_| Failure("too much".into()))?;
    let mut words = vec![0u64; length];
    for (index, word) in (0..).zip(&mut words) {
        *word = pattern::word(SEED, index);
    }
    console::ask()?;
    for (index, word) in (0..).zip(&mut words) {
        let expected = pattern::word(SEED, index);
        check(*word == expected, || {
            format!("word {index} was {word:#x} instead of {expected:#x}")
        })?;
        *word = 0;
    }
    console::ask()?;
    let other = words.iter().position(|word| *word != 0);
    check(other.is_none(), || {
        format!("word {} is not zero", other.unwrap_or_default())
    })?;
    Ok(Found::default().with("mib", mib))
}
