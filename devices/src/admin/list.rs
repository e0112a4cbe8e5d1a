//! Sets of opcodes, as LIST_QUERY reports and LIST_USE takes them: an array of le64 in which bit `n % 64` of word
//! `n / 64` is opcode `n`.

use super::envelope::zero_extended;

/// Bytes of one word of the array.
const WORD: usize = 8;

/// A set of opcodes below [`CommandSet::LIMIT`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandSet(u128);

impl CommandSet {
    /// The first opcode that no set can hold. No profile has one as high.
    pub const LIMIT: u16 = 128;

    /// A set with no opcode in it.
    pub const EMPTY: Self = Self(0);

    /// This set and `opcode`.
    #[must_use]
    pub const fn with(self, opcode: u16) -> Self {
        assert!(opcode < Self::LIMIT, "opcode beyond every command set");
        Self(self.0 | 1 << opcode)
    }

    /// The set as a number in which bit `n` is opcode `n`.
    pub const fn bits(self) -> u128 {
        self.0
    }

    /// The set whose number this is.
    pub const fn from_bits(bits: u128) -> Self {
        Self(bits)
    }

    /// Reads an array of any length (B-8). `None` if it names an opcode no set can hold.
    pub fn parse(data: &[u8]) -> Option<Self> {
        const HELD: usize = CommandSet::LIMIT as usize / 8;
        let beyond = data.get(HELD..).unwrap_or_default();
        let known = beyond.iter().all(|byte| *byte == 0);
        known.then(|| Self(u128::from_le_bytes(zero_extended(data, 0))))
    }

    /// The array LIST_QUERY reports: as many words as the highest opcode needs, and at least one.
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = self.0.to_le_bytes().to_vec();
        let bits = (u128::BITS - self.0.leading_zeros()) as usize;
        bytes.truncate(bits.div_ceil(8 * WORD).max(1) * WORD);
        bytes
    }

    /// True if `opcode` is in the set.
    pub fn contains(self, opcode: u16) -> bool {
        opcode < Self::LIMIT && self.0 >> opcode & 1 != 0
    }

    /// True if every opcode of `self` is in `other`.
    pub fn is_subset(self, other: Self) -> bool {
        self.0 & !other.0 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(opcodes: &[u16]) -> CommandSet {
        opcodes
            .iter()
            .fold(CommandSet::EMPTY, |set, o| set.with(*o))
    }

    #[test]
    fn b3_an_array_is_as_long_as_its_highest_opcode_needs() {
        let cases: [(&[u16], usize, usize, u8); 5] = [
            (&[], 8, 0, 0),
            (&[0, 1], 8, 0, 3),
            (&[63], 8, 7, 0x80),
            (&[0, 64], 16, 8, 1),
            (&[127], 16, 15, 0x80),
        ];
        for (opcodes, len, at, byte) in cases {
            let bytes = set(opcodes).encode();
            assert_eq!((bytes.len(), bytes[at]), (len, byte), "{opcodes:?}");
            assert_eq!(CommandSet::parse(&bytes), Some(set(opcodes)));
        }
    }

    #[test]
    fn b8_short_and_long_arrays_are_arrays() {
        assert_eq!(CommandSet::parse(&[]), Some(CommandSet::EMPTY));
        assert_eq!(CommandSet::parse(&[3]), Some(set(&[0, 1])));
        let mut long = vec![0; 4096];
        long[0] = 2;
        assert_eq!(CommandSet::parse(&long), Some(set(&[1])));
        long[16] = 1;
        assert_eq!(CommandSet::parse(&long), None);
    }

    #[test]
    fn membership_and_inclusion() {
        let ours = set(&[0, 1, 64]);
        assert_eq!(
            [0, 64, 2, 128, 0xffff].map(|o| ours.contains(o)),
            [true, true, false, false, false]
        );
        assert!(set(&[1, 64]).is_subset(ours));
        assert!(!set(&[1, 2]).is_subset(ours));
    }
}
