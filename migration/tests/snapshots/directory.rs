//! There whole or not at all.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use migration::{Existing, Guest, GuestPages, PageSet, WriteError, Writer};

use crate::guest::{Memory, layout};
use crate::{names, on, open, save, save_all};

fn memory() -> Memory {
    let memory = Memory::new(&layout(&[16]));
    (0..16).for_each(|page| memory.fill(page, page + 1));
    memory
}

fn replace(memory: &Memory, target: &Path) -> Result<(), WriteError> {
    let pages = PageSet::full(memory.layout());
    save(memory, target, None, &pages, Existing::Replace).map(|_| ())
}

#[test]
fn nothing_is_there_before_it_is_committed_and_nothing_is_left_if_it_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = memory();
    let all = PageSet::full(memory.layout());
    let writer = Writer::create(&target, Existing::Refuse).unwrap();
    let mut file = writer.memory(memory.layout(), None).unwrap();
    file.pass(&memory, &all, Guest::Running, &mut on).unwrap();
    assert!(!target.exists());
    assert_eq!(names(directory.path()).len(), 1, "the draft");
    // Also if the writer goes first.
    drop(writer);
    assert_eq!(names(directory.path()).len(), 1);
    let finished = file.finish(&mut on).unwrap();
    drop(finished);
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn what_is_there_is_not_touched_unless_it_is_to_be_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = memory();
    let first = save_all(&memory, &target);
    let all = PageSet::full(memory.layout());
    let outcome = save(&memory, &target, None, &all, Existing::Refuse);
    assert!(matches!(outcome, Err(WriteError::Exists(_))));
    assert_eq!(open(&target).id(), first);
    let (second, committed) = save(&memory, &target, None, &all, Existing::Replace).unwrap();
    assert!(committed.replaced);
    assert_eq!(committed.path, target.canonicalize().unwrap());
    assert!((17 * 4096..40 * 4096).contains(&committed.disk_bytes));
    assert_eq!(open(&target).id(), second);
    assert_eq!(names(directory.path()), ["snap"]);
    let (_, committed) = save(
        &memory,
        &directory.path().join("new"),
        None,
        &all,
        Existing::Replace,
    )
    .unwrap();
    assert!(!committed.replaced);
}

#[test]
fn what_appears_while_it_is_written_is_not_touched() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = memory();
    let all = PageSet::full(memory.layout());
    for existing in [Existing::Refuse, Existing::Replace] {
        let writer = Writer::create(&target, existing).unwrap();
        let mut file = writer.memory(memory.layout(), None).unwrap();
        file.pass(&memory, &all, Guest::Running, &mut on).unwrap();
        let file = file.finish(&mut on).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("mine"), "mine").unwrap();
        let outcome = writer.commit(b"{}", file);
        assert!(
            matches!(
                outcome,
                Err(WriteError::Exists(_) | WriteError::NotASnapshot { .. })
            ),
            "{outcome:?}"
        );
        assert_eq!(names(directory.path()), ["snap"]);
        assert_eq!(names(&target), ["mine"]);
        fs::remove_dir_all(&target).unwrap();
    }
}

#[test]
fn what_is_no_snapshot_is_never_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    let at = |name: &str| directory.path().join(name);
    save_all(&memory, &at("good"));
    fs::write(at("file"), "mine").unwrap();
    fs::create_dir(at("empty")).unwrap();
    symlink(at("good"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    for name in ["more", "cut", "no-state"] {
        save_all(&memory, &at(name));
    }
    fs::write(at("more").join("notes.txt"), "mine").unwrap();
    fs::remove_file(at("no-state").join("state.json")).unwrap();
    let cut = fs::OpenOptions::new()
        .write(true)
        .open(at("cut/memory.bin"));
    cut.unwrap().set_len(4096 * 16).unwrap();
    for name in [
        "file", "empty", "link", "dangling", "more", "cut", "no-state",
    ] {
        let before = fs::symlink_metadata(at(name)).unwrap();
        let outcome = replace(&memory, &at(name));
        assert!(
            matches!(outcome, Err(WriteError::NotASnapshot { .. })),
            "{name}: {outcome:?}"
        );
        let after = fs::symlink_metadata(at(name)).unwrap();
        assert_eq!(
            before.modified().unwrap(),
            after.modified().unwrap(),
            "{name}"
        );
    }
    assert_eq!(names(&at("more")).len(), 3);
    replace(&memory, &at("good")).unwrap();
    open(&at("link"));
}

#[test]
fn names_that_cannot_be_made_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    for name in ["..", "nowhere/snap", "file/snap"] {
        let outcome = Writer::create(&directory.path().join(name), Existing::Refuse);
        assert!(outcome.is_err(), "{name}");
    }
    assert!(matches!(
        Writer::create("/".as_ref(), Existing::Refuse),
        Err(WriteError::Name(_))
    ));
    assert_eq!(names(directory.path()), ["file"]);
}

#[test]
fn memory_of_another_snapshot_is_not_committed() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    let [a, b] = ["a", "b"]
        .map(|name| Writer::create(&directory.path().join(name), Existing::Refuse).unwrap());
    let mut file = a.memory(memory.layout(), None).unwrap();
    let all = PageSet::full(memory.layout());
    file.pass(&memory, &all, Guest::Running, &mut on).unwrap();
    let file = file.finish(&mut on).unwrap();
    assert!(matches!(
        b.commit(b"{}", file),
        Err(WriteError::OtherMemory)
    ));
    assert!(a.memory(memory.layout(), None).is_err(), "one memory each");
}

#[test]
fn drafts_of_writers_that_are_gone_are_removed_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let memory = memory();
    // No process has a number above this.
    let dead = ".tern-snapshot-4194305-0123456789abcdef";
    let alive = format!(".tern-snapshot-{}-0123456789abcdef", std::process::id());
    let locked = ".tern-snapshot-4194306-0123456789abcdef";
    let full = ".tern-snapshot-4194307-0123456789abcdef";
    let other = ".tern-snapshot-4194308";
    let made = tempfile::tempdir_in(directory.path()).unwrap();
    for name in [dead, &alive, locked, full, other] {
        // Elsewhere first: writing beside one removes it.
        let there = made.path().join("snap");
        save_all(&memory, &there);
        fs::rename(there, directory.path().join(name)).unwrap();
    }
    made.close().unwrap();
    fs::write(directory.path().join(full).join("mine"), "mine").unwrap();
    let file = ".tern-snapshot-4194309-0123456789abcdef";
    fs::write(directory.path().join(file), "mine").unwrap();
    let link = ".tern-snapshot-4194310-0123456789abcdef";
    symlink(other, directory.path().join(link)).unwrap();
    let lock = fs::File::open(directory.path().join(locked)).unwrap();
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockShared).unwrap();

    let first = Writer::create(&directory.path().join("a"), Existing::Refuse).unwrap();
    let second = Writer::create(&directory.path().join("b"), Existing::Refuse).unwrap();
    drop(first);
    let left: Vec<_> = names(directory.path());
    assert!(!left.contains(&dead.to_string()), "{left:?}");
    for name in [&*alive, locked, full, other, file, link] {
        assert!(left.contains(&name.to_string()), "{name} {left:?}");
    }
    assert_eq!(left.len(), 7, "and the second draft: {left:?}");
    assert_eq!(names(&directory.path().join(full)), ["mine"]);
    open(&directory.path().join(other));
    drop(second);
}
