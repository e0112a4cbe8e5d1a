//! Checksum and segmentation offload: the `virtio_net_hdr`, and doing in software what a receiver did not accept.
//!
//! A driver may leave the checksum of a frame, and its division into segments, to the device; the device may leave
//! them to the receiving driver, if that accepted so. Between two functions that both did, neither is ever done.

use std::ops::Range;

use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::link::HEADER_LEN;

/// The driver may leave checksums to the device.
const CSUM: u64 = 1 << 0;
/// The driver takes frames without a checksum.
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;

/// All offloads the links carry.
pub const ALL: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | HOST_TSO4 | HOST_TSO6 | HOST_ECN;

const NEEDS_CSUM: u8 = 1;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// The header in front of every frame (virtio 1.4, "struct virtio_net_hdr").
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Header {
    pub flags: u8,
    pub gso_type: u8,
    pub hdr_len: U16,
    pub gso_size: U16,
    pub csum_start: U16,
    pub csum_offset: U16,
    pub num_buffers: U16,
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN);

/// Splits a frame into its header and the bytes of the wire.
fn split(frame: &mut [u8]) -> Option<(&mut Header, &mut [u8])> {
    Header::mut_from_prefix(frame).ok()
}

/// True if a driver with `features` takes frames without a checksum.
pub fn accepts_checksum(features: u64) -> bool {
    features & GUEST_CSUM != 0
}

/// The argument of TUNSETOFFLOAD for a driver with `features`.
pub fn tun_flags(features: u64) -> u32 {
    // Segments without a checksum offload make no sense, to the kernel either.
    if !accepts_checksum(features) {
        return 0;
    }
    [
        (GUEST_CSUM, libc::TUN_F_CSUM),
        (GUEST_TSO4, libc::TUN_F_TSO4),
        (GUEST_TSO6, libc::TUN_F_TSO6),
        (GUEST_ECN, libc::TUN_F_TSO_ECN),
    ]
    .into_iter()
    .filter(|(feature, _)| features & feature != 0)
    .filter(|(feature, _)| *feature != GUEST_ECN || features & (GUEST_TSO4 | GUEST_TSO6) != 0)
    .fold(0, |flags, (_, flag)| flags | flag)
}

/// Checks the header of a frame from a driver with `features`, and removes from it what says nothing to a receiver.
/// False if it makes no sense.
pub fn admit(frame: &mut [u8], features: u64) -> bool {
    let Some((header, bytes)) = split(frame) else {
        return false;
    };
    header.num_buffers = U16::new(0);
    if features & CSUM == 0 || header.flags & NEEDS_CSUM == 0 {
        let plain = features & CSUM == 0 || header.gso_type == GSO_NONE;
        *header = Header::default();
        return plain;
    }
    header.flags = NEEDS_CSUM;
    let field_end =
        usize::from(header.csum_start.get()) + usize::from(header.csum_offset.get()) + 2;
    if field_end > bytes.len() {
        return false;
    }
    let needed = match header.gso_type & !GSO_ECN {
        GSO_NONE if header.gso_type == GSO_NONE => {
            header.gso_size = U16::new(0);
            header.hdr_len = U16::new(0);
            return true;
        }
        GSO_TCPV4 => HOST_TSO4,
        GSO_TCPV6 => HOST_TSO6,
        _ => return false,
    };
    let ecn = if header.gso_type & GSO_ECN != 0 {
        HOST_ECN
    } else {
        0
    };
    features & (needed | ecn) == needed | ecn
        && usize::from(header.hdr_len.get()) <= bytes.len()
        && Tcp::locate(header, bytes).is_some()
}

/// True if a driver with `features` takes the admitted `frame` as it is.
pub fn fits(frame: &[u8], features: u64) -> bool {
    let Ok((header, _)) = Header::read_from_prefix(frame) else {
        return true;
    };
    header.flags & NEEDS_CSUM == 0
        || accepts_checksum(features) && missing_segmentation(&header, features) == 0
}

fn missing_segmentation(header: &Header, features: u64) -> u64 {
    let kind = match header.gso_type & !GSO_ECN {
        GSO_NONE => 0,
        GSO_TCPV4 => GUEST_TSO4,
        _ => GUEST_TSO6,
    };
    let ecn = if header.gso_type & GSO_ECN != 0 {
        GUEST_ECN
    } else {
        0
    };
    (kind | ecn) & !features
}

/// What an admitted frame was turned into. Segments are made as they are taken, so that a frame never takes much more
/// memory than it has itself.
#[derive(Default)]
pub enum Adapted {
    /// Nothing is left.
    #[default]
    Done,
    One(Vec<u8>),
    Many(Segments),
}

impl Iterator for Adapted {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        if let Self::Many(segments) = self {
            return segments.next();
        }
        match std::mem::take(self) {
            Self::One(frame) => Some(frame),
            _ => None,
        }
    }
}

/// Turns an admitted frame into frames that any driver with `features` takes. None at all if it is not what its
/// header says.
pub fn adapt(mut frame: Vec<u8>, features: u64) -> Adapted {
    if fits(&frame, features) {
        return Adapted::One(frame);
    }
    let Some((header, bytes)) = split(&mut frame) else {
        return Adapted::Done;
    };
    if header.gso_type != GSO_NONE {
        return match Tcp::locate(header, bytes) {
            Some(at) => Adapted::Many(Segments { frame, at, next: 0 }),
            None => Adapted::Done,
        };
    }
    let start = usize::from(header.csum_start.get());
    let field = start + usize::from(header.csum_offset.get());
    *header = Header::default();
    match finish_checksum(bytes, start, field) {
        Some(()) => Adapted::One(frame),
        None => Adapted::Done,
    }
}

/// Sums `bytes` as the Internet checksum does (RFC 1071), on top of `sum`.
fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut pairs = bytes.chunks_exact(2);
    let mut sum = sum;
    for pair in &mut pairs {
        if let [high, low] = pair {
            sum += u64::from(u16::from_be_bytes([*high, *low]));
        }
    }
    match pairs.remainder() {
        [last] => sum + (u64::from(*last) << 8),
        _ => sum,
    }
}

/// The checksum of a sum.
fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Completes the checksum at `field` over `start..`; the field holds the sum of the pseudo header.
fn finish_checksum(bytes: &mut [u8], start: usize, field: usize) -> Option<()> {
    let sum = fold(add(0, bytes.get(start..)?));
    // To UDP, 0 means "no checksum"; both forms mean the same to the others.
    let sum = if sum == 0 { 0xffff } else { sum };
    put(bytes, field, &sum.to_be_bytes())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    bytes.get_mut(at..at + value.len())?.copy_from_slice(value);
    Some(())
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at + 2)?
        .try_into()
        .ok()
        .map(u16::from_be_bytes)
}

/// Where the headers of a TCP frame are, and how it is to be divided.
struct Tcp {
    ip: usize,
    tcp: usize,
    payload: usize,
    v4: bool,
    /// Source and destination address.
    addresses: Range<usize>,
    /// Payload of each segment but the last.
    size: usize,
    segments: usize,
}

const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8;
const PROTOCOL_TCP: u8 = 6;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
const TCP_CWR: u8 = 0x80;

/// The longest headers of a TCP frame, all of which each segment repeats: two VLAN tags, IPv6 with 58 bytes of
/// extensions, TCP with all options.
const MAX_HEADERS: usize = 180;
/// The least payload of a segment: what fits the smallest MTU of IPv4, 68 (RFC 791).
const MIN_SIZE: usize = 28;
/// So few segments may be smaller: receive offloads merge what peers sent in smaller pieces.
const FEW_SEGMENTS: usize = 64;

impl Tcp {
    /// None for what is no TCP in the IP the header says, or whose segments would be many times as long as the frame:
    /// all of them together have at most 8 times its length, or 12 KiB more than it.
    fn locate(header: &Header, bytes: &[u8]) -> Option<Self> {
        let mut ip = 14;
        for _ in 0..2 {
            if matches!(
                be16(bytes, ip - 2)?,
                ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN
            ) {
                ip += 4;
            }
        }
        let v4 = header.gso_type & !GSO_ECN == GSO_TCPV4;
        let tcp = if v4 {
            behind_ipv4(bytes, ip)?
        } else {
            behind_ipv6(bytes, ip)?
        };
        let payload = tcp + usize::from(bytes.get(tcp + 12)? >> 4) * 4;
        let longest = if v4 { 0xffff } else { 40 + 0xffff };
        let consistent = tcp == usize::from(header.csum_start.get())
            && header.csum_offset.get() == 16
            && payload >= tcp + 20
            && payload <= MAX_HEADERS
            && payload < bytes.len()
            && bytes.len() - ip <= longest;
        let size = usize::from(header.gso_size.get());
        if !consistent || size == 0 {
            return None;
        }
        let segments = (bytes.len() - payload).div_ceil(size);
        (size >= MIN_SIZE || segments <= FEW_SEGMENTS).then_some(Self {
            ip,
            tcp,
            payload,
            v4,
            addresses: if v4 {
                ip + 12..ip + 20
            } else {
                ip + 8..ip + 40
            },
            size,
            segments,
        })
    }
}

/// Where TCP starts behind the IPv4 header at `ip`.
fn behind_ipv4(bytes: &[u8], ip: usize) -> Option<usize> {
    let first = *bytes.get(ip)?;
    let len = usize::from(first & 0xf) * 4;
    let fragment = be16(bytes, ip + 6)? & 0x3fff != 0;
    let is_tcp = first >> 4 == 4 && len >= 20 && !fragment && *bytes.get(ip + 9)? == PROTOCOL_TCP;
    is_tcp.then_some(ip + len)
}

/// Where TCP starts behind the IPv6 header at `ip` and its extensions.
fn behind_ipv6(bytes: &[u8], ip: usize) -> Option<usize> {
    if bytes.get(ip)? >> 4 != 6 {
        return None;
    }
    let mut next = *bytes.get(ip + 6)?;
    let mut at = ip + 40;
    while at < MAX_HEADERS {
        match next {
            PROTOCOL_TCP => return Some(at),
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                next = *bytes.get(at)?;
                at += (usize::from(*bytes.get(at + 1)?) + 1) * 8;
            }
            _ => return None,
        }
    }
    None
}

/// The segments of a TCP frame, with all checksums.
pub struct Segments {
    frame: Vec<u8>,
    at: Tcp,
    next: usize,
}

impl Iterator for Segments {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let i = self.next;
        if i >= self.at.segments {
            // Free it now: whoever holds this may not look again soon.
            self.frame = Vec::new();
            return None;
        }
        self.next += 1;
        segment(self.frame.get(HEADER_LEN..)?, &self.at, i)
    }
}

/// Segment `i` of the TCP frame `bytes`.
fn segment(bytes: &[u8], at: &Tcp, i: usize) -> Option<Vec<u8>> {
    let (headers, payload) = bytes.split_at_checked(at.payload)?;
    let offset = i * at.size;
    let end = payload.len().min(offset + at.size);
    let piece = payload.get(offset..end)?;
    let mut frame = Vec::with_capacity(HEADER_LEN + headers.len() + piece.len());
    frame.resize(HEADER_LEN, 0);
    frame.extend_from_slice(headers);
    frame.extend_from_slice(piece);
    let wire = frame.get_mut(HEADER_LEN..)?;
    let sequence = u32::from_be_bytes(bytes.get(at.tcp + 4..at.tcp + 8)?.try_into().ok()?);
    let sequence = sequence.wrapping_add(offset as u32);
    put(wire, at.tcp + 4, &sequence.to_be_bytes())?;
    let flags = wire.get_mut(at.tcp + 13)?;
    if i != 0 {
        *flags &= !TCP_CWR;
    }
    if i + 1 != at.segments {
        *flags &= !TCP_FIN_PSH;
    }
    if at.v4 {
        let total = (wire.len() - at.ip) as u16;
        put(wire, at.ip + 2, &total.to_be_bytes())?;
        let identification = be16(bytes, at.ip + 4)?.wrapping_add(i as u16);
        put(wire, at.ip + 4, &identification.to_be_bytes())?;
        put(wire, at.ip + 10, &[0; 2])?;
        let sum = fold(add(0, wire.get(at.ip..at.tcp)?));
        put(wire, at.ip + 10, &sum.to_be_bytes())?;
    } else {
        let len = (wire.len() - at.ip - 40) as u16;
        put(wire, at.ip + 4, &len.to_be_bytes())?;
    }
    let len = (wire.len() - at.tcp) as u64;
    put(wire, at.tcp + 16, &[0; 2])?;
    let pseudo = add(
        u64::from(PROTOCOL_TCP) + len,
        wire.get(at.addresses.clone())?,
    );
    let sum = fold(add(pseudo, wire.get(at.tcp..)?));
    put(wire, at.tcp + 16, &sum.to_be_bytes())?;
    Some(frame)
}

#[cfg(test)]
mod tests;
