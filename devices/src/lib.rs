//! Device models that know nothing of PCI or KVM.
//!
//! | module | what it holds |
//! |---|---|
//! | [`bus`] | address-mapped regions and the look-up every guest access takes |
//! | [`memory`] | guest RAM, and the view through which each function reaches it |
//!
//! Everything here can be driven from a plain test, without a guest, a bus or a hypervisor.

pub mod bus;
pub mod memory;
