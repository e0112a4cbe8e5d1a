//! Contexts from bytes to JSON and back.

use devices::context::{assemble, encode};
use devices::state::{QueueState, RegisterState, RingState, SplitState};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// Back and forth through text.
fn through_text(context: &Context) -> Context {
    let text = serde_json::to_string(context).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn json_of(field: &context::Field) -> Value {
    serde_json::to_value(Field::of(field)).unwrap()
}

/// Why this JSON is no context that can be encoded.
fn refusal(json: Value) -> String {
    let context: Context = match serde_json::from_value(json) {
        Ok(context) => context,
        Err(error) => return error.to_string(),
    };
    context.encode().unwrap_err().to_string()
}

#[test]
fn each_type_has_named_members() {
    for (field, expected) in [
        (
            context::Field::DriverFeatures(1 << 44 | 1),
            json!({ "type": "DRV_FEATURES", "features": "0x100000000001" }),
        ),
        (
            context::Field::QueueConfig(QueueConfig {
                queue: 0.into(),
                size: 256.into(),
                vector: 1.into(),
                descriptor_area: 0x1000.into(),
                driver_area: 0x2000.into(),
                device_area: u64::MAX.into(),
            }),
            json!({
                "type": "VQ_CFG", "queue": 0, "size": 256, "vector": 1, "descriptor_area": "0x1000",
                "driver_area": "0x2000", "device_area": "0xffffffffffffffff",
            }),
        ),
        (
            context::Field::SplitRuntime(SplitRuntime {
                queue: 1.into(),
                next_available: 9.into(),
                enabled: 1,
            }),
            json!({
                "type": "VQ_SPLIT_RUNTIME_CFG", "queue": 1, "enabled": true, "next_available": 9,
            }),
        ),
        (
            context::Field::OwnedChains(OwnedChains {
                queue: 2,
                heads: vec![7, 1],
            }),
            json!({ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 2, "heads": [7, 1] }),
        ),
        (
            context::Field::PackedRuntime(PackedRuntime {
                queue: 2.into(),
                next_available: 0x8003.into(),
                next_used: 2.into(),
                enabled: 0,
                reserved: 0,
            }),
            json!({
                "type": "VQ_PACKED_RUNTIME", "queue": 2, "enabled": false,
                "available": { "descriptor": 3, "wrap": true },
                "used": { "descriptor": 2, "wrap": false },
            }),
        ),
        (
            context::Field::OwnedPackedChains(OwnedPackedChains {
                queue: 3,
                chains: vec![
                    OwnedChain {
                        id: 4,
                        descriptors: 3,
                        buffers: vec![
                            OwnedBuffer {
                                address: 0x1000,
                                len: 16,
                                kind: OwnedKind::Readable,
                            },
                            OwnedBuffer {
                                address: 0x2000,
                                len: 512,
                                kind: OwnedKind::Writable,
                            },
                        ],
                    },
                    OwnedChain {
                        id: 9,
                        descriptors: 1,
                        buffers: vec![OwnedBuffer {
                            address: 0x3000,
                            len: 48,
                            kind: OwnedKind::Table,
                        }],
                    },
                ],
            }),
            json!({
                "type": "VQ_PACKED_DEV_OWN_DESC", "queue": 3, "chains": [
                    { "id": 4, "descriptors": 3, "buffers": [
                        { "address": "0x1000", "length": 16, "kind": "readable" },
                        { "address": "0x2000", "length": 512, "kind": "writable" },
                    ] },
                    { "id": 9, "descriptors": 1, "buffers": [{ "address": "0x3000", "length": 48, "kind": "table" }] },
                ],
            }),
        ),
        (
            context::Field::QueueStatus(QueueStatus {
                queue: 1.into(),
                running: 0,
                flags: QueueStatus::SELECTED,
                next_used: 5.into(),
                reserved: 0.into(),
            }),
            json!({
                "type": "VQ_STATUS", "queue": 1, "running": false, "restarts": false,
                "selected": true, "next_used": 5,
            }),
        ),
        (
            context::Field::DeviceConfig(vec![0, 255]),
            json!({ "type": "DEV_CFG", "config": "00ff" }),
        ),
    ] {
        assert_eq!(json_of(&field), expected);
        let read: Field = serde_json::from_value(expected).unwrap();
        assert_eq!(read.plain(), Ok(Some(field)));
    }
}

#[test]
fn what_has_no_name_survives_as_bytes() {
    let status = |flags, reserved: u16| {
        context::Field::QueueStatus(QueueStatus {
            queue: 1.into(),
            running: 1,
            flags,
            next_used: 0.into(),
            reserved: reserved.into(),
        })
    };
    for (field, value) in [
        (status(4, 0), "0100010400000000"),
        (status(0, 0x100), "0100010000000001"),
    ] {
        assert_eq!(json_of(&field), json!({ "type": "0x8", "value": value }));
    }
    let bytes = [
        &[3, 0, 0, 0][..],
        // An unknown type.
        &[0x34, 0x12, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0xaa],
        // Reserved bytes of a header.
        &[0, 0x10, 1, 0, 0, 0, 0, 0xff, 1, 0, 0, 0, 0, 0, 0, 0, 0xbb],
        // VQ_CFG of no bytes.
        &[2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    let context = Context::decode(&bytes).unwrap();
    let expected = json!([
        { "type": "0x1234", "value": "aa" },
        { "type": "0x1000", "reserved": "0xff0000000001", "value": "bb" },
        { "type": "0x2", "value": "" },
    ]);
    assert_eq!(serde_json::to_value(&context).unwrap(), expected);
    assert_eq!(through_text(&context).encode(), Ok(bytes));
    let lines: Vec<_> = context.0.iter().map(ToString::to_string).collect();
    let expected = [
        "0x1234: [aa]",
        "DEV_CFG, malformed: [bb]",
        "VQ_CFG, malformed: []",
    ];
    assert_eq!(lines, expected);
}

#[test]
fn errors_name_the_member() {
    let position = json!({ "descriptor": 0x8000, "wrap": false });
    for (json, expected) in [
        (json!([{ "queue": 0 }]), "missing field `type`"),
        (
            json!([{ "type": "VQ_CFG", "queue": 0 }]),
            "VQ_CFG has no `size`",
        ),
        (
            json!([{ "type": "VQ_CFG", "queue": null }]),
            "invalid type: null, expected u16",
        ),
        (
            json!([{ "type": "DEV_CFG", "queue": 70000 }]),
            "invalid value: integer `70000`, expected u16",
        ),
        (
            json!([{ "type": "DEV_CFG", "config": "", "queue": 1 }]),
            "`queue` is no member of DEV_CFG",
        ),
        (
            json!([{ "type": "DEV_CFG", "colour": 1 }]),
            "unknown field `colour`",
        ),
        (
            json!([{ "type": "VQ_CONFIG" }]),
            "expected a type of field, as in \"VQ_CFG\" or \"0x1234\"",
        ),
        (json!([{ "type": "0x12345" }]), "expected a type of field"),
        (
            json!([{ "type": "0x1234" }]),
            "a field of type 0x1234 has no `value`",
        ),
        (
            json!([{ "type": "0x1", "value": "" }, { "type": "0x1", "reserved": "0x1000000000000", "value": "" }]),
            "[1].reserved: 0x1000000000000 is more than 0xffffffffffff",
        ),
        (
            json!([{ "type": "VQ_PACKED_RUNTIME", "queue": 0, "enabled": true, "available": position, "used": position }]),
            "[0].available.descriptor: 32768 is more than 32767",
        ),
        (
            json!([{ "type": "VQ_SPLIT_DEV_OWN_DESC", "queue": 0, "heads": vec![0; 65536] }]),
            "[0].heads: 65536 chains are more than 65535",
        ),
        (
            json!(vec![
                json!({ "type": "0x1234", "value": "00".repeat(MAX_LEN / 2) });
                3
            ]),
            "[1]: the context has more than 4194304 bytes up to here",
        ),
    ] {
        let message = refusal(json);
        assert!(message.contains(expected), "{message}: {expected}");
    }
    let twice = r#"[{"type": "DEV_CFG", "config": "", "config": ""}]"#;
    let message = serde_json::from_str::<Context>(twice).unwrap_err();
    assert!(
        message.to_string().starts_with("duplicate field `config`"),
        "{message}"
    );
}

#[test]
fn bytes_that_are_not_framed_are_refused() {
    let good = assemble(&[context::Field::DeviceFeatures(3)]);
    for len in 0..good.len() {
        assert_eq!(
            Context::decode(&good[..len]),
            Err(ContextError::Truncated),
            "{len}"
        );
    }
    let trailing = [&good[..], &[0]].concat();
    assert_eq!(Context::decode(&trailing), Err(ContextError::Trailing(1)));
    // A length that no memory has.
    let mut huge = good;
    huge[12..20].fill(0xff);
    assert_eq!(Context::decode(&huge), Err(ContextError::Truncated));
    assert_eq!(Context::decode(&[0xff; 4]), Err(ContextError::Truncated));
}

fn shape() -> Shape {
    Shape {
        queue_sizes: vec![8, 4],
        config_len: 3,
        queue_status: true,
        packed: false,
    }
}

prop_compose! {
    fn any_queue(size: u16)(
        vector: u16,
        areas: (u64, u64, u64),
        flags: (bool, bool, bool),
        next: (u16, u16),
        owned in vec(0..size, 0..=usize::from(size)),
    ) -> QueueState {
        QueueState {
            size,
            vector,
            descriptor_area: areas.0,
            driver_area: areas.1,
            device_area: areas.2,
            enabled: flags.0,
            stopped: flags.1,
            restarts: flags.2,
            ring: RingState::Split(SplitState {
                next_available: next.0,
                next_used: next.1,
                owned,
            }),
        }
    }
}

prop_compose! {
    fn any_state()(
        offered: u128,
        accepted: u128,
        select: (u32, u32),
        config_vector: u16,
        status: u8,
        config_generation: u8,
        queue_select: u16,
        state_queue_select in 0u16..2,
        queues in (any_queue(8), any_queue(4)),
        config: [u8; 3],
    ) -> FunctionState {
        FunctionState {
            offered,
            accepted,
            registers: RegisterState {
                device_feature_select: select.0,
                driver_feature_select: select.1,
                config_vector,
                num_queues: 2,
                status,
                config_generation,
                queue_select,
                state_queue_select,
            },
            queues: vec![queues.0, queues.1],
            config: config.to_vec(),
        }
    }
}

/// A field of which only the frame is right: mostly of a known type, and of a length that this type can have.
fn any_tlv() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![4 => 0u16..9, 1 => Just(0x1000u16), 1 => any::<u16>()];
    let reserved = prop_oneof![4 => Just(0u64), 1 => 0..=MAX_RESERVED];
    let len = prop_oneof![
        Just(16usize),
        Just(64),
        Just(30),
        Just(5),
        Just(8),
        Just(6),
        0usize..80
    ];
    let byte = prop_oneof![3 => Just(0u8), 1 => Just(1), 1 => any::<u8>()];
    let value = len.prop_flat_map(move |len| vec(byte.clone(), len));
    (kind, reserved, value).prop_map(|(kind, reserved, value)| {
        let head = (reserved << 16 | u64::from(kind)).to_le_bytes();
        let len = (value.len() as u64).to_le_bytes();
        [&head[..], &len, &value].concat()
    })
}

proptest! {
    #[test]
    fn every_state_is_the_same_after_json(state in any_state()) {
        let bytes = encode(&state, &shape());
        let context = Context::of_state(&state, &shape());
        prop_assert_eq!(&Context::decode(&bytes).unwrap(), &context);
        let read = through_text(&context);
        prop_assert_eq!(read.encode(), Ok(bytes));
        prop_assert_eq!(read.state(&shape()), Ok(state));
        prop_assert!(!context.0.iter().any(|field| matches!(field, Field::Raw(_))));
    }

    #[test]
    fn every_context_that_is_framed_is_the_same_after_json(fields in vec(any_tlv(), 0..20)) {
        let count = (fields.len() as u32).to_le_bytes();
        let bytes = [&count[..], &fields.concat()].concat();
        let context = Context::decode(&bytes).unwrap();
        let read = through_text(&context);
        prop_assert_eq!(&read, &context);
        prop_assert_eq!(read.encode(), Ok(bytes));
        for field in &context.0 {
            prop_assert!(!field.to_string().contains('\n'));
        }
    }
}

#[test]
fn a_state_that_does_not_fit_the_device_is_refused_at_its_field() {
    let smaller = Shape {
        queue_sizes: vec![8],
        ..shape()
    };
    let state = FunctionState {
        offered: 0,
        accepted: 0,
        registers: RegisterState {
            num_queues: 1,
            ..RegisterState::default()
        },
        queues: vec![],
        config: vec![0; 3],
    };
    let mut context = Context::of_state(&state, &smaller);
    let error = context.state(&smaller).unwrap_err().to_string();
    assert!(
        error.starts_with(": a context of") || error.starts_with("a context of"),
        "{error}"
    );
    for (field, expected) in [
        (
            Field::DeviceConfig {
                config: HexBytes(vec![0; 2]),
            },
            "[3]: DEV_CFG has 2 bytes, not 3",
        ),
        (
            Field::Raw(Raw {
                kind: Hex(0x1234),
                reserved: None,
                value: HexBytes(vec![]),
            }),
            "[3]: field type 0x1234 is unknown",
        ),
    ] {
        context.0.truncate(3);
        context.0.push(field);
        context.0.resize(7, context.0[0].clone());
        let error = context.state(&smaller).unwrap_err();
        assert_eq!(error.to_string(), expected);
    }
}
