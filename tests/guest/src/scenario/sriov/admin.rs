//! `admin-user`: an owner driver in user space, on a physical function that was taken from its driver.

use std::path::Path;
use std::rc::Rc;

use driver::access::FunctionExt;
use driver::pci::{change_command, command as pci_command, header};
use driver::virtio::admin::{AdminQueue, Answer, Shape, command, group, opcode, outcome};
use driver::virtio::{Transport, feature};

use super::super::Found;
use super::{Function, Owner};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::user::function::SysfsFunction;
use crate::user::memory::Pages;
use crate::{Context, Failure, Result, check};

/// The driver that does nothing but let virtual functions be enabled.
const STUB: &str = "pci-pf-stub";
const PAGES: usize = 32;
/// A group no device has, and an opcode no group has.
const NO_GROUP: u16 = 0x77;
const NO_OPCODE: u16 = 0x7fff;
/// Bytes per buffer of a command that has more of them than the queue has entries.
const CRUMBS: Shape = Shape::Indirect(1);

/// Issues administration commands through the real queue, and checks every answer; then the stock driver has the
/// function back.
pub fn run(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let n = request.number("n", 2)?;
    let strict = request.text("strict", "no") == "yes";
    check(owner.members()?.is_empty(), || {
        "virtual functions are enabled".into()
    })?;
    let log = Mark::now()?;
    let stock = owner
        .function
        .driver()
        .ok_or_else(|| Failure("the PF has no driver".into()))?;
    let module = Path::new("/sys/bus/pci/drivers").join(STUB);
    check(module.exists(), || format!("there is no driver {STUB}"))?;
    owner.function.unbind()?;
    owner.function.set("driver_override", STUB)?;
    owner.function.bind()?;
    check(owner.function.driver().as_deref() == Some(STUB), || {
        format!("the PF is not bound to {STUB}")
    })?;
    let driver = UserDriver::start(&owner)?;
    let commands = driver.examine(n, strict)?;
    log.check_clean()?;
    owner.function.unbind()?;
    // An empty line takes it back.
    owner.function.set("driver_override", "\n")?;
    owner.function.bind()?;
    check(owner.function.driver() == Some(stock), || {
        "the stock driver did not take the PF back".into()
    })?;
    owner.function.virtio_driver()?;
    // Linux asks about virtual functions before there are any, and says so when it is refused.
    if !strict {
        log.check_clean()?;
    }
    Ok(Found::default()
        .with("pf", &owner.function.address)
        .with("commands", commands)
        .with("vfs", n))
}

struct UserDriver<'a> {
    owner: &'a Owner,
    transport: Transport<SysfsFunction>,
    queue: AdminQueue<Rc<Pages>>,
    commands: u32,
}

impl<'a> UserDriver<'a> {
    /// Brings the device to DRIVER_OK, with nothing but its administration queue.
    fn start(owner: &'a Owner) -> Result<Self> {
        let function = owner.function.open()?;
        change_command(&function, pci_command::MEMORY | pci_command::BUS_MASTER, 0);
        let transport = Transport::new(function).context("the PF")?;
        let wanted = feature::SR_IOV | feature::ADMIN_VQ | feature::INDIRECT_DESC;
        let agreed = transport.negotiate(wanted).context("the PF")?;
        check(agreed & wanted == wanted, || {
            format!("the PF has features {agreed:#x} only")
        })?;
        let pages = Rc::new(Pages::new(PAGES)?);
        let queue = AdminQueue::new(&transport, pages).context("the PF")?;
        transport.start();
        Ok(Self {
            owner,
            transport,
            queue,
            commands: 0,
        })
    }

    fn send(&mut self, bytes: &[u8], room: usize, shape: Shape) -> Result<Answer> {
        self.commands += 1;
        let sent = self.queue.send(&self.transport, bytes, room, shape);
        sent.context(format_args!("command {}", self.commands))
    }

    /// Sends a command and expects this outcome; returns its result.
    fn expect(
        &mut self,
        (opcode, group, member): (u16, u16, u64),
        data: &[u8],
        expected: (u16, u16),
    ) -> Result<Vec<u8>> {
        let bytes = command(opcode, group, member, data);
        let answer = self.send(&bytes, 64, Shape::Direct)?;
        let outcome = answer.outcome();
        check(outcome == expected, || {
            format!(
                "opcode {opcode:#x} for member {member} of group {group} is answered {outcome:?} instead of {expected:?}"
            )
        })?;
        Ok(answer.result().to_vec())
    }

    /// What LIST_QUERY says about a group.
    fn supported(&mut self, group: u16) -> Result<u64> {
        let list = self.expect((opcode::LIST_QUERY, group, 0), &[], outcome::OK)?;
        let word = list.first_chunk().copied().map(u64::from_le_bytes);
        let word = word.ok_or_else(|| Failure("a list without a word".into()))?;
        check(word & 3 == 3, || {
            format!("group {group} supports {word:#x}")
        })?;
        Ok(word)
    }

    /// All of it; returns how many commands that took.
    fn examine(mut self, n: u16, strict: bool) -> Result<u32> {
        self.refusals()?;
        let lists = self.self_group()?;
        let early = match strict {
            true => outcome::INVALID_GROUP,
            false => outcome::OK,
        };
        self.expect((opcode::LIST_QUERY, group::SR_IOV, 0), &[], early)?;
        self.with_members(n, lists)?;
        self.expect((opcode::LIST_QUERY, group::SR_IOV, 0), &[], early)?;
        self.after_reset(lists)?;
        self.transport.reset().context("the end")?;
        Ok(self.commands)
    }

    /// Bad commands, in the order in which they are judged: group, opcode.
    fn refusals(&mut self) -> Result<()> {
        let query = opcode::LIST_QUERY;
        for (command, expected) in [
            ((query, NO_GROUP, 0), outcome::INVALID_GROUP),
            ((NO_OPCODE, NO_GROUP, 9), outcome::INVALID_GROUP),
            ((NO_OPCODE, group::SELF, 9), outcome::INVALID_OPCODE),
            ((0x12, group::SELF, 0), outcome::INVALID_OPCODE),
        ] {
            self.expect(command, &[], expected)?;
        }
        // For a command of any length there is an answer of the length there is room for.
        for (len, room, expected) in [
            (0, 8, outcome::OK),
            (3, 8, outcome::OK),
            (24, 2, outcome::OK),
            (24, 4, outcome::OK),
            (24, 16, outcome::OK),
        ] {
            let bytes = command(query, group::SELF, 0, &[]);
            let answer = self.send(&bytes[..len], room, Shape::Direct)?;
            check(
                answer.outcome() == expected && answer.bytes.len() == room,
                || {
                    format!(
                        "{len} bytes with room for {room} are answered {:?}",
                        answer.bytes
                    )
                },
            )?;
        }
        Ok(())
    }

    /// Negotiates for the group of the device itself. Returns what it supports.
    fn self_group(&mut self) -> Result<u64> {
        let supported = self.supported(group::SELF)?;
        let once = command(opcode::LIST_QUERY, group::SELF, 0, &[0; 80]);
        let crumbs = self.send(&once, 64, CRUMBS)?;
        let direct = self.send(&once, 64, Shape::Direct)?;
        check(crumbs == direct && crumbs.outcome() == outcome::OK, || {
            format!("in crumbs the answer is {:?}", crumbs.bytes)
        })?;
        let use_list = (opcode::LIST_USE, group::SELF, 0);
        let too_much = (supported | 1 << 63).to_le_bytes();
        self.expect(use_list, &too_much, outcome::INVALID_FIELD)?;
        self.supported(group::SELF)?;
        self.expect(use_list, &supported.to_le_bytes(), outcome::OK)?;
        check(self.supported(group::SELF)? == supported, || {
            "the list has changed".into()
        })?;
        Ok(supported)
    }

    /// The group of virtual functions while there are some, and the first of these.
    fn with_members(&mut self, n: u16, of_self: u64) -> Result<()> {
        self.owner.function.set("sriov_drivers_autoprobe", 0)?;
        self.owner.set_members(n)?;
        let supported = self.supported(group::SR_IOV)?;
        let use_list = (opcode::LIST_USE, group::SR_IOV, 0);
        self.expect(use_list, &1u64.to_le_bytes(), outcome::OK)?;
        check(self.supported(group::SR_IOV)? == supported, || {
            "the list has changed".into()
        })?;
        // LIST_USE was left out, and so it is gone, in this group alone.
        let give_back = supported.to_le_bytes();
        self.expect(use_list, &give_back, outcome::INVALID_OPCODE)?;
        check(self.supported(group::SELF)? == of_self, || {
            "groups are not apart".into()
        })?;
        for member in self.owner.members()? {
            examine_member(&member)?;
        }
        self.owner.set_members(0)?;
        self.owner.function.set("sriov_drivers_autoprobe", 1)
    }

    /// A reset forgets what was negotiated.
    fn after_reset(&mut self, of_self: u64) -> Result<()> {
        let again = Self::start(self.owner)?;
        (self.transport, self.queue) = (again.transport, again.queue);
        check(self.supported(group::SELF)? == of_self, || {
            "the list has changed".into()
        })?;
        let list = of_self.to_le_bytes();
        self.expect((opcode::LIST_USE, group::SELF, 0), &list, outcome::OK)?;
        Ok(())
    }
}

/// A virtual function comes up, and is no owner.
fn examine_member(member: &Function) -> Result<()> {
    member.check_answers()?;
    let function = member.open()?;
    let command: u16 = function.config(header::COMMAND);
    check(command & pci_command::BUS_MASTER == 0, || {
        format!("{} is bus master from the start", member.address)
    })?;
    let transport = Transport::new(function).context(&member.address)?;
    transport.negotiate(0).context(&member.address)?;
    check(transport.queue_size(0) != 0, || {
        format!("{} has no queue", member.address)
    })?;
    transport.reset().context(&member.address)
}
