//! Device contexts.

use devices::context::{Decoder, Pushed, encode, max_len, parse};
use devices::state::{
    FunctionState, OwnedBuffer, OwnedChain, OwnedKind, PackedState, QueueState, RegisterState,
    RingState, Shape, SplitState,
};
use devices::virtio::Position;

use crate::input::Input;

/// An owner driver writes contexts, whole, in parts, with a changed byte, or any bytes at all, and discards at any
/// time. What becomes of them does not depend on where chunks end, a refused chunk changes nothing, and what is
/// complete can be written again.
pub fn context(data: &[u8]) {
    let mut input = Input::new(data);
    let shape = Shape {
        queue_sizes: (0..input.pick(4)).map(|_| 1 << input.pick(8)).collect(),
        config_len: input.pick(9).into(),
        queue_status: input.byte() & 1 != 0,
        packed: input.byte() & 1 != 0,
    };
    let mut decoder = Decoder::new(&shape);
    while !input.is_empty() {
        match input.pick(5) {
            0 => push(
                &mut decoder,
                &encode(&state(&mut input, &shape), &shape),
                &shape,
            ),
            1 => {
                let context = encode(&state(&mut input, &shape), &shape);
                let at = usize::from(input.word()) % context.len();
                let (first, rest) = context.split_at(at);
                push(&mut decoder, first, &shape);
                if input.byte() & 1 != 0 {
                    push(&mut decoder, rest, &shape);
                }
            }
            2 => {
                let mut context = encode(&state(&mut input, &shape), &shape);
                let at = usize::from(input.word()) % context.len();
                context[at] = input.byte();
                push(&mut decoder, &context, &shape);
            }
            3 => {
                let len = input.byte().into();
                let bytes = input.slice(len);
                push(&mut decoder, bytes, &shape);
                // Any bytes have an answer.
                let _ = parse(bytes);
            }
            _ => {
                let latest = decoder.latest().cloned();
                decoder.discard();
                assert!(!decoder.is_partial());
                assert_eq!(decoder.latest(), latest.as_ref(), "it is no part of it");
            }
        }
    }
}

/// Pushes `chunk` as a whole, and to a second decoder byte by byte.
fn push(decoder: &mut Decoder, chunk: &[u8], shape: &Shape) {
    let before = decoder.clone();
    let mut slow = decoder.clone();
    let bytewise = chunk.chunks(1).try_fold(Pushed::Incomplete, |sum, byte| {
        slow.push(byte).map(|pushed| match sum {
            Pushed::Complete => sum,
            Pushed::Incomplete => pushed,
        })
    });
    let outcome = decoder.push(chunk);
    assert_eq!(outcome, bytewise, "where chunks end is of no matter");
    let expected = if outcome.is_ok() { slow } else { before };
    assert_eq!(*decoder, expected);
    if outcome == Ok(Pushed::Complete) {
        let state = decoder.latest().expect("one became complete");
        let again = encode(state, shape);
        assert!(again.len() <= max_len(shape), "longer than any");
        let mut other = Decoder::new(shape);
        assert_eq!(other.push(&again), Ok(Pushed::Complete));
        assert_eq!(other.latest(), Some(state));
        parse(&again).expect("a context");
    }
}

fn state(input: &mut Input<'_>, shape: &Shape) -> FunctionState {
    FunctionState {
        offered: wide(input),
        accepted: wide(input),
        registers: RegisterState {
            device_feature_select: input.byte().into(),
            driver_feature_select: input.byte().into(),
            config_vector: input.word(),
            num_queues: shape.queue_sizes.len() as u16,
            status: input.byte(),
            config_generation: input.byte(),
            queue_select: input.byte().into(),
            state_queue_select: 0,
        },
        queues: shape
            .queue_sizes
            .iter()
            .map(|size| queue(input, *size, shape))
            .collect(),
        config: (0..shape.config_len).map(|_| input.byte()).collect(),
    }
}

/// 128 bits of which any may be set, from few bytes.
fn wide(input: &mut Input<'_>) -> u128 {
    u128::from(input.word()) << (input.byte() % 128)
}

fn queue(input: &mut Input<'_>, max_size: u16, shape: &Shape) -> QueueState {
    let size = max_size >> input.pick(max_size.ilog2() as u8 + 1);
    let flags = input.byte();
    let (enabled, packed) = (flags & 1 != 0, shape.packed && flags & 8 != 0);
    QueueState {
        size,
        vector: input.byte().into(),
        descriptor_area: input.dword().into(),
        driver_area: input.dword().into(),
        device_area: input.dword().into(),
        enabled,
        stopped: shape.queue_status && flags & 2 != 0,
        restarts: shape.queue_status && flags & 4 != 0,
        ring: match packed {
            true => RingState::Packed(packed_ring(input, size)),
            false => RingState::Split(split_rings(input, size, enabled || shape.queue_status)),
        },
    }
}

fn split_rings(input: &mut Input<'_>, size: u16, used: bool) -> SplitState {
    let owned = u16::from(input.byte()) % (size + 1);
    let next_available = input.word();
    SplitState {
        next_available,
        next_used: match used {
            true => next_available.wrapping_sub(owned),
            false => 0,
        },
        owned: (0..owned).map(|_| input.word() % size).collect(),
    }
}

fn packed_ring(input: &mut Input<'_>, size: u16) -> PackedState {
    let chains = u16::from(input.byte()) % (size + 1);
    let owned = (0..chains).map(|_| OwnedChain {
        id: input.word(),
        descriptors: 1,
        buffers: (0..input.pick(2))
            .map(|_| OwnedBuffer {
                address: input.dword().into(),
                len: input.dword(),
                kind: OwnedKind::ALL[usize::from(input.pick(3))],
            })
            .collect(),
    });
    PackedState {
        owned: owned.collect(),
        next_available: Position::from_raw(input.word()),
        next_used: Position::from_raw(input.word()),
    }
}
