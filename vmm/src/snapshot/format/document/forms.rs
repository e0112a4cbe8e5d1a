//! Whether a document has objects where objects belong. Derived types take a list of the values of a struct as well, and
//! an object in place of the name of a variant: neither is in the schema, and the former depends on the order of fields.

use std::cell::Cell;
use std::io;

use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, Serializer};

use super::FormatError;

/// How many objects and lists are in a document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Forms {
    pub(super) objects: u64,
    pub(super) lists: u64,
}

/// Rejects `bytes`, in which there are `found`, if `document`, which was made of them, is written with others.
pub(super) fn check<T: Serialize>(
    bytes: &[u8],
    found: Forms,
    document: &T,
) -> Result<(), FormatError> {
    let written = Cell::default();
    let mut serializer = Serializer::with_formatter(io::sink(), Count(&written));
    let counted = document.serialize(&mut serializer);
    counted.map_err(|error| FormatError::at("", error))?;
    if written.get() == found {
        return Ok(());
    }
    let values = serde_json::from_slice::<Value>(bytes).and_then(|found| {
        let own = serde_json::to_value(document)?;
        Ok((found, own))
    });
    let (found, own) = values.map_err(|error| FormatError::at("", error))?;
    let (path, reason) = difference(&found, &own, String::new()).unwrap_or_default();
    Err(FormatError::at(path.trim_start_matches('.'), reason))
}

/// The first place at which `found` has another kind of value than `own`.
fn difference(found: &Value, own: &Value, path: String) -> Option<(String, &'static str)> {
    match (found, own) {
        (Value::Object(found), Value::Object(own)) => {
            let mut members = found.iter().filter_map(|(name, value)| {
                difference(value, own.get(name)?, format!("{path}.{name}"))
            });
            members.next()
        }
        (Value::Array(found), Value::Array(own)) => {
            let entries = found.iter().zip(own).enumerate();
            entries
                .filter_map(|(index, (found, own))| {
                    difference(found, own, format!("{path}[{index}]"))
                })
                .next()
        }
        (Value::Array(_), _) => Some((path, "is a list, and has to be an object")),
        (Value::Object(_), _) => Some((path, "is an object, and has to be the name alone")),
        _ => None,
    }
}

/// Counts what is written.
struct Count<'a>(&'a Cell<Forms>);

impl Formatter for Count<'_> {
    fn begin_object<W: io::Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        let Forms { objects, lists } = self.0.get();
        self.0.set(Forms {
            objects: objects + 1,
            lists,
        });
        Ok(())
    }

    fn begin_array<W: io::Write + ?Sized>(&mut self, _: &mut W) -> io::Result<()> {
        let Forms { objects, lists } = self.0.get();
        self.0.set(Forms {
            objects,
            lists: lists + 1,
        });
        Ok(())
    }
}
