//! Warnings that a guest can cause as often as it likes.

use std::sync::atomic::{AtomicU64, Ordering};

/// How many are shown before they become rare.
const FIRST: u64 = 3;

/// Decides which of many warnings are shown: the first few, and then ever fewer, at each power of two. One for each
/// function or disk, so that a noisy one does not silence the others.
#[derive(Debug, Default)]
pub(crate) struct Warnings(AtomicU64);

impl Warnings {
    /// There is another one. If it should be shown, how many there were with it.
    pub(crate) fn another(&self) -> Option<u64> {
        let count = self.0.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        (count <= FIRST || count.is_power_of_two()).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_become_rare() {
        let warnings = Warnings::default();
        let shown: Vec<_> = (0..1000).filter_map(|_| warnings.another()).collect();
        assert_eq!(shown, [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512]);
    }
}
