//! What one driver negotiated with an owner: the commands it said it would use (B-4).

use super::envelope::GroupType;
use super::list::CommandSet;
use super::owner::Strictness;
use super::profile::{LIST_QUERY, LIST_USE};

/// Before LIST_USE, these and no others are legal.
const INITIAL: CommandSet = CommandSet::EMPTY.with(LIST_QUERY).with(LIST_USE);

/// The capability commands, which Linux negotiates for the wrong group.
const CAPABILITIES: std::ops::RangeInclusive<u16> = 7..=9;

/// The lists of one driver, one per group. A reset of the device its driver drives makes it a new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    self_group: Option<CommandSet>,
    sr_iov: Option<CommandSet>,
}

impl Session {
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
            assert_eq!(allowed(&Session::default(), group, strictness), [0, 1]);
        }
    }

    #[test]
    fn b4_after_list_use_exactly_the_list_is_legal_for_that_group() {
        let mut session = Session::default();
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
        let mut session = Session::default();
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
        let mut session = Session::default();
        session.choose(SelfGroup, CommandSet::EMPTY.with(7));
        assert_eq!(allowed(&session, SrIov, Strictness::Lenient), [0, 1]);
    }
}
