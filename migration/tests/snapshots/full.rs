//! One snapshot of everything.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};

use migration::{Bases, Image, PageSet, ReadError, Reader};

use crate::guest::{Memory, P, layout};
use crate::{expected, names, on, open, save_all};

#[test]
fn all_of_memory_is_there_at_the_offsets_of_its_ranges_and_zero_pages_are_holes() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = Memory::new(&layout(&[700, 64, 300]));
    for page in [0, 1, 2, 300, 699, 700, 763, 764, 1063] {
        memory.write(page, page % 512, page + 1);
    }
    let id = save_all(&memory, &target);

    assert_eq!(names(directory.path()), ["snap"]);
    assert_eq!(names(&target), ["memory.bin", "state.json"]);
    let bin = fs::read(target.join("memory.bin")).unwrap();
    let bytes = memory.bytes();
    assert_eq!(bin.len() as u64, 1065 * P);
    assert!(bin[..bytes.len()] == bytes[..]);
    let blocks = fs::metadata(target.join("memory.bin")).unwrap().blocks();
    // Nine pages of data, one of header; and what the file system needs.
    assert!(blocks * 512 <= 40 * P, "{blocks}");
    for file in ["memory.bin", "state.json"] {
        let mode = fs::metadata(target.join(file)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o7777, 0o600, "{file}");
    }
    let mode = fs::metadata(&target).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o700);

    let image = open(&target);
    assert_eq!((image.id(), image.header().data_pages), (id, 9));
    assert_eq!(image.header().pages, 1064);
    let data = image.verify(&mut on).unwrap();
    assert_eq!(data[0].count(), 9);
    let reader = Reader::open(&target).unwrap();
    assert_eq!(
        reader.state().unwrap(),
        format!("{{\"id\":\"{id}\"}}").into_bytes()
    );
    let again = Image::open(&reader, Some(&expected(&image)), Bases::None).unwrap();
    let mut page = [0; P as usize];
    again.read_page(300, &mut page).unwrap();
    assert!(page[..] == bytes[300 * P as usize..301 * P as usize]);
    assert!(matches!(
        again.read_page(1064, &mut page),
        Err(ReadError::NoPage(1064))
    ));
}

#[test]
fn it_is_mapped_or_read_and_is_what_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let layout = layout(&[70, 30]);
    let memory = Memory::new(&layout);
    for page in (0..100).filter(|page| page % 3 == 0) {
        memory.fill(page, page + 1);
    }
    save_all(&memory, &target);
    let image = open(&target);
    let (file, offsets) = image.lowest().unwrap();
    let mapped = Memory::of(&layout, &file, &offsets);
    assert_eq!(image.overlay(&mapped, &mut on).unwrap(), 0);
    let loaded = Memory::new(&layout);
    assert_eq!(image.load(&loaded, &mut on).unwrap(), 100);
    drop(image);
    assert!(mapped.bytes() == memory.bytes());
    assert!(loaded.bytes() == memory.bytes());
}

#[test]
fn what_a_guest_does_not_occupy_is_not_looked_at() {
    let directory = tempfile::tempdir().unwrap();
    let layout = layout(&[600, 40]);
    let mut memory = Memory::new(&layout);
    for page in 0..640 {
        memory.write(page, 0, page + 1);
    }
    // It lies, so that what is looked at shows.
    let mut occupied = PageSet::empty(&layout);
    occupied.insert_run(3, 400);
    occupied.insert_run(599, 3);
    memory.occupied = Some(occupied.clone());
    save_all(&memory, &directory.path().join("snap"));
    let image = open(&directory.path().join("snap"));
    assert_eq!(image.verify(&mut on).unwrap(), [occupied]);
    assert_eq!(image.header().data_pages, 403);
}

#[test]
fn a_digest_is_of_the_contents_wherever_the_holes_are() {
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("snap");
    let memory = Memory::new(&layout(&[1000]));
    (0..1000)
        .step_by(7)
        .for_each(|page| memory.fill(page, page + 1));
    save_all(&memory, &target);
    // A copy without holes.
    let bin = target.join("memory.bin");
    let bytes = fs::read(&bin).unwrap();
    fs::write(&bin, &bytes).unwrap();
    let image = open(&target);
    image.verify(&mut on).unwrap();
    drop(image);

    // Any bit of it matters, also one in a page that was zero.
    let file = fs::OpenOptions::new().write(true).open(&bin).unwrap();
    for at in [0, 7 * P, 7 * P + 4095, 8 * P, 999 * P + 7] {
        let old = bytes[at as usize];
        file.write_all_at(&[old ^ 1], at).unwrap();
        let outcome = open(&target).verify(&mut on);
        assert!(matches!(outcome, Err(ReadError::Changed(_))), "{at}");
        file.write_all_at(&[old], at).unwrap();
    }
    open(&target).verify(&mut on).unwrap();
    // Pages that changed places.
    let (a, b) = (&bytes[..P as usize], &bytes[7 * P as usize..8 * P as usize]);
    file.write_all_at(b, 0).unwrap();
    file.write_all_at(a, 7 * P).unwrap();
    let outcome = open(&target).verify(&mut on);
    assert!(matches!(outcome, Err(ReadError::Changed(_))));
}

#[test]
fn two_snapshots_of_one_memory_have_different_ids_and_digests() {
    let directory = tempfile::tempdir().unwrap();
    let memory = Memory::new(&layout(&[10]));
    let [a, b] = ["a", "b"].map(|name| {
        let path = directory.path().join(name);
        save_all(&memory, &path);
        open(&path).header().clone()
    });
    assert_ne!(a.id, b.id);
    assert_ne!(a.digest, b.digest);
}
