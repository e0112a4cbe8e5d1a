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
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ETH: usize = 14;

    /// A TCP frame of `payload` bytes with the pseudo header's sum in place, as a driver leaves it.
    fn tcp(v4: bool, payload: usize, gso_size: u16) -> Vec<u8> {
        let ip_len = if v4 { 20 } else { 40 };
        let mut bytes = vec![0u8; ETH + ip_len + 20 + payload];
        let ethertype: u16 = if v4 { 0x0800 } else { 0x86dd };
        bytes[12..14].copy_from_slice(&ethertype.to_be_bytes());
        let l4_len = (20 + payload) as u16;
        if v4 {
            bytes[ETH] = 0x45;
            bytes[ETH + 2..ETH + 4].copy_from_slice(&(l4_len + 20).to_be_bytes());
            bytes[ETH + 4..ETH + 6].copy_from_slice(&7u16.to_be_bytes());
            bytes[ETH + 9] = 6;
            bytes[ETH + 12..ETH + 20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        } else {
            bytes[ETH] = 0x60;
            bytes[ETH + 4..ETH + 6].copy_from_slice(&l4_len.to_be_bytes());
            bytes[ETH + 6] = 6;
            for (i, byte) in bytes[ETH + 8..ETH + 40].iter_mut().enumerate() {
                *byte = i as u8;
            }
        }
        let tcp = ETH + ip_len;
        bytes[tcp + 4..tcp + 8].copy_from_slice(&0xffff_fff0u32.to_be_bytes());
        bytes[tcp + 12] = 0x50;
        bytes[tcp + 13] = TCP_CWR | 0x10 | TCP_FIN_PSH;
        for i in 0..payload {
            bytes[tcp + 20 + i] = (i * 7) as u8;
        }
        let header = Header {
            flags: NEEDS_CSUM,
            gso_type: match (gso_size, v4) {
                (0, _) => GSO_NONE,
                (_, true) => GSO_TCPV4,
                (_, false) => GSO_TCPV6,
            },
            gso_size: U16::new(gso_size),
            csum_start: U16::new(tcp as u16),
            csum_offset: U16::new(16),
            ..Header::default()
        };
        let range = if v4 {
            ETH + 12..ETH + 20
        } else {
            ETH + 8..ETH + 40
        };
        let pseudo = add(6 + u64::from(l4_len), &bytes[range]);
        bytes[tcp + 16..tcp + 18].copy_from_slice(&(!fold(pseudo)).to_be_bytes());
        let mut frame = header.as_bytes().to_vec();
        frame.extend(bytes);
        frame
    }

    /// A receiver's check of both checksums; the payload and its sequence number.
    fn check(v4: bool, frame: &[u8]) -> (u32, Vec<u8>) {
        assert_eq!(frame[..HEADER_LEN], [0; HEADER_LEN]);
        let bytes = &frame[HEADER_LEN..];
        let ip_len = if v4 { 20 } else { 40 };
        let tcp = ETH + ip_len;
        let len = (bytes.len() - tcp) as u64;
        if v4 {
            assert_eq!(fold(add(0, &bytes[ETH..tcp])), 0, "IP checksum");
            assert_eq!(
                usize::from(be16(bytes, ETH + 2).unwrap()),
                bytes.len() - ETH
            );
        } else {
            assert_eq!(u64::from(be16(bytes, ETH + 4).unwrap()), len);
        }
        let range = if v4 {
            ETH + 12..ETH + 20
        } else {
            ETH + 8..ETH + 40
        };
        let sum = add(add(6 + len, &bytes[range]), &bytes[tcp..]);
        assert_eq!(fold(sum), 0, "TCP checksum");
        let sequence = u32::from_be_bytes(bytes[tcp + 4..tcp + 8].try_into().unwrap());
        (sequence, bytes[tcp + 20..].to_vec())
    }

    #[test]
    fn segments_carry_the_whole_payload_in_order() {
        for v4 in [true, false] {
            let frame = tcp(v4, 4000, 1448);
            let payload = frame[frame.len() - 4000..].to_vec();
            let segments: Vec<_> = adapt(frame, GUEST_CSUM).collect();
            assert_eq!(segments.len(), 3);
            let mut all = Vec::new();
            for segment in &segments {
                let (sequence, piece) = check(v4, segment);
                assert_eq!(sequence, 0xffff_fff0u32.wrapping_add(all.len() as u32));
                all.extend(piece);
            }
            assert_eq!(all, payload);
            let flags = |i: usize| {
                let tcp = HEADER_LEN + ETH + if v4 { 20 } else { 40 };
                segments[i][tcp + 13]
            };
            assert_eq!(flags(0), TCP_CWR | 0x10, "only the first has CWR");
            assert_eq!(flags(1), 0x10);
            assert_eq!(
                flags(2),
                0x10 | TCP_FIN_PSH,
                "only the last has FIN and PSH"
            );
        }
    }

    #[test]
    fn a_missing_checksum_is_completed() {
        let frame = tcp(true, 99, 0);
        let done = adapt(frame, 0).next().unwrap();
        // The test's own IP header has no checksum, which is not the device's to complete.
        let bytes = &done[HEADER_LEN..];
        let sum = add(add(6 + 119, &bytes[ETH + 12..ETH + 20]), &bytes[ETH + 20..]);
        assert_eq!(fold(sum), 0);
        assert_eq!(done[..HEADER_LEN], [0; HEADER_LEN]);
    }

    #[test]
    fn a_frame_that_fits_passes_as_it_is() {
        let frame = tcp(true, 4000, 1448);
        assert_eq!(adapt(frame.clone(), ALL).collect::<Vec<_>>(), [frame]);
    }

    #[test]
    fn headers_that_make_no_sense_are_not_admitted() {
        type Spoil = fn(&mut Header);
        let cases: &[(&str, u64, Spoil, bool)] = &[
            ("as the driver made it", ALL, |_| {}, true),
            (
                "sum beyond the frame",
                ALL,
                |h| h.csum_start = U16::new(4073),
                false,
            ),
            (
                "sum far beyond the frame",
                ALL,
                |h| h.csum_offset = U16::MAX_VALUE,
                false,
            ),
            (
                "segments of nothing",
                ALL,
                |h| h.gso_size = U16::new(0),
                false,
            ),
            ("unknown segmentation", ALL, |h| h.gso_type = 3, false),
            (
                "ECN of no segmentation",
                ALL,
                |h| h.gso_type = GSO_ECN,
                false,
            ),
            ("segmentation without a sum", ALL, |h| h.flags = 0, false),
            ("segmentation not accepted", CSUM | HOST_TSO6, |_| {}, false),
            (
                "ECN not accepted",
                CSUM | HOST_TSO4,
                |h| h.gso_type |= GSO_ECN,
                false,
            ),
            (
                "header longer than the frame",
                ALL,
                |h| h.hdr_len = U16::MAX_VALUE,
                false,
            ),
            ("nothing accepted: ignored", 0, |_| {}, true),
        ];
        for (name, features, spoil, admitted) in cases {
            let mut frame = tcp(true, 4000, 1448);
            spoil(split(&mut frame).unwrap().0);
            assert_eq!(admit(&mut frame, *features), *admitted, "{name}");
        }
    }

    #[test]
    fn what_is_no_tcp_or_would_multiply_is_not_admitted_for_segmentation() {
        type Spoil = fn(&mut Vec<u8>);
        const IP: usize = HEADER_LEN + ETH;
        let cases: &[(&str, bool, Spoil, bool)] = &[
            ("as it is", true, |_| {}, true),
            ("as it is, IPv6", false, |_| {}, true),
            (
                "checksum far behind the IP header",
                true,
                |f| {
                    f[6..8].copy_from_slice(&32_000u16.to_le_bytes());
                    f[HEADER_LEN + 32_000 + 12] = 0x50;
                },
                false,
            ),
            ("IP header longer than said", true, |f| f[IP] = 0x46, false),
            ("IP header too short", true, |f| f[IP] = 0x44, false),
            ("not TCP", true, |f| f[IP + 9] = 17, false),
            ("a fragment", true, |f| f[IP + 6] = 0x20, false),
            ("not TCP, IPv6", false, |f| f[IP + 6] = 17, false),
            ("extensions missing", false, |f| f[IP + 6] = 60, false),
            (
                "an extension",
                false,
                |f| {
                    f[IP + 6] = 60;
                    f.splice(IP + 40..IP + 40, [6, 0, 1, 4, 0, 0, 0, 0]);
                    f[6] += 8;
                },
                true,
            ),
            (
                "an extension without end",
                false,
                |f| {
                    f[IP + 6] = 60;
                    let mut long = vec![0; 2048];
                    long[..2].copy_from_slice(&[6, 255]);
                    f.splice(IP + 40..IP + 40, long);
                    let start = (ETH + 40 + 2048) as u16;
                    f[6..8].copy_from_slice(&start.to_le_bytes());
                },
                false,
            ),
            (
                "a VLAN tag",
                true,
                |f| {
                    f.splice(HEADER_LEN + 12..HEADER_LEN + 12, [0x81, 0, 0, 5]);
                    f[6] += 4;
                },
                true,
            ),
            (
                "segments of one byte",
                true,
                |f| f[4..6].copy_from_slice(&[1, 0]),
                false,
            ),
            (
                "segments of 27 bytes",
                true,
                |f| f[4..6].copy_from_slice(&[27, 0]),
                false,
            ),
            (
                "segments of 28 bytes",
                true,
                |f| f[4..6].copy_from_slice(&[28, 0]),
                true,
            ),
            (
                "a few segments of one byte",
                true,
                |f| {
                    f[4..6].copy_from_slice(&[1, 0]);
                    f.truncate(IP + 40 + 64);
                },
                true,
            ),
        ];
        for (name, v4, spoil, admitted) in cases {
            let mut frame = tcp(*v4, 60_000, 1448);
            spoil(&mut frame);
            assert_eq!(admit(&mut frame, ALL), *admitted, "{name}");
        }
    }

    #[test]
    fn a_driver_without_offloads_has_its_header_cleared() {
        let mut frame = tcp(true, 100, 50);
        assert!(admit(&mut frame, 0));
        assert_eq!(frame[..HEADER_LEN], [0; HEADER_LEN]);
    }

    #[test]
    fn the_kernel_is_told_what_the_driver_accepted() {
        assert_eq!(tun_flags(GUEST_TSO4), 0);
        assert_eq!(tun_flags(GUEST_CSUM | GUEST_ECN), 1);
        assert_eq!(tun_flags(ALL), 15);
    }

    proptest! {
        /// Whatever a driver sends, admitting and adapting end in frames that any driver takes.
        #[test]
        fn any_bytes_become_plain_frames_or_none(
            mut frame in prop::collection::vec(any::<u8>(), 0..300),
            shape in any::<bool>(),
            features in any::<u64>(),
        ) {
            if shape {
                // Steer some cases past the first checks.
                frame.resize(300, 0);
                frame[0] = NEEDS_CSUM;
                frame[1] &= 0x85;
                frame[7] = 0;
                frame[8..10].copy_from_slice(&[16, 0]);
                frame[HEADER_LEN + ETH] &= 0x6f;
            }
            if admit(&mut frame, features) {
                for frame in adapt(frame, 0) {
                    prop_assert!(frame.len() >= HEADER_LEN);
                    prop_assert_eq!(&frame[..HEADER_LEN], &[0; HEADER_LEN]);
                }
            }
        }

        /// Whatever the headers say, what comes out is no large multiple of what went in.
        #[test]
        fn segments_are_bounded_by_the_frame(
            v4 in any::<bool>(),
            payload in 1usize..60_000,
            gso_size in prop_oneof![0u16..64, any::<u16>()],
            csum_start in prop::option::of(any::<u16>()),
            ihl in prop::option::of(0u8..16),
            data_offset in prop::option::of(0u8..16),
            extension in prop::option::of(any::<u8>()),
        ) {
            let mut frame = tcp(v4, payload, gso_size);
            let ip = HEADER_LEN + ETH;
            let mut l4 = if v4 { 20 } else { 40 };
            if let Some(ihl) = ihl.filter(|_| v4) {
                frame[ip] = 0x40 | ihl;
                l4 = usize::from(ihl) * 4;
            }
            if let Some(units) = extension.filter(|_| !v4) {
                frame[ip + 6] = 60;
                let mut header = vec![0; (usize::from(units) + 1) * 8];
                header[..2].copy_from_slice(&[6, units]);
                l4 += header.len();
                frame.splice(ip + 40..ip + 40, header);
            }
            let start = csum_start.unwrap_or((ETH + l4) as u16);
            frame[6..8].copy_from_slice(&start.to_le_bytes());
            if let Some(words) = data_offset
                && let Some(byte) = frame.get_mut(HEADER_LEN + usize::from(start) + 12)
            {
                *byte = words << 4;
            }
            let input = frame.len();
            if admit(&mut frame, ALL) {
                let output: usize = adapt(frame, 0).map(|f| f.len()).sum();
                prop_assert!(output <= (8 * input).max(input + 64 * 192), "{} of {}", output, input);
            }
        }
    }
}
