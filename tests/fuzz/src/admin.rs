//! Administration commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use devices::admin::{
    CommandSet, Drain, GroupType, Member, Membership, Options, Outcome, Owner, Profile, Qualifier,
    Session, Status, Strictness,
};
use devices::gate::{Mode, Party};
use devices::state::FunctionState;
use devices::virtio::VirtioFunction;
use driver::host::{HostDma, Shape};
use driver::virtio::admin::command;

use crate::fixture::loopback;
use crate::input::Input;

const MEMBERS: u16 = 3;
const RAM: usize = 1 << 20;
/// No VF is enabled: there is no group.
const DISABLED: u16 = u16::MAX;

/// NumVFs, or [`DISABLED`].
struct Vfs(AtomicU16);

impl Membership for Vfs {
    fn enabled_members(&self) -> Option<u16> {
        Some(self.0.load(Relaxed)).filter(|vfs| *vfs != DISABLED)
    }
}

/// Two drivers of one owner, whose members come and go and who may be reset, send any bytes: every answer is one the
/// rules allow, a refused command changes nothing, and neither sees what the other negotiated.
pub fn admin_commands(data: &[u8]) {
    let mut input = Input::new(data);
    let bits = input.byte();
    let options = Options {
        profile: [Profile::V1_4, Profile::Draft][usize::from(bits & 1)],
        strictness: [Strictness::Lenient, Strictness::Strict][usize::from(bits >> 1 & 1)],
        drain: Drain::default(),
    };
    let owner = owner(options);
    let vfs = Arc::new(Vfs(AtomicU16::new(DISABLED)));
    owner.set_membership(Arc::clone(&vfs) as _);
    let parties = [Party::Guest, Party::Monitor];
    let mut sessions = parties.map(Session::new);
    while !input.is_empty() {
        let which = usize::from(input.pick(2));
        match input.pick(16) {
            0 => {
                let choice = u16::from(input.pick(MEMBERS as u8 + 2));
                let enabled = if choice > MEMBERS { DISABLED } else { choice };
                vfs.0.store(enabled, Relaxed);
            }
            1 => owner.forget(&mut sessions[which]),
            _ => {
                let other = lists(&sessions[1 - which]);
                let request = any_request(&mut input);
                execute(&owner, &vfs, &mut sessions[which], &request);
                let after = lists(&sessions[1 - which]);
                assert_eq!(after, other, "the other driver's session");
            }
        }
    }
}

fn owner(options: Options) -> Arc<Owner> {
    let dma = HostDma::new(0, RAM).expect("RAM");
    let members = (1..=MEMBERS).map(|number| {
        let (device, _) = loopback(Shape::default());
        let view = dma.ram().view().expect("view");
        let function = VirtioFunction::new(format!("vf{number}"), device, view);
        function.expect("events") as Arc<dyn Member>
    });
    Owner::new(members.collect(), options).expect("descriptors")
}

/// Any bytes, or a command with numbers that are likely to mean something.
fn any_request(input: &mut Input<'_>) -> Vec<u8> {
    let len = usize::from(input.byte());
    match input.pick(4) {
        0 => input.slice(len).to_vec(),
        likely => {
            let opcode = match likely {
                1 => input.word(),
                _ => input.pick(0x14).into(),
            };
            let group = match input.byte() {
                choice @ 0..0xf0 => (choice % 3).into(),
                _ => input.word(),
            };
            let member = match input.byte() {
                choice @ 0..0xf0 => (choice % 5).into(),
                _ => input.qword(),
            };
            command(opcode, group, member, input.slice(len))
        }
    }
}

/// What a driver negotiated.
fn lists(session: &Session) -> [Option<CommandSet>; 2] {
    [GroupType::SelfGroup, GroupType::SrIov].map(|group| session.chosen(group))
}

/// All that commands can do to members.
fn members(owner: &Owner) -> Vec<(FunctionState, [Mode; 2])> {
    let state = |member: &Arc<dyn Member>| {
        let modes = [Party::Guest, Party::Monitor].map(|party| member.mode(party));
        (member.save(), modes)
    };
    owner.members().map(|(_, member)| state(member)).collect()
}

fn execute(owner: &Owner, vfs: &Vfs, session: &mut Session, request: &[u8]) {
    let (before, states) = (lists(session), members(owner));
    let Outcome::Done(reply) = owner.execute(session, request, 4096) else {
        panic!("nothing is in flight, and so there is nothing to wait for");
    };
    let reply = reply.encode();
    let half = |at: usize| u16::from_le_bytes([reply[at], reply[at + 1]]);
    let (status, qualifier) = (half(0), half(2));
    assert!(reply.len() >= 8 && reply.len().is_multiple_of(8), "B-8");
    let done = status == Status::Ok as u16;
    assert_eq!(done, qualifier == Qualifier::Ok as u16, "B-2");
    if !done {
        assert_eq!(
            lists(session),
            before,
            "B-2: a refused command has an effect"
        );
        assert_eq!(members(owner), states, "B-2: on a member");
        assert_eq!(reply[4..8], [0; 4], "B-2: a refused command has an output");
        assert_eq!(reply.len(), 8, "B-2: a refused command has a result");
    }
    let refused_by = |qualifier| (Status::Invalid as u16, qualifier as u16);

    let byte = |at| u16::from(request.get(at).copied().unwrap_or(0));
    let (opcode, raw) = (byte(0) | byte(1) << 8, byte(2) | byte(3) << 8);
    let Options {
        profile,
        strictness,
        ..
    } = owner.options();
    let lenient = strictness == Strictness::Lenient && opcode <= 1;
    let group = match raw {
        0 => GroupType::SelfGroup,
        1 if lenient || vfs.enabled_members().is_some() => GroupType::SrIov,
        _ => {
            let expected = refused_by(Qualifier::InvalidGroup);
            assert_eq!((status, qualifier), expected, "B-1, B-6: group {raw:#x}");
            return;
        }
    };
    let chosen = before[usize::from(group.raw())];
    let legal = chosen.map_or(opcode <= 1, |list| list.contains(opcode));
    // The capability commands, where Linux negotiates for the other group (D4).
    let lent = strictness == Strictness::Lenient && (7..=9).contains(&opcode);
    if profile.command(group, opcode).is_none() || !legal && !lent {
        let expected = refused_by(Qualifier::InvalidOpcode);
        assert_eq!((status, qualifier), expected, "B-4: opcode {opcode:#x}");
        return;
    }
    match opcode {
        0 => assert!(done && reply[8] & 3 == 3, "B-3"),
        1 if done => {
            let taken = session.chosen(group).expect("B-4: a list was taken");
            assert!(taken.is_subset(profile.supported(group)), "B-5");
        }
        1 => assert_eq!(qualifier, Qualifier::InvalidField as u16, "B-5"),
        _ => {}
    }
}
