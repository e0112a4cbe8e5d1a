//! The monitor as an owner driver: what a hypervisor does over an administration virtqueue, it does in process. Once for the
//! person who gives it commands, and once for its snapshot and migration engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::envelope::{Answer, Failure, GroupType, Outcome, Reply, Request, TIMED_OUT};
use super::list::CommandSet;
use super::owner::Owner;
use super::profile::{LIST_QUERY, LIST_USE};
use super::session::Session;
use crate::gate::Party;

/// How long a command waits for a member, unless the driver says otherwise.
const PATIENCE: Duration = Duration::from_secs(10);

/// A driver of an owner, with a session of its own: nothing it negotiates shows in the guest, and no reset by the guest
/// takes it away. Commands go through the same bytes as those of the queue.
pub struct OwnerDriver {
    owner: Arc<Owner>,
    session: Session,
    patience: Duration,
}

impl OwnerDriver {
    /// A driver for the monitor's commands that has negotiated nothing.
    pub fn new(owner: Arc<Owner>) -> Self {
        Self::of(owner, Party::Monitor)
    }

    /// A driver for the monitor's snapshot and migration engine that has negotiated nothing. It disturbs no other driver's
    /// session, and a context it writes takes effect exactly: the device driver in the guest is told nothing.
    pub fn engine(owner: Arc<Owner>) -> Self {
        Self::of(owner, Party::Engine)
    }

    fn of(owner: Arc<Owner>, party: Party) -> Self {
        Self {
            owner,
            session: Session::new(party),
            patience: PATIENCE,
        }
    }

    /// The owner it drives.
    pub fn owner(&self) -> &Arc<Owner> {
        &self.owner
    }

    /// What it negotiated and did.
    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// The same, to put another in its place.
    pub(super) fn session_mut(&mut self) -> &mut Session {
        &mut self.session
    }

    /// How long commands wait for a member from now on. One that waits longer is undone, and answered with EAGAIN.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// Executes the command in `request`, the device-readable part, as it is. Blocks while it waits for a member.
    pub fn execute(&mut self, request: &[u8]) -> Reply {
        self.execute_within(request, usize::MAX)
    }

    /// The same, with `room` bytes for the device-writable part.
    pub fn execute_within(&mut self, request: &[u8], room: usize) -> Reply {
        let started = Instant::now();
        loop {
            let wakeups = self.owner.wakeups();
            let seen = wakeups.count();
            if let Outcome::Done(reply) = self.owner.execute(&mut self.session, request, room) {
                return reply;
            }
            let Some(left) = self.patience.checked_sub(started.elapsed()) else {
                self.owner.abandon(&mut self.session);
                return Reply(Err(TIMED_OUT));
            };
            let at = self.session.wait_until();
            let pause = at.map(|at| at.saturating_duration_since(Instant::now()));
            wakeups.wait(seen, pause.map_or(left, |pause| pause.min(left)));
        }
    }

    /// Executes a command; `member_id` is 0 for commands that are not about one member.
    pub fn command(
        &mut self,
        group: GroupType,
        opcode: u16,
        member_id: u64,
        data: &[u8],
    ) -> Result<Answer, Failure> {
        let request = Request::encode(opcode, group, member_id, data);
        self.execute(&request).0
    }

    /// Takes every command `group` has into use; returns what those are.
    pub fn negotiate(&mut self, group: GroupType) -> Result<CommandSet, Failure> {
        let list = self.command(group, LIST_QUERY, 0, &[])?.result;
        self.command(group, LIST_USE, 0, &list)?;
        Ok(self.session.chosen(group).unwrap_or_default())
    }
}
