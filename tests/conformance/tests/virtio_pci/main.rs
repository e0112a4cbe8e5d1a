//! A virtio-pci function from its driver's side, register by register.
//!
//! Everything here goes through configuration space, BARs, guest memory and interrupts, as a guest would. The
//! documentation of a test lists the requirements it holds; see `docs/conformance.md`.

// Helpers of tests, which clippy does not know for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bus_master;
mod capabilities;
mod common_configuration;
mod device_configuration;
mod features;
mod function_reset;
mod msix;
mod notification;
mod packed;
mod queue_reset;
mod reset;
mod rings;
mod same;
mod window;
