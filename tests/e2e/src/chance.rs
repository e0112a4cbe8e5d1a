//! How often a test does something, and at which moments: nobody chose them, and a test that fails tells them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How often: so often, unless `TERN_ROUNDS` says otherwise.
pub fn rounds(default: u32) -> Result<u32> {
    match std::env::var("TERN_ROUNDS") {
        Ok(text) => text.parse().with_context(|| format!("TERN_ROUNDS={text}")),
        Err(_) => Ok(default),
    }
}

/// Moments nobody chose, which are told when a test fails.
pub struct Chance {
    seed: u64,
    state: u64,
}

impl Chance {
    pub fn new() -> Self {
        let seed = match std::env::var("TERN_SEED").map(|text| text.parse()) {
            Ok(Ok(seed)) => seed,
            _ => {
                u64::from(std::process::id())
                    ^ Instant::now().elapsed().as_nanos() as u64
                    ^ std::time::UNIX_EPOCH
                        .elapsed()
                        .map_or(0, |now| now.as_nanos() as u64)
            }
        };
        Self { seed, state: seed }
    }

    /// xorshift64*
    pub fn up_to(&mut self, most: Duration) -> Duration {
        self.state |= 1;
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        let number = self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        most.mul_f64(number as f64 / f64::from(u32::MAX))
    }

    pub fn told(&self, round: u32) -> String {
        format!("round {round} with TERN_SEED={}", self.seed)
    }
}
