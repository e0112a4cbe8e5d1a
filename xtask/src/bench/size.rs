//! Sizes of guests and of what is done to them.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::Serialize;

/// Mebibytes, written `256M` or `4G`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Mib(pub u64);

impl Mib {
    const MAX: u64 = 64 << 10;

    pub fn bytes(self) -> u64 {
        self.0 << 20
    }
}

impl FromStr for Mib {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (digits, factor) = match (text.strip_suffix('M'), text.strip_suffix('G')) {
            (Some(digits), _) => (digits, 1),
            (_, Some(digits)) => (digits, 1024),
            _ => bail!("{text} has no unit: write 256M or 4G"),
        };
        let size = digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(factor));
        let size = size.filter(|size| (1..=Self::MAX).contains(size));
        Ok(Self(size.with_context(|| {
            format!("{text} is not between 1M and 64G")
        })?))
    }
}

impl fmt::Display for Mib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            mib if mib > 0 && mib.is_multiple_of(1024) => write!(f, "{}G", mib / 1024),
            mib => write!(f, "{mib}M"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_bounds() {
        for (text, mib) in [("1M", 1), ("256M", 256), ("4G", 4096), ("64G", 65536)] {
            let size: Mib = text.parse().unwrap();
            assert_eq!((size.0, size.to_string().as_str()), (mib, text));
        }
        assert_eq!("2048M".parse::<Mib>().unwrap().to_string(), "2G");
        for bad in [
            "",
            "4",
            "G",
            "0M",
            "-1G",
            "1T",
            "65G",
            "99999999999999999999G",
            "é",
        ] {
            assert!(bad.parse::<Mib>().is_err(), "{bad}");
        }
    }
}
