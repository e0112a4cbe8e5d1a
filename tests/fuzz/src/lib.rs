//! Fuzz targets for everything that reads outside bytes.
//!
//! A target is an ordinary function of bytes. It returns if the code under test kept its promises, and panics if not.
//! What the bytes mean is up to the target; any bytes are a valid input. [`TARGETS`] lists them all, for the
//! smoke test (`cargo test -p fuzz`) and for the coverage-guided runs (`cargo run -p fuzz`).

// A target states what must hold, like a test.
#![allow(clippy::expect_used, clippy::panic)]

mod admin;
mod context;
mod fixture;
mod host;
mod input;
mod migrations;
mod net;
mod queues;
mod records;
mod registers;
mod restore;
mod sessions;
mod snapshot;
mod sriov;
mod transport;

pub use admin::admin_commands;
pub use context::context;
pub use host::{configuration, kernel_image};
pub use migrations::migration_stream;
pub use net::net_frames;
pub use queues::{queue_device_side, queue_driver_side};
pub use records::write_records;
pub use registers::{pci_config, virtio_registers};
pub use restore::snapshot_restore;
pub use sessions::context_sessions;
pub use snapshot::snapshot_state;
pub use sriov::sriov_config;
pub use transport::transport_commands;

/// A target's name and its function.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("admin_commands", admin_commands),
    ("configuration", configuration),
    ("context", context),
    ("context_sessions", context_sessions),
    ("kernel_image", kernel_image),
    ("migration_stream", migration_stream),
    ("net_frames", net_frames),
    ("pci_config", pci_config),
    ("queue_device_side", queue_device_side),
    ("queue_driver_side", queue_driver_side),
    ("snapshot_restore", snapshot_restore),
    ("snapshot_state", snapshot_state),
    ("sriov_config", sriov_config),
    ("transport_commands", transport_commands),
    ("virtio_registers", virtio_registers),
    ("write_records", write_records),
];
