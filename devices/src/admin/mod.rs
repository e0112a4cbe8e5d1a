//! Device groups and administration commands (virtio 1.4, "Device groups" and "Administration Virtqueues").
//!
//! An [`Owner`] has members and executes commands for them. Commands come as bytes from two places, through one entry,
//! [`Owner::execute`]: from the owner's driver in the guest, over the administration virtqueue ([`AdminService`]), and
//! from the monitor ([`OwnerDriver`]), which acts as an owner driver for whoever gives it commands, and when it moves a
//! member itself. Each has a [`Session`] of its own, so that none sees what another negotiated.
//!
//! ```text
//! bytes ─► Request (any bytes are one) ─► (group, opcode) ─► in the session's list? ─► member ─► Reply ─► bytes
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | `envelope` | the fields every command and every answer has |
//! | `list` | sets of opcodes, as LIST_QUERY and LIST_USE carry them |
//! | `profile` | which number means which command, in which group |
//! | `session` | what one driver negotiated |
//! | `member` | what can be done to a member |
//! | `owner` | the group: its members, and the execution of commands |
//! | `migration` | the commands that move a member |
//! | `saved` | sessions as state |
//! | `queue`, `driver` | the two ways in |
//!
//! # Where the letter of virtio 1.4 and Linux disagree
//!
//! Linux negotiates before it enables any VF, and once for both groups. With [`Strictness::Lenient`], the default, an
//! owner therefore allows two things that the letter forbids (D4):
//!
//! * A: LIST_QUERY and LIST_USE for the SR-IOV group while VF Enable is clear. Everything else is still refused.
//! * B: the capability commands (opcodes 7 to 9) for the self group, if that group has no list of its own and the list
//!   of the SR-IOV group has them.
//!
//! # Threats
//!
//! | threat | what stops it |
//! |---|---|
//! | a command of any length, even none | missing bytes read as zero, surplus ones are ignored; no length fails a command |
//! | a length that makes the monitor allocate | at most [`queue::MAX_DATA`] bytes of a command are looked at, and as many of an answer are made; a context is bounded by the member's shape |
//! | opcodes, groups or members that do not exist or were not negotiated | looked up by (group, opcode) and in the session's list before anything is done |
//! | a refused command that did something all the same | checks come first; a refusal is an `Err` before any change |
//! | a guest that learns or changes what the monitor negotiated | sessions are apart |
//! | a saved session from elsewhere | lists, members, lengths and ranges are checked as the commands check them, and contexts decoded, before anything is changed |
//! | commands for a member while VF Enable goes | which members exist is read from the registers at each command; no lock is held that a configuration write needs |

pub mod driver;
pub mod envelope;
pub mod list;
pub mod member;
pub mod migration;
pub mod owner;
pub mod profile;
pub mod queue;
pub mod saved;
pub mod session;

pub use crate::virtio::{Epoch, Rest, Wake};
pub use driver::OwnerDriver;
pub use envelope::{Answer, Failure, GroupType, Outcome, Qualifier, Reply, Request, Status};
pub use list::CommandSet;
pub use member::{Member, MemberId};
pub use owner::{Drain, FixedMembership, Membership, Options, Owner, Strictness};
pub use profile::{Command, Migration, Profile};
pub use queue::AdminService;
pub use saved::{SessionError, check_owner, restore_owner, save_owner};
pub use session::Session;

#[cfg(test)]
mod tests;
