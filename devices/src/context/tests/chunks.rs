//! Chunks: where they end, what a failed one leaves, and what may be kept meanwhile.

use super::*;

/// `bytes` in chunks of these sizes, over and over. A round of empty chunks ends with one of a byte.
pub fn cut<'a>(mut bytes: &'a [u8], sizes: &[usize]) -> Vec<&'a [u8]> {
    let mut chunks = Vec::new();
    let round = sizes.iter().copied().chain([1]);
    for size in round.cycle() {
        if bytes.is_empty() {
            break;
        }
        let (chunk, rest) = bytes.split_at(size.min(bytes.len()));
        chunks.push(chunk);
        bytes = rest;
    }
    chunks
}

/// Bytes that are contexts, nearly.
fn nearly_contexts() -> impl Strategy<Value = (Shape, Vec<u8>)> {
    let edits = vec((any::<prop::sample::Index>(), any::<u8>(), 0..3u8), 0..3);
    let device = any_shape().prop_flat_map(|shape| vec(any_state(shape), 1..4));
    (device, edits).prop_map(|(states, edits)| {
        let shape = states[0].0.clone();
        let contexts = states.iter().map(|(shape, state)| encode(state, shape));
        let mut bytes = contexts.collect::<Vec<_>>().concat();
        for (at, value, edit) in edits {
            let at = at.index(bytes.len());
            match edit {
                0 => bytes[at] = value,
                1 => bytes.insert(at, value),
                _ => bytes.truncate(at + 1),
            }
        }
        (shape, bytes)
    })
}

/// A decoder that got `bytes` in one chunk.
fn after(bytes: &[u8], shape: &Shape) -> Decoder {
    let mut decoder = Decoder::new(shape);
    decoder.push(bytes).unwrap();
    decoder
}

/// Bytes of the longest field.
fn longest(shape: &Shape) -> usize {
    let lens = fields(shape).into_iter().map(|(_, len)| len as usize);
    lens.max().unwrap().max(FIELD_HEADER_LEN)
}

proptest! {
    /// Wherever contexts are cut off, and in whatever order the fields of the last one came, its bytes and the context
    /// before it make an equal decoder.
    #[test]
    fn a_decoder_is_made_anew_from_what_it_says_of_itself(
        (shape, state) in any_shape().prop_flat_map(any_state),
        before: bool,
        order in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
    ) {
        let whole = encode(&state, &shape);
        let mut fields = parse(&whole).unwrap();
        let len = fields.len();
        fields.rotate_left(order.index(len));
        fields.swap(0, order.index(len));
        let bytes = assemble(&fields);
        let mut decoder = Decoder::new(&shape);
        if before {
            decoder.push(&whole).unwrap();
        }
        decoder.push(&bytes[..at.index(bytes.len())]).unwrap();

        let mut anew = Decoder::new(&shape);
        if let Some(latest) = decoder.latest() {
            anew.push(&encode(latest, &shape)).unwrap();
        }
        let partial = decoder.partial();
        prop_assert_eq!(partial.len() <= bytes.len(), true);
        prop_assert_eq!(partial.is_empty(), !decoder.is_partial());
        prop_assert_eq!(anew.push(&partial), Ok(Pushed::Incomplete));
        prop_assert_eq!(anew, decoder);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Requirements: S3-34, G3-p
    #[test]
    fn g3_p_a_failed_chunk_never_was_and_chunks_never_matter(
        (shape, bytes) in nearly_contexts(),
        sizes in vec(0usize..300, 1..6),
    ) {
        let mut whole = Decoder::new(&shape);
        let in_one = whole.push(&bytes);
        let mut decoder = Decoder::new(&shape);
        let mut done = 0;
        let mut failed = None;
        for chunk in cut(&bytes, &sizes) {
            let before = decoder.clone();
            if let Err(error) = decoder.push(chunk) {
                prop_assert_eq!(&decoder, &before);
                failed = Some(error);
                break;
            }
            done += chunk.len();
            prop_assert_eq!(&decoder, &after(&bytes[..done], &shape));
            let kept = decoder.held();
            prop_assert!(kept <= 2 * longest(&shape) + chunk.len(), "{}", kept);
        }
        prop_assert_eq!(in_one.err(), failed);
        if done == bytes.len() {
            prop_assert_eq!(decoder, whole);
        } else {
            prop_assert_eq!(whole, Decoder::new(&shape));
        }
    }

    /// Requirements: S3-34
    #[test]
    fn s3_34_any_bytes_are_taken_or_refused(
        shape in any_shape(),
        bytes in vec(any::<u8>(), 0..200),
    ) {
        let mut decoder = Decoder::new(&shape);
        if decoder.push(&bytes).is_err() {
            prop_assert_eq!(decoder, Decoder::new(&shape));
        }
        // Whatever it is, it is an answer.
        let _ = parse(&bytes);
    }
}

/// Requirements: S3-31, S3-34
#[test]
fn s3_31_a_context_is_partial_from_its_first_byte_to_the_one_before_its_last() {
    let context = golden();
    for len in 0..context.len() {
        let mut decoder = Decoder::new(&shape());
        assert_eq!(decoder.push(&context[..len]), Ok(Pushed::Incomplete));
        assert_eq!(decoder.is_partial(), len > 0, "{len} bytes");
        assert_eq!(decoder.latest(), None);
        let untouched = Decoder::new(&shape());
        let mut discarded = decoder.clone();
        discarded.discard();
        assert_eq!(discarded, untouched);
        assert_eq!(decoder.push(&context[len..]), Ok(Pushed::Complete));
        assert!(!decoder.is_partial());
        assert_eq!(decoder.latest(), Some(&state()));
    }
}

/// Requirements: S3-30
#[test]
fn s3_30_of_contexts_in_one_chunk_the_last_complete_one_counts() {
    let mut other = state();
    other.queues[1].split_mut().unwrap().next_available = 0x7777;
    let both = [golden(), encode(&other, &shape())].concat();
    let mut decoder = Decoder::new(&shape());
    assert_eq!(decoder.push(&both), Ok(Pushed::Complete));
    assert!(!decoder.is_partial());
    assert_eq!(decoder.latest(), Some(&other));
    assert_eq!(decoder.push(&both[..both.len() - 1]), Ok(Pushed::Complete));
    assert!(decoder.is_partial());
    assert_eq!(decoder.latest(), Some(&state()));
    assert_eq!(decoder.push(&both[both.len() - 1..]), Ok(Pushed::Complete));
    assert_eq!(decoder.latest(), Some(&other));
}

/// Requirements: S3-30, S3-31
#[test]
fn s3_31_a_discard_leaves_the_complete_context() {
    let mut decoder = Decoder::new(&shape());
    decoder.push(&golden()).unwrap();
    decoder.push(&golden()[..100]).unwrap();
    decoder.discard();
    assert!(!decoder.is_partial());
    assert_eq!(decoder.take_latest(), Some(state()));
    assert_eq!(decoder, Decoder::new(&shape()));
}

/// Requirements: G3-p
#[test]
fn g3_p_a_failed_chunk_takes_back_the_contexts_that_ended_in_it() {
    let context = golden();
    for held in [0, 3, 4, 19, 20, 30, 200, context.len() - 1] {
        let mut decoder = after(&context[..held], &shape());
        let before = decoder.clone();
        let junk = [&context[held..], &context, &context[..50], &[0xff; 200]].concat();
        decoder.push(&junk).unwrap_err();
        assert_eq!(decoder, before, "{held} bytes held");
        assert_eq!(decoder.push(&context[held..]), Ok(Pushed::Complete));
        assert_eq!(decoder.latest(), Some(&state()), "{held} bytes held");
    }
}

/// Requirements: S3-33
#[test]
fn s3_33_a_length_is_refused_before_memory_is_taken_for_it() {
    for len in [4, 1 << 32, 1 << 63, u64::MAX] {
        let mut decoder = Decoder::new(&shape());
        decoder.push(&11u32.to_le_bytes()).unwrap();
        let header = [0x1000u64.to_le_bytes(), len.to_le_bytes()].concat();
        decoder.push(&header[..15]).unwrap();
        decoder.push(&header[15..]).unwrap_err();
        assert!(decoder.held() <= 2 * FIELD_HEADER_LEN);
    }
}

/// Requirements: S3-34
#[test]
fn s3_34_no_byte_or_end_of_a_context_makes_trouble() {
    let context = golden();
    for at in 0..context.len() {
        for value in 0..=u8::MAX {
            let mut broken = context.clone();
            broken[at] = value;
            let mut decoder = Decoder::new(&shape());
            let outcome = decoder.push(&broken);
            let taken = matches!(outcome, Ok(Pushed::Complete));
            assert_eq!(decoder.latest().is_some(), taken, "{at}: {value:#x}");
            if let Some(state) = decoder.latest() {
                assert_eq!(
                    decode(&encode(state, &shape()), &shape()).as_ref(),
                    Ok(state)
                );
            }
        }
    }
}

/// Requirements: S3-34
#[test]
fn s3_34_a_large_context_comes_byte_by_byte() {
    let queues = 256;
    let shape = Shape {
        queue_sizes: vec![256; queues],
        config_len: 4096,
        queue_status: true,
        packed: false,
    };
    let mut state = state();
    state.registers.num_queues = queues as u16;
    state.queues = vec![state.queues[0].clone(); queues];
    state.queues[7].size = 256;
    state.queues[7].split_mut().unwrap().owned = (0..=255).rev().collect();
    state.config = (0..4096u32).map(|i| i as u8).collect();
    let mut decoder = Decoder::new(&shape);
    for byte in encode(&state, &shape) {
        decoder.push(&[byte]).unwrap();
    }
    assert_eq!(decoder.take_latest(), Some(state));
}
