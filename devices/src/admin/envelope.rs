//! The envelope of an administration command (virtio 1.4, "Group administration commands").
//!
//! | part | offset | field |
//! |---|---|---|
//! | device-readable | 0 | le16 opcode |
//! | | 2 | le16 group type |
//! | | 4 | 12 reserved bytes |
//! | | 16 | le64 group member id |
//! | | 24 | command-specific data |
//! | device-writable | 0 | le16 status |
//! | | 2 | le16 status qualifier |
//! | | 4 | 4 reserved bytes; of a migration command, its command-specific output |
//! | | 8 | command-specific result |
//!
//! No length fails a command (B-8): what is missing of the readable part is zero, what is missing of the writable part
//! is cut off, and what is too much is ignored.

/// Bytes of the readable part before the command-specific data.
pub const REQUEST_HEADER_LEN: usize = 24;
/// Bytes of the writable part before the command-specific result.
pub const REPLY_HEADER_LEN: usize = 8;
/// The writable part is initialised in units of this many bytes (B-8).
const REPLY_UNIT: usize = 8;

/// Which kind of group a command addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum GroupType {
    /// The owner itself; its only member id is 0.
    SelfGroup = 0,
    /// The owner's SR-IOV virtual functions; member ids are 1 to NumVFs.
    SrIov = 1,
}

impl GroupType {
    fn from_raw(raw: u16) -> Option<Self> {
        match raw {
            0 => Some(Self::SelfGroup),
            1 => Some(Self::SrIov),
            _ => None,
        }
    }

    /// The number on the wire.
    pub fn raw(self) -> u16 {
        self as u16
    }
}

/// Outcome of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// EAGAIN: not now; nothing happened.
    Again = 11,
    /// ENOMEM: the owner lacks the memory for it; nothing happened.
    NoMemory = 12,
    /// EINVAL: the command is invalid as it stands; nothing happened.
    Invalid = 22,
}

/// What exactly was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Qualifier {
    /// Nothing.
    Ok = 0,
    /// The command makes no sense in the present state.
    InvalidCommand = 1,
    /// The opcode is unknown to the group, or not in the list the driver chose.
    InvalidOpcode = 2,
    /// A field of the command-specific data.
    InvalidField = 3,
    /// The group type, or a group that does not exist now.
    InvalidGroup = 4,
    /// The member id.
    InvalidMember = 5,
    /// Something the owner has only so much of.
    NoResource = 6,
    /// It may work later.
    TryAgain = 7,
}

/// Why a command was refused. A refused command has no effect (B-2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("administration command refused: {status:?}, {qualifier:?}")]
pub struct Failure {
    /// The status the driver sees; never [`Status::Ok`].
    pub status: Status,
    /// The qualifier the driver sees.
    pub qualifier: Qualifier,
}

impl Failure {
    /// EINVAL with `qualifier`.
    pub const fn invalid(qualifier: Qualifier) -> Self {
        Self {
            status: Status::Invalid,
            qualifier,
        }
    }
}

/// EAGAIN: the command waited too long, and was undone.
pub(super) const TIMED_OUT: Failure = Failure {
    status: Status::Again,
    qualifier: Qualifier::TryAgain,
};

/// A command as it came. Any byte string is one: missing bytes read as zero.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    bytes: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads `bytes` as the device-readable part of a command.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// The opcode's number.
    pub fn opcode(&self) -> u16 {
        u16::from_le_bytes(zero_extended(self.bytes, 0))
    }

    /// The group type, if it is one.
    pub fn group(&self) -> Option<GroupType> {
        GroupType::from_raw(u16::from_le_bytes(zero_extended(self.bytes, 2)))
    }

    /// The group member id.
    pub fn member_id(&self) -> u64 {
        u64::from_le_bytes(zero_extended(self.bytes, 16))
    }

    /// The command-specific data that is there.
    pub fn data(&self) -> &'a [u8] {
        self.bytes.get(REQUEST_HEADER_LEN..).unwrap_or_default()
    }

    /// The device-readable part, as an owner driver builds it.
    pub fn encode(opcode: u16, group: GroupType, member_id: u64, data: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(REQUEST_HEADER_LEN + data.len());
        bytes.extend_from_slice(&opcode.to_le_bytes());
        bytes.extend_from_slice(&group.raw().to_le_bytes());
        bytes.extend_from_slice(&[0; 12]);
        bytes.extend_from_slice(&member_id.to_le_bytes());
        bytes.extend_from_slice(data);
        bytes
    }
}

/// `N` bytes from `offset` on; what is beyond the end reads as zero.
pub(super) fn zero_extended<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut out = [0; N];
    let there = bytes.get(offset..).unwrap_or_default();
    for (to, from) in out.iter_mut().zip(there) {
        *to = *from;
    }
    out
}

/// What a command that was done returns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// The command-specific output, of the commands that have one; 0 otherwise.
    pub output: u32,
    /// The command-specific result.
    pub result: Vec<u8>,
}

impl From<Vec<u8>> for Answer {
    fn from(result: Vec<u8>) -> Self {
        Self { output: 0, result }
    }
}

/// The answer to a command, or why there is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply(pub Result<Answer, Failure>);

impl Reply {
    /// The device-writable part, a multiple of 8 bytes long.
    pub fn encode(&self) -> Vec<u8> {
        let (status, qualifier, output, result) = match &self.0 {
            Ok(answer) => {
                let result = answer.result.as_slice();
                (Status::Ok, Qualifier::Ok, answer.output, result)
            }
            Err(failure) => (failure.status, failure.qualifier, 0, Default::default()),
        };
        let len = (REPLY_HEADER_LEN + result.len()).next_multiple_of(REPLY_UNIT);
        let mut bytes = Vec::with_capacity(len);
        bytes.extend_from_slice(&(status as u16).to_le_bytes());
        bytes.extend_from_slice(&(qualifier as u16).to_le_bytes());
        bytes.extend_from_slice(&output.to_le_bytes());
        bytes.extend_from_slice(result);
        bytes.resize(len, 0);
        bytes
    }
}

/// What became of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is done, or refused.
    Done(Reply),
    /// It waits for a member.
    Later,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b8_missing_bytes_of_a_request_read_as_zero() {
        let whole = Request::encode(0x1122, GroupType::SrIov, 0x0102_0304_0506_0708, &[9, 8]);
        assert_eq!(whole.len(), 26);
        let parts = |len: usize| {
            let request = Request::new(&whole[..len]);
            let group = request.group().map(GroupType::raw);
            (request.opcode(), group, request.member_id(), request.data())
        };
        let none: &[u8] = &[];
        for (len, expected) in [
            (0, (0, Some(0), 0, none)),
            (1, (0x22, Some(0), 0, none)),
            (3, (0x1122, Some(1), 0, none)),
            (17, (0x1122, Some(1), 8, none)),
            (24, (0x1122, Some(1), 0x0102_0304_0506_0708, none)),
            (25, (0x1122, Some(1), 0x0102_0304_0506_0708, &[9])),
            (26, (0x1122, Some(1), 0x0102_0304_0506_0708, &[9, 8])),
        ] {
            assert_eq!(parts(len), expected, "{len} bytes");
        }
    }

    #[test]
    fn a_group_type_that_is_not_there_is_none() {
        for raw in [2u16, 0x100, 0xffff] {
            let mut bytes = [0; 4];
            bytes[2..].copy_from_slice(&raw.to_le_bytes());
            assert_eq!(Request::new(&bytes).group(), None, "{raw:#x}");
        }
    }

    #[test]
    fn b2_b8_an_answer_is_its_codes_and_result_in_units_of_eight_bytes() {
        let done = |result: &[u8]| Reply(Ok(result.to_vec().into())).encode();
        assert_eq!(done(&[]), [0; 8]);
        let padded = [0, 0, 0, 0, 0, 0, 0, 0, 7, 6, 0, 0, 0, 0, 0, 0];
        assert_eq!(done(&[7, 6]), padded);
        assert_eq!(done(&[1; 8]).len(), 16);
        let refused = Reply(Err(Failure::invalid(Qualifier::InvalidMember))).encode();
        assert_eq!(refused, [22, 0, 5, 0, 0, 0, 0, 0]);
    }
}
