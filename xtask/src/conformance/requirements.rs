//! The requirements, read from `docs/requirements.toml`.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::id::Id;

/// Whose a requirement is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the device does.
    Device,
    /// What a driver owes the device, which copes with one that does not pay.
    Driver,
    /// What a word or a field means.
    Definition,
    /// How we fill a gap. It needs no test of its own.
    Decision,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Driver => "driver",
            Self::Definition => "definition",
            Self::Decision => "decision",
        })
    }
}

/// How far a section is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum State {
    /// Each requirement has a test, or a reason to have none.
    #[serde(rename = "built")]
    Built,
    /// Not complete: no tests are asked for.
    #[serde(rename = "planned")]
    Planned,
    /// Left out on purpose.
    #[serde(rename = "not offered")]
    NotOffered,
}

/// A requirement in our words.
#[derive(Debug)]
pub struct Requirement {
    pub id: Id,
    pub kind: Kind,
    pub text: String,
    /// Why it has no test.
    pub untested: Option<String>,
}

/// Requirements with the same subject and state, in the order of their identifiers, decisions last.
#[derive(Debug)]
pub struct Section {
    pub title: String,
    pub about: Option<String>,
    pub state: State,
    pub requirements: Vec<Requirement>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    section: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    title: String,
    about: Option<String>,
    state: State,
    #[serde(default)]
    device: BTreeMap<String, String>,
    #[serde(default)]
    driver: BTreeMap<String, String>,
    #[serde(default)]
    definition: BTreeMap<String, String>,
    #[serde(default)]
    decision: BTreeMap<String, String>,
    #[serde(default)]
    untested: BTreeMap<String, String>,
}

/// The sections of `text`. Each identifier is in it once, and no number of a family is left out.
pub fn parse(text: &str) -> Result<Vec<Section>> {
    let file: File = toml::from_str(text)?;
    let sections = file.section.into_iter().map(section);
    let sections: Vec<_> = sections.collect::<Result<_>>()?;
    let mut ids: Vec<&Id> = all(&sections).map(|requirement| &requirement.id).collect();
    ids.sort();
    let mut last: Option<&Id> = None;
    for id in ids {
        match last.filter(|last| last.is_kin(id)) {
            Some(last) if last == id => bail!("{id} is there twice"),
            Some(last) => ensure!(
                last.next().as_ref() == Some(id),
                "{id} follows {last}, and what is between them is missing"
            ),
            None => ensure!(id.is_first(), "{id} is not the first of its family"),
        }
        last = Some(id);
    }
    Ok(sections)
}

/// The requirements of all sections.
pub fn all(sections: &[Section]) -> impl Iterator<Item = &Requirement> {
    sections.iter().flat_map(|section| &section.requirements)
}

fn section(entry: Entry) -> Result<Section> {
    let mut untested = entry.untested;
    let mut requirements = Vec::new();
    for (kind, texts) in [
        (Kind::Device, entry.device),
        (Kind::Driver, entry.driver),
        (Kind::Definition, entry.definition),
        (Kind::Decision, entry.decision),
    ] {
        for (id, text) in texts {
            let untested = untested.remove(&id);
            for cell in [Some(&text), untested.as_ref()].into_iter().flatten() {
                let plain = !cell.is_empty() && !cell.contains(['|', '\n']);
                ensure!(plain, "{id}: a text is one line without |");
            }
            let id = Id::parse(&id).with_context(|| format!("{id} is not an identifier"))?;
            requirements.push(Requirement {
                id,
                kind,
                text,
                untested,
            });
        }
    }
    if let Some(id) = untested.keys().next() {
        bail!(
            "{id} is untested, but not a requirement of {:?}",
            entry.title
        );
    }
    requirements.sort_by(|a, b| {
        let key = |it: &Requirement| it.kind == Kind::Decision;
        key(a).cmp(&key(b)).then_with(|| a.id.cmp(&b.id))
    });
    Ok(Section {
        title: entry.title,
        about: entry.about,
        state: entry.state,
        requirements,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_are_in_the_order_of_their_ids_and_decisions_last() {
        let text = r#"
            [[section]]
            title = "One"
            about = "First."
            state = "built"
            [section.device]
            S0-2 = "b"
            S0-10 = "j"
            [section.driver]
            S0-1 = "a"
            [section.definition]
            S0-3 = "c"
            [section.decision]
            G0-a = "x"
            [section.untested]
            S0-3 = "words"
            [[section]]
            title = "Two"
            state = "not offered"
            [section.device]
            S0-4 = "d"
            S0-5 = "e"
            S0-6 = "f"
            S0-7 = "g"
            S0-8 = "h"
            S0-9 = "i"
        "#;
        let sections = parse(text).unwrap();
        let [one, two] = sections.as_slice() else {
            panic!("{sections:?}");
        };
        let rows = one.requirements.iter();
        let rows = rows.map(|row| (row.id.to_string(), row.kind, row.text.as_str()));
        let expected = [
            ("S0-1", Kind::Driver, "a"),
            ("S0-2", Kind::Device, "b"),
            ("S0-3", Kind::Definition, "c"),
            ("S0-10", Kind::Device, "j"),
            ("G0-a", Kind::Decision, "x"),
        ];
        assert!(rows.eq(expected.map(|(id, kind, text)| (id.to_owned(), kind, text))));
        assert_eq!(one.requirements[2].untested.as_deref(), Some("words"));
        assert_eq!(one.about.as_deref(), Some("First."));
        assert_eq!((one.state, two.state), (State::Built, State::NotOffered));
    }

    #[test]
    fn what_cannot_be_right_is_refused_with_the_place() {
        let head = "[[section]]\ntitle = \"T\"\nstate = \"built\"\n";
        for (rest, reason) in [
            (
                "[section.device]\nB-1 = \"a\"\nB-3 = \"c\"",
                "B-3 follows B-1",
            ),
            ("[section.device]\nB-2 = \"a\"", "B-2 is not the first"),
            (
                "[section.device]\nB-1 = \"a\"\n[section.driver]\nB-1 = \"b\"",
                "B-1 is there twice",
            ),
            (
                "[section.device]\nring = \"a\"\n[section.driver]\nring = \"b\"",
                "ring is there twice",
            ),
            ("[section.device]\nB1 = \"a\"", "B1 is not an identifier"),
            ("[section.device]\nB-1 = \"a|b\"", "B-1: a text"),
            ("[section.device]\nB-1 = \"\"", "B-1: a text"),
            (
                "[section.device]\nB-1 = \"a\"\n[section.untested]\nB-2 = \"a\"",
                "B-2 is untested",
            ),
            ("[section.devices]\nB-1 = \"a\"", "devices"),
        ] {
            let error = parse(&format!("{head}{rest}")).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(parse("[[section]]\ntitle = \"T\"\nstate = \"done\"").is_err());
    }
}
