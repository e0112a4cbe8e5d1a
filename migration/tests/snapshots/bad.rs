//! Directories that are no snapshot, or a bad one.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use migration::memory::header::HeaderError;
use migration::{Bases, Existing, GuestPages, Image, PageSet, ReadError, Reader};

use crate::guest::{Memory, P, layout};
use crate::{on, save, save_all};

fn snapshot(directory: &Path) -> PathBuf {
    let target = directory.join("snap");
    let memory = Memory::new(&layout(&[6, 4]));
    (0..10).for_each(|page| memory.fill(page, page + 1));
    save_all(&memory, &target);
    target
}

fn increment(directory: &Path) -> PathBuf {
    let base = snapshot(directory);
    let memory = Memory::new(&layout(&[6, 4]));
    let mut pages = PageSet::empty(memory.layout());
    pages.insert_run(2, 3);
    let target = directory.join("increment");
    save(&memory, &target, Some(&base), &pages, Existing::Refuse).unwrap();
    target
}

fn image(path: &Path) -> Result<Image, ReadError> {
    Image::open(&Reader::open(path)?, None, Bases::Follow)
}

#[test]
fn what_is_no_directory_with_the_files_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let target = snapshot(directory.path());
    let missing = |path: &Path| matches!(Reader::open(path), Err(ReadError::Missing(_)));
    assert!(missing(&directory.path().join("nowhere")));
    let outcome = Reader::open(&target.join("state.json"));
    assert!(matches!(outcome, Err(ReadError::NotADirectory(_))));
    fs::rename(target.join("state.json"), target.join("x")).unwrap();
    assert!(missing(&target));
    fs::rename(target.join("x"), target.join("state.json")).unwrap();
    fs::rename(target.join("memory.bin"), target.join("x")).unwrap();
    assert!(missing(&target));
}

#[test]
fn files_that_are_none_are_refused_without_being_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    let target = increment(directory.path());
    let begin = Instant::now();
    for name in ["state.json", "memory.bin", "memory.map"] {
        let path = target.join(name);
        let kept = directory.path().join("kept");
        fs::rename(&path, &kept).unwrap();
        let check = |kind: &str, make: &dyn Fn()| {
            make();
            let error = Reader::open(&target).unwrap_err().to_string();
            assert!(error.contains(kind) && error.contains(name), "{error}");
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir(&path));
        };
        check("a symbolic link", &|| symlink(&kept, &path).unwrap());
        check("a symbolic link", &|| symlink("/dev/zero", &path).unwrap());
        check("a symbolic link", &|| symlink("nowhere", &path).unwrap());
        check("a directory", &|| fs::create_dir(&path).unwrap());
        check("a FIFO", &|| {
            let mode = rustix::fs::Mode::from(0o600);
            let kind = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        });
        check("a socket", &|| {
            std::os::unix::net::UnixListener::bind(&path).unwrap();
        });
        fs::rename(&kept, &path).unwrap();
        Reader::open(&target).unwrap();
    }
    assert!(begin.elapsed() < Duration::from_secs(60));
    // A link to the whole is fine.
    let link = directory.path().join("link");
    symlink(&target, &link).unwrap();
    image(&link).unwrap();
}

#[test]
fn a_memory_file_of_another_length_is_refused_wherever_it_is_cut() {
    let directory = tempfile::tempdir().unwrap();
    let target = snapshot(directory.path());
    let path = target.join("memory.bin");
    let bytes = fs::read(&path).unwrap();
    for pages in 0..11 {
        for len in [pages * P, pages * P + 1, pages * P + 4095] {
            fs::write(&path, &bytes[..len as usize]).unwrap();
            let outcome = image(&target);
            assert!(
                matches!(outcome, Err(ReadError::Header { .. })),
                "{len}: {outcome:?}"
            );
        }
    }
    // With the header at the end, but pages missing or added before.
    let (ram, header) = bytes.split_at(10 * P as usize);
    for ram in [&ram[P as usize..], &[ram, &ram[..P as usize]].concat(), &[]] {
        fs::write(&path, [ram, header].concat()).unwrap();
        let outcome = image(&target);
        assert!(
            matches!(outcome, Err(ReadError::Length { .. })),
            "{outcome:?}"
        );
    }
    fs::write(&path, [&bytes[..], &[0; P as usize]].concat()).unwrap();
    let outcome = image(&target);
    let no_magic = matches!(
        outcome,
        Err(ReadError::Header {
            source: HeaderError::Magic,
            ..
        })
    );
    assert!(no_magic, "{outcome:?}");
    fs::write(&path, &bytes).unwrap();
    image(&target).unwrap().verify(&mut on).unwrap();
}

#[test]
fn a_map_that_does_not_fit_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let target = increment(directory.path());
    let map = target.join("memory.map");
    assert_eq!(fs::read(&map).unwrap(), [0b11100, 0]);
    let with = |bytes: &[u8]| {
        fs::write(&map, bytes).unwrap();
        image(&target).unwrap_err()
    };
    for len in [0, 1, 3, 4096] {
        assert!(
            matches!(with(&vec![0; len]), ReadError::Length { .. }),
            "{len}"
        );
    }
    // It would take 512 MiB to read it.
    fs::File::create(&map).unwrap().set_len(512 << 20).unwrap();
    assert!(matches!(image(&target), Err(ReadError::Length { .. })));
    assert!(matches!(with(&[0b11100, 0x80]), ReadError::Map { .. }));
    assert!(matches!(with(&[0b01100, 0]), ReadError::OtherMap(_)));
    fs::remove_file(&map).unwrap();
    assert!(matches!(image(&target), Err(ReadError::Missing(_))));
    // A map where there should be none.
    let full = directory.path().join("snap");
    fs::write(full.join("memory.map"), [0xff, 3]).unwrap();
    assert!(matches!(image(&full), Err(ReadError::OtherMap(_))));
}

#[test]
fn a_state_is_read_up_to_a_bound() {
    let directory = tempfile::tempdir().unwrap();
    let target = snapshot(directory.path());
    let file = OpenOptions::new()
        .write(true)
        .open(target.join("state.json"))
        .unwrap();
    file.set_len(migration::directory::MAX_STATE).unwrap();
    let reader = Reader::open(&target).unwrap();
    assert_eq!(
        reader.state().unwrap().len() as u64,
        migration::directory::MAX_STATE
    );
    file.set_len(1 << 40).unwrap();
    assert!(matches!(reader.state(), Err(ReadError::TooLong { .. })));
}

#[test]
fn a_memory_file_of_another_snapshot_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| {
        let directory = directory.path().join(name);
        fs::create_dir(&directory).unwrap();
        snapshot(&directory)
    });
    let expected = crate::expected(&image(&a).unwrap());
    fs::rename(b.join("memory.bin"), a.join("memory.bin")).unwrap();
    let outcome = Image::open(&Reader::open(&a).unwrap(), Some(&expected), Bases::None);
    assert!(
        matches!(outcome, Err(ReadError::OtherSnapshot { .. })),
        "{outcome:?}"
    );
}

#[test]
fn whose_it_is_and_who_may_write_it_is_known() {
    let directory = tempfile::tempdir().unwrap();
    let target = increment(directory.path());
    let check = || Reader::open(&target).unwrap().belongs_to_caller();
    check().unwrap();
    for name in ["", "state.json", "memory.bin", "memory.map"] {
        let path = target.join(name);
        let before = fs::metadata(&path).unwrap().permissions();
        for mode in [0o020, 0o002] {
            let mode = before.mode() | mode;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let outcome = check();
            assert!(
                matches!(outcome, Err(ReadError::Untrusted { .. })),
                "{name} {mode:o}"
            );
        }
        fs::set_permissions(&path, before).unwrap();
        // Only root can give files away.
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12345), None).unwrap();
            let error = check().unwrap_err().to_string();
            assert!(error.contains("12345"), "{error}");
            std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        }
    }
    check().unwrap();
}

#[test]
fn a_file_that_is_being_written_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let target = snapshot(directory.path());
    let file = fs::File::open(target.join("memory.bin")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(matches!(image(&target), Err(ReadError::InUse(_))));
    drop(file);
    let image = image(&target).unwrap();
    let (lowest, _) = image.lowest().unwrap();
    let file = fs::File::open(target.join("memory.bin")).unwrap();
    let exclusive =
        || rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    drop(image);
    assert!(exclusive().is_err(), "still mapped, perhaps");
    drop(lowest);
    exclusive().unwrap();
}

/// Whatever bytes a header has: an error, or an image of a length that is there.
#[test]
fn no_header_makes_it_read_beyond_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let target = increment(directory.path());
    let path = target.join("memory.bin");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let at = 10 * P;
    let mut header = [0; P as usize];
    file.read_exact_at(&mut header, at).unwrap();
    for (offset, values) in [(100, 0..66), (96, 0..66), (113, 0..255), (121, 0..255)] {
        for value in values {
            let mut changed = header;
            changed[offset] = value as u8;
            let sum = blake3::hash(&changed[..4064]);
            changed[4064..].copy_from_slice(sum.as_bytes());
            file.write_all_at(&changed, at).unwrap();
            if changed != header {
                assert!(image(&target).is_err(), "{offset} {value}");
            }
        }
    }
    file.write_all_at(&header, at).unwrap();
    image(&target).unwrap();
}
