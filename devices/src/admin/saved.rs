//! Sessions as state: what the drivers that move with a VM, that of the guest and that of the monitor's commands, negotiated
//! and did. The engine's is none: it is over with the snapshot.
//!
//! Saved and restored while the VM stands still: the owner and all members are paused and at rest, and of a restored
//! owner both its function and its members are in their states already. All of an [`OwnerState`] is checked before
//! anything is changed.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::driver::OwnerDriver;
use super::envelope::GroupType;
use super::list::CommandSet;
use super::member::{Member, MemberId};
use super::migration::{ContextSession, Transition};
use super::owner::Owner;
use super::queue::AdminService;
use super::session::Session;
use crate::gate::{Mode, Party};
use crate::memory::records::Prepared;
use crate::state::{MemberSessionState, OwnerState, ReadingState, SessionState, TransitionState};
use crate::virtio::{Rest, VirtioFunction};

/// Why the sessions of an owner were rejected. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionError {
    /// Whose session.
    pub party: Party,
    /// The member it is about, if it is about one.
    pub member: Option<u16>,
    /// The field.
    pub field: &'static str,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for SessionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session of the {}, ", self.party.name())?;
        if let Some(member) = self.member {
            write!(f, "member {member}, ")?;
        }
        write!(f, "{}: {}", self.field, self.what)
    }
}

impl std::error::Error for SessionError {}

/// The sessions of an owner: that of the guest, if it has a `function`, and that of the `monitor`'s commands.
pub fn save_owner(function: Option<&VirtioFunction>, monitor: &OwnerDriver) -> OwnerState {
    let owner = monitor.owner();
    let guest = function.and_then(|function| {
        function.with_service(|guest: &mut AdminService, _| owner.save_session(guest.session()))
    });
    let monitor = owner.save_session(monitor.session());
    OwnerState {
        sessions: guest.into_iter().chain([monitor]).collect(),
    }
}

/// Whether [`restore_owner`] would succeed.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn check_owner(
    function: Option<&VirtioFunction>,
    monitor: &OwnerDriver,
    state: &OwnerState,
) -> Result<(), SessionError> {
    Both::check(function, monitor, state).map(|_| ())
}

/// Puts the sessions of an owner, whose `function` and members are in their states already, into `state`: all of it or
/// nothing. Members are put into the modes that the drivers had set.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn restore_owner(
    function: Option<&VirtioFunction>,
    monitor: &mut OwnerDriver,
    state: &OwnerState,
) -> Result<(), SessionError> {
    let Both {
        guest,
        monitor: theirs,
    } = Both::check(function, monitor, state)?;
    let owner = Arc::clone(monitor.owner());
    if let (Some(function), Some(guest)) = (function, guest) {
        function.with_service(|service: &mut AdminService, _| {
            owner.commit(service.session_mut(), guest);
        });
    }
    owner.commit(monitor.session_mut(), theirs);
    Ok(())
}

/// The sessions of an owner, found good.
struct Both {
    guest: Option<Checked>,
    monitor: Checked,
}

impl Both {
    fn check(
        function: Option<&VirtioFunction>,
        driver: &OwnerDriver,
        state: &OwnerState,
    ) -> Result<Self, SessionError> {
        let owner = driver.owner();
        let (mut guest, mut monitor) = (None, None);
        for session in &state.sessions {
            let error = |what: &str| Err(SessionError::new(session.party, "party", what));
            let slot = match session.party {
                Party::Guest if function.is_some() => &mut guest,
                Party::Guest => {
                    return error("the monitor keeps this owner; it has no such session");
                }
                Party::Monitor => &mut monitor,
                Party::Engine => return error("it is never saved"),
            };
            if slot.is_some() {
                return error("it is there twice");
            }
            *slot = Some(owner.check_session(session)?);
        }
        let missing = |party| SessionError::new(party, "party", "it is missing");
        if function.is_some() && guest.is_none() {
            return Err(missing(Party::Guest));
        }
        let both = Self {
            guest,
            monitor: monitor.ok_or(missing(Party::Monitor))?,
        };
        both.check_transitions(function)?;
        Ok(both)
    }

    /// Someone executes the command again that a transition waits for.
    fn check_transitions(&self, function: Option<&VirtioFunction>) -> Result<(), SessionError> {
        let waits = |checked: &Checked| checked.session.pending().is_some();
        let error = |party, what: &str| Err(SessionError::new(party, "transition", what));
        if waits(&self.monitor) {
            return error(
                Party::Monitor,
                "commands of the monitor are over when a VM is saved",
            );
        }
        let owns =
            |function: &VirtioFunction| function.with_service(|_: &mut AdminService, owns| owns);
        let executed = function.and_then(owns) == Some(true);
        if self.guest.as_ref().is_some_and(waits) && !executed {
            return error(
                Party::Guest,
                "the administration virtqueue has no command that waits",
            );
        }
        Ok(())
    }
}

/// A session that was found good. Nothing can fail any more.
struct Checked {
    session: Session,
    members: Vec<(MemberId, Mode, Option<Prepared>)>,
}

impl SessionError {
    fn new(party: Party, field: &'static str, what: &str) -> Self {
        Self {
            party,
            member: None,
            field,
            what: what.to_owned(),
        }
    }
}

impl Owner {
    fn save_session(&self, session: &Session) -> SessionState {
        let party = session.party();
        let members = self.members().filter_map(|(id, member)| {
            let touched = session.touched(id);
            let (reading, writing) = touched
                .map(|context| context.save(member.epoch(), &member.shape()))
                .unwrap_or_default();
            let state = MemberSessionState {
                id: id.0,
                mode: member.mode(party),
                reading,
                writing,
                recording: member.records().save(party),
            };
            (state != untouched(id)).then_some(state)
        });
        let list = |group| session.chosen(group).map(CommandSet::bits);
        SessionState {
            party,
            self_group: list(GroupType::SelfGroup),
            sr_iov: list(GroupType::SrIov),
            members: members.collect(),
            transition: session
                .pending()
                .and_then(|t| self.save_transition(party, t)),
        }
    }

    /// None if the member came to exist anew: the command that waits begins from the start then.
    fn save_transition(&self, party: Party, transition: &Transition) -> Option<TransitionState> {
        let id = transition.member.0;
        let mode = self.member(id.into())?.mode(party);
        (mode == transition.mode).then(|| TransitionState {
            member: id,
            mode,
            previous: transition.previous,
            recall_after_ms: transition.recall_at.map(|at| {
                let left = at.saturating_duration_since(Instant::now());
                // A patience is far shorter than that.
                left.as_nanos().div_ceil(1_000_000) as u64
            }),
        })
    }

    fn check_session(&self, state: &SessionState) -> Result<Checked, SessionError> {
        let party = state.party;
        let mut session = Session::new(party);
        for (group, field, bits) in [
            (GroupType::SelfGroup, "self_group", state.self_group),
            (GroupType::SrIov, "sr_iov", state.sr_iov),
        ] {
            let Some(commands) = bits.map(CommandSet::from_bits) else {
                continue;
            };
            if !commands.is_subset(self.options().profile.supported(group)) {
                let what = "it has commands that this owner does not";
                return Err(SessionError::new(party, field, what));
            }
            session.choose(group, commands);
        }
        let mut members = Vec::new();
        let mut last = 0;
        for saved in &state.members {
            let of_member = |(field, what)| SessionError {
                party,
                member: Some(saved.id),
                field,
                what,
            };
            let member = self.check_id(saved.id, last).map_err(of_member)?;
            last = saved.id;
            let id = MemberId(last);
            let (context, records) = check_member(saved, &**member).map_err(of_member)?;
            session.set_context(id, context);
            members.push((id, saved.mode, records));
        }
        // Those it did nothing to are put into their first mode, too.
        for (_, member) in self.members() {
            if member.rest() != Rest::AtRest {
                let what = format!("{} is not at rest", member.name());
                return Err(SessionError::new(party, "members", &what));
            }
        }
        let transition = state.transition.as_ref();
        *session.transition() = transition
            .map(|transition| self.check_transition(transition, &members))
            .transpose()
            .map_err(|what| SessionError::new(party, "transition", what))?;
        Ok(Checked { session, members })
    }

    /// The member `id`, behind that with the id `last`.
    fn check_id(&self, id: u16, last: u16) -> Result<&Arc<dyn Member>, (&'static str, String)> {
        let error = |what: &str| ("id", what.to_owned());
        let member = self.member(id.into());
        let member = member.ok_or(error("no such member exists"))?;
        if id <= last {
            return Err(error("it is there twice, or not in ascending order"));
        }
        Ok(member)
    }

    fn check_transition(
        &self,
        state: &TransitionState,
        members: &[(MemberId, Mode, Option<Prepared>)],
    ) -> Result<Transition, &'static str> {
        let member = MemberId(state.member);
        let in_force = |(id, mode, _): &(_, _, _)| *id == member && *mode == state.mode;
        if state.mode == Mode::Active || !members.iter().any(in_force) {
            return Err("the member is not in the mode it waits for");
        }
        if state.previous == state.mode {
            return Err("it changes nothing");
        }
        let most = self.options().drain.0.as_nanos().div_ceil(1_000_000);
        let left = state.recall_after_ms;
        if left.is_some_and(|left| u128::from(left) > most) {
            return Err("recall_after_ms is more than this owner waits");
        }
        Ok(Transition {
            member,
            mode: state.mode,
            previous: state.previous,
            recall_at: left.map(|left| Instant::now() + Duration::from_millis(left)),
        })
    }

    /// Replaces `session`, and what its driver did to members.
    fn commit(&self, session: &mut Session, checked: Checked) {
        let party = session.party();
        let mut touched = checked.members.into_iter().peekable();
        for (id, member) in self.members() {
            let found = touched.next_if(|(touched, _, _)| *touched == id);
            let (mode, records) = found.map_or((Mode::Active, None), |(_, mode, r)| (mode, r));
            member.set_mode(party, mode);
            match records {
                Some(prepared) => member.records().install(party, prepared),
                None => member.records().stop(party),
            }
        }
        *session = checked.session;
    }
}

/// What a driver that did nothing has done to a member.
fn untouched(id: MemberId) -> MemberSessionState {
    MemberSessionState {
        id: id.0,
        mode: Mode::Active,
        reading: ReadingState::Begin,
        writing: None,
        recording: None,
    }
}

fn check_member(
    saved: &MemberSessionState,
    member: &dyn Member,
) -> Result<(ContextSession, Option<Prepared>), (&'static str, String)> {
    if saved.writing.is_some() && saved.mode != Mode::Freeze {
        let what = "contexts are written to members in mode freeze only";
        return Err(("writing", what.to_owned()));
    }
    let context = ContextSession::restored(member, &saved.reading, saved.writing.as_ref())?;
    let recording = saved.recording.as_ref();
    let prepared = recording.map(|recording| member.records().prepare(recording));
    let prepared = prepared.transpose();
    Ok((
        context,
        prepared.map_err(|error| ("recording", error.to_string()))?,
    ))
}
