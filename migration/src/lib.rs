//! Snapshots and live migration (not there yet).
