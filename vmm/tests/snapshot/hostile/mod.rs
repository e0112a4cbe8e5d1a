//! Documents that no monitor wrote: a good one in which one thing was changed. Each is refused, by the name of what is
//! wrong, before anything of a guest exists: functions are restored while they are closed, and whoever restores them
//! drops them on an error.

mod functions;
mod machines;
mod managed;
mod registers;
mod sessions;
mod text;

use std::fs;
use std::path::Path;

use serde_json::Value;
use vmm::snapshot::format::config_space::Bytes;
use vmm::snapshot::format::parse;
use vmm::snapshot::format::state::State;
use vmm::snapshot::overrides::Overrides;

use super::directory::{Snapshot, open};
use super::rig::{Devices, Rig, memory};

/// Restores document `text` as far as that goes without KVM: the snapshot in `path` is opened with it, then its devices
/// are restored, and saved again.
fn attempt(path: &Path, text: &[u8]) -> Result<(State, Devices), String> {
    fs::write(path.join("state.json"), text).unwrap();
    let spec = open(path, &Overrides::default())?;
    let state: State = parse(text).map_err(|error| format!("state.json: {error}"))?;
    let rig = Rig::build(&spec, &memory())?;
    rig.restore(&state)
        .map_err(|error| format!("state.json: {error}"))?;
    let devices = rig.save();
    Ok((state, devices))
}

/// Something that is changed in a good document, and parts of what is said about it.
type Case = (&'static str, Change, &'static [&'static str]);

type Change = fn(&mut Value);

fn refuse(document: &str, cases: &[Case]) {
    let snapshot = Snapshot::new(document);
    let path = snapshot.path();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    attempt(&path, good.to_string().as_bytes()).unwrap();
    let mut wrong = Vec::new();
    for (what, change, parts) in cases {
        let mut bad = good.clone();
        change(&mut bad);
        assert_ne!(bad, good, "{what}");
        match attempt(&path, bad.to_string().as_bytes()) {
            Ok(_) => wrong.push(format!("{what}: accepted")),
            Err(error) if parts.iter().all(|part| error.contains(part)) => {
                println!("{what}: {error}");
            }
            Err(error) => wrong.push(format!("{what}: {error}\n    lacks one of {parts:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn at<'a>(document: &'a mut Value, pointer: &str) -> &'a mut Value {
    document.pointer_mut(pointer).expect(pointer)
}

/// The entry called `name` of the list at `pointer`.
fn named<'a>(document: &'a mut Value, pointer: &str, name: &str) -> &'a mut Value {
    let list = at(document, pointer).as_array_mut().unwrap();
    list.iter_mut().find(|entry| entry["name"] == name).unwrap()
}

fn function<'a>(document: &'a mut Value, name: &str) -> &'a mut Value {
    named(document, "/functions", name)
}

/// The field of that type, and of that queue if it is about one, in a context.
fn field<'a>(document: &'a mut Value, name: &str, kind: &str, queue: Option<u16>) -> &'a mut Value {
    let context = function(document, name)["context"].as_array_mut().unwrap();
    let found = context.iter_mut().find(|f| {
        f["type"] == kind && f.get("queue").and_then(Value::as_u64) == queue.map(u64::from)
    });
    found.unwrap()
}

fn add_field(document: &mut Value, name: &str, field: Value) {
    let context = function(document, name)["context"].as_array_mut().unwrap();
    // Before the device configuration, which is the last one.
    context.insert(context.len() - 1, field);
}

fn remove(document: &mut Value, pointer: &str, name: &str) {
    let list = at(document, pointer).as_array_mut().unwrap();
    list.retain(|entry| entry["name"] != name);
}

fn twice(document: &mut Value, pointer: &str) {
    let list = at(document, pointer).as_array_mut().unwrap();
    list.push(list[0].clone());
}

fn config(document: &mut Value, name: &str) -> Vec<u8> {
    let config = named(document, "/pci/functions", name)["config"].clone();
    serde_json::from_value::<Bytes>(config)
        .unwrap()
        .plain()
        .unwrap()
}

/// Writes to the configuration space of a function.
fn poke(document: &mut Value, name: &str, offset: usize, bytes: &[u8]) {
    let mut config = config(document, name);
    config[offset..offset + bytes.len()].copy_from_slice(bytes);
    let json = serde_json::to_value(Bytes::of(&config)).unwrap();
    named(document, "/pci/functions", name)["config"] = json;
}

/// Where the SR-IOV capability of an owner is.
fn sriov(document: &mut Value, name: &str) -> usize {
    let config = config(document, name);
    let mut at = 0x100;
    while config[at..at + 2] != [0x10, 0] {
        at = (usize::from(config[at + 3]) << 4) | usize::from(config[at + 2] >> 4);
    }
    at
}

/// Bits of the SR-IOV control register, and NumVFs.
fn set_members(document: &mut Value, control: u8, count: u16) {
    let at = sriov(document, "pf0");
    poke(document, "pf0", at + 0x08, &[control]);
    poke(document, "pf0", at + 0x10, &count.to_le_bytes());
}
