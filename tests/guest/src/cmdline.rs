//! What to do, from the kernel command line.
//!
//! `tern.run=NAME[:KEY=VALUE…][,NAME…]` names scenarios in the order in which they run. `tern.demo` and `tern.shell`
//! are short for `tern.run=demo` and `tern.run=shell`; without any of them it is the shell.

use std::collections::BTreeMap;
use std::str::FromStr;

use crate::{Context, Failure, Result};

/// One scenario to run, with its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    pub name: String,
    parameters: BTreeMap<String, String>,
}

impl Request {
    /// A parameter, or its default.
    pub fn text<'a>(&'a self, key: &str, default: &'a str) -> &'a str {
        self.parameters.get(key).map_or(default, String::as_str)
    }

    /// A parameter that has no default.
    pub fn required(&self, key: &str) -> Result<&str> {
        let value = self.parameters.get(key).map(String::as_str);
        value.ok_or_else(|| Failure(format!("it needs {key}=")))
    }

    /// A parameter that is a number, or its default.
    pub fn number<T: FromStr>(&self, key: &str, default: T) -> Result<T> {
        match self.parameters.get(key) {
            None => Ok(default),
            Some(text) => text
                .parse()
                .map_err(|_| Failure(format!("{key}={text} is not a number"))),
        }
    }

    /// A parameter that no scenario of this name has.
    pub fn unknown_parameter(&self, known: &[&str]) -> Option<&str> {
        self.parameters
            .keys()
            .map(String::as_str)
            .find(|key| !known.contains(key))
    }
}

/// The scenarios that a kernel command line asks for.
pub fn scenarios(line: &str) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for word in line.split_whitespace() {
        // The kernel keeps the quotes around what was quoted.
        let word = word.trim_matches('"');
        match word.split_once('=') {
            Some(("tern.run", list)) => {
                for item in list.trim_matches('"').split(',') {
                    requests.push(request(item)?);
                }
            }
            None if word == "tern.demo" || word == "tern.shell" => {
                requests.push(request(&word[5..])?)
            }
            _ if word.starts_with("tern.") => {
                return Err(Failure(format!("unknown parameter {word}")));
            }
            _ => {}
        }
    }
    if requests.is_empty() {
        requests.push(request("shell")?);
    }
    Ok(requests)
}

fn request(item: &str) -> Result<Request> {
    let mut parts = item.split(':');
    let name = parts.next().unwrap_or_default().to_owned();
    if name.is_empty() {
        return Err(Failure("a scenario without a name".into()));
    }
    let pair = |part: &str| {
        let (key, value) = part
            .split_once('=')
            .ok_or("no value")
            .context(format_args!("{name}: {part}"))?;
        Ok((key.to_owned(), value.to_owned()))
    };
    let parameters = parts.map(pair).collect::<Result<_>>()?;
    Ok(Request { name, parameters })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(line: &str) -> Vec<String> {
        scenarios(line)
            .unwrap()
            .into_iter()
            .map(|request| request.name)
            .collect()
    }

    #[test]
    fn scenarios_run_in_the_order_they_are_named() {
        let line = "console=ttyS0 quiet tern.run=block-write:seed=7:mib=32,net-ping panic=-1 tern.run=boot\n";
        let requests = scenarios(line).unwrap();
        assert_eq!(names(line), ["block-write", "net-ping", "boot"]);
        assert_eq!(requests[0].number("seed", 0u64).unwrap(), 7);
        assert_eq!(requests[0].number("mib", 1u64).unwrap(), 32);
        assert_eq!(requests[1].number("mib", 10u64).unwrap(), 10);
    }

    #[test]
    fn short_forms_and_the_default() {
        assert_eq!(names("quiet tern.demo"), ["demo"]);
        assert_eq!(names("tern.shell"), ["shell"]);
        assert_eq!(names("quiet"), ["shell"]);
        assert_eq!(names(""), ["shell"]);
    }

    #[test]
    fn quotes_are_no_part_of_it() {
        assert_eq!(names("\"tern.run=boot,reset\""), ["boot", "reset"]);
        assert_eq!(names("tern.run=\"boot,reset\""), ["boot", "reset"]);
    }

    #[test]
    fn a_value_may_contain_an_equals_sign() {
        let requests = scenarios("tern.run=a:k=v=w").unwrap();
        assert_eq!(requests[0].text("k", ""), "v=w");
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for (line, message) in [
            ("tern.run=", "a scenario without a name"),
            ("tern.run=boot,", "a scenario without a name"),
            ("tern.run=boot:seed", "boot: seed: no value"),
            ("tern.rum=boot", "unknown parameter tern.rum=boot"),
            ("tern.boot", "unknown parameter tern.boot"),
        ] {
            assert_eq!(scenarios(line).unwrap_err().to_string(), message, "{line}");
        }
    }

    #[test]
    fn parameters_are_checked() {
        let request = &scenarios("tern.run=x:a=1:b=many").unwrap()[0];
        assert_eq!(request.unknown_parameter(&["a", "b"]), None);
        assert_eq!(request.unknown_parameter(&["a"]), Some("b"));
        assert!(request.number("b", 0u32).is_err());
        assert!(request.required("c").is_err());
        assert_eq!(request.required("a").unwrap(), "1");
    }
}
