//! Live migration of a machine: what [`migration::live`] needs of it, at both ends.
//!
//! | module | what it does |
//! |---|---|
//! | [`address`] | where a destination listens |
//! | [`destination`] | a machine whose guest comes from another process |
//! | [`html`] | the report as one HTML file |
//! | [`monitor`] | how far a migration is; calling it off; ending a doubt |
//! | [`source`] | a machine whose guest goes to another process |
//! | [`tls`] | connections over TCP whose ends prove who they are |

pub mod address;
pub mod destination;
pub mod html;
pub mod monitor;
pub mod source;
pub mod tls;
