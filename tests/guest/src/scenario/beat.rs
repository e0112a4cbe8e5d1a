//! `beat`: a guest that notices when it stood still, and that writes to its memory at a steady rate.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Failure, Result, check, say};

const PAGE: usize = 4096;
const PAGES_PER_MIB: usize = 256;
/// From one look at the clock to the next.
const BEAT: Duration = Duration::from_millis(1);
const TICK: Duration = Duration::from_millis(500);

/// Looks at its clock every millisecond and then writes to `rate` pages of `mib` MiB, one after the other. Every half second
/// it tells the longest time between two looks since it told the last, and how many pages it has written in all. It ends with
/// the guest.
pub fn run(request: &Request) -> Result<Found> {
    let mib: usize = request.number("mib", 0)?;
    let rate: u64 = request.number("rate", 0)?;
    check(rate == 0 || mib > 0, || "no memory to write to".into())?;
    let (longest, written) = (AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        let beats = thread::Builder::new()
            .spawn_scoped(scope, || {
                let mut pages = Pages::new(mib * PAGES_PER_MIB);
                let mut last = Instant::now();
                loop {
                    let now = Instant::now();
                    longest.fetch_max((now - last).as_micros() as u64, Relaxed);
                    last = now;
                    pages.write(rate);
                    written.fetch_add(rate, Relaxed);
                    thread::sleep(BEAT);
                }
            })
            .context("a thread")?;
        let mut tick = 0u64;
        while !beats.is_finished() {
            thread::sleep(TICK);
            tick += 1;
            say(format_args!(
                "beat {tick} longest_us={} pages={}",
                longest.swap(0, Relaxed),
                written.load(Relaxed)
            ));
        }
        Err(Failure("the thread that beats has ended".into()))
    })
}

/// Pages that are written one after the other, again and again.
struct Pages {
    bytes: Vec<u8>,
    next: usize,
    value: u8,
}

impl Pages {
    /// That many, none of which is zero.
    fn new(pages: usize) -> Self {
        Self {
            bytes: vec![1; pages * PAGE],
            next: 0,
            value: 1,
        }
    }

    /// Writes to the next so many.
    fn write(&mut self, pages: u64) {
        for _ in 0..pages {
            if self.next >= self.bytes.len() {
                self.next = 0;
                self.value = self.value.checked_add(1).unwrap_or(1);
            }
            if let Some(byte) = self.bytes.get_mut(self.next) {
                *byte = self.value;
            }
            self.next += PAGE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_written_in_turn() {
        let mut pages = Pages::new(3);
        pages.write(4);
        let first =
            |pages: &Pages| -> Vec<u8> { pages.bytes.iter().step_by(PAGE).copied().collect() };
        assert_eq!(first(&pages), [2, 1, 1]);
        pages.write(3 * 254);
        assert_eq!(first(&pages), [1, 255, 255]);
    }

    #[test]
    fn a_rate_needs_memory() {
        let requests = crate::cmdline::scenarios("tern.run=beat:rate=2").unwrap();
        assert!(run(&requests[0]).is_err());
    }
}
