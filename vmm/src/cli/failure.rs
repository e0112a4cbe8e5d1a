//! What a command with `--json` says on standard output if it fails: `{"error": {"message": …, "status": …}}`, with the exit
//! status. The message is on standard error as well, as without `--json`.

use std::ffi::OsStr;

use serde_json::{Value, json};

use super::print::{self, say};
use crate::api::client::ClientError;
use crate::errors::chain;
use crate::exit;

/// Says why a command failed that ends with `status`. One that has answered already, as an owner's refusal is shown, has
/// said it.
pub fn say_why(error: &anyhow::Error, status: u8) {
    if print::has_said() {
        return;
    }
    let attempt = match error.downcast_ref::<ClientError>() {
        Some(ClientError::Refused(failure)) => failure.attempt.as_ref(),
        _ => None,
    };
    let mut answer = object(&chain(error.as_ref()), status);
    // How far a migration came.
    if let Some(Ok(attempt)) = attempt.map(serde_json::to_value)
        && let Some(error) = answer.get_mut("error")
    {
        error["attempt"] = attempt;
    }
    say!("{answer}");
}

/// The same for a command line that is wrong.
pub fn say_usage(error: &clap::Error) {
    say!("{}", object(&reason(&error.to_string()), exit::USAGE));
}

fn object(message: &str, status: u8) -> Value {
    json!({ "error": { "message": message, "status": status } })
}

/// The reason in what clap says, which goes on with the usage.
fn reason(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let end = ["\n\nUsage:", "\n\nFor more information"];
    let end = end.iter().filter_map(|mark| text.find(mark)).min();
    let reason = text.get(..end.unwrap_or(text.len())).unwrap_or(text);
    let lines: Vec<_> = reason.split_whitespace().collect();
    lines.join(" ")
}

/// Whether a command line asks for JSON, also one that is wrong otherwise.
pub fn wants_json<A: AsRef<OsStr>>(words: impl IntoIterator<Item = A>) -> bool {
    let mut options = words.into_iter().take_while(|word| word.as_ref() != "--");
    options.any(|word| word.as_ref() == "--json")
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn json_is_asked_for_by_the_option_alone() {
        for (words, wanted) in [
            (&["tern", "info", "--json"][..], true),
            (&["tern", "--json"], true),
            (&["tern", "info"], false),
            (&["tern", "info", "--", "--json"], false),
            (&["tern", "info", "--jso"], false),
        ] {
            assert_eq!(wants_json(words), wanted, "{words:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_command_line_is_said_without_the_usage() {
        for (words, part) in [
            (&["info", "--json"][..], "--api-socket <PATH>"),
            (
                &["info", "--json", "--colour"],
                "unexpected argument '--colour'",
            ),
            (
                &["migrate", "--json", "--api-socket", "s", "tcp:h"],
                "no :PORT after the host",
            ),
        ] {
            let error = Cli::try_parse_from([&["tern"], words].concat()).unwrap_err();
            let said = reason(&error.to_string());
            assert!(said.contains(part), "{said}");
            assert!(!said.contains("Usage") && !said.contains('\n'), "{said}");
        }
    }
}
