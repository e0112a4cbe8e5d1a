//! `net-*`: packets between two interfaces of this guest, and between one and the world outside.
//!
//! The second interface belongs to another [`Host`].

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, ipproto, recv, sendto, socket};

use super::Found;
use crate::cmdline::Request;
use crate::host::{Host, PREFIX};
use crate::netlink::Netlink;
use crate::pattern::{self, Buffer, CHUNK};
use crate::{Context, Failure, Result, check};

/// How long the other side may take to answer the first time: it may still be coming up.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a transfer may stand still.
const STALL: Duration = Duration::from_secs(60);
/// Round trips that must succeed in a row.
pub const PINGS: u16 = 5;

const OUR_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
const OTHER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
const PORT: u16 = 7000;
const SEED_THERE: u64 = 0xab;
const SEED_BACK: u64 = 0xba;

/// Pings from interface `a` to interface `b`, then moves `mib` MiB over TCP in each direction.
pub fn ping(request: &Request) -> Result<Found> {
    let (a, b) = (request.text("a", "eth0"), request.text("b", "eth1"));
    let chunks: u64 = request.number("mib", 10)?;
    let netlink = Netlink::open()?;
    netlink.index(a)?;
    netlink.index(b)?;
    let other = Host::start(b, OTHER_ADDRESS)?;
    let listener = listen(&other)?;
    let served = other.begin(move || serve(&listener, chunks));
    netlink.address(a, OUR_ADDRESS, PREFIX)?;
    netlink.up(a)?;
    let round_trip = ping_until_answered(OTHER_ADDRESS)?;
    let began = Instant::now();
    let (there, back) = transfer(OTHER_ADDRESS, chunks)?;
    let took = began.elapsed();
    let received = served.wait()?;
    check(received == there, || {
        format!("sent crc32={there:08x}, but {received:08x} arrived")
    })?;
    other.end()?;
    Ok(Found::default()
        .with("pings", PINGS)
        .with("rtt_us", round_trip.as_micros())
        .with("bytes", 2 * chunks * CHUNK as u64)
        .with("ms", took.as_millis())
        .with("crc32_there", format_args!("{there:08x}"))
        .with("crc32_back", format_args!("{back:08x}")))
}

/// How fast interface `a` sends to interface `b`, both in namespaces of their own: `mib` MiB over TCP, `rounds` times.
/// Nothing is computed about the bytes, so that moving them is what takes the time.
pub fn rate(request: &Request) -> Result<Found> {
    let bytes = request.number::<u64>("mib", 32)? * CHUNK as u64;
    let rounds: u32 = request.number("rounds", 3)?;
    let from = Host::start(request.text("a", "eth0"), OUR_ADDRESS)?;
    let to = Host::start(request.text("b", "eth1"), OTHER_ADDRESS)?;
    let round_trip = from.run(|| ping_until_answered(OTHER_ADDRESS))?;
    let mut took = Vec::new();
    for _ in 0..rounds {
        let listener = listen(&to)?;
        let received = to.begin(move || {
            let (mut stream, _) = listener.accept().context("accepting")?;
            limit(&stream)?;
            let mut buffer = vec![0; 256 * 1024];
            let mut received = 0;
            while received < bytes {
                match stream.read(&mut buffer).context("receiving")? {
                    0 => break,
                    n => received += n as u64,
                }
            }
            Ok((received, Instant::now()))
        });
        let began = from.run(move || {
            let mut stream = TcpStream::connect((OTHER_ADDRESS, PORT)).context("connecting")?;
            limit(&stream)?;
            let buffer = Buffer::new();
            let began = Instant::now();
            for _ in 0..bytes / CHUNK as u64 {
                stream.write_all(buffer.bytes()).context("sending")?;
            }
            Ok(began)
        })?;
        let (received, ended) = received.wait()?;
        check(received == bytes, || {
            format!("{received} of {bytes} bytes arrived")
        })?;
        took.push((ended - began).as_millis().to_string());
    }
    from.end()?;
    to.end()?;
    Ok(Found::default()
        .with("bytes", bytes)
        .with("rtt_us", round_trip.as_micros())
        .with("ms", took.join("+")))
}

/// Moves `chunks` from one host to another and as many back; how long that took.
pub fn exchange(from: &Host, to: &Host, chunks: u64) -> Result<Duration> {
    let listener = listen(to)?;
    let served = to.begin(move || serve(&listener, chunks));
    let began = Instant::now();
    let peer = to.address;
    let (there, _) = from.run(move || transfer(peer, chunks))?;
    let took = began.elapsed();
    let received = served.wait()?;
    check(received == there, || {
        format!("sent crc32={there:08x}, but {received:08x} arrived")
    })?;
    Ok(took)
}

/// A socket on which the host waits for a connection.
fn listen(host: &Host) -> Result<TcpListener> {
    let address = host.address;
    host.run(move || TcpListener::bind((address, PORT)).context("listening"))
}

/// Sends and receives `chunks`; the checksums of what was sent and of what came back, which is checked.
fn transfer(peer: Ipv4Addr, chunks: u64) -> Result<(u32, u32)> {
    let mut stream = TcpStream::connect((peer, PORT)).context("connecting")?;
    limit(&stream)?;
    let there = send(&mut stream, SEED_THERE, chunks)?;
    let (back, bytes) = receive(&mut stream)?;
    check(bytes == chunks * CHUNK as u64, || {
        format!("{bytes} bytes came back")
    })?;
    let expected = pattern::checksum(SEED_BACK, chunks);
    check(back == expected, || {
        format!("crc32={back:08x} came back instead of {expected:08x}")
    })?;
    Ok((there, back))
}

fn serve(listener: &TcpListener, chunks: u64) -> Result<u32> {
    let (mut stream, _) = listener.accept().context("accepting")?;
    limit(&stream)?;
    let (received, _) = receive_exactly(&mut stream, chunks * CHUNK as u64)?;
    send(&mut stream, SEED_BACK, chunks)?;
    Ok(received)
}

fn limit(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(STALL)).context("socket")?;
    stream.set_write_timeout(Some(STALL)).context("socket")
}

fn send(stream: &mut TcpStream, seed: u64, chunks: u64) -> Result<u32> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = Buffer::new();
    for chunk in 0..chunks {
        pattern::fill(buffer.bytes_mut(), seed, chunk * CHUNK as u64);
        hasher.update(buffer.bytes());
        stream.write_all(buffer.bytes()).context("sending")?;
    }
    Ok(hasher.finalize())
}

/// Checksum and length of all that comes until the other side closes.
fn receive(stream: &mut impl Read) -> Result<(u32, u64)> {
    receive_exactly(stream, u64::MAX)
}

/// Checksum and length of what comes, up to `limit`.
fn receive_exactly(stream: &mut impl Read, limit: u64) -> Result<(u32, u64)> {
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    while total < limit {
        let room = (limit - total).min(buffer.len() as u64) as usize;
        match stream.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(n) => {
                hasher.update(&buffer[..n]);
                total += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure(format!("receiving after {total} bytes: {error}"))),
        }
    }
    Ok((hasher.finalize(), total))
}

/// Gives `dev` the address `addr`, pings `peer`, and reads all that its TCP `port` sends.
pub fn tap(request: &Request) -> Result<Found> {
    let device = request.text("dev", "eth0");
    let peer: Ipv4Addr = request.required("peer")?.parse().context("peer")?;
    let [a, b, c, d] = peer.octets();
    // The neighbour, which in a network of one tap is free.
    let neighbour = Ipv4Addr::new(a, b, c, d ^ 3).to_string();
    let address: Ipv4Addr = request.text("addr", &neighbour).parse().context("addr")?;
    let netlink = Netlink::open()?;
    netlink.address(device, address, request.number("prefix", PREFIX)?)?;
    netlink.up(device)?;
    let round_trip = ping_until_answered(peer)?;
    let found = Found::default()
        .with("pings", PINGS)
        .with("rtt_us", round_trip.as_micros());
    let port: u16 = request.number("port", 0)?;
    if port == 0 {
        return Ok(found);
    }
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((peer, port)), PATIENCE)
        .context(format_args!("connecting to {peer}:{port}"))?;
    limit(&stream)?;
    let (checksum, bytes) = receive(&mut stream)?;
    Ok(found
        .with("bytes", bytes)
        .with("crc32", format_args!("{checksum:08x}")))
}

/// Pings until [`PINGS`] answers in a row came, and returns the best round trip.
pub fn ping_until_answered(peer: Ipv4Addr) -> Result<Duration> {
    let socket = socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::ICMP))
        .context("an ICMP socket")?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_secs(1)))
        .context("an ICMP socket")?;
    let deadline = Instant::now() + PATIENCE;
    let mut answered = 0;
    let mut best = Duration::MAX;
    for sequence in 0.. {
        let began = Instant::now();
        let sent = sendto(
            &socket,
            &echo_request(sequence),
            SendFlags::empty(),
            &SocketAddr::from((peer, 0)),
        );
        if sent.is_ok() && await_reply(&socket, peer, sequence) {
            answered += 1;
            best = best.min(began.elapsed());
        } else {
            answered = 0;
            check(Instant::now() < deadline, || {
                format!("{peer} does not answer")
            })?;
            thread::sleep(Duration::from_millis(20));
        }
        if answered == PINGS {
            break;
        }
    }
    Ok(best)
}

/// Whether the answer to this request comes within the socket's time limit.
fn await_reply(socket: &OwnedFd, peer: Ipv4Addr, sequence: u16) -> bool {
    let deadline = Instant::now() + Duration::from_secs(1);
    let mut packet = [0; 1024];
    while Instant::now() < deadline {
        match recv(socket, &mut packet, RecvFlags::empty()) {
            Ok((length, _)) if is_reply(&packet[..length], peer, sequence) => return true,
            Ok(_) => {}
            Err(_) => return false,
        }
    }
    false
}

const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;
const IDENTIFIER: u16 = 0x7e47;
const PAYLOAD: &[u8; 24] = b"tern tern tern tern tern";

fn echo_request(sequence: u16) -> Vec<u8> {
    let mut packet = vec![ECHO_REQUEST, 0, 0, 0];
    packet.extend_from_slice(&IDENTIFIER.to_be_bytes());
    packet.extend_from_slice(&sequence.to_be_bytes());
    packet.extend_from_slice(PAYLOAD);
    let sum = internet_checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Whether an IP packet is the answer of `peer` to [`echo_request`].
fn is_reply(packet: &[u8], peer: Ipv4Addr, sequence: u16) -> bool {
    let header = usize::from(packet.first().copied().unwrap_or(0) & 0xf) * 4;
    let (Some(source), Some(icmp)) = (packet.get(12..16), packet.get(header..)) else {
        return false;
    };
    source == peer.octets()
        && icmp.first() == Some(&ECHO_REPLY)
        && icmp.get(4..6) == Some(&IDENTIFIER.to_be_bytes())
        && icmp.get(6..8) == Some(&sequence.to_be_bytes())
        && icmp.get(8..) == Some(PAYLOAD)
        && internet_checksum(icmp) == 0
}

/// RFC 1071.
fn internet_checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reply of `peer` to `echo_request(sequence)`, as a raw socket delivers it.
    fn reply(peer: Ipv4Addr, sequence: u16) -> Vec<u8> {
        let mut icmp = echo_request(sequence);
        icmp[0] = ECHO_REPLY;
        icmp[2..4].fill(0);
        let sum = internet_checksum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&peer.octets());
        packet.extend_from_slice(&icmp);
        packet
    }

    #[test]
    fn only_the_answer_counts() {
        let good = reply(OTHER_ADDRESS, 3);
        assert!(is_reply(&good, OTHER_ADDRESS, 3));
        assert!(!is_reply(&good, OTHER_ADDRESS, 4));
        assert!(!is_reply(&good, OUR_ADDRESS, 3));
        for at in 20..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(!is_reply(&bad, OTHER_ADDRESS, 3), "{at}");
        }
        for length in 0..good.len() {
            assert!(!is_reply(&good[..length], OTHER_ADDRESS, 3));
        }
    }

    #[test]
    fn checksum_is_that_of_rfc_1071() {
        assert_eq!(
            internet_checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            !0xddf2
        );
        assert_eq!(internet_checksum(&echo_request(9)), 0);
    }

    #[test]
    fn receiving_stops_at_the_limit_or_the_end() {
        let bytes = vec![7; 100_000];
        assert_eq!(
            receive(&mut bytes.as_slice()).unwrap(),
            (crc32fast::hash(&bytes), 100_000)
        );
        let (checksum, length) = receive_exactly(&mut bytes.as_slice(), 70_000).unwrap();
        assert_eq!(
            (checksum, length),
            (crc32fast::hash(&bytes[..70_000]), 70_000)
        );
    }
}
