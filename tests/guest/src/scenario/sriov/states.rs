//! `vf-states` and `vf-waits`: virtual functions that are stopped in every way there is, or about to be, while whatever has
//! this guest does something with it.

use std::fs;
use std::time::Duration;

use driver::access::FunctionExt;
use driver::pci::VectorEntry;
use driver::virtio::NO_VECTOR;
use driver::virtio::block::block_feature;
use driver::virtio::migration::mode;

use super::super::{Found, console};
use super::held::{BURST, Load, OwnerDriver, SEED, Way};
use super::{Function, Owner};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::pattern;
use crate::user::function::SysfsFunction;
use crate::{Context, Failure, Result, check, say};

/// The local APIC of CPU 0, as messages reach it.
pub(in crate::scenario) const APIC: u64 = 0xfee0_0000;
/// A vector of Linux that does nothing but count, POSTED_INTR_VECTOR, and what it counts in `/proc/interrupts`. Nobody else
/// uses it in a guest that has no guests.
pub(in crate::scenario) const VECTOR: u32 = 0xf2;
const COUNT: &str = "PIN:";
/// How long an interrupt may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests of `vf-waits` that are begun at once, and bytes of each.
const ZEROES: (usize, u64) = (2 * BURST, 3 << 20);

/// What is done to a virtual function.
enum State {
    /// It is stopped.
    Stopped(Way),
    /// Its vector is masked, and an interrupt pending.
    Masked,
    /// Nothing; whoever has this guest freezes it before the first line is typed, and lets it go on before the second.
    ByHand,
}

impl State {
    fn named(name: &str) -> Result<Self> {
        Ok(match name {
            "masked" => Self::Masked,
            "by-hand" => Self::ByHand,
            way => Self::Stopped(Way::named(way)?),
        })
    }

    fn feature(&self) -> u64 {
        match self {
            Self::Stopped(way) => way.feature(),
            Self::Masked | Self::ByHand => 0,
        }
    }

    fn vector(&self) -> u16 {
        match self {
            Self::Masked => 0,
            Self::Stopped(_) | Self::ByHand => NO_VECTOR,
        }
    }
}

/// A virtual function in its state.
struct Held {
    state: State,
    load: Load,
    /// Chains that were used before.
    used: u16,
}

/// Puts each virtual function into another state; after a line on the console all have to be in it; after another they are
/// taken out of it, and work.
pub fn run(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let ways = request.text(
        "ways",
        "freeze+stop+suspend-v1.4+device-stop+queue+masked+by-hand",
    );
    let states = ways.split('+').map(State::named);
    let states: Vec<_> = states.collect::<Result<_>>()?;
    let log = Mark::now()?;
    let (mut driver, members) = start(&owner, states.len())?;
    let mut all = Vec::new();
    for ((number, member), state) in (1..).zip(&members).zip(states) {
        let load = Load::start(member, number, state.feature(), state.vector())?;
        let mut held = Held {
            state,
            load,
            used: 0,
        };
        held.enter(&mut driver).context(&member.address)?;
        all.push(held);
    }
    console::ask()?;
    for held in &mut all {
        if let State::ByHand = held.state {
            // It was frozen since, which its driver does not know.
            held.load.submit(BURST)?;
        }
        held.expect_same(&mut driver).context(held.load.member())?;
    }
    console::ask()?;
    for held in &mut all {
        held.leave(&mut driver).context(held.load.member())?;
    }
    for held in &mut all {
        while held.load.left() > 0 {
            held.load.submit(BURST)?;
            held.load.drain().context(held.load.member())?;
        }
        held.load.transport().reset().context("the end")?;
    }
    log.check_clean()?;
    Ok(Found::default()
        .with("states", all.len())
        .with("crc32", format_args!("{:08x}", pattern::checksum(SEED, 1))))
}

/// The owner's driver, and `n` virtual functions without drivers.
fn start(owner: &Owner, n: usize) -> Result<(OwnerDriver, Vec<Function>)> {
    let mut driver = OwnerDriver::start(owner)?;
    if owner.members()?.is_empty() {
        owner.function.set("sriov_drivers_autoprobe", 0)?;
        owner.set_members(n as u16)?;
    }
    let members = owner.members()?;
    check(members.len() >= n, || {
        format!("there are {} virtual functions", members.len())
    })?;
    driver.negotiate()?;
    Ok((driver, members))
}

impl Held {
    fn enter(&mut self, driver: &mut OwnerDriver) -> Result<()> {
        let load = &mut self.load;
        match &self.state {
            State::Stopped(way) => {
                load.submit(BURST)?;
                way.stop(load, Some(driver))?;
                if way.is_of_owner() {
                    // Its driver knows nothing of that.
                    load.submit(BURST)?;
                }
            }
            State::Masked => {
                let (function, msix) = msix(load)?;
                let entry = VectorEntry {
                    address: APIC,
                    data: VECTOR,
                    masked: true,
                };
                msix.set_entry(function, 0, entry);
                msix.set_control(function, true, false);
                load.submit(BURST)?;
                load.drain()?;
            }
            State::ByHand => {}
        }
        load.expect_stillness()?;
        self.used = load.used();
        self.expect_same(driver)
    }

    /// Fails unless it is as it was left.
    fn expect_same(&mut self, driver: &mut OwnerDriver) -> Result<()> {
        let load = &mut self.load;
        match &self.state {
            State::Stopped(way) => way.expect_stopped(load, Some(driver))?,
            State::Masked => {
                let (function, msix) = msix(load)?;
                let entry = msix.entry(function, 0);
                let (pending, count) = (msix.is_pending(function, 0), interrupts()?);
                check(entry.masked && entry.data == VECTOR && pending, || {
                    format!("vector 0 is {entry:?}, pending: {pending}")
                })?;
                check(count == 0, || format!("{count} interrupts came masked"))?;
            }
            State::ByHand => {}
        }
        load.expect_stillness()?;
        check(load.used() == self.used, || {
            format!("{} chains were used instead of {}", load.used(), self.used)
        })
    }

    fn leave(&mut self, driver: &mut OwnerDriver) -> Result<()> {
        let load = &mut self.load;
        match &self.state {
            State::Stopped(way) => way.resume(load, Some(driver))?,
            State::Masked => {
                let (function, msix) = msix(load)?;
                msix.mask(function, 0, false);
                let came = || interrupts().is_ok_and(|count| count > 0);
                check(function.wait_until(PATIENCE, came), || {
                    "the pending interrupt is lost".into()
                })?;
                check(!msix.is_pending(function, 0), || {
                    "an interrupt that was delivered is pending".into()
                })?;
                let count = interrupts()?;
                check(count == 1, || format!("{count} interrupts instead of one"))?;
            }
            State::ByHand => {}
        }
        load.drain()
    }
}

fn msix(load: &Load) -> Result<(&SysfsFunction, &driver::pci::MsiX)> {
    let transport = load.transport();
    let msix = transport.msix();
    let msix = msix.ok_or_else(|| Failure("there is no MSI-X".into()))?;
    Ok((transport.function(), msix))
}

/// How often [`VECTOR`] came, on all CPUs.
pub(in crate::scenario) fn interrupts() -> Result<u64> {
    let table = fs::read_to_string("/proc/interrupts").context("/proc/interrupts")?;
    let row = table
        .lines()
        .find_map(|line| line.trim().strip_prefix(COUNT));
    let row = row.ok_or_else(|| Failure(format!("/proc/interrupts has no {COUNT}")))?;
    let counts = row
        .split_whitespace()
        .map_while(|word| word.parse::<u64>().ok());
    Ok(counts.sum())
}

/// Stops the first virtual function while it has much to do, and lets it go on, until a line is typed on the console: almost
/// all the time a command of the owner waits.
pub fn waits(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let log = Mark::now()?;
    let (mut driver, members) = start(&owner, 1)?;
    let member = members
        .first()
        .ok_or_else(|| Failure("there is no virtual function".into()))?;
    let zeroes = block_feature::WRITE_ZEROES;
    let mut load = Load::start(member, 1, zeroes, NO_VECTOR)?;
    let typed = console::watch()?;
    say("stops begin");
    let mut stops = 0;
    while !typed() {
        let doing = |what: &'static str| move || format!("stop {stops}: {what}");
        load.submit_zeroes(ZEROES.0, ZEROES.1)?;
        driver
            .set_mode(1, mode::STOP)
            .context(doing("stopping")())?;
        load.expect_stillness().context(doing("stopped")())?;
        driver
            .set_mode(1, mode::ACTIVE)
            .context(doing("resuming")())?;
        load.drain().context(doing("resumed")())?;
        stops += 1;
    }
    while load.left() > 0 {
        load.submit(BURST)?;
        load.drain()?;
    }
    load.transport().reset().context("the end")?;
    log.check_clean()?;
    Ok(Found::default()
        .with("stops", stops)
        .with("crc32", format_args!("{:08x}", pattern::checksum(SEED, 1))))
}
