//! The device migration commands of the proposal, as an owner's driver sends them: opcodes, data and answers.
//!
//! Whoever can send bytes and gets an answer has them all ([`Migrate`]): an administration queue, or a monitor that drives
//! the owner itself.

use super::admin::{AdminError, Answer, command, group};

/// Opcodes, all of them of the SR-IOV group.
pub mod opcode {
    /// Which mode is the member in?
    pub const MODE_GET: u16 = 0x07;
    /// Changes it.
    pub const MODE_SET: u16 = 0x08;
    /// How much of the context is left to read?
    pub const CONTEXT_SIZE: u16 = 0x09;
    /// Reads the context.
    pub const CONTEXT_READ: u16 = 0x0a;
    /// Writes a context.
    pub const CONTEXT_WRITE: u16 = 0x0b;
    /// Which fields has a context?
    pub const CONTEXT_FIELDS: u16 = 0x0c;
    /// Drops what was read or written in part.
    pub const CONTEXT_DISCARD: u16 = 0x0d;
    /// What can be recorded?
    pub const RECORD_CAPS: u16 = 0x0f;
    /// Records writes.
    pub const RECORD_START: u16 = 0x10;
    /// Ends that.
    pub const RECORD_STOP: u16 = 0x11;
    /// Reads and clears records.
    pub const RECORD_READ: u16 = 0x12;
    /// All of them.
    pub const ALL: [u16; 11] = [
        MODE_GET,
        MODE_SET,
        CONTEXT_SIZE,
        CONTEXT_READ,
        CONTEXT_WRITE,
        CONTEXT_FIELDS,
        CONTEXT_DISCARD,
        RECORD_CAPS,
        RECORD_START,
        RECORD_STOP,
        RECORD_READ,
    ];
}

/// Modes.
pub mod mode {
    /// It runs.
    pub const ACTIVE: u8 = 0;
    /// It starts nothing.
    pub const STOP: u8 = 1;
    /// As Stop, and nothing of it changes.
    pub const FREEZE: u8 = 2;
    /// All of them.
    pub const ALL: [u8; 3] = [ACTIVE, STOP, FREEZE];
}

/// Bytes of an answer before its result.
const HEADER: usize = 8;

/// Why a command has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// The owner refused: status and qualifier.
    #[error("refused with status {0}, qualifier {1}")]
    Refused(u16, u16),
    /// There was no answer.
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// Someone who can send commands to an owner.
pub trait Commands {
    /// Sends `request` with room for `room` bytes of answer, and waits for it.
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError>;
}

impl<T: Commands + ?Sized> Commands for &mut T {
    fn send(&mut self, request: &[u8], room: usize) -> Result<Answer, AdminError> {
        (**self).send(request, room)
    }
}

/// A range to record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Guest physical address of the first page.
    pub address: u64,
    /// Number of pages.
    pub pages: u64,
}

/// The device-readable part of a command for a member.
pub fn request(opcode: u16, member: u64, data: &[u8]) -> Vec<u8> {
    command(opcode, group::SR_IOV, member, data)
}

/// The data of [`opcode::RECORD_START`].
pub fn start_data(page_size: u64, ranges: &[Range]) -> Vec<u8> {
    let mut data = page_size.to_le_bytes().to_vec();
    data.extend_from_slice(&(ranges.len() as u32).to_le_bytes());
    data.extend_from_slice(&[0; 4]);
    for range in ranges {
        data.extend_from_slice(&range.address.to_le_bytes());
        data.extend_from_slice(&range.pages.to_le_bytes());
    }
    data
}

/// The data of [`opcode::RECORD_READ`].
pub fn read_data(address: u64, len: u64) -> Vec<u8> {
    [address.to_le_bytes(), len.to_le_bytes()].concat()
}

/// The commands, one method each. Members are numbered from 1.
pub trait Migrate: Commands {
    /// Sends a command for `member` with room for `room` bytes of result.
    fn ask(
        &mut self,
        opcode: u16,
        member: u64,
        data: &[u8],
        room: usize,
    ) -> Result<Answer, CommandError> {
        let answer = self.send(&request(opcode, member, data), HEADER.saturating_add(room))?;
        match answer.outcome() {
            (0, 0) => Ok(answer),
            (status, qualifier) => Err(CommandError::Refused(status, qualifier)),
        }
    }

    /// Takes every command of the group into use; which those are, as bits.
    fn use_all(&mut self) -> Result<u64, CommandError> {
        use super::admin::opcode::{LIST_QUERY, LIST_USE};
        let list = self.ask(LIST_QUERY, 0, &[], 8)?;
        self.ask(LIST_USE, 0, list.result(), 0)?;
        Ok(word(list.result(), 0))
    }

    /// The mode of `member`.
    fn mode(&mut self, member: u64) -> Result<u8, CommandError> {
        let answer = self.ask(opcode::MODE_GET, member, &[], 8)?;
        Ok(word(answer.result(), 0) as u8)
    }

    /// Changes the mode of `member`.
    fn set_mode(&mut self, member: u64, mode: u8) -> Result<(), CommandError> {
        self.ask(opcode::MODE_SET, member, &[mode], 0).map(drop)
    }

    /// Bytes of the context that are left to read; or with `freeze` 1, that there would be in Freeze.
    fn context_size(&mut self, member: u64, freeze: u8) -> Result<u64, CommandError> {
        let answer = self.ask(opcode::CONTEXT_SIZE, member, &[freeze], 8)?;
        Ok(word(answer.result(), 0))
    }

    /// Up to `room` bytes of the context.
    fn read_context(&mut self, member: u64, room: usize) -> Result<Vec<u8>, CommandError> {
        let answer = self.ask(opcode::CONTEXT_READ, member, &[], room)?;
        let len = answer.output() as usize;
        Ok(answer.result().get(..len).unwrap_or_default().to_vec())
    }

    /// What is left of the context, `step` bytes at a time.
    fn read_all(&mut self, member: u64, step: usize) -> Result<Vec<u8>, CommandError> {
        let mut context = Vec::new();
        loop {
            let piece = self.read_context(member, step)?;
            context.extend_from_slice(&piece);
            if piece.len() < step || step == 0 {
                return Ok(context);
            }
        }
    }

    /// Writes a part of a context.
    fn write_context(&mut self, member: u64, part: &[u8]) -> Result<(), CommandError> {
        self.ask(opcode::CONTEXT_WRITE, member, part, 0).map(drop)
    }

    /// The types of field that a context has, and the bytes of their values.
    fn context_fields(&mut self, member: u64) -> Result<Vec<(u16, u64)>, CommandError> {
        let answer = self.ask(opcode::CONTEXT_FIELDS, member, &[], 4096)?;
        let entries = answer.result().chunks_exact(16);
        let entry = |entry: &[u8]| (word(entry, 0) as u16, word(entry, 8));
        Ok(entries.map(entry).collect())
    }

    /// Drops what was read or written in part.
    fn discard(&mut self, member: u64) -> Result<(), CommandError> {
        self.ask(opcode::CONTEXT_DISCARD, member, &[], 0).map(drop)
    }

    /// Which page sizes can be recorded, bit n for 4 KiB << n, and how many ranges.
    fn record_caps(&mut self, member: u64) -> Result<(u32, u32), CommandError> {
        let answer = self.ask(opcode::RECORD_CAPS, member, &[], 8)?;
        let both = word(answer.result(), 0);
        Ok((both as u32, (both >> 32) as u32))
    }

    /// Records writes of `member` to `ranges`.
    fn start_records(
        &mut self,
        member: u64,
        page_size: u64,
        ranges: &[Range],
    ) -> Result<(), CommandError> {
        let data = start_data(page_size, ranges);
        self.ask(opcode::RECORD_START, member, &data, 0).map(drop)
    }

    /// Ends that.
    fn stop_records(&mut self, member: u64) -> Result<(), CommandError> {
        self.ask(opcode::RECORD_STOP, member, &[], 0).map(drop)
    }

    /// Takes the records of `address..address + len`, `most` of them at most.
    fn read_records(
        &mut self,
        member: u64,
        address: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<u64>, CommandError> {
        let data = read_data(address, len);
        let answer = self.ask(opcode::RECORD_READ, member, &data, 8 * most)?;
        let count = answer.output() as usize;
        let pages = answer.result().chunks_exact(8).take(count);
        Ok(pages.map(|page| word(page, 0)).collect())
    }
}

impl<T: Commands + ?Sized> Migrate for T {}

/// The little-endian 64 bits at `at`; what is beyond the end reads 0.
fn word(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes.iter().skip(at).take(8).rev();
    bytes.fold(0, |word, byte| word << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_cut_off_has_zeroes() {
        assert_eq!(word(&[1, 2, 3, 0, 0, 0, 0, 4, 5], 0), 0x0400_0000_0003_0201);
        assert_eq!(word(&[1, 2, 3], 1), 0x0302);
        assert_eq!(word(&[], 0), 0);
    }

    #[test]
    fn data_are_as_the_proposal_lays_them_out() {
        let range = Range {
            address: 0x3000,
            pages: 2,
        };
        let data = start_data(0x1000, &[range]);
        assert_eq!(data.len(), 32);
        assert_eq!([word(&data, 0), word(&data, 8)], [0x1000, 1]);
        assert_eq!([word(&data, 16), word(&data, 24)], [0x3000, 2]);
        assert_eq!(word(&read_data(1, 2), 8), 2);
    }
}
