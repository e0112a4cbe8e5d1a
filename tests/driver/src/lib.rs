//! Driver-side virtio: the other end of every device, for tests on the host and inside a guest.
//!
//! | module | what it holds |
//! |---|---|
//! | [`access`] | the two traits a place must implement for this driver to run in it, and typed registers |
//! | [`pci`] | finding functions, walking capabilities, sizing BARs, programming MSI-X |
//! | [`virtio`] | the virtio-pci transport, split virtqueues, and small drivers for a block and a network device |
//! | `host` | a machine in this process to drive (feature `host`, on by default) |
//!
//! The driver keeps to the rules when its high-level calls are used, and gets out of the way of a test that wants to
//! break them: every register can be written raw, and every byte of a ring is reachable.

pub mod access;
#[cfg(feature = "host")]
pub mod host;
pub mod pci;
pub mod virtio;

/// Compiles the usage example of the README.
#[cfg(all(doctest, feature = "host"))]
#[doc = include_str!("../README.md")]
struct Readme;
