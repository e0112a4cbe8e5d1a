//! What one driver has with an owner: the commands it said it would use (B-4), and how far it is with the context of each
//! member.

use std::collections::HashMap;
use std::time::Instant;

use super::envelope::GroupType;
use super::list::CommandSet;
use super::member::{Member, MemberId};
use super::migration::{ContextSession, Transition};
use super::owner::Strictness;
use super::profile::{LIST_QUERY, LIST_USE};
use crate::gate::Party;

/// Before LIST_USE, these and no others are legal.
const INITIAL: CommandSet = CommandSet::EMPTY.with(LIST_QUERY).with(LIST_USE);

/// The capability commands, which Linux negotiates for the wrong group.
const CAPABILITIES: std::ops::RangeInclusive<u16> = 7..=9;

/// Per-driver state; discarded on a reset of the device it drives.
#[derive(Debug)]
pub struct Session {
    party: Party,
    self_group: Option<CommandSet>,
    sr_iov: Option<CommandSet>,
    /// Of members whose context was read or written.
    contexts: HashMap<MemberId, ContextSession>,
    /// The mode change that is under way.
    transition: Option<Transition>,
}

impl Session {
    /// The session of a driver that has not done anything.
    pub fn new(party: Party) -> Self {
        Self {
            party,
            self_group: None,
            sr_iov: None,
            contexts: HashMap::new(),
            transition: None,
        }
    }

    /// Who the driver is.
    pub fn party(&self) -> Party {
        self.party
    }

    /// When a command that waits is to be executed again, even if no member came to rest.
    pub fn wait_until(&self) -> Option<Instant> {
        self.transition.as_ref()?.recall_at
    }

    /// How far the driver is with the context of `member`. A reset of the member starts that anew.
    pub(super) fn context(&mut self, id: MemberId, member: &dyn Member) -> &mut ContextSession {
        let epoch = member.epoch();
        let context = self.contexts.entry(id).or_default();
        context.enter(epoch);
        context
    }

    /// How far the driver is with the context of this member, if it has touched it.
    pub(super) fn touched(&self, id: MemberId) -> Option<&ContextSession> {
        self.contexts.get(&id)
    }

    /// Sets how far the driver is with the context of a member.
    pub(super) fn set_context(&mut self, id: MemberId, context: ContextSession) {
        self.contexts.insert(id, context);
    }

    /// The mode change that is under way, to look at.
    pub(super) fn pending(&self) -> Option<&Transition> {
        self.transition.as_ref()
    }

    /// The mode change that is under way.
    pub(super) fn transition(&mut self) -> &mut Option<Transition> {
        &mut self.transition
    }

    /// The command that was waited for is over.
    pub(super) fn finish(&mut self) -> Option<Transition> {
        self.transition.take()
    }

    /// The list the driver chose for `group` by LIST_USE, if it did.
    pub fn chosen(&self, group: GroupType) -> Option<CommandSet> {
        match group {
            GroupType::SelfGroup => self.self_group,
            GroupType::SrIov => self.sr_iov,
        }
    }

    /// The driver chose `commands` for `group`.
    pub(super) fn choose(&mut self, group: GroupType, commands: CommandSet) {
        match group {
            GroupType::SelfGroup => self.self_group = Some(commands),
            GroupType::SrIov => self.sr_iov = Some(commands),
        }
    }

    /// True if the driver may use `opcode` for `group`. A driver that left LIST_QUERY or LIST_USE out of its list has
    /// given them up until the next reset, as virtio 1.4 says.
    pub(super) fn allows(&self, group: GroupType, opcode: u16, strictness: Strictness) -> bool {
        let legal = self.chosen(group).unwrap_or(INITIAL).contains(opcode);
        // Leniency B (D4).
        let lent = strictness == Strictness::Lenient
            && group == GroupType::SelfGroup
            && self.self_group.is_none()
            && CAPABILITIES.contains(&opcode)
            && self.sr_iov.is_some_and(|list| list.contains(opcode));
        legal || lent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use GroupType::{SelfGroup, SrIov};

    fn allowed(session: &Session, group: GroupType, strictness: Strictness) -> Vec<u16> {
        (0..=CommandSet::LIMIT)
            .filter(|opcode| session.allows(group, *opcode, strictness))
            .collect()
    }

    #[test]
    fn b4_before_list_use_only_the_list_commands_are_legal() {
        for (group, strictness) in [
            (SelfGroup, Strictness::Strict),
            (SelfGroup, Strictness::Lenient),
            (SrIov, Strictness::Strict),
            (SrIov, Strictness::Lenient),
        ] {
            assert_eq!(
                allowed(&Session::new(Party::Guest), group, strictness),
                [0, 1]
            );
        }
    }

    #[test]
    fn b4_after_list_use_exactly_the_list_is_legal_for_that_group() {
        let mut session = Session::new(Party::Guest);
        session.choose(SrIov, CommandSet::EMPTY.with(0).with(0x11).with(0x47));
        assert_eq!(
            allowed(&session, SrIov, Strictness::Strict),
            [0, 0x11, 0x47]
        );
        assert_eq!(allowed(&session, SelfGroup, Strictness::Strict), [0, 1]);
        session.choose(SrIov, CommandSet::EMPTY);
        assert!(allowed(&session, SrIov, Strictness::Strict).is_empty());
    }

    #[test]
    fn d4_capability_commands_of_the_sr_iov_list_are_lent_to_a_self_group_without_one() {
        let mut session = Session::new(Party::Guest);
        session.choose(SrIov, CommandSet::EMPTY.with(7).with(9).with(0xa));
        assert_eq!(
            allowed(&session, SelfGroup, Strictness::Lenient),
            [0, 1, 7, 9]
        );
        assert_eq!(allowed(&session, SelfGroup, Strictness::Strict), [0, 1]);
        session.choose(SelfGroup, CommandSet::EMPTY.with(0));
        assert_eq!(allowed(&session, SelfGroup, Strictness::Lenient), [0]);
    }

    #[test]
    fn d4_nothing_is_lent_the_other_way() {
        let mut session = Session::new(Party::Guest);
        session.choose(SelfGroup, CommandSet::EMPTY.with(7));
        assert_eq!(allowed(&session, SrIov, Strictness::Lenient), [0, 1]);
    }
}
