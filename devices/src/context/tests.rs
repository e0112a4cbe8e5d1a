//! Contexts as bytes: written out by hand, there and back, and broken in every way.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::state::{OwnedBuffer, OwnedChain, OwnedKind, PackedState, RegisterState, SplitState};
use crate::virtio::Position;

mod chunks;
mod fields;
mod refused;

/// Two queues, a configuration of three bytes, and queues that can be stopped one by one.
fn shape() -> Shape {
    Shape {
        queue_sizes: vec![8, 4],
        config_len: 3,
        queue_status: true,
        packed: false,
    }
}

/// A state of that device: queue 0 is stopped and has two chains, queue 1 is not set up.
fn state() -> FunctionState {
    FunctionState {
        offered: 1 << 100 | 1 << 32 | 0x30,
        accepted: 1 << 32 | 0x10,
        registers: RegisterState {
            device_feature_select: 3,
            driver_feature_select: 1,
            config_vector: 0xffff,
            num_queues: 2,
            status: 0x0f,
            config_generation: 7,
            queue_select: 0,
            state_queue_select: 1,
        },
        queues: vec![
            QueueState {
                size: 8,
                vector: 1,
                descriptor_area: 0x1000,
                driver_area: 0x2000,
                device_area: 0x1_0000_3000,
                enabled: true,
                stopped: true,
                restarts: true,
                ring: RingState::Split(SplitState {
                    next_available: 0x0102,
                    next_used: 0x00ff,
                    owned: vec![5, 2],
                }),
            },
            QueueState {
                size: 4,
                vector: 0xffff,
                descriptor_area: 0,
                driver_area: 0,
                device_area: 0,
                enabled: false,
                stopped: false,
                restarts: false,
                ring: RingState::Split(SplitState::default()),
            },
        ],
        config: vec![0xaa, 0xbb, 0xcc],
    }
}

/// The context of that state, from the layout alone.
#[rustfmt::skip]
const GOLDEN: &[&[u8]] = &[
    // field_count
    &[11, 0, 0, 0],
    // DEV_FEATURES, 16 bytes
    &[1, 0, 0, 0, 0, 0, 0, 0], &[16, 0, 0, 0, 0, 0, 0, 0],
    &[0x30, 0, 0, 0, 1, 0, 0, 0], &[0, 0, 0, 0, 0x10, 0, 0, 0],
    // DRV_FEATURES, 16 bytes
    &[5, 0, 0, 0, 0, 0, 0, 0], &[16, 0, 0, 0, 0, 0, 0, 0],
    &[0x10, 0, 0, 0, 1, 0, 0, 0], &[0, 0, 0, 0, 0, 0, 0, 0],
    // PCI_COMMON_CFG, 64 bytes
    &[0, 0, 0, 0, 0, 0, 0, 0], &[64, 0, 0, 0, 0, 0, 0, 0],
    &[3, 0, 0, 0], &[0x10, 0, 0, 0], // device_feature_select, device_feature
    &[1, 0, 0, 0], &[1, 0, 0, 0], // driver_feature_select, driver_feature
    &[0xff, 0xff], &[2, 0], &[0x0f], &[7], // config_msix_vector, num_queues, device_status, config_generation
    &[0, 0], &[8, 0], &[1, 0], &[1, 0], &[0, 0], // queue_select, size, msix_vector, enable, notify_off
    &[0, 0x10, 0, 0, 0, 0, 0, 0], &[0, 0x20, 0, 0, 0, 0, 0, 0], &[0, 0x30, 0, 0, 1, 0, 0, 0], // desc, driver, device
    &[0, 0], &[0, 0], &[0, 0], &[0, 0], // queue_notif_config_data, queue_reset, admin_queue_index, admin_queue_num
    // VQ_CFG, 30 bytes
    &[2, 0, 0, 0, 0, 0, 0, 0], &[30, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0], &[8, 0], &[1, 0],
    &[0, 0x10, 0, 0, 0, 0, 0, 0], &[0, 0x20, 0, 0, 0, 0, 0, 0], &[0, 0x30, 0, 0, 1, 0, 0, 0],
    // VQ_SPLIT_RUNTIME_CFG, 5 bytes
    &[3, 0, 0, 0, 0, 0, 0, 0], &[5, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0], &[2, 1], &[1],
    // VQ_SPLIT_DEV_OWN_DESC, 8 bytes
    &[4, 0, 0, 0, 0, 0, 0, 0], &[8, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0], &[2, 0], &[5, 0], &[2, 0],
    // VQ_STATUS, 8 bytes
    &[8, 0, 0, 0, 0, 0, 0, 0], &[8, 0, 0, 0, 0, 0, 0, 0],
    &[0, 0], &[0], &[1], &[0xff, 0], &[0, 0],
    // VQ_CFG, 30 bytes
    &[2, 0, 0, 0, 0, 0, 0, 0], &[30, 0, 0, 0, 0, 0, 0, 0],
    &[1, 0], &[4, 0], &[0xff, 0xff], &[0; 24],
    // VQ_SPLIT_RUNTIME_CFG, 5 bytes
    &[3, 0, 0, 0, 0, 0, 0, 0], &[5, 0, 0, 0, 0, 0, 0, 0],
    &[1, 0], &[0, 0], &[0],
    // VQ_STATUS, 8 bytes
    &[8, 0, 0, 0, 0, 0, 0, 0], &[8, 0, 0, 0, 0, 0, 0, 0],
    &[1, 0], &[1], &[2], &[0, 0], &[0, 0],
    // DEV_CFG, 3 bytes
    &[0, 0x10, 0, 0, 0, 0, 0, 0], &[3, 0, 0, 0, 0, 0, 0, 0],
    &[0xaa, 0xbb, 0xcc],
];

fn golden() -> Vec<u8> {
    GOLDEN.concat()
}

/// The state in one complete context, in one chunk.
fn decode(context: &[u8], shape: &Shape) -> Result<FunctionState, ContextError> {
    let mut decoder = Decoder::new(shape);
    assert_eq!(decoder.push(context)?, Pushed::Complete, "{context:02x?}");
    assert!(!decoder.is_partial());
    Ok(decoder.take_latest().unwrap())
}

/// Why the decoder of that device refuses these fields.
fn refusal(fields: &[Field]) -> ContextError {
    decode(&assemble(fields), &shape()).unwrap_err()
}

/// The fields of that state, changed.
fn changed(change: impl FnOnce(&mut Vec<Field>)) -> Vec<Field> {
    let mut fields = state_fields(&state(), &shape());
    change(&mut fields);
    fields
}

/// Devices of up to five queues.
fn any_shape() -> impl Strategy<Value = Shape> {
    let sizes = vec((0u32..6).prop_map(|order| 1 << order), 0..6);
    let offers = any::<(bool, bool)>();
    (sizes, 0usize..20, offers).prop_map(|(queue_sizes, config_len, offers)| Shape {
        queue_sizes,
        config_len,
        queue_status: offers.0,
        packed: offers.1,
    })
}

fn any_queue(max_size: u16, shape: &Shape, packed: bool) -> BoxedStrategy<QueueState> {
    let queue_status = shape.queue_status;
    let size = match packed {
        true => (1..=max_size).boxed(),
        false => (0..=max_size.ilog2())
            .prop_map(|order| 1u16 << order)
            .boxed(),
    };
    let ring = size.prop_flat_map(move |size| {
        let ring = match packed {
            true => any_packed(size).prop_map(RingState::Packed).boxed(),
            false => any_split(size).prop_map(RingState::Split).boxed(),
        };
        (Just(size), ring)
    });
    let areas = any::<(u64, u64, u64)>();
    let rest = any::<(u16, bool, bool, bool)>();
    let queue = (ring, areas, rest).prop_map(move |((size, mut ring), areas, rest)| {
        if let (RingState::Split(ring), false) = (&mut ring, queue_status) {
            // Without VQ_STATUS it follows from the rest.
            ring.next_used = match rest.1 {
                true => ring.next_available.wrapping_sub(ring.owned.len() as u16),
                false => 0,
            };
        }
        QueueState {
            size,
            vector: rest.0,
            descriptor_area: areas.0,
            driver_area: areas.1,
            device_area: areas.2,
            enabled: rest.1,
            stopped: rest.2 && queue_status,
            restarts: rest.3 && queue_status,
            ring,
        }
    });
    queue.boxed()
}

fn any_split(size: u16) -> impl Strategy<Value = SplitState> {
    let owned = vec(0..size, 0..=usize::from(size));
    (any::<(u16, u16)>(), owned).prop_map(|((next_available, next_used), owned)| SplitState {
        next_available,
        next_used,
        owned,
    })
}

fn any_packed(size: u16) -> impl Strategy<Value = PackedState> {
    let buffer = (any::<(u64, u32)>(), 0usize..3).prop_map(|((address, len), kind)| OwnedBuffer {
        address,
        len,
        kind: OwnedKind::ALL[kind],
    });
    let chain = (any::<u16>(), vec(buffer, 0..3)).prop_map(|(id, buffers)| OwnedChain {
        id,
        descriptors: 3,
        buffers,
    });
    let owned = vec(chain, 0..=usize::from(size) / 3);
    (any::<(u16, u16)>(), owned).prop_map(|((available, used), owned)| PackedState {
        next_available: Position::from_raw(available),
        next_used: Position::from_raw(used),
        owned,
    })
}

/// A state of a device of `shape`.
fn any_state(shape: Shape) -> impl Strategy<Value = (Shape, FunctionState)> {
    let queues = {
        let shape = shape.clone();
        any::<bool>().prop_flat_map(move |packed| {
            let packed = packed && shape.packed;
            let sizes = shape.queue_sizes.iter();
            sizes
                .map(|size| any_queue(*size, &shape, packed))
                .collect::<Vec<_>>()
        })
    };
    let registers = (any::<(u32, u32, u16, u8, u8)>(), 0u16..8);
    let config = vec(any::<u8>(), shape.config_len);
    (any::<(u128, u128)>(), registers, queues, config).prop_map(
        move |((offered, accepted), (plain, queue_select), queues, config)| {
            let selected = match shape.queue_sizes.len() {
                0 => 0,
                _ if !shape.queue_status => 0,
                count if usize::from(queue_select) < count => queue_select,
                _ => u16::MAX,
            };
            let state = FunctionState {
                offered,
                accepted,
                registers: RegisterState {
                    device_feature_select: plain.0,
                    driver_feature_select: plain.1,
                    config_vector: plain.2,
                    num_queues: queues.len() as u16,
                    status: plain.3,
                    config_generation: plain.4,
                    queue_select,
                    state_queue_select: selected,
                },
                queues,
                config,
            };
            (shape.clone(), state)
        },
    )
}

/// A device and a state of it.
fn any_device() -> impl Strategy<Value = (Shape, FunctionState)> {
    any_shape().prop_flat_map(any_state)
}

/// Requirements: S3-35, G3-d, G3-e, G3-f, G3-g, G3-j
#[test]
fn g3_j_a_context_is_these_bytes() {
    assert_eq!(encode(&state(), &shape()), golden());
    assert_eq!(decode(&golden(), &shape()), Ok(state()));
}

/// Requirements: G3-f
#[test]
fn g3_f_the_windows_show_what_the_selectors_choose() {
    let windows = |device: u32, driver: u32, queue: u16| {
        let mut state = state();
        state.offered = 0x4444_4444_3333_3333_2222_2222_1111_1111;
        state.accepted = 0x8888_8888_7777_7777_6666_6666_5555_5555;
        state.registers.device_feature_select = device;
        state.registers.driver_feature_select = driver;
        state.registers.queue_select = queue;
        let common = CommonConfig::of(&state);
        let features = (common.device_feature.get(), common.driver_feature.get());
        let queue = (common.queue_size.get(), common.queue_notify_off.get());
        (features, queue)
    };
    let cases = [
        ((0, 3, 0), ((0x1111_1111, 0x8888_8888), (8, 0))),
        ((1, 2, 1), ((0x2222_2222, 0x7777_7777), (4, 1))),
        ((2, 1, 2), ((0x3333_3333, 0x6666_6666), (0, 0))),
        ((3, 0, 0xffff), ((0x4444_4444, 0x5555_5555), (0, 0))),
        ((4, u32::MAX, 0), ((0, 0), (8, 0))),
        ((u32::MAX, 4, 0), ((0, 0), (8, 0))),
        ((0x0800_0000, 0x0800_0001, 0), ((0, 0), (8, 0))),
    ];
    for ((device, driver, queue), expected) in cases {
        assert_eq!(windows(device, driver, queue), expected);
    }
}

/// Requirements: S3-35, G3-h
#[test]
fn s3_35_the_fields_of_a_device_are_listed_with_their_lengths() {
    let numbers = |shape: &Shape| -> Vec<_> {
        let fields = fields(shape).into_iter();
        fields.map(|(kind, len)| (kind.raw(), len)).collect()
    };
    let with = [
        (1, 16),
        (5, 16),
        (0, 64),
        (2, 30),
        (3, 5),
        (4, 4 + 2 * 8),
        (8, 8),
        (0x1000, 3),
    ];
    assert_eq!(numbers(&shape()), with);
    let plain = Shape {
        queue_sizes: vec![2],
        config_len: 0,
        queue_status: false,
        packed: false,
    };
    let without = [(1, 16), (5, 16), (0, 64), (2, 30), (3, 5), (4, 8)];
    assert_eq!(numbers(&plain), without);
    let empty = Shape {
        queue_sizes: vec![],
        ..shape()
    };
    assert_eq!(numbers(&empty), [(1, 16), (5, 16), (0, 64), (0x1000, 3)]);
}

/// Requirements: G3-h
#[test]
fn g3_h_a_context_with_every_list_full_has_the_most_bytes() {
    let mut full = state();
    full.queues[0].split_mut().unwrap().owned = vec![7; 8];
    full.queues[1].split_mut().unwrap().owned = vec![3; 4];
    assert_eq!(encode(&full, &shape()).len(), max_len(&shape()));
}

proptest! {
    /// Requirements: S3-34
    #[test]
    fn s3_34_every_state_comes_back_from_chunks_of_any_size(
        (shape, state) in any_device(),
        sizes in vec(0usize..100, 1..20),
    ) {
        let context = encode(&state, &shape);
        prop_assert!(context.len() <= max_len(&shape));
        let mut decoder = Decoder::new(&shape);
        for chunk in chunks::cut(&context, &sizes) {
            prop_assert_eq!(decoder.latest(), None);
            decoder.push(chunk).unwrap();
        }
        prop_assert!(!decoder.is_partial());
        prop_assert_eq!(decoder.take_latest(), Some(state));
    }

    /// Requirements: G3-j
    #[test]
    fn g3_j_fields_come_in_any_order(
        (shape, state, fields) in any_device().prop_flat_map(|(shape, state)| {
            let fields = state_fields(&state, &shape);
            (Just(shape), Just(state), Just(fields).prop_shuffle())
        }),
    ) {
        prop_assert_eq!(decode(&assemble(&fields), &shape), Ok(state));
    }

    /// Requirements: S3-34
    #[test]
    fn s3_34_the_fields_of_every_state_can_be_shown((shape, state) in any_device()) {
        let fields = state_fields(&state, &shape);
        prop_assert_eq!(parse(&encode(&state, &shape)), Ok(fields.clone()));
        for field in fields {
            prop_assert!(!field.to_string().contains('\n'));
        }
    }
}
