//! A group's owner: who its members are, and what its drivers may ask of them.

use std::sync::{Arc, OnceLock};

use super::envelope::{Failure, GroupType, Qualifier, Reply, Request};
use super::list::CommandSet;
use super::profile::{Command, Profile};
use super::session::Session;

/// A member's number within its group: 1 for the first VF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MemberId(pub u16);

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

/// A device that belongs to a group. It does not know its owner.
pub trait Member: Send + Sync {
    /// The name in messages and in `tern info`.
    fn name(&self) -> &str;
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
}

/// The owner of a group. Shared by the administration queue and the monitor.
pub struct Owner {
    members: Vec<Arc<dyn Member>>,
    options: Options,
    membership: OnceLock<Arc<dyn Membership>>,
}

impl Owner {
    /// An owner of `members`, numbered from 1 in this order. None of them exists before [`Self::set_membership`].
    pub fn new(members: Vec<Arc<dyn Member>>, options: Options) -> Arc<Self> {
        Arc::new(Self {
            members,
            options,
            membership: OnceLock::new(),
        })
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

    /// Executes the command in `request`, the device-readable part, for the driver whose session this is. Any bytes
    /// are a command; one that is refused has no effect (B-2). From any thread; does not block.
    pub fn execute(&self, session: &mut Session, request: &[u8]) -> Reply {
        Reply(self.dispatch(session, Request::new(request)))
    }

    fn enabled_members(&self) -> Option<u16> {
        self.membership.get()?.enabled_members()
    }

    /// Group, then opcode, then member (B-1). The list commands use no member id.
    fn dispatch(&self, session: &mut Session, request: Request<'_>) -> Result<Vec<u8>, Failure> {
        let (group, command) = self.identify(session, request)?;
        let supported = self.options.profile.supported(group);
        match command {
            Command::ListQuery => Ok(supported.encode()),
            Command::ListUse => {
                let commands = CommandSet::parse(request.data())
                    .filter(|commands| commands.is_subset(supported))
                    .ok_or(Failure::invalid(Qualifier::InvalidField))?;
                session.choose(group, commands);
                Ok(Vec::new())
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
