//! Messages in control frames, as JSON.

use serde::{Deserialize, Serialize};

use super::WireError;
use super::frame::{Kind, MAX_BODY};
use crate::id::SnapshotId;
use crate::layout::RamLayout;

/// The version of the protocol.
pub const VERSION: u32 = 1;
/// The most connections that a guest's memory is copied over, the main one included.
pub const MAX_CONNECTIONS: u32 = 16;
/// Longest reasons in a message, in bytes; longer ones are cut. They fit a frame even if each byte has to be escaped.
const MAX_REASON: usize = 8 << 10;
/// What each reason takes beside its text.
const REASON_EXTRA: usize = 8;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Purpose {
    /// A guest is to be moved.
    Migrate,
    /// The source of an earlier connection asks what became of the guest.
    Outcome,
    /// The source of an earlier connection sends pages over this one as well.
    Pages {
        /// Number of the connection; that of the main one, over which the guest was offered, is 1.
        connection: u32,
    },
}

/// How guest memory gets there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// It is copied over the connection.
    Copy,
    /// Its memfd is passed.
    Handoff,
}

/// What became of a guest, as its destination knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It runs there, or did.
    Running,
    /// It does not and never will run there.
    Discarded,
    /// Nothing is known of this migration.
    Unknown,
}

/// RAM of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First guest physical address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A message. Unknown members and types are errors: a later version of the protocol says so in its hello.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Message {
    /// First message of the source.
    Hello {
        /// Always `tern-migration`.
        protocol: String,
        /// Oldest version that the sender speaks.
        oldest: u32,
        /// Newest version that the sender speaks.
        newest: u32,
        /// What the connection is for.
        purpose: Purpose,
        /// Identifies the migration.
        session: String,
    },
    /// Answer of the destination.
    Welcome {
        /// The version that is spoken from here on.
        version: u32,
        /// The program that answers.
        program: String,
    },
    /// The guest; its sections, and descriptors if there are any, came before.
    Offer {
        /// RAM ranges, ascending.
        memory: Vec<Range>,
        /// How memory gets there.
        how: Memory,
        /// The source sends checksums of all memory, and the destination compares. Only if it is copied.
        verify: bool,
        /// How many connections memory comes over, this one included: 1 unless it is copied, and [`MAX_CONNECTIONS`] at most.
        connections: u32,
    },
    /// The destination has built the machine and takes pages.
    Accept,
    /// The destination does not take the guest, or no longer. Final.
    Refuse {
        /// Why: everything that does not fit.
        reasons: Vec<String>,
    },
    /// All pages of a round were sent; over each page connection, those that it carried.
    Round {
        /// Number of the round, from 1 on.
        number: u32,
    },
    /// All of a round has arrived and is in memory.
    Arrived {
        /// Number of the round.
        number: u32,
    },
    /// All state was sent: final pages, then sections. Over a page connection: all pages.
    Complete,
    /// Everything is restored and verified; the destination waits for `Commit`.
    Prepared,
    /// The guest is the destination's. The source never resumes it on its own afterwards.
    Commit,
    /// The guest runs at the destination.
    Running {
        /// Microseconds from the arrival of `Commit` until then.
        resume_us: u64,
        /// Microseconds that restoring took before.
        restore_us: u64,
    },
    /// The source keeps the guest. Final, and only before `Commit`.
    Cancel {
        /// Why.
        reason: String,
    },
    /// Answer to a hello whose purpose is `Outcome`.
    Outcome {
        /// What became of the guest.
        outcome: Outcome,
    },
    /// The source has learnt the outcome: nobody will ask any more.
    Bye,
}

impl Message {
    /// A hello.
    pub fn hello(purpose: Purpose, session: SnapshotId) -> Self {
        Self::Hello {
            protocol: PROTOCOL.to_owned(),
            oldest: VERSION,
            newest: VERSION,
            purpose,
            session: session.to_string(),
        }
    }

    /// An offer of a guest with this RAM.
    pub fn offer(layout: &RamLayout, how: Memory, verify: bool, connections: u32) -> Self {
        let ranges = layout.ranges().iter();
        Self::Offer {
            memory: ranges
                .map(|range| Range {
                    start: range.start,
                    len: range.len,
                })
                .collect(),
            how,
            verify,
            connections,
        }
    }

    /// A refusal.
    pub fn refuse(reasons: Vec<String>) -> Self {
        let mut left = MAX_REASON;
        let reasons = reasons.into_iter().map_while(|reason| {
            let reason = cut(reason, left);
            left = left.saturating_sub(reason.len() + REASON_EXTRA);
            (!reason.is_empty()).then_some(reason)
        });
        Self::Refuse {
            reasons: reasons.collect(),
        }
    }

    /// A cancellation.
    pub fn cancel(reason: impl std::fmt::Display) -> Self {
        Self::Cancel {
            reason: cut(reason.to_string(), MAX_REASON),
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello { .. } => "hello",
            Self::Welcome { .. } => "welcome",
            Self::Offer { .. } => "offer",
            Self::Accept => "accept",
            Self::Refuse { .. } => "refuse",
            Self::Round { .. } => "round",
            Self::Arrived { .. } => "arrived",
            Self::Complete => "complete",
            Self::Prepared => "prepared",
            Self::Commit => "commit",
            Self::Running { .. } => "running",
            Self::Cancel { .. } => "cancel",
            Self::Outcome { .. } => "outcome",
            Self::Bye => "bye",
        }
    }

    /// The body of its frame.
    pub fn to_bytes(&self) -> Result<Vec<u8>, WireError> {
        let bytes = serde_json::to_vec(self).map_err(|e| WireError::malformed(Kind::Message, e))?;
        if bytes.len() > MAX_BODY as usize {
            return Err(WireError::TooLong {
                kind: Kind::Message,
                len: bytes.len() as u64,
                max: MAX_BODY.into(),
            });
        }
        Ok(bytes)
    }

    /// Reads the body of a frame.
    pub fn parse(bytes: &[u8]) -> Result<Self, WireError> {
        serde_json::from_slice(bytes).map_err(|e| WireError::malformed(Kind::Message, e))
    }
}

/// Name of the protocol.
pub const PROTOCOL: &str = "tern-migration";

fn cut(mut text: String, max: usize) -> String {
    if text.len() > max {
        let mut end = max;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_the_same_after_being_bytes() {
        let layout = RamLayout::new([(0, 4096), (1 << 32, 8192)]).unwrap();
        for message in [
            Message::hello(Purpose::Migrate, SnapshotId([7; 16])),
            Message::hello(Purpose::Pages { connection: 2 }, SnapshotId([7; 16])),
            Message::offer(&layout, Memory::Handoff, false, 1),
            Message::offer(&layout, Memory::Copy, true, 16),
            Message::refuse(vec!["a".to_owned(), "b".to_owned()]),
            Message::Complete,
            Message::Outcome {
                outcome: Outcome::Discarded,
            },
        ] {
            let bytes = message.to_bytes().unwrap();
            assert_eq!(Message::parse(&bytes).unwrap(), message);
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains(&format!("\"{}\"", message.name())), "{text}");
        }
    }

    #[test]
    fn reasons_are_cut_to_what_fits_a_frame() {
        let reasons = vec!["ü".repeat(9000), "x".repeat(9000), "y".to_owned()];
        let message = Message::refuse(reasons);
        assert!(message.to_bytes().unwrap().len() < MAX_BODY as usize);
        let Message::Refuse { reasons } = message else {
            unreachable!()
        };
        assert_eq!(reasons.len(), 1, "no room for the second");
    }

    #[test]
    fn reasons_fit_a_frame_whatever_has_to_be_escaped() {
        for reasons in [
            vec!["\0".repeat(20000)],
            vec!["\0".to_owned(); 20000],
            vec!["x".to_owned(); 20000],
        ] {
            Message::refuse(reasons.clone()).to_bytes().unwrap();
            Message::cancel(reasons.concat()).to_bytes().unwrap();
        }
    }

    #[test]
    fn unknown_members_and_types_are_refused() {
        for text in [
            r#"{"accept":1}"#,
            r#""later""#,
            "[]",
            "",
            r#"{"round":{"number":-1}}"#,
            r#"{"round":{"number":1,"more":1}}"#,
        ] {
            assert!(Message::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
