//! Identifiers of requirements, as files write them (`S3-33`, `B-51`, `E4`, `G3-aa`, `ring`) and as names of tests begin
//! with them (`s3_33_`, `b51_`, `e4_`, `g3_aa_`).

use std::fmt;

/// The identifier of a requirement. They sort by family, then by number.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    /// `S3`, `B`, `E`, `G3`, or the word itself.
    family: String,
    /// From 1; 0 for a word. Letters count on after z: aa is 27, bb is 28.
    number: u32,
}

impl Id {
    /// An identifier as it is written in files.
    pub fn parse(text: &str) -> Option<Self> {
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase()) {
            return Some(Self {
                family: text.to_owned(),
                number: 0,
            });
        }
        let (family, number) = match text.as_bytes() {
            [b'S' | b'G', b'0'..=b'9', b'-', ..] => (text.get(..2)?, text.get(3..)?),
            [b'B', b'-', ..] => (text.get(..1)?, text.get(2..)?),
            [b'D' | b'E' | b'M', ..] => (text.get(..1)?, text.get(1..)?),
            _ => return None,
        };
        Some(Self {
            family: family.to_owned(),
            number: match family.starts_with('G') {
                true => letters(number)?,
                false => digits(number)?,
            },
        })
    }

    /// The identifiers that the name of a test begins with.
    pub fn of_name(name: &str) -> Vec<Self> {
        let mut ids = Vec::new();
        let mut words = name.split('_');
        while let Some(word) = words.next() {
            let id = match word.as_bytes() {
                [b's' | b'g', b'0'..=b'9'] => words
                    .next()
                    .and_then(|next| Self::parse(&format!("{}-{next}", word.to_ascii_uppercase()))),
                [b'b', ..] => Self::parse(&word.replacen('b', "B-", 1)),
                [b'd' | b'e' | b'm', ..] => Self::parse(&word.to_ascii_uppercase()),
                _ => None,
            };
            match id {
                Some(id) => ids.push(id),
                None => break,
            }
        }
        ids
    }

    /// The one after this in its family; a word has none.
    pub fn next(&self) -> Option<Self> {
        (self.number > 0).then(|| Self {
            family: self.family.clone(),
            number: self.number + 1,
        })
    }

    /// Whether this one, if not a word, is the first of its family.
    pub fn is_first(&self) -> bool {
        self.number <= 1
    }

    /// Whether both count in the same family.
    pub fn is_kin(&self, other: &Self) -> bool {
        self.family == other.family
    }
}

/// A number from 1 to 99. Names of tests have larger ones that are just numbers.
fn digits(text: &str) -> Option<u32> {
    let plain = (1..=2).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_digit())
        && !text.starts_with('0');
    plain.then(|| text.parse().ok()).flatten()
}

/// One letter, or the same letter twice.
fn letters(text: &str) -> Option<u32> {
    match *text.as_bytes() {
        [letter @ b'a'..=b'z'] => Some(u32::from(letter - b'a') + 1),
        [letter @ b'a'..=b'z', again] if letter == again => Some(u32::from(letter - b'a') + 27),
        _ => None,
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, number } = self;
        match (family.as_bytes(), number) {
            (_, 0) => f.write_str(family),
            ([b'G', ..], 1..=52) => {
                let letter = char::from_u32(u32::from(b'a') + (number - 1) % 26).unwrap_or('?');
                let times = if *number > 26 { 2 } else { 1 };
                write!(f, "{family}-{}", String::from(letter).repeat(times))
            }
            ([b'D' | b'E' | b'M'], _) => write!(f, "{family}{number}"),
            _ => write!(f, "{family}-{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_written_again() {
        for text in [
            "S0-1", "S3-49", "B-51", "D4", "E15", "M26", "G0-a", "G3-z", "G3-aa", "G3-ee", "ring",
        ] {
            assert_eq!(Id::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_no_identifier_is_not_read_as_one() {
        for text in [
            "", "S3", "S3-", "S3-0", "S3-07", "S3-100", "S-3", "S3-a", "B51", "B-", "B-5a", "D-4",
            "E", "E4.", "G3-1", "G3-ab", "G3-aaa", "Ring", "F1", "Dé", "E1 E2",
        ] {
            assert_eq!(Id::parse(text), None, "{text}");
        }
    }

    #[test]
    fn numbers_and_letters_sort_as_they_count() {
        let sorted = [
            "B-2", "B-10", "G3-b", "G3-z", "G3-aa", "S0-9", "S0-10", "S1-1",
        ];
        assert!(sorted.map(Id::parse).is_sorted());
    }

    #[test]
    fn names_begin_with_any_number_of_identifiers() {
        let of = |name| {
            let ids = Id::of_name(name);
            ids.iter().map(Id::to_string).collect::<Vec<_>>()
        };
        let none: [&str; 0] = [];
        assert_eq!(of("s3_33_a_wrong_length_fails"), ["S3-33"]);
        assert_eq!(of("b2_b8_an_answer_is_exact"), ["B-2", "B-8"]);
        assert_eq!(of("s3_7_g3_n_b4_half_a_context"), ["S3-7", "G3-n", "B-4"]);
        assert_eq!(of("g3_aa_reset_in_freeze"), ["G3-aa"]);
        assert_eq!(of("d1_255_vfs_answer"), ["D1"]);
        assert_eq!(of("e4_"), ["E4"]);
        for name in [
            "e820_has_holes",
            "e2e_runs",
            "every_id",
            "b",
            "d3hot_stops",
            "s3_is_a_store",
            "g0_is_open",
            "behind_b4_a_port",
            "ring_wraps",
            "s3",
        ] {
            assert_eq!(of(name), none, "{name}");
        }
    }
}
