//! A virtual function of a running guest, and the migration commands for it.

use std::path::{Path, PathBuf};

use anyhow::bail;
use devices::admin::{CommandSet, GroupType, Migration, Profile};

use super::send;
use crate::api::Info;
use crate::api::client::request;
use crate::api::owners::{AdminAnswer, AdminCommand, Owner, from_hex, to_hex};

/// A virtual function that exists, whose commands the monitor has taken into use.
pub struct Member {
    socket: PathBuf,
    /// Its name, as `tern info` shows it.
    pub name: String,
    owner: String,
    id: u16,
    profile: Profile,
}

/// What a command returned.
pub struct Done {
    /// Its command-specific output.
    pub output: u32,
    /// Its command-specific result, with its padding.
    pub result: Vec<u8>,
}

impl Done {
    /// The le64 at byte `at` of the result; 0 if it is not there.
    pub fn number(&self, at: usize) -> u64 {
        let bytes = self.result.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// A command that its owner refused.
#[derive(Debug, thiserror::Error)]
#[error("{command} for {member} was answered {}, {}: {reason}", answer.status_name, answer.qualifier_name)]
pub struct Refused {
    command: &'static str,
    member: String,
    /// The answer.
    pub answer: AdminAnswer,
    reason: String,
}

impl Member {
    /// Finds the one that is called `name`, and takes the commands of its group into use.
    pub fn find(socket: &Path, name: &str) -> anyhow::Result<Self> {
        let info: Info = request(socket, "GET", "/api/v1/info", b"")?;
        let (owner, id) = locate(&info.owners, name)?;
        let member = Self {
            socket: socket.to_owned(),
            name: name.to_owned(),
            owner: owner.name.clone(),
            id,
            profile: owner.admin.parse()?,
        };
        member.negotiate()?;
        Ok(member)
    }

    /// The monitor is one driver, so what it took into use before stays in use.
    fn negotiate(&self) -> anyhow::Result<()> {
        let send = |opcode, data: &[u8]| self.send(opcode, 0, data);
        let list = send(devices::admin::profile::LIST_QUERY, &[])?;
        let list = from_hex(&list.result).and_then(|bytes| CommandSet::parse(&bytes));
        // Refused here means given up by `list-use`, which is seen with the command itself.
        if let Some(list) = list.filter(|list| *list != CommandSet::EMPTY) {
            send(devices::admin::profile::LIST_USE, &list.encode())?;
        }
        Ok(())
    }

    fn send(&self, opcode: u16, member: u16, data: &[u8]) -> anyhow::Result<AdminAnswer> {
        let command = AdminCommand {
            owner: self.owner.clone(),
            opcode,
            group: GroupType::SrIov.raw(),
            member: member.into(),
            data: to_hex(data),
            room: None,
        };
        send(&self.socket, &command)
    }

    /// Executes `command` for it.
    ///
    /// # Errors
    ///
    /// [`Refused`] if the owner's answer is not OK.
    pub fn command(&self, command: Migration, data: &[u8]) -> anyhow::Result<Done> {
        let Some(opcode) = self.profile.opcode(command) else {
            bail!(
                "{} has no command {}, as it has those of admin={}; start the guest with `--pf …,admin=draft`",
                self.owner,
                name(command),
                self.profile.name()
            );
        };
        let answer = self.send(opcode, self.id, data)?;
        if answer.status != 0 {
            let reason = self.reason(command, &answer);
            return Err(Refused {
                command: name(command),
                member: self.name.clone(),
                answer,
                reason,
            }
            .into());
        }
        Ok(Done {
            output: answer.output,
            result: from_hex(&answer.result).unwrap_or_default(),
        })
    }

    /// What an answer means, and what to do about it.
    fn reason(&self, command: Migration, answer: &AdminAnswer) -> String {
        let Self { name, owner, .. } = self;
        match (answer.status_name.as_str(), answer.qualifier_name.as_str()) {
            ("EAGAIN", _) => format!(
                "{name} did not come to rest in time, and nothing has changed. What it has in flight may wait for storage \
                 that does not answer; try again"
            ),
            ("ENOMEM", _) => "the monitor has no memory for it; nothing has changed".to_owned(),
            (_, "INVALID_MEMBER") => format!("{name} has ceased to exist; `tern info` shows those there are"),
            (_, "INVALID_GROUP") => format!("the guest has not enabled the virtual functions of {owner}"),
            (_, "INVALID_OPCODE") => format!(
                "the monitor gave that command up with LIST_USE, and {owner} gives back none; start the guest anew"
            ),
            (_, "INVALID_COMMAND") => match command {
                Migration::ModeSet => format!(
                    "its context was read or written in part. Finish that, or drop it with `{name} context discard`"
                ),
                Migration::ContextWrite => {
                    format!("a context is written in mode freeze only; first `{name} mode freeze`")
                }
                Migration::RecordRead => {
                    format!("its writes are not recorded; first `{name} records start`")
                }
                _ => "that makes no sense in its present state".to_owned(),
            },
            (_, "INVALID_FIELD") => match command {
                Migration::ContextWrite => {
                    "that is no context of this device; the monitor's log (TERN_LOG=debug) has the field".to_owned()
                }
                Migration::RecordStart => {
                    "a page size that cannot be, another one than that in force, or ranges that are not whole pages or \
                     overlap; see `records caps`"
                        .to_owned()
                }
                Migration::RecordRead => {
                    "the range is not whole pages, or not within one that is recorded".to_owned()
                }
                _ => "a value cannot be".to_owned(),
            },
            _ => "the owner did not say why".to_owned(),
        }
    }
}

/// The owner of the member that is called `name`, and its number.
fn locate<'a>(owners: &'a [Owner], name: &str) -> anyhow::Result<(&'a Owner, u16)> {
    for owner in owners {
        let found = owner.members.iter().find(|m| m.function.name == name);
        if let Some(member) = found {
            return Ok((owner, member.id));
        }
    }
    let there = owners.iter().flat_map(|owner| &owner.members);
    let mut there: Vec<_> = there.map(|member| member.function.name.as_str()).collect();
    let more = there.len().saturating_sub(8);
    there.truncate(8);
    let there = match there.as_slice() {
        [] => "there is none now".to_owned(),
        names if more > 0 => format!("there is {} and {more} more", names.join(", ")),
        names => format!("there is {}", names.join(", ")),
    };
    if owners.is_empty() {
        bail!("this guest has no SR-IOV owner (tern run --pf)");
    }
    if owners.iter().any(|owner| owner.name == name) {
        bail!("{name} is an owner, and this is for virtual functions; {there}");
    }
    bail!("no virtual function is called {name}, or the guest has not enabled it; {there}");
}

/// The name of a command in the proposal.
pub fn name(command: Migration) -> &'static str {
    match command {
        Migration::ModeGet => "DEV_MODE_GET",
        Migration::ModeSet => "DEV_MODE_SET",
        Migration::ContextSize => "DEV_CTX_SIZE_GET",
        Migration::ContextRead => "DEV_CTX_READ",
        Migration::ContextWrite => "DEV_CTX_WRITE",
        Migration::ContextFields => "DEV_CTX_FIELDS_QUERY",
        Migration::ContextDiscard => "DEV_CTX_DISCARD",
        Migration::RecordCaps => "DEV_WRITE_RECORD_CAP_QUERY",
        Migration::RecordStart => "DEV_WRITE_RECORDS_START",
        Migration::RecordStop => "DEV_WRITE_RECORDS_STOP",
        Migration::RecordRead => "DEV_WRITE_RECORDS_READ",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::owners::{Function, Member as Shown};

    fn owner(name: &str, members: u16) -> Owner {
        let function = |name: String| Function {
            name,
            place: None,
            live: false,
            status: Vec::new(),
            features: "0x0".to_owned(),
            stopped_by: Vec::new(),
            doors: Vec::new(),
            packed: false,
            uses_packed: false,
        };
        let member = |id| Shown {
            id,
            function: function(format!("{name}-vf{id}")),
            guest_mode: "active".to_owned(),
            monitor_mode: "active".to_owned(),
            recorded_by: Vec::new(),
        };
        Owner {
            name: name.to_owned(),
            device: "net".to_owned(),
            passthrough: false,
            admin: "draft".to_owned(),
            strict_admin: false,
            function: None,
            total_members: members,
            existing_members: members,
            members: (1..=members).map(member).collect(),
            switch: Vec::new(),
        }
    }

    #[test]
    fn members_are_found_by_the_name_info_shows() {
        let owners = [owner("pf0", 2), owner("pf1", 11), owner("pf2", 0)];
        let (found, id) = locate(&owners, "pf1-vf11").unwrap();
        assert_eq!((found.name.as_str(), id), ("pf1", 11));
        for (owners, name, part) in [
            (
                &owners[..],
                "pf0-vf3",
                "pf0-vf3, or the guest has not enabled it; there is pf0-vf1, pf0-vf2, ",
            ),
            (&owners, "pf0-vf3", "and 5 more"),
            (&owners, "pf1", "pf1 is an owner"),
            (&owners[2..], "pf2-vf1", "there is none now"),
            (&[], "pf0-vf1", "no SR-IOV owner"),
        ] {
            let message = locate(owners, name).err().unwrap().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn every_command_has_its_opcode_in_the_draft_alone() {
        let opcodes = [
            Migration::ModeGet,
            Migration::ModeSet,
            Migration::ContextSize,
            Migration::ContextRead,
            Migration::ContextWrite,
            Migration::ContextFields,
            Migration::ContextDiscard,
            Migration::RecordCaps,
            Migration::RecordStart,
            Migration::RecordStop,
            Migration::RecordRead,
        ]
        .map(|command| (Profile::Draft.opcode(command), name(command)));
        assert_eq!(opcodes[0], (Some(7), "DEV_MODE_GET"));
        assert_eq!(opcodes[4], (Some(0xb), "DEV_CTX_WRITE"));
        assert_eq!(opcodes[10], (Some(0x12), "DEV_WRITE_RECORDS_READ"));
        assert!(opcodes.iter().all(|(opcode, _)| opcode.is_some()));
        assert_eq!(Profile::V1_4.opcode(Migration::ModeSet), None);
    }
}
