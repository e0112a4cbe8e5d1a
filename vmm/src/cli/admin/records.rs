//! `tern admin … records`.

use anyhow::bail;
use clap::{Args, Subcommand};
use devices::admin::Migration;
use devices::admin::queue::MAX_DATA;
use serde_json::json;

use super::member::Member;
use super::number;
use crate::cli::print::say;

/// Bytes of the smallest page.
const PAGE: u64 = 4096;

#[derive(Debug, Args)]
pub struct Records {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show which page sizes there are, and how many ranges there can be
    Caps,
    /// Record from now on which pages the virtual function writes
    Start {
        /// Bytes of a page, as in 4096, 64K or 2M
        #[arg(long, value_name = "SIZE", value_parser = size, default_value = "4K", allow_hyphen_values = true)]
        page_size: u64,

        /// Guest memory to record: ADDRESS+LENGTH, as in 0x100000+64M; whole pages
        #[arg(required = true, value_name = "RANGE", value_parser = range, allow_hyphen_values = true)]
        ranges: Vec<(u64, u64)>,
    },
    /// Record no longer, and forget what was recorded
    Stop,
    /// Show which pages were written since the last time
    Read {
        /// Guest memory to ask about: ADDRESS+LENGTH, within a range that is recorded
        #[arg(value_name = "RANGE", value_parser = range, allow_hyphen_values = true)]
        range: (u64, u64),
    },
}

impl Records {
    pub fn run(&self, member: &Member, in_json: bool) -> anyhow::Result<()> {
        match &self.action {
            Action::Caps => caps(member, in_json),
            Action::Start { page_size, ranges } => {
                member.command(Migration::RecordStart, &start(*page_size, ranges)?)?;
                tell(member, "recording", in_json);
                Ok(())
            }
            Action::Stop => {
                member.command(Migration::RecordStop, &[])?;
                tell(member, "not recording", in_json);
                Ok(())
            }
            Action::Read { range } => read(member, *range, in_json),
        }
    }
}

fn tell(member: &Member, state: &str, in_json: bool) {
    match in_json {
        true => say!("{}", json!({ "member": member.name, "records": state })),
        false => say!("records  {state}"),
    }
}

fn caps(member: &Member, in_json: bool) -> anyhow::Result<()> {
    let both = member.command(Migration::RecordCaps, &[])?.number(0);
    let (sizes, ranges) = (both as u32, both >> 32);
    let sizes: Vec<u64> = (0..32)
        .filter(|n| sizes & 1 << n != 0)
        .map(|n| PAGE << n)
        .collect();
    if in_json {
        say!(
            "{}",
            json!({ "member": member.name, "page_sizes": sizes, "ranges": ranges })
        );
        return Ok(());
    }
    let sizes: Vec<_> = sizes.into_iter().map(format_size).collect();
    say!("pages    {}", sizes.join(" "));
    say!("ranges   at most {ranges}");
    Ok(())
}

/// The data of DEV_WRITE_RECORDS_START.
fn start(page_size: u64, ranges: &[(u64, u64)]) -> anyhow::Result<Vec<u8>> {
    let mut data = page_size.to_le_bytes().to_vec();
    data.extend((ranges.len() as u32).to_le_bytes());
    data.extend([0; 4]);
    for (address, length) in ranges {
        if !length.is_multiple_of(page_size) {
            bail!("{address:#x}+{length:#x} is not whole pages of {page_size} bytes");
        }
        data.extend(address.to_le_bytes());
        data.extend((length / page_size).to_le_bytes());
    }
    Ok(data)
}

fn read(member: &Member, (address, length): (u64, u64), in_json: bool) -> anyhow::Result<()> {
    let data = [address.to_le_bytes(), length.to_le_bytes()].concat();
    let done = member.command(Migration::RecordRead, &data)?;
    let pages: Vec<u64> = (0..done.output as usize)
        .map(|n| done.number(8 * n))
        .collect();
    // As many as there was room for.
    let more = pages.len() >= MAX_DATA / 8;
    if in_json {
        say!(
            "{}",
            json!({ "member": member.name, "pages": pages, "more": more })
        );
        return Ok(());
    }
    for page in &pages {
        say!("{page:#x}");
    }
    if more {
        eprintln!("there may be more; read again");
    }
    Ok(())
}

/// Reads a number of bytes, as in 4096, 0x1000, 4K, 2M, 1G.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (text, 0),
    };
    let size = number(digits).ok().and_then(|n| n.checked_mul(1 << shift));
    size.filter(|n| *n > 0)
        .ok_or_else(|| "not a number of bytes; write it like 4096, 4K or 2M".to_owned())
}

/// Reads `ADDRESS+LENGTH`.
fn range(text: &str) -> Result<(u64, u64), String> {
    let parts = text.split_once('+');
    let both = parts.and_then(|(at, len)| Some((number(at).ok()?, size(len).ok()?)));
    both.ok_or_else(|| "not a range; write ADDRESS+LENGTH, as in 0x100000+64M".to_owned())
}

fn format_size(bytes: u64) -> String {
    match bytes {
        b if b.is_multiple_of(1 << 30) => format!("{}G", b >> 30),
        b if b.is_multiple_of(1 << 20) => format!("{}M", b >> 20),
        b => format!("{}K", b >> 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ranges_are_read() {
        for (text, expected) in [
            ("4096", Some(4096)),
            ("0x1000", Some(4096)),
            ("4K", Some(4096)),
            ("2M", Some(2 << 20)),
            ("1G", Some(1 << 30)),
            ("0", None),
            ("K", None),
            ("-1", None),
            ("99999999999G", None),
        ] {
            assert_eq!(size(text).ok(), expected, "{text}");
        }
        assert_eq!(range("0x100000+64M"), Ok((1 << 20, 64 << 20)));
        for text in ["0x1000", "+4K", "4096-8192", "0+0", "4K+4K"] {
            assert!(range(text).is_err(), "{text}");
        }
        assert_eq!(
            [4 << 10, 2 << 20, 1 << 30].map(format_size),
            ["4K", "2M", "1G"]
        );
    }

    #[test]
    fn a_start_counts_pages() {
        let data = start(0x2000, &[(0x4000, 0x4000), (0x10000, 0x2000)]).unwrap();
        let words: Vec<u64> = data
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [0x2000, 2, 0x4000, 2, 0x10000, 1]);
        assert!(start(0x2000, &[(0, 0x1000)]).is_err());
    }
}
