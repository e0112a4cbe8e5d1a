//! Documents that no monitor wrote: a good one in which one thing was changed. Each is refused, by the name of what is
//! wrong, before anything of a guest exists: functions are restored while they are closed, and whoever restores them
//! drops them on an error.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
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
type Case = (&'static str, fn(&mut Value), &'static [&'static str]);

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
            let start = format!("state.json: {name}");
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
    let many = "0,".repeat(4 << 20);
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

#[test]
fn machines_that_cannot_be_are_refused() {
    refuse(
        "devices.json",
        &[
            (
                "more vCPUs",
                |d| d["machine"]["cpus"] = json!(2),
                &["vcpus: there are 1", "machine.cpus is 2"],
            ),
            (
                "no vCPU",
                |d| d["vcpus"] = json!([]),
                &["vcpus: there are 0"],
            ),
            ("two vCPUs", |d| twice(d, "/vcpus"), &["vcpus: there are 2"]),
            (
                "cpus 0",
                |d| d["machine"]["cpus"] = json!(0),
                &["machine.cpus"],
            ),
            (
                "cpus 256",
                |d| d["machine"]["cpus"] = json!(256),
                &["machine.cpus"],
            ),
            (
                "more memory",
                |d| d["machine"]["memory"] = json!(128 << 20),
                &["RAM"],
            ),
            (
                "memory in KiB",
                |d| d["machine"]["memory"] = json!((64 << 20) + 4096),
                &["machine.memory"],
            ),
            (
                "memory of 2^53 + 2",
                |d| d["machine"]["memory"] = json!((1u64 << 53) + 2),
                &["machine.memory"],
            ),
            (
                "memory as text",
                |d| d["machine"]["memory"] = json!("64M"),
                &["machine.memory"],
            ),
            (
                "layout",
                |d| d["machine"]["layout"] = json!(2),
                &["machine.layout"],
            ),
            (
                "extra field",
                |d| d["machine"]["colour"] = json!(1),
                &["machine.colour"],
            ),
            (
                "no path",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!(""),
                &["machine.disks[0]"],
            ),
            (
                "relative path",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("disk0.raw"),
                &["machine.disks[0].file.path", "absolute"],
            ),
            (
                "path up",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("../disk0.raw"),
                &["machine.disks[0].file.path", "absolute"],
            ),
            (
                "path with NUL",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("/a\u{0}"),
                &[],
            ),
            (
                "path to a directory",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("/"),
                &["/"],
            ),
            (
                "path to a device",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("/dev/null"),
                &["/dev/null"],
            ),
            (
                "missing file",
                |d| d["machine"]["disks"][0]["file"]["path"] = json!("/nonexistent/d"),
                &["/nonexistent/d"],
            ),
            (
                "one file twice",
                |d| {
                    let path = d["machine"]["disks"][1]["file"]["path"].clone();
                    d["machine"]["disks"][0]["file"]["path"] = path;
                },
                &["machine.disks, nets, pfs", "contradict"],
            ),
            (
                "one file by two names",
                |d| {
                    let path = d["machine"]["disks"][1]["file"]["path"]
                        .as_str()
                        .unwrap()
                        .to_owned();
                    let (dir, name) = path.rsplit_once('/').unwrap();
                    d["machine"]["disks"][0]["file"]["path"] = json!(format!("{dir}/./{name}"));
                },
                &["disk1.raw"],
            ),
            (
                "queues",
                |d| d["machine"]["disks"][0]["queues"] = json!(0),
                &["machine.disks[0]"],
            ),
            (
                "serial",
                |d| d["machine"]["disks"][0]["serial"] = json!("x".repeat(21)),
                &["machine.disks[0]"],
            ),
            (
                "bus",
                |d| d["machine"]["disks"][0]["bus"] = json!("isa"),
                &["machine.disks[0].bus"],
            ),
            (
                "suspend",
                |d| d["machine"]["disks"][1]["stops"]["suspend"] = json!("v6"),
                &["machine.disks[1]", "stops.suspend"],
            ),
            (
                "device stop",
                |d| d["machine"]["disks"][1]["stops"]["device_stop"] = json!(200),
                &["machine.disks[1]"],
            ),
            (
                "one MAC address twice",
                |d| d["machine"]["nets"][0]["mac"] = d["machine"]["nets"][1]["mac"].clone(),
                &["machine.disks, nets, pfs", "MAC"],
            ),
            (
                "no MAC address",
                |d| d["machine"]["nets"][0]["mac"] = json!(""),
                &["machine.nets[0]", "mac"],
            ),
            (
                "no switch",
                |d| d["machine"]["nets"][0]["peer"] = json!({ "switch": "" }),
                &["machine.nets[0]"],
            ),
            (
                "two peers",
                |d| d["machine"]["nets"][0]["peer"] = json!({ "switch": "a", "tap": "b" }),
                &["machine.nets[0]"],
            ),
            (
                "tap with a path",
                |d| d["machine"]["nets"][0]["peer"] = json!({ "tap": "../x" }),
                &["machine.nets[0]"],
            ),
            (
                "console",
                |d| d["machine"]["console"] = json!("tty"),
                &["machine.console"],
            ),
            (
                "console without a file",
                |d| d["machine"]["console"] = json!("file="),
                &["machine.console"],
            ),
            (
                "relative console",
                |d| d["machine"]["console"] = json!("file=log"),
                &["machine.console", "absolute"],
            ),
            (
                "relative virtio console",
                |d| d["machine"]["virtio_console"] = json!("file=log"),
                &["machine.virtio_console", "absolute"],
            ),
            (
                "one file for both consoles",
                |d| d["machine"]["console"] = d["machine"]["virtio_console"].clone(),
                &["--console"],
            ),
            (
                "queue size",
                |d| d["machine"]["parameters"]["block"]["queue_size"] = json!(3),
                &["machine.parameters.block"],
            ),
            (
                "fewer devices",
                |d| {
                    at(d, "/machine/disks").as_array_mut().unwrap().pop();
                },
                &["pci"],
            ),
            (
                "no entropy",
                |d| d["machine"]["rng"] = json!(false),
                &["pci"],
            ),
            (
                "disk elsewhere",
                |d| d["machine"]["disks"][1]["bus"] = json!("root"),
                &["pci"],
            ),
            (
                "more queues",
                |d| d["machine"]["disks"][0]["queues"] = json!(3),
                &["disk0"],
            ),
            (
                "smaller queues",
                |d| d["machine"]["parameters"]["net"]["queue_size"] = json!(8),
                &["functions (net0)", "queue 0", "size"],
            ),
            (
                "other features",
                |d| d["machine"]["disks"][1]["stops"]["suspend"] = Value::Null,
                &["disk1"],
            ),
            (
                "other MAC address",
                |d| d["machine"]["nets"][0]["mac"] = json!("02:00:00:00:00:77"),
                &["functions (net0)", "configuration"],
            ),
            (
                "not readonly",
                |d| d["machine"]["disks"][3]["readonly"] = json!(false),
                &[],
            ),
        ],
    );
}

#[test]
fn processors_that_cannot_be_are_refused() {
    refuse(
        "devices.json",
        &[
            (
                "LAPIC",
                |d| d["vcpus"][0]["lapic"] = json!("00"),
                &["vcpus[0].lapic: has 1 bytes, not 1024"],
            ),
            (
                "odd digits",
                |d| d["vcpus"][0]["lapic"] = json!("0"),
                &["vcpus[0].lapic"],
            ),
            (
                "XSAVE",
                |d| d["vcpus"][0]["xsave"] = json!("00".repeat(4100)),
                &["vcpus[0].xsave"],
            ),
            (
                "XSAVE of the model",
                |d| d["cpu_model"]["xsave_size"] = json!(8192),
                &["vcpus[0].xsave"],
            ),
            (
                "MSRs twice",
                |d| twice(d, "/vcpus/0/msrs"),
                &["vcpus[0].msrs[3]"],
            ),
            (
                "feature MSRs",
                |d| twice(d, "/cpu_model/feature_msrs"),
                &["cpu_model.feature_msrs[2]"],
            ),
            (
                "leaf twice",
                |d| twice(d, "/cpu_model/cpuid"),
                &["cpu_model.cpuid[4]"],
            ),
            (
                "frequency",
                |d| d["cpu_model"]["tsc_khz"] = json!(0),
                &["cpu_model.tsc_khz"],
            ),
            (
                "TSC as number",
                |d| d["vcpus"][0]["tsc"] = json!(1u64 << 60),
                &["vcpus[0].tsc"],
            ),
            (
                "clock as number",
                |d| d["clock"]["guest_ns"] = json!((1u64 << 53) + 1),
                &["clock.guest_ns"],
            ),
            (
                "clock",
                |d| d["clock"]["guest_ns"] = json!("0x8000000000000000"),
                &["clock.guest_ns"],
            ),
            (
                "long number",
                |d| d["clock"]["guest_ns"] = json!("0x10000000000000000"),
                &["clock.guest_ns"],
            ),
            (
                "state",
                |d| d["vcpus"][0]["mp_state"] = json!("sleeping"),
                &["vcpus[0].mp_state"],
            ),
            (
                "I/O APIC",
                |d| d["irqchip"]["ioapic"]["id"] = json!(16),
                &["irqchip.ioapic.id"],
            ),
            (
                "pins",
                |d| {
                    at(d, "/irqchip/ioapic/redirections")
                        .as_array_mut()
                        .unwrap()
                        .pop();
                },
                &["irqchip.ioapic.redirections"],
            ),
            (
                "FIFO",
                |d| d["serial"]["receive_fifo"] = json!("00".repeat(65)),
                &["serial.receive_fifo"],
            ),
            (
                "section version",
                |d| d["serial"]["version"] = json!(2),
                &["serial.version", "section has version 2"],
            ),
            (
                "id",
                |d| d["id"] = json!("07"),
                &["id: has 1 bytes instead of 16"],
            ),
            (
                "other id",
                |d| d["id"] = json!("07".repeat(16)),
                &["is that of snapshot"],
            ),
            (
                "digest",
                |d| d["memory"]["digest"] = json!(""),
                &["memory.digest"],
            ),
            (
                "other digest",
                |d| d["memory"]["digest"] = json!("09".repeat(32)),
                &["digest"],
            ),
        ],
    );
}

#[test]
fn registers_that_cannot_be_are_refused() {
    refuse(
        "devices.json",
        &[
            (
                "missing",
                |d| remove(d, "/pci/functions", "disk2"),
                &["pci: ", "\"disk2\" at 03.0 is missing"],
            ),
            (
                "twice",
                |d| twice(d, "/pci/functions"),
                &["pci.functions[10]: "],
            ),
            (
                "order",
                |d| at(d, "/pci/functions").as_array_mut().unwrap().swap(0, 1),
                &["pci.functions[1]: "],
            ),
            (
                "place",
                |d| d["pci"]["functions"][9]["place"] = json!("09.0"),
                &["pci: ", "08.0 is missing"],
            ),
            (
                "place behind",
                |d| d["pci"]["functions"][9]["place"] = json!("08.0/00.0"),
                &["pci: ", "08.0"],
            ),
            (
                "no place",
                |d| d["pci"]["functions"][9]["place"] = json!("20.0"),
                &["pci.functions[9].place"],
            ),
            (
                "name",
                |d| d["pci"]["functions"][1]["name"] = json!("disk9"),
                &["pci: ", "01.0", "disk9"],
            ),
            (
                "vendor",
                |d| poke(d, "disk0", 0, &[0]),
                &["pci: ", "disk0", "byte 0x0 is 0x00"],
            ),
            (
                "BAR type",
                |d| poke(d, "disk0", 0x10, &[0]),
                &["pci: ", "disk0", "byte 0x10"],
            ),
            (
                "BAR in its size",
                |d| poke(d, "disk0", 0x11, &[1]),
                &["pci: ", "disk0", "byte 0x11"],
            ),
            (
                "capability list",
                |d| poke(d, "disk0", 0x34, &[0]),
                &["pci: ", "disk0", "byte 0x34"],
            ),
            (
                "short",
                |d| d["pci"]["functions"][1]["config"]["length"] = json!(64),
                &["pci.functions[1].config"],
            ),
            (
                "long",
                |d| d["pci"]["functions"][1]["config"]["length"] = json!(4096),
                &["pci: ", "disk0", "4096"],
            ),
            (
                "longer",
                |d| d["pci"]["functions"][1]["config"]["length"] = json!(4097),
                &["pci.functions[1].config.length"],
            ),
            (
                "line",
                |d| d["pci"]["functions"][1]["config"]["lines"]["0x001"] = json!("00".repeat(16)),
                &["pci.functions[1].config.lines"],
            ),
            (
                "part of a line",
                |d| d["pci"]["functions"][1]["config"]["lines"]["0x000"] = json!("00"),
                &["pci.functions[1].config.lines"],
            ),
            (
                "no MSI-X",
                |d| {
                    named(d, "/pci/functions", "disk0")
                        .as_object_mut()
                        .unwrap()
                        .remove("msix");
                },
                &["pci: ", "disk0", "no MSI-X state"],
            ),
            (
                "MSI-X of a port",
                |d| {
                    let msix = named(d, "/pci/functions", "disk0")["msix"].clone();
                    named(d, "/pci/functions", "root port")["msix"] = msix;
                },
                &["pci: ", "root port", "no MSI-X"],
            ),
            (
                "fewer vectors",
                |d| {
                    named(d, "/pci/functions", "net0")["msix"]["entries"]
                        .as_array_mut()
                        .unwrap()
                        .pop();
                },
                &["pci: ", "net0", "vectors"],
            ),
            (
                "more vectors",
                |d| {
                    let entries = named(d, "/pci/functions", "disk0")["msix"]["entries"]
                        .as_array_mut()
                        .unwrap();
                    entries.push(entries[0].clone());
                },
                &["pci: ", "disk0", "vectors"],
            ),
            (
                "vectors",
                |d| {
                    let entries = named(d, "/pci/functions", "disk0")["msix"]["entries"]
                        .as_array_mut()
                        .unwrap();
                    entries.resize(
                        2049,
                        json!({ "address": "0x0", "data": "0x0", "masked": true }),
                    );
                },
                &["pci.functions[1].msix.entries: 2049"],
            ),
            (
                "pending",
                |d| named(d, "/pci/functions", "disk0")["msix"]["pending"] = json!([3]),
                &["pci.functions[1].msix.pending[0]"],
            ),
            (
                "pending twice",
                |d| named(d, "/pci/functions", "disk0")["msix"]["pending"] = json!([2, 2]),
                &["pci.functions[1].msix.pending[1]"],
            ),
            (
                "pending while off",
                |d| named(d, "/pci/functions", "net0")["msix"]["pending"] = json!([0]),
                &["pci: ", "net0", "pending"],
            ),
            (
                "off",
                |d| {
                    let msix = &mut named(d, "/pci/functions", "disk0")["msix"];
                    msix["enabled"] = json!(false);
                    msix["pending"] = json!([]);
                },
                &["pci: ", "disk0", "MSI-X control differs"],
            ),
            (
                "address",
                |d| {
                    named(d, "/pci/functions", "disk0")["msix"]["entries"][0]["address"] =
                        json!("0xfee00001")
                },
                &["pci.functions[1].msix.entries[0].address"],
            ),
            (
                "data",
                |d| {
                    named(d, "/pci/functions", "disk0")["msix"]["entries"][0]["data"] =
                        json!("0x100000000")
                },
                &["pci.functions[1].msix.entries[0].data"],
            ),
        ],
    );
}

#[test]
fn members_that_cannot_be_are_refused() {
    refuse(
        "owner.json",
        &[
            (
                "NumVFs above TotalVFs",
                |d| set_members(d, 9, 5),
                &["pci: ", "pf0", "NumVFs"],
            ),
            (
                "NumVFs 65535",
                |d| set_members(d, 9, 0xffff),
                &["pci: ", "pf0", "NumVFs"],
            ),
            (
                "no VF Enable, and members",
                |d| set_members(d, 8, 3),
                &["pci: ", "pf0-vf1", "does not exist"],
            ),
            (
                "fewer members by the registers",
                |d| set_members(d, 9, 2),
                &["pci: ", "pf0-vf3", "does not exist"],
            ),
            (
                "more members by the registers",
                |d| set_members(d, 9, 4),
                &["pci: ", "pf0-vf4", "missing"],
            ),
            (
                "no registers of a member",
                |d| remove(d, "/pci/functions", "pf0-vf3"),
                &["pci: ", "pf0-vf3", "missing"],
            ),
            (
                "no function of a member",
                |d| remove(d, "/functions", "pf0-vf3"),
                &["functions: pf0-vf3 is missing"],
            ),
            (
                "no member, and its function",
                |d| {
                    set_members(d, 9, 2);
                    remove(d, "/pci/functions", "pf0-vf3");
                },
                &["functions: this machine has no \"pf0-vf3\""],
            ),
            (
                "no member, and its session",
                |d| {
                    set_members(d, 9, 2);
                    remove(d, "/pci/functions", "pf0-vf3");
                    remove(d, "/functions", "pf0-vf3");
                },
                &["owners (pf0)", "member 3", "no such member"],
            ),
            (
                "a member too many",
                |d| {
                    let mut more = function(d, "pf0-vf3").clone();
                    more["name"] = json!("pf0-vf4");
                    at(d, "/functions").as_array_mut().unwrap().push(more);
                },
                &["functions: this machine has no \"pf0-vf4\""],
            ),
            (
                "members of another owner",
                |d| function(d, "pf0-vf3")["name"] = json!("pf1-vf3"),
                &["functions: pf0-vf3 is missing"],
            ),
            (
                "page size 0",
                |d| {
                    let at = sriov(d, "pf0");
                    poke(d, "pf0", at + 0x20, &[0; 4]);
                },
                &["pci: ", "pf0"],
            ),
            (
                "two page sizes",
                |d| {
                    let at = sriov(d, "pf0");
                    poke(d, "pf0", at + 0x20, &[3, 0, 0, 0]);
                },
                &["pci: ", "pf0"],
            ),
            (
                "TotalVFs",
                |d| {
                    let at = sriov(d, "pf0");
                    poke(d, "pf0", at + 0x0e, &[9]);
                },
                &["pci: ", "pf0", "byte"],
            ),
            (
                "VF BAR",
                |d| {
                    let at = sriov(d, "pf0");
                    poke(d, "pf0", at + 0x24, &[0xff; 4]);
                },
                &["pci: ", "pf0"],
            ),
            (
                "fewer members in the machine",
                |d| d["machine"]["pfs"][0]["vfs"] = json!(2),
                &["pci: ", "pf0"],
            ),
            (
                "no members in the machine",
                |d| d["machine"]["pfs"][0]["vfs"] = json!(0),
                &["machine.pfs[0]"],
            ),
            (
                "passed through",
                |d| d["machine"]["pfs"][0]["passthrough"] = json!(true),
                &[],
            ),
            (
                "vf_path without number",
                |d| d["machine"]["pfs"][0]["device"]["block"]["vf_path"] = json!("/x"),
                &["machine.pfs[0]"],
            ),
            (
                "relative vf_path",
                |d| d["machine"]["pfs"][0]["device"]["block"]["vf_path"] = json!("vf%d"),
                &["machine.pfs[0].device.block.vf_path", "absolute"],
            ),
            (
                "relative path",
                |d| d["machine"]["pfs"][0]["device"]["block"]["file"]["path"] = json!("pf"),
                &["machine.pfs[0].device.block.file.path", "absolute"],
            ),
            (
                "vf_files",
                |d| d["machine"]["pfs"][0]["device"]["block"]["vf_files"] = json!({ "x": null }),
                &["machine.pfs[0]"],
            ),
            (
                "files of members that there are not",
                |d| {
                    d["machine"]["pfs"][0]["device"]["block"]["vf_files"] =
                        json!({ "9": { "size": 1, "modified_s": 1, "modified_ns": 1 } })
                },
                &["machine.pfs[0].device.block.vf_files", "member 9"],
            ),
            (
                "drain",
                |d| d["machine"]["pfs"][0]["drain_ms"] = json!(u32::MAX),
                &["machine.pfs[0]"],
            ),
            (
                "commands",
                |d| d["machine"]["pfs"][0]["admin"] = json!("v1.4"),
                &["owners (pf0)"],
            ),
        ],
    );
}

/// Names are quoted, so they are short and do not move the cursor.
#[test]
fn names_that_nobody_has_are_refused() {
    refuse(
        "owner.json",
        &[
            (
                "long",
                |d| d["functions"][0]["name"] = json!("x".repeat(65)),
                &["functions[0].name: has 65 bytes"],
            ),
            (
                "long, on the bus",
                |d| d["pci"]["functions"][0]["name"] = json!("x".repeat(65)),
                &["pci.functions[0].name: has 65 bytes"],
            ),
            (
                "long, of an owner",
                |d| d["owners"][0]["name"] = json!("x".repeat(65)),
                &["owners[0].name: has 65 bytes"],
            ),
            (
                "with an escape",
                |d| {
                    let mut more = d["functions"][0].clone();
                    more["name"] = json!("\u{1b}[2J");
                    at(d, "/functions").as_array_mut().unwrap().push(more);
                },
                &["functions: this machine has no \"\\u{1b}[2J\""],
            ),
            (
                "with an escape, of an owner",
                |d| d["owners"][0]["name"] = json!("\u{1b}[2J"),
                &["owners: this machine has no \"\\u{1b}[2J\""],
            ),
        ],
    );
}

#[test]
fn functions_that_cannot_be_are_refused() {
    refuse(
        "devices.json",
        &[
            (
                "missing",
                |d| remove(d, "/functions", "net1"),
                &["functions: net1 is missing"],
            ),
            (
                "twice",
                |d| twice(d, "/functions"),
                &["functions: disk0 is there twice"],
            ),
            (
                "unknown",
                |d| {
                    let mut more = d["functions"][0].clone();
                    more["name"] = json!("disk9");
                    at(d, "/functions").as_array_mut().unwrap().push(more);
                },
                &["functions: this machine has no \"disk9\""],
            ),
            (
                "of another type",
                |d| {
                    let net = function(d, "net0")["context"].clone();
                    function(d, "disk0")["context"] = net;
                },
                &["functions[0].context"],
            ),
            (
                "extra field",
                |d| d["functions"][0]["colour"] = json!(1),
                &["functions[0].colour"],
            ),
            (
                "accepted what is not offered",
                |d| {
                    field(d, "disk0", "DRV_FEATURES", None)["features"] =
                        json!("0x8000000000000000")
                },
                &["functions (disk0)", "features 0x8000000000000000"],
            ),
            (
                "accepted beyond 64 bits",
                |d| {
                    field(d, "disk0", "DRV_FEATURES", None)["features"] =
                        json!("0x10000000000000000")
                },
                &["functions (disk0)", "features"],
            ),
            (
                "status",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["status"] = json!(4),
                &["functions (disk0)", "device_status 0x4"],
            ),
            (
                "all of status",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["status"] = json!(255),
                &["functions (disk0)", "device_status 0xff"],
            ),
            (
                "suspended without the feature",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["status"] = json!(31),
                &["functions (disk0)", "device_status"],
            ),
            (
                "num_queues",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["num_queues"] = json!(3),
                &["functions[0].context[2]", "num_queues"],
            ),
            (
                "config_vector",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["config_vector"] = json!(3),
                &["functions (disk0)", "vector 0x3 of the configuration"],
            ),
            (
                "queue size 0",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["size"] = json!(0),
                &["functions (disk0)", "queue 0", "size"],
            ),
            (
                "queue size 3",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["size"] = json!(3),
                &["functions (disk0)", "queue 0", "size"],
            ),
            (
                "queue size 32768",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["size"] = json!(32768),
                &["functions (disk0)", "queue 0", "size"],
            ),
            (
                "queue vector",
                |d| field(d, "disk0", "VQ_CFG", Some(1))["vector"] = json!(3),
                &["functions (disk0)", "vector 0x3 of queue 1"],
            ),
            (
                "descriptors beyond RAM",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["descriptor_area"] = json!("0x4000000"),
                &["functions (disk0)", "queue 0"],
            ),
            (
                "used ring across the end of RAM",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["device_area"] = json!("0x3fffffc"),
                &["functions (disk0)", "queue 0"],
            ),
            (
                "available ring at the end",
                |d| {
                    field(d, "disk0", "VQ_CFG", Some(0))["driver_area"] =
                        json!("0xfffffffffffffffe")
                },
                &["functions (disk0)", "queue 0"],
            ),
            (
                "odd descriptors",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["descriptor_area"] = json!("0x1008"),
                &["functions (disk0)", "queue 0"],
            ),
            (
                "odd used ring",
                |d| field(d, "disk0", "VQ_CFG", Some(0))["device_area"] = json!("0x1002"),
                &["functions (disk0)", "queue 0"],
            ),
            (
                "position without a queue",
                |d| {
                    field(d, "disk0", "VQ_SPLIT_RUNTIME_CFG", Some(0))["enabled"] = json!(false);
                },
                &["functions (disk0)", "queue 0", "available index"],
            ),
            (
                "head beyond the queue",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": [32] }),
                    )
                },
                &["functions[0].context[7]", "descriptor 32"],
            ),
            (
                "head twice",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": [1, 1] }),
                    )
                },
                &["functions (disk0)", "queue 0", "twice"],
            ),
            (
                "too many heads",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": vec![0; 33] }),
                    )
                },
                &["functions[0].context[7]"],
            ),
            (
                "heads of no queue",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 2, "heads": [] }),
                    )
                },
                &["functions[0].context[7]"],
            ),
            (
                "heads above u16",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": [65536] }),
                    )
                },
                &["functions[0].context[7]"],
            ),
            (
                "packed ring",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_PACKED_DEV_OWN_DESC", "queue": 0, "chains": [] }),
                    )
                },
                &["functions[0].context[7]"],
            ),
            (
                "field twice",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "DEV_FEATURES", "features": "0x10130007644" }),
                    )
                },
                &["functions[0].context[7]", "twice"],
            ),
            (
                "unknown field",
                |d| add_field(d, "disk0", json!({ "type": "0x1234", "value": "" })),
                &["functions[0].context[7]", "0x1234"],
            ),
            (
                "unknown name",
                |d| add_field(d, "disk0", json!({ "type": "VQ_COLOUR" })),
                &["functions[0].context[7]"],
            ),
            (
                "no type",
                |d| add_field(d, "disk0", json!({ "queue": 0 })),
                &["functions[0].context[7]"],
            ),
            (
                "no field",
                |d| add_field(d, "disk0", json!(7)),
                &["functions[0].context[7]"],
            ),
            (
                "value of a known type",
                |d| {
                    field(d, "disk0", "DEV_FEATURES", None)
                        .clone_from(&json!({ "type": "0x1", "value": "00" }))
                },
                &["functions[0].context[0]"],
            ),
            (
                "reserved bytes",
                |d| {
                    field(d, "disk0", "DEV_FEATURES", None).clone_from(
                        &json!({ "type": "0x1", "reserved": "0x1000000000000", "value": "" }),
                    )
                },
                &["functions[0].context[0].reserved"],
            ),
            (
                "no queue",
                |d| {
                    function(d, "disk0")["context"]
                        .as_array_mut()
                        .unwrap()
                        .remove(3);
                },
                &["functions[0].context"],
            ),
            (
                "no fields",
                |d| function(d, "disk0")["context"] = json!([]),
                &["functions[0].context"],
            ),
            (
                "state of a queue",
                |d| {
                    add_field(
                        d,
                        "disk0",
                        json!({ "type": "VQ_STATUS", "queue": 0, "running": true, "restarts": false, "selected": false, "next_used": 0 }),
                    )
                },
                &["functions[0].context[7]", "VQ_STATUS"],
            ),
            (
                "two queues selected",
                |d| {
                    let again = field(d, "disk2", "VQ_STATUS", Some(0)).clone();
                    add_field(d, "disk2", again);
                },
                &["functions[2].context"],
            ),
            (
                "capacity",
                |d| {
                    field(d, "disk0", "DEV_CFG", None)["config"]
                        .as_str()
                        .unwrap()
                        .replacen("80", "81", 1)
                        .clone_into(match &mut field(d, "disk0", "DEV_CFG", None)["config"] {
                            Value::String(text) => text,
                            _ => unreachable!(),
                        })
                },
                &["functions (disk0)", "configuration"],
            ),
            (
                "short configuration",
                |d| field(d, "disk0", "DEV_CFG", None)["config"] = json!("00"),
                &["functions[0].context[7]"],
            ),
            (
                "ISR",
                |d| function(d, "disk0")["transient"]["isr"] = json!(4),
                &["functions (disk0)", "ISR"],
            ),
            (
                "unsignalled",
                |d| function(d, "disk0")["transient"]["unsignalled"] = json!([2]),
                &["functions (disk0)", "unsignalled: queue 2"],
            ),
            (
                "unsignalled twice",
                |d| function(d, "disk0")["transient"]["unsignalled"] = json!([1, 1]),
                &["functions[0].transient.unsignalled[1]"],
            ),
            (
                "administration virtqueue",
                |d| {
                    function(d, "disk0")["transient"]["admin_queue"] = json!({
                        "size": 8, "vector": 65535, "descriptor_area": "0x0", "driver_area": "0x0", "device_area": "0x0", "enabled": false,
                        "stopped": false, "next_available": 0, "next_used": 0, "restarts": false, "owned": []
                    })
                },
                &["functions (disk0)", "administration virtqueue"],
            ),
            (
                "of a console",
                |d| {
                    function(d, "disk0")["transient"]["device"] =
                        json!({ "console": { "input": "" } })
                },
                &["functions (disk0)", "type"],
            ),
            (
                "of no console",
                |d| function(d, "console")["transient"]["device"] = json!("none"),
                &["functions (console)"],
            ),
            (
                "of a printer",
                |d| function(d, "console")["transient"]["device"] = json!("printer"),
                &["functions[7].transient.device"],
            ),
            (
                "input",
                |d| {
                    function(d, "console")["transient"]["device"]["console"]["input"] =
                        json!("00".repeat(1 << 20))
                },
                &["functions (console)"],
            ),
            (
                "owner",
                |d| d["owners"] = json!([{ "version": 1, "name": "pf0", "sessions": [] }]),
                &["owners: this machine has no \"pf0\""],
            ),
            (
                "window on a queue",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["queue_desc"] = json!("0x5000"),
                &["functions[0].context[2]", "contradicts"],
            ),
            (
                "window on features",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["device_feature"] = json!("0x0"),
                &["functions[0].context[2]", "contradicts"],
            ),
            (
                "other features offered",
                |d| field(d, "disk0", "DEV_FEATURES", None)["features"] = json!("0x0"),
                &["functions[0].context[2]", "contradicts"],
            ),
            (
                "number of an administration virtqueue",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["admin_queue_num"] = json!(1),
                &["functions[0].context[2]", "contradicts"],
            ),
            (
                "queue in reset",
                |d| field(d, "disk0", "PCI_COMMON_CFG", None)["queue_reset"] = json!(1),
                &["functions[0].context[2]", "contradicts"],
            ),
        ],
    );
}

#[test]
fn sessions_that_cannot_be_are_refused() {
    refuse(
        "owner.json",
        &[
            (
                "missing",
                |d| d["owners"] = json!([]),
                &["owners: pf0 is missing"],
            ),
            (
                "twice",
                |d| twice(d, "/owners"),
                &["owners: pf0 is there twice"],
            ),
            (
                "unknown",
                |d| d["owners"][0]["name"] = json!("pf1"),
                &["owners: this machine has no \"pf1\""],
            ),
            (
                "no session of the guest",
                |d| {
                    at(d, "/owners/0/sessions")
                        .as_array_mut()
                        .unwrap()
                        .remove(0);
                },
                &["owners (pf0)", "guest", "missing"],
            ),
            (
                "no session of the monitor",
                |d| {
                    at(d, "/owners/0/sessions")
                        .as_array_mut()
                        .unwrap()
                        .remove(1);
                },
                &["owners (pf0)", "monitor", "missing"],
            ),
            (
                "session twice",
                |d| twice(d, "/owners/0/sessions"),
                &["owners[0].sessions[2].party"],
            ),
            (
                "party",
                |d| d["owners"][0]["sessions"][0]["party"] = json!("engine"),
                &["owners[0].sessions[0].party"],
            ),
            (
                "commands",
                |d| {
                    d["owners"][0]["sessions"][0]["sr_iov"] =
                        json!("0x80000000000000000000000000000000")
                },
                &["owners (pf0)", "sr_iov"],
            ),
            (
                "commands of the self group",
                |d| d["owners"][0]["sessions"][0]["self_group"] = json!("0x80"),
                &["owners (pf0)", "self_group"],
            ),
            (
                "member 0",
                |d| d["owners"][0]["sessions"][0]["members"][0]["id"] = json!(0),
                &["owners (pf0)", "member 0"],
            ),
            (
                "member 4",
                |d| d["owners"][0]["sessions"][0]["members"][1]["id"] = json!(4),
                &["owners (pf0)", "member 4"],
            ),
            (
                "order",
                |d| {
                    at(d, "/owners/0/sessions/0/members")
                        .as_array_mut()
                        .unwrap()
                        .swap(0, 1)
                },
                &["owners[0].sessions[0].members[1]"],
            ),
            (
                "member twice",
                |d| twice(d, "/owners/0/sessions/0/members"),
                &["owners[0].sessions[0].members[2]"],
            ),
            (
                "mode",
                |d| d["owners"][0]["sessions"][0]["members"][0]["mode"] = json!("paused"),
                &["owners[0].sessions[0].members[0].mode"],
            ),
            (
                "reading beyond the end",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][1]["reading"]["part"]["at"] =
                        json!(100_000)
                },
                &["owners[0].sessions[0].members[1].reading.part.at"],
            ),
            (
                "reading what is none",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][1]["reading"]["part"]["context"] =
                        json!("00".repeat(200))
                },
                &["owners (pf0)", "member 2", "reading"],
            ),
            (
                "writing while active",
                |d| d["owners"][0]["sessions"][1]["members"][1]["mode"] = json!("active"),
                &["owners (pf0)", "member 3", "writing"],
            ),
            (
                "writing what is none",
                |d| {
                    d["owners"][0]["sessions"][1]["members"][1]["writing"]["partial"] =
                        json!("00".repeat(40))
                },
                &["owners (pf0)", "member 3", "writing"],
            ),
            (
                "complete that is none",
                |d| {
                    d["owners"][0]["sessions"][1]["members"][1]["writing"]["complete"] = json!("00")
                },
                &["owners (pf0)", "member 3", "writing"],
            ),
            (
                "page size",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][0]["recording"]["page_size"] =
                        json!("0x1800")
                },
                &["owners[0].sessions[0].members[0].recording.page_size"],
            ),
            (
                "no ranges",
                |d| d["owners"][0]["sessions"][0]["members"][0]["recording"]["ranges"] = json!([]),
                &["owners (pf0)", "member 1", "recording"],
            ),
            (
                "ranges beyond RAM",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][0]["recording"]["ranges"] =
                        json!([{ "page_address": "0x0", "page_count": u64::MAX }])
                },
                &["owners[0].sessions[0].members[0].recording.ranges[0]"],
            ),
            (
                "no pages",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][0]["recording"]["ranges"][0]["page_count"] =
                        json!(0)
                },
                &["owners[0].sessions[0].members[0].recording.ranges[0]"],
            ),
            (
                "written elsewhere",
                |d| {
                    d["owners"][0]["sessions"][0]["members"][0]["recording"]["written"] =
                        json!([{ "page_address": "0x10000000", "page_count": 1 }])
                },
                &["owners (pf0)", "member 1", "recording"],
            ),
            (
                "transition without its command",
                |d| {
                    d["owners"][0]["sessions"][0]["transition"] =
                        json!({ "member": 2, "mode": "freeze", "previous": "active" })
                },
                &["owners (pf0)", "guest", "transition"],
            ),
            (
                "transition of the monitor",
                |d| {
                    d["owners"][0]["sessions"][1]["transition"] =
                        json!({ "member": 2, "mode": "stop", "previous": "active" })
                },
                &["owners (pf0)", "monitor", "transition"],
            ),
            (
                "transition to another mode",
                |d| {
                    d["owners"][0]["sessions"][0]["transition"] =
                        json!({ "member": 2, "mode": "stop", "previous": "active" })
                },
                &["owners (pf0)", "guest", "transition"],
            ),
            (
                "transition of nobody",
                |d| {
                    d["owners"][0]["sessions"][0]["transition"] =
                        json!({ "member": 77, "mode": "stop", "previous": "active" })
                },
                &["owners (pf0)", "guest", "transition"],
            ),
            (
                "patience",
                |d| d["owners"][0]["sessions"][0]["transition"] = json!({ "member": 2, "mode": "freeze", "previous": "active", "recall_after_ms": u64::MAX }),
                &["owners (pf0)", "guest", "transition"],
            ),
            (
                "no administration virtqueue",
                |d| {
                    function(d, "pf0")["transient"]
                        .as_object_mut()
                        .unwrap()
                        .remove("admin_queue");
                },
                &["functions (pf0)", "administration virtqueue"],
            ),
            (
                "administration virtqueue of a member",
                |d| {
                    let queue = function(d, "pf0")["transient"]["admin_queue"].clone();
                    function(d, "pf0-vf1")["transient"]["admin_queue"] = queue;
                },
                &["functions (pf0-vf1)", "administration virtqueue"],
            ),
            (
                "its size",
                |d| function(d, "pf0")["transient"]["admin_queue"]["size"] = json!(3),
                &["functions (pf0)", "queue 1", "size"],
            ),
            (
                "its rings",
                |d| {
                    function(d, "pf0")["transient"]["admin_queue"]["driver_area"] =
                        json!("0x8000000")
                },
                &["functions (pf0)", "queue 1"],
            ),
            (
                "its vector",
                |d| function(d, "pf0")["transient"]["admin_queue"]["vector"] = json!(3),
                &["functions (pf0)", "queue 1"],
            ),
            (
                "its chains",
                |d| function(d, "pf0")["transient"]["admin_queue"]["owned"] = json!([64]),
                &["functions[0].transient.admin_queue.owned[0]"],
            ),
            (
                "its chains twice",
                |d| function(d, "pf0")["transient"]["admin_queue"]["owned"] = json!([1, 1]),
                &["functions (pf0)", "queue 1", "twice"],
            ),
            (
                "member's queue",
                |d| field(d, "pf0-vf1", "VQ_CFG", Some(0))["device_area"] = json!("0x3fffffc"),
                &["functions (pf0-vf1)", "queue 0"],
            ),
            (
                "member's ISR",
                |d| function(d, "pf0-vf1")["transient"]["isr"] = json!(8),
                &["functions (pf0-vf1)", "ISR"],
            ),
            (
                "member's context",
                |d| add_field(d, "pf0-vf1", json!({ "type": "0x1234", "value": "" })),
                &["functions[1].context[5]", "0x1234"],
            ),
        ],
    );
    refuse(
        "owners.json",
        &[
            (
                "session of a guest that has no owner",
                |d| twice(d, "/owners/1/sessions"),
                &["owners[1].sessions[1].party"],
            ),
            (
                "guest of an owner that is kept",
                |d| {
                    let mut guest = d["owners"][1]["sessions"][0].clone();
                    guest["party"] = json!("guest");
                    at(d, "/owners/1/sessions")
                        .as_array_mut()
                        .unwrap()
                        .push(guest);
                },
                &["owners (pf1)", "guest", "no such session"],
            ),
        ],
    );
}

/// What a guest can bring about is no fault, however foolish it is: it comes back as it was.
#[test]
fn what_a_guest_can_do_is_restored() {
    let snapshot = Snapshot::new("devices.json");
    let path = snapshot.path();
    let good = serde_json::to_value(&snapshot.state).unwrap();
    let cases: [(&str, fn(&mut Value)); 7] = [
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
