use proptest::prelude::*;

use super::*;
use crate::testing::{RecordingSink, SinkEvent::*};

const ON: Control = Control {
    enabled: true,
    function_mask: false,
};
const FUNCTION_MASKED: Control = Control {
    enabled: true,
    function_mask: true,
};
const OFF: Control = Control {
    enabled: false,
    function_mask: false,
};

fn msix(vectors: u16) -> (Msix, Arc<RecordingSink>) {
    let sink = Arc::new(RecordingSink::default());
    let msix = Msix::new(VectorCount::new(vectors).unwrap(), Arc::clone(&sink) as _);
    (msix, sink)
}

fn message(n: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data: n,
    }
}

/// Writes to the table, as a function that may send messages.
fn write(msix: &Msix, offset: u64, data: &[u8]) {
    if msix.write_table(offset, data) {
        msix.deliver_pending();
    }
}

/// Writes Message Control, as a function that may send messages.
fn set_control(msix: &Msix, control: Control) {
    if msix.set_control(control) {
        msix.deliver_pending();
    }
}

/// Programs `vector` with `message(data)` and unmasks it.
fn program(msix: &Msix, vector: u16, data: u32) {
    let at = u64::from(vector) * ENTRY_SIZE;
    write(msix, at, &0xfee0_0000u64.to_le_bytes());
    write(msix, at + 8, &data.to_le_bytes());
    set_mask(msix, vector, false);
}

fn set_mask(msix: &Msix, vector: u16, masked: bool) {
    let at = u64::from(vector) * ENTRY_SIZE + 12;
    write(msix, at, &u32::from(masked).to_le_bytes());
}

fn pba(msix: &Msix) -> u64 {
    let mut bits = [0; 8];
    msix.read_pba(0, &mut bits);
    u64::from_le_bytes(bits)
}

#[test]
fn a_live_vector_is_delivered_at_once_and_is_not_pending() {
    let (msix, sink) = msix(2);
    program(&msix, 1, 42);
    set_control(&msix, ON);
    msix.signal(1);
    let route = Some(message(42));
    assert_eq!(sink.take(), [Route(1, route), Fire(1, route)]);
    assert_eq!(pba(&msix), 0);
}

#[test]
fn a_masked_vector_is_pending_and_delivered_once_at_unmask() {
    let (msix, sink) = msix(2);
    program(&msix, 0, 7);
    set_control(&msix, ON);
    set_mask(&msix, 0, true);
    sink.take();
    (0..3).for_each(|_| msix.signal(0));
    assert_eq!(pba(&msix), 1);
    assert_eq!(sink.take(), []);
    set_mask(&msix, 0, false);
    assert_eq!(
        sink.take(),
        [Route(0, Some(message(7))), Fire(0, Some(message(7)))]
    );
    assert_eq!(pba(&msix), 0);
    set_mask(&msix, 0, true);
    set_mask(&msix, 0, false);
    assert_eq!(sink.delivered(), []);
}

#[test]
fn the_function_mask_holds_every_vector() {
    let (msix, sink) = msix(65);
    for v in [0, 1, 64] {
        program(&msix, v, v.into());
    }
    set_control(&msix, FUNCTION_MASKED);
    for v in [0, 64] {
        msix.signal(v);
    }
    let mut bits = [0; 16];
    msix.read_pba(0, &mut bits);
    assert_eq!(u128::from_le_bytes(bits), 1 | 1 << 64);
    assert_eq!(sink.take(), []);
    set_control(&msix, ON);
    assert_eq!(sink.delivered(), [message(0), message(64)]);
}

#[test]
fn signals_while_disabled_are_dropped() {
    let (msix, sink) = msix(1);
    program(&msix, 0, 1);
    msix.signal(0);
    set_control(&msix, FUNCTION_MASKED);
    msix.signal(0);
    set_control(&msix, OFF);
    set_control(&msix, ON);
    assert_eq!(sink.delivered(), []);
    msix.signal(1);
    msix.signal(u16::MAX);
    assert_eq!(sink.take(), []);
}

#[test]
fn the_route_follows_the_table_and_goes_away_with_the_mask() {
    let (msix, sink) = msix(1);
    set_control(&msix, ON);
    program(&msix, 0, 1);
    write(&msix, 8, &2u32.to_le_bytes());
    set_mask(&msix, 0, true);
    write(&msix, 8, &3u32.to_le_bytes());
    set_mask(&msix, 0, false);
    set_control(&msix, OFF);
    let events = [
        Route(0, Some(message(1))),
        Route(0, Some(message(2))),
        Route(0, None),
        Route(0, Some(message(3))),
        Route(0, None),
    ];
    assert_eq!(sink.take(), events);
}

#[test]
fn table_entries_read_back_and_reserved_bits_read_zero() {
    let (msix, _) = msix(1);
    write(&msix, 0, &[0xff; 8]);
    write(&msix, 8, &[0xff; 8]);
    let mut entry = [0; 16];
    msix.read_table(0, &mut entry);
    let expected = [[0xfc, 0xff, 0xff, 0xff], [0xff; 4], [0xff; 4], [1, 0, 0, 0]];
    assert_eq!(entry, expected.concat()[..]);
    let mut middle = [0; 3];
    msix.read_table(11, &mut middle);
    assert_eq!(middle, [0xff, 1, 0]);
}

#[test]
fn odd_writes_are_ignored_and_reads_past_the_end_are_zero() {
    let (msix, _) = msix(1);
    for (at, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (12, 8), (0, 3), (16, 4)] {
        write(&msix, at, &[0xff; 16][..len]);
    }
    write(&msix, u64::MAX - 3, &[0xff; 4]);
    let mut table = [0xcc; 24];
    msix.read_table(0, &mut table);
    assert_eq!(table[..12], [0; 12]);
    assert_eq!(table[12..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut far = [0xcc; 8];
    msix.read_pba(u64::MAX - 3, &mut far);
    assert_eq!(far, [0; 8]);
}

/// Requirements: S1-14, S3-8, E10
#[test]
fn s3_8_a_message_of_a_function_that_may_send_none_stays_pending() {
    let (from, sink) = msix(2);
    program(&from, 0, 7);
    set_control(&from, ON);
    set_mask(&from, 0, true);
    from.signal(0);
    assert!(from.write_table(12, &0u32.to_le_bytes()), "owed");
    assert_eq!((sink.delivered(), pba(&from)), (vec![], 1));
    let (to, copied) = msix(2);
    to.restore(&from.save()).unwrap();
    to.deliver_pending();
    assert_eq!(copied.delivered(), [message(7)]);
    from.deliver_pending();
    from.deliver_pending();
    assert_eq!((sink.delivered(), pba(&from)), (vec![message(7)], 0));
}

#[test]
fn reset_masks_and_forgets() {
    let (msix, sink) = msix(1);
    program(&msix, 0, 1);
    set_control(&msix, FUNCTION_MASKED);
    msix.signal(0);
    msix.reset();
    assert_eq!(
        msix.save(),
        Msix::new(VectorCount(1), Arc::new(RecordingSink::default())).save()
    );
    set_control(&msix, ON);
    assert_eq!(sink.delivered(), []);
}

#[test]
fn saved_state_restores_routes_and_pending_bits() {
    let (from, _) = msix(3);
    for v in [0, 1, 2] {
        program(&from, v, v.into());
    }
    set_control(&from, ON);
    set_mask(&from, 1, true);
    from.signal(1);
    let saved = from.save();
    let (to, sink) = msix(3);
    to.restore(&saved).unwrap();
    assert_eq!(to.save(), saved);
    let routes = [Route(0, Some(message(0))), Route(2, Some(message(2)))];
    assert_eq!(sink.take(), routes);
    set_mask(&to, 1, false);
    assert_eq!(sink.delivered(), [message(1)]);
}

#[test]
fn impossible_state_is_refused_and_changes_nothing() {
    use state::MsixStateError::*;
    let (msix, sink) = msix(2);
    let good = msix.save();
    let mut short = good.clone();
    short.entries.pop();
    let mut odd = good.clone();
    odd.entries[1].address = 2;
    let mut off = good.clone();
    off.pending = vec![0];
    let mut absent = good.clone();
    absent.control = ON;
    absent.pending = vec![2];
    let mut twice = good.clone();
    twice.control = ON;
    twice.pending = vec![1, 1];
    let cases = [
        (short, Count { saved: 1, own: 2 }),
        (twice, Order(1)),
        (
            odd,
            Address {
                vector: 1,
                address: 2,
            },
        ),
        (off, Pending(0)),
        (absent, Pending(2)),
    ];
    for (state, error) in cases {
        assert_eq!(msix.restore(&state), Err(error));
    }
    assert_eq!((msix.save(), sink.take()), (good, vec![]));
}

#[test]
fn no_signal_is_lost_or_doubled_while_another_thread_masks() {
    let (msix, sink) = msix(1);
    program(&msix, 0, 9);
    set_control(&msix, ON);
    sink.take();
    std::thread::scope(|threads| {
        threads.spawn(|| {
            for _ in 0..200 {
                set_mask(&msix, 0, true);
                set_mask(&msix, 0, false);
            }
        });
        threads.spawn(|| (0..1000).for_each(|_| msix.signal(0)));
    });
    // Signals that met a mask merge, so there may be fewer deliveries than signals, but the last one arrives.
    let events = sink.take();
    let fired = events.iter().filter(|e| matches!(e, Fire(..))).count();
    assert!((1..=1000).contains(&fired));
    assert!(!events.contains(&Fire(0, None)));
    assert_eq!(pba(&msix), 0);
}

#[derive(Clone, Debug)]
enum Step {
    Signal(u16),
    Write(u64, Vec<u8>),
    Control(Control),
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u16..6).prop_map(Step::Signal),
        (0u64..80, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(a, d)| Step::Write(a, d)),
        (0u64..20, any::<u32>()).prop_map(|(a, v)| Step::Write(a * 4, v.to_le_bytes().to_vec())),
        (any::<bool>(), any::<bool>()).prop_map(|(enabled, function_mask)| Step::Control(
            Control {
                enabled,
                function_mask
            }
        )),
        Just(Step::Reset),
    ]
}

proptest! {
    /// After any history: a vector has a route exactly while it is live, with the message in the table; nothing was
    /// fired without a route; and only masked vectors of an enabled function are pending.
    #[test]
    fn routes_and_pending_bits_agree_with_the_table(steps in prop::collection::vec(step(), 0..80)) {
        let (msix, sink) = msix(5);
        for step in steps {
            match step {
                Step::Signal(vector) => msix.signal(vector),
                Step::Write(at, data) => write(&msix, at, &data),
                Step::Control(control) => set_control(&msix, control),
                Step::Reset => msix.reset(),
            }
        }
        let state = msix.save();
        let routes = sink.state.lock().unwrap().0.clone();
        for (vector, entry) in state.entries.iter().enumerate() {
            let live = state.control.enabled && !state.control.function_mask && !entry.masked;
            let route = routes.get(vector).copied().flatten();
            prop_assert_eq!(route, live.then(|| entry.message()));
            let pending = state.pending.contains(&(vector as u16));
            prop_assert!(!pending || state.control.enabled && !live);
        }
        let unrouted = sink.take().into_iter().filter(|e| matches!(e, Fire(_, None))).count();
        prop_assert_eq!(unrouted, 0);
    }
}
