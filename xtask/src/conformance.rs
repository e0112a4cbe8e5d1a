//! `cargo xtask conformance`: the table of requirements and the tests that hold them.

mod id;
mod requirements;
mod scan;
mod table;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use crate::workspace;
use table::Table;

const REQUIREMENTS: &str = "docs/requirements.toml";
const TABLE: &str = "docs/conformance.md";

/// `cargo xtask conformance`
#[derive(Debug, Args)]
pub struct Conformance {
    /// Change nothing, and fail if the table is stale
    #[arg(long)]
    check: bool,
    /// Only print the requirements without a test, section by section, those of planned ones included
    #[arg(long, conflicts_with = "check")]
    missing: bool,
}

impl Conformance {
    pub fn run(self) -> Result<i32> {
        let root = workspace::root();
        let problems = if self.missing {
            print!("{}", missing(&root)?);
            Vec::new()
        } else if self.check {
            check(&root)?
        } else {
            write(&root)?
        };
        for problem in &problems {
            eprintln!("xtask: {problem}");
        }
        Ok(i32::from(!problems.is_empty()))
    }
}

/// What to call with the requirements and tests of the tree at `root`.
fn with_table<T>(root: &Path, then: impl FnOnce(&Table, Vec<String>) -> T) -> Result<T> {
    let text = fs::read_to_string(root.join(REQUIREMENTS)).context(REQUIREMENTS)?;
    let sections = requirements::parse(&text).context(REQUIREMENTS)?;
    let found = scan::tree(root)?;
    let table = Table::new(&sections, &found);
    let mut problems = found.problems.clone();
    problems.extend(table.problems());
    Ok(then(&table, problems))
}

/// Writes the table, whatever is wrong with what is in it, and returns that.
fn write(root: &Path) -> Result<Vec<String>> {
    let (text, problems) = with_table(root, |table, problems| (table.markdown(), problems))?;
    fs::write(root.join(TABLE), text).context(TABLE)?;
    Ok(problems)
}

/// What is wrong with the table and with what is in it.
fn check(root: &Path) -> Result<Vec<String>> {
    let (text, mut problems) = with_table(root, |table, problems| (table.markdown(), problems))?;
    let old = fs::read_to_string(root.join(TABLE)).context(TABLE)?;
    if old != text {
        let same = old.lines().zip(text.lines()).take_while(|(a, b)| a == b);
        let line = same.count() + 1;
        problems.push(format!(
            "{TABLE} is stale from line {line} on: run `cargo xtask conformance`, and commit it"
        ));
    }
    Ok(problems)
}

/// A line per section that has requirements without tests.
fn missing(root: &Path) -> Result<String> {
    with_table(root, |table, _| {
        let sections = table.sections().iter().filter_map(|section| {
            let ids: Vec<_> = table.missing(section).map(|it| it.id.to_string()).collect();
            let title = &section.title;
            (!ids.is_empty()).then(|| format!("{title} ({}): {}\n", ids.len(), ids.join(" ")))
        });
        sections.collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tree with a built section of two requirements, one of which has a test.
    fn small_tree() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in [
            (
                REQUIREMENTS,
                "[[section]]\ntitle = \"T\"\nstate = \"built\"\n[section.device]\nE1 = \"a\"\nE2 = \"b\"\n",
            ),
            (TABLE, "by hand\n"),
            ("a.rs", "#[test]\nfn e1_one() {}\n"),
        ] {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_table_is_stale_until_it_is_made_again() {
        let root = small_tree();
        let root = root.path();
        let stale = "docs/conformance.md is stale from line 1 on: run `cargo xtask conformance`, and commit it";
        let untested = "E2 has no test, and its section is built: b";
        assert_eq!(check(root).unwrap(), [untested, stale]);
        assert_eq!(write(root).unwrap(), [untested]);
        assert_eq!(check(root).unwrap(), [untested]);
        fs::write(root.join("b.rs"), "#[test]\nfn e2_two() {}").unwrap();
        assert!(check(root).unwrap()[0].starts_with("docs/conformance.md is stale from line"));
        assert!(write(root).unwrap().is_empty());
        assert!(check(root).unwrap().is_empty());
    }

    #[test]
    fn a_line_added_at_the_end_makes_it_stale() {
        let root = small_tree();
        let root = root.path();
        write(root).unwrap();
        let text = fs::read_to_string(root.join(TABLE)).unwrap();
        fs::write(root.join(TABLE), text + "more\n").unwrap();
        assert_eq!(check(root).unwrap().len(), 2);
    }

    #[test]
    fn what_is_missing_is_listed_by_section() {
        let root = small_tree();
        assert_eq!(missing(root.path()).unwrap(), "T (1): E2\n");
    }

    #[test]
    fn the_requirements_of_this_tree_are_well_formed() {
        let text = fs::read_to_string(workspace::root().join(REQUIREMENTS)).unwrap();
        requirements::parse(&text).unwrap();
    }
}
