//! Sessions of owners, and names.

use serde_json::json;

use super::{add_field, at, field, function, refuse, twice};

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
