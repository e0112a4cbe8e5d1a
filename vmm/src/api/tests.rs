use std::collections::BTreeSet;

use serde_json::Value;

use super::routes::PATHS;
use super::*;

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

/// The names of a schema's properties, and of those that are required.
fn properties(schema: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let schema = document()["components"]["schemas"][schema].clone();
    let names = schema["properties"].as_object().unwrap().keys().cloned();
    let required = schema["required"].as_array().cloned().unwrap_or_default();
    let required = required.iter().map(|n| n.as_str().unwrap().to_owned());
    (names.collect(), required.collect())
}

fn keys(value: &impl Serialize) -> BTreeSet<String> {
    let value = serde_json::to_value(value).unwrap();
    value.as_object().unwrap().keys().cloned().collect()
}

#[test]
fn the_document_lists_exactly_the_paths_and_methods_there_are() {
    let document = document();
    let documented: BTreeSet<(String, String)> = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, item)| {
            let methods = item.as_object().unwrap().keys();
            methods.map(move |method| (path.clone(), method.clone()))
        })
        .collect();
    let served: BTreeSet<(String, String)> = PATHS
        .iter()
        .flat_map(|(path, methods)| methods.iter().map(|m| (path.to_string(), m.to_string())))
        .collect();
    assert_eq!(documented, served);
}

#[test]
fn the_schemas_are_those_of_the_answers() {
    let device = Device {
        name: "disk0".to_owned(),
        place: "00:01.0".to_owned(),
        queues: 1,
        live: true,
    };
    let info = Info {
        version: "0".to_owned(),
        pid: 1,
        state: State::Running,
        cpus: 1,
        memory: 1,
        kernel: "k".to_owned(),
        cmdline: "c".to_owned(),
        devices: vec![device.clone()],
    };
    let status = Status {
        state: State::Paused,
    };
    let failure = Failure {
        error: "e".to_owned(),
    };
    for (name, keys) in [
        ("Info", keys(&info)),
        ("Device", keys(&device)),
        ("Status", keys(&status)),
        ("Failure", keys(&failure)),
    ] {
        assert_eq!(properties(name), (keys.clone(), keys), "{name}");
    }
    let event = Event {
        state: State::Ended,
        outcome: Some("o".to_owned()),
        exit_status: Some(0),
    };
    let always = BTreeSet::from(["state".to_owned()]);
    assert_eq!(properties("Event"), (keys(&event), always));
    let shutdown = Shutdown {
        force_after_ms: Some(1),
    };
    assert_eq!(properties("Shutdown"), (keys(&shutdown), BTreeSet::new()));
}

#[test]
fn the_states_are_the_documented_ones() {
    let documented = document()["components"]["schemas"]["State"]["enum"].clone();
    let states = [State::Running, State::Paused, State::Ended];
    assert_eq!(documented, serde_json::to_value(states).unwrap());
}
