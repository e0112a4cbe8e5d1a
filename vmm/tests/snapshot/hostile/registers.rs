//! Registers on the PCI bus, and members by them.

use serde_json::json;

use super::{at, function, named, poke, refuse, remove, set_members, sriov, twice};

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
                |d| {
                    let owner = &mut d["machine"]["pfs"][0];
                    owner["vfs"] = json!(2);
                    let files = owner["device"]["block"]["vf_files"]
                        .as_object_mut()
                        .unwrap();
                    files.retain(|number, _| number == "1" || number == "2");
                },
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
