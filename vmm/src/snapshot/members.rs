//! The engine that moves members of a group: an owner driver of its own, which does what a hypervisor would do to a real
//! device, with the migration commands of document 003.
//!
//! It disturbs neither the guest's session with the owner nor that of a person at `tern admin`.

use devices::admin::envelope::Answer;
use devices::admin::queue::MAX_DATA;
use devices::admin::{Failure, GroupType, Migration, OwnerDriver, Profile};
use devices::gate::Mode;

use migration::{PAGE_SIZE, PageSet, RamLayout};

use crate::machine::owner::Group;

/// Why a member could not be moved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// A command was refused.
    #[error("{command:?}: {failure}")]
    Refused {
        /// The command.
        command: Migration,
        /// The owner's answer.
        failure: Failure,
    },
    /// The owner has no such command.
    #[error("the owner lacks {0:?}")]
    Missing(Migration),
}

/// Moves the members of one owner.
pub struct Engine {
    driver: OwnerDriver,
    profile: Profile,
}

impl Engine {
    /// The engine of `group`; `None` if its owner does not have the migration commands. Then its members' state is moved
    /// without them.
    pub fn of(group: &Group) -> Result<Option<Self>, MemberError> {
        let profile = group.owner.options().profile;
        if profile.opcode(Migration::ContextRead).is_none() {
            return Ok(None);
        }
        let mut driver = OwnerDriver::engine(group.owner.clone());
        driver
            .negotiate(GroupType::SrIov)
            .map_err(|failure| MemberError::Refused {
                command: Migration::ModeGet,
                failure,
            })?;
        Ok(Some(Self { driver, profile }))
    }

    /// The context of member `id`, which is frozen while it is read.
    pub fn read(&mut self, id: u16) -> Result<Vec<u8>, MemberError> {
        self.set_mode(id, Mode::Freeze)?;
        let context = self.read_all(id);
        // Also if that failed: it stays frozen for nobody.
        self.set_mode(id, Mode::Active)?;
        context
    }

    /// The context of member `id` as it is, for a destination to check: the member goes on meanwhile.
    pub fn read_active(&mut self, id: u16) -> Result<Vec<u8>, MemberError> {
        let context = self.read_all(id);
        if context.is_err() {
            // What was read in part would keep the mode from being changed.
            let _ = self.command(Migration::ContextDiscard, id, &[]);
        }
        context
    }

    /// Records what member `id` writes to guest memory, all of it.
    pub fn start_records(&mut self, id: u16, ram: &RamLayout) -> Result<(), MemberError> {
        let mut data = Vec::new();
        data.extend(PAGE_SIZE.to_le_bytes());
        data.extend((ram.ranges().len() as u32).to_le_bytes());
        data.extend([0; 4]);
        for range in ram.ranges() {
            data.extend(range.start.to_le_bytes());
            data.extend((range.len / PAGE_SIZE).to_le_bytes());
        }
        self.command(Migration::RecordStart, id, &data).map(drop)
    }

    /// Adds the pages that member `id` wrote since they were read last to `pages`.
    pub fn read_records(&mut self, id: u16, pages: &mut PageSet) -> Result<(), MemberError> {
        let ranges: Vec<_> = pages.layout().ranges().to_vec();
        for range in ranges {
            let data = [range.start.to_le_bytes(), range.len.to_le_bytes()].concat();
            let answer = self.answer(Migration::RecordRead, id, &data)?;
            let (addresses, _) = answer.result.as_chunks();
            for address in addresses {
                if let Some(page) = pages.layout().page_at(u64::from_le_bytes(*address)) {
                    pages.insert(page);
                }
            }
        }
        Ok(())
    }

    /// Ends the recording for member `id`.
    pub fn stop_records(&mut self, id: u16) -> Result<(), MemberError> {
        self.command(Migration::RecordStop, id, &[]).map(drop)
    }

    fn read_all(&mut self, id: u16) -> Result<Vec<u8>, MemberError> {
        let mut context = Vec::new();
        loop {
            let part = self.command(Migration::ContextRead, id, &[])?;
            if part.is_empty() {
                return Ok(context);
            }
            context.extend_from_slice(&part);
        }
    }

    /// Has `context` take effect in member `id`.
    pub fn write(&mut self, id: u16, context: &[u8]) -> Result<(), MemberError> {
        self.set_mode(id, Mode::Freeze)?;
        for part in context.chunks(MAX_DATA) {
            self.command(Migration::ContextWrite, id, part)?;
        }
        self.set_mode(id, Mode::Active)
    }

    fn set_mode(&mut self, id: u16, mode: Mode) -> Result<(), MemberError> {
        self.command(Migration::ModeSet, id, &[mode as u8])
            .map(drop)
    }

    /// Executes `command`; returns as many bytes of the result as its output says, where it has one.
    fn command(
        &mut self,
        command: Migration,
        id: u16,
        data: &[u8],
    ) -> Result<Vec<u8>, MemberError> {
        let answer = self.answer(command, id, data)?;
        let mut result = answer.result;
        result.truncate(answer.output as usize);
        Ok(result)
    }

    fn answer(&mut self, command: Migration, id: u16, data: &[u8]) -> Result<Answer, MemberError> {
        let opcode = self
            .profile
            .opcode(command)
            .ok_or(MemberError::Missing(command))?;
        self.driver
            .command(GroupType::SrIov, opcode, id.into(), data)
            .map_err(|failure| MemberError::Refused { command, failure })
    }
}
