//! What the API says about SR-IOV owners and their members, and the administration commands it takes.

use std::sync::Arc;

use devices::admin::queue::MAX_DATA;
use devices::admin::{GroupType, Member as _, Request, Strictness};
use devices::gate::Party;
use devices::net::PortInfo;
use devices::virtio::{Status, VirtioFunction};
use pci::topology::Bdf;
use serde::{Deserialize, Serialize};

use crate::config::offer;
use crate::machine::Machine;
use crate::machine::lease::Busy;
use crate::machine::owner::Group;

/// An SR-IOV owner and its members.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Its name, which administration commands address.
    pub name: String,
    /// `net` or `block`.
    pub device: String,
    /// The monitor keeps the owner; the guest has its members as plain devices.
    pub passthrough: bool,
    /// The set of administration commands it has.
    pub admin: String,
    /// It takes those commands to the letter of virtio 1.4.
    pub strict_admin: bool,
    /// The owner's function; absent if the monitor keeps it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub function: Option<Function>,
    /// The most members there can be.
    pub total_members: u16,
    /// How many there are now.
    pub existing_members: u16,
    /// The members that exist now.
    pub members: Vec<Member>,
    /// The ports of the switch that owner and members are on; other functions may be on it too.
    pub switch: Vec<PortInfo>,
}

/// A member that exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its group member id.
    pub id: u16,
    /// The function.
    #[serde(flatten)]
    pub function: Function,
    /// The mode the owner's driver in the guest gave it: `active`, `stop` or `freeze`.
    pub guest_mode: String,
    /// The mode the monitor gave it. It runs if both are `active`.
    pub monitor_mode: String,
    /// Who has its writes recorded: `guest`, `monitor`.
    pub recorded_by: Vec<String>,
}

/// What a function does now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Its name in messages.
    pub name: String,
    /// Its place on the PCI bus; absent while the guest has not numbered the bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<String>,
    /// A driver uses it.
    pub live: bool,
    /// The bits of the device status, by their names.
    pub status: Vec<String>,
    /// The features its driver accepted, as a hexadecimal number.
    pub features: String,
    /// Why it is stopped; empty while it runs.
    pub stopped_by: Vec<String>,
    /// What its driver can stop it with, as options write it.
    pub doors: Vec<String>,
    /// Its driver may choose packed rings.
    pub packed: bool,
    /// It did.
    #[serde(default)]
    pub uses_packed: bool,
}

/// Body of `POST /api/v1/admin`: one administration command, from the monitor's own driver of the owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminCommand {
    /// Name of the owner.
    pub owner: String,
    /// Opcode.
    pub opcode: u16,
    /// Group type: 0 is the owner itself, 1 its SR-IOV members.
    pub group: u16,
    /// Group member id.
    #[serde(default)]
    pub member: u64,
    /// Command-specific data in hexadecimal digits.
    #[serde(default)]
    pub data: String,
    /// Bytes there are for the command-specific result; 1 MiB, which is also the most, if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u32>,
}

/// Answer to `POST /api/v1/admin`: what the owner answered, be it good or bad.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdminAnswer {
    /// Status; 0 is success.
    pub status: u16,
    /// Its name.
    pub status_name: String,
    /// Status qualifier.
    pub qualifier: u16,
    /// Its name.
    pub qualifier_name: String,
    /// Command-specific output; 0 of commands that have none.
    pub output: u32,
    /// Command-specific result in hexadecimal digits, with its padding.
    pub result: String,
}

/// Why a command did not reach an owner.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdminError {
    /// No owner of this name.
    #[error("no owner is called {name}; {there}")]
    Owner {
        /// The name.
        name: String,
        /// Those there are.
        there: String,
    },
    /// Somebody else has the guest for himself.
    #[error(transparent)]
    Busy(#[from] Busy),
    /// Data that are no bytes.
    #[error("'{0}' is not an even number of hexadecimal digits")]
    Data(String),
}

/// The owners of a machine as they are now.
pub fn describe(machine: &Machine) -> Vec<Owner> {
    let groups = machine.functions().groups();
    groups.iter().map(|group| owner(machine, group)).collect()
}

fn owner(machine: &Machine, group: &Group) -> Owner {
    let place = |number| group.place(machine.pci(), number);
    // Asked once, so that the list and the count agree.
    let existing = group.owner.members().count();
    let options = group.owner.options();
    let members = group.members.iter().take(existing);
    let members: Vec<_> = (1..)
        .zip(members)
        .map(|(id, member)| self::member(id, member, place(id)))
        .collect();
    Owner {
        name: group.name.clone(),
        device: group.declaration.device_type().name().to_owned(),
        passthrough: group.declaration.passthrough,
        admin: options.profile.name().to_owned(),
        strict_admin: options.strictness == Strictness::Strict,
        function: group.pf.as_ref().map(|pf| function(pf, place(0))),
        total_members: group.declaration.vfs,
        existing_members: members.len() as u16,
        members,
        switch: group.switch_ports(),
    }
}

fn member(id: u16, member: &Arc<VirtioFunction>, place: Option<Bdf>) -> Member {
    let mode = |party| member.mode(party).name().to_owned();
    let records = member.records();
    let recorded_by = [("guest", Party::Guest), ("monitor", Party::Monitor)]
        .into_iter()
        .filter(|(_, party)| records.is_recording(*party));
    Member {
        id,
        function: function(member, place),
        guest_mode: mode(Party::Guest),
        monitor_mode: mode(Party::Monitor),
        recorded_by: names(recorded_by.map(|(name, _)| name)),
    }
}

pub(super) fn function(function: &Arc<VirtioFunction>, place: Option<Bdf>) -> Function {
    let features = [0, 1].map(|window| u64::from(function.driver_features(window)));
    let status = Status::from_bits_truncate(function.status());
    Function {
        name: function.name().to_owned(),
        place: place.map(|place| place.to_string()),
        live: status.contains(Status::DRIVER_OK),
        status: names(status.iter_names().map(|(name, _)| name)),
        features: format!("{:#x}", features[0] | features[1] << 32),
        stopped_by: stopped_by(function),
        doors: offer::names(function.doors()),
        packed: function.offers_packed(),
        uses_packed: function.is_packed(),
    }
}

/// Why `function` is stopped.
pub fn stopped_by(function: &VirtioFunction) -> Vec<String> {
    names(function.reasons().iter_names().map(|(name, _)| name))
}

fn names<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    names.map(str::to_owned).collect()
}

/// Hands `command` to its owner.
pub fn execute(machine: &Machine, command: &AdminCommand) -> Result<AdminAnswer, AdminError> {
    let groups = machine.functions().groups();
    let group = groups.iter().find(|group| group.name == command.owner);
    let group = group.ok_or_else(|| {
        let names: Vec<_> = groups.iter().map(|group| group.name.as_str()).collect();
        AdminError::Owner {
            name: command.owner.clone(),
            there: match names.as_slice() {
                [] => "this guest has none (tern run --pf)".to_owned(),
                names => format!("there is {}", names.join(", ")),
            },
        }
    })?;
    let room = command
        .room
        .map_or(MAX_DATA, |room| MAX_DATA.min(room as usize));
    let request = command.encode()?;
    let _under_way = machine.command()?;
    let reply = group.execute_within(&request, room).encode();
    Ok(AdminAnswer::decode(&reply))
}

impl AdminCommand {
    /// The device-readable part.
    fn encode(&self) -> Result<Vec<u8>, AdminError> {
        let data = from_hex(&self.data).ok_or_else(|| AdminError::Data(self.data.clone()))?;
        let mut bytes = Request::encode(self.opcode, GroupType::SelfGroup, self.member, &data);
        // Any number goes, also one that is no group type.
        if let Some(group) = bytes.get_mut(2..4) {
            group.copy_from_slice(&self.group.to_le_bytes());
        }
        Ok(bytes)
    }
}

impl AdminAnswer {
    /// Reads the device-writable part.
    fn decode(bytes: &[u8]) -> Self {
        let number = |at: usize| {
            let bytes = bytes.get(at..at + 2).and_then(|b| b.try_into().ok());
            bytes.map_or(0, u16::from_le_bytes)
        };
        let (status, qualifier) = (number(0), number(2));
        Self {
            status,
            status_name: name(STATUSES, status),
            qualifier,
            qualifier_name: name(QUALIFIERS, qualifier),
            output: u32::from(number(6)) << 16 | u32::from(number(4)),
            result: to_hex(bytes.get(8..).unwrap_or_default()),
        }
    }
}

/// Statuses of administration commands (virtio 1.4, "Group administration commands").
const STATUSES: &[(u16, &str)] = &[(0, "OK"), (11, "EAGAIN"), (12, "ENOMEM"), (22, "EINVAL")];
/// Their qualifiers.
const QUALIFIERS: &[(u16, &str)] = &[
    (0, "OK"),
    (1, "INVALID_COMMAND"),
    (2, "INVALID_OPCODE"),
    (3, "INVALID_FIELD"),
    (4, "INVALID_GROUP"),
    (5, "INVALID_MEMBER"),
    (6, "NORESOURCE"),
    (7, "TRYAGAIN"),
];

fn name(names: &[(u16, &str)], number: u16) -> String {
    let found = names.iter().find(|(n, _)| *n == number);
    found.map_or_else(|| number.to_string(), |(_, name)| (*name).to_owned())
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of an even number of hexadecimal digits.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| Some(c.to_digit(16)? as u8)).collect();
    let digits = digits.filter(|digits| digits.len().is_multiple_of(2))?;
    let bytes = digits.chunks_exact(2);
    Some(
        bytes
            .map(|pair| pair.iter().fold(0, |b, d| b << 4 | d))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_digits_agree() {
        for (text, bytes) in [("", &[][..]), ("00ff", &[0, 255]), ("0A1b", &[10, 27])] {
            assert_eq!(from_hex(text).as_deref(), Some(bytes));
            assert_eq!(to_hex(bytes), text.to_lowercase());
        }
        for text in ["0", "0g", "é", " 0", "0x00", "+1"] {
            assert_eq!(from_hex(text), None, "{text}");
        }
    }

    #[test]
    fn commands_are_sent_as_they_were_asked_for() {
        let command = AdminCommand {
            owner: "pf0".to_owned(),
            opcode: 0x1234,
            group: 0xabcd,
            member: 7,
            data: "0102".to_owned(),
            room: None,
        };
        let mut expected = vec![0; 26];
        expected[..4].copy_from_slice(&[0x34, 0x12, 0xcd, 0xab]);
        expected[16] = 7;
        expected[24..].copy_from_slice(&[1, 2]);
        assert_eq!(command.encode(), Ok(expected));
        let data = "1".to_owned();
        let broken = AdminCommand { data, ..command };
        assert_eq!(broken.encode(), Err(AdminError::Data("1".to_owned())));
    }

    #[test]
    fn answers_are_named() {
        let answer = AdminAnswer::decode(&[22, 0, 5, 0, 0, 0, 0, 0]);
        let names = (answer.status_name.as_str(), answer.qualifier_name.as_str());
        assert_eq!(names, ("EINVAL", "INVALID_MEMBER"));
        let answer = AdminAnswer::decode(&[99, 0, 0, 1, 4, 3, 2, 1, 3, 0]);
        assert_eq!((answer.status_name.as_str(), answer.qualifier), ("99", 256));
        assert_eq!(
            (answer.output, answer.result.as_str()),
            (0x0102_0304, "0300")
        );
    }
}
