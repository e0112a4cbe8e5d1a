//! The JSON of `state.json`.
//!
//! Types here are never the running ones, and are read as hostile input: unknown fields are errors, and every list is
//! bounded by what is checked after parsing. Numbers of more than 32 bits, masks and bytes are strings in hexadecimal,
//! since JSON readers keep 53 bits at most.
//!
//! | module | what is in it |
//! |---|---|
//! | [`hex`] | numbers and bytes in hexadecimal |
//! | [`machine`] | the specification of a machine |
//! | [`cpu`] | the processor the guest sees, and its vCPUs |
//! | [`irqchip`] | the interrupt controllers that vCPUs share |
//! | [`clock`] | the guest's clock |
//! | [`error`] | errors that name a place in the JSON |
//! | [`version`] | versions of sections |
//! | [`document`] | a whole document: limits, from bytes to types and back |
//! | [`diff`] | what differs between two documents |
//! | [`layout`] | text that a person can read |
//! | [`schema`] | the JSON Schema of a document |
//! | [`context`] | the device context of a function |
//! | [`function`] | a virtio function |
//! | [`owner`] | an SR-IOV owner: the sessions of its drivers |
//! | [`managed`] | managed devices of a management device |
//! | [`parameters`] | what drivers see of devices and no option asks for |
//! | [`pci`] | registers on the PCI bus |
//! | [`moving`] | documents of a live migration |
//! | [`config_space`] | a configuration space in lines |
//! | [`serial`] | the serial port |
//! | [`state`] | the document as a whole |

pub mod clock;
pub mod config_space;
pub mod context;
pub mod cpu;
pub mod diff;
pub mod document;
pub mod error;
pub mod function;
#[cfg(test)]
mod golden;
pub mod hex;
pub mod irqchip;
pub mod layout;
pub mod machine;
pub mod managed;
pub mod moving;
pub mod owner;
pub mod parameters;
pub mod pci;
pub mod schema;
pub mod serial;
pub mod state;
pub mod version;

pub use document::{FormatError, parse, write};
