//! Device models that know nothing of PCI or KVM.
//!
//! | module | what it holds |
//! |---|---|
//! | [`bus`] | address-mapped regions and the look-up every guest access takes |
//! | [`memory`] | guest RAM, and the view through which each function reaches it |
//! | [`gate`] | the one predicate that says whether a function may touch its rings |
//! | [`virtio`] | the virtio core: status, features, queues; and the contract a device fulfils |
//! | [`state`] | what moves with a function: the one struct that saved forms are encodings of |
//! | [`context`] | that struct as a device context: fields of type, length and value |
//! | [`admin`] | device groups: an owner, its members, and administration commands |
//! | [`transport_vq`] | the transport virtqueue: managed devices, and the commands that make and drive them |
//! | [`block`] | virtio-block: a raw image file or block device as a disk |
//! | [`net`] | virtio-net: on a host tap, or on a switch that connects functions |
//! | [`rng`] | virtio-rng: the host's entropy |
//! | [`console`] | virtio-console: one port on the terminal or a file |
//! | [`msi`] | message-signalled interrupts: what the machine implements, and vectors with mask and pending bit |
//! | [`parameters`] | what drivers see of devices and no option asks for |
//! | [`io`] | the I/O thread that turns kicks and backend events into work |
//!
//! Everything here can be driven from a plain test, without a guest, a bus or a hypervisor.

pub mod admin;
pub mod block;
pub mod bus;
pub mod console;
pub mod context;
pub mod gate;
pub mod io;
pub mod memory;
pub mod msi;
pub mod net;
pub mod parameters;
pub mod rng;
pub mod state;
#[cfg(test)]
mod testing;
pub mod transport_vq;
pub mod virtio;

/// Compiles the usage example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
