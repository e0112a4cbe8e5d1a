//! Snapshots that are looked at.

use std::fs::{self, File};
use std::ops::ControlFlow;

use migration::directory::MEMORY;
use migration::{Existing, Guest, GuestPages, PAGE_SIZE, PageSet, RamLayout, Writer};

use super::memory::{Extents, extents};
use super::*;
use crate::layout;
use crate::snapshot::format::hex::HexBytes;
use crate::snapshot::format::state::tests::sample;
use crate::snapshot::format::write;
use crate::snapshot::overrides::Overrides;
use crate::snapshot::restore::Source;

/// Pages of the guest: as few as one can have.
const PAGES: usize = (layout::MIN_RAM / PAGE_SIZE) as usize;

#[derive(Clone)]
#[repr(align(4096))]
struct Page {
    _bytes: [u8; 4096],
}

/// A guest of which page 5 has data.
struct Ram {
    layout: RamLayout,
    pages: Vec<Page>,
}

impl Ram {
    fn new() -> Self {
        let mut pages = vec![Page { _bytes: [0; 4096] }; PAGES];
        pages[5] = Page { _bytes: [1; 4096] };
        Self {
            layout: RamLayout::new([(0, 4096 * PAGES as u64)]).unwrap(),
            pages,
        }
    }
}

#[allow(unsafe_code)]
// SAFETY: the one range is `pages`, whole pages that live as long as this does; nobody writes to them.
unsafe impl GuestPages for Ram {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn host_address(&self, _: usize) -> *mut u8 {
        self.pages.as_ptr().cast::<u8>().cast_mut()
    }
}

/// Writes a snapshot of a state that was changed.
fn save(path: &Path, base: Option<&Path>, change: impl FnOnce(&mut State)) {
    let ram = Ram::new();
    let mut root = sample();
    root.machine.memory = layout::MIN_RAM;
    change(&mut root);
    let progress = &mut |_| ControlFlow::Continue(());
    let writer = Writer::create(path, Existing::Refuse).unwrap();
    let mut memory = writer.memory(&ram.layout, base).unwrap();
    let mut pages = PageSet::full(&ram.layout);
    if base.is_some() {
        pages = PageSet::empty(&ram.layout);
        pages.insert(5);
        pages.insert(6);
    }
    memory.pass(&ram, &pages, Guest::Paused, progress).unwrap();
    let memory = memory.finish(progress).unwrap();
    root.id = HexBytes(memory.id().0.to_vec());
    root.memory.digest = HexBytes(memory.digest().0.to_vec());
    writer.commit(&write(&root).unwrap(), memory).unwrap();
}

fn snapshot(change: impl FnOnce(&mut State)) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    save(&path, None, change);
    (directory, path)
}

fn inspect(directory: &Path, other: Option<&Path>) -> Inspect {
    Inspect {
        directory: directory.to_owned(),
        other: other.map(Path::to_owned),
        json: false,
        verify: false,
        ignore: Vec::new(),
        limit: 200,
    }
}

fn open(path: &Path, verify: bool) -> anyhow::Result<Snapshot> {
    Snapshot::open(path, verify)
}

#[test]
fn a_summary_shows_sections_and_contexts() {
    let (_directory, path) = snapshot(|_| ());
    let snapshot = open(&path, true).unwrap();
    let text = summary::describe(&snapshot, 200);
    let id = &snapshot.memory.layers[0].id;
    let memory = format!(
        "memory files             64M of RAM, and is what was written\n  {}               {}: 16384 pages, 1 of them data (4K); ",
        &id[..8],
        path.display()
    );
    for line in [
        "format                   tern-snapshot, version 1\n",
        &memory,
        "functions                2 entries: console0, disk0\n",
        "  functions              2 entries: port0, pf0-vf1\n",
        "\nconsole0\n  DEV_FEATURES: 0x10000000000000000000000003\n",
        "  VQ_CFG of queue 0: size 8, vector 0x1, ",
        "  0x1234: [aa]\n",
    ] {
        assert!(text.contains(line), "{text}{line}");
    }
    let text = summary::describe(&snapshot, 2);
    let left = "9 more fields of device contexts; --limit 0 shows all\n";
    assert!(text.ends_with(left), "{text}");
    let json = snapshot.in_json();
    assert_eq!(json["memory"]["files"][0]["data_pages"], 1);
    assert_eq!(json["memory"]["verified"], true);
    assert_eq!(json["state"]["functions"][1]["name"], "disk0");
}

#[test]
fn nothing_in_a_snapshot_moves_the_cursor() {
    let name = "\u{1b}[2J\u{202e}\n";
    let (_directory, path) = snapshot(|root| root.functions[1].name = name.to_owned());
    let text = summary::describe(&open(&path, false).unwrap(), 200);
    assert!(
        text.contains("console0, \\u{1b}[2J\\u{202e}\\u{a}\n"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn bases_are_shown_and_verified() {
    let (directory, full) = snapshot(|_| ());
    let path = directory.path().join("later");
    save(&path, Some(&full), |_| ());
    let snapshot = open(&path, true).unwrap();
    let pages = snapshot
        .memory
        .layers
        .iter()
        .map(|l| (l.pages, l.data_pages));
    assert_eq!(pages.collect::<Vec<_>>(), [(2, 1), (PAGES as u64, 1)]);

    fs::rename(&full, directory.path().join("elsewhere")).unwrap();
    assert!(open(&path, true).is_err());
    let snapshot = open(&path, false).unwrap();
    assert_eq!(snapshot.memory.layers.len(), 1);
    let text = summary::describe(&snapshot, 200);
    assert!(
        text.contains("\n  base                   not found: "),
        "{text}"
    );
}

#[test]
fn memory_that_was_changed_or_is_of_another_snapshot_is_refused() {
    let (_directory, path) = snapshot(|_| ());
    let state = path.join(STATE);
    let text = fs::read_to_string(&state).unwrap();
    let id = open(&path, false).unwrap().memory.layers[0].id.clone();
    let digest = Reader::open(&path).unwrap().header().unwrap().digest;
    for (from, to, expected) in [
        (id.clone(), "0".repeat(32), "is that of snapshot"),
        (digest.to_string(), "f".repeat(64), "has another digest"),
        (
            format!("\"memory\": {}", layout::MIN_RAM),
            format!("\"memory\": {}", 2 * layout::MIN_RAM),
            "with other RAM ranges",
        ),
    ] {
        assert!(text.contains(&from), "{from}");
        fs::write(&state, text.replace(&from, &to)).unwrap();
        let message = open(&path, false).err().unwrap().to_string();
        assert!(message.contains(expected), "{message}");
    }
    fs::write(&state, text.replace(&id, &id.to_uppercase())).unwrap();
    assert!(open(&path, false).is_ok());
    fs::write(&state, text).unwrap();
    let memory = path.join(MEMORY);
    let mut bytes = fs::read(&memory).unwrap();
    bytes[7 * 4096] = 1;
    fs::write(&memory, bytes).unwrap();
    assert!(open(&path, false).is_ok());
    assert!(open(&path, true).is_err());
}

#[test]
fn the_exit_status_says_whether_two_differ() {
    let ((_a, first), (_b, same)) = (snapshot(|_| ()), snapshot(|_| ()));
    let (_c, other) = snapshot(|root| root.serial.scratch ^= 1);
    let status = |inspect: &Inspect| inspect.run().unwrap();
    assert_eq!(status(&inspect(&first, None)), 0);
    assert_eq!(status(&inspect(&first, Some(&first))), 0);
    // Two snapshots of one state still have names of their own, and digests that depend on these.
    let own = ["id".to_owned(), "memory".to_owned()];
    let mut different = inspect(&first, Some(&same));
    assert_eq!(status(&different), exit::DIFFERENT);
    different.ignore = own.to_vec();
    assert_eq!(status(&different), 0);
    different.other = Some(other);
    assert_eq!(status(&different), exit::DIFFERENT);
    different.json = true;
    assert_eq!(status(&different), exit::DIFFERENT);
    different.limit = 0;
    different.ignore.push("serial.scratch".to_owned());
    assert_eq!(status(&different), 0);
}

#[test]
fn what_is_no_snapshot_is_refused_by_name() {
    let (directory, path) = snapshot(|_| ());
    let refusal = || format!("{:#}", open(&path, false).err().unwrap());
    let state = path.join(STATE);
    let text = fs::read_to_string(&state).unwrap();
    for (bytes, expected) in [
        (String::new(), "EOF while parsing"),
        (
            text.replace("tern-snapshot", "qcow"),
            "format: this is \"qcow\"",
        ),
        (
            text.replace("\"version\": 1", "\"version\": 9"),
            "version: this snapshot has format version 9; this tern reads versions 1 to 1",
        ),
        (
            text.replace("\"owned\": [7, 0]", "\"owned\": [7, 9]"),
            "functions[0].transient.admin_queue.owned[1]: there is no descriptor 9 in a queue of size 8",
        ),
    ] {
        fs::write(&state, bytes).unwrap();
        let message = refusal();
        assert!(message.contains("state.json: "), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    fs::remove_file(&state).unwrap();
    assert!(refusal().contains("state.json"));
    assert!(open(&directory.path().join("nothing"), false).is_err());
}

/// What needs no host is said by whoever reads a snapshot, in the same words.
#[test]
fn what_a_restore_refuses_for_its_state_is_refused_here() {
    let (_directory, path) = snapshot(|_| ());
    let state = path.join(STATE);
    let good: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert!(Source::open(&path, &Overrides::default()).is_ok());
    for (pointer, value, field) in [
        ("/machine/memory", json!(134_217_729), "machine.memory"),
        ("/machine/memory", json!(0), "machine.memory"),
        ("/machine/cpus", json!(0), "machine.cpus"),
        ("/machine/cpus", json!(2), "vcpus: there are 1"),
        ("/machine/layout", json!(3), "machine.layout"),
        ("/machine/disks/0/queues", json!(0), "machine.disks[0]"),
        (
            "/machine/disks/0/file/path",
            json!("d"),
            "machine.disks[0].file.path",
        ),
        ("/machine/console", json!("tty"), "machine.console"),
        (
            "/machine/parameters/block/queue_size",
            json!(63),
            "machine.parameters.block: queue_size",
        ),
        ("/functions/0/transient", json!(7), "functions[0].transient"),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer).unwrap() = value;
        fs::write(&state, bad.to_string()).unwrap();
        let here = open(&path, false).err().unwrap();
        let here = crate::errors::chain(here.as_ref());
        let there = Source::open(&path, &Overrides::default()).err().unwrap();
        assert_eq!(here, crate::errors::chain(&there));
        let place = format!("{}: ", state.display());
        assert!(here.starts_with(&place) && here.contains(field), "{here}");
    }
}

#[test]
fn files_of_data_alone_and_of_holes_alone_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    for (bytes, data) in [(0, 0), (1 << 20, 0)] {
        File::create(&path).unwrap().set_len(bytes).unwrap();
        assert_eq!(extents(&path).unwrap(), Extents { bytes, data });
    }
    fs::write(&path, [1; 8192]).unwrap();
    let data = 8192;
    assert_eq!(extents(&path).unwrap(), Extents { bytes: 8192, data });
}

#[test]
fn the_differences_in_json_have_their_parts() {
    let same = |what, expected: Value| {
        let path = "a".to_owned();
        assert_eq!(difference(&Difference { path, what }), expected);
    };
    let text = str::to_owned;
    same(
        What::Changed(text("1"), text("2")),
        json!({ "path": "a", "first": "1", "second": "2" }),
    );
    same(What::First(text("1")), json!({ "path": "a", "first": "1" }));
    same(
        What::Second(text("2")),
        json!({ "path": "a", "second": "2" }),
    );
    same(
        What::Bytes {
            runs: vec![(4, text("00"), text("ff"))],
            more: 3,
        },
        json!({ "path": "a", "bytes": [{ "offset": 4, "first": "00", "second": "ff" }], "left_out": 3 }),
    );
}
