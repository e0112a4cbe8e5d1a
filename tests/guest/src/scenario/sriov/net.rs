//! `sriov-ping`: a physical function and its virtual functions are ports of one switch.

use std::net::Ipv4Addr;
use std::time::Duration;

use super::super::net::{PINGS, exchange, ping_until_answered};
use super::super::{Found, console};
use super::{Function, Owner};
use crate::cmdline::Request;
use crate::host::Host;
use crate::kernel_log::Mark;
use crate::pattern::CHUNK;
use crate::{Failure, Result, say};

/// Pings between all of them, then moves `mib` MiB in each direction between the first two virtual functions (the
/// physical and the virtual one if there is one only), and 1 MiB between the physical function and each of them.
pub fn ping(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let n = match request.text("n", "") {
        "" => None,
        _ => Some(request.number("n", 0)?),
    };
    let chunks: u64 = request.number("mib", 100)?;
    let log = Mark::now()?;
    let members = owner.ensure(n)?;
    let hosts = hosts(std::iter::once(&owner.function).chain(&members))?;
    let (pairs, best) = all_ping(&hosts)?;
    let (Some(first), Some(second), Some(pf)) =
        (hosts.get(1), hosts.get(2).or(hosts.first()), hosts.first())
    else {
        return Err(Failure("there is no virtual function".into()));
    };
    let took = exchange(first, second, chunks)?;
    for member in &hosts[1..] {
        exchange(pf, member, 1)?;
    }
    for host in hosts {
        host.end()?;
    }
    log.check_clean()?;
    Ok(Found::default()
        .with("vfs", members.len())
        .with("pairs", pairs)
        .with("pings", pairs * u32::from(PINGS))
        .with("rtt_us", best.as_micros())
        .with("bytes", 2 * chunks * CHUNK as u64)
        .with("ms", took.as_millis()))
}

/// Has every host ping every other; how many pairs that are, and the best round trip.
pub fn all_ping(hosts: &[Host]) -> Result<(u32, Duration)> {
    let mut best = Duration::MAX;
    let mut pairs = 0;
    for (index, from) in hosts.iter().enumerate() {
        for to in &hosts[index + 1..] {
            let peer = to.address;
            best = best.min(from.run(move || ping_until_answered(peer))?);
            pairs += 1;
        }
    }
    Ok((pairs, best))
}

/// Has the first two virtual functions exchange data until a line is typed on the console, and tells of every MiB.
pub fn traffic(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let log = Mark::now()?;
    let members = owner.ensure(Some(request.number("n", 2)?))?;
    let hosts = hosts(&members)?;
    let [first, second, ..] = hosts.as_slice() else {
        return Err(Failure("it takes two virtual functions: n=2".into()));
    };
    let told = console::watch()?;
    let mut turns = 0u64;
    while !told() {
        exchange(first, second, 1)?;
        turns += 1;
        say(format_args!("traffic {turns}"));
    }
    for host in hosts {
        host.end()?;
    }
    log.check_clean()?;
    Ok(Found::default().with("turns", turns))
}

/// A host for each of these network cards, with addresses in their order.
pub fn hosts<'a>(cards: impl IntoIterator<Item = &'a Function>) -> Result<Vec<Host>> {
    (1..)
        .zip(cards)
        .map(|(number, card)| host(card, number))
        .collect()
}

/// Host `number`, on this network card.
pub fn host(card: &Function, number: u8) -> Result<Host> {
    Host::start(&card.interface()?, Ipv4Addr::new(10, 78, 0, number))
}
