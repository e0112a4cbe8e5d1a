//! Errors that name a place in the JSON.

use std::fmt;

/// Why a value was rejected after it was parsed, and where in the document it is.
///
/// A conversion makes one with [`Invalid::new`] where it looks at the value; each level above adds its part of the path
/// with [`At`]. `Display` is `functions[3].context[7].size: REASON`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    path: String,
    reason: String,
}

impl Invalid {
    /// Rejects the value that is being looked at.
    pub fn new(reason: impl fmt::Display) -> Self {
        Self::at("", reason)
    }

    /// Rejects the value at `path`.
    pub fn at(path: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            path: path.into(),
            reason: reason.to_string(),
        }
    }

    /// The path, as in `functions[3].context[7].size`; empty for the document itself.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// What is wrong.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    fn below(mut self, step: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') {
            ""
        } else {
            "."
        };
        self.path = format!("{step}{dot}{}", self.path);
        self
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.reason)
        } else {
            write!(f, "{}: {}", self.path, self.reason)
        }
    }
}

impl std::error::Error for Invalid {}

/// Extends the path of an error by one level.
pub trait At<T> {
    /// The value is in field `name`.
    fn field(self, name: &str) -> Result<T, Invalid>;
    /// The value is entry `index` of a list.
    fn entry(self, index: usize) -> Result<T, Invalid>;
}

impl<T> At<T> for Result<T, Invalid> {
    fn field(self, name: &str) -> Self {
        self.map_err(|error| error.below(name))
    }

    fn entry(self, index: usize) -> Self {
        self.map_err(|error| error.below(&format!("[{index}]")))
    }
}

/// Converts each entry of a list; an error names the entry.
pub fn convert_all<'a, A: 'a, B>(
    list: impl IntoIterator<Item = &'a A>,
    convert: impl Fn(&'a A) -> Result<B, Invalid>,
) -> Result<Vec<B>, Invalid> {
    let entries = list.into_iter().enumerate();
    entries
        .map(|(index, value)| convert(value).entry(index))
        .collect()
}

/// Longest name of a function or owner, in bytes.
const MAX_NAME: usize = 64;

/// Rejects a name that is longer than any: it is quoted in messages.
pub fn check_name(name: &str) -> Result<(), Invalid> {
    if name.len() > MAX_NAME {
        let reason = format!("has {} bytes; names have {MAX_NAME} at most", name.len());
        return Err(Invalid::new(reason)).field("name");
    }
    Ok(())
}

/// Rejects a list that does not ascend strictly.
pub fn check_ascending<T: Copy + PartialOrd + fmt::Display>(list: &[T]) -> Result<(), Invalid> {
    for (index, pair) in list.windows(2).enumerate() {
        if let &[before, after] = pair
            && before >= after
        {
            let reason = format!("{after} follows {before}; the list ascends");
            return Err(Invalid::new(reason)).entry(index + 1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_built_from_the_inside() {
        let size = Err::<(), _>(Invalid::new("is 0"));
        assert_eq!(size.clone().unwrap_err().to_string(), "is 0");
        let error = size.field("size").entry(7).field("context").entry(3);
        let error = error.field("functions").unwrap_err();
        assert_eq!(error.path(), "functions[3].context[7].size");
        assert_eq!(error.reason(), "is 0");
        assert_eq!(error.to_string(), "functions[3].context[7].size: is 0");
    }

    #[test]
    fn lists_ascend() {
        assert_eq!(check_ascending(&[1, 2, 9]), Ok(()));
        let error = check_ascending(&[1, 2, 2]).unwrap_err();
        assert_eq!(error.to_string(), "[2]: 2 follows 2; the list ascends");
    }
}
