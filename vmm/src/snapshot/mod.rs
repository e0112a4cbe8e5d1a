//! Snapshots of a whole VM: the state as JSON, and how it is taken and put back.
//!
//! | module | what it does |
//! |---|---|
//! | [`format`](mod@format) | the JSON of `state.json`: the only place that knows it |

pub mod format;
