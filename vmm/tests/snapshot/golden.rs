//! Documents of every version of the format, in `vmm/tests/golden`: see the README there.

use std::path::{Path, PathBuf};

use vmm::snapshot::format::machine::Machine;
use vmm::snapshot::format::state::{NEWEST, State};
use vmm::snapshot::format::{parse, write};

use super::live::{Asked, Mixed, Owned, Plain};
use super::managed::Managed;
use super::rig::{Devices, Rig, World, file, memory};

/// Write documents that are not there. One that is there is never written again.
const WRITE: &str = "TERN_WRITE_GOLDEN";
/// Where the files of their machines are.
const FILES: &str = "/golden/";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Reads document `name` of version 1.
pub fn read(name: &str) -> State {
    parse(&std::fs::read(golden().join("v1").join(name)).unwrap()).unwrap()
}

/// Puts what is in directory `from` into `to`.
fn change_paths(machine: &mut Machine, from: &str, to: &str) {
    let text = serde_json::to_string(machine).unwrap();
    let text = text.replace(from, to);
    *machine = serde_json::from_str(&text).unwrap();
}

/// Gives `machine` files of its own in `dir`, and knows what they are.
pub fn give_files(machine: &mut Machine, dir: &Path) {
    change_paths(machine, FILES, &format!("{}/", dir.display()));
    for (_, saved, _) in machine.files() {
        file(&saved.path, saved.identity.unwrap().size);
    }
    *machine = Machine::of(&machine.to_spec().unwrap());
}

/// Makes `state`, whose files are in `dir`, the same each time it is made.
fn settle(state: &mut State, dir: &Path) {
    change_paths(&mut state.machine, &format!("{}/", dir.display()), FILES);
    let mut machine = serde_json::to_value(&state.machine).unwrap();
    settle_times(&mut machine);
    state.machine = serde_json::from_value(machine).unwrap();
}

fn settle_times(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(members) => {
            for (name, value) in members {
                match name.as_str() {
                    "modified_s" => *value = 1_795_000_000.into(),
                    "modified_ns" => *value = 1.into(),
                    _ => settle_times(value),
                }
            }
        }
        serde_json::Value::Array(list) => list.iter_mut().for_each(settle_times),
        _ => {}
    }
}

#[test]
fn documents_of_the_newest_version_are_there() {
    let newest = golden().join(format!("v{NEWEST}"));
    type Build = fn(&Path) -> World;
    let machines: [(&str, Build); 5] = [
        ("devices.json", |dir| Plain::new(dir).world),
        ("owner.json", |dir| Owned::new(dir).world),
        ("owners.json", |dir| Mixed::new(dir).world),
        ("announcements.json", |_| Asked::new().world),
        ("managed.json", |dir| Managed::new(dir).world),
    ];
    for (name, build) in machines {
        let path = newest.join(name);
        if std::env::var_os(WRITE).is_some() && !path.exists() {
            let dir = tempfile::tempdir().unwrap();
            let mut state = build(dir.path()).move_on();
            settle(&mut state, dir.path());
            std::fs::write(&path, write(&state).unwrap()).unwrap();
        }
        assert!(path.exists(), "{WRITE}=1 writes {}", path.display());
    }
}

/// What was written once is understood for ever.
#[test]
fn every_golden_document_is_restored_and_saved_as_it_was() {
    let mut tried = 0;
    for version in 1..=NEWEST {
        let dir = golden().join(format!("v{version}"));
        let mut paths: Vec<_> = std::fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        for path in paths {
            println!("{}", path.display());
            let text = String::from_utf8(std::fs::read(&path).unwrap()).unwrap();
            let state: State = parse(text.as_bytes()).unwrap();
            state.machine.to_spec().unwrap();
            let devices = if path.ends_with("whole.json") {
                // Its devices are none of any machine.
                Devices::of(&state)
            } else {
                restored(&state)
            };
            let again = State {
                pci: devices.pci,
                functions: devices.functions,
                owners: devices.owners,
                ..state.clone()
            };
            let written = String::from_utf8(write(&again).unwrap()).unwrap();
            if version == NEWEST {
                assert_eq!(written, text);
            }
            assert_eq!(parse::<State>(written.as_bytes()).unwrap(), state);
            tried += 1;
        }
    }
    assert!(tried >= 4);
}

/// What devices save that were restored from `state`.
fn restored(state: &State) -> Devices {
    let dir = tempfile::tempdir().unwrap();
    let mut machine = state.machine.clone();
    give_files(&mut machine, dir.path());
    let rig = Rig::build(&machine.to_spec().unwrap(), &memory()).unwrap();
    rig.restore(state).unwrap();
    rig.save()
}
