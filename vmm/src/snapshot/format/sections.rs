//! The sections of virtio functions, owners, PCI and the serial port, as a document.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::document::Document;
use super::error::{At, Invalid, convert_all};
use super::function::Function;
use super::owner::Owner;
use super::pci::Pci;
use super::serial::Serial;
use super::version::Version;

/// Name of the format.
pub const FORMAT: &str = "tern-snapshot";
/// Newest version of the format.
pub const NEWEST: u32 = 1;

/// The member `format` of a document: always [`FORMAT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatName;

impl Serialize for FormatName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(FORMAT)
    }
}

impl<'de> Deserialize<'de> for FormatName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        if text == FORMAT {
            Ok(Self)
        } else {
            Err(D::Error::invalid_value(Unexpected::Str(&text), &FORMAT))
        }
    }
}

impl JsonSchema for FormatName {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "FormatName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "const": FORMAT })
    }
}

/// State of the devices of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sections {
    /// Name of the format.
    pub format: FormatName,
    /// Version of the format.
    pub version: Version<NEWEST>,
    /// PCI bus.
    pub pci: Pci,
    /// Virtio functions.
    pub functions: Vec<Function>,
    /// SR-IOV owners.
    pub owners: Vec<Owner>,
    /// COM1.
    pub serial: Serial,
}

/// The document that `state.json` is.
pub type Root = Sections;

impl Document for Sections {
    const FORMAT: &'static str = FORMAT;
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;

    fn validate(&self) -> Result<(), Invalid> {
        self.pci.plain().field("pci")?;
        convert_all(&self.functions, |function| {
            function.context_bytes()?;
            function.transient()
        })
        .field("functions")?;
        convert_all(&self.owners, Owner::plain).field("owners")?;
        self.serial.plain().field("serial")?;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use devices::state::{FunctionState, QueueState, RegisterState, Shape};

    use super::super::context::{Context, Field, Raw};
    use super::super::hex::{Hex, HexBytes};
    use super::super::{function, owner, parse, pci, serial, write};
    use super::*;

    /// Something of everything.
    pub fn sample() -> Sections {
        let shape = Shape {
            queue_sizes: vec![8],
            config_len: 3,
            queue_status: true,
        };
        let state = FunctionState {
            offered: 1 << 100 | 3,
            accepted: 1,
            registers: RegisterState {
                num_queues: 1,
                status: 0xf,
                ..RegisterState::default()
            },
            queues: vec![QueueState {
                size: 8,
                vector: 1,
                descriptor_area: 0x1000,
                driver_area: 0x2000,
                device_area: 0x1_0000_3000,
                enabled: true,
                stopped: true,
                next_available: 9,
                next_used: 7,
                restarts: true,
                owned: vec![3, 1],
            }],
            config: vec![1, 2, 3],
        };
        let mut context = Context::of_state(&state, &shape);
        context.0.extend([
            Field::Raw(Raw {
                kind: Hex(0x1234),
                reserved: Some(Hex(1)),
                value: HexBytes(vec![0xaa]),
            }),
            serde_json::from_str(
                r#"{"type": "VQ_PACKED_RUNTIME", "queue": 0, "enabled": true, "available": {"descriptor": 1, "wrap": true},
                    "used": {"descriptor": 0, "wrap": false}}"#,
            )
            .unwrap(),
            serde_json::from_str(
                r#"{"type": "VQ_PACKED_DEV_OWN_DESC", "queue": 0, "chains": [{"id": 1, "descriptors": 2}]}"#,
            )
            .unwrap(),
        ]);
        Sections {
            format: FormatName,
            version: Version::default(),
            pci: Pci::of(&pci::tests::sample()),
            functions: vec![
                Function::of("console0", context, &function::tests::sample()),
                Function::of("disk0", Context::default(), &Default::default()),
            ],
            owners: vec![Owner::of("pf0", &owner::tests::sample())],
            serial: Serial::of(&serial::tests::sample(), b"ls\n"),
        }
    }

    #[test]
    fn the_document_is_the_same_after_json() {
        let text = write(&sample()).unwrap();
        assert_eq!(
            parse(&text),
            Ok(sample()),
            "{}",
            String::from_utf8_lossy(&text)
        );
    }

    #[test]
    fn values_out_of_range_have_their_whole_path() {
        let cases: [(fn(&mut Sections), &str); 5] = [
            (
                |s| s.pci.functions[0].config.length = 5000,
                "pci.functions[0].config.length: 5000 is more than 4096",
            ),
            (
                |s| s.pci.functions[1].msix.as_mut().unwrap().entries[1].address = Hex(1),
                "pci.functions[1].msix.entries[1].address: 0x1 is no multiple of 4",
            ),
            (
                |s| {
                    s.functions[1].context.0 = vec![Field::Raw(Raw {
                        kind: Hex(0),
                        reserved: Some(Hex(u64::MAX)),
                        value: HexBytes::default(),
                    })]
                },
                "functions[1].context[0].reserved: 0xffffffffffffffff is more than 0xffffffffffff, the most in 6 bytes",
            ),
            (
                |s| s.owners[0].sessions[0].members.reverse(),
                "owners[0].sessions[0].members[1]: 1 follows 7; the list ascends",
            ),
            (
                |s| s.serial.receive_fifo = HexBytes(vec![0; 65]),
                "serial.receive_fifo: 65 bytes are more than 64",
            ),
        ];
        for (change, expected) in cases {
            let mut sections = sample();
            change(&mut sections);
            let text = serde_json::to_vec(&sections).unwrap();
            assert_eq!(parse::<Sections>(&text).unwrap_err().to_string(), expected);
            assert_eq!(write(&sections).unwrap_err().to_string(), expected);
        }
    }
}
