//! The transport virtqueue and managed devices (proposal 004), from their driver's side.
//!
//! Everything here goes through configuration space, BARs, guest memory and interrupts, as a guest would. The
//! documentation of a test lists the requirements it holds; see `docs/conformance.md`. That of a comment of the proposal's
//! reviewer is an `M`.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod configuration;
mod features;
mod interrupts;
mod lifecycle;
mod queues;
mod refusals;
mod resets;
mod rig;
mod saved;
