//! Snapshots that are looked at.

use std::io::{Seek, SeekFrom as From, Write};

use super::*;
use crate::snapshot::format::state::tests::sample;
use crate::snapshot::format::write;

/// A snapshot on disk, of a state that was changed.
fn snapshot(change: impl FnOnce(&mut State)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut root = sample();
    change(&mut root);
    fs::write(directory.path().join(STATE), write(&root).unwrap()).unwrap();
    let mut memory = File::create(directory.path().join(MEMORY)).unwrap();
    memory.seek(From::Start(8 << 20)).unwrap();
    memory.write_all(&[1; 1 << 20]).unwrap();
    memory.set_len(16 << 20).unwrap();
    directory
}

fn inspect(directory: &Path, other: Option<&Path>) -> Inspect {
    Inspect {
        directory: directory.to_owned(),
        other: other.map(Path::to_owned),
        json: false,
        ignore: Vec::new(),
        limit: 200,
    }
}

#[test]
fn a_summary_shows_sections_and_contexts() {
    let directory = snapshot(|_| ());
    let snapshot = Snapshot::open(directory.path()).unwrap();
    assert_eq!(
        snapshot.memory.unwrap(),
        Extents {
            bytes: 16 << 20,
            data: 1 << 20
        }
    );
    let text = summary::describe(Path::new("dir"), &snapshot.state, snapshot.memory, 200);
    for line in [
        "snapshot         dir\n",
        "format           tern-snapshot, version 1\n",
        "memory.bin       16M: 1M of data, 15M in holes\n",
        "functions        2 entries: console0, disk0\n",
        "  functions      2 entries: port0, pf0-vf1\n",
        "\nconsole0\n  DEV_FEATURES: 0x10000000000000000000000003\n",
        "  VQ_CFG of queue 0: size 8, vector 0x1, ",
        "  0x1234: [aa]\n",
    ] {
        assert!(text.contains(line), "{text}{line}");
    }
    let text = summary::describe(Path::new("dir"), &snapshot.state, None, 2);
    assert!(text.contains("memory.bin       missing\n"), "{text}");
    assert!(
        text.ends_with("9 more fields of device contexts; --limit 0 shows all\n"),
        "{text}"
    );
}

#[test]
fn nothing_in_a_snapshot_moves_the_cursor() {
    let directory = snapshot(|root| root.functions[1].name = "\u{1b}[2J\u{202e}\n".to_owned());
    let snapshot = Snapshot::open(directory.path()).unwrap();
    let text = summary::describe(Path::new("dir"), &snapshot.state, None, 200);
    assert!(
        text.contains("console0, \\u{1b}[2J\\u{202e}\\u{a}\n"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}'));
}

#[test]
fn the_exit_status_says_whether_two_differ() {
    let (first, same) = (snapshot(|_| ()), snapshot(|_| ()));
    let other = snapshot(|root| root.serial.scratch ^= 1);
    assert_eq!(inspect(first.path(), None).run().unwrap(), 0);
    assert_eq!(inspect(first.path(), Some(same.path())).run().unwrap(), 0);
    let mut different = inspect(first.path(), Some(other.path()));
    assert_eq!(different.run().unwrap(), exit::DIFFERENT);
    different.json = true;
    assert_eq!(different.run().unwrap(), exit::DIFFERENT);
    different.limit = 0;
    different.ignore = vec!["serial.scratch".to_owned()];
    assert_eq!(different.run().unwrap(), 0);
}

#[test]
fn what_is_no_snapshot_is_refused_by_name() {
    let refusal = |directory: &Path| {
        let error = inspect(directory, None).run().unwrap_err();
        format!("{error:#}")
    };
    let directory = snapshot(|_| ());
    let state = directory.path().join(STATE);
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
        let message = refusal(directory.path());
        assert!(message.contains("state.json: "), "{message}");
        assert!(message.contains(expected), "{message}");
    }
    fs::remove_file(&state).unwrap();
    assert!(refusal(directory.path()).contains("state.json"));
    fs::create_dir(&state).unwrap();
    assert!(refusal(directory.path()).contains("is not a regular file"));
}

#[test]
fn files_of_data_alone_and_of_holes_alone_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    assert_eq!(extents(&path).unwrap(), None);
    for (bytes, data) in [(0, 0), (1 << 20, 0)] {
        File::create(&path).unwrap().set_len(bytes).unwrap();
        assert_eq!(extents(&path).unwrap(), Some(Extents { bytes, data }));
    }
    fs::write(&path, [1; 8192]).unwrap();
    assert_eq!(
        extents(&path).unwrap(),
        Some(Extents {
            bytes: 8192,
            data: 8192
        })
    );
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
