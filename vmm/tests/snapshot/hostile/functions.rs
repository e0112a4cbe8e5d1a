//! Device contexts and what they leave out.

use serde_json::{Value, json};

use super::{add_field, at, field, function, refuse, remove, twice};

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
fn announcements_that_cannot_be_are_refused() {
    refuse(
        "announcements.json",
        &[
            (
                "of a driver that cannot be asked",
                |d| field(d, "net1", "DRV_FEATURES", None)["features"] = json!("0x100030000"),
                &["functions (net1)", "configuration"],
            ),
            (
                "without a link",
                |d| field(d, "net1", "DEV_CFG", None)["config"] = json!("02005e0000030200"),
                &["functions (net1)", "configuration"],
            ),
            (
                "of a machine whose devices have no control queue",
                |d| d["machine"]["layout"] = json!(1),
                &["pci: PCI function \"pf0\"", "configuration space"],
            ),
        ],
    );
}
