//! Checksums of pages that may be written meanwhile.
//!
//! Libraries take slices of bytes, and guest memory must not be one. Copying each page first costs more than its checksum
//! wherever stores are expensive. So this is XXH64 over words that are read one at a time, each once.

use crate::layout::PAGE_SIZE;

const WORDS: usize = PAGE_SIZE as usize / 8;
/// Words of a stripe: one for each accumulator.
const LANES: usize = 4;

const PRIMES: [u64; 5] = [
    0x9e37_79b1_85eb_ca87,
    0xc2b2_ae3d_27d4_eb4f,
    0x1656_67b1_9e37_79f9,
    0x85eb_ca77_c2b2_ae63,
    0x27d4_eb2f_1656_67c5,
];

/// XXH64 with seed 0 of the page whose word number *n* is `word(n)`.
pub(crate) fn of_page(word: impl Fn(usize) -> u64) -> u64 {
    let [p1, p2, p3, p4, _] = PRIMES;
    let mut lanes = [p1.wrapping_add(p2), p2, 0, 0u64.wrapping_sub(p1)];
    for stripe in (0..WORDS).step_by(LANES) {
        for (index, lane) in lanes.iter_mut().enumerate() {
            *lane = round(*lane, word(stripe + index));
        }
    }
    let [a, b, c, d] = lanes;
    let sum = a.rotate_left(1).wrapping_add(b.rotate_left(7));
    let sum = sum.wrapping_add(c.rotate_left(12));
    let mut sum = sum.wrapping_add(d.rotate_left(18));
    for lane in lanes {
        sum = (sum ^ round(0, lane)).wrapping_mul(p1).wrapping_add(p4);
    }
    // A page has whole stripes, and so no tail.
    sum = sum.wrapping_add(PAGE_SIZE);
    sum = (sum ^ (sum >> 33)).wrapping_mul(p2);
    sum = (sum ^ (sum >> 29)).wrapping_mul(p3);
    sum ^ (sum >> 32)
}

fn round(lane: u64, word: u64) -> u64 {
    let [p1, p2, ..] = PRIMES;
    let lane = lane.wrapping_add(word.wrapping_mul(p2));
    lane.rotate_left(31).wrapping_mul(p1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh64::xxh64;

    use super::*;

    fn agree(page: &[u8]) {
        let (words, _) = page.as_chunks();
        let own = of_page(|index| u64::from_le_bytes(words[index]));
        assert_eq!(own, xxh64(page, 0));
    }

    #[test]
    fn it_is_xxh64() {
        agree(&[0; PAGE_SIZE as usize]);
        agree(&[0xff; PAGE_SIZE as usize]);
        // As the fuzz target of the stream has it.
        assert_eq!(of_page(|_| 0), 0xac86_9b6f_32d8_bbdb);
    }

    proptest! {
        #[test]
        fn it_is_xxh64_of_any_page(page in prop::collection::vec(any::<u8>(), PAGE_SIZE as usize)) {
            agree(&page);
        }
    }
}
