//! The tests of the tree and what they cite, found in the tokens of its sources.
//!
//! Tokens and not lines, so that strings and comments are no tests; and not syntax trees, because functions in `proptest!`
//! have none.

use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow};
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

use super::id::Id;

/// The line of a test's documentation that lists what it holds.
const LINE: &str = "Requirements:";
/// Programs whose tests are functions without `#[test]`; there the line alone makes one.
const PROGRAMS: [&str; 2] = ["tests/e2e/", "tests/guest/"];

/// A test that cites requirements.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Test {
    /// Where it is, from the root of the tree.
    pub file: String,
    pub name: String,
    pub cites: Vec<Id>,
}

/// What the sources say about requirements.
#[derive(Debug, Default)]
pub struct Found {
    /// By file and name.
    pub tests: Vec<Test>,
    /// Citations that cannot be read or that nobody tests, to be shown to whoever wrote them.
    pub problems: Vec<String>,
}

/// Reads all sources below `root`.
pub fn tree(root: &Path) -> Result<Found> {
    let mut found = Found::default();
    directory(root, "", &mut found)?;
    found.tests.sort();
    found.problems.sort();
    Ok(found)
}

/// `path` is from the root; it is empty or ends with a slash.
fn directory(root: &Path, path: &str, found: &mut Found) -> Result<()> {
    let here = root.join(path);
    let unreadable = || here.display().to_string();
    for entry in fs::read_dir(&here).with_context(unreadable)? {
        let entry = entry.with_context(unreadable)?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let kind = entry.file_type().with_context(unreadable)?;
        let inner = format!("{path}{name}");
        if kind.is_dir() && !name.starts_with('.') && inner != "target" {
            directory(root, &format!("{inner}/"), found)?;
        } else if kind.is_file() && name.ends_with(".rs") {
            let text = fs::read_to_string(entry.path()).with_context(|| inner.clone())?;
            source(&inner, &text, found)?;
        }
    }
    Ok(())
}

/// Adds what the source `text` of `file` has.
fn source(file: &str, text: &str, found: &mut Found) -> Result<()> {
    let tokens = TokenStream::from_str(text).map_err(|error| anyhow!("{file}: {error}"))?;
    walk(file, tokens, found);
    Ok(())
}

/// What stands before an item.
#[derive(Debug, Default)]
struct Attributes {
    test: bool,
    documentation: Vec<String>,
}

impl Attributes {
    fn add(&mut self, attribute: &Group) {
        let mut tokens = attribute.stream().into_iter().peekable();
        let mut last = String::new();
        while let Some(token) =
            tokens.next_if(|token| matches!(token, TokenTree::Ident(_)) || is_punct(token, ':'))
        {
            last = token.to_string();
        }
        match (tokens.next(), tokens.next()) {
            (None, _) => self.test |= last == "test",
            (Some(_), Some(TokenTree::Literal(text))) if last == "doc" => {
                let text = text.to_string();
                self.documentation
                    .push(text.trim_matches('"').trim().to_owned());
            }
            _ => {}
        }
    }

    /// What the line lists, which goes on after a comma at its end.
    fn listed(&self) -> Option<Vec<&str>> {
        let mut lines = self.documentation.iter();
        let first = lines.find_map(|line| line.strip_prefix(LINE))?;
        let mut listed = vec![first];
        for line in lines {
            if !listed.last().is_some_and(|last| last.ends_with(',')) {
                break;
            }
            listed.push(line);
        }
        let words = listed.into_iter().flat_map(|line| {
            let line = line.trim().trim_end_matches(['.', ',']);
            line.split(',').map(str::trim)
        });
        Some(words.collect())
    }
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

fn walk(file: &str, tokens: TokenStream, found: &mut Found) {
    let mut attributes = Attributes::default();
    let mut tokens = tokens.into_iter().peekable();
    while let Some(token) = tokens.next() {
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                let inner = tokens.next_if(|token| is_punct(token, '!')).is_some();
                if let Some(TokenTree::Group(attribute)) =
                    tokens.next_if(|token| matches!(token, TokenTree::Group(_)))
                    && !inner
                {
                    attributes.add(&attribute);
                }
            }
            TokenTree::Ident(word) if word == "fn" => {
                let attributes = std::mem::take(&mut attributes);
                if let Some(TokenTree::Ident(name)) =
                    tokens.next_if(|token| matches!(token, TokenTree::Ident(_)))
                {
                    function(file, &name.to_string(), &attributes, found);
                }
            }
            TokenTree::Ident(word) if word == "pub" => {
                // Of `pub(crate)`.
                tokens.next_if(|token| {
                    matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Parenthesis)
                });
            }
            TokenTree::Ident(word)
                if ["async", "const", "extern", "unsafe"]
                    .iter()
                    .any(|qualifier| word == qualifier) => {}
            // An ABI.
            TokenTree::Literal(_) => {}
            token => {
                let attributes = std::mem::take(&mut attributes);
                if let Some(listed) = attributes.listed() {
                    let listed = listed.join(", ");
                    found
                        .problems
                        .push(format!("{file}: `{LINE} {listed}` is not above a function"));
                }
                if let TokenTree::Group(group) = token {
                    walk(file, group.stream(), found);
                }
            }
        }
    }
}

fn function(file: &str, name: &str, attributes: &Attributes, found: &mut Found) {
    let listed = attributes.listed();
    let program = PROGRAMS.iter().any(|program| file.starts_with(program));
    if !attributes.test && !program {
        if listed.is_some() {
            found
                .problems
                .push(format!("{file}: {name} lists requirements but is no test"));
        }
        return;
    }
    let mut cites = match attributes.test {
        true => Id::of_name(name),
        false => Vec::new(),
    };
    for word in listed.into_iter().flatten() {
        match Id::parse(word) {
            Some(id) => cites.push(id),
            None => found.problems.push(format!(
                "{file}: {name} cites {word:?}, which is no identifier"
            )),
        }
    }
    if cites.is_empty() {
        return;
    }
    cites.sort();
    cites.dedup();
    found.tests.push(Test {
        file: file.to_owned(),
        name: match attributes.test {
            true => name.to_owned(),
            // Such names are short, and say little without their module.
            false => format!("{}::{name}", module(file)),
        },
        cites,
    });
}

/// The last module of a file's path.
fn module(file: &str) -> &str {
    let path = file.trim_end_matches(".rs").trim_end_matches("/mod");
    path.rsplit_once('/').map_or(path, |(_, module)| module)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(file: &str, text: &str) -> (Vec<String>, Vec<String>) {
        let mut found = Found::default();
        source(file, text, &mut found).unwrap();
        let tests = found.tests.into_iter().map(|test| {
            let cites: Vec<_> = test.cites.iter().map(Id::to_string).collect();
            format!("{}: {}", test.name, cites.join(" "))
        });
        (tests.collect(), found.problems)
    }

    const NOTHING: [&str; 0] = [];

    #[test]
    fn tests_cite_by_name_and_by_line() {
        let (tests, problems) = scan(
            "devices/src/a.rs",
            r#"
            //! Requirements: E1
            /// What it is about: "quotes", and more.
            ///
            /// Requirements: S3-33, G3-p,
            /// ring.
            ///
            /// B-1, but not this.
            #[test]
            #[should_panic(expected = "test")]
            pub(crate) async fn s3_33_b8_name() {}

            #[cfg(test)]
            mod tests {
                /// Requirements: B-51
                #[tokio::test]
                async unsafe extern "C" fn anything() { let x = [1]; }
                #[test]
                fn d4_by_name() { fn e5_helper() {} }
            }
            "#,
        );
        assert_eq!(
            tests,
            [
                "s3_33_b8_name: B-8 G3-p S3-33 ring",
                "anything: B-51",
                "d4_by_name: D4"
            ]
        );
        assert_eq!(problems, NOTHING);
    }

    #[test]
    fn tests_inside_macros_count() {
        let (tests, problems) = scan(
            "pci/src/a.rs",
            r"
            proptest! {
                #![proptest_config(ProptestConfig::with_cases(64))]

                /// Requirements: D1, E3
                #[test]
                fn random_writes(
                    writes in vec((0..64u16, any::<u32>()), 1..40),
                ) { prop_assert!(true); }
                #[test]
                fn e13_every_command(x in 0..3) {}
            }
            macro_rules! tests { ($($name:ident)*) => { $(#[test] fn $name() {})* } }
            ",
        );
        assert_eq!(tests, ["random_writes: D1 E3", "e13_every_command: E13"]);
        assert_eq!(problems, NOTHING);
    }

    #[test]
    fn what_is_no_test_does_not_count() {
        let (tests, problems) = scan(
            "vmm/src/a.rs",
            r##"
            fn e1_helper() {}
            #[cfg(test)]
            fn e2_helper() {}
            #[test]
            fn plain() { let text = r#"#[test] fn e3_in_text() {}"#; }
            // #[test] fn e4_in_comment() {}
            #[test]
            const E5: u32 = 3;
            fn e5_after_an_item() {}
            "##,
        );
        assert_eq!(tests, NOTHING);
        assert_eq!(problems, NOTHING);
    }

    #[test]
    fn a_line_that_no_test_holds_is_told() {
        let (tests, problems) = scan(
            "vmm/src/a.rs",
            "/// Requirements: E1\nfn helper() {}\n/// Requirements: E1, E2\nstruct S;\n\
             /// Requirements: E3, E-4, \n#[test]\nfn both() {}",
        );
        assert_eq!(tests, ["both: E3"]);
        assert_eq!(
            problems,
            [
                "vmm/src/a.rs: helper lists requirements but is no test",
                "vmm/src/a.rs: `Requirements: E1, E2` is not above a function",
                "vmm/src/a.rs: both cites \"E-4\", which is no identifier",
            ]
        );
    }

    #[test]
    fn in_programs_of_tests_the_line_alone_counts() {
        let text = "/// Requirements: S3-8\nfn run() {}\nfn e5_other() {}";
        let (tests, problems) = scan("tests/guest/src/scenario/sriov/mod.rs", text);
        assert_eq!(tests, ["sriov::run: S3-8"]);
        assert_eq!(problems, NOTHING);
        assert_eq!(scan("tests/e2e/src/net.rs", text).0, ["net::run: S3-8"]);
    }

    #[test]
    fn a_tree_is_read_without_what_cargo_makes() {
        let root = tempfile::tempdir().unwrap();
        for (path, name) in [
            ("b/tests", "e2_two"),
            ("a/src", "e1_one"),
            ("target/debug", "e3_made"),
            (".git", "e4_hidden"),
        ] {
            let directory = root.path().join(path);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("x.rs"), format!("#[test]\nfn {name}() {{}}")).unwrap();
            fs::write(directory.join("x.txt"), "not \" Rust").unwrap();
        }
        let found = tree(root.path()).unwrap();
        let files: Vec<_> = found.tests.iter().map(|test| test.file.as_str()).collect();
        assert_eq!(files, ["a/src/x.rs", "b/tests/x.rs"]);
    }
}
