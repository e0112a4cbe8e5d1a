//! Writers that die, and disks that are full: in processes of their own, which run this test program again.

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use migration::{Existing, Guest, GuestPages, PageSet, WriteError, Writer};

use crate::guest::{Memory, P, layout};
use crate::{names, on, open, save, save_all};

const DIRECTORY: &str = "TERN_TEST_SNAPSHOT_DIRECTORY";

fn memory() -> Memory {
    Memory::new(&layout(&[400]))
}

/// Generation `n` of what the writers write: each word of each third page.
fn scribble(memory: &Memory, n: u64) {
    (0..400).for_each(|page| memory.fill(page, (page + n) % 3 * n));
}

/// Runs the test called `name` in another process, with `directory`.
fn again(name: &str, directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Not a test by itself: replaces one snapshot by the next, for ever.
#[test]
fn writer() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let target = Path::new(&directory).join("snap");
    let memory = memory();
    println!("\nready");
    for n in 2.. {
        scribble(&memory, n);
        let pages = PageSet::full(memory.layout());
        save(&memory, &target, None, &pages, Existing::Replace).unwrap();
    }
}

#[test]
fn a_writer_that_is_killed_leaves_a_whole_snapshot_and_what_it_left_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = memory();
    scribble(&memory, 1);
    save_all(&memory, &target);
    let mut left = 0;
    for round in 0u64..25 {
        let mut child = again("killed::writer", directory.path());
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut lines = output.lines().map_while(Result::ok);
        assert!(lines.any(|line| line == "ready"));
        // At some moment of one of its first snapshots.
        std::thread::sleep(Duration::from_micros(round * 7919 % 40_000));
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(9));

        let image = open(&target);
        image.verify(&mut on).unwrap();
        let mut first = [0; P as usize];
        image.read_page(1, &mut first).unwrap();
        // Page 1 of generation n has (1 + n) mod 3 * n; each word of all pages must be of the same one.
        let loaded = Memory::new(memory.layout());
        image.load(&loaded, &mut on).unwrap();
        let n = (0..3).map(|page| loaded.read(page, 0)).max().unwrap() / 2;
        scribble(&memory, n);
        assert!(
            loaded.bytes() == memory.bytes(),
            "round {round}, generation {n}"
        );
        left += names(directory.path()).len() - 1;
    }
    assert!(
        names(directory.path()).len() <= 2,
        "each removes what the one before left"
    );
    assert!(left > 0, "none was killed while it wrote");
    save(
        &memory,
        &target,
        None,
        &PageSet::full(memory.layout()),
        Existing::Replace,
    )
    .unwrap();
    assert_eq!(names(directory.path()), ["snap"]);
}

/// Files of this process cannot be longer.
fn limit(bytes: Option<u64>) {
    let limit = rustix::process::Rlimit {
        current: bytes,
        maximum: None,
    };
    rustix::process::setrlimit(rustix::process::Resource::Fsize, limit).unwrap();
}

/// Not a test by itself: has a limit on the length of files, which acts like a full disk.
#[test]
fn limited() {
    let Some(directory) = std::env::var_os(DIRECTORY) else {
        return;
    };
    // SAFETY: ignoring a signal is always sound; it is what makes the limit an error.
    #[allow(unsafe_code)]
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN)
    };
    let target = Path::new(&directory).join("snap");
    let memory = memory();
    let full = PageSet::full(memory.layout());
    scribble(&memory, 1);
    let first = save_all(&memory, &target);
    memory.take();
    for pages in [0, 1, 150, 390, 400] {
        limit(Some(pages * P));
        // As a VMM does: what was taken is put back unless all of it is on disk.
        scribble(&memory, 2 + pages);
        let taken = memory.take();
        let outcome = save(&memory, &target, None, &full, Existing::Replace);
        assert!(matches!(outcome, Err(WriteError::Io { .. })), "{outcome:?}");
        memory.put_back(&taken);
        assert_eq!(names(Path::new(&directory)), ["snap"], "{pages}");
        let image = open(&target);
        assert_eq!(image.id(), first);
        image.verify(&mut on).unwrap();
    }
    limit(None);
    // Nothing of what the failed ones had taken is lost.
    let next = Path::new(&directory).join("next");
    let writer = Writer::create(&next, Existing::Refuse).unwrap();
    let mut file = writer.memory(memory.layout(), Some(&target)).unwrap();
    let taken = memory.take();
    file.pass(&memory, &taken, Guest::Paused, &mut on).unwrap();
    let file = file.finish(&mut on).unwrap();
    writer.commit(b"{}", file).unwrap();
    let loaded = Memory::new(memory.layout());
    open(&next).load(&loaded, &mut on).unwrap();
    assert!(loaded.bytes() == memory.bytes());
}

#[test]
fn a_disk_that_is_full_leaves_what_was_there_and_loses_no_page() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = again("killed::limited", directory.path());
    assert!(child.wait().unwrap().success());
    assert_eq!(names(directory.path()), ["next", "snap"]);
}

/// Where this account may mount: a file system that is really full.
#[test]
fn no_space_says_what_was_needed() {
    let directory = tempfile::tempdir().unwrap();
    let small = directory.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=1m", "none"])
        .arg(&small)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if !mounted {
        return;
    }
    let memory = memory();
    (0..400).for_each(|page| memory.fill(page, 7));
    let pages = PageSet::full(memory.layout());
    let outcome = save(&memory, &small.join("snap"), None, &pages, Existing::Refuse);
    let left = names(&small);
    let fits = memory;
    (20..400).for_each(|page| fits.fill(page, 0));
    let second = save(&fits, &small.join("snap"), None, &pages, Existing::Refuse);
    Command::new("umount").arg(&small).status().unwrap();
    let Err(WriteError::NoSpace { needed, free, .. }) = outcome else {
        panic!("{outcome:?}");
    };
    assert_eq!(needed, 401 * P);
    assert!(free <= 1 << 20, "{free}");
    assert_eq!(left, [""; 0]);
    second.unwrap();
}
