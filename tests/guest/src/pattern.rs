//! Data that looks random, is the same for the same seed, and differs at every place.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Bytes per buffer, a multiple of every block size.
pub const CHUNK: usize = 1 << 20;
/// Bytes per page.
pub const PAGE: usize = 4096;

/// A page with the alignment that O_DIRECT asks for.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; PAGE]);

/// [`CHUNK`] bytes if nothing else is said, aligned to a page.
pub struct Buffer(Vec<Page>);

impl Buffer {
    pub fn new() -> Self {
        Self::of_pages(CHUNK / PAGE)
    }

    /// A smaller or a larger one.
    pub fn of_pages(count: usize) -> Self {
        Self(vec![Page::new_zeroed(); count])
    }

    pub fn bytes(&self) -> &[u8] {
        self.0.as_slice().as_bytes()
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.as_mut_slice().as_mut_bytes()
    }
}

/// The 64-bit word at `index` of the stream `seed`: the output function of SplitMix64, so that any word can be
/// computed without those before it.
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed
        .wrapping_mul(0xd134_2543_de82_ef95)
        .wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `bytes`, whose length is a multiple of 8, with the stream from byte `offset` on.
pub fn fill(bytes: &mut [u8], seed: u64, offset: u64) {
    for (index, chunk) in (offset / 8..).zip(bytes.chunks_exact_mut(8)) {
        chunk.copy_from_slice(&word(seed, index).to_le_bytes());
    }
}

/// The CRC-32 of the first `chunks` times [`CHUNK`] bytes of the stream.
pub fn checksum(seed: u64, chunks: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = Buffer::new();
    for chunk in 0..chunks {
        fill(buffer.bytes_mut(), seed, chunk * CHUNK as u64);
        hasher.update(buffer.bytes());
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_can_be_entered_anywhere() {
        let mut whole = [0; 64];
        fill(&mut whole, 7, 0);
        let mut part = [0; 32];
        fill(&mut part, 7, 32);
        assert_eq!(whole[32..], part);
    }

    #[test]
    fn seeds_and_places_differ() {
        let words: Vec<u64> = (0..4)
            .flat_map(|seed| (0..4).map(move |index| word(seed, index)))
            .collect();
        for (at, value) in words.iter().enumerate() {
            assert!(!words[at + 1..].contains(value));
        }
    }

    #[test]
    fn buffers_are_aligned_for_direct_io() {
        let buffer = Buffer::new();
        assert_eq!(buffer.bytes().as_ptr() as usize % PAGE, 0);
        assert_eq!(buffer.bytes().len(), CHUNK);
    }

    #[test]
    fn the_checksum_is_that_of_the_bytes() {
        let mut bytes = vec![0; 2 * CHUNK];
        fill(&mut bytes, 3, 0);
        assert_eq!(checksum(3, 2), crc32fast::hash(&bytes));
    }
}
