//! JSON text that a person can read: what fits into a line is on one.

/// Longest line of more than one value, in bytes.
const WIDTH: usize = 160;
/// Spaces of each level.
const INDENT: usize = 2;

/// An object or array of the text.
#[derive(Clone, Copy)]
struct Span {
    /// Bytes of it on one line.
    width: usize,
    /// There is no object or array in it.
    flat: bool,
}

/// How an object or array is laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// On one line.
    Line,
    /// A line for each member.
    Broken,
    /// As many entries on a line as fit: a long list of numbers.
    Filled,
}

/// Lays out `compact`, JSON without any space between its tokens, as `serde_json` writes it.
pub fn lay_out(compact: &[u8]) -> Vec<u8> {
    let mut spans = measure(compact).into_iter();
    let mut writer = Writer {
        text: Vec::with_capacity(compact.len() + compact.len() / 4),
        line: 0,
        modes: Vec::new(),
    };
    let mut at = 0;
    while let Some(&byte) = compact.get(at) {
        let len = match byte {
            b'"' => string_len(&compact[at..]),
            _ => 1,
        };
        let token = compact.get(at..at + len).unwrap_or_default();
        at += len;
        let rest = compact.get(at..).unwrap_or_default();
        match byte {
            b'{' | b'[' => writer.open(byte, spans.next()),
            b'}' | b']' => writer.close(byte),
            b',' => writer.comma(rest),
            b':' => writer.put(b": "),
            _ => writer.put(token),
        }
    }
    writer.put(b"\n");
    writer.text
}

/// Bytes of the string that `text` begins with, quotes included.
fn string_len(text: &[u8]) -> usize {
    let mut escaped = false;
    let inside = text.iter().skip(1).position(|byte| {
        let ends = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        ends
    });
    inside.map_or(text.len(), |len| len + 2)
}

/// The objects and arrays of `compact`, in the order in which they begin.
fn measure(compact: &[u8]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    // Of each that is open: its place among the spans, and the width up to it.
    let mut open: Vec<(usize, usize)> = Vec::new();
    let (mut at, mut width) = (0, 0);
    while let Some(&byte) = compact.get(at) {
        let len = match byte {
            b'"' => string_len(&compact[at..]),
            _ => 1,
        };
        at += len;
        // A space follows on a line.
        let space = usize::from(matches!(byte, b',' | b':'));
        match byte {
            b'{' | b'[' => {
                if let Some((outer, _)) = open.last()
                    && let Some(outer) = spans.get_mut(*outer)
                {
                    outer.flat = false;
                }
                open.push((spans.len(), width));
                spans.push(Span {
                    width: 0,
                    flat: true,
                });
            }
            b'}' | b']' => {
                if let Some((span, start)) = open.pop()
                    && let Some(span) = spans.get_mut(span)
                {
                    span.width = width + 1 - start;
                }
            }
            _ => {}
        }
        width += len + space;
    }
    spans
}

struct Writer {
    text: Vec<u8>,
    /// Where the last line begins.
    line: usize,
    modes: Vec<Mode>,
}

impl Writer {
    fn put(&mut self, bytes: &[u8]) {
        self.text.extend_from_slice(bytes);
    }

    fn column(&self) -> usize {
        self.text.len() - self.line
    }

    fn new_line(&mut self) {
        self.text.push(b'\n');
        self.line = self.text.len();
        let spaces = self.modes.len() * INDENT;
        self.text.resize(self.line + spaces, b' ');
    }

    fn open(&mut self, byte: u8, span: Option<Span>) {
        let fits = |span: Span| self.column() + span.width < WIDTH;
        let mode = match (self.modes.last(), span) {
            (Some(Mode::Line), _) | (_, None) => Mode::Line,
            // The document itself is a member on each line.
            (Some(_), Some(span)) if fits(span) => Mode::Line,
            (_, Some(span)) if span.width <= 2 => Mode::Line,
            (_, Some(span)) if span.flat && byte == b'[' => Mode::Filled,
            _ => Mode::Broken,
        };
        self.put(&[byte]);
        self.modes.push(mode);
        if mode != Mode::Line {
            self.new_line();
        }
    }

    fn close(&mut self, byte: u8) {
        if self.modes.pop().is_some_and(|mode| mode != Mode::Line) {
            self.new_line();
        }
        self.put(&[byte]);
    }

    /// A comma, before `rest`.
    fn comma(&mut self, rest: &[u8]) {
        self.put(b",");
        let breaks = match self.modes.last() {
            Some(Mode::Broken) => true,
            Some(Mode::Filled) => {
                let next = match rest.first() {
                    Some(b'"') => string_len(rest),
                    _ => rest.iter().take_while(|byte| !b",]".contains(byte)).count(),
                };
                self.column() + 2 + next > WIDTH
            }
            _ => false,
        };
        if breaks {
            self.new_line();
        } else {
            self.put(b" ");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn text(value: &Value) -> String {
        String::from_utf8(lay_out(&serde_json::to_vec(value).unwrap())).unwrap()
    }

    #[test]
    fn what_fits_is_on_a_line() {
        let long = "x".repeat(200);
        let value = json!({
            "a": [{ "b": 1, "c": "}\"],:{" }, [], {}],
            "d": { "long": long },
            "e": vec![1_000_000_000u32; 20],
        });
        let numbers = |count| vec!["1000000000"; count].join(", ");
        let expected = format!(
            "{{\n  \"a\": [{{\"b\": 1, \"c\": \"}}\\\"],:{{\"}}, [], {{}}],\n  \"d\": {{\n    \"long\": \"{long}\"\n  }},\n  \
             \"e\": [\n    {},\n    {}\n  ]\n}}\n",
            numbers(13),
            numbers(7)
        );
        assert_eq!(text(&value), expected);
        assert_eq!(text(&json!({ "a": 1 })), "{\n  \"a\": 1\n}\n");
        assert_eq!(text(&json!({})), "{}\n");
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<u64>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            "[ -~é\\\\\"\n]{0,40}".prop_map(Value::from),
            Just(Value::Null),
        ];
        leaf.prop_recursive(6, 200, 20, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..20).prop_map(Value::from),
                prop::collection::btree_map("[a-z\\\\\"]{0,9}", inner, 0..9)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn the_value_is_the_same(value in any_json()) {
            let text = text(&value);
            prop_assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), value);
            prop_assert!(text.lines().all(|line| line.trim_end() == line));
        }
    }
}
