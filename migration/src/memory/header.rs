//! What a memory file says about itself: its last page, behind the RAM, so that the RAM begins at offset 0.
//!
//! It is written when everything else is, so a file that was cut off has none. All numbers are little-endian.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0 | 8 | `TERN-RAM` |
//! | 8 | 4 | version: 1 |
//! | 12 | 4 | flags: bit 0, incremental |
//! | 16 | 16 | id of the snapshot |
//! | 32 | 16 | id of its base; zeroes without one |
//! | 48 | 32 | digest of the contents |
//! | 80 | 8 | pages that this file has (without a base: all) |
//! | 88 | 8 | those of them that are not all zero |
//! | 96 | 4 | number of bases of its base, and so on, up to the full one: 0 without a base |
//! | 100 | 4 | number of RAM ranges, 1 to 64 |
//! | 104 | 4 | length of the path to the base, in bytes |
//! | 108 | 4 | zero |
//! | 112 | 16 each | RAM ranges: first guest physical address, length in bytes |
//! | 1136 | 2048 | the path to the base, from the directory of this snapshot |
//! | 3184 | 880 | zeroes |
//! | 4064 | 32 | BLAKE3 of all before |

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{Digest, MAX_CHAIN};
use crate::id::SnapshotId;
use crate::layout::{LayoutError, MAX_RANGES, PAGE_SIZE, RamLayout};

/// Bytes of the header.
pub const HEADER_LEN: u64 = PAGE_SIZE;
/// The version this crate writes, and the only one it reads.
pub const VERSION: u32 = 1;
/// The longest path to a base, in bytes.
pub const MAX_PATH: usize = 2048;

const MAGIC: [u8; 8] = *b"TERN-RAM";
const INCREMENTAL: u32 = 1;
const RANGES: usize = 112;
const PATH: usize = RANGES + 16 * MAX_RANGES;
const CHECK: usize = HEADER_LEN as usize - 32;

/// Why the last page of a file is not the header of a memory file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another file, or one that was cut off.
    #[error("this is no memory file, or not all of it")]
    Magic,
    /// A version that is not known.
    #[error("version {0} of memory files is not known; version {VERSION} is. Use a later tern")]
    Version(u32),
    /// The page was changed.
    #[error("the header is damaged")]
    Damaged,
    /// A field has a value that nobody writes.
    #[error("field {0} of the header has an impossible value")]
    Field(&'static str),
    /// The RAM ranges make no sense.
    #[error("RAM in the header: {0}")]
    Ranges(#[from] LayoutError),
}

/// The snapshot that an incremental one is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseName {
    /// Its id.
    pub id: SnapshotId,
    /// Where it was, from the directory of the incremental snapshot.
    pub path: PathBuf,
}

/// What a memory file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Whose memory it is.
    pub id: SnapshotId,
    /// What it is based on, if it has not all pages.
    pub base: Option<BaseName>,
    /// Digest of the contents.
    pub digest: Digest,
    /// Pages that this file has.
    pub pages: u64,
    /// Those of them that are not all zero.
    pub data_pages: u64,
    /// How many bases are behind it: 0 without a base.
    pub depth: u32,
    /// The RAM.
    pub layout: RamLayout,
}

impl Header {
    /// Its bytes. None if the path to the base is too long.
    pub fn encode(&self) -> Option<[u8; HEADER_LEN as usize]> {
        let none = BaseName {
            id: SnapshotId([0; 16]),
            path: PathBuf::new(),
        };
        let base = self.base.as_ref().unwrap_or(&none);
        let path = base.path.as_os_str().as_bytes();
        if path.len() > MAX_PATH {
            return None;
        }
        let flags = if self.base.is_some() { INCREMENTAL } else { 0 };
        let ranges = self.layout.ranges();
        let mut bytes = Vec::with_capacity(HEADER_LEN as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(self.id.0);
        bytes.extend(base.id.0);
        bytes.extend(self.digest.0);
        bytes.extend(self.pages.to_le_bytes());
        bytes.extend(self.data_pages.to_le_bytes());
        bytes.extend(self.depth.to_le_bytes());
        bytes.extend((ranges.len() as u32).to_le_bytes());
        bytes.extend((path.len() as u32).to_le_bytes());
        bytes.resize(RANGES, 0);
        for range in ranges {
            bytes.extend(range.start.to_le_bytes());
            bytes.extend(range.len.to_le_bytes());
        }
        bytes.resize(PATH, 0);
        bytes.extend(path);
        bytes.resize(CHECK, 0);
        bytes.extend(blake3::hash(&bytes).as_bytes());
        bytes.try_into().ok()
    }

    /// The header that has these bytes.
    pub fn decode(bytes: &[u8; HEADER_LEN as usize]) -> Result<Self, HeaderError> {
        let (body, check) = bytes.split_at(CHECK);
        let mut rest = Fields(body);
        if rest.take() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let version = rest.u32();
        if version != VERSION {
            return Err(HeaderError::Version(version));
        }
        if blake3::hash(body).as_bytes() != check {
            return Err(HeaderError::Damaged);
        }
        let flags = rest.u32();
        let id = SnapshotId(rest.take());
        let base_id = SnapshotId(rest.take());
        let digest = Digest(rest.take());
        let (pages, data_pages) = (rest.u64(), rest.u64());
        let (depth, count, path_len, reserved) = (rest.u32(), rest.u32(), rest.u32(), rest.u32());
        if flags & !INCREMENTAL != 0 {
            return Err(HeaderError::Field("flags"));
        }
        if reserved != 0 {
            return Err(HeaderError::Field("reserved"));
        }
        let count = usize::try_from(count).ok().filter(|n| *n <= MAX_RANGES);
        let count = count.ok_or(HeaderError::Field("number of RAM ranges"))?;
        let ranges: Vec<_> = (0..MAX_RANGES).map(|_| (rest.u64(), rest.u64())).collect();
        let (ranges, unused) = ranges.split_at(count);
        if unused.iter().any(|range| *range != (0, 0)) {
            return Err(HeaderError::Field("number of RAM ranges"));
        }
        let layout = RamLayout::new(ranges.iter().copied())?;
        let path_len = usize::try_from(path_len).ok().filter(|n| *n <= MAX_PATH);
        let path = path_len.and_then(|len| rest.0.split_at_checked(len));
        let (path, zeroes) = path.ok_or(HeaderError::Field("length of the path"))?;
        if zeroes.iter().any(|byte| *byte != 0) {
            return Err(HeaderError::Field("length of the path"));
        }
        let base = if flags & INCREMENTAL != 0 {
            let path = Path::new(OsStr::from_bytes(path));
            if path.as_os_str().is_empty() || path.is_absolute() || path_has_nul(path) {
                return Err(HeaderError::Field("path"));
            }
            Some(BaseName {
                id: base_id,
                path: path.into(),
            })
        } else if base_id.0 != [0; 16] || !path.is_empty() {
            return Err(HeaderError::Field("base"));
        } else {
            None
        };
        if (depth == 0) != base.is_none() || depth >= MAX_CHAIN {
            return Err(HeaderError::Field("number of bases"));
        }
        let all = layout.pages();
        let fits = pages <= all && (base.is_some() || pages == all) && data_pages <= pages;
        if !fits {
            return Err(HeaderError::Field("number of pages"));
        }
        Ok(Self {
            id,
            base,
            digest,
            pages,
            data_pages,
            depth,
            layout,
        })
    }
}

fn path_has_nul(path: &Path) -> bool {
    path.as_os_str().as_bytes().contains(&0)
}

/// What is left to decode. There is always enough: all fields together are shorter than the header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        match self.0.split_first_chunk() {
            Some((field, rest)) => {
                self.0 = rest;
                *field
            }
            None => [0; N],
        }
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(base: Option<&str>) -> Header {
        Header {
            id: SnapshotId([1; 16]),
            base: base.map(|path| BaseName {
                id: SnapshotId([2; 16]),
                path: path.into(),
            }),
            digest: Digest([3; 32]),
            pages: 3,
            data_pages: 2,
            depth: u32::from(base.is_some()),
            layout: RamLayout::new([(0, PAGE_SIZE), (8 * PAGE_SIZE, 2 * PAGE_SIZE)]).unwrap(),
        }
    }

    /// With byte `at` changed, and the check sum right again.
    fn with(header: &Header, at: usize, bytes: &[u8]) -> [u8; HEADER_LEN as usize] {
        let mut out = header.encode().unwrap();
        out[at..at + bytes.len()].copy_from_slice(bytes);
        let sum = *blake3::hash(&out[..CHECK]).as_bytes();
        out[CHECK..].copy_from_slice(&sum);
        out
    }

    #[test]
    fn a_header_is_the_same_after_being_bytes() {
        let long = "x".repeat(MAX_PATH);
        for base in [None, Some("../full"), Some(&*long)] {
            let header = header(base);
            assert_eq!(Header::decode(&header.encode().unwrap()), Ok(header));
        }
        assert_eq!(header(Some(&(long + "x"))).encode(), None);
    }

    #[test]
    fn fields_are_where_the_table_has_them() {
        let bytes = header(Some("../full")).encode().unwrap();
        assert_eq!(&bytes[..16], b"TERN-RAM\x01\0\0\0\x01\0\0\0");
        assert_eq!((bytes[16], bytes[32], bytes[48]), (1, 2, 3));
        assert_eq!((bytes[80], bytes[88], bytes[96], bytes[100]), (3, 2, 1, 2));
        assert_eq!(bytes[104], 7);
        assert_eq!(bytes[112 + 17], 0x80);
        assert_eq!(&bytes[1136..1143], b"../full");
    }

    #[test]
    fn what_nobody_writes_is_refused_by_name() {
        let (full, increment) = (header(None), header(Some("../full")));
        let field = HeaderError::Field;
        for (bytes, error) in [
            (with(&full, 0, b"X"), HeaderError::Magic),
            (with(&full, 8, &[2]), HeaderError::Version(2)),
            (with(&full, 12, &[2]), field("flags")),
            (with(&full, 32, &[1]), field("base")),
            (with(&full, 80, &[2]), field("number of pages")),
            (with(&full, 88, &[4]), field("number of pages")),
            (with(&increment, 80, &[4]), field("number of pages")),
            (with(&full, 96, &[1]), field("number of bases")),
            (with(&increment, 96, &[0]), field("number of bases")),
            (with(&increment, 96, &[64]), field("number of bases")),
            (with(&full, 100, &[65]), field("number of RAM ranges")),
            (with(&full, 100, &[1]), field("number of RAM ranges")),
            (
                with(&full, 100, &[3]),
                HeaderError::Ranges(LayoutError::Bad(crate::layout::RamRange {
                    start: 0,
                    len: 0,
                })),
            ),
            (with(&increment, 104, &[6]), field("length of the path")),
            (
                with(&increment, 104, &[0, 255]),
                field("length of the path"),
            ),
            (with(&increment, 104, &[8]), field("path")),
            (with(&increment, 108, &[1]), field("reserved")),
            (with(&increment, 1136, b"/"), field("path")),
            (with(&full, 4000, &[1]), field("length of the path")),
        ] {
            assert_eq!(Header::decode(&bytes), Err(error));
        }
        for at in 16..HEADER_LEN as usize {
            let mut bytes = full.encode().unwrap();
            bytes[at] ^= 4;
            assert_eq!(Header::decode(&bytes), Err(HeaderError::Damaged), "{at}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(changes in proptest::collection::vec((8usize..4064, 0u8..), 1..20)) {
            let mut bytes = header(Some("../full")).encode().unwrap();
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let sum = *blake3::hash(&bytes[..CHECK]).as_bytes();
            bytes[CHECK..].copy_from_slice(&sum);
            if let Ok(header) = Header::decode(&bytes) {
                proptest::prop_assert_eq!(header.encode(), Some(bytes));
            }
        }
    }
}
