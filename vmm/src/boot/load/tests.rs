use devices::memory::GuestRam;

use super::super::image::tests::{tiny_bzimage, tiny_elf};
use super::*;
use crate::layout::MIB;

const RAM: u64 = 64 * MIB;

struct Case {
    directory: tempfile::TempDir,
    sources: Sources,
}

fn case(kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str) -> Case {
    let directory = tempfile::tempdir().unwrap();
    let kernel_path = directory.path().join("vmlinuz");
    std::fs::write(&kernel_path, kernel).unwrap();
    let initrd = initrd.map(|bytes| {
        let path = directory.path().join("initrd");
        std::fs::write(&path, bytes).unwrap();
        path
    });
    Case {
        directory,
        sources: Sources {
            kernel: kernel_path,
            initrd,
            cmdline: cmdline.to_owned(),
        },
    }
}

fn view() -> View {
    GuestRam::new(&layout::ram_ranges(RAM))
        .unwrap()
        .view()
        .unwrap()
}

fn load(memory: &View, ram: u64, sources: &Sources) -> Result<Entry, LoadError> {
    Prepared::open(ram, sources)?.load(memory)
}

fn refused(case: &Case) -> String {
    load(&view(), RAM, &case.sources).unwrap_err().to_string()
}

#[test]
fn a_bzimage_is_loaded_where_it_wants_to_run() {
    let mut kernel = tiny_bzimage();
    kernel[1024] = 0x5a;
    let case = case(&kernel, None, "a b");
    let view = view();
    let entry = load(&view, RAM, &case.sources).unwrap();
    assert_eq!(entry.rip, 0x100_0200);
    let first: u8 = view.read_obj(GuestAddress(0x100_0000)).unwrap();
    assert_eq!(first, 0x5a);
    let mut line = [0; 4];
    view.read_slice(&mut line, GuestAddress(layout::CMDLINE))
        .unwrap();
    assert_eq!(&line, b"a b\0");
}

#[test]
fn an_elf_kernel_is_entered_at_its_entry_point() {
    let case = case(&tiny_elf(), None, "");
    assert_eq!(load(&view(), RAM, &case.sources).unwrap().rip, 0x100_0000);
}

#[test]
fn the_initrd_ends_at_the_top_of_low_memory() {
    let case = case(&tiny_bzimage(), Some(&[7; 5000]), "");
    let view = view();
    load(&view, RAM, &case.sources).unwrap();
    let start = RAM - 2 * 4096;
    let params: u32 = view
        .read_obj(GuestAddress(layout::ZERO_PAGE + 0x218))
        .unwrap();
    assert_eq!(u64::from(params), start);
    assert_eq!(view.read_obj::<u8>(GuestAddress(start)).unwrap(), 7);
}

#[test]
fn the_initrd_respects_the_limit_of_the_kernel() {
    let image = Image {
        format: Format::BzImage,
        start: MIB,
        end: 2 * MIB,
        cmdline_max: 0,
        initrd_max: 0x3f_ffff,
    };
    assert_eq!(place_initrd(1, &image, 64 * MIB), Some(0x3f_f000));
    assert_eq!(place_initrd(2 * MIB, &image, 64 * MIB), Some(2 * MIB));
    assert_eq!(place_initrd(2 * MIB + 1, &image, 64 * MIB), None);
    assert_eq!(place_initrd(u64::MAX, &image, 64 * MIB), None);
}

#[test]
fn files_that_cannot_be_used_are_named_with_the_cure() {
    let good = case(&tiny_bzimage(), None, "");
    let directory = good.directory.path().to_owned();
    let missing = directory.join("missing");
    let table: [(Option<PathBuf>, Option<PathBuf>, &str); 4] = [
        (Some(missing.clone()), None, "missing: no such file"),
        (Some(directory.clone()), None, "is a directory"),
        (None, Some(missing), "missing: no such file"),
        (None, Some(directory), "is a directory"),
    ];
    for (kernel, initrd, expected) in table {
        let sources = Sources {
            kernel: kernel.unwrap_or_else(|| good.sources.kernel.clone()),
            initrd,
            cmdline: String::new(),
        };
        let message = load(&view(), RAM, &sources).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_kernel_that_needs_more_memory_says_how_much() {
    let mut kernel = tiny_bzimage();
    kernel[0x260..0x264].copy_from_slice(&(60 * MIB as u32).to_le_bytes());
    let message = refused(&case(&kernel, None, ""));
    assert!(message.contains("needs 76M of memory"), "{message}");
    assert!(message.contains("has 64M"), "{message}");
}

#[test]
fn an_initrd_that_does_not_fit_says_what_would() {
    let big = vec![0; 50 * MIB as usize];
    let message = refused(&case(&tiny_bzimage(), Some(&big), ""));
    assert!(message.contains("raise --memory to 68M"), "{message}");
}

#[test]
fn an_empty_initrd_is_refused() {
    assert!(refused(&case(&tiny_bzimage(), Some(b""), "")).contains("is empty"));
}

#[test]
fn a_command_line_must_fit_and_be_ascii() {
    let long = "x".repeat(2048);
    assert!(refused(&case(&tiny_bzimage(), None, &long)).contains("at most 2047"));
    load(
        &view(),
        RAM,
        &case(&tiny_bzimage(), None, &long[..2047]).sources,
    )
    .unwrap();
    for text in ["a\0b", "a\nb", "é"] {
        assert!(refused(&case(&tiny_bzimage(), None, text)).contains("ASCII"));
    }
}
