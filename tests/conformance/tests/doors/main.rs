//! The ways a driver can stop its device, or one queue of it: SUSPEND in both its forms, DEVICE_STOPPED, and the
//! device-state structure. On functions of their own and on members of an owner, and with all of them together.
//!
//! Everything here goes through configuration space, BARs, guest memory and interrupts, as a guest would. The
//! documentation of a test lists the requirements it holds; see `docs/conformance.md`.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod checks;
mod device_state;
mod device_stop;
mod devices;
mod rig;
mod suspend_v1_4;
mod suspend_v5;
mod together;
