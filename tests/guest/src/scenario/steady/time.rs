//! Time: timers of every CPU fire, and no clock steps back from one CPU to the next.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};

use super::{Load, Turns};
use crate::{Context, Failure, Result, check};

const INTERRUPTS: &str = "/proc/interrupts";
/// Local timer interrupts, in [`INTERRUPTS`].
const LOCAL: &str = "LOC:";
const PERIOD_NS: i64 = 10_000_000;
/// How long a thread spins, and how long it rests after that.
const SPIN: Duration = Duration::from_millis(1);
const REST: Duration = Duration::from_millis(5);

/// Two threads on each CPU: one is woken by a timer, one looks at the clock without end.
pub fn start(load: &mut Load, cpus: usize) -> Result<()> {
    let clock = Arc::new(Clock::default());
    for cpu in 0..cpus {
        let place = format!("of CPU {cpu}");
        let ours = Arc::clone(&clock);
        load.start("timers", &place, Some(cpu), move |turns| wake(turns, &ours));
        let ours = Arc::clone(&clock);
        load.start("spins", &place, Some(cpu), move |turns| spin(turns, &ours));
    }
    Ok(())
}

/// The latest time any CPU has seen.
#[derive(Default)]
struct Clock {
    latest: AtomicU64,
}

impl Clock {
    /// Reads the clock after what another CPU has read is known.
    fn look(&self) -> Result<()> {
        self.note(|| {
            let now = clock_gettime(ClockId::Monotonic);
            now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
        })
    }

    fn note(&self, read: impl FnOnce() -> u64) -> Result<()> {
        let before = self.latest.load(SeqCst);
        let now = read();
        self.latest.fetch_max(now, SeqCst);
        check(before <= now, || {
            format!("CLOCK_MONOTONIC went back by {} ns to {now}", before - now)
        })
    }
}

fn wake(turns: &Turns, clock: &Clock) -> Result<()> {
    let period = Timespec {
        tv_sec: 0,
        tv_nsec: PERIOD_NS,
    };
    let timer =
        timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty()).context("timerfd")?;
    let every = Itimerspec {
        it_interval: period,
        it_value: period,
    };
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every).context("timerfd")?;
    while turns.goes_on() {
        let mut expirations = [0; 8];
        rustix::io::read(&timer, &mut expirations).context("timerfd")?;
        check(u64::from_ne_bytes(expirations) > 0, || {
            "a timer that did not expire woke its thread".into()
        })?;
        clock.look()?;
        turns.add(1);
    }
    Ok(())
}

fn spin(turns: &Turns, clock: &Clock) -> Result<()> {
    while turns.goes_on() {
        let began = Instant::now();
        while began.elapsed() < SPIN {
            clock.look()?;
        }
        turns.add(1);
        thread::sleep(REST);
    }
    Ok(())
}

/// How many local timer interrupts each CPU has had.
pub fn local_interrupts() -> Result<Vec<u64>> {
    let text = fs::read_to_string(INTERRUPTS).context(INTERRUPTS)?;
    parse(&text).ok_or_else(|| Failure(format!("{INTERRUPTS} has no {LOCAL}")))
}

fn parse(text: &str) -> Option<Vec<u64>> {
    let words = text
        .lines()
        .find_map(|line| line.trim().strip_prefix(LOCAL))?;
    let counts = words.split_whitespace().map_while(|word| word.parse().ok());
    Some(counts.collect::<Vec<_>>()).filter(|counts| !counts.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupts_of_every_cpu_are_counted() {
        let text = "           CPU0       CPU1\n  1:  5 6 IO-APIC\nLOC:  1234  99   Local timer interrupts\n";
        assert_eq!(parse(text), Some(vec![1234, 99]));
        assert_eq!(parse("NMI: 0 0\n"), None);
    }

    #[test]
    fn a_clock_that_goes_back_is_noticed() {
        let clock = Clock::default();
        for now in [5, 7, 7, 8] {
            clock.note(|| now).unwrap();
        }
        assert_eq!(
            clock.note(|| 6).unwrap_err().to_string(),
            "CLOCK_MONOTONIC went back by 2 ns to 6"
        );
        clock.note(|| 8).unwrap();
    }
}
