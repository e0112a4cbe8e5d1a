//! A group's owner: who its members are, and what its drivers may ask of them.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::envelope::{
    Answer, Failure, GroupType, Outcome, Qualifier, REPLY_HEADER_LEN, Reply, Request,
};
use super::list::CommandSet;
use super::member::{Member, MemberId};
use super::migration::{self, Refusal};
use super::profile::{Command, Migration, Profile};
use super::session::Session;
use crate::virtio::Wakeups;

/// Which members of the SR-IOV group exist now.
///
/// Implemented by whoever has the registers that say so, and by nothing else. Called for every command, with the lock
/// of the owner's function held: it may take no lock under which that function is called.
pub trait Membership: Send + Sync {
    /// NumVFs while VF Enable is set; `None` while it is clear.
    fn enabled_members(&self) -> Option<u16>;
}

/// The members of an owner that has no SR-IOV registers, because the monitor keeps it to itself: always this many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FixedMembership(pub u16);

impl Membership for FixedMembership {
    fn enabled_members(&self) -> Option<u16> {
        Some(self.0)
    }
}

/// Whether an owner follows the letter of virtio 1.4 where Linux does not: `strict-admin` in its declaration. See the
/// [module documentation](super).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strictness {
    /// As Linux needs it.
    #[default]
    Lenient,
    /// To the letter.
    Strict,
}

/// How an owner behaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The commands it has.
    pub profile: Profile,
    /// How literally it takes the rules.
    pub strictness: Strictness,
    /// How long a member that is to stop waits for what is in flight before requests that have not begun are given up,
    /// and stay with the member as descriptors it owns.
    pub drain: Drain,
}

/// A patience, by default half a second: longer than a disk that works ever takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drain(pub Duration);

impl Default for Drain {
    fn default() -> Self {
        Self(Duration::from_millis(500))
    }
}

/// The owner of a group. Shared by the administration queue and the monitor.
pub struct Owner {
    members: Vec<Arc<dyn Member>>,
    options: Options,
    membership: OnceLock<Arc<dyn Membership>>,
    wakeups: Arc<Wakeups>,
}

impl Owner {
    /// An owner of `members`, numbered from 1 in this order. None of them exists before [`Self::set_membership`]. Fails if
    /// the system has no descriptor left.
    pub fn new(members: Vec<Arc<dyn Member>>, options: Options) -> std::io::Result<Arc<Self>> {
        let wakeups = Arc::new(Wakeups::new()?);
        for member in &members {
            member.set_wake(Arc::clone(&wakeups) as _);
        }
        Ok(Arc::new(Self {
            members,
            options,
            membership: OnceLock::new(),
            wakeups,
        }))
    }

    /// What tells that a member came to rest.
    pub(super) fn wakeups(&self) -> &Wakeups {
        &self.wakeups
    }

    /// Says who knows which members exist: the transport, which calls this when it shows the owner on a bus, or a
    /// [`FixedMembership`]. Only the first call counts.
    pub fn set_membership(&self, membership: Arc<dyn Membership>) {
        // A second one is a wiring mistake that shows at once: members that never appear.
        let _ = self.membership.set(membership);
    }

    /// How it behaves.
    pub fn options(&self) -> Options {
        self.options
    }

    /// The most members there can be.
    pub fn capacity(&self) -> usize {
        self.members.len()
    }

    /// The members that exist now, with their ids, ascending.
    pub fn members(&self) -> impl Iterator<Item = (MemberId, &Arc<dyn Member>)> {
        let enabled = self.enabled_members().unwrap_or(0);
        (1..=enabled).map(MemberId).zip(&self.members)
    }

    /// The member of the SR-IOV group with this id, if it exists now.
    pub fn member(&self, id: u64) -> Option<&Arc<dyn Member>> {
        let enabled = u64::from(self.enabled_members()?);
        let index = id.checked_sub(1).filter(|_| id <= enabled)?;
        self.members.get(usize::try_from(index).ok()?)
    }

    /// Executes the command in `request`, the device-readable part, for the driver whose session this is. `room` is the
    /// length of the device-writable part. Any bytes are a command; one that is refused has no effect (B-2). From any
    /// thread; does not block.
    ///
    /// [`Outcome::Later`] is the answer of a command that has to wait for a member: it is to be executed again when a
    /// member came to rest, or when [`Session::wait_until`] has come, until it is done or [`Self::abandon`]ed.
    pub fn execute(&self, session: &mut Session, request: &[u8], room: usize) -> Outcome {
        let room = room.saturating_sub(REPLY_HEADER_LEN);
        let request = Request::new(request);
        if !self.goes_on(session, request) {
            self.abandon(session);
        }
        let reply = match self.dispatch(session, request, room) {
            Ok(answer) => Reply(Ok(answer)),
            Err(Refusal::Failed(failure)) => Reply(Err(failure)),
            Err(Refusal::Later) => return Outcome::Later,
        };
        session.finish();
        Outcome::Done(reply)
    }

    /// False if `session` waits for another command than this. It is executed from the same bytes until it is done, but a
    /// restored one is read once more, and its driver may have changed it.
    fn goes_on(&self, session: &Session, request: Request<'_>) -> bool {
        let Some(transition) = session.pending() else {
            return true;
        };
        let command = request
            .group()
            .and_then(|group| self.options.profile.command(group, request.opcode()));
        command == Some(Command::Migration(Migration::ModeSet))
            && transition.is_of(request.member_id(), request.data())
    }

    /// The command that `session` waits for will not be asked for again: what it began is undone.
    pub fn abandon(&self, session: &mut Session) {
        let Some(transition) = session.finish() else {
            return;
        };
        if let Some(member) = self.member(transition.member.0.into()) {
            transition.undo(&**member, session.party());
        }
    }

    /// The driver of `session` is gone, by a reset of the owner: nothing is negotiated any more (B-4), and what it recorded
    /// is dropped (G3-x). Modes stay.
    pub fn forget(&self, session: &mut Session) {
        self.abandon(session);
        for member in &self.members {
            member.records().stop(session.party());
        }
        *session = Session::new(session.party());
    }

    fn enabled_members(&self) -> Option<u16> {
        self.membership.get()?.enabled_members()
    }

    /// Group, then opcode, then member (B-1). The list commands use no member id.
    fn dispatch(
        &self,
        session: &mut Session,
        request: Request<'_>,
        room: usize,
    ) -> Result<Answer, Refusal> {
        let (group, command) = self.identify(session, request)?;
        let supported = self.options.profile.supported(group);
        match command {
            Command::ListQuery => Ok(supported.encode().into()),
            Command::ListUse => {
                let commands = CommandSet::parse(request.data())
                    .filter(|commands| commands.is_subset(supported))
                    .ok_or(Failure::invalid(Qualifier::InvalidField))?;
                session.choose(group, commands);
                Ok(Answer::default())
            }
            Command::Migration(command) => {
                let id = request.member_id();
                let member = self
                    .member(id)
                    .ok_or(Failure::invalid(Qualifier::InvalidMember))?;
                let exchange = migration::Exchange {
                    // Members have ids of 16 bits, so this one has.
                    id: MemberId(id as u16),
                    member: &**member,
                    session,
                    data: request.data(),
                    room,
                    patience: self.options.drain.0,
                };
                exchange.execute(command)
            }
        }
    }

    /// The group and the command, if that group exists and the driver may use the command now.
    fn identify(
        &self,
        session: &Session,
        request: Request<'_>,
    ) -> Result<(GroupType, Command), Failure> {
        let Options {
            profile,
            strictness,
            ..
        } = self.options;
        let no_group = Failure::invalid(Qualifier::InvalidGroup);
        let no_opcode = Failure::invalid(Qualifier::InvalidOpcode);
        let group = request.group().ok_or(no_group)?;
        let command = profile.command(group, request.opcode());
        // Leniency A (D4).
        let lists = matches!(command, Some(Command::ListQuery | Command::ListUse));
        let lenient = lists && strictness == Strictness::Lenient;
        let there = match group {
            GroupType::SelfGroup => true,
            GroupType::SrIov => lenient || self.enabled_members().is_some(),
        };
        if !there {
            return Err(no_group);
        }
        let allowed = session.allows(group, request.opcode(), strictness);
        let command = command.filter(|_| allowed).ok_or(no_opcode)?;
        Ok((group, command))
    }
}
