//! Snapshots as people and programs read them.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use super::{jq, save, text};
use crate::load::Load;
use crate::trial;
use crate::vm::{output, tern};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("snapshot::jq_and_inspect_read_it", read),
        trial("snapshot::curl_asks_for_it", curl),
    ]
}

/// Exit status of `tern inspect` of two that are not the same.
const DIFFERENT: i32 = 10;

fn inspect(words: &[&str]) -> Result<Output> {
    let mut command = Command::new(tern()?);
    command.arg("inspect").args(words);
    output(command)
}

fn shown(words: &[&str], status: i32) -> Result<String> {
    let output = inspect(words)?;
    ensure!(
        output.status.code() == Some(status),
        "tern inspect {words:?}: {output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn mode(path: &Path) -> Result<u32> {
    Ok(path.metadata()?.permissions().mode() & 0o777)
}

fn read() -> Result<()> {
    let load = Load::with_everything(2)?.parameter("lost=64");
    let (a, b) = (load.path("a"), load.path("b"));
    let mut guest = load.run()?;
    guest.ticks(2)?;
    save(&guest, &a, &[])?;
    guest.ticks(2)?;
    save(&guest, &b, &[])?;
    guest.ticks(1)?;
    guest.enough()?;

    let state = a.join("state.json");
    ensure!(mode(&state)? == 0o600 && mode(&a.join("memory.bin"))? == 0o600);
    for (filter, expected) in [
        (".format", json!("tern-snapshot")),
        (".version", json!(1)),
        ("keys_unsorted[0:2]", json!(["format", "version"])),
        (".vcpus | length", json!(2)),
        // No JSON in strings.
        (
            "[.. | strings | select(startswith(\"{\"))] | length",
            json!(0),
        ),
        // No number that another program would round.
        (
            "[.. | numbers | select(. > 9007199254740991)] | length",
            json!(0),
        ),
    ] {
        let found = jq(&state, filter)?;
        ensure!(found == expected, "jq '{filter}': {found}");
    }

    let (a, b) = (text(&a)?, text(&b)?);
    let summary = shown(&[a], 0)?;
    let words = summary.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in ["pf1-vf1", "disk0", "vcpus 2 entries"] {
        ensure!(words.contains(part), "no {part} in\n{summary}");
    }
    shown(&[a, "--verify"], 0)?;
    let value: Value = serde_json::from_str(&shown(&[a, "--json"], 0)?)?;
    ensure!(value["state"]["format"] == "tern-snapshot", "{value}");
    let differences = shown(&[a, b, "--limit", "0"], DIFFERENT)?;
    // The guest wrote to its disk, and time went by.
    for part in ["functions[disk0]", "clock", "vcpus["] {
        ensure!(differences.contains(part), "no {part} in\n{differences}");
    }
    // What is the same is not shown.
    ensure!(!differences.contains("machine.cpus"), "{differences}");
    ensure!(shown(&[a, a], 0)?.is_empty());
    Ok(())
}

fn curl() -> Result<()> {
    let load = Load::new(1)?;
    let directory = load.path("snapshot");
    let mut guest = load.run()?;
    guest.ticks(1)?;
    let put = |body: Value| guest.control.curl("PUT", "/api/v1/snapshot", Some(&body));
    let (code, answer) = put(json!({"directory": text(&directory)?, "then": "pause"}))?;
    ensure!(
        code == 200 && answer["state"] == "paused",
        "{code} {answer}"
    );
    ensure!(answer["directory"] == text(&directory)?, "{answer}");
    for (body, wanted, part) in [
        (
            json!({"directory": text(&directory)?}),
            409,
            text(&directory)?,
        ),
        (json!({"directory": "/x", "than": "pause"}), 400, "than"),
        (json!({"directory": "/x", "then": "dance"}), 400, "dance"),
        (json!({}), 400, "directory"),
    ] {
        let (code, answer) = put(body.clone())?;
        let said = answer["error"].as_str().unwrap_or_default();
        ensure!(
            (400..500).contains(&code) && said.contains(part),
            "{body}: {code} {answer}"
        );
        ensure!(code == wanted, "{body}: {code} {answer}");
    }
    ensure!(guest.control.state()? == "paused");
    guest.control.ask("resume", &[])?;
    guest.ticks(1)?;
    guest.enough().map(drop)
}
