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
    fn objects_are() {
        let text = r#"{"kernel": "k", "disks": [{"path": "a"}], "nets": [{"tap": "t"}]}"#;
        let Object(config) = serde_json::from_str::<Object<Config>>(text).unwrap();
        assert_eq!((config.disks.len(), config.nets.len()), (1, 1));
    }
}
