//! The transport virtqueue (proposal 004): managed devices, which have no PCI function of their own. A driver creates, sets up,
//! starts and destroys them by commands on a virtqueue of their *management device*.
//!
//! A managed device is a [`VirtioFunction`](crate::virtio::VirtioFunction) as any other, with the same gate and the same device
//! models. This is the transport around it: what a PCI function has in registers, it has in commands; its interrupts are messages
//! of its own, and its doorbells a page of the management device.
//!
//! ```text
//! bytes ─► Request (class, command, device id) ─► Manager ─► seat with that id ─► VirtioFunction
//!                                                   └─► CREATE: the first seat that fits gets an id
//! ```
//!
//! A *seat* is what the host has ready for one device: a backend behind a function. CREATE makes a device of one, DESTROY gives
//! it back. What a device can be is so decided by whoever started the machine, and not by the guest.
//!
//! | class | command | | out | in |
//! |---|---|---|---|---|
//! | 1 | 0 | AVAIL_RES GET | | u16 num_avail_vqs, min_mdev_vqs, max_mdev_vqs, num_avail_mdev |
//! | 2 | 0 | MDEV CREATE | u32 device type, u64 features, u8 config\[\] | u64 id |
//! | 2 | 1 | MDEV DESTROY | | |
//! | 3 | 0, 2 | FEAT DEVICE_GET, DRIVER_GET | | u64\[\], as many as there is room for |
//! | 3 | 1 | FEAT DRIVER_SET | u64\[\] | |
//! | 4 | 0, 1 | STATUS SET, GET | u8 | u8 |
//! | 5 | 0 | GENERATION GET | | u8 |
//! | 6 | 0, 1 | CONFIG GET, SET | u32 offset, u32 size, of SET the bytes | of GET the bytes |
//! | 7 | 0 | MSI VQ_SET | u16 queue, u64 address, u32 data | |
//! | 7 | 1, 2 | MSI VQ_ENABLE, VQ_MASK | u16 queue, u8: 1 enables; 0 masks, 1 unmasks (G4-c) | |
//! | 7 | 3, 4, 5 | MSI CONFIG_SET, CONFIG_ENABLE, CONFIG_MASK | the same without queue | |
//! | 7 | 6, 7 | MSI VQ_GET, CONFIG_GET † | u16 queue; nothing | \[u16 queue,\] u64 address, u32 data, u8 enabled, unmasked, pending |
//! | 8 | 0, 1 † | VQ_ADDR SET, GET | u16 queue, u64 descriptor, device, driver area; u16 queue | \[queue,\] the areas |
//! | 9 | 0, 1 | VQ_ENABLE SET, GET | u16 queue, u8; u16 queue | \[queue,\] u8 |
//! | 10 | 0, 1 | VQ_SIZE SET, GET | u16 queue, u16 size; u16 queue | \[queue,\] u16 size |
//! | 11 | 1 | VQ_NOTIFY GET | u16 queue | u64 address, u64 size |
//! | 12 | 0, 1 | VQ_STATE SET, GET | u16 queue, and split: u16 available index; packed: u16 available wrap counter, index, used wrap counter, index | \[queue,\] the same |
//! | 13 | 1, 2 † | VQ_ASID SET, GET | u16 queue, u32 asid; u16 queue | \[queue,\] u32 asid |
//! | 14 | 1 | VQ_RESET | u16 queue | |
//!
//! † Ours (M19, G4-h). `[queue]` is there in the aligned layout only (M24); layouts are in [`envelope`].
//!
//! # What the proposal leaves open
//!
//! * CREATE: `features` are those that the device offers. `config` is the beginning of the device configuration it is to have;
//!   zeroes, or none, ask for nothing in particular. It fails if no seat of that type could be such a device (S4-8, M9), and with
//!   another error if all that could are taken.
//! * A virtqueue that is disabled keeps its registers and goes on where it was, unless VQ_STATE says otherwise. The command is
//!   complete when nothing is in flight (G4-o). The same for resets (S4-15, M26) and DESTROY (G4-l).
//! * A ring that lies outside guest memory makes VQ_ENABLE fail, and the device goes on.
//! * A write of the virtqueue's index, 2 bytes, to the address that VQ_NOTIFY returns is a kick (G4-q).
//! * There is one address space, 0 (S4-42). Others do not exist, and ASID SET fails for them.
//! * A managed device reaches memory and sends messages while its management device may, by Bus Master Enable. A reset of that
//!   destroys all devices, and is complete when none has anything in flight (G4-m).
//!
//! # Threats
//!
//! | threat | what stops it |
//! |---|---|
//! | a command of any length, even none | every field is read with its bounds; a missing one is [`Error::Length`] |
//! | a length that makes the monitor allocate | at most [`MAX_COMMAND`] bytes of a command are looked at, and as many of an answer are made |
//! | ids, virtqueues, ranges that do not exist | looked up before anything is done |
//! | a command that fails half done | checks come first; each command is one change of the function |
//! | a device that is destroyed under its I/O | it is reset like any other, and the command waits for what is in flight |
//! | ids that come back | they only ever grow |

mod body;
pub mod envelope;
pub mod interrupts;
mod manager;
mod queues;
pub mod saved;
mod service;

#[cfg(test)]
mod tests;

pub use body::{Body, Fields};
pub use envelope::{Answer, Command, Error, Request, Wire, decode_reply, encode_reply};
pub use manager::{Doorbells, MAX_DEVICES, Manager, Options, Seat};
pub use saved::StateError;
pub use service::{MAX_COMMAND, NAME, QUEUE_SIZE};
