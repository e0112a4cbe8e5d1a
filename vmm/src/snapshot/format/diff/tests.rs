//! Documents that differ.

use serde_json::json;

use super::*;

fn lines(first: &Value, second: &Value) -> Vec<String> {
    let found = compare(first, second, &[], 100);
    found.shown.iter().map(ToString::to_string).collect()
}

#[test]
fn what_is_the_same_does_not_differ() {
    let value = json!({ "a": [1, { "b": null }], "c": "00112233445566778899" });
    assert!(compare(&value, &value.clone(), &[], 0).is_empty());
}

#[test]
fn fields_are_named_by_their_paths() {
    let first = json!({ "a": 1, "b": { "c": [1, 2], "d": "x" }, "e": null, "g": [{}, { "h": 1 }] });
    let second = json!({ "a": "1", "b": { "c": [1, 3], "d": "y" }, "f": true, "g": [{ "h": 1 }] });
    assert_eq!(
        lines(&first, &second),
        [
            "a: 1 -> 1",
            "b.c[1]: 2 -> 3",
            "b.d: x -> y",
            "e: only in the first: null",
            "f: only in the second: true",
            "g[0].h: only in the second: 1",
            "g[1]: only in the first: {\"h\":1}",
        ]
    );
    assert_eq!(
        lines(&json!({ "heads": [1, 2] }), &json!({ "heads": [2] })),
        ["heads: [1,2] -> [2]"]
    );
    assert_eq!(lines(&json!([1]), &json!({})), [": [1] -> {}"]);
}

#[test]
fn objects_are_matched_by_what_names_them() {
    let function = |name: &str, status: u8| json!({ "name": name, "status": status });
    let first = json!({ "functions": [function("disk0", 1), function("net0", 2)] });
    let second =
        json!({ "functions": [function("rng", 3), function("net0", 4), function("disk0", 1)] });
    assert_eq!(
        lines(&first, &second),
        [
            "functions: order disk0, net0 -> net0, disk0",
            "functions[net0].status: 2 -> 4",
            "functions[rng]: only in the second: {\"name\":\"rng\",\"status\":3}",
        ]
    );
    let msr = |index: &str, value: u8| json!({ "index": index, "value": value });
    assert_eq!(
        lines(
            &json!([msr("0x10", 1), msr("0x11", 1)]),
            &json!([msr("0x11", 2), msr("0x10", 1)])
        ),
        [": order 0x10, 0x11 -> 0x11, 0x10", "[0x11].value: 1 -> 2"]
    );
    let queue = |index: u8, size: u8| json!({ "type": "VQ_CFG", "queue": index, "size": size });
    let config = json!({ "type": "DEV_CFG", "config": "00" });
    assert_eq!(
        lines(
            &json!([queue(0, 8), queue(1, 8), config]),
            &json!([queue(1, 4), config]),
        ),
        [
            "[VQ_CFG of queue 0]: only in the first: {\"queue\":0,\"size\":8,\"type\":\"VQ_CFG\"}",
            "[VQ_CFG of queue 1].size: 8 -> 4",
        ]
    );
    // Two of the same name: by position.
    assert_eq!(
        lines(
            &json!([queue(0, 8), queue(0, 9)]),
            &json!([queue(0, 8), queue(0, 7)])
        ),
        ["[1].size: 9 -> 7"]
    );
    // By the next that names all, if one has no name.
    assert_eq!(
        lines(
            &json!([{ "id": 1, "x": 1 }, { "id": 2, "name": "b" }]),
            &json!([{ "id": 2, "name": "c" }, { "id": 1, "x": 1 }]),
        ),
        [": order id 1, id 2 -> id 2, id 1", "[id 2].name: b -> c"]
    );
}

#[test]
fn bytes_differ_at_offsets() {
    let first = "00112233445566778899aabbccddeeff";
    let second = "00ff2233445566778899aaddccddee00";
    assert_eq!(
        lines(&json!(first), &json!(second)),
        [": at byte 0x1 11 -> ff; at byte 0xb bb -> dd; at byte 0xf ff -> 00;"]
    );
    let zebra = "00".repeat(40);
    let stripes = "0000ff00".repeat(10);
    assert_eq!(
        lines(&json!({ "a": zebra }), &json!({ "a": stripes })),
        [
            "a: at byte 0x2 00 -> ff; at byte 0x6 00 -> ff; at byte 0xa 00 -> ff; at byte 0xe 00 -> ff; and 6 more places"
        ]
    );
    // All different, of another length, or no bytes.
    for (first, second) in [
        ("00".repeat(8), "11".repeat(8)),
        ("00".repeat(8), "00".repeat(9)),
        ("0x00000000000000".to_owned(), "0x00000000000001".to_owned()),
    ] {
        assert_eq!(
            lines(&json!(first), &json!(second)),
            [format!(": {first} -> {second}")]
        );
    }
}

#[test]
fn output_is_bounded_and_counted() {
    let first: Vec<_> = (0..1000).collect();
    let second: Vec<_> = (1..1001).collect();
    let found = compare(&json!(first), &json!(second), &[], 10);
    assert_eq!((found.shown.len(), found.more), (10, 990));
    let long = lines(&json!({ "a": "é".repeat(1000) }), &json!({ "a": null }));
    assert_eq!(
        long,
        [format!("a: {}… (2000 bytes) -> null", "é".repeat(40))]
    );
}

#[test]
fn what_is_ignored_is_not_looked_at() {
    let first = json!({ "id": 1, "a": { "b": [1], "c": 1 } });
    let second = json!({ "id": 2, "a": { "b": [2], "c": 1 }, "d": 1 });
    let ignore = ["id".to_owned(), "a.b".to_owned(), "d".to_owned()];
    assert!(compare(&first, &second, &ignore, 10).is_empty());
    let ignore = ["i".to_owned(), "a.b[0]".to_owned()];
    assert_eq!(compare(&first, &second, &ignore, 10).shown.len(), 2);
}
