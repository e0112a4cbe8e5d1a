//! An SR-IOV owner and its members, the way a Linux guest finds, negotiates and uses them.
//!
//! Everything here goes through configuration space, BARs, guest memory and interrupts, as a guest would. The
//! documentation of a test lists the requirements it holds; see `docs/conformance.md`.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod admin_queue;
mod members;
