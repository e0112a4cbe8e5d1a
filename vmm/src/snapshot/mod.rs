//! Snapshots of a whole VM: the state as JSON, and how it is taken and put back.
//!
//! | module | what it does |
//! |---|---|
//! | [`capture`] | the state of a machine but for its memory, taken from one and put into another |
//! | [`devices`] | the state of everything on the PCI bus |
//! | [`format`](mod@format) | the JSON of `state.json`: the only place that knows it |
//! | [`members`] | the engine that moves members of a group by administration commands |
//! | [`overrides`] | files, taps and consoles that are other ones after a restore |
//! | [`report`] | what a snapshot is asked for, how far it is, what it came to |
//! | [`restore`] | going on from a snapshot |
//! | [`save`] | taking one |

pub mod capture;
pub mod devices;
pub mod format;
pub mod members;
pub mod overrides;
pub mod report;
pub mod restore;
pub mod save;
