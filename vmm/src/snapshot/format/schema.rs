//! The JSON Schema of a document, made from its types.
//!
//! `cargo xtask schema` writes it to `resources/snapshot.schema.json`; a test says when that file is stale. The schema
//! says less than the types: lists that ascend, values that depend on others and members that are there twice are found
//! by [`parse`](super::parse) alone.

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;

use super::layout::lay_out;

/// The schema (draft 2020-12) of `T`, as text.
pub fn text_of<T: JsonSchema>() -> serde_json::Result<Vec<u8>> {
    let schema = SchemaSettings::draft2020_12()
        .into_generator()
        .into_root_schema_for::<T>();
    Ok(lay_out(&serde_json::to_vec(&schema)?))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::{Value, json};

    use super::*;
    use crate::snapshot::format::state::{State, tests::sample};
    use crate::snapshot::format::write;

    /// Set by `cargo xtask schema`: write the schema instead of comparing it.
    const WRITE: &str = "TERN_WRITE_SCHEMA";

    fn schema() -> Value {
        serde_json::from_slice(&text_of::<State>().unwrap()).unwrap()
    }

    /// Whether a file of the tree has this text; writes it instead if that was asked for.
    fn check(path: &str, text: &[u8]) {
        let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(&place, text).unwrap();
            return;
        }
        let text = str::from_utf8(text).unwrap();
        let tree = std::fs::read_to_string(&place).unwrap_or_default();
        let same = tree.lines().zip(text.lines()).take_while(|(a, b)| a == b);
        let line = same.count() + 1;
        assert!(
            tree == text,
            "{path} is stale from line {line} on: run `cargo xtask schema`, and commit it"
        );
    }

    #[test]
    fn the_schema_in_the_tree_is_that_of_the_types() {
        check(
            "resources/snapshot.schema.json",
            &text_of::<State>().unwrap(),
        );
    }

    #[test]
    fn fuzzing_begins_with_a_good_state() {
        check(
            "tests/fuzz/corpus/snapshot_state/whole.json",
            &write(&sample()).unwrap(),
        );
    }

    #[test]
    fn a_document_that_is_written_has_the_schema() {
        let validator = jsonschema::validator_for(&schema()).unwrap();
        let document: Value = serde_json::from_slice(&write(&sample()).unwrap()).unwrap();
        let errors: Vec<_> = validator
            .iter_errors(&document)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert_eq!(errors, [""; 0]);
    }

    /// What the types reject, the schema does too, and no other.
    #[test]
    fn the_schema_is_as_strict_as_the_types() {
        let validator = jsonschema::validator_for(&schema()).unwrap();
        let good: Value = serde_json::from_slice(&write(&sample()).unwrap()).unwrap();
        for (pointer, value) in [
            ("/format", json!("qcow")),
            ("/version", json!(2)),
            ("/version", json!(0)),
            ("/serial", Value::Null),
            ("/serial/version", json!(2)),
            ("/serial/scratch", json!(256)),
            ("/serial/scratch", json!(-1)),
            ("/serial/waiting", json!("0")),
            ("/pci/functions/0", json!({ "place": "00.0" })),
            ("/pci/functions/0/config/lines", json!({ "0x000": "zz" })),
            ("/functions/0/colour", json!(1)),
            (
                "/functions/0/context/0",
                json!({ "type": "VQ_CFG", "queue": 0 }),
            ),
            (
                "/functions/0/context/0",
                json!({ "type": "VQ_CONFIG", "value": "" }),
            ),
            (
                "/functions/0/context/0",
                json!({ "type": "0x12345", "value": "" }),
            ),
            (
                "/functions/0/context/0",
                json!({ "type": "DEV_CFG", "config": "", "queue": 1 }),
            ),
            ("/functions/0/context/0/features", json!("3")),
            ("/functions/0/context/0/features", json!(3)),
            ("/functions/0/transient/device", json!("printer")),
            ("/owners/0/sessions/0/party", json!("nobody")),
            (
                "/owners/0/sessions/0/members/0/reading",
                json!({ "part": {} }),
            ),
        ] {
            let mut bad = good.clone();
            let (outer, name) = pointer.rsplit_once('/').unwrap();
            let outer = bad.pointer_mut(outer).unwrap();
            match name.parse::<usize>() {
                Ok(index) => outer[index] = value,
                Err(_) => outer[name] = value,
            }
            let text = bad.to_string();
            assert!(
                crate::snapshot::format::parse::<State>(text.as_bytes()).is_err(),
                "{pointer}"
            );
            assert!(
                !validator.is_valid(&bad),
                "{pointer}: {}",
                bad.pointer(pointer).unwrap()
            );
        }
    }
}
