//! Network cards: numbered datagrams in both directions between two hosts of this guest.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use super::super::net::ping_until_answered;
use super::{Load, Turns};
use crate::host::Host;
use crate::pattern;
use crate::{Context, Failure, Result, check};

const PORT: u16 = 7100;
/// Bytes per datagram, a multiple of 8.
const LENGTH: usize = 1024;
/// Datagrams that may be under way at a time. A socket has room for more.
const WINDOW: u64 = 32;
/// How long nothing may arrive before those under way are taken for lost, and how long the last ones may take.
const PATIENCE: Duration = Duration::from_secs(2);
const REST: Duration = Duration::from_millis(1);
const LOOK: Duration = Duration::from_millis(500);
/// Of numbers that have arrived, so many are remembered to find those that arrive twice.
const REMEMBERED: u64 = 4096;
/// Datagrams whose checksum the kernel found wrong, by their place in [`COUNTERS`].
const WRONG: &str = "InCsumErrors";
const COUNTERS: &str = "/proc/thread-self/net/snmp";

/// Two hosts of one network.
pub struct Pair {
    hosts: [Host; 2],
}

impl Pair {
    /// Makes hosts of two network cards, which answer each other.
    pub fn connect(number: u8, cards: &[String]) -> Result<Self> {
        let [a, b] = cards else {
            return Err(Failure("a pair of cards is two".into()));
        };
        let host = |card, last| Host::start(card, Ipv4Addr::new(10, 79, number, last));
        let hosts = [host(a, 1)?, host(b, 2)?];
        let peer = hosts[1].address;
        hosts[0].run(move || ping_until_answered(peer))?;
        Ok(Self { hosts })
    }

    /// Has them send to each other. Of each direction no more than `lost` datagrams may be missing in the end, and none may
    /// arrive twice or with other contents.
    pub fn start(self, load: &mut Load, lost: u64) -> Result<()> {
        let [a, b] = &self.hosts;
        let (at_a, at_b) = (socket(a)?, socket(b)?);
        direction(load, [a, b], [&at_a, &at_b], lost)?;
        direction(load, [b, a], [&at_b, &at_a], lost)?;
        for host in self.hosts {
            let place = format!("on {}", host.interface);
            load.start("checksums", place, None, move |turns| {
                while turns.goes_on() {
                    turns.add(1);
                    thread::sleep(LOOK);
                }
                let wrong = host.run(|| {
                    let counters = fs::read_to_string(COUNTERS).context(COUNTERS)?;
                    wrong_checksums(&counters)
                })?;
                check(wrong == 0, || format!("{wrong} datagrams were corrupted"))
            });
        }
        Ok(())
    }
}

fn direction(
    load: &mut Load,
    [from, to]: [&Host; 2],
    [sender, receiver]: [&UdpSocket; 2],
    lost: u64,
) -> Result<()> {
    let place = format!("from {} to {}", from.interface, to.interface);
    let flow = Arc::new(Flow::default());
    let copy = |socket: &UdpSocket| socket.try_clone().context("a socket");
    let (sender, receiver) = (copy(sender)?, copy(receiver)?);
    let (ours, seed) = (Arc::clone(&flow), seed(from.address));
    let target = SocketAddrV4::new(to.address, PORT);
    load.start("sent", &place, None, move |turns| {
        send(turns, &sender, target, &ours, seed)
    });
    let missing = load.tell("lost");
    load.start("packets", &place, None, move |turns| {
        receive(turns, &receiver, &flow, seed)?;
        let sent = flow.sent.load(Relaxed);
        let gone = sent - flow.arrived.load(Relaxed);
        missing.fetch_add(gone, Relaxed);
        check(gone <= lost, || format!("{gone} of {sent} were lost"))
    });
    Ok(())
}

/// One direction.
#[derive(Default)]
struct Flow {
    sent: AtomicU64,
    arrived: AtomicU64,
    /// The sender has ended, so that no more than `sent` will arrive.
    ended: AtomicBool,
}

fn socket(host: &Host) -> Result<UdpSocket> {
    let address = host.address;
    host.run(move || {
        let socket = UdpSocket::bind((address, PORT)).context("a socket")?;
        socket
            .set_read_timeout(Some(PATIENCE))
            .context("a socket")?;
        Ok(socket)
    })
}

fn seed(from: Ipv4Addr) -> u64 {
    u64::from(u32::from(from)) << 32
}

fn fill(datagram: &mut [u8; LENGTH], seed: u64, number: u64) {
    let (head, body) = datagram.split_at_mut(8);
    head.copy_from_slice(&number.to_le_bytes());
    pattern::fill(body, seed ^ number, 0);
}

fn send(turns: &Turns, socket: &UdpSocket, to: SocketAddrV4, flow: &Flow, seed: u64) -> Result<()> {
    let mut datagram = [0; LENGTH];
    // Those that were taken for lost.
    let mut given_up = 0;
    while turns.goes_on() {
        let number = flow.sent.load(Relaxed);
        let under_way = || number - flow.arrived.load(Relaxed);
        let mut looks = 0;
        while under_way().saturating_sub(given_up) >= WINDOW && turns.goes_on() {
            thread::sleep(REST);
            looks += 1;
            if looks * REST >= PATIENCE {
                given_up = under_way();
            }
        }
        // What comes after all is under way no more.
        given_up = given_up.min(under_way());
        fill(&mut datagram, seed, number);
        // Counted before it can arrive.
        flow.sent.fetch_add(1, Relaxed);
        socket.send_to(&datagram, to).context("sending")?;
        turns.add(1);
        if number.is_multiple_of(8) {
            thread::sleep(REST);
        }
    }
    flow.ended.store(true, Relaxed);
    Ok(())
}

fn receive(turns: &Turns, socket: &UdpSocket, flow: &Flow, seed: u64) -> Result<()> {
    let mut arrivals = Arrivals::default();
    let mut found = [0; LENGTH + 1];
    let mut expected = [0; LENGTH];
    let complete = || {
        let all = flow.arrived.load(Relaxed) == flow.sent.load(Relaxed);
        !turns.goes_on() && flow.ended.load(Relaxed) && all
    };
    while !complete() {
        let length = match socket.recv(&mut found) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Nothing came for so long: what is missing is lost if there is no sender any more.
                if flow.ended.load(Relaxed) {
                    return Ok(());
                }
                continue;
            }
            Err(error) => return Err(error).context("receiving"),
        };
        let number = number(&found[..length])?;
        check(number < flow.sent.load(Relaxed), || {
            format!("datagram {number} was never sent")
        })?;
        fill(&mut expected, seed, number);
        check(found[..length] == expected, || {
            format!("datagram {number} has changed on its way")
        })?;
        arrivals.note(number)?;
        flow.arrived.fetch_add(1, Relaxed);
        turns.add(1);
    }
    Ok(())
}

fn number(datagram: &[u8]) -> Result<u64> {
    let head = datagram.first_chunk().filter(|_| datagram.len() == LENGTH);
    let head = head.ok_or_else(|| Failure(format!("a datagram of {} bytes", datagram.len())))?;
    Ok(u64::from_le_bytes(*head))
}

/// The numbers that arrived of late.
#[derive(Default)]
struct Arrivals {
    seen: BTreeSet<u64>,
}

impl Arrivals {
    /// Fails if this number has arrived before, or so late that nobody knows.
    fn note(&mut self, number: u64) -> Result<()> {
        let late = self
            .seen
            .first()
            .is_some_and(|first| self.seen.len() as u64 == REMEMBERED && number < *first);
        check(!late && self.seen.insert(number), || {
            format!("datagram {number} has arrived before")
        })?;
        if self.seen.len() as u64 > REMEMBERED {
            self.seen.pop_first();
        }
        Ok(())
    }
}

/// A number of the second of two lines that begin with `Udp:`; the first has the names.
fn wrong_checksums(text: &str) -> Result<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with("Udp:"));
    let column = |line: Option<&str>| {
        let words = line.unwrap_or_default().split_whitespace();
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let (names, values) = (column(lines.next()), column(lines.next()));
    let at = names.iter().position(|name| name == WRONG);
    let value = at.and_then(|at| values.get(at)?.parse().ok());
    value.ok_or_else(|| Failure(format!("{COUNTERS} has no {WRONG}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrives_twice_is_noticed() {
        let mut arrivals = Arrivals::default();
        for number in (0..10_000).filter(|number| number % 7 != 0) {
            arrivals.note(number).unwrap();
        }
        assert_eq!(
            arrivals.note(9_998).unwrap_err().to_string(),
            "datagram 9998 has arrived before"
        );
        // Late, but for the first time; and too late to tell.
        arrivals.note(9_996).unwrap();
        assert!(arrivals.note(7).is_err());
    }

    #[test]
    fn datagrams_have_a_number_and_one_length() {
        let mut datagram = [0; LENGTH];
        fill(&mut datagram, 5, 77);
        assert_eq!(number(&datagram).unwrap(), 77);
        assert!(number(&datagram[1..]).is_err());
        let mut other = [0; LENGTH];
        fill(&mut other, 5, 78);
        assert_ne!(datagram[8..], other[8..]);
    }

    #[test]
    fn counters_are_found_by_name() {
        let text = "Udp: InDatagrams NoPorts InCsumErrors\nUdp: 12 0 3\nUdpLite: a\nUdpLite: 1\n";
        assert_eq!(wrong_checksums(text).unwrap(), 3);
        assert!(wrong_checksums("Tcp: a\n").is_err());
    }
}
