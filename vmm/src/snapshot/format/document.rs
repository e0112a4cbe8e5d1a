//! A whole document: its limits, and the way from bytes to types and back.
//!
//! [`parse`] takes any bytes. In this order it rejects
//!
//! 1. more than [`MAX_LEN`] bytes,
//! 2. another format, or a version that this program does not read, whatever else is in the document,
//! 3. what is no JSON, more than [`MAX_VALUES`] values or [`MAX_DEPTH`] levels of them, a member that is there twice,
//! 4. what the types of the document do not have, and lists of values where objects belong,
//! 5. what no machine has: [`Document::validate`].
//!
//! Every error names the place. Memory is bounded by the length of the document, times a small factor: nothing is
//! allocated for a number in it.

mod forms;
mod scan;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::Invalid;
use super::layout::lay_out;
use forms::Forms;

/// Longest document, in bytes. 254 vCPUs with AMX and 510 virtual functions whose descriptors are all in flight take less
/// than half of it, a test says.
pub const MAX_LEN: usize = 160 << 20;
/// The most levels of objects and arrays.
pub const MAX_DEPTH: usize = 32;
/// The most values, those in objects and arrays included.
pub const MAX_VALUES: u64 = 8 << 20;
/// The most members of one object.
pub const MAX_MEMBERS: usize = 4096;
/// Longest part of the document in a message, in bytes.
const MAX_QUOTE: usize = 300;

/// A type that is a whole document. Its first two members are `format` and `version`.
pub trait Document: Serialize + DeserializeOwned {
    /// What `format` is.
    const FORMAT: &'static str;
    /// The versions this program reads; the last one is what it writes.
    const VERSIONS: RangeInclusive<u64>;

    /// Looks at what its types cannot say: numbers that are out of range in every machine, lists that do not ascend. It
    /// converts every section and drops the result.
    ///
    /// # Errors
    ///
    /// The first such value.
    fn validate(&self) -> Result<(), Invalid>;
}

/// Why a document was rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// It is longer than any.
    #[error("{len} bytes are more than {MAX_LEN}, the most that are read")]
    TooLong {
        /// Its length in bytes, as far as it is known.
        len: u64,
    },
    /// It is no JSON.
    #[error("{0}")]
    Syntax(String),
    /// It is another kind of document.
    #[error("format: this is {found}, not {expected:?}")]
    Format {
        /// What it says it is.
        found: String,
        /// What it has to be.
        expected: &'static str,
    },
    /// It is of a version that this program does not read.
    #[error(
        "version: this snapshot has format version {found}; this tern reads versions {} to {}",
        .reads.start(), .reads.end()
    )]
    Version {
        /// Its version.
        found: String,
        /// The versions that are read.
        reads: RangeInclusive<u64>,
    },
    /// A value is rejected.
    #[error(transparent)]
    Value(#[from] Invalid),
}

impl FormatError {
    fn at(path: &str, reason: impl fmt::Display) -> Self {
        let reason = quoted(&reason.to_string());
        Self::Value(Invalid::at(quoted(path), reason))
    }
}

/// Reads a whole document.
///
/// # Errors
///
/// See the [module documentation](self). What is in the document may still be none of the machine that it is for.
pub fn parse<T: Document>(bytes: &[u8]) -> Result<T, FormatError> {
    let found = checked::<T>(bytes)?;
    // Without a record of where it is, which a guest that is being moved would wait for.
    let document: T = match serde_json::from_slice(bytes) {
        Ok(document) => document,
        Err(_) => locate(bytes)?,
    };
    forms::check(bytes, found, &document)?;
    document.validate()?;
    Ok(document)
}

/// Reads a document, and remembers where it is in it.
fn locate<T: Document>(bytes: &[u8]) -> Result<T, FormatError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "" } else { path.as_str() };
        FormatError::at(path, error.inner())
    })
}

/// Looks at what [`parse`] looks at before it looks at types: a document that passes is JSON within the limits, and of a
/// version of `T` that is read.
///
/// # Errors
///
/// All of [`FormatError`].
pub fn check<T: Document>(bytes: &[u8]) -> Result<(), FormatError> {
    checked::<T>(bytes).map(drop)
}

fn checked<T: Document>(bytes: &[u8]) -> Result<Forms, FormatError> {
    if bytes.len() > MAX_LEN {
        let len = bytes.len() as u64;
        return Err(FormatError::TooLong { len });
    }
    scan::scan(bytes, T::FORMAT, T::VERSIONS)
}

/// Writes a whole document, as [`parse`] reads it and a person can, too.
///
/// # Errors
///
/// What [`parse`] would reject.
pub fn write<T: Document>(document: &T) -> Result<Vec<u8>, FormatError> {
    document.validate()?;
    let compact = serde_json::to_vec(document).map_err(|error| FormatError::at("", error))?;
    let text = lay_out(&compact);
    check::<T>(&text)?;
    Ok(text)
}

/// `text`, cut to what fits in a message.
fn quoted(text: &str) -> String {
    if text.len() <= MAX_QUOTE {
        return text.to_owned();
    }
    // Both ends: a path ends with what is wrong, and a reason with the line.
    let start = text.floor_char_boundary(MAX_QUOTE / 2);
    let end = text.ceil_char_boundary(text.len() - MAX_QUOTE / 2);
    let ends = (text.get(..start), text.get(end..));
    format!(
        "{}…{}",
        ends.0.unwrap_or_default(),
        ends.1.unwrap_or_default()
    )
}
