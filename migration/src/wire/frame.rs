//! Frames: a header with length, sequence number and checksum, then the body.
//!
//! All numbers are little-endian.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 4 | kind |
//! | 4 | 4 | length of the body in bytes |
//! | 8 | 8 | sequence number: frames of one direction are counted from 0 |
//! | 16 | 8 | XXH3 of the body |
//! | 24 | 8 | XXH3 of bytes 0 to 23 |
//! | 32 | | body |
//!
//! The header has a checksum of its own since its length is believed before the body is there: with a wrong one, keep-alive
//! frames would be waited for to fill the body.
//!
//! The body of a [`Kind::Pages`] frame is followed by the pages themselves, which have checksums of their own in the body:
//! see [`PageTable`].
//! That of a [`Kind::Sums`] frame is such a table alone.

use xxhash_rust::xxh3::xxh3_64;

use super::WireError;
use crate::layout::{PAGE_SIZE, RamLayout};

/// Bytes of a header.
pub const HEADER_LEN: usize = 32;
/// Longest body of a frame, in bytes, but for sections.
pub const MAX_BODY: u32 = 1 << 16;
/// Longest section, in bytes.
pub const MAX_SECTION: u32 = 160 << 20;
/// The most pages that follow one frame: as many as a large page has.
pub const MAX_PAGES: usize = 512;
/// The most checksums in a [`Kind::Sums`] frame: with as many runs as there can be, they fit a body.
pub const MAX_SUMS: usize = 4096;
/// The most runs of pages in one frame.
pub const MAX_RUNS: usize = 256;

/// What a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// A [`Message`](super::Message) in JSON.
    Message = 0x4e52_4554,
    /// A named, versioned piece of state.
    Section = 1,
    /// Pages of guest memory.
    Pages = 2,
    /// Pages of guest memory that are all zero.
    Zeroes = 3,
    /// Names of descriptors, which come with one byte after the body.
    Descriptors = 4,
    /// Nothing: the sender is alive.
    KeepAlive = 5,
    /// Checksums of pages of guest memory, which do not follow.
    Sums = 6,
}

impl Kind {
    fn of(number: u32) -> Result<Self, WireError> {
        let all = [
            Self::Message,
            Self::Section,
            Self::Pages,
            Self::Zeroes,
            Self::Descriptors,
            Self::KeepAlive,
            Self::Sums,
        ];
        all.into_iter()
            .find(|kind| *kind as u32 == number)
            .ok_or(WireError::Kind(number))
    }

    /// Longest body, in bytes.
    pub fn max_len(self) -> u32 {
        match self {
            Self::Section => MAX_SECTION,
            Self::KeepAlive => 0,
            Self::Message | Self::Pages | Self::Zeroes | Self::Descriptors | Self::Sums => MAX_BODY,
        }
    }
}

/// Header of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame carries.
    pub kind: Kind,
    /// Length of the body in bytes.
    pub len: u32,
    /// Sequence number.
    pub sequence: u64,
    body: u64,
}

impl Header {
    /// The header of a frame with this body.
    pub fn new(kind: Kind, sequence: u64, body: &[u8]) -> Self {
        Self {
            kind,
            len: body.len() as u32,
            sequence,
            body: xxh3_64(body),
        }
    }

    /// The bytes of the header.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let (start, checksum) = bytes.split_at_mut(24);
        for (word, value) in start.chunks_exact_mut(4).zip([
            self.kind as u32,
            self.len,
            self.sequence as u32,
            (self.sequence >> 32) as u32,
            self.body as u32,
            (self.body >> 32) as u32,
        ]) {
            word.copy_from_slice(&value.to_le_bytes());
        }
        checksum.copy_from_slice(&xxh3_64(start).to_le_bytes());
        bytes
    }

    /// Reads a header. `expected` is the sequence number that it should have.
    ///
    /// # Errors
    ///
    /// An unknown kind, a header that is damaged, a body that is too long, another frame than the next one.
    pub fn parse(bytes: &[u8; HEADER_LEN], expected: u64) -> Result<Self, WireError> {
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let kind = Kind::of(word(0))?;
        if xxh3_64(&bytes[..24]) != long(24) {
            return Err(WireError::Checksum { sequence: expected });
        }
        let header = Self {
            kind,
            len: word(4),
            sequence: long(8),
            body: long(16),
        };
        if header.sequence != expected {
            return Err(WireError::Sequence {
                expected,
                found: header.sequence,
            });
        }
        if header.len > kind.max_len() {
            return Err(WireError::TooLong {
                kind,
                len: header.len.into(),
                max: kind.max_len().into(),
            });
        }
        Ok(header)
    }

    /// Checks the body against its checksum.
    pub fn check(&self, body: &[u8]) -> Result<(), WireError> {
        if xxh3_64(body) == self.body {
            Ok(())
        } else {
            Err(WireError::Checksum {
                sequence: self.sequence,
            })
        }
    }
}

/// Runs of pages, and for a [`Kind::Pages`] or [`Kind::Sums`] frame the checksum of each page.
///
/// | bytes | |
/// |---|---|
/// | 4 | number of runs *r* |
/// | 12 *r* | for each run, number of its first page (8), number of pages (4), not zero |
/// | 8 *p* | not [`Kind::Zeroes`]: XXH64 of each of the *p* pages |
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    /// First page and number of pages, ascending and disjoint; each run lies in one RAM range.
    pub runs: Vec<(u64, u32)>,
    /// A checksum for each page; empty for zero pages.
    pub sums: Vec<u64>,
}

impl PageTable {
    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|(_, count)| u64::from(*count)).sum()
    }

    /// Adds `page`. False if there is no room for it.
    pub fn push(&mut self, page: u64, starts_range: bool) -> bool {
        if let Some((first, count)) = self.runs.last_mut()
            && *first + u64::from(*count) == page
            && !starts_range
            && *count < u32::MAX
        {
            *count += 1;
            return true;
        }
        if self.runs.len() >= MAX_RUNS {
            return false;
        }
        self.runs.push((page, 1));
        true
    }

    /// The body of a frame.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 + 12 * self.runs.len() + 8 * self.sums.len());
        bytes.extend((self.runs.len() as u32).to_le_bytes());
        for (first, count) in &self.runs {
            bytes.extend(first.to_le_bytes());
            bytes.extend(count.to_le_bytes());
        }
        for sum in &self.sums {
            bytes.extend(sum.to_le_bytes());
        }
        bytes
    }

    /// Reads the body of a frame of `kind`, for a guest whose RAM is `layout`.
    pub fn parse(kind: Kind, bytes: &[u8], layout: &RamLayout) -> Result<Self, WireError> {
        let malformed = |why: String| WireError::Malformed { kind, why };
        let short = || malformed("it is too short".to_owned());
        let (count, mut rest) = bytes.split_first_chunk().ok_or_else(short)?;
        let count = u32::from_le_bytes(*count) as usize;
        if count == 0 || count > MAX_RUNS {
            return Err(malformed(format!(
                "{count} runs; there are 1 to {MAX_RUNS}"
            )));
        }
        let mut table = Self::default();
        let mut free = 0;
        for _ in 0..count {
            let (first, after) = rest.split_first_chunk().ok_or_else(short)?;
            let (pages, after) = after.split_first_chunk().ok_or_else(short)?;
            rest = after;
            let (first, pages) = (u64::from_le_bytes(*first), u32::from_le_bytes(*pages));
            let end = first.checked_add(pages.into());
            let end = end.filter(|end| first >= free && pages > 0 && *end <= layout.pages());
            let end = end.ok_or_else(|| {
                malformed(format!(
                    "run {first}+{pages} is empty, out of order or beyond RAM"
                ))
            })?;
            if run_in_range(layout, first, pages).is_none() {
                return Err(malformed(format!("run {first}+{pages} crosses RAM ranges")));
            }
            free = end;
            table.runs.push((first, pages));
        }
        let max = match kind {
            Kind::Pages => MAX_PAGES,
            Kind::Sums => MAX_SUMS,
            _ => 0,
        };
        if max > 0 {
            let pages = table.pages();
            if pages > max as u64 {
                return Err(malformed(format!("{pages} pages; there are at most {max}")));
            }
            let (sums, end) = rest.as_chunks();
            if sums.len() as u64 != pages || !end.is_empty() {
                return Err(malformed(
                    "there is not one checksum for each page".to_owned(),
                ));
            }
            table.sums = sums.iter().map(|sum| u64::from_le_bytes(*sum)).collect();
        } else if !rest.is_empty() {
            return Err(malformed("it is too long".to_owned()));
        }
        Ok(table)
    }
}

/// Range number, and offset in it, of `pages` pages from number `first` on, if one range has them all.
pub(crate) fn run_in_range(layout: &RamLayout, first: u64, pages: u32) -> Option<(usize, u64)> {
    let mut before = 0;
    for (index, range) in layout.ranges().iter().enumerate() {
        let in_range = range.len / PAGE_SIZE;
        if first < before + in_range {
            let end = first.checked_add(pages.into())?;
            return (end <= before + in_range).then_some((index, (first - before) * PAGE_SIZE));
        }
        before += in_range;
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_is_the_same_after_being_bytes() {
        let header = Header::new(Kind::Pages, 77, b"body");
        let parsed = Header::parse(&header.to_bytes(), 77).unwrap();
        assert_eq!(parsed, header);
        parsed.check(b"body").unwrap();
        for expected in [76, 78] {
            let other = Header::parse(&header.to_bytes(), expected).unwrap_err();
            assert!(matches!(other, WireError::Sequence { found: 77, .. }));
        }
    }

    #[test]
    fn no_flipped_bit_goes_unnoticed() {
        let body = b"some body";
        let header = Header::new(Kind::Section, 3, body);
        for bit in 0..HEADER_LEN * 8 {
            let mut bytes = header.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let noticed = Header::parse(&bytes, 3).is_err();
            assert!(noticed, "bit {bit} of the header");
        }
        for bit in 0..body.len() * 8 {
            let mut damaged = *body;
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(header.check(&damaged).is_err(), "bit {bit} of the body");
        }
    }

    #[test]
    fn lengths_beyond_the_limit_are_refused_before_anything_is_allocated() {
        for kind in [Kind::Message, Kind::Section, Kind::Pages, Kind::KeepAlive] {
            let mut header = Header::new(kind, 0, b"");
            header.len = kind.max_len();
            assert_eq!(Header::parse(&header.to_bytes(), 0).unwrap(), header);
            header.len += 1;
            let error = Header::parse(&header.to_bytes(), 0).unwrap_err();
            assert!(matches!(error, WireError::TooLong { .. }), "{error}");
        }
    }

    fn layout() -> RamLayout {
        RamLayout::new([(0, 100 * PAGE_SIZE), (1 << 32, 300 * PAGE_SIZE)]).unwrap()
    }

    #[test]
    fn runs_that_make_no_sense_are_refused() {
        let table = |runs: &[(u64, u32)]| PageTable {
            runs: runs.to_vec(),
            sums: Vec::new(),
        };
        for bad in [
            &[][..],
            &[(0, 0)],
            &[(5, 1), (4, 1)],
            &[(5, 2), (6, 1)],
            &[(99, 2)],
            &[(399, 2)],
            &[(u64::MAX, 2)],
            &[(400, 1)],
        ] {
            let bytes = table(bad).to_bytes();
            let parsed = PageTable::parse(Kind::Zeroes, &bytes, &layout());
            assert!(parsed.is_err(), "{bad:?}");
        }
        let good = table(&[(0, 100), (100, 300)]);
        let parsed = PageTable::parse(Kind::Zeroes, &good.to_bytes(), &layout()).unwrap();
        assert_eq!(parsed, good);
        // So many pages do not follow one frame.
        assert!(PageTable::parse(Kind::Pages, &good.to_bytes(), &layout()).is_err());
    }

    #[test]
    fn the_largest_table_of_checksums_fits_a_body() {
        let layout = RamLayout::new([(0, 2 * MAX_SUMS as u64 * PAGE_SIZE)]).unwrap();
        let mut table = PageTable {
            runs: (0..MAX_RUNS as u64).map(|run| (2 * run, 1)).collect(),
            sums: vec![7; MAX_SUMS],
        };
        let last = table.runs.last_mut().unwrap();
        last.1 = (MAX_SUMS - MAX_RUNS + 1) as u32;
        let bytes = table.to_bytes();
        assert!(bytes.len() <= Kind::Sums.max_len() as usize);
        let parsed = PageTable::parse(Kind::Sums, &bytes, &layout).unwrap();
        assert_eq!(parsed, table);
        table.runs.last_mut().unwrap().1 += 1;
        table.sums.push(7);
        assert!(PageTable::parse(Kind::Sums, &table.to_bytes(), &layout).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_table_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for kind in [Kind::Pages, Kind::Zeroes, Kind::Sums] {
                if let Ok(table) = PageTable::parse(kind, &bytes, &layout()) {
                    prop_assert_eq!(table.to_bytes(), bytes.clone());
                }
            }
        }
    }
}
