//! The byte stream between the source and the destination of a live migration.
//!
//! | module | what it does |
//! |---|---|
//! | [`frame`] | header, sequence number and checksum of each frame; limits |
//! | [`message`] | the messages in control frames |
//! | [`connection`] | a socket with deadlines, keep-alive frames, and descriptors that are passed over it |
//!
//! `docs/migration-protocol.md` has the layout of every frame and the order they come in.

pub mod connection;
pub mod frame;
pub mod message;

use std::io;
use std::time::Duration;

pub use connection::{Connection, Received};
pub use frame::Kind;
pub use message::Message;

/// Error of a migration stream. The connection is useless afterwards.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// End of the stream.
    #[error("the connection was closed by the other side")]
    Closed,
    /// No byte arrived or could be sent for this long.
    #[error("the other side has been silent for {} s", .0.as_secs())]
    Silent(Duration),
    /// A frame was begun, and did not come or go within this long.
    #[error("a frame took longer than {} s", .0.as_secs())]
    Slow(Duration),
    /// The socket.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// A damaged frame.
    #[error("frame {sequence} was damaged on its way (checksum)")]
    Checksum {
        /// Its sequence number, as it should be.
        sequence: u64,
    },
    /// A frame that was lost or duplicated.
    #[error("frame {expected} should come now, and frame {found} came; one was lost or came twice")]
    Sequence {
        /// Expected sequence number.
        expected: u64,
        /// Received sequence number.
        found: u64,
    },
    /// A frame of an unknown kind: most likely not a migration stream.
    #[error(
        "what came is no frame of a migration (kind {0:#x}): at the other end is no `tern migrate` or `tern receive`"
    )]
    Kind(u32),
    /// A frame whose length exceeds the limit of its kind.
    #[error("a {kind:?} frame of {len} bytes is longer than the {max} there can be")]
    TooLong {
        /// Its kind.
        kind: Kind,
        /// Its length in bytes.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// A frame whose contents make no sense.
    #[error("a {kind:?} frame is malformed: {why}")]
    Malformed {
        /// Its kind.
        kind: Kind,
        /// What is wrong.
        why: String,
    },
    /// A valid frame at the wrong time.
    #[error("{found} came instead of {expected}")]
    Unexpected {
        /// What came.
        found: String,
        /// What should have come.
        expected: &'static str,
    },
    /// A page connection.
    #[error("connection {number}: {source}")]
    Pages {
        /// Its number.
        number: u32,
        /// What failed.
        source: Box<WireError>,
    },
}

impl WireError {
    /// True if the other side may have closed the connection, and may have said why.
    pub(crate) fn is_lost(&self) -> bool {
        match self {
            Self::Closed | Self::Silent(_) | Self::Slow(_) | Self::Io(_) => true,
            Self::Pages { source, .. } => source.is_lost(),
            _ => false,
        }
    }

    /// The same, of the page connection with this number.
    pub(crate) fn of(self, number: u32) -> Self {
        Self::Pages {
            number,
            source: Box::new(self),
        }
    }

    pub(crate) fn malformed(kind: Kind, why: impl std::fmt::Display) -> Self {
        Self::Malformed {
            kind,
            why: why.to_string(),
        }
    }
}
