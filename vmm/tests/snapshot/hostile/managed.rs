//! Management devices and their managed devices.

use serde_json::{Value, json};

use super::{at, function, refuse, remove};

/// The first managed device of `manager0`.
fn device(document: &mut Value) -> &mut Value {
    &mut function(document, "manager0")["transient"]["managed"]["devices"][0]
}

#[test]
fn managed_devices_that_cannot_be_are_refused() {
    refuse(
        "managed.json",
        &[
            (
                "no list",
                |d| {
                    let transient = &mut function(d, "manager0")["transient"];
                    transient.as_object_mut().unwrap().remove("managed");
                },
                &["functions (manager0)", "its managed devices are missing"],
            ),
            (
                "a list of a function that manages nothing",
                |d| {
                    let list = function(d, "manager0")["transient"]["managed"].clone();
                    function(d, "manager0-1")["transient"]["managed"] = list;
                },
                &[
                    "functions[2].transient.managed",
                    "the transport virtqueue is not",
                ],
            ),
            (
                "no transport virtqueue",
                |d| {
                    let transient = &mut function(d, "manager0")["transient"];
                    transient.as_object_mut().unwrap().remove("transport_queue");
                },
                &[
                    "functions[0].transient.managed",
                    "the transport virtqueue is not",
                ],
            ),
            ("id 0", |d| device(d)["id"] = json!(0), &["device id 0"]),
            (
                "an id twice",
                |d| device(d)["id"] = json!(2),
                &["device id 2"],
            ),
            (
                "an id to come",
                |d| device(d)["id"] = json!(3),
                &["device id 3"],
            ),
            (
                "a negative id",
                |d| device(d)["id"] = json!(-1),
                &["functions[0].transient.managed.devices[0].id"],
            ),
            (
                "no next id",
                |d| function(d, "manager0")["transient"]["managed"]["next_id"] = json!(0),
                &["device id 0"],
            ),
            (
                "a seat that is not there",
                |d| device(d)["name"] = json!("manager0-9"),
                &["this management device cannot have \"manager0-9\""],
            ),
            (
                "a seat of another",
                |d| device(d)["name"] = json!("manager1-1"),
                &["cannot have \"manager1-1\""],
            ),
            (
                "a seat twice",
                |d| device(d)["name"] = json!("manager0-2"),
                &["cannot have \"manager0-2\", or not twice"],
            ),
            (
                "features",
                |d| device(d)["features"] = json!("0x1000000000000000"),
                &["manager0-1: features 0x1000000000000000"],
            ),
            (
                "features that its driver has accepted and it does not offer",
                |d| device(d)["features"] = json!("0x0"),
                &["functions (manager0-1)", "features"],
            ),
            (
                "no messages",
                |d| device(d)["queues"] = json!([]),
                &["manager0-1: 0 messages"],
            ),
            (
                "an address",
                |d| device(d)["config"]["address"] = json!("0x2"),
                &["manager0-1", "0x2, which is not a multiple of 4"],
            ),
            (
                "a message that is disabled and pending",
                |d| device(d)["config"]["pending"] = json!(true),
                &["manager0-1: a message is pending and disabled"],
            ),
            (
                "a device without state",
                |d| remove(d, "/functions", "manager0-2"),
                &["functions: manager0-2 is missing"],
            ),
            (
                "state of what is no device",
                |d| {
                    let mut more = function(d, "manager1-1").clone();
                    more["name"] = json!("manager1-2");
                    at(d, "/functions").as_array_mut().unwrap().push(more);
                },
                &["this machine has no \"manager1-2\""],
            ),
        ],
    );
}

#[test]
fn management_devices_that_cannot_be_are_refused() {
    refuse(
        "managed.json",
        &[
            (
                "devices",
                |d| d["machine"]["managers"][0]["devices"] = json!(0),
                &["machine.managers[0]"],
            ),
            (
                "wire",
                |d| d["machine"]["managers"][0]["wire"] = json!("loose"),
                &["machine.managers[0]", "wire: loose is unknown"],
            ),
            (
                "features",
                |d| d["machine"]["managers"][0]["queue_feature"] = json!(46),
                &["machine.managers[0]", "both 46"],
            ),
            (
                "a feature that is taken",
                |d| d["machine"]["managers"][0]["queue_feature"] = json!(34),
                &["machine.managers[0]", "44 to 49"],
            ),
            (
                "a capability",
                |d| {
                    d["machine"]["managers"][0]["stops"]["device_state_cap"] = json!(true);
                },
                &["machine.managers[0]", "device_state_cap"],
            ),
            (
                "a relative path",
                |d| {
                    d["machine"]["managers"][0]["device"]["block"]["path"] = json!("d%d");
                },
                &["machine.managers[0].device.block.path", "relative"],
            ),
            (
                "a path without a number",
                |d| {
                    d["machine"]["managers"][0]["device"]["block"]["path"] = json!("/d");
                },
                &["machine.managers[0]", "does not have %d once"],
            ),
            (
                "a file of no device",
                |d| {
                    let files = &mut d["machine"]["managers"][0]["device"]["block"]["files"];
                    files["7"] = files["0"].clone();
                },
                &["machine.managers[0].device.block.files", "no device 7"],
            ),
            (
                "another address",
                |d| {
                    d["machine"]["managers"][1]["device"]["net"]["mac"] =
                        json!("01:00:00:00:00:00");
                },
                &["machine.managers[1]"],
            ),
        ],
    );
}
