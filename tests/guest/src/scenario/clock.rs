//! `clock`: time goes on for this guest, whatever happens to its monitor.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use super::{Found, boot, console};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::{Context, Result, say};

/// Half of the seconds that a processor may go without scheduling before the kernel calls that a soft lockup.
const THRESHOLD: &str = "/proc/sys/kernel/watchdog_thresh";
const TICK: Duration = Duration::from_millis(200);

/// Keeps all processors busy, because the kernel does not watch idle ones, and ticks until a line is typed on the console. Fails if the kernel then says that a processor hung or that a clock
/// went wrong; `longest_ms=` is the longest time between two ticks, by the guest's own clock.
pub fn run(request: &Request) -> Result<Found> {
    let threshold: u32 = request.number("threshold", 10)?;
    fs::write(THRESHOLD, threshold.to_string()).context(THRESHOLD)?;
    let processors = boot::online_cpus()?;
    let log = Mark::now()?;
    let told = console::watch()?;
    let enough = AtomicBool::new(false);
    let (ticks, longest) = thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                while !enough.load(Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let mut longest = Duration::ZERO;
        let mut last = Instant::now();
        let mut ticks = 0u64;
        while !told() {
            thread::sleep(TICK);
            let now = Instant::now();
            longest = longest.max(now - last);
            last = now;
            ticks += 1;
            say(format_args!("tick {ticks}"));
        }
        // The watchdog looks once in two fifths of the threshold.
        thread::sleep(Duration::from_secs(threshold.into()));
        enough.store(true, Relaxed);
        (ticks, longest)
    });
    log.check_clean()?;
    Ok(Found::default()
        .with("ticks", ticks)
        .with("longest_ms", longest.as_millis()))
}
