//! A machine in this process to drive: real functions, over memory and interrupts that a test can look into.
//!
//! Nothing here runs on a thread of its own. Devices work when a [`Pump`] says so, and the driver calls that while it
//! waits, so what a test sees does not depend on timing.

mod loopback;
mod machine;
mod memory;
mod msi;
mod pump;
mod storage;
mod virtual_function;

pub use loopback::{Controls, Loopback, Shape};
pub use machine::{
    ECAM, HostError, HostFunction, MMIO32, MMIO64, Machine, Notifications, Place, Plugged, RAM,
};
pub use memory::HostDma;
pub use msi::{Delivery, MockMsi};
pub use pump::Pump;
pub use storage::{Access, Storage};
pub use virtual_function::VirtualFunction;
