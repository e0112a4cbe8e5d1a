//! The state of a snapshot.

use devices::context::{Decoder, Field};
use devices::state::Shape;
use serde_json::{Map, Value};
use vmm::snapshot::format::context::Context;
use vmm::snapshot::format::diff;
use vmm::snapshot::format::state::State;
use vmm::snapshot::format::{parse, write};

use crate::input::Input;

/// A snapshot with something of everything.
const WHOLE: &str = include_str!("../corpus/snapshot_state/whole.json");

/// Whoever made `state.json` wrote anything, or changed some of a good one. It is refused by name, or can be written and
/// read again. Bytes that are framed as a device context come back from JSON.
pub fn snapshot_state(data: &[u8]) {
    document(data);
    let mut input = Input::new(data);
    let mut value: Value = serde_json::from_str(WHOLE).expect("a good one");
    let good = value.clone();
    for _ in 0..input.pick(4) {
        change(&mut value, &mut input);
    }
    let parsed = document(value.to_string().as_bytes());
    assert!(parsed || value != good, "what nobody changed is a good one");
    let found = diff::compare(&good, &value, &[], 8);
    assert_eq!(found.is_empty(), good == value);
    for difference in &found.shown {
        assert!(difference.to_string().len() < 4096, "{difference}");
    }
    context(input.rest());
}

/// True if the bytes are a state.
fn document(bytes: &[u8]) -> bool {
    match parse::<State>(bytes) {
        Ok(state) => {
            let text = write(&state).expect("what was read can be written");
            assert_eq!(parse(&text).as_ref(), Ok(&state), "and read again");
            true
        }
        Err(error) => {
            assert!(error.to_string().len() < 4096, "{error}");
            false
        }
    }
}

/// Changes something in `value`: the choices lead to a member, and say what becomes of it.
pub(crate) fn change(value: &mut Value, input: &mut Input<'_>) {
    let inside = match value {
        Value::Object(members) if !members.is_empty() => {
            let at = usize::from(input.byte()) % members.len();
            members.values_mut().nth(at)
        }
        Value::Array(entries) if !entries.is_empty() => {
            let at = usize::from(input.byte()) % entries.len();
            entries.get_mut(at)
        }
        _ => None,
    };
    // Mostly, it is somewhere deeper.
    if let Some(inside) = inside
        && input.pick(8) != 0
    {
        return change(inside, input);
    }
    match (value, input.pick(12)) {
        (Value::Object(members), 0..4) => {
            let name = members.keys().nth(usize::from(input.byte()) % 8).cloned();
            members.remove(&name.unwrap_or_default());
        }
        (Value::Object(members), 4..6) => {
            let name = members.keys().next().cloned().unwrap_or_default();
            members.insert(format!("{name}{}", input.byte()), Value::Null);
        }
        (Value::Array(entries), 0..4) => {
            let again = entries.clone();
            entries.extend(again);
        }
        (Value::Array(entries), 4..6) => entries.reverse(),
        (value, 6) => *value = Value::from(input.qword()),
        (value, 7) => *value = Value::from(format!("{:#x}", input.qword())),
        (value, 8) => *value = Value::from(f64::from(input.dword()) / 8.0),
        (value, 9) => *value = Value::from("0f".repeat(input.word().into())),
        (value, 10) => *value = Value::Object(Map::new()),
        (value, _) => *value = Value::from(u64::from(input.byte())),
    }
}

fn context(bytes: &[u8]) {
    let shape = Shape {
        queue_sizes: vec![8],
        config_len: 3,
        queue_status: true,
        packed: true,
    };
    let Ok(context) = Context::decode(bytes) else {
        return;
    };
    let text = serde_json::to_vec(&context).expect("JSON");
    let again: Context = serde_json::from_slice(&text).expect("JSON");
    assert_eq!(again, context);
    assert_eq!(again.encode().as_deref(), Ok(bytes));
    let mut decoder = Decoder::new(&shape);
    let pushed = decoder.push(bytes);
    let state = context.state(&shape);
    if pushed.is_ok() && !decoder.is_partial() {
        assert_eq!(Some(state.expect("a state")), decoder.take_latest());
    } else {
        assert!(state.is_err(), "one was refused, and this was not");
    }
    let fields: Vec<Field> = (context.0.iter())
        .filter_map(|field| field.plain().expect("it was decoded"))
        .collect();
    let named = Context::of_fields(&fields);
    assert!(named.0.len() <= context.0.len());
}
