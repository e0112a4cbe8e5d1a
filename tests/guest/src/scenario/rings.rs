//! `packed`: virtio devices whose driver uses packed virtqueues.

use std::fs;

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Result, check};

/// Number of VIRTIO_F_RING_PACKED.
const RING_PACKED: usize = 34;

pub fn packed(request: &Request) -> Result<Found> {
    let expected: usize = request.number("devices", 1)?;
    let directory = "/sys/bus/virtio/devices";
    let (mut packed, mut split) = (0, 0);
    for entry in fs::read_dir(directory).context(directory)? {
        let path = entry.context(directory)?.path();
        if !path.join("driver").exists() {
            continue;
        }
        let path = path.join("features");
        let features = fs::read_to_string(&path).context(path.display().to_string())?;
        match is_set(&features, RING_PACKED) {
            true => packed += 1,
            false => split += 1,
        }
    }
    check(packed == expected, || {
        format!(
            "{packed} devices have packed virtqueues and {split} split ones; {expected} should have packed ones"
        )
    })?;
    Ok(Found::default().with("packed", packed).with("split", split))
}

/// Whether a bit is set, in the form in which sysfs shows them: a digit each, from 0 on.
fn is_set(features: &str, bit: usize) -> bool {
    features.as_bytes().get(bit) == Some(&b'1')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_counted_from_the_left() {
        assert!(is_set("0010\n", 2));
        assert!(!is_set("0010\n", 1) && !is_set("0010\n", 4) && !is_set("", 0));
    }
}
