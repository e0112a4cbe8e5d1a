//! Snapshots and live migration. Nothing here yet; see the crate's README.
