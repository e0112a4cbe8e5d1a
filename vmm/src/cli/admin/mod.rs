//! `tern admin`: administration commands by hand.
//!
//! | module | what it does |
//! |---|---|
//! | `member` | finds a virtual function, sends migration commands, says what answers mean |
//! | `mode` | its mode |
//! | `context` | its context, and files of contexts |
//! | `records` | what it writes |
//! | `managed` | commands of a transport virtqueue |

mod context;
mod managed;
mod member;
mod mode;
mod records;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};
use devices::admin::CommandSet;
use devices::admin::profile::{LIST_QUERY, LIST_USE};

use crate::api::client::request;
use crate::api::owners::{AdminAnswer, AdminCommand, from_hex};
use crate::cli::print::say;
use crate::exit;
use member::{Member, Refused};

const EXAMPLES: &str = "\
Examples:
  tern admin --api-socket guest.sock pf0 list-query
  tern admin --api-socket guest.sock pf0 list-use --group self
  tern admin --api-socket guest.sock pf0 raw --opcode 1 --group 1 --data 0300000000000000

  tern admin --api-socket guest.sock pf0-vf1 mode freeze
  tern admin --api-socket guest.sock pf0-vf1 context read vf1.ctx
  tern admin --api-socket guest.sock pf0-vf1 context show vf1.ctx
  tern admin --api-socket guest.sock pf0-vf1 mode active
  tern admin --api-socket guest.sock pf0-vf1 records start 0x0+256M

  tern admin --api-socket guest.sock manager0 managed --class 4 --command 1 --device 1

The first three are for an owner, the next five for one virtual function, whose owner has to have admin=draft; the last is for
a management device, and asks for the status of its device 1.
Commands go to the owner as bytes, the way those of the guest's driver do, but from a driver of the monitor's own, which
negotiates for itself. The exit status is 0 only if the owner answered OK.";

/// Send administration commands to an SR-IOV owner, or stop, save, restore and watch a virtual function with them; or commands
/// of the transport virtqueue to a management device.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Admin {
    /// Unix socket of the guest, as given to `tern run --api-socket`
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,

    /// Answer in JSON
    #[arg(long, global = true)]
    json: bool,

    /// Name of the owner, the virtual function or the management device, as `tern info` shows it: pf0 is the first --pf, pf0-vf1
    /// its first virtual function, manager0 the first --manager
    #[arg(value_name = "MEMBER")]
    name: String,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask which commands the owner has
    ListQuery(OfGroup),
    /// Take into use all commands the owner has
    ListUse(OfGroup),
    /// Send any command, well-formed or not
    Raw(Raw),
    /// Show or set the mode of a virtual function
    Mode(mode::Mode),
    /// Read, write and show the device context of a virtual function
    Context(context::ContextCommand),
    /// Record which pages of guest memory a virtual function writes
    Records(records::Records),
    /// Send a command of the transport virtqueue to a management device
    Managed(managed::Managed),
}

#[derive(Debug, Args)]
struct OfGroup {
    /// The group the commands are for: the owner itself, or its virtual functions
    #[arg(long, value_enum, default_value_t = Group::Sriov)]
    group: Group,
}

#[derive(Debug, Args)]
struct Raw {
    /// Opcode, decimal or 0x…
    #[arg(long, value_name = "N", value_parser = number16, allow_hyphen_values = true)]
    opcode: u16,

    /// Group type: 0 is the owner itself, 1 its virtual functions
    #[arg(long, value_name = "G", value_parser = number16, allow_hyphen_values = true)]
    group: u16,

    /// Group member id: 1 is the first virtual function
    #[arg(long, value_name = "M", value_parser = number, default_value = "0", allow_hyphen_values = true)]
    member: u64,

    /// Command-specific data in hexadecimal digits
    #[arg(long, value_name = "HEX", default_value = "")]
    data: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Group {
    #[value(name = "self")]
    Itself,
    Sriov,
}

/// Reads a decimal number, or a hexadecimal one after `0x`.
fn number(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "not a number of at most 64 bits; write it like 12 or 0xc".to_owned())
}

/// The same with 16 bits.
fn number16(text: &str) -> Result<u16, String> {
    let number = number(text).ok().and_then(|n| n.try_into().ok());
    number.ok_or_else(|| "not a number from 0 to 65535; write it like 12 or 0xc".to_owned())
}

impl Admin {
    /// Sends the command and shows the answer.
    pub fn run(&self) -> anyhow::Result<u8> {
        // A file is of no guest, so that need not run any more.
        if let Command::Context(context) = &self.command
            && let Some(file) = context.shown_file()
        {
            context::show_file(file, self.json)?;
            return Ok(0);
        }
        match &self.command {
            Command::ListQuery(of) => self.list_query(of.group),
            Command::ListUse(of) => self.list_use(of.group),
            Command::Raw(raw) => self.raw(raw),
            Command::Mode(mode) => self.with_member(|member| mode.run(member, self.json)),
            Command::Context(context) => self.with_member(|member| context.run(member, self.json)),
            Command::Records(records) => self.with_member(|member| records.run(member, self.json)),
            Command::Managed(managed) => managed.run(&self.api_socket, &self.name, self.json),
        }
    }

    fn with_member(&self, what: impl FnOnce(&Member) -> anyhow::Result<()>) -> anyhow::Result<u8> {
        let done = Member::find(&self.api_socket, &self.name).and_then(|member| what(&member));
        if let Err(error) = &done
            && let Some(refused) = error.downcast_ref::<Refused>()
            && self.json
        {
            say!("{}", serde_json::to_string(&refused.answer)?);
        }
        done.map(|()| 0)
    }

    fn send(
        &self,
        opcode: u16,
        group: u16,
        member: u64,
        data: String,
    ) -> anyhow::Result<AdminAnswer> {
        let command = AdminCommand {
            owner: self.name.clone(),
            opcode,
            group,
            member,
            data,
            room: None,
        };
        send(&self.api_socket, &command)
    }

    fn list_query(&self, group: Group) -> anyhow::Result<u8> {
        let answer = self.send(LIST_QUERY, group as u16, 0, String::new())?;
        let commands = listed(&answer);
        self.show(&answer, || format!("commands {commands}"))
    }

    fn list_use(&self, group: Group) -> anyhow::Result<u8> {
        let offered = self.send(LIST_QUERY, group as u16, 0, String::new())?;
        if offered.status != 0 {
            return self.show(&offered, String::new);
        }
        let answer = self.send(LIST_USE, group as u16, 0, offered.result.clone())?;
        let commands = listed(&offered);
        self.show(&answer, || format!("in use   {commands}"))
    }

    fn raw(&self, raw: &Raw) -> anyhow::Result<u8> {
        let answer = self.send(raw.opcode, raw.group, raw.member, raw.data.clone())?;
        let result = match answer.result.as_str() {
            "" => "none",
            result => result,
        };
        self.show(&answer, || match answer.output {
            0 => format!("result   {result}"),
            output => format!("output   {output}\nresult   {result}"),
        })
    }

    /// Shows `answer`, and what it means if it is a good one.
    fn show(&self, answer: &AdminAnswer, meaning: impl FnOnce() -> String) -> anyhow::Result<u8> {
        let done = answer.status == 0;
        if self.json {
            say!("{}", serde_json::to_string(answer)?);
        } else {
            say!("{}", outcome(answer));
            if done {
                say!("{}", meaning());
            }
        }
        Ok(if done { 0 } else { exit::SETUP })
    }
}

fn send(socket: &Path, command: &AdminCommand) -> anyhow::Result<AdminAnswer> {
    let body = serde_json::to_vec(command)?;
    Ok(request(socket, "POST", "/api/v1/admin", &body)?)
}

/// The two codes of an answer, and their numbers.
fn outcome(answer: &AdminAnswer) -> String {
    let AdminAnswer {
        status,
        status_name,
        qualifier,
        qualifier_name,
        ..
    } = answer;
    match (status, qualifier) {
        (0, 0) => format!("status   {status_name}"),
        _ => format!("status   {status_name} ({status}), {qualifier_name} ({qualifier})"),
    }
}

/// The commands in a list, by name and opcode.
fn listed(answer: &AdminAnswer) -> String {
    let set = from_hex(&answer.result).and_then(|bytes| CommandSet::parse(&bytes));
    let set = set.unwrap_or_default();
    let opcodes = (0..CommandSet::LIMIT).filter(|opcode| set.contains(*opcode));
    let names: Vec<_> = opcodes
        .map(|opcode| match opcode {
            LIST_QUERY => format!("LIST_QUERY ({opcode:#x})"),
            LIST_USE => format!("LIST_USE ({opcode:#x})"),
            opcode => format!("{opcode:#x}"),
        })
        .collect();
    match names.is_empty() {
        true => "none".to_owned(),
        false => names.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, qualifier: u16, result: &str) -> AdminAnswer {
        AdminAnswer {
            status,
            status_name: "S".to_owned(),
            qualifier,
            qualifier_name: "Q".to_owned(),
            output: 0,
            result: result.to_owned(),
        }
    }

    #[test]
    fn groups_have_the_numbers_of_the_wire() {
        use devices::admin::GroupType;
        assert_eq!(Group::Itself as u16, GroupType::SelfGroup.raw());
        assert_eq!(Group::Sriov as u16, GroupType::SrIov.raw());
    }

    #[test]
    fn lists_are_shown_by_name() {
        let text = listed(&answer(0, 0, "0300000000000080"));
        assert_eq!(text, "LIST_QUERY (0x0), LIST_USE (0x1), 0x3f");
        assert_eq!(listed(&answer(0, 0, "0000000000000000")), "none");
        assert_eq!(listed(&answer(0, 0, "")), "none");
    }

    #[test]
    fn outcomes_show_both_codes_if_there_is_anything_to_say() {
        assert_eq!(outcome(&answer(0, 0, "")), "status   S");
        assert_eq!(outcome(&answer(22, 5, "")), "status   S (22), Q (5)");
    }

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!((number("12"), number("0x1f")), (Ok(12), Ok(31)));
        assert!(number("1f").is_err() && number("-1").is_err() && number("").is_err());
        assert_eq!(number16("0xffff"), Ok(u16::MAX));
        assert!(number16("65536").is_err() && number16("-1").is_err());
    }
}
