//! Which opcode means which command. Numbers mean different things in different groups and profiles, so a command is
//! always looked up by group and opcode together (requirements, section C).

use std::str::FromStr;

use super::envelope::GroupType;
use super::list::CommandSet;

/// What a command does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// Reports the commands the group supports.
    ListQuery,
    /// Chooses the commands the driver will use.
    ListUse,
    /// Moves a member.
    Migration(Migration),
}

/// The device migration commands of the draft, all of them for members of the SR-IOV group (S3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Migration {
    /// Reports a member's mode.
    ModeGet,
    /// Changes a member's mode.
    ModeSet,
    /// Reports how much of a member's context is left to read.
    ContextSize,
    /// Reads a member's context.
    ContextRead,
    /// Writes a member's context.
    ContextWrite,
    /// Lists the fields of a member's context.
    ContextFields,
    /// Drops what was read or written of a member's context.
    ContextDiscard,
    /// Reports what the records of a member's writes can do.
    RecordCaps,
    /// Starts to record a member's writes.
    RecordStart,
    /// Ends that.
    RecordStop,
    /// Reads what was recorded.
    RecordRead,
}

/// Opcode of LIST_QUERY, in every group.
pub const LIST_QUERY: u16 = 0;
/// Opcode of LIST_USE, in every group.
pub const LIST_USE: u16 = 1;

/// A set of administration commands an owner can have: `admin=` in its declaration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Profile {
    /// Those of virtio 1.4.
    V1_4,
    /// Those of the migration proposal that came before, at the opcodes it chose.
    #[default]
    Draft,
}

/// `admin=` names no profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a set of admin commands; use v1.4 or draft")]
pub struct UnknownProfile(pub String);

impl FromStr for Profile {
    type Err = UnknownProfile;

    fn from_str(name: &str) -> Result<Self, UnknownProfile> {
        [Self::V1_4, Self::Draft]
            .into_iter()
            .find(|profile| profile.name() == name)
            .ok_or_else(|| UnknownProfile(name.to_string()))
    }
}

/// The commands of one group in one profile.
type Table = &'static [(u16, Command)];

/// What every group has.
const LISTS: Table = &[
    (LIST_QUERY, Command::ListQuery),
    (LIST_USE, Command::ListUse),
];

/// The lists, and the migration commands at the opcodes of the proposal's table. 0x0e is not assigned (G3-a).
const DRAFT: Table = &[
    (LIST_QUERY, Command::ListQuery),
    (LIST_USE, Command::ListUse),
    (0x07, Command::Migration(Migration::ModeGet)),
    (0x08, Command::Migration(Migration::ModeSet)),
    (0x09, Command::Migration(Migration::ContextSize)),
    (0x0a, Command::Migration(Migration::ContextRead)),
    (0x0b, Command::Migration(Migration::ContextWrite)),
    (0x0c, Command::Migration(Migration::ContextFields)),
    (0x0d, Command::Migration(Migration::ContextDiscard)),
    (0x0f, Command::Migration(Migration::RecordCaps)),
    (0x10, Command::Migration(Migration::RecordStart)),
    (0x11, Command::Migration(Migration::RecordStop)),
    (0x12, Command::Migration(Migration::RecordRead)),
];

impl Profile {
    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1_4 => "v1.4",
            Self::Draft => "draft",
        }
    }

    fn table(self, group: GroupType) -> Table {
        match (self, group) {
            (Self::V1_4, _) | (Self::Draft, GroupType::SelfGroup) => LISTS,
            (Self::Draft, GroupType::SrIov) => DRAFT,
        }
    }

    /// The command with this opcode in `group`, if there is one.
    pub fn command(self, group: GroupType, opcode: u16) -> Option<Command> {
        let found = self.table(group).iter().find(|(o, _)| *o == opcode);
        found.map(|(_, command)| *command)
    }

    /// The opcode of `command`, if this profile has it. It is for members of the SR-IOV group.
    pub fn opcode(self, command: Migration) -> Option<u16> {
        let wanted = Command::Migration(command);
        let mut entries = self.table(GroupType::SrIov).iter();
        let found = entries.find(|(_, command)| *command == wanted);
        found.map(|(opcode, _)| *opcode)
    }

    /// What LIST_QUERY reports for `group`. Always the same, so that the list never shrinks (B-3).
    pub fn supported(self, group: GroupType) -> CommandSet {
        self.table(group)
            .iter()
            .fold(CommandSet::EMPTY, |set, (opcode, _)| set.with(*opcode))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: [GroupType; 2] = [GroupType::SelfGroup, GroupType::SrIov];

    #[test]
    fn profiles_are_named() {
        assert_eq!("v1.4".parse(), Ok(Profile::V1_4));
        assert_eq!("draft".parse(), Ok(Profile::Draft));
        assert_eq!("".parse::<Profile>(), Err(UnknownProfile(String::new())));
        assert_eq!(Profile::default(), Profile::Draft);
    }

    #[test]
    fn b3_every_group_of_every_profile_has_the_list_commands() {
        for (profile, group) in [Profile::V1_4, Profile::Draft]
            .into_iter()
            .flat_map(|profile| GROUPS.map(|group| (profile, group)))
        {
            assert_eq!(profile.command(group, 0), Some(Command::ListQuery));
            assert_eq!(profile.command(group, 1), Some(Command::ListUse));
            let supported = profile.supported(group);
            assert!(supported.contains(0) && supported.contains(1));
            for opcode in 0..CommandSet::LIMIT {
                let known = profile.command(group, opcode).is_some();
                assert_eq!(supported.contains(opcode), known, "{opcode}");
            }
        }
    }
}
