//! Configuration space as lines that a person can read and compare.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::error::{At, Invalid};
use super::hex::{Hex, HexBytes};

/// Bytes of a line.
const LINE: usize = 16;
/// Bytes of an extended configuration space.
const MAX_LEN: u16 = 4096;

/// Bytes of a configuration space, in lines of 16 under their offsets. Lines of zeroes are left out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Bytes {
    /// Number of bytes, at most 4096.
    #[schemars(range(max = 4096))]
    pub length: u16,
    /// Lines that are not all zero.
    pub lines: Lines,
}

/// Lines of a configuration space, ascending by offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lines(Vec<(u16, Vec<u8>)>);

impl Bytes {
    /// The lines of `bytes`, of which there are at most 4096.
    pub fn of(bytes: &[u8]) -> Self {
        let lines = bytes.chunks(LINE).zip((0..MAX_LEN).step_by(LINE));
        let lines = lines
            .filter(|(line, _)| line.iter().any(|byte| *byte != 0))
            .map(|(line, at)| (at, line.to_vec()));
        Self {
            length: bytes.len() as u16,
            lines: Lines(lines.collect()),
        }
    }

    /// The bytes.
    ///
    /// # Errors
    ///
    /// A length that no configuration space has, or a line outside it.
    pub fn plain(&self) -> Result<Vec<u8>, Invalid> {
        if self.length > MAX_LEN {
            let reason = format!("{} is more than {MAX_LEN}", self.length);
            return Err(Invalid::new(reason)).field("length");
        }
        let mut bytes = vec![0; self.length.into()];
        for (at, line) in &self.lines.0 {
            let at = usize::from(*at);
            let whole = (bytes.len().saturating_sub(at)).min(LINE);
            match bytes.get_mut(at..at + line.len()) {
                Some(place) if line.len() == whole && at % LINE == 0 => {
                    place.copy_from_slice(line);
                }
                _ => {
                    let reason = format!(
                        "{} bytes at {at:#05x}; a line has {LINE}, begins at a multiple of that, and ends within the {} \
                         bytes of the configuration space",
                        line.len(),
                        self.length
                    );
                    return Err(Invalid::new(reason)).field("lines");
                }
            }
        }
        Ok(bytes)
    }
}

impl Serialize for Lines {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let lines = self.0.iter();
        serializer.collect_map(lines.map(|(at, line)| {
            // Three digits, so that they stand below each other.
            (format!("{at:#05x}"), HexBytes(line.clone()))
        }))
    }
}

impl<'de> Deserialize<'de> for Lines {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(LinesVisitor)
    }
}

struct LinesVisitor;

impl<'de> Visitor<'de> for LinesVisitor {
    type Value = Lines;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("lines of bytes under their offsets, as in {\"0x010\": \"…\"}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Lines, A::Error> {
        let mut lines: Vec<(u16, Vec<u8>)> = Vec::new();
        while let Some((Hex(at), HexBytes(line))) = map.next_entry::<Hex<u16>, HexBytes>()? {
            if lines.last().is_some_and(|(before, _)| at <= *before) {
                let message = format!("the line at {at:#05x} follows one that does not precede it");
                return Err(A::Error::custom(message));
            }
            lines.push((at, line));
        }
        Ok(Lines(lines))
    }
}

impl JsonSchema for Lines {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Lines".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "object",
            "additionalProperties": false,
            "patternProperties": {
                "^0x[0-9a-f]{2}0$": { "type": "string", "pattern": "^([0-9a-fA-F]{2}){1,16}$" },
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::json;

    fn refusal(json: serde_json::Value) -> String {
        // Through text, since the members of a value are sorted.
        match serde_json::from_str::<Bytes>(&json.to_string()) {
            Ok(bytes) => bytes.plain().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn lines_of_zeroes_are_left_out() {
        let mut bytes = vec![0; 40];
        bytes[0] = 0xf4;
        bytes[1] = 0x1a;
        bytes[39] = 1;
        let json = json!({
            "length": 40,
            "lines": { "0x000": "f41a0000000000000000000000000000", "0x020": "0000000000000001" },
        });
        assert_eq!(serde_json::to_value(Bytes::of(&bytes)).unwrap(), json);
        let read: Bytes = serde_json::from_value(json).unwrap();
        assert_eq!(read.plain(), Ok(bytes));
    }

    #[test]
    fn lines_elsewhere_are_refused() {
        let line = "00".repeat(16);
        for (json, expected) in [
            (
                json!({ "length": 4097, "lines": {} }),
                "length: 4097 is more than 4096",
            ),
            (
                json!({ "length": 16, "lines": { "0x010": line } }),
                "lines: 16 bytes at 0x010",
            ),
            (
                json!({ "length": 256, "lines": { "0x008": line } }),
                "lines: 16 bytes at 0x008",
            ),
            (
                json!({ "length": 256, "lines": { "0x000": "00" } }),
                "lines: 1 bytes at 0x000",
            ),
            (
                json!({ "length": 256, "lines": { "0xffff": line } }),
                "lines: 16 bytes at 0xffff",
            ),
            (
                json!({ "length": 256, "lines": { "0x000": line, "0x0000": line } }),
                "the line at 0x000 follows one",
            ),
            (
                json!({ "length": 256, "lines": { "10": line } }),
                "expected a number",
            ),
        ] {
            let message = refusal(json);
            assert!(message.contains(expected), "{message}");
        }
    }

    proptest! {
        #[test]
        fn bytes_are_the_same_after_json(bytes in vec(prop_oneof![9 => Just(0u8), 1 => any::<u8>()], 0..300)) {
            let text = serde_json::to_string(&Bytes::of(&bytes)).unwrap();
            prop_assert_eq!(serde_json::from_str::<Bytes>(&text).unwrap().plain(), Ok(bytes));
        }
    }
}
