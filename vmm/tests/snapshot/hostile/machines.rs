//! Machines and processors that cannot be.

use serde_json::{Value, json};

use super::{at, refuse, twice};

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
                |d| d["machine"]["layout"] = json!(3),
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
