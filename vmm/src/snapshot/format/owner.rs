//! An SR-IOV owner: the sessions of its drivers.

use devices::gate;
use devices::memory::records::{MAX_RANGES, PAGE_SIZES, PageRange};
use devices::state::{
    MemberSessionState, OwnerState, ReadingState, RecordingState, SessionState, TransitionState,
    WritingState,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::MAX_LEN;
use super::error::{At, Invalid, check_ascending, check_name, convert_all};
use super::hex::{Hex, HexBytes};
use super::version::Version;

/// State of an SR-IOV owner, apart from its function's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// Version of this section.
    pub version: Version<1>,
    /// Name of the owner, as `tern info` shows it: `pf0`.
    pub name: String,
    /// Sessions of its drivers.
    pub sessions: Vec<Session>,
}

/// Session of one driver with an owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// Whose session it is.
    pub party: Party,
    /// Commands that LIST_USE selected for the self group, bit `n` being opcode `n`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_group: Option<Hex<u128>>,
    /// Commands that LIST_USE selected for the SR-IOV group, bit `n` being opcode `n`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sr_iov: Option<Hex<u128>>,
    /// Members that this driver has changed, ascending by id.
    pub members: Vec<MemberSession>,
    /// The DEV_MODE_SET that waits for a member.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transition: Option<Transition>,
}

/// A driver of an owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Party {
    /// The owner's driver in the guest.
    Guest,
    /// The commands of the monitor.
    Monitor,
}

/// Mode of a member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// It runs.
    Active,
    /// It reaches neither memory nor interrupts.
    Stop,
    /// As in stop, and its registers ignore writes.
    Freeze,
}

/// What one driver has done to one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemberSession {
    /// Group member id.
    pub id: u16,
    /// Mode.
    pub mode: Mode,
    /// DEV_CTX_READ.
    pub reading: Reading,
    /// DEV_CTX_WRITE, if something was written that has not taken effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writing: Option<Writing>,
    /// Write records, if they were started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recording: Option<Recording>,
}

/// How far a context was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Reading {
    /// Not at all.
    Begin,
    /// In part.
    Part {
        /// The context as it was when its first byte was read.
        context: HexBytes,
        /// Bytes of it that were read.
        at: u32,
    },
    /// To its end.
    End,
}

/// Contexts that were written and have not taken effect.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Writing {
    /// The last complete context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete: Option<HexBytes>,
    /// The beginning of one that is not complete.
    pub partial: HexBytes,
}

/// Write records of one member, for one driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recording {
    /// Page size in bytes.
    pub page_size: Hex<u64>,
    /// Ranges under record, ascending and disjoint.
    pub ranges: Vec<Pages>,
    /// Pages that were written and not yet read, ascending and disjoint.
    pub written: Vec<Pages>,
}

/// Adjacent pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Pages {
    /// Guest physical address of the first page.
    pub page_address: Hex<u64>,
    /// Number of pages, at least 1.
    #[schemars(range(min = 1))]
    pub page_count: u64,
}

/// A change of mode that waits for requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Transition {
    /// Group member id.
    pub member: u16,
    /// Mode that was asked for, in force already.
    pub mode: Mode,
    /// Mode to return to if the command is abandoned.
    pub previous: Mode,
    /// Milliseconds until requests that have not begun are recalled; absent once that was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recall_after_ms: Option<u64>,
}

impl Owner {
    /// The JSON of owner `name`. The session of whoever takes the snapshot is not in it.
    pub fn of(name: impl Into<String>, state: &OwnerState) -> Self {
        Self {
            version: Version::default(),
            name: name.into(),
            sessions: state.sessions.iter().filter_map(Session::of).collect(),
        }
    }

    /// The state.
    ///
    /// # Errors
    ///
    /// A value that is out of range for every owner.
    pub fn plain(&self) -> Result<OwnerState, Invalid> {
        check_name(&self.name)?;
        let sessions = convert_all(&self.sessions, Session::plain).field("sessions")?;
        for (index, session) in self.sessions.iter().enumerate() {
            let before = self.sessions.iter().take(index);
            if before.into_iter().any(|other| other.party == session.party) {
                let party = session.party.plain().name();
                let reason = format!("the {party} has a session before this one");
                let error = Err(Invalid::new(reason)).field("party");
                return error.entry(index).field("sessions");
            }
        }
        Ok(OwnerState { sessions })
    }
}

impl Session {
    fn of(state: &SessionState) -> Option<Self> {
        let SessionState {
            party,
            self_group,
            sr_iov,
            members,
            transition,
        } = state;
        Some(Self {
            party: Party::of(*party)?,
            self_group: self_group.map(Hex),
            sr_iov: sr_iov.map(Hex),
            members: members.iter().map(MemberSession::of).collect(),
            transition: transition.as_ref().map(Transition::of),
        })
    }

    fn plain(&self) -> Result<SessionState, Invalid> {
        let ids: Vec<_> = self.members.iter().map(|member| member.id).collect();
        check_ascending(&ids).field("members")?;
        Ok(SessionState {
            party: self.party.plain(),
            self_group: self.self_group.map(|commands| commands.0),
            sr_iov: self.sr_iov.map(|commands| commands.0),
            members: convert_all(&self.members, MemberSession::plain).field("members")?,
            transition: self.transition.as_ref().map(Transition::plain),
        })
    }
}

impl Party {
    fn of(party: gate::Party) -> Option<Self> {
        match party {
            gate::Party::Guest => Some(Self::Guest),
            gate::Party::Monitor => Some(Self::Monitor),
            gate::Party::Engine => None,
        }
    }

    fn plain(self) -> gate::Party {
        match self {
            Self::Guest => gate::Party::Guest,
            Self::Monitor => gate::Party::Monitor,
        }
    }
}

impl Mode {
    fn of(mode: gate::Mode) -> Self {
        match mode {
            gate::Mode::Active => Self::Active,
            gate::Mode::Stop => Self::Stop,
            gate::Mode::Freeze => Self::Freeze,
        }
    }

    fn plain(self) -> gate::Mode {
        match self {
            Self::Active => gate::Mode::Active,
            Self::Stop => gate::Mode::Stop,
            Self::Freeze => gate::Mode::Freeze,
        }
    }
}

impl MemberSession {
    fn of(state: &MemberSessionState) -> Self {
        let MemberSessionState {
            id,
            mode,
            reading,
            writing,
            recording,
        } = state;
        Self {
            id: *id,
            mode: Mode::of(*mode),
            reading: Reading::of(reading),
            writing: writing.as_ref().map(Writing::of),
            recording: recording.as_ref().map(Recording::of),
        }
    }

    fn plain(&self) -> Result<MemberSessionState, Invalid> {
        let writing = self.writing.as_ref().map(Writing::plain).transpose();
        let recording = self.recording.as_ref().map(Recording::plain).transpose();
        Ok(MemberSessionState {
            id: self.id,
            mode: self.mode.plain(),
            reading: self.reading.plain().field("reading")?,
            writing: writing.field("writing")?,
            recording: recording.field("recording")?,
        })
    }
}

impl Reading {
    fn of(state: &ReadingState) -> Self {
        match state {
            ReadingState::Begin => Self::Begin,
            ReadingState::Part { bytes, at } => Self::Part {
                context: HexBytes(bytes.clone()),
                at: *at as u32,
            },
            ReadingState::End => Self::End,
        }
    }

    fn plain(&self) -> Result<ReadingState, Invalid> {
        let Self::Part { context, at } = self else {
            return Ok(match self {
                Self::End => ReadingState::End,
                _ => ReadingState::Begin,
            });
        };
        let bytes = context_bytes(context).field("context").field("part")?;
        let at = *at as usize;
        if at > bytes.len() {
            let reason = format!("{at} of {} bytes were read", bytes.len());
            return Err(Invalid::new(reason)).field("at").field("part");
        }
        Ok(ReadingState::Part { bytes, at })
    }
}

impl Writing {
    fn of(state: &WritingState) -> Self {
        let WritingState { complete, partial } = state;
        Self {
            complete: complete.clone().map(HexBytes),
            partial: HexBytes(partial.clone()),
        }
    }

    fn plain(&self) -> Result<WritingState, Invalid> {
        let complete = self.complete.as_ref().map(context_bytes).transpose();
        Ok(WritingState {
            complete: complete.field("complete")?,
            partial: context_bytes(&self.partial).field("partial")?,
        })
    }
}

fn context_bytes(bytes: &HexBytes) -> Result<Vec<u8>, Invalid> {
    if bytes.0.len() > MAX_LEN {
        let reason = format!("{} bytes are more than {MAX_LEN}", bytes.0.len());
        return Err(Invalid::new(reason));
    }
    Ok(bytes.0.clone())
}

impl Recording {
    fn of(state: &RecordingState) -> Self {
        let RecordingState {
            page_size,
            ranges,
            written,
        } = state;
        Self {
            page_size: Hex(*page_size),
            ranges: ranges.iter().map(Pages::of).collect(),
            written: written.iter().map(Pages::of).collect(),
        }
    }

    fn plain(&self) -> Result<RecordingState, Invalid> {
        let page_size = self.page_size.0;
        let sizes = MIN_PAGE_SIZE..=MAX_PAGE_SIZE;
        if !page_size.is_power_of_two() || !sizes.contains(&page_size) {
            let reason = format!(
                "{page_size:#x} is no power of two from {MIN_PAGE_SIZE:#x} to {MAX_PAGE_SIZE:#x}"
            );
            return Err(Invalid::new(reason)).field("page_size");
        }
        if self.ranges.len() > MAX_RANGES as usize {
            let reason = format!("{} ranges are more than {MAX_RANGES}", self.ranges.len());
            return Err(Invalid::new(reason)).field("ranges");
        }
        Ok(RecordingState {
            page_size,
            ranges: plain_pages(&self.ranges, page_size).field("ranges")?,
            written: plain_pages(&self.written, page_size).field("written")?,
        })
    }
}

/// Smallest page size that is recorded, in bytes.
const MIN_PAGE_SIZE: u64 = 4096;
/// Largest page size that is recorded, in bytes.
const MAX_PAGE_SIZE: u64 = MIN_PAGE_SIZE << PAGE_SIZES.ilog2();

/// Pages of `size` bytes: whole ones, ascending and disjoint.
fn plain_pages(list: &[Pages], size: u64) -> Result<Vec<PageRange>, Invalid> {
    let mut free = Some(0);
    let mut ranges = Vec::with_capacity(list.len());
    for (index, pages) in list.iter().enumerate() {
        let (address, count) = (pages.page_address.0, pages.page_count);
        let reason = |what: &str| {
            Err(Invalid::new(format!(
                "{count} pages of {size:#x} bytes at {address:#x} {what}"
            )))
            .entry(index)
        };
        if address % size != 0 {
            return reason("do not begin on a page");
        }
        if free.is_none_or(|free| address < free) {
            return reason("overlap the entry before, or precede it");
        }
        let last = count.checked_sub(1).and_then(|last| last.checked_mul(size));
        let Some(last) = last.and_then(|last| address.checked_add(last)) else {
            return reason("are none, or end beyond the last address");
        };
        free = last.checked_add(size);
        ranges.push(PageRange {
            page_address: address,
            page_count: count,
        });
    }
    Ok(ranges)
}

impl Pages {
    fn of(range: &PageRange) -> Self {
        Self {
            page_address: Hex(range.page_address),
            page_count: range.page_count,
        }
    }
}

impl Transition {
    fn of(state: &TransitionState) -> Self {
        let TransitionState {
            member,
            mode,
            previous,
            recall_after_ms,
        } = state;
        Self {
            member: *member,
            mode: Mode::of(*mode),
            previous: Mode::of(*previous),
            recall_after_ms: *recall_after_ms,
        }
    }

    fn plain(&self) -> TransitionState {
        TransitionState {
            member: self.member,
            mode: self.mode.plain(),
            previous: self.previous.plain(),
            recall_after_ms: self.recall_after_ms,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn pages(page_address: u64, page_count: u64) -> PageRange {
        PageRange {
            page_address,
            page_count,
        }
    }

    pub fn sample() -> OwnerState {
        let member = |id, reading| MemberSessionState {
            id,
            mode: gate::Mode::Stop,
            reading,
            writing: None,
            recording: None,
        };
        let part = ReadingState::Part {
            bytes: vec![1, 2, 3],
            at: 3,
        };
        OwnerState {
            sessions: vec![
                SessionState {
                    party: gate::Party::Monitor,
                    self_group: None,
                    sr_iov: Some(1 << 100 | 3),
                    members: vec![
                        member(1, part),
                        MemberSessionState {
                            mode: gate::Mode::Freeze,
                            writing: Some(WritingState {
                                complete: Some(vec![]),
                                partial: vec![9],
                            }),
                            ..member(7, ReadingState::End)
                        },
                    ],
                    transition: Some(TransitionState {
                        member: 7,
                        mode: gate::Mode::Freeze,
                        previous: gate::Mode::Active,
                        recall_after_ms: Some(500),
                    }),
                },
                SessionState {
                    party: gate::Party::Guest,
                    self_group: Some(3),
                    sr_iov: None,
                    members: vec![MemberSessionState {
                        mode: gate::Mode::Active,
                        recording: Some(RecordingState {
                            page_size: 0x1000,
                            ranges: vec![
                                pages(0, 16),
                                pages(0x10000, 1),
                                pages(u64::MAX - 0xfff, 1),
                            ],
                            written: vec![pages(0x3000, 2)],
                        }),
                        ..member(2, ReadingState::Begin)
                    }],
                    transition: None,
                },
            ],
        }
    }

    #[test]
    fn the_state_is_the_same_after_json() {
        for state in [OwnerState::default(), sample()] {
            let text = serde_json::to_string(&Owner::of("pf0", &state)).unwrap();
            let read: Owner = serde_json::from_str(&text).unwrap();
            assert_eq!(read.plain(), Ok(state), "{text}");
        }
    }

    #[test]
    fn nothing_of_the_engine_is_state() {
        let mut state = sample();
        state.sessions[0].party = gate::Party::Engine;
        let owner = Owner::of("pf0", &state);
        state.sessions.remove(0);
        assert_eq!(owner.plain(), Ok(state));
    }

    /// The recording of the sample.
    fn recording(owner: &mut Owner) -> &mut Recording {
        owner.sessions[1].members[0].recording.as_mut().unwrap()
    }

    /// A change, and why what it leaves is refused.
    type Case = (fn(&mut Owner), &'static str);

    #[test]
    fn values_out_of_range_are_named() {
        let refusal = |change: fn(&mut Owner)| {
            let mut owner = Owner::of("pf0", &sample());
            change(&mut owner);
            owner.plain().unwrap_err().to_string()
        };
        let cases: [Case; 9] = [
            (
                |o| o.sessions[1].party = Party::Monitor,
                "sessions[1].party: the monitor has a session before this one",
            ),
            (
                |o| o.sessions[0].members[1].id = 1,
                "sessions[0].members[1]: 1 follows 1; the list ascends",
            ),
            (
                |o| {
                    o.sessions[0].members[0].reading = Reading::Part {
                        context: HexBytes(vec![0; 2]),
                        at: 3,
                    }
                },
                "sessions[0].members[0].reading.part.at: 3 of 2 bytes were read",
            ),
            (
                |o| {
                    o.sessions[0].members[1].writing.as_mut().unwrap().partial =
                        HexBytes(vec![0; MAX_LEN + 1])
                },
                "sessions[0].members[1].writing.partial: 4194305 bytes are more than 4194304",
            ),
            (
                |o| recording(o).page_size = Hex(0),
                "sessions[1].members[0].recording.page_size: 0x0 is no power of two from 0x1000 to 0x40000000",
            ),
            (
                |o| recording(o).ranges[1].page_address = Hex(0xf000),
                "sessions[1].members[0].recording.ranges[1]: 1 pages of 0x1000 bytes at 0xf000 overlap the entry before, \
                 or precede it",
            ),
            (
                |o| recording(o).ranges[1].page_count = 0,
                "sessions[1].members[0].recording.ranges[1]: 0 pages of 0x1000 bytes at 0x10000 are none, or end beyond \
                 the last address",
            ),
            (
                |o| {
                    recording(o).ranges = vec![
                        Pages {
                            page_address: Hex(0),
                            page_count: 1
                        };
                        129
                    ]
                },
                "sessions[1].members[0].recording.ranges: 129 ranges are more than 128",
            ),
            (
                |o| recording(o).written[0].page_address = Hex(8),
                "sessions[1].members[0].recording.written[0]: 2 pages of 0x1000 bytes at 0x8 do not begin on a page",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(refusal(change), expected);
        }
    }
}
