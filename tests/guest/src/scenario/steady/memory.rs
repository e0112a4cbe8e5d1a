//! Memory: pages that are rewritten all the time, and pages that never are.

use std::thread;
use std::time::Duration;

use super::{Load, Turns};
use crate::pattern;
use crate::{Failure, Result, check};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;
const WORDS: usize = PAGE / size_of::<u64>();
/// Pages that are rewritten before the others get the CPU.
const BATCH: u64 = 32;
const REST: Duration = Duration::from_millis(4);
/// One in so many generations of a page is all zeroes.
const ZEROES: u64 = 8;
/// Of the words of a page.
const SEED: u64 = 0x57ea_d1e5;
/// Of the order in which pages are written.
const ORDER: u64 = 0x0bde_5000;
/// How often the pages that are never written are read.
const LOOK: Duration = Duration::from_secs(1);

/// A thread per CPU that rewrites pages of a buffer of its own, and one that has pages nobody writes; together `mib` MiB.
pub fn start(load: &mut Load, cpus: usize, mib: usize) -> Result<()> {
    let pages = mib * MIB / PAGE / (cpus + 1);
    check(pages > 0, || format!("{mib} MiB are no page for each"))?;
    for cpu in 0..cpus {
        load.start(
            "pages",
            format_args!("of CPU {cpu}"),
            Some(cpu),
            move |turns| rewrite(turns, cpu as u64, pages),
        );
    }
    load.start("looks", "at pages nobody writes", None, move |turns| {
        keep(turns, pages)
    });
    Ok(())
}

/// Pages that are verified and then rewritten, in an order without one.
fn rewrite(turns: &Turns, owner: u64, pages: usize) -> Result<()> {
    let mut buffer = Pages::new(owner, pages);
    let mut step = 0;
    while turns.goes_on() {
        for _ in 0..BATCH {
            let page = pattern::word(ORDER ^ owner, step) % pages as u64;
            buffer.verify(page as usize)?;
            buffer.write(page as usize);
            step += 1;
        }
        turns.add(BATCH);
        thread::sleep(REST);
    }
    (0..pages).try_for_each(|page| buffer.verify(page))
}

/// Pages that are written once.
fn keep(turns: &Turns, pages: usize) -> Result<()> {
    let mut buffer = Pages::new(u64::MAX, pages);
    for page in 0..pages {
        buffer.write(page);
    }
    while turns.goes_on() {
        (0..pages).try_for_each(|page| buffer.verify(page))?;
        turns.add(1);
        thread::sleep(LOOK);
    }
    (0..pages).try_for_each(|page| buffer.verify(page))
}

/// A buffer, and what each of its pages is to hold.
struct Pages {
    owner: u64,
    words: Vec<u64>,
    generations: Vec<u64>,
}

impl Pages {
    fn new(owner: u64, pages: usize) -> Self {
        Self {
            owner,
            words: vec![0; pages * WORDS],
            generations: vec![0; pages],
        }
    }

    /// Writes the next generation of a page.
    fn write(&mut self, page: usize) {
        self.generations[page] += 1;
        let generation = self.generations[page];
        let owner = self.owner;
        let words = &mut self.words[page * WORDS..][..WORDS];
        for (index, word) in (0..).zip(words) {
            *word = expected(owner, page, generation, index);
        }
    }

    fn verify(&self, page: usize) -> Result<()> {
        let generation = self.generations[page];
        let words = &self.words[page * WORDS..][..WORDS];
        for (index, word) in (0..).zip(words) {
            let expected = expected(self.owner, page, generation, index);
            if *word != expected {
                return Err(Failure(format!(
                    "word {index} of page {page} in generation {generation} is {word:#018x} instead of {expected:#018x}"
                )));
            }
        }
        Ok(())
    }
}

fn expected(owner: u64, page: usize, generation: u64, index: u64) -> u64 {
    if generation.is_multiple_of(ZEROES) {
        return 0;
    }
    let seed = SEED ^ owner.wrapping_mul(0x1_0001) ^ (generation << 32);
    pattern::word(seed, page as u64 * WORDS as u64 + index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_hold_their_generation_and_nothing_else() {
        let mut pages = Pages::new(3, 4);
        for round in 0..20 {
            for page in 0..4 {
                pages.verify(page).unwrap();
                pages.write(page);
                pages.verify(page).unwrap();
            }
            pages.generations[1] += 1;
            let stale = pages.verify(1).unwrap_err().to_string();
            assert!(
                stale.starts_with("word 0 of page 1 in generation "),
                "{round}"
            );
            pages.generations[1] -= 1;
        }
        pages.words[2 * WORDS + 511] ^= 1;
        assert!(pages.verify(2).is_err());
        pages.verify(3).unwrap();
    }

    #[test]
    fn some_generations_are_zeroes() {
        let mut pages = Pages::new(0, 1);
        let mut zero = 0;
        for _ in 0..16 {
            pages.write(0);
            zero += u32::from(pages.words.iter().all(|word| *word == 0));
        }
        assert_eq!(zero, 2);
    }
}
