//! `docs/conformance.md`: the requirements beside the tests that cite them, and what is wrong with that.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::id::Id;
use super::requirements::{self, Kind, Requirement, Section, State};
use super::scan::{Found, Test};

/// What stands above the tables.
const HEAD: &str = "\
# Conformance

<!-- Made by `cargo xtask conformance` of docs/requirements.toml and the tests. Do not edit. -->

Requirements have short identifiers, which code and tests cite. A test cites them in a line `Requirements: S3-33, E4` of
its documentation, or with the beginning of its name, `s3_33_e4_`. A requirement of the kind *driver* is what a driver owes
the device, and its tests show that the device copes with one that does not pay; a *decision* is how we fill a gap of the
text, and needs no test of its own. *Tested* says that at least one test cites the requirement, not that no case is left.

`cargo xtask conformance` makes this file of `docs/requirements.toml` and the tests. CI runs it with `--check`, which fails if
this file is stale, if a test cites what does not exist, or if a requirement of a section that is built has no test.
";

/// Requirements and tests, joined.
#[derive(Debug)]
pub struct Table<'a> {
    sections: &'a [Section],
    tests: BTreeMap<&'a Id, Vec<&'a Test>>,
}

impl<'a> Table<'a> {
    pub fn new(sections: &'a [Section], found: &'a Found) -> Self {
        let mut tests: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for test in &found.tests {
            for id in &test.cites {
                tests.entry(id).or_default().push(test);
            }
        }
        Self { sections, tests }
    }

    pub fn sections(&self) -> &'a [Section] {
        self.sections
    }

    fn tests(&self, requirement: &Requirement) -> &[&'a Test] {
        self.tests.get(&requirement.id).map_or(&[], Vec::as_slice)
    }

    /// What has to be put right before the table may be committed.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (id, tests) in &self.tests {
            if !requirements::all(self.sections).any(|requirement| requirement.id == **id) {
                for Test { file, name, .. } in tests {
                    problems.push(format!(
                        "{file}: {name} cites {id}, which docs/requirements.toml does not have"
                    ));
                }
            }
        }
        for section in self.sections {
            for requirement in &section.requirements {
                let Requirement { id, untested, .. } = requirement;
                if untested.is_some() && !self.tests(requirement).is_empty() {
                    problems.push(format!(
                        "{id} has a test now: remove it from `untested` in docs/requirements.toml"
                    ));
                }
            }
            if section.state == State::Built {
                for Requirement { id, text, .. } in self.missing(section) {
                    problems.push(format!(
                        "{id} has no test, and its section is built: {text}"
                    ));
                }
            }
        }
        problems
    }

    /// The requirements of `section` that want a test, in whatever state it is.
    pub fn missing<'b>(&'b self, section: &'b Section) -> impl Iterator<Item = &'b Requirement> {
        section.requirements.iter().filter(|requirement| {
            requirement.kind != Kind::Decision
                && requirement.untested.is_none()
                && self.tests(requirement).is_empty()
        })
    }

    fn state(&self, section: &Section, requirement: &Requirement) -> String {
        let tested = !self.tests(requirement).is_empty();
        let state = match (section.state, requirement.kind, &requirement.untested) {
            (_, _, Some(reason)) => return format!("no test: {reason}"),
            (_, Kind::Decision, _) if !tested => "decided",
            (State::Built, _, _) if tested => "tested",
            (State::Built, _, _) => "**no test**",
            (State::Planned, _, _) if tested => "partly tested",
            (State::Planned, _, _) => "not built yet",
            (State::NotOffered, _, _) => "not offered",
        };
        state.to_owned()
    }

    /// The whole file.
    pub fn markdown(&self) -> String {
        let mut text = String::from(HEAD);
        text.push_str("\n| section | requirements | with a test | state |\n|---|---|---|---|\n");
        for section in self.sections {
            let rows = section.requirements.iter();
            let rows = rows.filter(|requirement| requirement.kind != Kind::Decision);
            let tested = rows
                .clone()
                .filter(|requirement| !self.tests(requirement).is_empty());
            let state = match section.state {
                State::Built => "built",
                State::Planned => "not complete",
                State::NotOffered => "not offered",
            };
            let (title, all, tested) = (&section.title, rows.count(), tested.count());
            let _ = writeln!(text, "| {title} | {all} | {tested} | {state} |");
        }
        for section in self.sections {
            let _ = write!(text, "\n## {}\n\n", section.title);
            if let Some(about) = &section.about {
                let _ = write!(text, "{about}\n\n");
            }
            text.push_str("| id | kind | requirement | tests | state |\n|---|---|---|---|---|\n");
            for requirement in &section.requirements {
                let tests = self.tests(requirement).iter();
                let tests: Vec<_> = tests
                    .map(|Test { file, name, .. }| format!("[{name}](../{file})"))
                    .collect();
                let _ = writeln!(
                    text,
                    "| {} | {} | {} | {} | {} |",
                    requirement.id,
                    requirement.kind,
                    requirement.text,
                    tests.join("<br>"),
                    self.state(section, requirement)
                );
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(tests: &[(&str, &[&str])]) -> Found {
        let tests = tests.iter().map(|(name, cites)| Test {
            file: "pci/src/a.rs".to_owned(),
            name: (*name).to_owned(),
            cites: cites.iter().map(|id| Id::parse(id).unwrap()).collect(),
        });
        Found {
            tests: tests.collect(),
            problems: Vec::new(),
        }
    }

    fn sections(state: &str) -> Vec<Section> {
        let text = format!(
            "[[section]]\ntitle = \"Title\"\nabout = \"About.\"\nstate = \"{state}\"\n\
             [section.device]\nB-1 = \"First\"\nB-2 = \"Second\"\n\
             [section.definition]\nB-3 = \"Third\"\n\
             [section.decision]\nG0-a = \"Chosen\"\n\
             [section.untested]\nB-3 = \"just a word\"\n"
        );
        requirements::parse(&text).unwrap()
    }

    /// The rows of all tables with identifiers.
    fn rows(state: &str, tests: &[(&str, &[&str])]) -> Vec<String> {
        let (sections, found) = (sections(state), found(tests));
        let text = Table::new(&sections, &found).markdown();
        let rows = text.lines().skip_while(|line| !line.starts_with("| id |"));
        rows.skip(2).map(str::to_owned).collect()
    }

    fn problems(state: &str, tests: &[(&str, &[&str])]) -> Vec<String> {
        let (sections, found) = (sections(state), found(tests));
        Table::new(&sections, &found).problems()
    }

    #[test]
    fn rows_have_links_to_the_tests_and_a_state() {
        assert_eq!(
            rows("built", &[("one", &["B-1"]), ("two", &["B-1", "G0-a"])]),
            [
                "| B-1 | device | First | [one](../pci/src/a.rs)<br>[two](../pci/src/a.rs) | tested |",
                "| B-2 | device | Second |  | **no test** |",
                "| B-3 | definition | Third |  | no test: just a word |",
                "| G0-a | decision | Chosen | [two](../pci/src/a.rs) | tested |",
            ]
        );
    }

    #[test]
    fn what_is_not_built_says_so() {
        let state_of = |state| {
            let rows = rows(state, &[("one", &["B-1"])]);
            let states = rows.iter().filter_map(|row| row.rsplit('|').nth(1));
            states
                .map(|state| state.trim().to_owned())
                .collect::<Vec<_>>()
        };
        let reason = "no test: just a word";
        assert_eq!(
            state_of("planned"),
            ["partly tested", "not built yet", reason, "decided"]
        );
        assert_eq!(
            state_of("not offered"),
            ["not offered", "not offered", reason, "decided"]
        );
    }

    #[test]
    fn sections_are_counted_without_decisions() {
        let (sections, found) = (sections("planned"), found(&[("one", &["B-1", "G0-a"])]));
        let text = Table::new(&sections, &found).markdown();
        assert!(
            text.contains("\n| Title | 3 | 1 | not complete |\n"),
            "{text}"
        );
        assert!(text.contains("\n## Title\n\nAbout.\n\n| id |"), "{text}");
    }

    #[test]
    fn only_what_is_built_needs_tests() {
        assert_eq!(
            problems("built", &[("one", &["B-1"])]),
            ["B-2 has no test, and its section is built: Second"]
        );
        for state in ["planned", "not offered"] {
            assert!(problems(state, &[]).is_empty(), "{state}");
        }
    }

    #[test]
    fn what_tests_cite_exists_and_is_not_called_untested() {
        assert_eq!(
            problems("planned", &[("one", &["B-3", "B-4"])]),
            [
                "pci/src/a.rs: one cites B-4, which docs/requirements.toml does not have",
                "B-3 has a test now: remove it from `untested` in docs/requirements.toml",
            ]
        );
    }
}
