//! The device migration commands, the way an owner's driver uses them: over the administration virtqueue of a PF whose VFs
//! are behind a root port with it, and from the monitor.
//!
//! A test cites the requirements it holds; see `docs/conformance.md`.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod context_read;
mod context_write;
mod in_flight;
mod modes;
mod records;
mod rig;
mod round_trip;
mod sessions;
