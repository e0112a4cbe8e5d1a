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

impl Document for Sections {
    const FORMAT: &'static str = FORMAT;
    const VERSIONS: RangeInclusive<u64> = 1..=NEWEST as u64;
}

impl Sections {
    /// Converts every section and drops the result: what passes is out of range for no machine.
    ///
    /// # Errors
    ///
    /// The first value that is out of range in every machine.
    pub fn check(&self) -> Result<(), Invalid> {
        let functions = convert_all(&self.pci.functions, super::pci::Registers::check);
        functions.field("functions").field("pci")?;
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
