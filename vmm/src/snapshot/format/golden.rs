//! The document with something of everything that `vmm/tests/golden` keeps of each version of the format.

use std::path::Path;

use super::state::{NEWEST, State, tests::sample};
use super::{parse, write};

/// Write documents that are not there. One that is there is never written again.
const WRITE: &str = "TERN_WRITE_GOLDEN";

#[test]
fn a_document_with_everything_is_written_as_it_was_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let path = golden.join(format!("v{NEWEST}/whole.json"));
    if std::env::var_os(WRITE).is_some() && !path.exists() {
        std::fs::write(&path, write(&sample()).unwrap()).unwrap();
    }
    let text = std::fs::read(&path).unwrap();
    let state: State = parse(&text).unwrap();
    assert_eq!(
        String::from_utf8(write(&state).unwrap()),
        String::from_utf8(text)
    );
}
