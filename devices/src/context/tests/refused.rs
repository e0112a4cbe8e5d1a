//! What a device refuses, and what it overlooks.

use super::*;

/// Requirements: S3-33
#[test]
fn s3_33_a_length_that_is_not_the_devices_is_refused_with_the_header() {
    let context = golden();
    let mut start = COUNT_LEN;
    for field in state_fields(&state(), &shape()) {
        let kind = field.id().kind;
        let mut value = Vec::new();
        field.encode(&mut value);
        let len = (value.len() - FIELD_HEADER_LEN) as u64;
        let header = start + FIELD_HEADER_LEN;
        // Of a list, one byte more is an odd number, and 22 bytes are more than the largest queue has descriptors.
        for wrong in [0, 3 * len, len + 1, 1 << 40 | len, u64::MAX] {
            let mut broken = context[..header].to_vec();
            broken[start + 8..].copy_from_slice(&wrong.to_le_bytes());
            let expected = match kind {
                FieldType::OwnedChains => ContextError::ListLength {
                    field: kind,
                    len: wrong,
                    most: 20,
                },
                field => ContextError::Length {
                    field,
                    len: wrong,
                    expected: len,
                },
            };
            let outcome = Decoder::new(&shape()).push(&broken);
            assert_eq!(outcome, Err(expected), "{kind}: {wrong}");
        }
        start += value.len();
    }
}

/// Requirements: S3-33, G3-h
#[test]
fn g3_h_a_list_is_as_long_as_its_count_says_and_fits_its_queue() {
    let owned = FieldType::OwnedChains;
    let list = |queue, heads: &[u16]| {
        Field::OwnedChains(OwnedChains {
            queue,
            heads: heads.to_vec(),
        })
    };
    let of_one = |size: u16| {
        Field::QueueConfig(QueueConfig {
            queue: 1.into(),
            size: size.into(),
            vector: 0.into(),
            descriptor_area: 0.into(),
            driver_area: 0.into(),
            device_area: 0.into(),
        })
    };
    let field = owned.of(1);
    let many = |count, size| ContextError::TooManyChains { field, count, size };
    let head = |head, size| ContextError::Head { field, head, size };
    let cases = [
        // The list comes first, or the size of its queue does.
        (vec![list(1, &[0; 5])], many(5, 4)),
        (vec![list(1, &[3, 4])], head(4, 4)),
        (vec![list(1, &[0; 3]), of_one(2)], many(3, 2)),
        (vec![of_one(2), list(1, &[0; 3])], many(3, 2)),
        (vec![list(1, &[1, 2]), of_one(2)], head(2, 2)),
        (vec![of_one(2), list(1, &[1, 2])], head(2, 2)),
        (vec![of_one(0), list(1, &[0])], many(1, 0)),
        (vec![of_one(8), list(1, &[4])], head(4, 4)),
    ];
    for (mut fields, expected) in cases {
        // As many as a context needs; they are not reached.
        fields.extend(changed(|fields| fields.truncate(7)));
        assert_eq!(refusal(&fields), expected);
    }
    let mut context = assemble(&changed(|fields| fields.swap(0, 5)));
    let count = COUNT_LEN + FIELD_HEADER_LEN + 2;
    assert_eq!(context[count], 2);
    context[count] = 1;
    let expected = ContextError::ListCount {
        field: owned.of(0),
        len: 8,
        count: 1,
    };
    assert_eq!(decode(&context, &shape()), Err(expected));
}

/// Requirements: G3-g, G3-h
#[test]
fn g3_h_an_empty_list_is_as_good_as_none() {
    let fields = changed(|fields| {
        fields.push(Field::OwnedChains(OwnedChains {
            queue: 1,
            heads: vec![],
        }));
    });
    assert_eq!(decode(&assemble(&fields), &shape()), Ok(state()));
}

/// Requirements: G3-q
#[test]
fn g3_q_a_field_that_is_unknown_or_not_the_devices_is_refused() {
    let context = |raw: u16| {
        let mut context = golden();
        context[4..6].copy_from_slice(&raw.to_le_bytes());
        context
    };
    for raw in [0x0009, 0x0100, 0x1001, 0x2000, 0xffff] {
        let expected = ContextError::UnknownType(raw);
        assert_eq!(decode(&context(raw), &shape()), Err(expected));
    }
    for kind in [FieldType::PackedRuntime, FieldType::OwnedPackedChains] {
        let expected = ContextError::Unsupported(kind);
        assert_eq!(decode(&context(kind.raw()), &shape()), Err(expected));
    }
    let plain = Shape {
        queue_sizes: vec![2],
        config_len: 0,
        queue_status: false,
        packed: false,
    };
    for kind in [FieldType::QueueStatus, FieldType::DeviceConfig] {
        let mut context = context(kind.raw());
        context[0] = 4;
        let expected = ContextError::Unsupported(kind);
        assert_eq!(decode(&context, &plain), Err(expected));
    }
}

/// Requirements: G3-q
#[test]
fn g3_q_a_field_that_is_there_twice_is_refused() {
    let all = state_fields(&state(), &shape());
    for field in &all {
        // Instead of another one, so that there are not too many.
        let mut fields = vec![field.clone(), field.clone()];
        fields.extend(all.iter().skip(2).cloned());
        let expected = ContextError::Duplicate(field.id());
        assert_eq!(refusal(&fields), expected);
    }
}

/// Requirements: S3-46
#[test]
fn s3_46_a_context_without_a_required_field_is_refused_with_its_name() {
    let all = state_fields(&state(), &shape());
    let optional = [
        FieldType::DriverFeatures.of(None),
        FieldType::OwnedChains.of(0),
        FieldType::QueueStatus.of(0),
        FieldType::QueueStatus.of(1),
    ];
    for (at, field) in all.iter().enumerate() {
        let mut fields = all.clone();
        fields.remove(at);
        let missing =
            (!optional.contains(&field.id())).then_some(ContextError::Missing(field.id()));
        assert_eq!(decode(&assemble(&fields), &shape()).err(), missing);
    }
}

/// Requirements: G3-d, G3-g
#[test]
fn g3_d_what_is_optional_has_a_default() {
    let fields = changed(|fields| {
        fields.retain(|field| {
            !matches!(
                field.id().kind,
                FieldType::DriverFeatures | FieldType::OwnedChains | FieldType::QueueStatus
            )
        });
    });
    let mut expected = state();
    expected.accepted = expected.offered;
    expected.queues[0].stopped = false;
    expected.queues[0].restarts = false;
    let ring = expected.queues[0].split_mut().unwrap();
    ring.owned = vec![];
    ring.next_used = ring.next_available;
    expected.registers.state_queue_select = 0;
    assert_eq!(decode(&assemble(&fields), &shape()), Ok(expected));
}

/// Requirements: S3-46
#[test]
fn s3_46_a_number_of_fields_that_no_context_has_is_refused_at_once() {
    for count in [0, 6, 13, u32::MAX] {
        let expected = ContextError::FieldCount {
            count,
            least: 7,
            most: 12,
        };
        let outcome = Decoder::new(&shape()).push(&count.to_le_bytes());
        assert_eq!(outcome, Err(expected));
    }
}

/// Requirements: G3-f
#[test]
fn g3_f_of_the_common_configuration_only_the_number_of_queues_is_checked() {
    let with = |change: fn(&mut CommonConfig)| {
        let fields = changed(|fields| match &mut fields[2] {
            Field::CommonConfig(common) => change(common),
            other => panic!("{other}"),
        });
        decode(&assemble(&fields), &shape())
    };
    let same = with(|common| {
        common.device_feature = 1.into();
        common.driver_feature = 2.into();
        common.queue_size = 3.into();
        common.queue_vector = 4.into();
        common.queue_enable = 5.into();
        common.queue_notify_off = 6.into();
        common.queue_desc = 7.into();
        common.queue_driver = 8.into();
        common.queue_device = 9.into();
        common.queue_notif_config_data = 10.into();
        common.queue_reset = 11.into();
        common.admin_queue_index = 12.into();
        common.admin_queue_num = 13.into();
    });
    assert_eq!(same, Ok(state()));
    for (change, found) in [
        (
            (|common| common.num_queues = 1.into()) as fn(&mut CommonConfig),
            1,
        ),
        (|common| common.num_queues = 0x0102.into(), 0x0102),
    ] {
        let expected = ContextError::QueueCount { found, expected: 2 };
        assert_eq!(with(change), Err(expected));
    }
}

/// Requirements: S3-33
#[test]
fn s3_33_a_queue_that_is_not_there_is_refused() {
    for queue in [2, 0xffff] {
        let runtime = SplitRuntime {
            queue: queue.into(),
            next_available: 0.into(),
            enabled: 0,
        };
        let status = QueueStatus {
            queue: queue.into(),
            running: 1,
            flags: 0,
            next_used: 0.into(),
            reserved: 0.into(),
        };
        let owned = OwnedChains {
            queue,
            heads: vec![],
        };
        for field in [
            Field::SplitRuntime(runtime),
            Field::QueueStatus(status),
            Field::OwnedChains(owned),
        ] {
            let expected = ContextError::NoSuchQueue {
                field: field.id(),
                queues: 2,
            };
            assert_eq!(refusal(&changed(|fields| fields[1] = field)), expected);
        }
    }
}

/// Requirements: G3-q
#[test]
fn g3_q_what_can_be_0_or_1_is_nothing_else() {
    let runtime = SplitRuntime {
        queue: 1.into(),
        next_available: 0.into(),
        enabled: 2,
    };
    let status = QueueStatus {
        queue: 0.into(),
        running: 0xff,
        flags: 0,
        next_used: 0.into(),
        reserved: 0.into(),
    };
    for (field, register, value) in [
        (Field::SplitRuntime(runtime), "queue_enable", 2),
        (Field::QueueStatus(status), "queue_status", 0xff),
    ] {
        let expected = ContextError::NotBoolean {
            field: field.id(),
            register,
            value,
        };
        assert_eq!(refusal(&changed(|fields| fields[1] = field)), expected);
    }
}

#[test]
fn reserved_bytes_are_ignored() {
    let mut context = golden();
    context[4 + 2..4 + 8].fill(0xff);
    let status = context.len() - 3 - 16 - 1;
    context[status] = 0xff;
    assert_eq!(decode(&context, &shape()), Ok(state()));
}

/// Requirements: S3-33, G3-q
#[test]
fn s3_33_a_refusal_names_the_field_and_what_is_wrong() {
    let field = FieldType::OwnedChains.of(3);
    let cases = [
        (
            ContextError::Length {
                field: FieldType::QueueConfig,
                len: 32,
                expected: 30,
            },
            "VQ_CFG has 32 bytes, not 30",
        ),
        (
            ContextError::QueueCount {
                found: 3,
                expected: 2,
            },
            "num_queues in PCI_COMMON_CFG is 3, not 2",
        ),
        (
            ContextError::Missing(field),
            "VQ_SPLIT_DEV_OWN_DESC of queue 3 is missing",
        ),
        (
            ContextError::NoSuchQueue { field, queues: 2 },
            "VQ_SPLIT_DEV_OWN_DESC of queue 3 in a device of 2 queues",
        ),
        (
            ContextError::UnknownType(0x2000),
            "field type 0x2000 is unknown",
        ),
    ];
    for (error, message) in cases {
        assert_eq!(error.to_string(), message);
    }
}

/// Requirements: G3-i
#[test]
fn g3_i_fields_of_both_kinds_of_rings_for_one_queue_are_refused() {
    let shape = Shape {
        packed: true,
        ..shape()
    };
    let split = state_fields(&state(), &shape);
    let mut packed = state();
    for queue in &mut packed.queues {
        queue.ring = RingState::Packed(PackedState {
            owned: vec![OwnedChain {
                id: 1,
                descriptors: 1,
                buffers: vec![],
            }],
            ..PackedState::default()
        });
    }
    let packed = state_fields(&packed, &shape);
    // Of queue 0: where it stands, and the chains.
    for (mine, other) in [(&split, &packed), (&packed, &split)] {
        let of_rings = |field: &&Field| {
            let kind = field.id().kind;
            let is_ring = kind.is_per_queue()
                && !matches!(kind, FieldType::QueueConfig | FieldType::QueueStatus);
            is_ring && field.id().queue == Some(0)
        };
        assert_eq!(other.iter().filter(of_rings).count(), 2);
        for field in other.iter().filter(of_rings) {
            let mut fields = mine.clone();
            // The place of the last is free.
            fields.pop();
            fields.push(field.clone());
            let mut decoder = Decoder::new(&shape);
            let refused = decoder.push(&assemble(&fields));
            assert_eq!(refused, Err(ContextError::Mixed(field.id())));
        }
    }
}
