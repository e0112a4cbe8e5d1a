//! Sessions saved and put into another owner, whose drivers go on as if nothing had happened.

use super::on_queue::{ADMIN, AT_ONCE, Idle, Slow, twin_of, waiting};
use super::*;
use crate::context;
use crate::gate::Reasons;
use crate::memory::View;
use crate::memory::records::PageRange;
use crate::state::{
    MemberSessionState, OwnerState, ReadingState, RecordingState, SessionState, TransitionState,
    WritingState,
};
use crate::testing::{Buf, ram};
use vm_memory::{Bytes, GuestAddress};

const MODE_SET: u16 = 8;
const READ: u16 = 0xa;
const WRITE: u16 = 0xb;
const START: u16 = 0x10;
const READ_RECORDS: u16 = 0x12;

/// An owner of two members that the monitor keeps, the driver of its commands, and the memory of member 1.
fn kept() -> (OwnerDriver, View) {
    let views = [0, 1].map(|_| ram().view().unwrap());
    let first = views[0].clone();
    let members = views.map(|view| {
        let device = Box::new(Idle::default());
        VirtioFunction::new("vf", device, view).unwrap() as Arc<dyn Member>
    });
    let owner = Owner::new(members.into(), Options::default()).unwrap();
    owner.set_membership(Arc::new(FixedMembership(2)));
    (OwnerDriver::new(owner), first)
}

fn command(driver: &mut OwnerDriver, opcode: u16, member: u64, data: &[u8]) -> Vec<u8> {
    let answer = driver.command(GroupType::SrIov, opcode, member, data);
    answer.unwrap().result
}

fn read_part(driver: &mut OwnerDriver, member: u64, len: usize) -> Vec<u8> {
    let request = Request::encode(READ, GroupType::SrIov, member, &[]);
    let reply = driver.execute_within(&request, REPLY_HEADER_LEN + len);
    reply.0.unwrap().result
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A monitor that has begun everything: member 1 is frozen and recorded, its context half read, one context written to it
/// and half of another; of member 2 the context was read to its end.
fn busy() -> (OwnerDriver, View, Vec<u8>) {
    let (mut driver, view) = kept();
    driver.negotiate(GroupType::SrIov).unwrap();
    command(&mut driver, START, 1, &words(&[0x1000, 1, 0x4000, 8]));
    view.write_slice(&[1; 0x1800], GuestAddress(0x5000))
        .unwrap();
    view.write_obj(1u8, GuestAddress(0x9000)).unwrap();
    command(&mut driver, MODE_SET, 1, &[2]);
    let context = command(&mut driver, READ, 1, &[]);
    command(&mut driver, WRITE, 1, &context);
    command(&mut driver, WRITE, 1, &context[..100]);
    read_part(&mut driver, 1, 50);
    read_part(&mut driver, 2, usize::MAX - REPLY_HEADER_LEN);
    (driver, view, context)
}

#[test]
fn a_session_is_saved_as_it_is_and_goes_on_elsewhere() {
    let (mut driver, _, context) = busy();
    let saved = save_owner(None, &driver);
    let supported = Profile::Draft.supported(GroupType::SrIov).bits();
    let range = |page_address, page_count| PageRange {
        page_address,
        page_count,
    };
    let expected = SessionState {
        party: Party::Monitor,
        self_group: None,
        sr_iov: Some(supported),
        members: vec![
            MemberSessionState {
                id: 1,
                mode: Mode::Freeze,
                reading: ReadingState::Part {
                    bytes: context.clone(),
                    at: 50,
                },
                writing: Some(WritingState {
                    complete: Some(context.clone()),
                    partial: context[..100].to_vec(),
                }),
                recording: Some(RecordingState {
                    page_size: 0x1000,
                    ranges: vec![range(0x4000, 8)],
                    written: vec![range(0x5000, 2), range(0x9000, 1)],
                }),
            },
            MemberSessionState {
                id: 2,
                mode: Mode::Active,
                reading: ReadingState::End,
                writing: None,
                recording: None,
            },
        ],
        transition: None,
    };
    assert_eq!(saved.sessions, [expected]);

    let (mut other, _) = kept();
    restore_owner(None, &mut other, &saved).unwrap();
    assert_eq!(save_owner(None, &other), saved);
    for driver in [&mut driver, &mut other] {
        assert_eq!(read_part(driver, 1, 1 << 20), context[50..]);
        assert_eq!(read_part(driver, 2, 1 << 20), []);
        // A context that is there in part keeps the mode as it is.
        let refused = driver.command(GroupType::SrIov, MODE_SET, 1, &[0]);
        assert_eq!(refused, Err(Failure::invalid(Qualifier::InvalidCommand)));
        command(driver, WRITE, 1, &context[100..]);
        let pages = command(driver, READ_RECORDS, 1, &words(&[0x4000, 0x8000]));
        assert_eq!(pages, words(&[0x5000, 0x6000, 0x9000]));
        command(driver, MODE_SET, 1, &[0]);
    }
    assert_eq!(save_owner(None, &other), save_owner(None, &driver));
}

#[test]
fn a_restore_replaces_what_a_driver_did_before() {
    let (fresh, _) = kept();
    let nothing = save_owner(None, &fresh);
    assert!(nothing.sessions[0].members.is_empty());
    let (mut driver, _, _) = busy();
    restore_owner(None, &mut driver, &nothing).unwrap();
    assert_eq!(save_owner(None, &driver), nothing);
    let (_, member) = driver.owner().members().next().unwrap();
    assert_eq!(member.mode(Party::Monitor), Mode::Active);
    assert!(!member.records().is_recording(Party::Monitor));
}

#[test]
fn sessions_that_cannot_be_are_refused_by_name_and_change_nothing() {
    let (driver, _, context) = busy();
    let saved = save_owner(None, &driver);
    type Spoil = fn(&mut SessionState, Vec<u8>);
    let cases: &[(Spoil, &str)] = &[
        (
            |s, _| s.party = Party::Guest,
            "session of the guest, party: the monitor keeps",
        ),
        (
            |s, _| s.party = Party::Engine,
            "session of the engine, party: it is never",
        ),
        (
            |s, _| s.self_group = Some(1 << 7),
            "self_group: it has commands",
        ),
        (|s, _| s.sr_iov = Some(1 << 127), "sr_iov: it has commands"),
        (|s, _| s.members[1].id = 3, "member 3, id: no such member"),
        (|s, _| s.members[0].id = 0, "member 0, id: no such member"),
        (
            |s, _| s.members[1].id = 1,
            "member 1, id: it is there twice",
        ),
        (
            |s, _| s.members.swap(0, 1),
            "member 1, id: it is there twice, or not in",
        ),
        (
            |s, _| s.members[0].mode = Mode::Stop,
            "member 1, writing: contexts are written",
        ),
        (
            |s, c| {
                s.members[0].reading = ReadingState::Part {
                    at: c.len(),
                    bytes: c,
                }
            },
            "reading.at: ",
        ),
        (
            |s, c| {
                s.members[0].reading = ReadingState::Part {
                    at: 0,
                    bytes: c[1..].into(),
                }
            },
            "reading.bytes: ",
        ),
        (
            |s, c| {
                s.members[0].reading = ReadingState::Part {
                    at: 0,
                    bytes: [c.clone(), c].concat(),
                }
            },
            "reading.bytes: ",
        ),
        (
            |s, c| writing(s).complete = Some(c[..60].into()),
            "writing.complete: ",
        ),
        (
            |s, c| writing(s).complete = Some([c, vec![1]].concat()),
            "writing.complete: ",
        ),
        (
            |s, c| writing(s).partial = c,
            "writing.partial: is complete",
        ),
        (
            |s, _| writing(s).partial = vec![0xff; 90],
            "writing.partial: ",
        ),
        (|s, _| recording(s).page_size = 3, "recording: "),
        (|s, _| recording(s).ranges.clear(), "recording: no range"),
        (
            |s, _| recording(s).ranges[0].page_count = 4,
            "recording: pages written at 0x9000",
        ),
        (
            |s, _| recording(s).written.swap(0, 1),
            "recording: range at 0x5000 is not behind",
        ),
        (
            |s, _| {
                s.transition = Some(TransitionState {
                    member: 1,
                    mode: Mode::Freeze,
                    previous: Mode::Active,
                    recall_after_ms: None,
                });
            },
            "session of the monitor, transition: commands of the monitor",
        ),
    ];
    fn writing(state: &mut SessionState) -> &mut WritingState {
        state.members[0].writing.as_mut().unwrap()
    }
    fn recording(state: &mut SessionState) -> &mut RecordingState {
        state.members[0].recording.as_mut().unwrap()
    }
    let (mut other, _) = kept();
    let before = save_owner(None, &other);
    let mut refused = |state: &OwnerState, message: &str| {
        let error = check_owner(None, &other, state).unwrap_err();
        assert!(error.to_string().contains(message), "{message}: {error}");
        assert_eq!(restore_owner(None, &mut other, state), Err(error));
        assert_eq!(save_owner(None, &other), before);
    };
    for (spoil, message) in cases {
        let mut state = saved.clone();
        spoil(&mut state.sessions[0], context.clone());
        refused(&state, message);
    }
    let twice = [saved.sessions.clone(), saved.sessions.clone()].concat();
    refused(&OwnerState { sessions: twice }, "party: it is there twice");
    refused(
        &OwnerState::default(),
        "session of the monitor, party: it is missing",
    );
    // A length is looked at before anything is read.
    let (_, member) = driver.owner().members().next().unwrap();
    let long = vec![0; context::max_len(&member.shape()) + 1];
    let mut state = saved;
    writing(&mut state.sessions[0]).complete = Some(long);
    refused(&state, "no context has more than");
}

/// Another owner in the state of the one that `driver` drives, whose command waits; both are paused.
fn moved(driver: &crate::testing::Driver) -> (crate::testing::Driver, Arc<Slow>) {
    assert!(driver.function.stop(Reasons::PAUSED, AT_ONCE));
    let monitor = OwnerDriver::new(driver.function.owner().unwrap());
    let state = driver.function.save();
    let transient = driver.function.save_transient().unwrap();
    let sessions = save_owner(Some(&driver.function), &monitor);
    assert_eq!(sessions.sessions[0].party, Party::Guest);

    let (other, slow) = twin_of(driver);
    let mut monitor = OwnerDriver::new(other.function.owner().unwrap());
    let error = check_owner(Some(&other.function), &monitor, &sessions).unwrap_err();
    assert_eq!((error.party, error.field), (Party::Guest, "members"));
    slow.busy.store(false, SeqCst);
    // The command that waits has to be there first.
    let error = check_owner(Some(&other.function), &monitor, &sessions).unwrap_err();
    assert_eq!((error.party, error.field), (Party::Guest, "transition"));
    other.function.restore_exact(&state, &transient).unwrap();
    restore_owner(Some(&other.function), &mut monitor, &sessions).unwrap();
    slow.busy.store(true, SeqCst);
    let mut again = save_owner(Some(&other.function), &monitor);
    for state in [&mut again, &mut sessions.clone()] {
        let transition = state.sessions[0].transition.as_mut().unwrap();
        assert!(transition.recall_after_ms.take() <= Some(500));
    }
    let mut sessions = sessions;
    sessions.sessions[0]
        .transition
        .as_mut()
        .unwrap()
        .recall_after_ms = None;
    assert_eq!(again, sessions);
    (other, slow)
}

#[test]
fn a_command_that_waits_goes_on_from_where_it_was() {
    let (driver, _) = waiting();
    let (mut other, slow) = moved(&driver);
    assert_eq!(slow.mode(Party::Guest), Mode::Stop);
    other.function.reopen(Reasons::PAUSED);
    other.turn();
    assert_eq!(other.used(ADMIN), None, "it waits again");
    slow.rests();
    let (_, len) = other.wait_used(ADMIN);
    assert_eq!((len, slow.mode(Party::Guest)), (8, Mode::Stop));
    // In the list it chose, in the other process.
    let (_, mode) = other.request(ADMIN, &[Buf::Out(raw(7, 1, 1, &[])), Buf::In(9)]);
    assert_eq!(mode[8], 1);
}

#[test]
fn a_command_that_was_moved_is_undone_by_a_reset_before_it_goes_on() {
    for reset_queue in [false, true] {
        let (driver, _) = waiting();
        let (mut other, slow) = moved(&driver);
        if reset_queue {
            let _ = other.function.reset_queue(ADMIN);
        } else {
            other.status(0);
        }
        assert_eq!(slow.mode(Party::Guest), Mode::Active);
        other.function.reopen(Reasons::PAUSED);
        slow.rests();
        other.turn();
        assert_eq!(other.used(ADMIN), None);
    }
}

#[test]
fn a_command_that_the_guest_changed_meanwhile_begins_anew() {
    for (bytes, mode) in [
        (raw(MODE_SET, 1, 1, &[2]), Mode::Freeze),
        (raw(7, 1, 1, &[0]), Mode::Active),
        (raw(MODE_SET, 1, 9, &[1]), Mode::Active),
    ] {
        let (driver, _) = waiting();
        let table = driver.rings[usize::from(ADMIN)].table;
        let (mut other, slow) = moved(&driver);
        let transient = other.function.save_transient().unwrap();
        let owned = &transient.services[queue::NAME].queue;
        let at = table + 16 * u64::from(owned.split().unwrap().owned[0]);
        let buffer: u64 = other.view.read_obj(GuestAddress(at)).unwrap();
        other
            .view
            .write_slice(&bytes, GuestAddress(buffer))
            .unwrap();
        other.function.reopen(Reasons::PAUSED);
        slow.rests();
        other.wait_used(ADMIN);
        assert_eq!(slow.mode(Party::Guest), mode, "{bytes:?}");
    }
}

#[test]
fn members_are_saved_in_a_session_only_while_they_exist() {
    let (owner, vfs) = owner(Options::default());
    vfs.0.store(4, SeqCst);
    let mut driver = OwnerDriver::new(owner);
    driver.negotiate(GroupType::SrIov).unwrap();
    for member in 1..=4 {
        command(&mut driver, MODE_SET, member, &[1]);
    }
    vfs.0.store(2, SeqCst);
    let saved = save_owner(None, &driver);
    let ids: Vec<_> = saved.sessions[0].members.iter().map(|m| m.id).collect();
    assert_eq!(ids, [1, 2]);
}
