//! Sections, text, and what is no fault.

use serde_json::{Value, json};

use super::{Case, Change, add_field, attempt, field, function, named, poke, refuse};
use crate::directory::Snapshot;

#[test]
fn every_section_has_to_be_there_and_be_one() {
    let snapshot = Snapshot::new("devices.json");
    let path = snapshot.path();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    for name in good.as_object().unwrap().keys() {
        let mut bad = good.clone();
        bad.as_object_mut().unwrap().remove(name);
        let error = attempt(&path, bad.to_string().as_bytes()).unwrap_err();
        assert!(error.contains(name), "without {name}: {error}");
        for other in [
            Value::Null,
            json!(7),
            json!(""),
            json!(1.5),
            json!([[]]),
            json!({ "a": 1 }),
        ] {
            let mut bad = good.clone();
            bad[name] = other.clone();
            let error = attempt(&path, bad.to_string().as_bytes()).unwrap_err();
            let start = format!("{}: {name}", path.join("state.json").display());
            assert!(error.starts_with(&start), "{name} is {other}: {error}");
        }
    }
}

/// No list stands for an object, and no object for a name, at any depth: the order of fields is no part of the format.
#[test]
fn other_forms_of_the_same_are_refused() {
    let owner: [Case; 6] = [
        (
            "created",
            |d| d["created"] = json!(["tern", "now"]),
            &["created: is a list"],
        ),
        (
            "memory",
            |d| d["memory"] = json!([d["memory"]["digest"]]),
            &["memory: is a list"],
        ),
        (
            "pages",
            |d| {
                let ranges =
                    &mut d["owners"][0]["sessions"][0]["members"][0]["recording"]["ranges"];
                ranges[0] = json!([ranges[0]["page_address"], ranges[0]["page_count"]]);
            },
            &["owners[0].sessions[0].members[0].recording.ranges[0]: is a list"],
        ),
        (
            "part",
            |d| {
                let part = &mut d["owners"][0]["sessions"][0]["members"][1]["reading"]["part"];
                *part = json!([part["context"], part["at"]]);
            },
            &["owners[0].sessions[0].members[1].reading.part: is a list"],
        ),
        (
            "mode",
            |d| d["owners"][0]["sessions"][0]["members"][0]["mode"] = json!({ "active": null }),
            &["owners[0].sessions[0].members[0].mode: is an object"],
        ),
        (
            "state of the device",
            |d| function(d, "pf0")["transient"]["device"] = json!({ "none": null }),
            &["functions[0].transient.device: is an object"],
        ),
    ];
    refuse("owner.json", &owner);
    refuse(
        "devices.json",
        &[
            (
                "input",
                |d| function(d, "console")["transient"]["device"] = json!({ "console": [""] }),
                &["functions[7].transient.device.console: is a list"],
            ),
            (
                "vector",
                |d| {
                    let entry = &mut named(d, "/pci/functions", "disk0")["msix"]["entries"][1];
                    *entry = json!([entry["address"], entry["data"], entry["masked"]]);
                },
                &["pci.functions[1].msix.entries[1]: is a list"],
            ),
        ],
    );
}

/// What is no JSON, what other programs make of it, and what would take all memory.
#[test]
fn text_that_is_no_document_is_refused() {
    let snapshot = Snapshot::new("devices.json");
    let path = snapshot.path();
    let good = serde_json::to_string(&snapshot.state).unwrap();
    let with = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    let many = "0,".repeat(8 << 20);
    let members: String = (0..5000).map(|n| format!("\"{n}\":0,")).collect();
    let id = format!(
        "\"id\":{}",
        serde_json::to_string(&snapshot.state.id).unwrap()
    );
    for (text, part) in [
        (String::new(), "EOF"),
        ("{".to_owned(), "EOF"),
        (format!("{good}{good}"), "trailing characters"),
        (good[..good.len() - 1].to_owned(), "EOF"),
        (with("\"version\":1", "\"version\":0"), "version 0"),
        (
            with("\"version\":1", "\"version\":2"),
            "version: this snapshot has format version 2",
        ),
        (with("\"version\":1", "\"version\":\"1\""), "version \"1\""),
        (with("tern-snapshot", "qcow2"), "format: this is \"qcow2\""),
        (with(&id, &format!("{id},{id}")), "id"),
        (
            with(
                "\"name\":\"disk0\",\"context\"",
                "\"name\":\"disk0\",\"name\":\"disk0\",\"context\"",
            ),
            "functions[0].name",
        ),
        (with("\"divisor\":12", "\"divisor\":NaN"), "serial.divisor"),
        (with("\"divisor\":12", "\"divisor\":12.0"), "serial.divisor"),
        (
            with("\"divisor\":12", "\"divisor\":1.2e1"),
            "serial.divisor",
        ),
        (with("\"divisor\":12", "\"divisor\":-12"), "serial.divisor"),
        (
            with("\"divisor\":12", "\"divisor\":1e999"),
            "serial.divisor",
        ),
        (with("\"divisor\":12", "\"divisor\":012"), "serial.divisor"),
        (
            with("\"divisor\":12", "\"divisor\":65536"),
            "serial.divisor",
        ),
        (
            with("\"divisor\":12", "\"divisor\":18446744073709551616"),
            "serial.divisor",
        ),
        (with("\"by\":\"tern", "\"by\":\"\\ud800tern"), "created.by"),
        (with("\"by\":\"tern", "\"by\":\"\u{1}tern"), "created.by"),
        (
            with(
                "\"created\":{",
                &format!(
                    "\"deep\":{}{},\"created\":{{",
                    "[".repeat(33),
                    "]".repeat(33)
                ),
            ),
            "deep",
        ),
        (
            with(
                "\"created\":{",
                &format!("\"deep\":{},\"created\":{{", "[".repeat(1 << 20)),
            ),
            "deep",
        ),
        (
            with("\"functions\":[", &format!("\"functions\":[{many}")),
            "functions",
        ),
        (
            with("\"created\":{", &format!("\"created\":{{{members}")),
            "created",
        ),
    ] {
        let error = attempt(&path, text.as_bytes()).unwrap_err();
        let start: String = text.chars().take(40).collect();
        assert!(
            error.contains(part) && error.len() < 4096,
            "{start}, {part}: {error}"
        );
        println!("{error}");
    }
    let mut bytes = good.clone().into_bytes();
    bytes[good.find("tern 0").unwrap()] = 0xff;
    let error = attempt(&path, &bytes).unwrap_err();
    assert!(error.contains("created.by"), "{error}");
}

/// What a guest can bring about is no fault, however foolish it is: it comes back as it was.
#[test]
fn what_a_guest_can_do_is_restored() {
    let snapshot = Snapshot::new("devices.json");
    let path = snapshot.path();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    let cases: [(&str, Change); 7] = [
        ("a BAR outside every window", |d| {
            poke(d, "disk0", 0x14, &[0, 0, 0, 0xf0])
        }),
        ("a BAR at 0", |d| {
            poke(d, "disk0", 0x10, &[0xc, 0, 0, 0, 0, 0, 0, 0])
        }),
        ("no memory decoding", |d| poke(d, "disk0", 4, &[0])),
        ("bus numbers", |d| {
            poke(d, "root port", 0x18, &[0xff, 0xff, 0])
        }),
        ("no window", |d| {
            poke(d, "root port", 0x24, &[0xf1, 0xff, 1, 0])
        }),
        ("rings on each other", |d| {
            let queue = field(d, "disk0", "VQ_CFG", Some(0));
            queue["driver_area"] = queue["descriptor_area"].clone();
            queue["device_area"] = queue["descriptor_area"].clone();
            // A copy of what the registers show.
            let area = queue["descriptor_area"].clone();
            let common = field(d, "disk0", "PCI_COMMON_CFG", None);
            common["queue_driver"] = area.clone();
            common["queue_device"] = area;
        }),
        ("recalled requests", |d| {
            field(d, "disk0", "VQ_SPLIT_RUNTIME_CFG", Some(0))["next_available"] = json!(1);
            add_field(
                d,
                "disk0",
                json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": [31, 0, 7] }),
            );
        }),
    ];
    for (what, change) in cases {
        let mut other = good.clone();
        change(&mut other);
        assert_ne!(other, good, "{what}");
        let (state, devices) = attempt(&path, other.to_string().as_bytes()).expect(what);
        let (pci, functions) = (devices.pci.clone(), devices.functions.clone());
        assert_eq!(pci, state.pci, "{what}");
        for (found, saved) in functions.iter().zip(&state.functions) {
            let sorted = |f: &vmm::snapshot::format::function::Function| {
                let mut fields: Vec<_> = f.context.0.iter().map(|f| format!("{f:?}")).collect();
                fields.sort();
                fields
            };
            assert_eq!(sorted(found), sorted(saved), "{what}");
        }
    }
}
