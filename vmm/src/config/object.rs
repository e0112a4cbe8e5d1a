//! JSON objects and nothing else.
//!
//! Serde's derived structs also take an array for an object, and its elements for the fields in the order of their
//! declaration. A file that means such a thing is a mistake, and the order is nobody's business.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};

/// A `T` that was written as an object.
#[derive(Debug)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OnlyMaps(PhantomData))
    }
}

struct OnlyMaps<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OnlyMaps<T> {
    type Value = Object<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, as in {\"key\": value}")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map)).map(Object)
    }
}

/// Reads an object; an error names the member that is wrong.
pub fn parse<'de, T: Deserialize<'de>>(bytes: &'de [u8]) -> Result<T, String> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let parsed = serde_path_to_error::deserialize::<_, Object<T>>(&mut deserializer);
    let Object(value) = parsed.map_err(|error| match error.path().to_string().as_str() {
        "." => error.inner().to_string(),
        path => format!("{path}: {}", error.inner()),
    })?;
    deserializer.end().map_err(|error| error.to_string())?;
    Ok(value)
}

/// A list of objects, for `deserialize_with`.
pub fn list<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    let objects = Vec::<Object<T>>::deserialize(deserializer)?;
    Ok(objects.into_iter().map(|Object(value)| value).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn arrays_are_no_objects() {
        for text in [
            r#"["vmlinuz"]"#,
            "[]",
            "null",
            r#"{"disks": [["a", true]]}"#,
            r#"{"nets": [["tap0"]]}"#,
            r#"{"pfs": [["net", 4]]}"#,
        ] {
            let error = serde_json::from_str::<Object<Config>>(text).unwrap_err();
            assert!(error.to_string().contains("expected an object"), "{error}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        use crate::migrate::source::Request;
        for (text, part) in [
            (
                r#"{"to": 7}"#,
                "to: invalid type: integer `7`, expected a string",
            ),
            (r#"{"to": "unix:/s", "copy": "yes"}"#, "copy: invalid type"),
            (
                r#"{"to": "unix:/s", "downtime_ms": -1}"#,
                "downtime_ms: invalid value",
            ),
            (
                r#"{"to": "unix:/s", "on_timeout": "wait"}"#,
                "on_timeout: unknown variant",
            ),
            (
                r#"{"to": "tcp:h:1", "tls": {"cert": 1}}"#,
                "tls.cert: invalid type",
            ),
            (
                r#"{"to": "tcp:h:1", "tls": {"cert": "c"}}"#,
                "tls: missing field",
            ),
            (r#"{"to": "unix:/s", "colour": 1}"#, "colour"),
            ("{}", "missing field `to`"),
            ("[]", "expected an object"),
            (r#"{"to": "unix:/s"} x"#, "trailing characters"),
            ("", "EOF"),
        ] {
            let error = parse::<Request>(text.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        assert!(parse::<Request>(br#" {"to": "unix:/s"} "#).is_ok());
    }

    #[test]
    fn objects_are() {
        let text = r#"{"kernel": "k", "disks": [{"path": "a"}], "nets": [{"tap": "t"}]}"#;
        let Object(config) = serde_json::from_str::<Object<Config>>(text).unwrap();
        assert_eq!((config.disks.len(), config.nets.len()), (1, 1));
    }
}
