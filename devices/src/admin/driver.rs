//! The monitor as an owner driver: what a hypervisor does over an administration virtqueue, it does in process.

use std::sync::Arc;

use super::envelope::{Failure, GroupType, Reply, Request};
use super::list::CommandSet;
use super::owner::Owner;
use super::profile::{LIST_QUERY, LIST_USE};
use super::session::Session;

/// A driver of an owner, with a session of its own: nothing it negotiates shows in the guest, and no reset by the guest
/// takes it away. Commands go through the same bytes as those of the queue.
pub struct OwnerDriver {
    owner: Arc<Owner>,
    session: Session,
}

impl OwnerDriver {
    /// A driver that has negotiated nothing.
    pub fn new(owner: Arc<Owner>) -> Self {
        Self {
            owner,
            session: Session::default(),
        }
    }

    /// The owner it drives.
    pub fn owner(&self) -> &Arc<Owner> {
        &self.owner
    }

    /// Executes the command in `request`, the device-readable part, as it is.
    pub fn execute(&mut self, request: &[u8]) -> Reply {
        self.owner.execute(&mut self.session, request)
    }

    /// Executes a command; `member_id` is 0 for commands that are not about one member. Returns the command-specific
    /// result.
    pub fn command(
        &mut self,
        group: GroupType,
        opcode: u16,
        member_id: u64,
        data: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let request = Request::encode(opcode, group, member_id, data);
        self.execute(&request).0
    }

    /// Takes every command `group` has into use; returns what those are.
    pub fn negotiate(&mut self, group: GroupType) -> Result<CommandSet, Failure> {
        let list = self.command(group, LIST_QUERY, 0, &[])?;
        self.command(group, LIST_USE, 0, &list)?;
        Ok(self.session.chosen(group).unwrap_or_default())
    }
}
