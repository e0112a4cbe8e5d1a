//! DEV_MODE_GET and DEV_MODE_SET.

use std::time::Instant;

use super::{BAD_FIELD, BAD_STATE, Exchange, Refusal};
use crate::admin::envelope::Answer;
use crate::admin::{Member, MemberId, Rest};
use crate::gate::{Mode, Party};

/// A change of a member's mode that waits for what is in flight.
#[derive(Debug)]
pub struct Transition {
    pub member: MemberId,
    /// The mode it is set to.
    pub mode: Mode,
    /// The mode to go back to, should it be abandoned (S3-6).
    pub previous: Mode,
    /// When requests that have not begun are given up; `None` once that was done.
    pub recall_at: Option<Instant>,
}

impl Transition {
    /// True if it is what a DEV_MODE_SET with this member and this data began.
    pub fn is_of(&self, member: u64, data: &[u8]) -> bool {
        let mode = data.first().copied().unwrap_or(0);
        member == u64::from(self.member.0) && mode == self.mode as u8
    }

    /// Undoes the change, unless the member came to exist anew in between, and with it its mode.
    pub fn undo(&self, member: &dyn Member, party: Party) {
        if member.mode(party) == self.mode {
            member.set_mode(party, self.previous);
        }
    }
}

impl Exchange<'_> {
    /// DEV_MODE_SET. Executed again while it waits.
    pub(super) fn set_mode(&mut self) -> Result<Answer, Refusal> {
        let raw = self.data.first().copied().unwrap_or(0);
        let mode = Mode::from_raw(raw).ok_or(BAD_FIELD)?;
        self.after_reset()?;
        // A member that came to exist anew in between is in another mode than the one it was set to: it is set once more.
        let held = self.mode();
        self.session
            .transition()
            .take_if(|transition| transition.mode != held);
        if self.session.transition().is_none() {
            self.begin(mode)?;
        }
        self.wait()
    }

    /// Everything that can be refused, and then the change itself.
    fn begin(&mut self, mode: Mode) -> Result<(), Refusal> {
        let previous = self.mode();
        if previous == mode {
            // S3-4, whatever is half read or written (G3-n).
            return Ok(());
        }
        let context = self.context();
        if mode != Mode::Freeze && context.is_partial() {
            return Err(BAD_STATE.into());
        }
        if previous == Mode::Freeze && context.has_written() {
            self.take_effect()?;
        }
        let (party, member) = (self.party(), self.member);
        member.set_mode(party, mode);
        let waits = mode != Mode::Active;
        *self.session.transition() = Some(Transition {
            member: self.id,
            mode,
            previous,
            recall_at: waits.then(|| Instant::now() + self.patience),
        });
        Ok(())
    }

    /// Done when nothing is in flight; a member that runs has nothing to wait for.
    fn wait(&mut self) -> Result<Answer, Refusal> {
        let runs = self.mode() == Mode::Active;
        let Some(transition) = self.session.transition() else {
            return Ok(Answer::default());
        };
        if !runs && self.member.rest() != Rest::AtRest {
            if transition.recall_at.is_some_and(|at| at <= Instant::now()) {
                transition.recall_at = None;
                self.member.recall();
            }
            if self.member.rest() != Rest::AtRest {
                return Err(Refusal::Later);
            }
        }
        *self.session.transition() = None;
        self.context().begin_anew();
        Ok(Answer::default())
    }
}
