//! The ELF kernel inside a bzImage.
//!
//! The setup header says where the payload is (Linux x86 boot protocol, since 2.08: `payload_offset` and
//! `payload_length`, relative to the protected-mode code). The payload is the compressed `vmlinux`, and unless it is
//! gzip, four bytes with the uncompressed length follow it.

use anyhow::{Context, Result, bail, ensure};

const SETUP_SECTS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const ELF_MAGIC: &[u8] = b"\x7fELF";

/// How a payload is compressed, and the program that undoes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Xz,
    Zstd,
    Lz4,
    None,
}

impl Compression {
    fn of(payload: &[u8]) -> Result<Self> {
        let magics: [(&[u8], Self); 5] = [
            (b"\x1f\x8b", Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
            (b"\x02\x21\x4c\x18", Self::Lz4),
            (ELF_MAGIC, Self::None),
        ];
        let found = magics
            .into_iter()
            .find(|(magic, _)| payload.starts_with(magic));
        found
            .map(|(_, compression)| compression)
            .context("the payload is compressed in an unknown way")
    }

    /// The command that decompresses standard input to standard output.
    pub fn program(self) -> Option<(&'static str, &'static [&'static str])> {
        match self {
            Self::Gzip => Some(("gzip", &["-dc"])),
            Self::Xz => Some(("xz", &["-dc"])),
            Self::Zstd => Some(("zstd", &["-dqc"])),
            Self::Lz4 => Some(("lz4", &["-dqc"])),
            Self::None => None,
        }
    }
}

/// A compressed kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Payload<'a> {
    pub compression: Compression,
    /// Exactly the compressed stream.
    pub bytes: &'a [u8],
    /// How long the kernel will be, where the image says so.
    pub uncompressed: Option<usize>,
}

/// Finds the payload of a bzImage.
pub fn payload(image: &[u8]) -> Result<Payload<'_>> {
    ensure!(
        image.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS"),
        "this is no bzImage"
    );
    let version = u16::from_le_bytes([image[VERSION], *image.get(VERSION + 1).unwrap_or(&0)]);
    ensure!(
        version >= 0x208,
        "boot protocol {version:#x} has no payload field"
    );
    // Zero means four, for the sake of very old boot loaders.
    let sectors = match image[SETUP_SECTS] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + read_u32(image, PAYLOAD_OFFSET)? as usize;
    let end = start.checked_add(read_u32(image, PAYLOAD_LENGTH)? as usize);
    let Some(bytes) = end.and_then(|end| image.get(start..end)) else {
        bail!("the image is shorter than its header says");
    };
    let compression = Compression::of(bytes)?;
    if matches!(compression, Compression::None | Compression::Gzip) {
        return Ok(Payload {
            compression,
            bytes,
            uncompressed: None,
        });
    }
    let stream = bytes
        .len()
        .checked_sub(4)
        .context("the payload is too short")?;
    let uncompressed = Some(read_u32(bytes, stream)? as usize);
    Ok(Payload {
        compression,
        bytes: &bytes[..stream],
        uncompressed,
    })
}

fn read_u32(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes
        .get(at..at + 4)
        .context("the image ends in its header")?;
    Ok(u32::from_le_bytes(field.try_into()?))
}

/// Checks what came out of a payload.
pub fn check_kernel(kernel: &[u8], expected: Option<usize>) -> Result<()> {
    ensure!(kernel.starts_with(ELF_MAGIC), "the payload is no ELF image");
    ensure!(
        expected.is_none_or(|length| length == kernel.len()),
        "the kernel has {} bytes, the image says {expected:?}",
        kernel.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 512 * 3 + 16];
        image[SETUP_SECTS] = 2;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[VERSION..VERSION + 2].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4]
            .copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(b"what follows the payload");
        image
    }

    #[test]
    fn zstd_payload_is_found_without_its_length() {
        let found = image(b"\x28\xb5\x2f\xfdabc\x00\x01\x00\x00");
        let expected = Payload {
            compression: Compression::Zstd,
            bytes: b"\x28\xb5\x2f\xfdabc",
            uncompressed: Some(256),
        };
        assert_eq!(payload(&found).unwrap(), expected);
    }

    #[test]
    fn gzip_and_plain_payloads_are_taken_whole() {
        for (bytes, compression) in [
            (&b"\x1f\x8babcd"[..], Compression::Gzip),
            (&b"\x7fELFabcd"[..], Compression::None),
        ] {
            let found = image(bytes);
            assert_eq!(
                payload(&found).unwrap(),
                Payload {
                    compression,
                    bytes,
                    uncompressed: None
                }
            );
        }
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let mut short = image(b"\x28\xb5\x2f\xfdabcdefgh");
        short.truncate(512 * 3 + 20);
        let mut old = image(b"\x7fELF");
        old[VERSION] = 7;
        old[VERSION + 1] = 2;
        for (bytes, message) in [
            (b"MZ".to_vec(), "this is no bzImage"),
            (vec![0; 4096], "this is no bzImage"),
            (short, "the image is shorter than its header says"),
            (old, "boot protocol 0x207 has no payload field"),
            (
                image(b"????"),
                "the payload is compressed in an unknown way",
            ),
            (image(b""), "the payload is compressed in an unknown way"),
        ] {
            assert_eq!(payload(&bytes).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_kernel_is_checked_by_magic_and_length() {
        assert!(check_kernel(b"\x7fELF", None).is_ok());
        assert!(check_kernel(b"\x7fELF", Some(4)).is_ok());
        assert!(check_kernel(b"\x7fELF", Some(5)).is_err());
        assert!(check_kernel(b"ELF", None).is_err());
    }
}
