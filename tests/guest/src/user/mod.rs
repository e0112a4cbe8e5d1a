//! What `driver` needs to drive a PCI function from this process: its registers through sysfs, and memory whose
//! physical addresses are known.

pub mod function;
mod mapping;
pub mod memory;
