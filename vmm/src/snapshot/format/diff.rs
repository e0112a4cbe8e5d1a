//! What differs between two documents, field by field.
//!
//! Objects in a list are matched by what names them, not by where they stand: the first of [`KEYS`] that all of them
//! have and no two share, or type and queue of a field of a device context. Bytes in hexadecimal are compared byte by
//! byte.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde_json::Value;

use super::hex::HexBytes;

/// Members that name an object in a list, the best first.
pub const KEYS: [&str; 6] = ["name", "place", "index", "id", "party", "page_address"];
/// Shortest text that is taken for bytes in hexadecimal, in digits.
const BYTES: usize = 16;
/// Runs of bytes that are shown of one value.
const RUNS: usize = 4;
/// Longest value that is shown, in bytes.
const SHOWN: usize = 80;

/// A field that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where: `functions[disk0].context[VQ_CFG of queue 0].size`.
    pub path: String,
    /// What it is there, and there.
    pub what: What,
}

/// How a field differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// It has two values.
    Changed(String, String),
    /// Its entries have another order.
    Order(String, String),
    /// It is in the first document alone.
    First(String),
    /// It is in the second document alone.
    Second(String),
    /// Some of its bytes differ.
    Bytes {
        /// The first of them, by offset: what they are there, and there.
        runs: Vec<(usize, String, String)>,
        /// Number of runs that are not among them.
        more: usize,
    },
}

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// The first of them, in the order of the document.
    pub shown: Vec<Difference>,
    /// Number of those that are not among them.
    pub more: u64,
}

impl Differences {
    /// Nothing differs.
    pub fn is_empty(&self) -> bool {
        self.shown.is_empty() && self.more == 0
    }
}

/// Compares two documents. At most `most` differences are kept; fields at a path in `ignore`, or below one, are not
/// looked at.
pub fn compare(first: &Value, second: &Value, ignore: &[String], most: usize) -> Differences {
    let mut comparison = Comparison {
        ignore,
        most,
        found: Differences::default(),
    };
    comparison.values("", first, second);
    comparison.found
}

struct Comparison<'a> {
    ignore: &'a [String],
    most: usize,
    found: Differences,
}

impl Comparison<'_> {
    fn add(&mut self, path: &str, what: impl FnOnce() -> What) {
        if self.found.shown.len() >= self.most {
            self.found.more += 1;
            return;
        }
        let what = what();
        self.found.shown.push(Difference {
            path: path.to_owned(),
            what,
        });
    }

    /// A value that is in one of the two alone.
    fn alone(&mut self, path: &str, value: &Value, what: fn(String) -> What) {
        if !self.ignore.iter().any(|ignored| ignored == path) {
            self.add(path, || what(show(value)));
        }
    }

    fn values(&mut self, path: &str, first: &Value, second: &Value) {
        if first == second || self.ignore.iter().any(|ignored| ignored == path) {
            return;
        }
        match (first, second) {
            (Value::Object(a), Value::Object(b)) => {
                let names: BTreeSet<_> = a.keys().chain(b.keys()).collect();
                for name in names {
                    let short = shorten(name);
                    let path = match path {
                        "" => short,
                        path => format!("{path}.{short}"),
                    };
                    self.maybe(&path, a.get(name), b.get(name));
                }
            }
            (Value::Array(a), Value::Array(b)) => self.lists(path, a, b),
            (Value::String(a), Value::String(b)) => match (bytes_of(a), bytes_of(b)) {
                (Some(x), Some(y)) if mostly_same(&x, &y) => self.bytes(path, &x, &y),
                _ => self.add(path, || What::Changed(show(first), show(second))),
            },
            _ => self.add(path, || What::Changed(show(first), show(second))),
        }
    }

    fn maybe(&mut self, path: &str, first: Option<&Value>, second: Option<&Value>) {
        match (first, second) {
            (Some(a), Some(b)) => self.values(path, a, b),
            (Some(a), None) => self.alone(path, a, What::First),
            (None, Some(b)) => self.alone(path, b, What::Second),
            (None, None) => {}
        }
    }

    fn lists(&mut self, path: &str, first: &[Value], second: &[Value]) {
        let objects = |list: &[Value]| list.iter().all(Value::is_object);
        if let Some((a, b)) = keyed(first, second) {
            // What is in both can stand in another order.
            let (x, y) = (a.common(&b), b.common(&a));
            if x != y {
                let names = |names: Vec<&str>| shorten(&names.join(", "));
                self.add(path, || What::Order(names(x), names(y)));
            }
            // In the order of the first list; what the second has besides follows.
            for (name, value) in &a.order {
                self.maybe(
                    &format!("{path}[{}]", shorten(name)),
                    Some(value),
                    b.by_name.get(name).copied(),
                );
            }
            for (name, value) in &b.order {
                if !a.by_name.contains_key(name) {
                    self.maybe(&format!("{path}[{}]", shorten(name)), None, Some(value));
                }
            }
        } else if first.len() == second.len() || objects(first) && objects(second) {
            for index in 0..first.len().max(second.len()) {
                let path = format!("{path}[{index}]");
                self.maybe(&path, first.get(index), second.get(index));
            }
        } else {
            let list = |list: &[Value]| show(&Value::Array(list.to_vec()));
            self.add(path, || What::Changed(list(first), list(second)));
        }
    }

    fn bytes(&mut self, path: &str, first: &[u8], second: &[u8]) {
        self.add(path, || {
            let mut runs: Vec<(usize, usize)> = Vec::new();
            for (at, (a, b)) in first.iter().zip(second).enumerate() {
                match runs.last_mut() {
                    _ if a == b => {}
                    Some((_, end)) if *end == at => *end += 1,
                    _ => runs.push((at, at + 1)),
                }
            }
            let digits = |bytes: &[u8], (start, end)| {
                let bytes: &[u8] = bytes.get(start..end).unwrap_or_default();
                shorten(
                    &bytes
                        .iter()
                        .map(|byte| format!("{byte:02x}"))
                        .collect::<String>(),
                )
            };
            What::Bytes {
                more: runs.len().saturating_sub(RUNS),
                runs: runs
                    .into_iter()
                    .take(RUNS)
                    .map(|run| (run.0, digits(first, run), digits(second, run)))
                    .collect(),
            }
        });
    }
}

/// The entries of a list by their names.
struct Keyed<'a> {
    order: Vec<(String, &'a Value)>,
    by_name: BTreeMap<String, &'a Value>,
}

impl Keyed<'_> {
    /// The names that `other` has too, in order.
    fn common(&self, other: &Keyed<'_>) -> Vec<&str> {
        let names = self.order.iter().map(|(name, _)| name.as_str());
        names
            .filter(|name| other.by_name.contains_key(*name))
            .collect()
    }
}

/// Both lists by names, if there is a way to name all entries of both.
fn keyed<'a>(first: &'a [Value], second: &'a [Value]) -> Option<(Keyed<'a>, Keyed<'a>)> {
    let plain = KEYS
        .iter()
        .map(|key| move |value: &Value| name_of(value, key));
    for key in plain {
        if let (Some(a), Some(b)) = (by_key(first, key), by_key(second, key)) {
            return Some((a, b));
        }
    }
    Some((by_key(first, field_name)?, by_key(second, field_name)?))
}

fn by_key<'a>(list: &'a [Value], key: impl Fn(&Value) -> Option<String>) -> Option<Keyed<'a>> {
    let mut keyed = Keyed {
        order: Vec::with_capacity(list.len()),
        by_name: BTreeMap::new(),
    };
    for value in list {
        let name = key(value)?;
        if keyed.by_name.insert(name.clone(), value).is_some() {
            return None;
        }
        keyed.order.push((name, value));
    }
    Some(keyed)
}

fn name_of(value: &Value, key: &str) -> Option<String> {
    match value.get(key)? {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(format!("{key} {number}")),
        _ => None,
    }
}

/// A field of a device context.
fn field_name(value: &Value) -> Option<String> {
    let kind = value.get("type")?.as_str()?;
    Some(match value.get("queue") {
        Some(queue) => format!("{kind} of queue {queue}"),
        None => kind.to_owned(),
    })
}

/// The bytes of a text that is nothing but their digits.
fn bytes_of(text: &str) -> Option<Vec<u8>> {
    if text.len() < BYTES {
        return None;
    }
    HexBytes::parse(text).map(|bytes| bytes.0)
}

/// Of the same length, and no more than half of the bytes differ: where they do is of interest.
fn mostly_same(first: &[u8], second: &[u8]) -> bool {
    let same = first.iter().zip(second).filter(|(a, b)| a == b).count();
    first.len() == second.len() && same * 2 >= first.len()
}

/// A value in a few words.
fn show(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        value => value.to_string(),
    };
    shorten(&text)
}

/// At most [`SHOWN`] bytes of `text`.
pub fn shorten(text: &str) -> String {
    if text.len() <= SHOWN {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(SHOWN);
    format!(
        "{}… ({} bytes)",
        text.get(..end).unwrap_or_default(),
        text.len()
    )
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.what {
            What::Changed(first, second) => write!(f, "{path}: {first} -> {second}"),
            What::Order(first, second) => write!(f, "{path}: order {first} -> {second}"),
            What::First(value) => write!(f, "{path}: only in the first: {value}"),
            What::Second(value) => write!(f, "{path}: only in the second: {value}"),
            What::Bytes { runs, more } => {
                write!(f, "{path}:")?;
                for (at, first, second) in runs {
                    write!(f, " at byte {at:#x} {first} -> {second};")?;
                }
                match more {
                    0 => Ok(()),
                    more => write!(f, " and {more} more places"),
                }
            }
        }
    }
}
