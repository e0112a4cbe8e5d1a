//! Versions of sections.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Version of a section whose newest one is `NEWEST`: a number from 1 to `NEWEST`. A section is written in its newest
/// version, and a newer one is rejected by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version<const NEWEST: u32>(u32);

impl<const NEWEST: u32> Version<NEWEST> {
    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl<const NEWEST: u32> Default for Version<NEWEST> {
    fn default() -> Self {
        Self(NEWEST)
    }
}

impl<const NEWEST: u32> Serialize for Version<NEWEST> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl<'de, const NEWEST: u32> Deserialize<'de> for Version<NEWEST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let version = u32::deserialize(deserializer)?;
        if (1..=NEWEST).contains(&version) {
            Ok(Self(version))
        } else {
            let message = format!(
                "this section has version {version}; this tern reads versions 1 to {NEWEST}"
            );
            Err(D::Error::custom(message))
        }
    }
}

impl<const NEWEST: u32> JsonSchema for Version<NEWEST> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Version{NEWEST}").into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "integer", "minimum": 1, "maximum": NEWEST })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_are_rejected_by_name() {
        let read = |text: &str| serde_json::from_str::<Version<2>>(text);
        assert_eq!(read("1").unwrap().get(), 1);
        assert_eq!(read("2").unwrap(), Version::default());
        for text in ["0", "3"] {
            let message = read(text).unwrap_err().to_string();
            let expected =
                format!("this section has version {text}; this tern reads versions 1 to 2");
            assert!(message.starts_with(&expected), "{message}");
        }
        assert_eq!(
            serde_json::to_string(&Version::<2>::default()).unwrap(),
            "2"
        );
    }
}
