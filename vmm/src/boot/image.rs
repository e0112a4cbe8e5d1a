//! Recognising kernel images.
//!
//! [`identify`] is total: whatever the bytes are, it answers with an [`Image`] whose every number was checked against
//! the length of the file and against each other, or with an error that says what is wrong and what to do. Only then
//! does the loader touch the file.

use std::io::{Read, Seek, SeekFrom};

use crate::layout::HIGH_MEMORY;

/// Length of a command line the kernel takes if its image does not say, without the NUL.
const DEFAULT_CMDLINE_SIZE: u32 = 2047;
/// The highest address of the initial RAM disk if the image does not say.
const DEFAULT_INITRD_MAX: u64 = 0x7fff_ffff;
/// Program headers a kernel can reasonably have; Debian's have five.
const MAX_SEGMENTS: u16 = 64;

/// A kernel image that can be booted in 64-bit mode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its format, and what is particular to it.
    pub format: Format,
    /// The first guest physical address it occupies.
    pub start: u64,
    /// The guest physical address after the last one it needs to start.
    pub end: u64,
    /// Longest command line in bytes, without the NUL.
    pub cmdline_max: u32,
    /// The last guest physical address the initial RAM disk may occupy.
    pub initrd_max: u64,
}

/// Format of a kernel image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A compressed image as distributions ship it (`vmlinuz`).
    BzImage,
    /// An uncompressed ELF executable (`vmlinux`).
    Elf {
        /// Guest physical address of the entry point.
        entry: u64,
    },
}

/// Why a file is not a kernel that can be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file has no byte.
    #[error("the file is empty; give a bzImage (vmlinuz) or an ELF kernel (vmlinux)")]
    Empty,
    /// Reading failed.
    #[error("cannot read the file")]
    Read(#[source] std::io::Error),
    /// Neither format.
    #[error("not a kernel: it is neither a bzImage (vmlinuz) nor an ELF kernel (vmlinux)")]
    NotAKernel,
    /// Right format, wrong processor.
    #[error("a kernel for {0}; give one for 64-bit x86 (x86_64, amd64)")]
    WrongMachine(&'static str),
    /// Shorter than its header says.
    #[error("truncated: it has {actual} bytes and its header speaks of {expected}; copy it again")]
    Truncated {
        /// Bytes there should be.
        expected: u64,
        /// Bytes there are.
        actual: u64,
    },
    /// Numbers in the header contradict each other.
    #[error("damaged: {0}; copy it again or rebuild it")]
    Damaged(&'static str),
    /// Too old to say whether it can be entered in 64-bit mode.
    #[error(
        "its boot protocol {major}.{minor:02} is too old; give a 64-bit kernel, version 3.8 or later"
    )]
    TooOld {
        /// Major version of the boot protocol.
        major: u8,
        /// Minor version of the boot protocol.
        minor: u8,
    },
}

/// Recognises the kernel image in `file`.
pub fn identify<F: Read + Seek>(file: &mut F) -> Result<Image, ImageError> {
    let len = file.seek(SeekFrom::End(0)).map_err(ImageError::Read)?;
    if len == 0 {
        return Err(ImageError::Empty);
    }
    let mut head = [0u8; HEADER_LEN];
    let got = read_at(file, 0, &mut head)?;
    let head = Bytes(head.get(..got).unwrap_or_default());
    if head.array(0) == Some(*b"\x7fELF") {
        elf(file, &head, len)
    } else if head.array(HDRS_OFFSET) == Some(*b"HdrS") {
        bzimage(&head, len)
    } else {
        Err(ImageError::NotAKernel)
    }
}

/// Offset of the signature of a setup header.
const HDRS_OFFSET: usize = 0x202;
/// Bytes at the start of a file that hold everything [`identify`] wants of a bzImage.
const HEADER_LEN: usize = 0x264;

fn bzimage(head: &Bytes<'_>, len: u64) -> Result<Image, ImageError> {
    let cut = ImageError::Truncated {
        expected: HEADER_LEN as u64,
        actual: len,
    };
    let Some(header) = SetupHeader::parse(head) else {
        return Err(cut);
    };
    let [minor, major] = header.version.to_le_bytes();
    // 2.12 brought the flag that says whether the kernel can be entered in 64-bit mode.
    if header.version < 0x20c {
        return Err(ImageError::TooOld { major, minor });
    }
    if header.loadflags & 1 == 0 {
        return Err(ImageError::Damaged("it claims to load below 1 MiB"));
    }
    if header.xloadflags & 1 == 0 {
        return Err(ImageError::WrongMachine("32-bit x86"));
    }
    let sectors = match header.setup_sects {
        0 => 4,
        n => u64::from(n),
    };
    let setup = (sectors + 1) * 512;
    let payload = u64::from(header.syssize) * 16;
    let expected = setup + payload;
    if len < expected {
        return Err(ImageError::Truncated {
            expected,
            actual: len,
        });
    }
    if payload < 0x1000 {
        return Err(ImageError::Damaged("it holds no kernel"));
    }
    if header.pref_address < HIGH_MEMORY {
        return Err(ImageError::Damaged("it wants to run below 1 MiB"));
    }
    let room = u64::from(header.init_size).max(len - setup);
    let end = header
        .pref_address
        .checked_add(room)
        .ok_or(ImageError::Damaged("it wants to run beyond all memory"))?;
    Ok(Image {
        format: Format::BzImage,
        start: header.pref_address,
        end,
        cmdline_max: match header.cmdline_size {
            0 => 255,
            n => n.min(DEFAULT_CMDLINE_SIZE),
        },
        initrd_max: u64::from(header.initrd_addr_max),
    })
}

/// The fields of the setup header (Documentation/arch/x86/boot.rst) that decide whether and where to load.
struct SetupHeader {
    setup_sects: u8,
    syssize: u32,
    version: u16,
    loadflags: u8,
    initrd_addr_max: u32,
    xloadflags: u16,
    cmdline_size: u32,
    pref_address: u64,
    init_size: u32,
}

impl SetupHeader {
    fn parse(head: &Bytes<'_>) -> Option<Self> {
        Some(Self {
            setup_sects: u8::from_le_bytes(head.array(0x1f1)?),
            syssize: head.u32(0x1f4)?,
            version: head.u16(0x206)?,
            loadflags: u8::from_le_bytes(head.array(0x211)?),
            initrd_addr_max: head.u32(0x22c)?,
            xloadflags: head.u16(0x236)?,
            cmdline_size: head.u32(0x238)?,
            pref_address: head.u64(0x258)?,
            init_size: head.u32(0x260)?,
        })
    }
}

const ELF_HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: usize = 56;

fn elf<F: Read + Seek>(file: &mut F, head: &Bytes<'_>, len: u64) -> Result<Image, ImageError> {
    let truncated = |expected| ImageError::Truncated {
        expected,
        actual: len,
    };
    let cut = || truncated(ELF_HEADER_LEN);
    match head.array(4).ok_or_else(cut)? {
        [2, 1] => {}
        [1, _] => return Err(ImageError::WrongMachine("a 32-bit processor")),
        [_, 2] => return Err(ImageError::WrongMachine("a big-endian processor")),
        _ => return Err(ImageError::Damaged("its ELF class is unknown")),
    }
    let kind = head.u16(16).ok_or_else(cut)?;
    let machine = head.u16(18).ok_or_else(cut)?;
    let entry = head.u64(24).ok_or_else(cut)?;
    let table = head.u64(32).ok_or_else(cut)?;
    let entry_len = head.u16(54).ok_or_else(cut)?;
    let count = head.u16(56).ok_or_else(cut)?;
    head.u16(62).ok_or_else(cut)?;
    if machine != 62 {
        return Err(ImageError::WrongMachine("another processor"));
    }
    if kind != 2 && kind != 3 {
        return Err(ImageError::Damaged("it is an ELF file but not executable"));
    }
    if usize::from(entry_len) != PROGRAM_HEADER_LEN || table < ELF_HEADER_LEN {
        return Err(ImageError::Damaged("its program headers are malformed"));
    }
    if count == 0 || count > MAX_SEGMENTS {
        return Err(ImageError::Damaged("it has no or too many program headers"));
    }
    let table_end = table.saturating_add(u64::from(count) * PROGRAM_HEADER_LEN as u64);
    if table_end > len {
        return Err(truncated(table_end));
    }
    let (mut start, mut end, mut entry_inside) = (u64::MAX, 0, false);
    for index in 0..u64::from(count) {
        let mut raw = [0; PROGRAM_HEADER_LEN];
        let offset = table + index * PROGRAM_HEADER_LEN as u64;
        let got = read_at(file, offset, &mut raw)?;
        let raw = Bytes(raw.get(..got).unwrap_or_default());
        let segment = Segment::parse(&raw).ok_or_else(|| truncated(table_end))?;
        if segment.kind != 1 || segment.file_len == 0 {
            continue;
        }
        if segment.memory_len < segment.file_len {
            return Err(ImageError::Damaged("a segment is longer than its memory"));
        }
        let file_end = segment.offset.saturating_add(segment.file_len);
        if file_end > len {
            return Err(truncated(file_end));
        }
        let Some(memory_end) = segment.address.checked_add(segment.memory_len) else {
            return Err(ImageError::Damaged("a segment wraps around"));
        };
        if segment.address < HIGH_MEMORY {
            return Err(ImageError::Damaged("it wants to run below 1 MiB"));
        }
        entry_inside |= (segment.address..memory_end).contains(&entry);
        start = start.min(segment.address);
        end = end.max(memory_end);
    }
    if end == 0 {
        return Err(ImageError::Damaged("it has nothing to load"));
    }
    if !entry_inside {
        return Err(ImageError::Damaged("its entry point is outside of it"));
    }
    Ok(Image {
        format: Format::Elf { entry },
        start,
        end,
        cmdline_max: DEFAULT_CMDLINE_SIZE,
        initrd_max: DEFAULT_INITRD_MAX,
    })
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_len: u64,
    memory_len: u64,
}

impl Segment {
    fn parse(raw: &Bytes<'_>) -> Option<Self> {
        Some(Self {
            kind: raw.u32(0)?,
            offset: raw.u64(8)?,
            address: raw.u64(24)?,
            file_len: raw.u64(32)?,
            memory_len: raw.u64(40)?,
        })
    }
}

/// Little-endian numbers at offsets that may not exist.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn array<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.0.get(offset..offset.checked_add(N)?)?.try_into().ok()
    }

    fn u16(&self, offset: usize) -> Option<u16> {
        self.array(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Option<u32> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: usize) -> Option<u64> {
        self.array(offset).map(u64::from_le_bytes)
    }
}

/// Fills as much of `buffer` as the file has at `offset`; returns how much that is.
fn read_at<F: Read + Seek>(
    file: &mut F,
    offset: u64,
    buffer: &mut [u8],
) -> Result<usize, ImageError> {
    file.seek(SeekFrom::Start(offset))
        .map_err(ImageError::Read)?;
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ImageError::Read(e)),
        }
    }
    Ok(filled)
}

#[cfg(test)]
pub(crate) mod tests;
