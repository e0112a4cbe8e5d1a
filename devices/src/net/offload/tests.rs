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
