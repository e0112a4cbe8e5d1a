//! What the API takes and says about migrations, besides [`Request`](crate::migrate::source::Request) and
//! [`Answer`](crate::migrate::source::Answer).

use migration::live::commit::Resolution;
use serde::{Deserialize, Serialize};

/// Answer to `PUT /api/v1/migrate/cancel`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallOff {
    /// Always true: the migration ends as soon as it looks.
    pub called_off: bool,
}

/// Body of `PUT /api/v1/resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resolve {
    /// How the doubt ends.
    pub resolution: Resolution,
}
