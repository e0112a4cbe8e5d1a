//! Snapshots without KVM: what is saved of devices that are in use is what they go on from, what was written once is
//! always understood, and what nobody wrote is refused by name.
//!
//! | module | what it tries |
//! |---|---|
//! | [`directory`] | directories that are no snapshots, or somebody else's |
//! | [`drivers`] | what drives the devices meanwhile |
//! | [`golden`] | documents of every version of the format |
//! | [`hostile`] | documents that no monitor wrote |
//! | [`live`] | devices in use, moved into another machine |
//! | [`managed`] | managed devices in use, moved into another machine |
//! | [`rig`] | machines in this process |

// Helpers state what must hold, like the tests they are part of.
#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used)]

mod directory;
mod drivers;
mod golden;
mod hostile;
mod live;
mod managed;
mod rig;
