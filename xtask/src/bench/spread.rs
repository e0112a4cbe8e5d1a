//! Medians with their ranges.

use std::fmt;

use anyhow::{Context, Result};
use serde::Serialize;

use super::median;

/// One kind of figure, from all rounds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    pub fn of(values: impl Iterator<Item = f64>) -> Result<Self> {
        let values: Vec<f64> = values.collect();
        Ok(Self {
            median: median(&values).context("nothing was measured")?,
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }

    /// Microseconds, in a unit that suits the median.
    pub fn time(self) -> Shown {
        match self.median {
            us if us >= 1e6 => self.shown(1e6, 2, " s"),
            us if us >= 1e5 => self.shown(1e3, 0, " ms"),
            us if us >= 1e3 => self.shown(1e3, 1, " ms"),
            _ => self.shown(1.0, 0, " µs"),
        }
    }

    /// Bytes in MiB.
    pub fn size(self) -> Shown {
        self.shown(f64::from(1 << 20), 1, " MiB")
    }

    pub fn ratio(self) -> Shown {
        self.shown(1.0, 2, "")
    }

    fn shown(self, divisor: f64, digits: usize, unit: &'static str) -> Shown {
        Shown {
            spread: self,
            divisor,
            digits,
            unit,
        }
    }
}

/// A median with its unit, and the range if there is one.
pub struct Shown {
    spread: Spread,
    divisor: f64,
    digits: usize,
    unit: &'static str,
}

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spread { median, min, max } = self.spread;
        let number = |value: f64| format!("{:.*}", self.digits, value / self.divisor);
        let (low, high) = (number(min), number(max));
        write!(f, "{}{}", number(median), self.unit)?;
        if low != high {
            write!(f, " ({low} to {high})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(values: &[f64]) -> Spread {
        Spread::of(values.iter().copied()).unwrap()
    }

    #[test]
    fn figures_have_units_and_ranges() {
        let time = |values: &[f64]| spread(values).time().to_string();
        assert_eq!(time(&[1.5e6, 2e6, 1e6]), "1.50 s (1.00 to 2.00)");
        assert_eq!(time(&[123_456.0, 99_999.0]), "100.0 ms (100.0 to 123.5)");
        assert_eq!(
            time(&[250_000.0, 300_400.0, 400_000.0]),
            "300 ms (250 to 400)"
        );
        assert_eq!(time(&[950.0]), "950 µs");
        assert_eq!(spread(&[3.2, 3.2]).ratio().to_string(), "3.20");
        let mib = f64::from(1 << 20);
        assert_eq!(
            spread(&[mib, 2.0 * mib, 3.0 * mib]).size().to_string(),
            "2.0 MiB (1.0 to 3.0)"
        );
        assert!(Spread::of([].into_iter()).is_err());
    }
}
