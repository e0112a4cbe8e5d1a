//! A context that comes in chunks.

use std::convert::Infallible;
use std::mem;

use super::draft::Draft;
use super::error::ContextError;
use super::field::{Field, FieldId, FieldType, assemble, join_header, split_header};
use super::{COUNT_LEN, FIELD_HEADER_LEN, fields, list_len};
use crate::state::{FunctionState, Shape};

/// Puts contexts together from chunks that may end anywhere (S3-34).
///
/// Everything is checked as soon as the bytes are there that say it: the number of fields, type and length of a field
/// before its value, a value when it is whole. What was checked is kept as fields; of bytes, no more than those of one
/// field are. No memory is taken for a length before it was checked.
///
/// A context may follow another, also within one chunk; the last complete one counts (S3-30).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoder {
    shape: Shape,
    /// What [`fields`] says.
    lengths: Vec<(FieldType, u64)>,
    phase: Phase,
    /// Bytes of the phase that is not complete.
    pending: Vec<u8>,
    /// What is complete of the partial context.
    draft: Draft,
    latest: Option<FunctionState>,
}

/// What the next bytes are. Each phase has a length that is known when it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The number of fields, at the start of a context.
    Count,
    /// The header of a field. `left` counts the fields that are to come, this one included.
    Header { left: u32 },
    /// The value of that field.
    Value {
        left: u32,
        kind: FieldType,
        len: usize,
    },
}

impl Phase {
    fn len(self) -> usize {
        match self {
            Self::Count => COUNT_LEN,
            Self::Header { .. } => FIELD_HEADER_LEN,
            Self::Value { len, .. } => len,
        }
    }
}

/// What a chunk brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// No context became complete.
    Incomplete,
    /// At least one context became complete: [`Decoder::latest`] is a new one.
    Complete,
}

/// What it takes to bring the partial context back to where it was when a chunk came.
#[derive(Default)]
struct Undo {
    /// Fields that were added to it.
    added: Vec<FieldId>,
    /// It as a whole, once it became complete.
    draft: Option<Draft>,
}

impl Decoder {
    /// Waits for a context of a device of `shape`.
    pub fn new(shape: &Shape) -> Self {
        Self {
            shape: shape.clone(),
            lengths: fields(shape),
            phase: Phase::Count,
            pending: Vec::new(),
            draft: Draft::new(shape.queue_sizes.len()),
            latest: None,
        }
    }

    /// Takes the next bytes. They may end anywhere, and be none.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong. The chunk then counts as never pushed: contexts that became complete in it are
    /// forgotten too (G3-p).
    pub fn push(&mut self, chunk: &[u8]) -> Result<Pushed, ContextError> {
        self.push_checked(chunk, |_| Ok::<(), Infallible>(()))
    }

    /// The same, for a device that has more to say about a state than its shape: what `check` refuses counts as never
    /// pushed, like anything that is wrong.
    pub fn push_checked<E: ToString>(
        &mut self,
        chunk: &[u8],
        check: impl FnOnce(&FunctionState) -> Result<(), E>,
    ) -> Result<Pushed, ContextError> {
        let Some((head, rest)) = self.split(chunk) else {
            self.pending.extend_from_slice(chunk);
            return Ok(Pushed::Incomplete);
        };
        let (phase, held) = (self.phase, self.pending.len());
        let mut first = mem::take(&mut self.pending);
        first.extend_from_slice(head);
        let mut undo = Undo::default();
        let outcome = self.run(&first, rest, &mut undo).and_then(|latest| {
            latest.as_ref().map_or(Ok(()), |state| {
                check(state).map_err(|error| ContextError::Device(error.to_string()))
            })?;
            Ok(latest)
        });
        match outcome {
            Ok(None) => Ok(Pushed::Incomplete),
            Ok(latest) => {
                self.latest = latest;
                Ok(Pushed::Complete)
            }
            Err(error) => {
                first.truncate(held);
                self.pending = first;
                self.phase = phase;
                if let Some(draft) = undo.draft {
                    self.draft = draft;
                }
                for id in undo.added {
                    self.draft.remove(id);
                }
                Err(error)
            }
        }
    }

    /// Bytes of a context came, but not yet all of them.
    pub fn is_partial(&self) -> bool {
        self.phase != Phase::Count || !self.pending.is_empty()
    }

    /// Drops the partial context, as if none of its bytes had come (S3-31). Complete ones stay.
    pub fn discard(&mut self) {
        self.phase = Phase::Count;
        self.pending = Vec::new();
        self.draft = Draft::new(self.shape.queue_sizes.len());
    }

    /// The last complete context.
    pub fn latest(&self) -> Option<&FunctionState> {
        self.latest.as_ref()
    }

    /// Bytes that put a new decoder, which got [`Self::latest`], into the state of this one: those of the partial context,
    /// though not always in the order in which they came. Empty if there is none.
    pub fn partial(&self) -> Vec<u8> {
        let left = match self.phase {
            Phase::Count => return self.pending.clone(),
            Phase::Header { left } | Phase::Value { left, .. } => left,
        };
        let fields = self.draft.fields();
        let mut bytes = assemble(&fields);
        // No context has as many fields as that.
        let count = (fields.len() as u32).wrapping_add(left);
        if let Some(first) = bytes.first_chunk_mut() {
            *first = count.to_le_bytes();
        }
        if let Phase::Value { kind, len, .. } = self.phase {
            bytes.extend_from_slice(&join_header(kind.raw(), len as u64));
        }
        bytes.extend_from_slice(&self.pending);
        bytes
    }

    /// The last complete context, which then counts as never pushed. A partial one stays.
    pub fn take_latest(&mut self) -> Option<FunctionState> {
        self.latest.take()
    }

    /// Bytes of memory taken for a phase that is not complete.
    #[cfg(test)]
    pub(super) fn held(&self) -> usize {
        self.pending.capacity()
    }

    /// `chunk` where the phase that is under way ends, if it reaches so far.
    fn split<'a>(&self, chunk: &'a [u8]) -> Option<(&'a [u8], &'a [u8])> {
        chunk.split_at_checked(self.phase.len().saturating_sub(self.pending.len()))
    }

    /// Completes phases: the one under way, whose bytes are `part`, and then those in `rest`. The last context that
    /// became complete.
    fn run<'a>(
        &mut self,
        mut part: &'a [u8],
        mut rest: &'a [u8],
        undo: &mut Undo,
    ) -> Result<Option<FunctionState>, ContextError> {
        let mut latest = None;
        loop {
            if let Some(state) = self.complete(part, undo)? {
                latest = Some(state);
            }
            let Some((next, after)) = self.split(rest) else {
                self.pending.extend_from_slice(rest);
                return Ok(latest);
            };
            (part, rest) = (next, after);
        }
    }

    /// Completes the phase under way, whose bytes are `part`. The state, if that was the last phase of a context.
    fn complete(
        &mut self,
        part: &[u8],
        undo: &mut Undo,
    ) -> Result<Option<FunctionState>, ContextError> {
        let left = match self.phase {
            Phase::Count => self.count(part)?,
            Phase::Header { left } => {
                let (kind, len) = self.header(part)?;
                self.phase = Phase::Value { left, kind, len };
                return Ok(None);
            }
            Phase::Value { left, kind, .. } => {
                let field = Field::decode(kind, part)?;
                let id = field.id();
                self.draft.add(field, &self.shape)?;
                if undo.draft.is_none() {
                    undo.added.push(id);
                }
                left - 1
            }
        };
        if left > 0 {
            self.phase = Phase::Header { left };
            return Ok(None);
        }
        let state = self.draft.finish(&self.shape)?;
        self.phase = Phase::Count;
        let whole = mem::replace(&mut self.draft, Draft::new(self.shape.queue_sizes.len()));
        undo.draft.get_or_insert(whole);
        Ok(Some(state))
    }

    /// Checks the number of fields.
    fn count(&self, part: &[u8]) -> Result<u32, ContextError> {
        let bytes = part.first_chunk().copied().unwrap_or_default();
        let count = u32::from_le_bytes(bytes);
        let queues = self.shape.queue_sizes.len() as u64;
        let (mut least, mut most) = (0, 0);
        for (kind, _) in &self.lengths {
            let number = match kind {
                // They are there in place of those of split rings.
                FieldType::PackedRuntime | FieldType::OwnedPackedChains => 0,
                kind if kind.is_per_queue() => queues,
                _ => 1,
            };
            most += number;
            if !is_optional(*kind) {
                least += number;
            }
        }
        if (least..=most).contains(&count.into()) {
            Ok(count)
        } else {
            Err(ContextError::FieldCount { count, least, most })
        }
    }

    /// Checks type and length of a field.
    fn header(&self, part: &[u8]) -> Result<(FieldType, usize), ContextError> {
        let bytes = part.first_chunk().copied().unwrap_or_default();
        let (raw, len) = split_header(&bytes);
        let field = FieldType::from_raw(raw).ok_or(ContextError::UnknownType(raw))?;
        let known = self.lengths.iter().find(|(kind, _)| *kind == field);
        let &(_, expected) = known.ok_or(ContextError::Unsupported(field))?;
        if let Some(least) = list_len(field, 0) {
            // Chains of a split ring are a multiple of 2 bytes, those of a packed one of 4.
            let unit = least as u64;
            let whole = match field {
                FieldType::OwnedChains => len % 2 == 0,
                _ => len.is_multiple_of(unit),
            };
            if !(unit..=expected).contains(&len) || !whole {
                let most = expected;
                return Err(ContextError::ListLength { field, len, most });
            }
        } else if len != expected {
            return Err(ContextError::Length {
                field,
                len,
                expected,
            });
        }
        let id = field.of(None);
        if self.draft.has(id) {
            return Err(ContextError::Duplicate(id));
        }
        // It is not more than `expected`, which is the size of something in memory.
        Ok((field, len as usize))
    }
}

/// A context is complete without such a field.
fn is_optional(kind: FieldType) -> bool {
    matches!(
        kind,
        FieldType::DriverFeatures | FieldType::OwnedChains | FieldType::QueueStatus
    )
}
