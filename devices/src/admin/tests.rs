//! Commands against an owner, as bytes and over its administration virtqueue.

use std::sync::atomic::{AtomicU16, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;

use super::envelope::REPLY_HEADER_LEN;
use super::*;
use crate::gate::{Mode, Party};
use crate::virtio::VirtioFunction;

mod on_queue;
mod saved;

/// Membership without registers: NumVFs, or no SR-IOV group at all.
struct Vfs(AtomicU16);

const DISABLED: u16 = u16::MAX;

impl Membership for Vfs {
    fn enabled_members(&self) -> Option<u16> {
        Some(self.0.load(SeqCst)).filter(|vfs| *vfs != DISABLED)
    }
}

fn member(name: &str) -> Arc<dyn Member> {
    let device = Box::new(on_queue::Idle::default());
    let view = crate::testing::ram().view().unwrap();
    VirtioFunction::new(name, device, view).unwrap()
}

/// What a driver negotiated.
fn lists(session: &Session) -> [Option<CommandSet>; 2] {
    [GroupType::SelfGroup, GroupType::SrIov].map(|group| session.chosen(group))
}

/// An owner of four members, and the switch that says how many exist.
fn owner(options: Options) -> (Arc<Owner>, Arc<Vfs>) {
    let members = (1..=4).map(|i| member(&format!("vf{i}")));
    let owner = Owner::new(members.collect(), options).unwrap();
    let vfs = Arc::new(Vfs(AtomicU16::new(DISABLED)));
    owner.set_membership(Arc::clone(&vfs) as _);
    (owner, vfs)
}

const STRICT: Options = Options {
    profile: Profile::V1_4,
    strictness: Strictness::Strict,
    drain: Drain(Duration::ZERO),
};

/// The envelope with these raw numbers.
fn raw(opcode: u16, group: u16, member: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = Request::encode(opcode, GroupType::SelfGroup, member, data);
    bytes[2..4].copy_from_slice(&group.to_le_bytes());
    bytes
}

/// Status, qualifier, and the rest of the answer to a command in a session of its own.
fn answer(owner: &Owner, session: &mut Session, request: &[u8]) -> (u16, u16, Vec<u8>) {
    let Outcome::Done(reply) = owner.execute(session, request, usize::MAX) else {
        panic!("nothing to wait for");
    };
    let reply = reply.encode();
    let code = |at: usize| u16::from_le_bytes([reply[at], reply[at + 1]]);
    assert_eq!(reply[4..8], [0; 4], "reserved");
    assert_eq!(reply.len() % 8, 0, "B-8");
    (code(0), code(2), reply[8..].to_vec())
}

const OK: (u16, u16) = (0, 0);
const OPCODE: (u16, u16) = (22, 2);
const FIELD: (u16, u16) = (22, 3);
const GROUP: (u16, u16) = (22, 4);

fn codes(owner: &Owner, session: &mut Session, request: &[u8]) -> (u16, u16) {
    let (status, qualifier, _) = answer(owner, session, request);
    (status, qualifier)
}

#[test]
fn b1_group_is_checked_before_opcode_and_opcode_before_member() {
    for options in [Options::default(), STRICT] {
        let (owner, vfs) = owner(options);
        vfs.0.store(4, SeqCst);
        for (opcode, group, member, expected) in [
            (0, 2, 0, GROUP),
            (0xffff, 2, 99, GROUP),
            (0x8000, 0xffff, 0, GROUP),
            (2, 0, 99, OPCODE),
            (0xffff, 1, 99, OPCODE),
            (0x12, 1, 1, OPCODE),
        ] {
            let request = raw(opcode, group, member, &[]);
            let mut session = Session::new(Party::Guest);
            let found = codes(&owner, &mut session, &request);
            assert_eq!(found, expected, "{opcode:#x} {group} {member}");
            assert_eq!(lists(&session), [None, None], "B-2");
        }
    }
}

#[test]
fn b3_list_query_reports_bits_0_and_1() {
    for profile in [Profile::V1_4, Profile::Draft] {
        let (owner, vfs) = owner(Options {
            profile,
            ..Options::default()
        });
        vfs.0.store(1, SeqCst);
        for group in [0, 1] {
            let mut session = Session::new(Party::Guest);
            let (status, qualifier, result) = answer(&owner, &mut session, &raw(0, group, 0, &[]));
            assert_eq!((status, qualifier), OK);
            assert_eq!(result[0] & 3, 3);
        }
    }
}

#[test]
fn b4_the_list_commands_ignore_the_member_id() {
    let (owner, vfs) = owner(STRICT);
    vfs.0.store(2, SeqCst);
    for member in [0, 1, 3, u64::MAX] {
        let mut session = Session::new(Party::Guest);
        assert_eq!(codes(&owner, &mut session, &raw(0, 1, member, &[])), OK);
        assert_eq!(codes(&owner, &mut session, &raw(1, 1, member, &[3])), OK);
    }
}

#[test]
fn b4_a_list_without_the_list_commands_gives_them_up() {
    let (owner, vfs) = owner(Options::default());
    vfs.0.store(1, SeqCst);
    let mut session = Session::new(Party::Guest);
    assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, &[2])), OK);
    assert_eq!(codes(&owner, &mut session, &raw(0, 1, 0, &[])), OPCODE);
    assert_eq!(
        codes(&owner, &mut session, &raw(0, 0, 0, &[])),
        OK,
        "self group"
    );
    assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, &[])), OK);
    assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, &[3])), OPCODE);
}

#[test]
fn b5_list_use_of_what_is_not_there_fails_and_changes_nothing() {
    let (owner, vfs) = owner(STRICT);
    vfs.0.store(1, SeqCst);
    let mut session = Session::new(Party::Guest);
    assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, &[3])), OK);
    let before = lists(&session);
    let far: Vec<u8> = (0..8192).map(|i| u8::from(i == 8191)).collect();
    let bad: [&[u8]; 5] = [&[7], &[0x83], &[3, 0, 0, 0, 0, 0, 0, 0, 1], &[3, 1], &far];
    for list in bad {
        assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, list)), FIELD);
        assert_eq!(lists(&session), before);
    }
}

#[test]
fn b5_the_same_list_is_accepted_again_after_reset() {
    let (owner, _) = owner(Options::default());
    for _ in 0..2 {
        let mut session = Session::new(Party::Guest);
        assert_eq!(codes(&owner, &mut session, &raw(1, 1, 0, &[])), OK);
    }
}

#[test]
fn b6_d4_without_vf_enable_only_the_lists_of_the_sr_iov_group_work() {
    for (options, lists) in [(Options::default(), OK), (STRICT, GROUP)] {
        let (owner, _) = owner(options);
        for (opcode, expected) in [
            (0, lists),
            (1, lists),
            (2, GROUP),
            (7, GROUP),
            (0xffff, GROUP),
        ] {
            let request = raw(opcode, 1, 0, &[]);
            let found = codes(&owner, &mut Session::new(Party::Guest), &request);
            assert_eq!(found, expected, "{options:?} {opcode}");
        }
        let own = codes(&owner, &mut Session::new(Party::Guest), &raw(0, 0, 0, &[]));
        assert_eq!(own, OK, "the self group is always there");
    }
}

#[test]
fn b6_an_owner_nobody_has_shown_on_a_bus_has_no_members() {
    let owner = Owner::new(vec![member("vf1")], STRICT).unwrap();
    assert_eq!(owner.members().count(), 0);
    let found = codes(&owner, &mut Session::new(Party::Guest), &raw(0, 1, 0, &[]));
    assert_eq!(found, GROUP);
}

#[test]
fn b8_no_length_fails_a_command() {
    let (owner, vfs) = owner(STRICT);
    vfs.0.store(1, SeqCst);
    // Everything missing is zero: LIST_QUERY for the self group.
    let whole = raw(0, 0, 0, &[]);
    for len in 0..=whole.len() {
        let found = answer(&owner, &mut Session::new(Party::Guest), &whole[..len]);
        assert_eq!(found, (0, 0, 3u64.to_le_bytes().to_vec()), "{len} bytes");
    }
    // LIST_USE with less than a word, and with more than any list.
    let mut long = vec![0; 100_000];
    long[0] = 3;
    for data in [&[][..], &[3], &[3, 0, 0], &long] {
        let found = codes(&owner, &mut Session::new(Party::Guest), &raw(1, 1, 0, data));
        assert_eq!(found, OK, "{} bytes", data.len());
    }
}

#[test]
fn members_are_those_that_exist() {
    let (owner, vfs) = owner(Options::default());
    let named = |id| owner.member(id).map(|m| m.name().to_string());
    assert_eq!(owner.capacity(), 4);
    for (enabled, ids) in [
        (DISABLED, vec![]),
        (0, vec![]),
        (2, vec![1, 2]),
        (4, vec![1, 2, 3, 4]),
    ] {
        vfs.0.store(enabled, SeqCst);
        let found: Vec<_> = owner.members().map(|(id, _)| id.0).collect();
        assert_eq!(found, ids);
        for id in [0, 1, 2, 3, 4, 5, 0x1_0001, u64::MAX] {
            let there = ids.iter().any(|i| u64::from(*i) == id);
            assert_eq!(
                named(id),
                there.then(|| format!("vf{id}")),
                "{id} of {enabled}"
            );
        }
    }
}

#[test]
fn more_members_than_the_owner_was_made_with_are_not_there() {
    let (owner, vfs) = owner(Options::default());
    vfs.0.store(9, SeqCst);
    assert_eq!(owner.members().count(), 4);
    assert!(owner.member(5).is_none());
}

#[test]
fn the_owner_driver_negotiates_in_a_session_of_its_own() {
    let (owner, _) = owner(Options::default());
    let mut guest = Session::new(Party::Guest);
    assert_eq!(codes(&owner, &mut guest, &raw(1, 1, 0, &[])), OK);
    let mut driver = OwnerDriver::new(Arc::clone(&owner));
    let list = driver.negotiate(GroupType::SrIov).unwrap();
    assert_eq!(list, Profile::Draft.supported(GroupType::SrIov));
    assert_eq!(guest.chosen(GroupType::SrIov), Some(CommandSet::EMPTY));
    let refused = driver.command(GroupType::SrIov, 0x12, 1, &[]);
    assert_eq!(refused, Err(Failure::invalid(Qualifier::InvalidGroup)));
}

#[test]
fn the_engine_has_a_session_modes_and_records_of_its_own() {
    let (owner, vfs) = owner(Options::default());
    vfs.0.store(1, SeqCst);
    let mut monitor = OwnerDriver::new(Arc::clone(&owner));
    let mut engine = OwnerDriver::engine(Arc::clone(&owner));
    for driver in [&mut monitor, &mut engine] {
        driver.negotiate(GroupType::SrIov).unwrap();
    }
    let member = Arc::clone(owner.member(1).unwrap());
    let modes = || Party::ALL.map(|party| member.mode(party));
    // Half a context is read, and records are kept.
    monitor.command(GroupType::SrIov, 8, 1, &[1]).unwrap();
    let read = Request::encode(0xa, GroupType::SrIov, 1, &[]);
    let first = monitor.execute_within(&read, REPLY_HEADER_LEN + 40);
    let mut whole = first.0.unwrap().result;
    let start: Vec<u8> = [0x1000u64, 1, 0, 1]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    monitor.command(GroupType::SrIov, 0x10, 1, &start).unwrap();

    engine.command(GroupType::SrIov, 8, 1, &[2]).unwrap();
    assert_eq!(modes(), [Mode::Active, Mode::Stop, Mode::Freeze]);
    let context = engine.command(GroupType::SrIov, 0xa, 1, &[]).unwrap();
    engine
        .command(GroupType::SrIov, 0xb, 1, &context.result)
        .unwrap();
    let records = member.records();
    assert_eq!(
        Party::ALL.map(|party| records.is_recording(party)),
        [false, true, false]
    );
    engine.command(GroupType::SrIov, 8, 1, &[0]).unwrap();
    assert_eq!(modes(), [Mode::Active, Mode::Stop, Mode::Active]);

    let rest = monitor.command(GroupType::SrIov, 0xa, 1, &[]).unwrap();
    whole.extend(rest.result);
    assert_eq!(whole, context.result);
}

#[test]
fn an_owner_the_monitor_keeps_has_all_its_members() {
    let owner = Owner::new(vec![member("vf1")], STRICT).unwrap();
    owner.set_membership(Arc::new(FixedMembership(1)));
    assert_eq!(owner.members().count(), 1);
    let mut driver = OwnerDriver::new(owner);
    assert!(driver.negotiate(GroupType::SrIov).is_ok());
}

proptest! {
    /// Any bytes are answered; what is refused leaves the session as it was, and only LIST_USE changes it.
    #[test]
    fn b2_any_bytes_are_answered_and_refusals_change_nothing(
        requests in prop::collection::vec((
            prop_oneof![0u16..4, any::<u16>()],
            prop_oneof![0u16..3, any::<u16>()],
            any::<u64>(),
            prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..40),
            0usize..64,
        ), 0..20),
        vfs in prop_oneof![Just(DISABLED), 0u16..6],
        strict: bool,
    ) {
        let (owner, switch) = owner(if strict { STRICT } else { Options::default() });
        switch.0.store(vfs, SeqCst);
        let mut session = Session::new(Party::Guest);
        for (opcode, group, member, data, len) in requests {
            let mut request = raw(opcode, group, member, &data);
            request.truncate(len);
            let before = lists(&session);
            let (status, qualifier, _) = answer(&owner, &mut session, &request);
            prop_assert_eq!(status == 0, qualifier == 0);
            prop_assert!(status == 0 || status == 22);
            if status != 0 || Request::new(&request).opcode() != 1 {
                prop_assert_eq!(lists(&session), before);
            }
        }
    }
}
