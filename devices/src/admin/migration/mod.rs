//! The device migration commands of the draft (S3), for one member at a time.
//!
//! | opcode | command | data | output | result |
//! |---|---|---|---|---|
//! | 0x07 | DEV_MODE_GET | | | u8 mode |
//! | 0x08 | DEV_MODE_SET | u8 mode | | |
//! | 0x09 | DEV_CTX_SIZE_GET | u8 freeze_mode | | le64 size |
//! | 0x0a | DEV_CTX_READ | | le32 bytes | part of the context |
//! | 0x0b | DEV_CTX_WRITE | part of a context | | |
//! | 0x0c | DEV_CTX_FIELDS_QUERY | | | 16 bytes per type of field |
//! | 0x0d | DEV_CTX_DISCARD | | | |
//! | 0x0f | DEV_WRITE_RECORD_CAP_QUERY | | | le32 page sizes, le32 ranges |
//! | 0x10 | DEV_WRITE_RECORDS_START | le64 page size, le32 count, 4 reserved, ranges | | |
//! | 0x11 | DEV_WRITE_RECORDS_STOP | | | |
//! | 0x12 | DEV_WRITE_RECORDS_READ | le64 address, le64 length | le32 count | le64 addresses |
//!
//! Bytes that are missing of the data read as zero. Commands that touch a member wait while it is being reset (S3-19 to
//! S3-21); a change of the mode waits for what is in flight (S3-9), and after some time takes back what has not begun.

mod context;
mod mode;
mod records;

pub(super) use context::ContextSession;
pub(super) use mode::Transition;

use std::time::Duration;

use super::envelope::{Answer, Failure, Qualifier};
use super::member::{Member, MemberId};
use super::profile::Migration;
use super::session::Session;
use crate::gate::{Mode, Party};
use crate::virtio::Rest;

/// Why a command did not give an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// It failed, without effect.
    Failed(Failure),
    /// It waits for its member.
    Later,
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

/// A value that cannot be (G3-p).
const BAD_FIELD: Failure = Failure::invalid(Qualifier::InvalidField);
/// A state in which the command makes no sense (G3-p).
const BAD_STATE: Failure = Failure::invalid(Qualifier::InvalidCommand);

/// One command for one member.
pub(super) struct Exchange<'a> {
    pub id: MemberId,
    pub member: &'a dyn Member,
    pub session: &'a mut Session,
    /// The command-specific data.
    pub data: &'a [u8],
    /// Bytes there are for the command-specific result.
    pub room: usize,
    /// How long a stop waits before requests that have not begun are given up.
    pub patience: Duration,
}

impl Exchange<'_> {
    pub fn execute(mut self, command: Migration) -> Result<Answer, Refusal> {
        match command {
            Migration::ModeGet => Ok(vec![self.mode() as u8].into()),
            Migration::ModeSet => self.set_mode(),
            Migration::ContextSize => self.context_size(),
            Migration::ContextRead => self.read_context(),
            Migration::ContextWrite => self.write_context(),
            Migration::ContextFields => Ok(self.context_fields()),
            Migration::ContextDiscard => Ok(self.discard_context()),
            Migration::RecordCaps => Ok(records::capabilities()),
            Migration::RecordStart => self.start_records(),
            Migration::RecordStop => Ok(self.stop_records()),
            Migration::RecordRead => self.read_records(),
        }
    }

    fn party(&self) -> Party {
        self.session.party()
    }

    fn mode(&self) -> Mode {
        self.member.mode(self.party())
    }

    fn context(&mut self) -> &mut ContextSession {
        self.session.context(self.id, self.member)
    }

    /// Waits while the member is being reset.
    fn after_reset(&self) -> Result<(), Refusal> {
        match self.member.rest() {
            Rest::Resetting => Err(Refusal::Later),
            Rest::AtRest | Rest::Draining => Ok(()),
        }
    }
}
