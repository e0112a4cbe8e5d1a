use super::*;
use crate::testing::{Added, Buf, Driver};
use crate::virtio::feature;
use proptest::prelude::*;
use std::sync::atomic::{
    AtomicBool,
    Ordering::{Acquire, Relaxed},
};
use vm_memory::GuestAddress;

mod control;

const ALL: u64 = !F_MRG_RXBUF;
const PLAIN: u64 = feature::VERSION_1;
const HEADER: usize = HEADER_LEN;
const BROADCAST: MacAddress = MacAddress::new([0xff; 6]);

fn mac(n: u8) -> MacAddress {
    MacAddress::new([2, 0, 0, 0, 0, n])
}

/// A frame of `len` bytes behind an empty header.
fn frame(to: MacAddress, from: MacAddress, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend(to.octets());
    bytes.extend(from.octets());
    bytes.extend([0x08, 0x00]);
    bytes.extend((0..len - 14).map(|i| i as u8));
    bytes
}

fn port(switch: &Switch, n: u8, check_source: bool) -> SwitchPort {
    let config = PortConfig {
        name: format!("port{n}"),
        mac: mac(n),
        check_source,
    };
    switch.port(config).unwrap()
}

/// Drivers on ports 1.. of one switch.
fn drivers(switch: &Switch, n: u8, features: u64) -> Vec<Driver> {
    (1..=n)
        .map(|i| Driver::live(Net::new(mac(i), port(switch, i, false)), features))
        .collect()
}

fn send(driver: &mut Driver, bytes: Vec<u8>) {
    driver.add(TX, &[Buf::Out(bytes)]);
    driver.kick(TX);
    assert_eq!(driver.used(TX).map(|(_, len)| len), Some(0));
}

fn offer(driver: &mut Driver, n: usize, len: usize) -> Vec<Added> {
    (0..n).map(|_| driver.add(RX, &[Buf::In(len)])).collect()
}

/// What came in, as far as buffers were offered: the used bytes of each chain.
fn received(driver: &mut Driver, buffers: &[Added]) -> Vec<Vec<u8>> {
    driver.turn();
    let mut frames = Vec::new();
    while let Some((head, len)) = driver.used(RX) {
        let buffer = buffers.iter().find(|b| b.head == head).unwrap();
        let mut bytes = driver.written(buffer);
        bytes.truncate(len as usize);
        frames.push(bytes);
    }
    frames
}

/// `frame` as it arrives in `n` chains.
fn arrives(mut frame: Vec<u8>, n: u8) -> Vec<u8> {
    frame[10] = n;
    frame
}

#[test]
fn an_unknown_address_floods_and_a_learned_one_does_not() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 3, PLAIN);
    let buffers: Vec<_> = d.iter_mut().map(|d| offer(d, 8, 2000)).collect();
    let seen = |d: &mut Vec<Driver>| -> Vec<usize> {
        let frames = d.iter_mut().zip(&buffers);
        frames.map(|(d, b)| received(d, b).len()).collect()
    };
    // Station 77 lives behind port 1.
    send(&mut d[0], frame(mac(99), mac(77), 60));
    assert_eq!(seen(&mut d), [0, 1, 1], "unknown");
    send(&mut d[1], frame(mac(77), mac(2), 60));
    assert_eq!(seen(&mut d), [1, 0, 0], "learned");
    send(&mut d[1], frame(mac(3), mac(2), 60));
    assert_eq!(
        seen(&mut d),
        [0, 0, 1],
        "a port's own address is known from the start"
    );
    send(&mut d[1], frame(BROADCAST, mac(2), 60));
    assert_eq!(seen(&mut d), [1, 0, 1], "broadcast");
    send(&mut d[0], frame(mac(77), mac(1), 60));
    assert_eq!(seen(&mut d), [0, 0, 0], "no reflection");
    send(&mut d[2], frame(BROADCAST, mac(77), 60));
    assert_eq!(seen(&mut d), [1, 1, 0]);
    send(&mut d[1], frame(mac(77), mac(2), 60));
    assert_eq!(seen(&mut d), [0, 0, 1], "the station moved");
    send(&mut d[2], frame(BROADCAST, mac(1), 60));
    assert_eq!(seen(&mut d), [1, 1, 0]);
    send(&mut d[1], frame(mac(1), mac(2), 60));
    assert_eq!(
        seen(&mut d),
        [1, 0, 0],
        "an address is not taken from its port"
    );
}

#[test]
fn frames_arrive_as_they_were_sent() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN);
    let buffers = offer(&mut d[1], 3, 2000);
    let sent: Vec<_> = [14, 60, 1514].map(|n| frame(mac(2), mac(1), n)).into();
    for bytes in &sent {
        // In odd pieces: the header has no descriptor of its own.
        let (head, tail) = bytes.split_at(5);
        let (middle, tail) = tail.split_at(9);
        let pieces = [head, middle, tail].map(|p| Buf::Out(p.into()));
        d[0].add(TX, &pieces);
    }
    d[0].kick(TX);
    let expected: Vec<_> = sent.into_iter().map(|f| arrives(f, 1)).collect();
    assert_eq!(received(&mut d[1], &buffers), expected);
    let stats = switch.ports()[0].stats;
    assert_eq!((stats.tx_frames, stats.tx_bytes), (3, 14 + 60 + 1514));
    let stats = switch.ports()[1].stats;
    assert_eq!((stats.rx_frames, stats.rx_bytes), (3, 14 + 60 + 1514));
}

#[test]
fn frames_wait_for_buffers() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN);
    for len in [60, 61, 62] {
        send(&mut d[0], frame(mac(2), mac(1), len));
    }
    d[1].turn();
    let buffers = offer(&mut d[1], 2, 100);
    d[1].kick(RX);
    let lens = |frames: Vec<Vec<u8>>| frames.iter().map(|f| f.len() - HEADER).collect::<Vec<_>>();
    assert_eq!(lens(received(&mut d[1], &buffers)), [60, 61]);
    assert_eq!(switch.ports()[1].waiting, 0, "it waits with the device");
    let buffers = offer(&mut d[1], 2, 100);
    assert!(d[1].kick_wanted(RX, false));
    d[1].kick(RX);
    assert_eq!(lens(received(&mut d[1], &buffers)), [62]);
}

#[test]
fn a_frame_longer_than_its_buffer_is_dropped_and_the_buffer_kept() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN);
    let buffers = offer(&mut d[1], 1, HEADER + 60);
    send(&mut d[0], frame(mac(2), mac(1), 61));
    assert!(received(&mut d[1], &buffers).is_empty());
    assert_eq!(switch.ports()[1].stats.rx_oversize, 1);
    send(&mut d[0], frame(mac(2), mac(1), 60));
    assert_eq!(received(&mut d[1], &buffers).len(), 1);
}

#[test]
fn mergeable_buffers_take_a_frame_together_or_not_at_all() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN | F_MRG_RXBUF);
    let sent = frame(mac(2), mac(1), 1000);
    send(&mut d[0], sent.clone());
    let mut buffers = offer(&mut d[1], 2, 400);
    d[1].kick(RX);
    assert!(
        received(&mut d[1], &buffers).is_empty(),
        "800 bytes are not enough"
    );
    buffers.extend(offer(&mut d[1], 1, 400));
    d[1].kick(RX);
    let pieces = received(&mut d[1], &buffers);
    let lens: Vec<_> = pieces.iter().map(Vec::len).collect();
    assert_eq!(lens, [400, 400, HEADER + 1000 - 800]);
    assert_eq!(pieces.concat(), arrives(sent, 3));
}

/// A driver that polls takes what it sees for whole frames.
#[test]
fn mergeable_buffers_of_a_frame_appear_in_the_used_ring_at_once() {
    const BUFFERS: u16 = 16;
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN | F_MRG_RXBUF);
    let whole = usize::from(BUFFERS) * 64 - HEADER;
    let view = d[1].view.clone();
    let index = GuestAddress(d[1].rings[usize::from(RX)].used + 2);
    let done = AtomicBool::new(false);
    let parts = std::thread::scope(|scope| {
        let poll = || {
            let mut parts = 0;
            while !done.load(Relaxed) {
                let used: u16 = view.load(index, Acquire).unwrap();
                parts += u32::from(!used.is_multiple_of(BUFFERS));
            }
            parts
        };
        let poller = scope.spawn(poll);
        for _ in 0..2000 {
            let buffers = offer(&mut d[1], BUFFERS.into(), 64);
            send(&mut d[0], frame(mac(2), mac(1), whole));
            assert_eq!(received(&mut d[1], &buffers).len(), usize::from(BUFFERS));
        }
        done.store(true, Relaxed);
        poller.join().unwrap()
    });
    assert_eq!(parts, 0, "looks that saw a part of a frame");
}

#[test]
fn a_frame_longer_than_a_full_ring_of_mergeable_buffers_is_dropped() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN | F_MRG_RXBUF);
    d[1].status(0);
    d[1].rings[0].size = 4;
    d[1].start(PLAIN | F_MRG_RXBUF);
    let buffers = offer(&mut d[1], 4, 100);
    send(&mut d[0], frame(mac(2), mac(1), 1000));
    send(&mut d[0], frame(mac(2), mac(1), 60));
    let frames = received(&mut d[1], &buffers);
    assert_eq!(frames.len(), 1);
    assert_eq!(frames[0].len(), HEADER + 60);
    assert_eq!(switch.ports()[1].stats.rx_oversize, 1);
}

#[test]
fn what_is_no_frame_is_counted_and_goes_nowhere() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN);
    let buffers = offer(&mut d[1], 8, 2000);
    let group = MacAddress::new([3, 0, 0, 0, 0, 1]);
    let cases = [
        ("nothing", vec![Buf::In(64)]),
        ("half a header", vec![Buf::Out(vec![0; 11])]),
        ("no frame", vec![Buf::Out(vec![0; HEADER])]),
        ("a short one", vec![Buf::Out(vec![0; HEADER + 13])]),
        ("a long one", vec![Buf::Out(vec![0; HEADER + 65_554])]),
        ("from a group", vec![Buf::Out(frame(mac(2), group, 60))]),
    ];
    for (i, (name, bufs)) in cases.iter().enumerate() {
        d[0].request(TX, bufs);
        assert_eq!(switch.ports()[0].stats.tx_malformed, i as u64 + 1, "{name}");
    }
    assert!(received(&mut d[1], &buffers).is_empty());
    assert_eq!(switch.ports()[0].stats.tx_frames, 0);
}

#[test]
fn a_checked_port_sends_from_its_own_address_only() {
    let switch = Switch::new();
    let mut a = Driver::live(Net::new(mac(1), port(&switch, 1, true)), PLAIN);
    let mut b = Driver::live(Net::new(mac(2), port(&switch, 2, false)), PLAIN);
    let buffers = offer(&mut b, 4, 2000);
    send(&mut a, frame(mac(2), mac(9), 60));
    assert!(received(&mut b, &buffers).is_empty());
    assert_eq!(switch.ports()[0].stats.tx_spoofed, 1);
    send(&mut a, frame(mac(2), mac(1), 60));
    assert_eq!(received(&mut b, &buffers).len(), 1);
}

#[test]
fn what_waits_for_a_port_is_bounded_in_frames_and_in_bytes() {
    for (len, n, most) in [(60, 1500, 1024), (60_000, 60, 34)] {
        let switch = Switch::new();
        let mut d = drivers(&switch, 2, PLAIN);
        for _ in 0..n {
            send(&mut d[0], frame(mac(2), mac(1), len));
        }
        let info = switch.ports();
        assert_eq!(info[1].waiting, most);
        assert_eq!(info[1].stats.rx_overflow, (n - most) as u64);
        assert_eq!(info[0].stats.tx_frames, n as u64);
    }
}

#[test]
fn what_waits_for_all_ports_is_bounded_and_each_has_its_share() {
    let switch = Switch::new();
    let mut sender = port(&switch, 1, false);
    let mut receivers: Vec<_> = (2..=200).map(|n| port(&switch, n, false)).collect();
    for receiver in &mut receivers {
        receiver.up(0);
    }
    let total = || {
        let ports = switch.ports();
        ports.iter().map(|p| p.waiting).sum::<usize>() * (HEADER + 60_000)
    };
    let bound = (64 << 20) + 199 * (128 << 10);
    for _ in 0..2 {
        // One that is greedy leaves enough to the others.
        for _ in 0..100 {
            sender.inject(&frame(mac(2), mac(1), 60_000));
        }
        assert_eq!(switch.ports()[1].waiting, 34);
        for _ in 0..100 {
            sender.inject(&frame(BROADCAST, mac(1), 60_000));
        }
        assert!(total() <= bound, "{} bytes wait", total());
        assert!(switch.ports()[1..].iter().all(|p| p.waiting >= 2));
        // What is received, dropped with its driver or with its port makes room again.
        for (i, receiver) in receivers.iter_mut().enumerate() {
            if i % 2 == 0 {
                while receiver.peek().is_some() {
                    receiver.consume();
                }
            } else {
                receiver.down();
                receiver.up(0);
            }
        }
        assert_eq!(total(), 0);
    }
    for _ in 0..100 {
        sender.inject(&frame(BROADCAST, mac(1), 60_000));
    }
    receivers.truncate(1);
    while receivers[0].peek().is_some() {
        receivers[0].consume();
    }
    for _ in 0..100 {
        sender.inject(&frame(BROADCAST, mac(1), 60_000));
    }
    assert_eq!(switch.ports()[1].waiting, 34);
}

#[test]
fn a_look_takes_one_frame_from_the_inbox() {
    let switch = Switch::new();
    let mut sender = port(&switch, 1, false);
    let mut receiver = port(&switch, 2, false);
    receiver.up(0);
    for _ in 0..10 {
        sender.inject(&frame(mac(2), mac(1), 60));
    }
    for _ in 0..3 {
        assert!(receiver.peek().is_some());
        assert_eq!(switch.ports()[1].waiting, 9);
    }
}

#[test]
fn receivers_of_a_flood_have_a_frame_each() {
    let switch = Switch::new();
    let mut sender = port(&switch, 1, false);
    let mut receivers = [2, 3].map(|n| port(&switch, n, false));
    for receiver in &mut receivers {
        receiver.up(0);
    }
    let sent = frame(BROADCAST, mac(1), 60);
    sender.inject(&sent);
    receivers[0].peek().unwrap().fill(0xee);
    assert_eq!(receivers[1].peek().unwrap(), sent);
}

#[test]
fn a_port_without_a_driver_keeps_nothing() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, PLAIN);
    send(&mut d[0], frame(mac(2), mac(1), 60));
    assert!(switch.ports()[1].up);
    assert_eq!(switch.ports()[1].waiting, 1);
    d[1].status(0);
    assert!(!switch.ports()[1].up);
    assert_eq!(switch.ports()[1].waiting, 0);
    send(&mut d[0], frame(mac(2), mac(1), 60));
    assert_eq!(switch.ports()[1].waiting, 0);
    d[1].start(PLAIN);
    let buffers = offer(&mut d[1], 2, 2000);
    d[1].kick(RX);
    assert!(
        received(&mut d[1], &buffers).is_empty(),
        "a frame from before the reset"
    );
}

#[test]
fn a_port_learns_a_bounded_number_of_addresses_at_its_own_cost() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 3, PLAIN);
    send(&mut d[1], frame(BROADCAST, mac(200), 60));
    for i in 0..1000u16 {
        let [high, low] = i.to_be_bytes();
        let source = MacAddress::new([2, 1, 0, 0, high, low]);
        send(&mut d[0], frame(mac(3), source, 60));
    }
    let learned: Vec<_> = switch.ports().iter().map(|p| p.learned).collect();
    assert_eq!(learned, [256, 1, 0]);
}

#[test]
fn an_unplugged_port_is_forgotten_and_its_address_free() {
    let switch = Switch::new();
    let first = port(&switch, 1, false);
    let again = PortConfig {
        name: "again".into(),
        mac: mac(1),
        check_source: false,
    };
    assert!(matches!(switch.port(again.clone()), Err(SwitchError::Duplicate(m)) if m == mac(1)));
    drop(first);
    let second = switch.port(again).unwrap();
    assert_eq!(switch.ports().len(), 1);
    drop(second);
    assert!(switch.ports().is_empty());
}

#[test]
fn a_receiver_is_woken_once_for_a_batch_and_not_while_frames_wait() {
    let switch = Switch::new();
    let mut sender = Driver::live(Net::new(mac(1), port(&switch, 1, false)), PLAIN);
    let receiver = port(&switch, 2, false);
    let event = receiver.shared_event();
    let mut receiver = Driver::live(Net::new(mac(2), receiver), PLAIN);
    for _ in 0..3 {
        sender.add(TX, &[Buf::Out(frame(mac(2), mac(1), 60))]);
    }
    sender.kick(TX);
    assert_eq!(event.read().unwrap(), 1);
    send(&mut sender, frame(mac(2), mac(1), 60));
    assert!(event.read().is_err(), "woken although frames wait");
    let buffers = offer(&mut receiver, 8, 2000);
    assert_eq!(received(&mut receiver, &buffers).len(), 4);
    send(&mut sender, frame(mac(2), mac(1), 60));
    assert_eq!(event.read().unwrap(), 1);
}

#[test]
fn offloaded_frames_pass_between_drivers_that_both_offload() {
    let switch = Switch::new();
    let mut d = drivers(&switch, 2, ALL);
    let mut sent = frame(mac(2), mac(1), 3000);
    // NEEDS_CSUM; the sum at 30, stored at 36.
    sent[0] = 1;
    sent[6] = 30;
    sent[8] = 6;
    let buffers = offer(&mut d[1], 1, 65_562);
    send(&mut d[0], sent.clone());
    assert_eq!(received(&mut d[1], &buffers), [arrives(sent.clone(), 1)]);
    // To one that does not, the sum is completed and the header empty.
    d[1].status(0);
    d[1].start(PLAIN);
    let buffers = offer(&mut d[1], 1, 65_562);
    send(&mut d[0], sent);
    let [plain] = received(&mut d[1], &buffers).try_into().unwrap();
    assert_eq!(plain[..10], [0; 10]);
}

#[test]
fn the_configuration_has_the_address_and_a_link_that_is_up() {
    let switch = Switch::new();
    let driver = Driver::new(Net::new(mac(7), port(&switch, 7, false)));
    let mut config = [0; 8];
    driver.function.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 7, 1, 0]);
    let features = driver.function.device_features(0);
    for bit in [5, 15, 16, 17, 21] {
        assert_ne!(features & 1 << bit, 0, "bit {bit}");
    }
}

#[test]
fn the_queues_are_as_long_as_the_parameters_say() {
    let switch = Switch::new();
    let net = |i| Net::new(mac(i), port(&switch, i, false));
    assert_eq!(net(1).queue_sizes(), [256; 3]);
    let parameters = Parameters { queue_size: 8 };
    let short = net(2).with_parameters(&parameters).unwrap();
    assert_eq!(short.queue_sizes(), [8; 3]);
    for queue_size in [0, 1, 12, 2048] {
        let refused = net(3).with_parameters(&Parameters { queue_size });
        assert_eq!(refused.err().unwrap().field, "queue_size");
    }
}

/// A frame that never ends: its link always has one more.
#[test]
fn a_flood_leaves_the_device_when_its_budget_is_used_up() {
    struct Flood(Vec<u8>, std::sync::Arc<Counters>);
    impl Link for Flood {
        fn event_fd(&self) -> i32 {
            -1
        }
        fn offloads(&self) -> u64 {
            0
        }
        fn up(&mut self, _features: u64) {}
        fn down(&mut self) {}
        fn send(&mut self, _view: &crate::memory::View, _chain: &Chain) {}
        fn flush(&mut self) {}
        fn peek(&mut self) -> Option<&mut [u8]> {
            Some(&mut self.0)
        }
        fn consume(&mut self) {}
        fn counters(&self) -> &std::sync::Arc<Counters> {
            &self.1
        }
    }
    let flood = Flood(frame(mac(1), mac(2), 60), Default::default());
    let mut driver = Driver::live(Net::new(mac(1), flood), PLAIN);
    let buffers = offer(&mut driver, 256, 100);
    driver.kick(RX);
    assert_eq!(received(&mut driver, &buffers).len(), 256);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver sends and offers, each chain comes back at most once, and both devices can be reset.
    #[test]
    fn hostile_chains_come_back_once(
        tx in prop::collection::vec(
            (prop::collection::vec(any::<u8>(), 0..200), 0usize..3, any::<bool>()),
            0..20,
        ),
        rx in prop::collection::vec((0usize..90, 0usize..90), 0..20),
        features in any::<u64>(),
    ) {
        let switch = Switch::new();
        let mut d = drivers(&switch, 2, features | PLAIN);
        let mut offered = Vec::new();
        for (a, b) in rx {
            offered.push(d[1].add(RX, &[Buf::In(a), Buf::In(b)]).head);
        }
        d[1].kick(RX);
        let count = tx.len();
        for (noise, writable, shape) in tx {
            let mut bytes = noise;
            if shape && bytes.len() > HEADER + 14 {
                bytes[0] &= 1;
                bytes[1] &= 0x85;
                bytes[HEADER..HEADER + 6].fill(0xff);
                bytes[HEADER + 6] = 2;
            }
            let mut bufs = vec![Buf::Out(bytes)];
            bufs.extend((0..writable).map(|_| Buf::In(8)));
            d[0].add(TX, &bufs);
        }
        d[0].kick(TX);
        d[1].turn();
        let sent = std::iter::from_fn(|| d[0].used(TX)).count();
        prop_assert_eq!(sent, count);
        let mut heads: Vec<_> = std::iter::from_fn(|| d[1].used(RX)).map(|(head, _)| head).collect();
        heads.sort_unstable();
        let all = heads.len();
        heads.dedup();
        prop_assert_eq!(all, heads.len());
        prop_assert!(heads.iter().all(|head| offered.contains(head)));
        for driver in &d {
            prop_assert_eq!(driver.function.status() & crate::testing::NEEDS_RESET, 0);
            driver.status(0);
            prop_assert_eq!(driver.function.status(), 0);
        }
    }
}
