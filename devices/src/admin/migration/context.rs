//! DEV_CTX_SIZE_GET, DEV_CTX_READ, DEV_CTX_WRITE, DEV_CTX_FIELDS_QUERY and DEV_CTX_DISCARD.
//!
//! A context is read from a snapshot that is taken with its first byte (G3-m). A new one is there after a change of the
//! mode, a discard, or a context that was written to its end (G3-l); what the guest does never makes one (S3-23).

use super::{BAD_FIELD, BAD_STATE, Exchange, Refusal};
use crate::admin::envelope::Answer;
use crate::admin::queue::MAX_DATA;
use crate::admin::{Epoch, Member};
use crate::context::{self, Decoder, Pushed};
use crate::gate::{Mode, Party};
use crate::state::{FunctionState, ReadingState, Shape, WritingState};
use crate::virtio::{CheckedState, Restoration, RestoreError};

/// How far one driver is with the context of one member.
#[derive(Debug, Default)]
pub struct ContextSession {
    /// That of the member when this was true.
    epoch: Epoch,
    reading: Reading,
    writing: Option<Decoder>,
    /// What the member found out about the last complete context when it was written, until that takes effect.
    checked: Option<CheckedState>,
}

/// How far a context was read.
#[derive(Debug, Default)]
enum Reading {
    /// Not at all.
    #[default]
    Begin,
    /// `at` bytes of it.
    Part { bytes: Vec<u8>, at: usize },
    /// To its end (S3-23).
    End,
}

impl ContextSession {
    /// The member is in `epoch`. What was written before a reset is out of date then (G3-z); what is being read is a snapshot,
    /// and stays one (S3-23, G3-m), unless the member itself is another.
    pub fn enter(&mut self, epoch: Epoch) {
        if self.epoch.life != epoch.life {
            self.reading = Reading::Begin;
        }
        if self.epoch != epoch {
            self.epoch = epoch;
            self.forget();
        }
    }

    /// What is still true of it, of a member that is in `epoch`: see [`Self::enter`].
    pub fn save(&self, epoch: Epoch, shape: &Shape) -> (ReadingState, Option<WritingState>) {
        let reading = match &self.reading {
            _ if self.epoch.life != epoch.life => ReadingState::Begin,
            Reading::Begin => ReadingState::Begin,
            Reading::Part { bytes, at } => ReadingState::Part {
                bytes: bytes.clone(),
                at: *at,
            },
            Reading::End => ReadingState::End,
        };
        let decoder = self.writing.as_ref().filter(|_| self.epoch == epoch);
        let writing = decoder.map(|decoder| WritingState {
            complete: decoder.latest().map(|state| context::encode(state, shape)),
            partial: decoder.partial(),
        });
        let empty = WritingState::default();
        (reading, writing.filter(|writing| *writing != empty))
    }

    /// The same once more, with `member`.
    ///
    /// # Errors
    ///
    /// The field that cannot be, and what is wrong with it.
    pub fn restored(
        member: &dyn Member,
        reading: &ReadingState,
        writing: Option<&WritingState>,
    ) -> Result<Self, (&'static str, String)> {
        let shape = member.shape();
        let reading = match reading {
            ReadingState::Begin => Reading::Begin,
            ReadingState::End => Reading::End,
            ReadingState::Part { bytes, at } => {
                whole(bytes, &shape, |_| Ok(())).map_err(|what| ("reading.bytes", what))?;
                if *at >= bytes.len() {
                    let what = format!("{at} is not before the end of {} bytes", bytes.len());
                    return Err(("reading.at", what));
                }
                let (bytes, at) = (bytes.clone(), *at);
                Reading::Part { bytes, at }
            }
        };
        let decoder = |writing: &WritingState| {
            let complete = writing.complete.as_ref();
            let check = |state: &FunctionState| member.check(state).map(drop);
            let decoder = complete.map(|bytes| whole(bytes, &shape, check));
            let decoder = decoder.transpose();
            let mut decoder = decoder
                .map_err(|what| ("writing.complete", what))?
                .unwrap_or_else(|| Decoder::new(&shape));
            match decoder.push(&writing.partial) {
                Ok(Pushed::Incomplete) => Ok(decoder),
                Ok(Pushed::Complete) => Err(("writing.partial", "is complete".to_owned())),
                Err(error) => Err(("writing.partial", error.to_string())),
            }
        };
        Ok(Self {
            epoch: member.epoch(),
            reading,
            writing: writing.map(decoder).transpose()?,
            checked: None,
        })
    }

    /// There is a new context to read, and none was written.
    pub(super) fn begin_anew(&mut self) {
        self.reading = Reading::Begin;
        self.forget();
    }

    /// Nothing was written.
    fn forget(&mut self) {
        self.writing = None;
        self.checked = None;
    }

    /// True while a context is read or written in part (S3-7).
    pub(super) fn is_partial(&self) -> bool {
        let read = matches!(self.reading, Reading::Part { at: 1.., .. });
        read || self.writing.as_ref().is_some_and(Decoder::is_partial)
    }

    /// The last complete context that was written, if there is one.
    fn written(&self) -> Option<&FunctionState> {
        self.writing.as_ref().and_then(Decoder::latest)
    }

    pub(super) fn has_written(&self) -> bool {
        self.written().is_some()
    }
}

/// A decoder that got `bytes`, which are one context of a device of `shape`; what is wrong if they are not.
fn whole(
    bytes: &[u8],
    shape: &Shape,
    check: impl FnOnce(&FunctionState) -> Result<(), RestoreError>,
) -> Result<Decoder, String> {
    let (len, most) = (bytes.len(), context::max_len(shape));
    if len > most {
        return Err(format!("has {len} bytes; no context has more than {most}"));
    }
    let mut decoder = Decoder::new(shape);
    match decoder.push_checked(bytes, check) {
        Ok(Pushed::Complete) if !decoder.is_partial() => Ok(decoder),
        Ok(_) => Err("is not one whole context".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

impl Exchange<'_> {
    /// DEV_CTX_SIZE_GET: what is left to read in this mode, or with freeze_mode, what there is to read in Freeze.
    pub(super) fn context_size(&mut self) -> Result<Answer, Refusal> {
        let in_freeze = match self.data.first() {
            None | Some(0) => false,
            Some(1) => self.mode() != Mode::Freeze,
            Some(_) => return Err(BAD_FIELD.into()),
        };
        let size = match &self.context().reading {
            Reading::Part { bytes, at } if !in_freeze => bytes.len() - at,
            Reading::End if !in_freeze => 0,
            _ => self.encode_context().len(),
        };
        Ok((size as u64).to_le_bytes().to_vec().into())
    }

    /// DEV_CTX_READ.
    pub(super) fn read_context(&mut self) -> Result<Answer, Refusal> {
        self.after_reset()?;
        if let Reading::Begin = self.context().reading {
            let bytes = self.encode_context();
            self.context().reading = Reading::Part { bytes, at: 0 };
        }
        let room = self.room;
        let context = self.context();
        let Reading::Part { bytes, at } = &mut context.reading else {
            return Ok(Answer::default());
        };
        let end = at.saturating_add(room).min(bytes.len());
        let result = bytes.get(*at..end).unwrap_or_default().to_vec();
        *at = end;
        if end == bytes.len() {
            context.reading = Reading::End;
        }
        Ok(Answer {
            // A context is far shorter than 4 GiB.
            output: result.len() as u32,
            result,
        })
    }

    /// The context there is to read: the member's, or what was written to it.
    fn encode_context(&mut self) -> Vec<u8> {
        let member = self.member;
        let shape = member.shape();
        match self.context().written() {
            Some(state) => context::encode(state, &shape),
            None => context::encode(&member.save(), &shape),
        }
    }

    /// DEV_CTX_WRITE. What is refused leaves no trace, however much was written before (G3-p).
    pub(super) fn write_context(&mut self) -> Result<Answer, Refusal> {
        self.after_reset()?;
        if self.mode() != Mode::Freeze {
            return Err(BAD_STATE.into());
        }
        if self.data.len() > MAX_DATA {
            return Err(BAD_FIELD.into());
        }
        let (member, data) = (self.member, self.data);
        let context = self.context();
        let writing = &mut context.writing;
        let decoder = writing.get_or_insert_with(|| Decoder::new(&member.shape()));
        let mut checked = None;
        let pushed = decoder.push_checked(data, |state| {
            checked = Some(member.check(state)?);
            Ok::<_, RestoreError>(())
        });
        match pushed {
            Ok(Pushed::Incomplete) => {}
            Ok(Pushed::Complete) => {
                context.reading = Reading::Begin;
                context.checked = checked;
            }
            Err(error) => {
                tracing::debug!(member = member.name(), %error, "device context refused");
                return Err(BAD_FIELD.into());
            }
        }
        Ok(Answer::default())
    }

    /// The context that was written takes effect (S3-32). One that the monitor's engine wrote, which carries a whole VM, does
    /// so without a sign; what else it takes to make up the device is not in a context, and for the engine to add.
    pub(super) fn take_effect(&mut self) -> Result<(), Refusal> {
        let member = self.member;
        let how = match self.party() {
            Party::Guest | Party::Monitor => Restoration::Announced,
            Party::Engine => Restoration::Exact,
        };
        let context = self.context();
        let checked = context.checked.take();
        let Some(state) = context.written() else {
            return Ok(());
        };
        let Err(error) = member.restore(state, checked, context.epoch, how) else {
            return Ok(());
        };
        // It had been checked, and the member has not run since: only a reset can have come between.
        tracing::debug!(member = member.name(), %error, "a device context that was accepted cannot take effect");
        Err(match error {
            RestoreError::Busy | RestoreError::Stale => Refusal::Later,
            _ => BAD_FIELD.into(),
        })
    }

    /// DEV_CTX_FIELDS_QUERY: le16 type, 6 reserved bytes and le64 length for each (S3-35).
    pub(super) fn context_fields(&self) -> Answer {
        let mut result = Vec::new();
        for (field, len) in context::fields(&self.member.shape()) {
            result.extend_from_slice(&field.raw().to_le_bytes());
            result.extend_from_slice(&[0; 6]);
            result.extend_from_slice(&len.to_le_bytes());
        }
        result.into()
    }

    /// DEV_CTX_DISCARD: as if nothing had been read in this mode, and nothing written (S3-28, S3-31).
    pub(super) fn discard_context(&mut self) -> Answer {
        self.context().begin_anew();
        Answer::default()
    }
}
