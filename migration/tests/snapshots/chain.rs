//! Snapshots of what changed since another one.

use std::fs;
use std::path::PathBuf;

use migration::{
    Bases, Existing, Expected, GuestPages, Image, PageSet, ReadError, Reader, WriteError,
};
use proptest::prelude::*;

use crate::guest::{Memory, P, layout};
use crate::{expected, on, open, save, save_all, scratch};

/// Writes of one generation: to which page, and what. Zero makes the page zero.
fn generations() -> impl Strategy<Value = Vec<Vec<(u64, u64)>>> {
    let write = (0u64..130, prop_oneof![Just(0u64), 1u64..]);
    proptest::collection::vec(proptest::collection::vec(write, 0..40), 5)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// Five deep: each is the memory as it was then, mapped or read, and a page that was zero then is zero.
    #[test]
    fn each_generation_is_the_memory_of_its_time(generations in generations()) {
        let directory = scratch();
        let layout = layout(&[50, 80]);
        let memory = Memory::new(&layout);
        (0..130).step_by(2).for_each(|page| memory.fill(page, page + 1));
        memory.take();
        let mut saved: Vec<(PathBuf, Vec<u8>)> = Vec::new();
        for (n, writes) in generations.into_iter().enumerate() {
            for (page, value) in writes {
                memory.fill(page, value);
            }
            let path = directory.path().join(n.to_string());
            let changed = memory.take();
            let base = saved.last().map(|(path, _)| path.as_path());
            let pages = if base.is_some() { changed } else { PageSet::full(&layout) };
            let (id, _) = save(&memory, &path, base, &pages, Existing::Refuse).unwrap();
            let image = open(&path);
            prop_assert_eq!((image.id(), image.layers().len()), (id, n + 1));
            prop_assert_eq!(image.layers()[0].header.pages, pages.count());
            saved.push((path, memory.bytes()));
        }
        for (path, bytes) in &saved {
            let image = open(path);
            image.verify(&mut on).unwrap();
            let loaded = Memory::new(&layout);
            image.load(&loaded, &mut on).unwrap();
            prop_assert!(loaded.bytes() == *bytes);
            let (file, offsets) = image.lowest().unwrap();
            let mapped = Memory::of(&layout, &file, &offsets);
            let over = image.overlay(&mapped, &mut on).unwrap();
            let origins = image.origins();
            let below = origins.last().unwrap().count();
            prop_assert_eq!(over, 130 - below);
            prop_assert!(mapped.bytes() == *bytes);
            let mut page = [0; P as usize];
            for (number, bytes) in (0..).zip(bytes.chunks(P as usize)) {
                image.read_page(number, &mut page).unwrap();
                prop_assert!(page[..] == *bytes);
            }
        }
    }
}

/// Full snapshots and those based on them, in directories beside each other.
fn pair(directory: &std::path::Path) -> (Memory, PathBuf, PathBuf) {
    let memory = Memory::new(&layout(&[20]));
    (0..20).for_each(|page| memory.fill(page, page + 1));
    let (full, increment) = (directory.join("full"), directory.join("increment"));
    save_all(&memory, &full);
    memory.take();
    memory.fill(3, 99);
    memory.fill(4, 0);
    let pages = memory.take();
    save(&memory, &increment, Some(&full), &pages, Existing::Refuse).unwrap();
    (memory, full, increment)
}

#[test]
fn an_increment_has_its_pages_only() {
    let directory = tempfile::tempdir().unwrap();
    let (_, _, increment) = pair(directory.path());
    let image = open(&increment);
    let top = &image.layers()[0];
    assert_eq!((top.header.pages, top.header.data_pages), (2, 1));
    assert_eq!(
        fs::read(increment.join("memory.map")).unwrap(),
        [0b11000, 0, 0]
    );
    assert_eq!(
        top.header.base.as_ref().unwrap().path,
        PathBuf::from("../full")
    );
}

#[test]
fn an_increment_of_nothing_is_its_base() {
    let directory = tempfile::tempdir().unwrap();
    let (memory, _, increment) = pair(directory.path());
    let path = directory.path().join("nothing");
    let pages = PageSet::empty(memory.layout());
    save(&memory, &path, Some(&increment), &pages, Existing::Refuse).unwrap();
    let loaded = Memory::new(memory.layout());
    open(&path).load(&loaded, &mut on).unwrap();
    assert!(loaded.bytes() == memory.bytes());
}

#[test]
fn the_map_is_part_of_the_digest() {
    let directory = tempfile::tempdir().unwrap();
    let (_, _, increment) = pair(directory.path());
    fs::write(increment.join("memory.map"), [0b101000, 0, 0]).unwrap();
    let outcome = open(&increment).verify(&mut on);
    assert!(matches!(outcome, Err(ReadError::Changed(_))), "{outcome:?}");
}

#[test]
fn a_chain_that_moved_together_is_found_and_one_that_did_not_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let (_, full, increment) = pair(directory.path());
    let elsewhere = directory.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let (full_there, increment_there) = (elsewhere.join("full"), elsewhere.join("increment"));
    fs::rename(&increment, &increment_there).unwrap();
    let reader = Reader::open(&increment_there).unwrap();
    let outcome = Image::open(&reader, None, Bases::Follow);
    assert!(matches!(outcome, Err(ReadError::Missing(_))), "{outcome:?}");
    // Whoever says where it is need not move it.
    let named = [increment_there.clone(), full.clone()];
    Image::open(&reader, None, Bases::Named(&named)).unwrap();
    let outcome = Image::open(&reader, None, Bases::Named(&named[..1]));
    assert!(
        matches!(outcome, Err(ReadError::NoBase { .. })),
        "{outcome:?}"
    );
    let outcome = Image::open(&reader, None, Bases::None);
    assert!(
        matches!(outcome, Err(ReadError::HasBase { .. })),
        "{outcome:?}"
    );
    fs::rename(&full, &full_there).unwrap();
    Image::open(&reader, None, Bases::Follow).unwrap();
}

#[test]
fn a_base_that_is_another_snapshot_now_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (memory, full, increment) = pair(directory.path());
    let all = PageSet::full(memory.layout());
    save(&memory, &full, None, &all, Existing::Replace).unwrap();
    let outcome = Image::open(&Reader::open(&increment).unwrap(), None, Bases::Follow);
    assert!(
        matches!(outcome, Err(ReadError::OtherSnapshot { .. })),
        "{outcome:?}"
    );
}

#[test]
fn a_base_of_somebody_else_is_not_followed() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let (memory, full, increment) = pair(directory.path());
    fs::set_permissions(full.join("memory.bin"), fs::Permissions::from_mode(0o620)).unwrap();
    let reader = Reader::open(&increment).unwrap();
    reader.belongs_to_caller().unwrap();
    let outcome = Image::open(&reader, None, Bases::Follow);
    assert!(
        matches!(outcome, Err(ReadError::Untrusted { .. })),
        "{outcome:?}"
    );
    // Somebody has named it.
    Image::open(&reader, None, Bases::Named(&[full])).unwrap();
    let path = directory.path().join("next");
    let pages = PageSet::empty(memory.layout());
    let outcome = save(&memory, &path, Some(&increment), &pages, Existing::Refuse);
    assert!(matches!(outcome, Err(WriteError::Base(_))), "{outcome:?}");
}

#[test]
fn what_a_snapshot_needs_is_not_replaced_by_it() {
    let directory = tempfile::tempdir().unwrap();
    let (memory, full, increment) = pair(directory.path());
    let pages = PageSet::empty(memory.layout());
    let link = directory.path().join("link");
    std::os::unix::fs::symlink(&increment, &link).unwrap();
    for (target, base) in [
        (&full, &full),
        (&full, &increment),
        (&increment, &increment),
        (&increment, &link),
    ] {
        let outcome = save(&memory, target, Some(base), &pages, Existing::Replace);
        assert!(
            matches!(outcome, Err(WriteError::ReplacesBase(_))),
            "{outcome:?}"
        );
    }
    save(&memory, &increment, Some(&full), &pages, Existing::Replace).unwrap();
    assert_eq!(open(&increment).layers().len(), 2);
}

#[test]
fn a_chain_has_an_end() {
    let directory = scratch();
    let memory = Memory::new(&layout(&[2]));
    let mut base = directory.path().join("0");
    save_all(&memory, &base);
    let pages = PageSet::empty(memory.layout());
    for depth in 1..=64 {
        let path = directory.path().join(depth.to_string());
        match save(&memory, &path, Some(&base), &pages, Existing::Refuse) {
            Ok(_) => base = path,
            Err(WriteError::TooDeep(63)) if depth == 64 => break,
            other => panic!("{depth}: {other:?}"),
        }
    }
    assert_eq!(base, directory.path().join("63"));
    assert_eq!(open(&base).layers().len(), 64);
}

#[test]
fn an_image_that_is_not_the_expected_one_is_refused_before_a_page_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let (_, full, increment) = pair(directory.path());
    let right = expected(&open(&increment));
    let other = expected(&open(&full));
    let reader = Reader::open(&increment).unwrap();
    let check = |expected: &Expected| Image::open(&reader, Some(expected), Bases::Follow);
    check(&right).unwrap();
    assert!(matches!(
        check(&other),
        Err(ReadError::OtherSnapshot { .. })
    ));
    let digest = Expected {
        digest: other.digest,
        ..right.clone()
    };
    assert!(matches!(check(&digest), Err(ReadError::OtherDigest(_))));
    let ram = Expected {
        layout: layout(&[19]),
        ..right
    };
    assert!(matches!(check(&ram), Err(ReadError::OtherLayout(_))));
}

#[test]
fn a_base_of_a_guest_with_other_ram_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (_, full, _) = pair(directory.path());
    let other = Memory::new(&layout(&[21]));
    let pages = PageSet::empty(other.layout());
    let path = directory.path().join("other");
    let outcome = save(&other, &path, Some(&full), &pages, Existing::Refuse);
    assert!(matches!(outcome, Err(WriteError::Base(_))), "{outcome:?}");
}
