//! Documents that are wrong in every way.

use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Root {
    format: String,
    version: u64,
    #[serde(default)]
    functions: Vec<Function>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Function {
    size: u16,
}

impl Document for Root {
    const FORMAT: &'static str = "tern-snapshot";
    const VERSIONS: RangeInclusive<u64> = 1..=2;

    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

const HEAD: &str = r#"{"format":"tern-snapshot","version":1"#;

fn message(text: &str) -> String {
    let message = parse::<Root>(text.as_bytes()).unwrap_err().to_string();
    assert!(message.len() < 3 * MAX_QUOTE, "{} bytes", message.len());
    message
}

#[test]
fn a_document_is_the_same_after_json() {
    let root = Root {
        format: "tern-snapshot".to_owned(),
        version: 2,
        functions: vec![Function { size: 7 }, Function { size: 0 }],
    };
    let text = write(&root).unwrap();
    assert_eq!(parse::<Root>(&text), Ok(root));
    assert!(text.starts_with(b"{\n  \"format\": \"tern-snapshot\",\n  \"version\": 2,\n"));
}

#[test]
fn a_newer_version_is_said_to_be_one_whatever_follows() {
    let newer = "version: this snapshot has format version 7; this tern reads versions 1 to 2";
    for text in [
        r#"{"format":"tern-snapshot","version":7}"#,
        r#"{"format":"tern-snapshot","version":7,"functions":"all","new":{}}"#,
        r#"{"format":"tern-snapshot","version":7,"functions":[{"#,
        r#"{"format":"tern-snapshot","version":7,"#,
        r#"{"functions":7,"version":7,"format":"tern-snapshot"}"#,
    ] {
        assert_eq!(message(text), newer, "{text}");
    }
    for (version, found) in [
        ("0", "0"),
        ("1.0", "neither a number nor a string"),
        ("\"1\"", "\"1\""),
        ("-1", "neither a number nor a string"),
        ("null", "neither a number nor a string"),
        ("{}", "neither a number nor a string"),
        ("[7]", "neither a number nor a string"),
        ("18446744073709551616", "neither a number nor a string"),
    ] {
        let text = format!(r#"{{"format":"tern-snapshot","version":{version}}}"#);
        let expected = format!(
            "version: this snapshot has format version {found}; this tern reads versions 1 to 2"
        );
        assert_eq!(message(&text), expected);
    }
}

#[test]
fn other_documents_are_refused_by_their_name() {
    for (text, expected) in [
        (
            r#"{"format":"qcow","version":3}"#,
            "format: this is \"qcow\", not \"tern-snapshot\"",
        ),
        (
            r#"{"format":3,"version":3}"#,
            "format: this is 3, not \"tern-snapshot\"",
        ),
        (r#"{"format":"tern-snapshot"}"#, "version: is missing"),
        (r#"{"version":1}"#, "format: is missing"),
        ("{}", "format: is missing"),
        ("[]", "format: is missing"),
        ("7", "format: is missing"),
        (
            r#"{"a":{"format":"tern-snapshot","version":1}}"#,
            "format: is missing",
        ),
    ] {
        assert_eq!(message(text), expected);
    }
}

#[test]
fn errors_name_the_place() {
    for (rest, expected) in [
        (
            r#","functions":[{"size":1},[2]]}"#,
            "functions[1]: is a list, and has to be an object",
        ),
        (
            r#","functions":[{"size":1},{"size":70000}]}"#,
            "functions[1].size: invalid value: integer `70000`, expected u16",
        ),
        (
            r#","functions":[{"size":-1}]}"#,
            "functions[0].size: invalid value: integer `-1`",
        ),
        (
            r#","functions":[{"size":1.5}]}"#,
            "functions[0].size: invalid type: floating point `1.5`",
        ),
        (
            r#","functions":[{"size":"1"}]}"#,
            "functions[0].size: invalid type: string \"1\"",
        ),
        (
            r#","functions":[{}]}"#,
            "functions[0]: missing field `size`",
        ),
        (
            r#","functions":[{"size":1,"colour":2}]}"#,
            "functions[0].colour: unknown field `colour`, expected `size`",
        ),
        (
            r#","functions":{}}"#,
            "functions: invalid type: map, expected a sequence",
        ),
        (
            r#","functions":[{"size":1,"size":1}]}"#,
            "functions[0].size: is there twice",
        ),
        (r#","version":1}"#, "version: is there twice"),
        (
            r#","functions":[],"a":{"b":[{},{"c":1,"d":2,"c":3}]}}"#,
            "a.b[1].c: is there twice",
        ),
        (r#"}}"#, "trailing characters at line 1 column 39"),
        ("", "EOF while parsing an object at line 1 column 37"),
        (
            r#","functions":[1e999]}"#,
            "functions[0]: number out of range at line 1 column 56",
        ),
        (
            ",\"a\":\"\u{1}\"}",
            "a: control character (\\u0000-\\u001F) found while parsing a string",
        ),
        (r#","a":"\ud800"}"#, "a: unexpected end of hex escape"),
    ] {
        let message = message(&format!("{HEAD}{rest}"));
        assert!(message.starts_with(expected), "{message}: {expected}");
    }
    let invalid = [HEAD.as_bytes(), b",\"\xff\":1}"].concat();
    let message = parse::<Root>(&invalid).unwrap_err().to_string();
    assert!(
        message.starts_with("invalid unicode code point"),
        "{message}"
    );
}

#[test]
fn limits_hold() {
    let deep = |levels: usize| {
        format!(
            "{HEAD},\"a\":{}{}}}",
            "[".repeat(levels),
            "]".repeat(levels)
        )
    };
    assert!(message(&deep(MAX_DEPTH)).starts_with("a: unknown field `a`"));
    let error = message(&deep(MAX_DEPTH + 1));
    assert!(
        error.ends_with("[0]: nested more than 32 levels deep"),
        "{error}"
    );
    assert!(error.starts_with("a[0][0]"), "{error}");
    // Long before the stack is of interest.
    message(&deep(1 << 20));
    message(&format!("{HEAD},\"a\":{}", "{\"b\":".repeat(1 << 20)));

    let members: Vec<_> = (0..=MAX_MEMBERS).map(|n| format!("\"{n}\":0")).collect();
    let error = message(&format!("{HEAD},\"a\":{{{}}}}}", members.join(",")));
    assert_eq!(
        error,
        "a.4096: there are more than 4096 members beside this one"
    );

    let values = "0,".repeat(MAX_VALUES as usize);
    let error = message(&format!("{HEAD},\"a\":[{values}0]}}"));
    assert_eq!(
        error,
        "a[8388604]: there are more than 8388608 values up to here"
    );

    let long = vec![b' '; MAX_LEN + 1];
    let error = parse::<Root>(&long).unwrap_err();
    assert_eq!(
        error.to_string(),
        "167772161 bytes are more than 167772160, the most that are read"
    );
}

#[test]
fn messages_are_short() {
    let long = "é".repeat(1 << 16);
    for text in [
        format!("{HEAD},\"{long}\":1,\"{long}\":2}}"),
        format!("{HEAD},\"{long}\":1}}"),
        format!("{HEAD},\"functions\":[{{\"size\":\"{long}\"}}]}}"),
        format!("{{\"format\":\"{long}\",\"version\":1}}"),
        format!("{{\"format\":\"tern-snapshot\",\"version\":\"{long}\"}}"),
    ] {
        assert!(message(&text).contains('…'));
    }
}
