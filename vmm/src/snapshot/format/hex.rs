//! Numbers and bytes in hexadecimal, as strings.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number as in `0x1f`: lower case, no leading zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex<T>(pub T);

/// Bytes as in `00ff`: two lower-case digits each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

/// A number that [`Hex`] takes.
pub trait Number: Copy + Into<u128> + TryFrom<u128> {
    /// Most hexadecimal digits.
    const DIGITS: usize;
}

impl Number for u8 {
    const DIGITS: usize = 2;
}
impl Number for u16 {
    const DIGITS: usize = 4;
}
impl Number for u32 {
    const DIGITS: usize = 8;
}
impl Number for u64 {
    const DIGITS: usize = 16;
}
impl Number for u128 {
    const DIGITS: usize = 32;
}

impl<T: Number> fmt::Display for Hex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0.into())
    }
}

impl<T: Number> Serialize for Hex<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<T: Number> Hex<T> {
    /// Reads a number as in `0x1f`, of any case and with leading zeroes.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0x")?;
        let plain = digits.len() <= T::DIGITS && digits.bytes().all(|b| b.is_ascii_hexdigit());
        if !plain {
            return None;
        }
        // Of so many digits, which most have, it is quicker.
        let number = if digits.len() <= 16 {
            u64::from_str_radix(digits, 16).ok()?.into()
        } else {
            u128::from_str_radix(digits, 16).ok()?
        };
        T::try_from(number).ok().map(Self)
    }
}

impl<'de, T: Number> Deserialize<'de> for Hex<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| {
            let expected = format!("a number of at most {} digits as in \"0x1f\"", T::DIGITS);
            D::Error::invalid_value(Unexpected::Str(&text), &expected.as_str())
        })
    }
}

impl<T: Number> JsonSchema for Hex<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Hex{}", T::DIGITS * 4).into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": format!("^0x[0-9a-fA-F]{{1,{}}}$", T::DIGITS),
        })
    }
}

impl Serialize for HexBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&const_hex::encode(&self.0))
    }
}

impl HexBytes {
    /// Reads bytes as in `00ff`, of any case.
    pub fn parse(text: &str) -> Option<Self> {
        // Which would be left out.
        if text.starts_with("0x") {
            return None;
        }
        const_hex::decode(text).ok().map(Self)
    }
}

impl<'de> Deserialize<'de> for HexBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| D::Error::custom("bytes are written as two hexadecimal digits each"))
    }
}

impl JsonSchema for HexBytes {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "HexBytes".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^([0-9a-fA-F]{2})*$" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_what_they_were() {
        for number in [0, 1, 0xffff_ffff_ffff, u64::MAX] {
            let text = serde_json::to_string(&Hex(number)).unwrap();
            assert_eq!(text, format!("\"{number:#x}\""));
            assert_eq!(serde_json::from_str::<Hex<u64>>(&text).unwrap().0, number);
        }
    }

    #[test]
    fn what_is_no_such_number_is_refused() {
        for text in [
            "1",
            "\"1\"",
            "\"0x\"",
            "\"0x+1\"",
            "\"0xg\"",
            "\"0x11111\"",
            "\"-0x1\"",
            "null",
        ] {
            assert!(serde_json::from_str::<Hex<u16>>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_pairs_of_digits() {
        let bytes = HexBytes(vec![0, 0xff, 0x1a]);
        let text = serde_json::to_string(&bytes).unwrap();
        assert_eq!(text, "\"00ff1a\"");
        assert_eq!(serde_json::from_str::<HexBytes>(&text).unwrap(), bytes);
        assert_eq!(HexBytes::parse("00fF1A").unwrap(), bytes);
        for text in ["\"0\"", "\"0g\"", "\"é\"", "\"0x00\"", "[0]"] {
            assert!(serde_json::from_str::<HexBytes>(text).is_err(), "{text}");
        }
    }
}
