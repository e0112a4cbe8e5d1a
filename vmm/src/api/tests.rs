use std::collections::BTreeSet;

use devices::net::{MacAddress, PortInfo, Stats};
use migration::live::report::{Pause as MigrationPause, Report as MigrationReport};
use migration::live::source::Phase as MigrationPhase;
use migration::wire::message::Memory;
use serde_json::Value;

use super::routes::PATHS;
use super::snapshots::SnapshotAnswer;
use super::*;
use crate::migrate::monitor::Status as Migration;
use crate::migrate::{source, tls};
use crate::snapshot::report::{Bytes, Pause, Phase, Report, Request, Then};

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
        stopped_by: Vec::new(),
        doors: Vec::new(),
        packed: false,
        uses_packed: false,
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
        owners: vec![owner()],
        managers: vec![manager()],
        progress: Some(Progress {
            phase: Phase::Memory,
            done: 1,
            total: 2,
        }),
        migration: Some(Migration::Destination { round: 1, pages: 2 }),
    };
    let status = Status {
        state: State::Paused,
    };
    let failure = Failure {
        attempt: Some(attempt()),
        ..Failure::new("e")
    };
    let always = BTreeSet::from(["error".to_owned()]);
    assert_eq!(properties("Failure"), (keys(&failure), always));
    let mut always = keys(&info);
    always.remove("progress");
    always.remove("migration");
    always.remove("managers");
    assert_eq!(properties("Info"), (keys(&info), always));
    for (name, keys) in [
        ("Device", keys(&device)),
        ("Status", keys(&status)),
        ("Attempt", keys(&attempt())),
        ("MigrationReport", keys(&attempt().report)),
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
    let request = Request {
        directory: "/s".into(),
        base: Some("/b".into()),
        track: false,
        replace: false,
        then: Then::Resume,
    };
    let always = BTreeSet::from(["directory".to_owned()]);
    assert_eq!(properties("SnapshotRequest"), (keys(&request), always));
    let tls = tls::Files {
        cert: "/c".into(),
        key: "/k".into(),
        ca: "/a".into(),
        name: Some("n".to_owned()),
    };
    let always = BTreeSet::from(["cert", "key", "ca"].map(str::to_owned));
    assert_eq!(properties("MigrateTls"), (keys(&tls), always));
    let request: source::Request = serde_json::from_str(r#"{"to": "unix:/s"}"#).unwrap();
    let request = source::Request {
        tls: Some(tls),
        ..request
    };
    let always = BTreeSet::from(["to".to_owned()]);
    assert_eq!(properties("MigrateRequest"), (keys(&request), always));
    let report = Report {
        directory: "/s".into(),
        id: String::new(),
        bytes: Bytes::default(),
        pause_us: Pause::default(),
        total_us: 0,
    };
    let answer = SnapshotAnswer {
        state: State::Running,
        report: report.clone(),
    };
    for (name, keys) in [
        ("Snapshot", keys(&answer)),
        ("SnapshotBytes", keys(&report.bytes)),
        ("SnapshotPause", keys(&report.pause_us)),
        ("Progress", keys(&info.progress)),
    ] {
        assert_eq!(properties(name), (keys.clone(), keys), "{name}");
    }
    let under_way = UnderWay {
        progress: info.progress,
        migration: info.migration.clone(),
    };
    assert_eq!(properties("UnderWay"), (keys(&under_way), BTreeSet::new()));
    let shutdown = Shutdown {
        force_after_ms: Some(1),
    };
    assert_eq!(properties("Shutdown"), (keys(&shutdown), BTreeSet::new()));
}

fn attempt() -> Box<Attempt> {
    Box::new(Attempt {
        phase: MigrationPhase::Memory,
        report: MigrationReport {
            session: String::new(),
            how: Memory::Copy,
            total_us: 1,
            build_us: 1,
            bytes: 1,
            rounds: Vec::new(),
            pause_us: MigrationPause::default(),
            paused_bytes: 0,
        },
    })
}

#[test]
fn the_parts_of_a_pause_are_the_documented_ones() {
    let report = document()["components"]["schemas"]["MigrationReport"].clone();
    let pause = report["properties"]["pause_us"].clone();
    let documented = pause["properties"].as_object().unwrap().keys().cloned();
    let all = keys(&MigrationPause::default());
    assert_eq!(documented.collect::<BTreeSet<_>>(), all);
    let parts = MigrationPause::default()
        .parts()
        .map(|part| part.name.to_owned());
    let mut parts = BTreeSet::from(parts);
    parts.insert("total".to_owned());
    assert_eq!(parts, all);
}

fn manager() -> managers::Manager {
    let function = owner().function.unwrap();
    managers::Manager {
        name: "manager0".to_owned(),
        device: "net".to_owned(),
        wire: "aligned".to_owned(),
        function: function.clone(),
        total_devices: 2,
        devices: vec![managers::Managed { id: 7, function }],
    }
}

fn owner() -> owners::Owner {
    let function = owners::Function {
        name: "pf0".to_owned(),
        place: Some("01:00.0".to_owned()),
        live: true,
        status: vec!["DRIVER_OK".to_owned()],
        features: "0x0".to_owned(),
        stopped_by: Vec::new(),
        doors: vec!["suspend=v5".to_owned()],
        packed: true,
        uses_packed: true,
    };
    let member = owners::Member {
        id: 1,
        function: function.clone(),
        guest_mode: "active".to_owned(),
        monitor_mode: "freeze".to_owned(),
        recorded_by: vec!["guest".to_owned()],
    };
    let port = PortInfo {
        name: "pf0".to_owned(),
        mac: MacAddress::derive(0, 0),
        up: true,
        waiting: 0,
        learned: 0,
        stats: Stats::default(),
    };
    owners::Owner {
        name: "pf0".to_owned(),
        device: "net".to_owned(),
        passthrough: false,
        admin: "v1.4".to_owned(),
        strict_admin: false,
        function: Some(function),
        total_members: 1,
        existing_members: 1,
        members: vec![member],
        switch: vec![port],
    }
}

#[test]
fn the_schemas_of_owners_are_those_of_the_answers() {
    let owner = owner();
    let function = owner.function.as_ref().unwrap();
    let port = &owner.switch[0];
    let answer = owners::AdminAnswer {
        status: 0,
        status_name: "OK".to_owned(),
        qualifier: 0,
        qualifier_name: "OK".to_owned(),
        output: 0,
        result: String::new(),
    };
    let command = owners::AdminCommand {
        owner: "pf0".to_owned(),
        opcode: 0,
        group: 0,
        member: 0,
        data: String::new(),
        room: Some(8),
    };
    let managed = managers::ManagedCommand {
        manager: "manager0".to_owned(),
        device: 1,
        class: 4,
        command: 1,
        data: String::new(),
    };
    let managed_answer = managers::ManagedAnswer {
        error: 0,
        error_name: "OK".to_owned(),
        data: String::new(),
    };
    for (name, keys, optional) in [
        ("Owner", keys(&owner), &["function"][..]),
        ("Manager", keys(&manager()), &[]),
        ("ManagedCommand", keys(&managed), &["device", "data"]),
        ("ManagedAnswer", keys(&managed_answer), &[]),
        ("Function", keys(function), &["place"]),
        ("Port", keys(port), &[]),
        ("PortStats", keys(&port.stats), &[]),
        ("AdminAnswer", keys(&answer), &[]),
        ("AdminCommand", keys(&command), &["member", "data", "room"]),
    ] {
        let mut required = keys.clone();
        required.retain(|key| !optional.contains(&key.as_str()));
        assert_eq!(properties(name), (keys, required), "{name}");
    }
    // A member is a function with a number, and with what owner drivers did to it.
    let own = ["id", "guest_mode", "monitor_mode", "recorded_by"];
    let own = BTreeSet::from(own.map(str::to_owned));
    assert_eq!(properties("Member"), (own.clone(), own.clone()));
    let all: BTreeSet<_> = keys(function).union(&own).cloned().collect();
    assert_eq!(keys(&owner.members[0]), all);
    let own = BTreeSet::from(["id".to_owned()]);
    assert_eq!(properties("Managed"), (own.clone(), own.clone()));
    let all: BTreeSet<_> = keys(function).union(&own).cloned().collect();
    assert_eq!(keys(&manager().devices[0]), all);
}

#[test]
fn the_states_are_the_documented_ones() {
    let documented = document()["components"]["schemas"]["State"]["enum"].clone();
    let states = [
        State::Created,
        State::Running,
        State::Paused,
        State::Saving,
        State::Migrating,
        State::InDoubt,
        State::Receiving,
        State::Ended,
    ];
    assert_eq!(documented, serde_json::to_value(states).unwrap());
}

#[test]
fn the_names_of_a_doubt_are_the_documented_ones() {
    let schemas = document()["components"]["schemas"].clone();
    let (to, reason) = ("unix:/s".to_owned(), "r".to_owned());
    for (schema, member, value) in [
        (
            "MigrateAnswer",
            "outcome",
            serde_json::to_value(source::Answer::InDoubt {
                reason: reason.clone(),
                attempt: attempt(),
            }),
        ),
        (
            "Migration",
            "role",
            serde_json::to_value(Migration::InDoubt { to, reason }),
        ),
    ] {
        let documented = schemas[schema]["properties"][member]["enum"].clone();
        let name = value.unwrap()[member].clone();
        assert_eq!(name, "in_doubt");
        assert!(documented.as_array().unwrap().contains(&name), "{schema}");
    }
}
