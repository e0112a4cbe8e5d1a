//! The first look at a document, which knows no types.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use super::forms::Forms;
use super::{FormatError, MAX_DEPTH, MAX_MEMBERS, MAX_VALUES, quoted};

/// Looks at all of `bytes`, and counts. See [`check`](super::check).
pub fn scan(
    bytes: &[u8],
    format: &'static str,
    versions: RangeInclusive<u64>,
) -> Result<Forms, FormatError> {
    let mut scan = Scan {
        format,
        versions,
        path: Vec::new(),
        values: 0,
        forms: Forms::default(),
        format_is: None,
        version_is: None,
        scalar: None,
        error: None,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let scanned = Value(&mut scan)
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    if let Some(error) = scan.error.take() {
        return Err(error);
    }
    // A newer version is said to be one even if it is no JSON any more.
    scan.check_head()?;
    scanned.map_err(|error| {
        // The path is that of the value that is no JSON.
        let reason = quoted(&error.to_string());
        if scan.path.is_empty() {
            FormatError::Syntax(reason)
        } else {
            FormatError::at(&scan.path(), reason)
        }
    })?;
    match (scan.format_is, scan.version_is) {
        (Some(_), Some(_)) => Ok(scan.forms),
        (None, _) => Err(FormatError::at("format", "is missing")),
        (_, None) => Err(FormatError::at("version", "is missing")),
    }
}

struct Scan<'de> {
    format: &'static str,
    versions: RangeInclusive<u64>,
    path: Vec<Step<'de>>,
    values: u64,
    forms: Forms,
    /// The members `format` and `version` of the document, once they were read.
    format_is: Option<Scalar>,
    version_is: Option<Scalar>,
    /// The last value, if it is one of these.
    scalar: Option<Scalar>,
    /// Why the rest is not looked at.
    error: Option<FormatError>,
}

enum Step<'de> {
    Member(Name<'de>),
    Entry(usize),
}

enum Scalar {
    Number(u64),
    Text(String),
    Other,
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Text(text) => write!(f, "{:?}", quoted(text)),
            Self::Other => f.write_str("neither a number nor a string"),
        }
    }
}

impl Scan<'_> {
    fn path(&self) -> String {
        let mut path = String::new();
        for step in &self.path {
            match step {
                Step::Member(Name(name)) if path.is_empty() => path.push_str(name),
                Step::Member(Name(name)) => path.extend([".", name]),
                Step::Entry(index) => path.push_str(&format!("[{index}]")),
            }
        }
        path
    }

    /// Ends the scan: the error is kept, and what the deserializer makes of it is not looked at.
    fn refuse<T, E: serde::de::Error>(&mut self, reason: &str) -> Result<T, E> {
        let error = FormatError::at(&self.path(), reason);
        self.error.get_or_insert(error);
        Err(E::custom(reason))
    }

    /// Once both are known: whether this document is of the kind and of a version that is read.
    fn check_head(&self) -> Result<(), FormatError> {
        let (Some(format), Some(version)) = (&self.format_is, &self.version_is) else {
            return Ok(());
        };
        if !matches!(format, Scalar::Text(text) if text == self.format) {
            return Err(FormatError::Format {
                found: format.to_string(),
                expected: self.format,
            });
        }
        match version {
            Scalar::Number(number) if self.versions.contains(number) => Ok(()),
            version => Err(FormatError::Version {
                found: version.to_string(),
                reads: self.versions.clone(),
            }),
        }
    }

    /// Keeps the value of member `name` of the document.
    fn keep_head<E: serde::de::Error>(&mut self, name: &str) -> Result<(), E> {
        let place = match name {
            "format" => &mut self.format_is,
            "version" => &mut self.version_is,
            _ => return Ok(()),
        };
        *place = Some(self.scalar.take().unwrap_or(Scalar::Other));
        self.check_head().map_err(|error| {
            let message = error.to_string();
            self.error.get_or_insert(error);
            E::custom(message)
        })
    }

    fn leaf<E: serde::de::Error>(&mut self, scalar: Scalar) -> Result<(), E> {
        self.scalar = Some(scalar);
        Ok(())
    }
}

/// Name of a member: a part of the document, unless something in it is escaped.
#[derive(Clone, PartialEq, Eq, Hash, Deserialize)]
struct Name<'d>(#[serde(borrow)] Cow<'d, str>);

/// The next value, whatever it is.
struct Value<'a, 'de>(&'a mut Scan<'de>);

impl<'de> DeserializeSeed<'de> for Value<'_, 'de> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let scan = self.0;
        scan.scalar = None;
        scan.values += 1;
        if scan.values > MAX_VALUES {
            return scan.refuse(&format!(
                "there are more than {MAX_VALUES} values up to here"
            ));
        }
        if scan.path.len() > MAX_DEPTH {
            return scan.refuse(&format!("nested more than {MAX_DEPTH} levels deep"));
        }
        deserializer.deserialize_any(Value(scan))
    }
}

impl<'de> Visitor<'de> for Value<'_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<(), E> {
        self.0.leaf(Scalar::Other)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        self.0.leaf(Scalar::Other)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.0.leaf(Scalar::Other)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.0.leaf(Scalar::Other)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        self.0.leaf(Scalar::Number(number))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        // Only those of the document itself are of interest.
        match self.0.path.len() {
            1 => self.0.leaf(Scalar::Text(quoted(text))),
            _ => Ok(()),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let scan = self.0;
        scan.forms.lists += 1;
        for index in 0.. {
            scan.path.push(Step::Entry(index));
            let entry = list.next_element_seed(Value(scan))?;
            scan.path.pop();
            if entry.is_none() {
                break;
            }
        }
        scan.scalar = None;
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let scan = self.0;
        scan.forms.objects += 1;
        let outer = scan.path.is_empty();
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<Name<'de>>()? {
            scan.path.push(Step::Member(name.clone()));
            if names.len() == MAX_MEMBERS {
                return scan.refuse(&format!(
                    "there are more than {MAX_MEMBERS} members beside this one"
                ));
            }
            if !names.insert(name.clone()) {
                return scan.refuse("is there twice");
            }
            map.next_value_seed(Value(scan))?;
            if outer {
                scan.keep_head(&name.0)?;
            }
            scan.path.pop();
        }
        scan.scalar = None;
        Ok(())
    }
}
