use std::io::Cursor;

use proptest::prelude::*;

use super::*;

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

/// A bzImage of 8 KiB payload that wants to run at 16 MiB.
pub(crate) fn tiny_bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 8192];
    put(&mut image, 0x1f1, &[1]);
    put(&mut image, 0x1f4, &512u32.to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    put(&mut image, 0x211, &[1]);
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// An ELF kernel with one segment of 4 KiB, 8 KiB in memory, at 16 MiB.
pub(crate) fn tiny_elf() -> Vec<u8> {
    let mut image = vec![0; 0x1000 + 0x1000];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 24, &0x100_0000u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &1u16.to_le_bytes());
    put(&mut image, 64, &1u32.to_le_bytes());
    put(&mut image, 64 + 8, &0x1000u64.to_le_bytes());
    put(&mut image, 64 + 24, &0x100_0000u64.to_le_bytes());
    put(&mut image, 64 + 32, &0x1000u64.to_le_bytes());
    put(&mut image, 64 + 40, &0x2000u64.to_le_bytes());
    image
}

fn identify_bytes(bytes: &[u8]) -> Result<Image, ImageError> {
    identify(&mut Cursor::new(bytes))
}

fn message(bytes: &[u8]) -> String {
    identify_bytes(bytes).unwrap_err().to_string()
}

#[test]
fn a_bzimage_is_recognised() {
    assert_eq!(
        identify_bytes(&tiny_bzimage()).unwrap(),
        Image {
            format: Format::BzImage,
            start: 0x100_0000,
            end: 0x110_0000,
            cmdline_max: 2047,
            initrd_max: 0x7fff_ffff,
        }
    );
}

#[test]
fn an_elf_kernel_is_recognised() {
    assert_eq!(
        identify_bytes(&tiny_elf()).unwrap(),
        Image {
            format: Format::Elf { entry: 0x100_0000 },
            start: 0x100_0000,
            end: 0x100_2000,
            cmdline_max: 2047,
            initrd_max: 0x7fff_ffff,
        }
    );
}

#[test]
fn what_is_no_kernel_is_refused() {
    assert!(message(b"").contains("empty"));
    for bytes in [&b"x"[..], &[0; 4096], b"\x1f\x8b\x08\x00", b"#!/bin/sh\n"] {
        assert!(message(bytes).contains("not a kernel"), "{bytes:?}");
    }
}

#[test]
fn every_cut_of_a_kernel_is_an_error() {
    for image in [tiny_bzimage(), tiny_elf()] {
        for len in 0..image.len() {
            assert!(identify_bytes(&image[..len]).is_err(), "{len}");
        }
    }
}

#[test]
fn a_truncated_kernel_says_how_much_is_missing() {
    let image = tiny_bzimage();
    assert!(message(&image[..5000]).contains("has 5000 bytes and its header speaks of 9216"));
    let image = tiny_elf();
    assert!(message(&image[..5000]).contains("has 5000 bytes and its header speaks of 8192"));
}

#[test]
fn bad_headers_are_refused_with_the_reason() {
    type Case<'a> = (fn() -> Vec<u8>, usize, &'a [u8], &'a str);
    let cases: [Case<'_>; 14] = [
        (tiny_bzimage, 0x206, &[0x0b, 0x02], "boot protocol 2.11"),
        (tiny_bzimage, 0x236, &[0, 0], "32-bit x86"),
        (tiny_bzimage, 0x211, &[0], "below 1 MiB"),
        (tiny_bzimage, 0x1f4, &[0; 4], "holds no kernel"),
        (tiny_bzimage, 0x258, &[0; 8], "below 1 MiB"),
        (tiny_bzimage, 0x258, &[0xff; 8], "beyond all memory"),
        (tiny_elf, 4, &[1], "32-bit"),
        (tiny_elf, 5, &[2], "big-endian"),
        (tiny_elf, 18, &[0xb7, 0], "another processor"),
        (tiny_elf, 16, &[1, 0], "not executable"),
        (tiny_elf, 24, &[0; 8], "entry point"),
        (tiny_elf, 56, &[0xff, 0xff], "too many"),
        (tiny_elf, 64 + 24, &[0xff; 8], "wraps"),
        (tiny_elf, 64 + 40, &[0; 8], "longer than its memory"),
    ];
    for (make, offset, value, reason) in cases {
        let mut image = make();
        put(&mut image, offset, value);
        let message = message(&image);
        assert!(message.contains(reason), "{message} / {reason}");
    }
}

proptest! {
    #[test]
    fn no_damage_panics_or_yields_nonsense(
        elf in any::<bool>(),
        hits in prop::collection::vec((0usize..0x264, any::<u8>()), 1..24),
    ) {
        let mut image = if elf { tiny_elf() } else { tiny_bzimage() };
        for (offset, value) in hits {
            image[offset] = value;
        }
        if let Ok(found) = identify_bytes(&image) {
            prop_assert!(found.start >= HIGH_MEMORY);
            prop_assert!(found.end > found.start);
            prop_assert!(found.cmdline_max <= DEFAULT_CMDLINE_SIZE);
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..1024)) {
        let _ = identify_bytes(&bytes);
    }
}
