//! What the parameters of all device types have in common.
//!
//! A device type has a `Parameters`: the numbers that a driver sees of a device and that no option asks for, such as the
//! sizes of its virtqueues. Their defaults are those of new devices, and may change. A device that takes over the state of
//! another is built with the parameters of that one, whatever the defaults are by then. They come from outside, so that
//! each has a `check`, and a device is built with none that it refuses.

use std::fmt::Display;
use std::ops::RangeInclusive;

/// A parameter that a device cannot be built with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value}; {allowed}")]
pub struct BadParameter {
    /// Its name.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What it could be.
    pub allowed: String,
}

/// Refuses a value out of `range`.
pub(crate) fn within<T: PartialOrd + Display>(
    field: &'static str,
    value: T,
    range: RangeInclusive<T>,
) -> Result<(), BadParameter> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(BadParameter {
        field,
        value: value.to_string(),
        allowed: format!("it can be {low} to {high}"),
    })
}

/// Refuses a value that is no power of two, or out of `range`.
pub(crate) fn power_of_two(
    field: &'static str,
    value: u32,
    range: RangeInclusive<u32>,
) -> Result<(), BadParameter> {
    if value.is_power_of_two() && range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(BadParameter {
        field,
        value: value.to_string(),
        allowed: format!("it can be a power of two from {low} to {high}"),
    })
}

/// Most entries of a virtqueue that a device here has. Devices bound what they hold by it.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Refuses a size that a virtqueue of at least `least` entries cannot have.
pub(crate) fn queue_size(value: u16, least: u16) -> Result<(), BadParameter> {
    power_of_two(
        "queue_size",
        value.into(),
        least.into()..=MAX_QUEUE_SIZE.into(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_field_and_what_it_can_be() {
        assert_eq!(
            queue_size(96, 2).unwrap_err().to_string(),
            "queue_size is 96; it can be a power of two from 2 to 1024"
        );
        assert_eq!(
            within("seg_max", 0, 1..=254).unwrap_err().to_string(),
            "seg_max is 0; it can be 1 to 254"
        );
    }

    #[test]
    fn queues_have_a_power_of_two_of_entries() {
        let good: Vec<_> = (0..=u16::MAX)
            .filter(|n| queue_size(*n, 4).is_ok())
            .collect();
        assert_eq!(good, [4, 8, 16, 32, 64, 128, 256, 512, 1024]);
    }
}
