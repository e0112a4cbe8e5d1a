//! Locks of disks, and files that come from another process. A clone of a descriptor stands for the one that went over a
//! socket: both share the open file description, which is what has the lock.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::*;

fn open(file: &NamedTempFile, read_only: bool) -> Result<RawFile, BlockError> {
    RawFile::open(file.path(), read_only)
}

fn is_locked(file: &NamedTempFile) -> bool {
    matches!(open(file, false), Err(BlockError::InUse(_)))
}

/// What another process gets.
fn lend(disk: &RawFile) -> OwnedFd {
    disk.set_lent(true);
    disk.duplicate().unwrap()
}

fn received(file: impl Into<OwnedFd>, read_only: bool) -> Result<RawFile, BlockError> {
    RawFile::received(file.into(), Path::new("theirs"), read_only)
}

#[test]
fn a_lock_is_taken_and_released_as_often_as_is_asked() {
    let file = image();
    let disk = RawFile::open_unlocked(file.path(), false).unwrap();
    assert!(!is_locked(&file));
    for _ in 0..2 {
        assert!(disk.take_lock().unwrap());
        assert!(!disk.take_lock().unwrap());
        assert!(is_locked(&file));
        disk.release_lock();
        disk.release_lock();
        assert!(!is_locked(&file));
    }
}

#[test]
fn a_disk_that_somebody_has_is_opened_and_its_lock_taken_when_it_is_free() {
    let file = image();
    let source = open(&file, false).unwrap();
    let destination = RawFile::open_unlocked(file.path(), false).unwrap();
    assert!(matches!(destination.take_lock(), Err(BlockError::InUse(p)) if p == file.path()));
    source.release_lock();
    assert!(destination.take_lock().unwrap());
    assert!(matches!(source.take_lock(), Err(BlockError::InUse(_))));
    destination.release_lock();
    assert!(source.take_lock().unwrap());
}

#[test]
fn the_lock_of_a_disk_goes_with_its_descriptor() {
    for read_only in [false, true] {
        let file = image();
        let source = open(&file, read_only).unwrap();
        let destination = received(lend(&source), read_only).unwrap();
        assert_eq!(destination.len(), SECTORS * 512);
        // Its lock is that of the destination, too.
        source.release_lock();
        assert!(is_locked(&file));
        drop(source);
        assert!(is_locked(&file));
        destination.release_lock();
        assert!(!is_locked(&file));
        assert!(destination.take_lock().unwrap());
        drop(destination);
        assert!(!is_locked(&file));
    }
}

#[test]
fn a_destination_that_fails_leaves_the_lock_with_the_source() {
    let file = image();
    let source = open(&file, false).unwrap();
    drop(received(lend(&source), false).unwrap());
    assert!(is_locked(&file));
    source.set_lent(false);
    source.release_lock();
    assert!(!is_locked(&file));
}

#[test]
fn a_received_file_that_another_process_locked_is_in_use() {
    let file = image();
    let _writer = open(&file, false).unwrap();
    let stranger = File::options()
        .read(true)
        .write(true)
        .open(file.path())
        .unwrap();
    assert!(
        matches!(received(stranger, false), Err(BlockError::InUse(p)) if p == Path::new("theirs"))
    );
}

#[test]
fn a_received_file_is_checked_like_one_that_was_opened() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let sized = |len| {
        File::create(&path).unwrap().set_len(len).unwrap();
        File::options().read(true).write(true).open(&path).unwrap()
    };
    assert!(matches!(
        received(sized(0), false),
        Err(BlockError::Empty(_))
    ));
    assert!(matches!(
        received(sized(513), false),
        Err(BlockError::Length { len: 513, .. })
    ));
    let directory = File::open(dir.path()).unwrap();
    assert!(matches!(
        received(directory, true),
        Err(BlockError::Directory(_))
    ));
    let null = File::options().read(true).write(true).open("/dev/null");
    assert!(matches!(
        received(null.unwrap(), false),
        Err(BlockError::Kind(_))
    ));
    let (pipe, _) = rustix::pipe::pipe().unwrap();
    assert!(matches!(received(pipe, true), Err(BlockError::Kind(_))));
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(received(socket, false), Err(BlockError::Kind(_))));

    drop(sized(512));
    let with = |read, write, flags| {
        let mut options = OpenOptions::new();
        options.read(read).write(write).custom_flags(flags);
        options.open(&path).unwrap()
    };
    let refused = |file: File, read_only| {
        let outcome = received(file, read_only);
        assert!(
            matches!(outcome, Err(BlockError::Received { .. })),
            "{outcome:?}"
        );
    };
    refused(with(true, false, 0), false);
    refused(with(false, true, 0), false);
    refused(with(true, true, 0), true);
    refused(with(false, true, 0), true);
    refused(with(true, false, libc::O_PATH), true);
    refused(with(true, false, libc::O_PATH), false);
    refused(with(true, true, libc::O_APPEND), false);
    received(with(true, true, 0), false).unwrap();
    received(with(true, false, 0), true).unwrap();
}

#[test]
fn a_received_disk_reads_and_writes() {
    let file = image();
    let source = open(&file, false).unwrap();
    let destination = received(lend(&source), false).unwrap();
    drop(source);
    let config = BlockConfig::new("theirs");
    let device = Block::with_backend(Arc::new(destination), &config).unwrap();
    let mut driver = Driver::live(device, ALL);
    assert_eq!(read(&mut driver, 7, 1), [7; 512]);
}
