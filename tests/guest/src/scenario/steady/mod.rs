//! `steady`: a load on all parts of the machine that checks itself.
//!
//! Whatever its monitor does meanwhile (pause, snapshot, restore in another process), every byte, packet, register and timer
//! is what it would have been without: each part verifies what it wrote before, and the load fails as soon as one part
//! does, or stands still.

mod disk;
mod fpu;
mod memory;
mod packets;
mod time;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

use super::{Found, boot, console, sriov};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::{Context, Failure, Result, check, say};

/// The word on the console that ends the load.
const ENOUGH: &str = "enough";
const TICK: Duration = Duration::from_secs(1);
/// Messages of any level that must not appear while the load runs, besides those no scenario accepts.
const BAD: [&str; 5] = ["i/o error", "xsave", "xstate", "bad fpu", "rcu: info"];

/// Runs the parts that the parameters name until `enough` is typed on the console or `seconds` ticks are over.
///
/// Standing still is measured in ticks, of which a guest that does not run has none: a restore may set its clocks forward.
pub fn run(request: &Request) -> Result<Found> {
    let log = Mark::now()?;
    let enough = console::watch_for(ENOUGH)?;
    let cpus = boot::online_cpus()?;
    let ticks: u64 = request.number("seconds", 3600)?;
    let mut load = Load::new(request.number("stall", 30)?);
    let networks = names(request.text("nets", ""));
    let mut cards = networks
        .chunks_exact(2)
        .map(<[_]>::to_vec)
        .collect::<Vec<_>>();
    check(networks.len().is_multiple_of(2), || {
        "nets= names pairs".into()
    })?;
    let mut disks = names(request.text("disks", ""));
    let vfs: u16 = request.number("vfs", 0)?;
    if vfs > 0 {
        for owner in names(request.text("pfs", "0")) {
            let members = sriov::Members::ensure(&owner, vfs)?;
            disks.extend(members.disks);
            cards.extend(members.interfaces.chunks_exact(2).map(<[_]>::to_vec));
        }
    }
    let lost = request.number("lost", 0)?;
    // Before there is a load that would make it slow.
    let pairs = (0..)
        .zip(&cards)
        .map(|(number, pair)| packets::Pair::connect(number, pair))
        .collect::<Result<Vec<_>>>()?;
    memory::start(&mut load, cpus, request.number("mib", 16)?)?;
    time::start(&mut load, cpus)?;
    fpu::start(&mut load, cpus)?;
    for disk in &disks {
        disk::start(&mut load, disk)?;
    }
    for pair in pairs {
        pair.start(&mut load, lost)?;
    }
    load.watch(ticks, enough)?;
    let found = load.end()?;
    log.check_clean()?;
    log.check_without(&BAD)?;
    Ok(found
        .with("disks", disks.len())
        .with("pairs", cards.len())
        .with("cpus", cpus))
}

/// The words of a list joined by `+`.
fn names(list: &str) -> Vec<String> {
    let words = list.split('+').filter(|word| !word.is_empty());
    words.map(str::to_owned).collect()
}

/// What the workers have in common.
struct Common {
    ended: AtomicBool,
    /// Why the first worker failed that did.
    failure: Mutex<Option<Failure>>,
}

/// A worker's side of its thread: whether to go on, and how far it got.
struct Turns {
    common: Arc<Common>,
    count: Arc<AtomicU64>,
}

impl Turns {
    fn goes_on(&self) -> bool {
        !self.common.ended.load(Relaxed)
    }

    fn add(&self, turns: u64) {
        self.count.fetch_add(turns, Relaxed);
    }
}

/// One thread of the load.
struct Worker {
    /// What `ok steady` calls the number of its turns, together with those of all like it.
    kind: &'static str,
    name: String,
    count: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// All threads of the load, and how far they got.
struct Load {
    common: Arc<Common>,
    workers: Vec<Worker>,
    stillness: Stillness,
    /// What is told at the end.
    told: Vec<(&'static str, Arc<AtomicU64>)>,
}

impl Load {
    fn new(stall: u32) -> Self {
        Self {
            common: Arc::new(Common {
                ended: AtomicBool::new(false),
                failure: Mutex::new(None),
            }),
            workers: Vec::new(),
            stillness: Stillness::new(stall),
            told: Vec::new(),
        }
    }

    /// Starts a thread that works until it is told to end, on one CPU alone if that is named.
    fn start(
        &mut self,
        kind: &'static str,
        place: impl std::fmt::Display,
        cpu: Option<usize>,
        work: impl FnOnce(&Turns) -> Result<()> + Send + 'static,
    ) {
        let name = format!("{kind} {place}");
        let count = Arc::new(AtomicU64::new(0));
        let turns = Turns {
            common: Arc::clone(&self.common),
            count: Arc::clone(&count),
        };
        let called = name.clone();
        let thread = thread::spawn(move || {
            let done = pin(cpu).and_then(|()| work(&turns)).context(called);
            if let Err(why) = done {
                let mut failure = lock(&turns.common.failure);
                failure.get_or_insert(why);
            }
        });
        self.workers.push(Worker {
            kind,
            name,
            count,
            thread,
        });
    }

    /// A number for the end of the load.
    fn tell(&mut self, key: &'static str) -> Arc<AtomicU64> {
        if let Some((_, number)) = self.told.iter().find(|(known, _)| *known == key) {
            return Arc::clone(number);
        }
        let number = Arc::new(AtomicU64::new(0));
        self.told.push((key, Arc::clone(&number)));
        number
    }

    /// Ticks until there is enough; fails with the first worker, or when one stands still.
    fn watch(&mut self, ticks: u64, enough: impl Fn() -> bool) -> Result<()> {
        for tick in 1..=ticks {
            self.check()?;
            for worker in &self.workers {
                let turns = worker.count.load(Relaxed);
                self.stillness.look(&worker.name, turns)?;
            }
            for (cpu, count) in time::local_interrupts()?.into_iter().enumerate() {
                self.stillness
                    .look(&format!("local timer interrupts of CPU {cpu}"), count)?;
            }
            let clock = |id| {
                let now = clock_gettime(id);
                format!("{}.{:03}", now.tv_sec, now.tv_nsec / 1_000_000)
            };
            say(format_args!(
                "tick {tick} monotonic={} realtime={}",
                clock(ClockId::Monotonic),
                clock(ClockId::Realtime)
            ));
            if enough() {
                break;
            }
            thread::sleep(TICK);
        }
        Ok(())
    }

    /// The failure of the first worker that failed.
    fn check(&self) -> Result<()> {
        match lock(&self.common.failure).take() {
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    /// Has all workers look at what they left, and counts their turns.
    fn end(self) -> Result<Found> {
        self.common.ended.store(true, Relaxed);
        let mut looks = 0;
        while let Some(worker) = self.workers.iter().find(|w| !w.thread.is_finished()) {
            self.check()?;
            check(looks < self.stillness.limit, || {
                format!("{} does not end", worker.name)
            })?;
            looks += 1;
            thread::sleep(TICK);
        }
        self.check()?;
        let mut turns = BTreeMap::<_, u64>::new();
        for worker in self.workers {
            worker
                .thread
                .join()
                .map_err(|_| Failure(format!("{} panicked", worker.name)))?;
            *turns.entry(worker.kind).or_default() += worker.count.load(Relaxed);
        }
        let found = turns
            .into_iter()
            .fold(Found::default(), |found, (kind, turns)| {
                found.with(kind, turns)
            });
        let told = self.told.into_iter();
        Ok(told.fold(found, |found, (key, number)| {
            found.with(key, number.load(Relaxed))
        }))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the calling thread on one CPU.
fn pin(cpu: Option<usize>) -> Result<()> {
    let Some(cpu) = cpu else {
        return Ok(());
    };
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).context("pinning")
}

/// Finds counters that do not grow.
struct Stillness {
    /// How many looks in a row may find the same.
    limit: u32,
    /// Value, and for how many looks it was that.
    seen: BTreeMap<String, (u64, u32)>,
}

impl Stillness {
    fn new(limit: u32) -> Self {
        Self {
            limit,
            seen: BTreeMap::new(),
        }
    }

    fn look(&mut self, name: &str, value: u64) -> Result<()> {
        let still = match self.seen.get(name) {
            Some((before, still)) if *before == value => still + 1,
            _ => 0,
        };
        self.seen.insert(name.to_owned(), (value, still));
        check(still <= self.limit, || {
            format!("{name}: stood still at {value} for {still} ticks")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_still_is_named() {
        let mut stillness = Stillness::new(2);
        for value in [1, 1, 1, 2, 2, 2] {
            stillness.look("a", value).unwrap();
            stillness.look("b", value * 2).unwrap();
        }
        stillness.look("a", 3).unwrap();
        assert_eq!(
            stillness.look("b", 4).unwrap_err().to_string(),
            "b: stood still at 4 for 3 ticks"
        );
    }

    #[test]
    fn lists_may_be_empty() {
        assert!(names("").is_empty());
        assert_eq!(names("eth0+eth1"), ["eth0", "eth1"]);
    }

    #[test]
    fn a_worker_that_fails_ends_the_load() {
        let mut load = Load::new(100);
        load.start("memory", "of nobody", None, |_| {
            Err(Failure("a page holds 7".into()))
        });
        while !load.workers[0].thread.is_finished() {
            thread::yield_now();
        }
        let error = load.watch(1, || false).unwrap_err();
        assert_eq!(error.to_string(), "memory of nobody: a page holds 7");
    }

    #[test]
    fn turns_of_one_kind_are_counted_together() {
        let mut load = Load::new(100);
        for place in ["one", "two"] {
            load.start("memory", place, None, |turns| {
                turns.add(3);
                while turns.goes_on() {
                    thread::yield_now();
                }
                Ok(())
            });
        }
        load.tell("lost").fetch_add(5, Relaxed);
        assert_eq!(load.end().unwrap().to_string(), " memory=6 lost=5");
    }
}
