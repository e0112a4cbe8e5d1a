//! The envelope of a command on the transport virtqueue, in both layouts, and the numbers of commands and errors.
//!
//! The proposal has the commands and leaves out what is around them (G4-a). Both layouts are ours; all fields are little-endian.
//!
//! | part | aligned | packed | field |
//! |---|---|---|---|
//! | device-readable | 0 | 0 | le64 device id; 0 is the management device |
//! | | 8 | 8 | le16 class |
//! | | 10 | 10 | le16 command |
//! | | 12 | | 4 reserved bytes |
//! | | 16 | 12 | command-out-data |
//! | device-writable | 0 | 0 | u8 ack: 0 is OK, 1 is an error |
//! | | 1 | | u8 error code |
//! | | 2 | | 2 reserved bytes |
//! | | 4 | | le32 length of command-in-data |
//! | | 8 | 1 | command-in-data |
//!
//! In `aligned`, fields of command-out-data and command-in-data are at multiples of their size, and both are padded to a
//! multiple of eight bytes (M22); padding at the end may be missing. In `packed` there is none, as the proposal has it.

use super::body::{Body, Fields};

/// How fields are laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Wire {
    /// At multiples of their size.
    #[default]
    Aligned,
    /// One after the other, as the proposal writes them.
    Packed,
}

impl Wire {
    /// Its name in declarations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aligned => "aligned",
            Self::Packed => "packed",
        }
    }

    /// The one that is called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Aligned, Self::Packed]
            .into_iter()
            .find(|wire| wire.name() == name)
    }

    /// Bytes of the device-readable part before command-out-data.
    pub const fn request_header_len(self) -> usize {
        match self {
            Self::Aligned => 16,
            Self::Packed => 12,
        }
    }

    /// Bytes of the device-writable part before command-in-data.
    pub const fn reply_header_len(self) -> usize {
        match self {
            Self::Aligned => 8,
            Self::Packed => 1,
        }
    }
}

/// Why a command failed. One that fails has no effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u8)]
pub enum Error {
    /// There is no such class or command; or the driver did not accept the feature that has it (S4-2).
    #[error("no such command")]
    Command = 1,
    /// No device has this id; or the command is not for the management device, or for no other.
    #[error("no such device, or one that the command is not for")]
    Device = 2,
    /// The device has no virtqueue with this index.
    #[error("no such virtqueue")]
    Queue = 3,
    /// Command-out-data is too short.
    #[error("command-out-data is too short")]
    Length = 4,
    /// A field has a value that it cannot have.
    #[error("a field has a value it cannot have")]
    Value = 5,
    /// Not now: the virtqueue is enabled, or the driver of the device has not come so far, or has gone further.
    #[error("not in this state of the device or the virtqueue")]
    State = 6,
    /// Nothing is left of what the command needs.
    #[error("nothing is left of what the command needs")]
    Resource = 7,
    /// The device-writable part is too short for the answer.
    #[error("the device-writable part is too short for the answer")]
    ReplyTooShort = 8,
}

impl Error {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Command,
        Self::Device,
        Self::Queue,
        Self::Length,
        Self::Value,
        Self::State,
        Self::Resource,
        Self::ReplyTooShort,
    ];
}

/// A command. Its class and number are in [`Command::TABLE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(
    missing_docs,
    reason = "each is described in the table of the module `transport_vq`"
)]
pub enum Command {
    AvailResGet,
    Create,
    Destroy,
    FeatDeviceGet,
    FeatDriverSet,
    FeatDriverGet,
    StatusSet,
    StatusGet,
    GenerationGet,
    ConfigGet,
    ConfigSet,
    MsiVqSet,
    MsiVqEnable,
    MsiVqMask,
    MsiConfigSet,
    MsiConfigEnable,
    MsiConfigMask,
    MsiVqGet,
    MsiConfigGet,
    VqAddrSet,
    VqAddrGet,
    VqEnableSet,
    VqEnableGet,
    VqSizeSet,
    VqSizeGet,
    VqNotifyGet,
    VqStateSet,
    VqStateGet,
    VqAsidSet,
    VqAsidGet,
    VqReset,
}

impl Command {
    /// Class and number of each. Those of NOTIFY, ASID and RESET begin with 1, as in the proposal (G4-e).
    pub const TABLE: [(Self, u16, u16); 31] = [
        (Self::AvailResGet, 1, 0),
        (Self::Create, 2, 0),
        (Self::Destroy, 2, 1),
        (Self::FeatDeviceGet, 3, 0),
        (Self::FeatDriverSet, 3, 1),
        (Self::FeatDriverGet, 3, 2),
        (Self::StatusSet, 4, 0),
        (Self::StatusGet, 4, 1),
        (Self::GenerationGet, 5, 0),
        (Self::ConfigGet, 6, 0),
        (Self::ConfigSet, 6, 1),
        (Self::MsiVqSet, 7, 0),
        (Self::MsiVqEnable, 7, 1),
        (Self::MsiVqMask, 7, 2),
        (Self::MsiConfigSet, 7, 3),
        (Self::MsiConfigEnable, 7, 4),
        (Self::MsiConfigMask, 7, 5),
        (Self::MsiVqGet, 7, 6),
        (Self::MsiConfigGet, 7, 7),
        (Self::VqAddrSet, 8, 0),
        (Self::VqAddrGet, 8, 1),
        (Self::VqEnableSet, 9, 0),
        (Self::VqEnableGet, 9, 1),
        (Self::VqSizeSet, 10, 0),
        (Self::VqSizeGet, 10, 1),
        (Self::VqNotifyGet, 11, 1),
        (Self::VqStateSet, 12, 0),
        (Self::VqStateGet, 12, 1),
        (Self::VqAsidSet, 13, 1),
        (Self::VqAsidGet, 13, 2),
        (Self::VqReset, 14, 1),
    ];

    /// The one with this class and number.
    pub fn from_raw(class: u16, number: u16) -> Option<Self> {
        let found = Self::TABLE
            .iter()
            .find(|row| (row.1, row.2) == (class, number));
        found.map(|row| row.0)
    }

    /// Its class and number.
    pub fn raw(self) -> (u16, u16) {
        let found = Self::TABLE.iter().find(|row| row.0 == self);
        found.map_or((0, 0), |row| (row.1, row.2))
    }

    /// True if it is for the management device, whose id is 0 (S4-3, S4-6). All others are for a managed device.
    pub fn is_for_manager(self) -> bool {
        matches!(self, Self::AvailResGet | Self::Create)
    }
}

/// A command as it came.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Which device it is for.
    pub device: u64,
    /// What is to be done.
    pub command: Command,
    /// Command-out-data.
    pub data: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads `bytes`, the device-readable part of a command.
    ///
    /// # Errors
    ///
    /// It has no whole header, or there is no such command.
    pub fn parse(wire: Wire, bytes: &'a [u8]) -> Result<Self, Error> {
        let mut header = Body::new(wire, bytes);
        let device = header.u64()?;
        let (class, number) = (header.u16()?, header.u16()?);
        let command = Command::from_raw(class, number).ok_or(Error::Command)?;
        let data = bytes
            .get(wire.request_header_len()..)
            .ok_or(Error::Length)?;
        Ok(Self {
            device,
            command,
            data,
        })
    }

    /// The device-readable part, as a driver builds it.
    pub fn encode(self, wire: Wire) -> Vec<u8> {
        let (class, number) = self.command.raw();
        let mut header = Fields::new(wire);
        header.u64(self.device).u16(class).u16(number);
        let mut bytes = header.bytes();
        bytes.resize(wire.request_header_len(), 0);
        bytes.extend_from_slice(self.data);
        bytes
    }
}

/// What a command has for an answer: command-in-data, or why it failed.
pub type Answer = Result<Vec<u8>, Error>;

/// The device-writable part that says `answer`, for which there are `room` bytes. It may be longer if that cannot be: what does
/// not fit is not written.
pub fn encode_reply(wire: Wire, answer: &Answer, room: usize) -> Vec<u8> {
    let (code, data) = match answer {
        Ok(data) => (0, data.as_slice()),
        Err(error) => (*error as u8, [].as_slice()),
    };
    let mut bytes = vec![u8::from(code != 0)];
    if wire == Wire::Aligned {
        let space = room.saturating_sub(wire.reply_header_len());
        let len = data.len().next_multiple_of(8).min(space.max(data.len()));
        bytes.extend([code, 0, 0]);
        // Answers are far shorter than 4 GiB.
        bytes.extend((len as u32).to_le_bytes());
        bytes.extend_from_slice(data);
        bytes.resize(wire.reply_header_len() + len, 0);
    } else {
        bytes.extend_from_slice(data);
    }
    bytes
}

/// Reads what [`encode_reply`] wrote, as a driver does. The packed layout does not tell errors apart: all of them are
/// [`Error::Command`] then. `None` if `bytes` is no reply.
pub fn decode_reply(wire: Wire, bytes: &[u8]) -> Option<Answer> {
    let ack = *bytes.first()?;
    let data = bytes.get(wire.reply_header_len()..)?;
    match (ack, wire) {
        (0, Wire::Packed) => Some(Ok(data.to_vec())),
        (0, Wire::Aligned) => {
            let len = u32::from_le_bytes(bytes.get(4..8)?.try_into().ok()?);
            let data = data.get(..usize::try_from(len).ok()?)?;
            Some(Ok(data.to_vec()))
        }
        (1, Wire::Packed) => Some(Err(Error::Command)),
        (1, Wire::Aligned) => {
            let code = *bytes.get(1)?;
            let error = Error::ALL.into_iter().find(|error| *error as u8 == code)?;
            Some(Err(error))
        }
        _ => None,
    }
}
