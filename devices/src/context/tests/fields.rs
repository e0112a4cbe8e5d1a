//! Single fields.

use super::*;

fn encoded(field: &Field) -> Vec<u8> {
    let mut bytes = Vec::new();
    field.encode(&mut bytes);
    bytes
}

fn packed_runtime() -> Field {
    Field::PackedRuntime(PackedRuntime {
        queue: 3.into(),
        next_available: 0x8005.into(),
        next_used: 0x0004.into(),
        enabled: 1,
        reserved: 0,
    })
}

fn packed_chains() -> Field {
    let buffer = |address: u64, len: u32, kind: OwnedKind| OwnedBuffer { address, len, kind };
    let table = buffer(0x1_0000_2000, 48, OwnedKind::Table);
    let direct = vec![
        buffer(0x3000, 16, OwnedKind::Readable),
        buffer(0x4000, 0x0102_0304, OwnedKind::Writable),
    ];
    let chain = |id: u16, descriptors: u16, buffers: Vec<OwnedBuffer>| OwnedChain {
        id,
        descriptors,
        buffers,
    };
    Field::OwnedPackedChains(OwnedPackedChains {
        queue: 0x0102,
        chains: vec![chain(9, 1, vec![table]), chain(0x0304, 2, direct)],
    })
}

/// Requirements: G3-i
#[test]
fn g3_i_fields_of_packed_rings_are_these_bytes() {
    #[rustfmt::skip]
    let cases = [
        (packed_runtime(), vec![
            6, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0,
            3, 0, 5, 0x80, 4, 0, 1, 0,
        ]),
        (packed_chains(), vec![
            7, 0, 0, 0, 0, 0, 0, 0, 68, 0, 0, 0, 0, 0, 0, 0,
            2, 1, 2, 0,
            9, 0, 1, 0, 1, 0, 0, 0,
            0, 0x20, 0, 0, 1, 0, 0, 0, 48, 0, 0, 0, 4, 0, 0, 0,
            4, 3, 2, 0, 2, 0, 0, 0,
            0, 0x30, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0,
            0, 0x40, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 2, 0, 0, 0,
        ]),
    ];
    for (field, bytes) in cases {
        assert_eq!(encoded(&field), bytes);
        let value = &bytes[FIELD_HEADER_LEN..];
        assert_eq!(Field::decode(field.id().kind, value), Ok(field));
    }
}

/// Requirements: S3-33, G3-h
#[test]
fn s3_33_a_value_of_another_length_is_none() {
    let mut fields = state_fields(&state(), &shape());
    fields.extend([packed_runtime(), packed_chains()]);
    let kinds: Vec<_> = fields.iter().map(|field| field.id().kind).collect();
    assert!(FieldType::ALL.iter().all(|kind| kinds.contains(kind)));
    for field in fields {
        let bytes = encoded(&field);
        let (kind, value) = (field.id().kind, &bytes[FIELD_HEADER_LEN..]);
        let longer = [value, &[0; 2]].concat();
        let shorter = &value[..value.len() - 1];
        let outcome = [&[], shorter, &longer].map(|v| Field::decode(kind, v).is_ok());
        // The device configuration is as long as the device says.
        assert_eq!(outcome, [kind == FieldType::DeviceConfig; 3], "{kind}");
    }
}

/// Requirements: G3-b
#[test]
fn g3_b_types_that_are_reserved_are_unknown() {
    for raw in [0x0009, 0x0fff, 0x1001, 0x1fff, 0x2000, 0xffff] {
        assert_eq!(FieldType::from_raw(raw), None);
    }
    for kind in FieldType::ALL {
        assert_eq!(FieldType::from_raw(kind.raw()), Some(kind));
    }
}

/// Requirements: S3-34
#[test]
fn s3_34_what_is_missing_of_a_context_or_too_much_is_said() {
    let context = golden();
    for len in 0..context.len() {
        assert_eq!(parse(&context[..len]), Err(ContextError::Truncated));
    }
    let longer = [context, vec![0; 5]].concat();
    assert_eq!(parse(&longer), Err(ContextError::Trailing(5)));
    let endless = [1u64.to_le_bytes(), [0xff; 8], [0xff; 8]].concat();
    assert_eq!(parse(&endless), Err(ContextError::Truncated));
    assert_eq!(parse(&[0xff; 20]), Err(ContextError::UnknownType(0xffff)));
}

/// Requirements: G3-i
#[test]
fn g3_i_a_field_says_in_a_line_what_it_holds() {
    let mut fields = state_fields(&state(), &shape());
    fields.truncate(7);
    fields.extend([packed_runtime(), packed_chains()]);
    fields.push(Field::DeviceConfig(vec![0, 0xab]));
    let lines: Vec<_> = fields.iter().map(Field::to_string).collect();
    let expected = [
        "DEV_FEATURES: 0x10000000000000000100000030",
        "DRV_FEATURES: 0x100000010",
        "PCI_COMMON_CFG: status 0x0f, generation 7, configuration vector 0xffff, 2 queues, queue 0 selected",
        "VQ_CFG of queue 0: size 8, vector 0x1, descriptors at 0x1000, available ring at 0x2000, used ring at 0x100003000",
        "VQ_SPLIT_RUNTIME_CFG of queue 0: enabled, next available 258",
        "VQ_SPLIT_DEV_OWN_DESC of queue 0: [5, 2]",
        "VQ_STATUS of queue 0: stopped, next used 255, goes on where the driver said",
        "VQ_PACKED_RUNTIME of queue 3: enabled, next available 5 with wrap counter 1, next used 4 with wrap counter 0",
        "VQ_PACKED_DEV_OWN_DESC of queue 258: {9: 1, 772: 2}",
        "DEV_CFG: [00, ab]",
    ];
    assert_eq!(lines, expected);
}

/// Requirements: G3-d, G3-i
#[test]
fn g3_d_a_context_without_accepted_features_says_by_its_rings_whether_they_are_packed() {
    let packed = 1u128 << 34;
    let shape = Shape {
        packed: true,
        ..shape()
    };
    let mut state = state();
    state.offered |= packed;
    let decoded = |state: &FunctionState| {
        let mut fields = state_fields(state, &shape);
        fields.retain(|field| !matches!(field, Field::DriverFeatures(_)));
        let mut decoder = Decoder::new(&shape);
        decoder.push(&assemble(&fields)).unwrap();
        decoder.take_latest().unwrap().accepted
    };
    assert_eq!(decoded(&state), state.offered & !packed);
    for queue in &mut state.queues {
        queue.ring = RingState::Packed(PackedState::default());
    }
    assert_eq!(decoded(&state), state.offered);
}
