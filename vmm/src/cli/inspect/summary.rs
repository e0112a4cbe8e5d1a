//! A snapshot for people.

use std::fmt::Write;

use migration::PAGE_SIZE;
use serde::Deserialize;
use serde_json::Value;

use super::Snapshot;
use super::memory::Memory;
use crate::layout::format_memory_size;
use crate::snapshot::format::context::Context;
use crate::snapshot::format::diff::{KEYS, shorten};

/// Columns of names.
const COLUMN: usize = 24;
/// Sections that are shown before all others.
const FIRST: [&str; 3] = ["created", "machine", "memory"];
/// Names of a list that are shown.
const NAMES: usize = 12;

/// A snapshot in lines; of device contexts no more than `limit` fields.
pub fn describe(snapshot: &Snapshot, limit: usize) -> String {
    let state = &snapshot.state;
    let mut text = String::new();
    line(
        &mut text,
        0,
        "snapshot",
        &snapshot.path.display().to_string(),
    );
    let format = scalar(&state["format"]).unwrap_or_default();
    let version = &state["version"];
    line(
        &mut text,
        0,
        "format",
        &format!("{format}, version {version}"),
    );
    let members = state.as_object().into_iter().flatten();
    let rest = members.filter(|(name, _)| !["format", "version"].contains(&name.as_str()));
    let (plain, mut sections): (Vec<_>, Vec<_>) =
        rest.partition(|(_, value)| scalar(value).is_some());
    let rank = |name: &str| FIRST.iter().position(|first| *first == name);
    sections.sort_by_key(|(name, _)| rank(name).unwrap_or(FIRST.len()));
    for (name, value) in plain {
        line(&mut text, 0, name, &scalar(value).unwrap_or_default());
    }
    memory(&mut text, &snapshot.memory);
    for (name, value) in sections {
        section(&mut text, name, value);
    }
    contexts(&mut text, state, limit);
    text
}

/// The files of the memory.
fn memory(text: &mut String, memory: &Memory) {
    let verified = if memory.verified {
        ", and is what was written"
    } else {
        ""
    };
    let ram = format!("{} of RAM{verified}", size(memory.bytes));
    line(text, 0, "memory files", &ram);
    for layer in &memory.layers {
        let what = format!(
            "{}: {} pages, {} of them data ({}); {} on disk, {} in holes",
            layer.directory.display(),
            layer.pages,
            layer.data_pages,
            size(layer.data_pages * PAGE_SIZE),
            size(layer.extents.data),
            size(layer.extents.holes()),
        );
        line(
            text,
            2,
            &layer.id.chars().take(8).collect::<String>(),
            &what,
        );
    }
    if let Some(why) = &memory.missing {
        line(text, 2, "base", &format!("not found: {why}"));
    }
}

fn line(text: &mut String, indent: usize, name: &str, value: &str) {
    let (name, value) = (printable(name), printable(value));
    let width = COLUMN - indent;
    // Writing to a string does not fail.
    let _ = writeln!(text, "{:indent$}{name:<width$} {value}", "");
}

/// A value that is neither an object nor a list.
fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::Object(_) | Value::Array(_) => None,
        Value::String(text) => Some(shorten(text)),
        value => Some(value.to_string()),
    }
}

/// An object or list of the state: its plain members, and how many others there are.
fn section(text: &mut String, name: &str, value: &Value) {
    let Some(members) = value.as_object() else {
        line(text, 0, name, &summary(value));
        return;
    };
    let _ = writeln!(text, "{}", printable(name));
    for (name, value) in members.iter().filter(|(name, _)| *name != "version") {
        line(text, 2, name, &summary(value));
    }
}

fn summary(value: &Value) -> String {
    match value {
        Value::Object(members) => {
            let members = members.iter();
            let plain = members.map(|(name, value)| match scalar(value) {
                Some(value) => format!("{name} {value}"),
                None => format!("{name} …"),
            });
            shorten(&plain.collect::<Vec<_>>().join(", "))
        }
        Value::Array(entries) => {
            let count = match entries.len() {
                1 => "1 entry".to_owned(),
                count => format!("{count} entries"),
            };
            let names: Vec<_> = entries.iter().take(NAMES).filter_map(name).collect();
            if names.is_empty() {
                return count;
            }
            let more = if entries.len() > NAMES { ", …" } else { "" };
            format!("{count}: {}{more}", names.join(", "))
        }
        value => scalar(value).unwrap_or_default(),
    }
}

/// What an entry of a list is called.
fn name(entry: &Value) -> Option<String> {
    let value = KEYS.iter().find_map(|key| entry.get(key))?;
    scalar(value)
}

/// Device contexts field by field.
fn contexts(text: &mut String, state: &Value, limit: usize) {
    let functions = state["functions"].as_array();
    let (mut shown, mut left) = (0, 0);
    for function in functions.into_iter().flatten() {
        let Ok(context) = Context::deserialize(&function["context"]) else {
            continue;
        };
        let name = scalar(&function["name"]).unwrap_or_default();
        if shown < limit && !context.0.is_empty() {
            let _ = writeln!(text, "\n{}", printable(&name));
        }
        for field in &context.0 {
            if shown < limit {
                let _ = writeln!(text, "  {}", printable(&field.to_string()));
                shown += 1;
            } else {
                left += 1;
            }
        }
    }
    if left > 0 {
        let _ = writeln!(
            text,
            "\n{left} more fields of device contexts; --limit 0 shows all"
        );
    }
}

fn size(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    if bytes > 0 && bytes.is_multiple_of(MIB) {
        format_memory_size(bytes)
    } else if bytes < MIB {
        format!("{}K", bytes.div_ceil(KIB))
    } else {
        format!("{:.1}M", bytes as f64 / MIB as f64)
    }
}

/// `text` without what would move the cursor of a terminal.
pub fn printable(text: &str) -> String {
    let escaped = |c: char| c.is_control() || ('\u{202a}'..='\u{2069}').contains(&c);
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if escaped(c) {
            plain.extend(c.escape_unicode());
        } else {
            plain.push(c);
        }
    }
    plain
}
