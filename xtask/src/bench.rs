//! `cargo xtask bench`: figures, from one run in one machine, as ratios to other monitors where their binaries are given.
//!
//! Absolute times of an emulated host say little; the ratio of two programs measured in turns in the same one does.

mod boot;
mod context;
mod host;
mod http;
mod migrate;
mod queue;
mod size;
mod snapshot;
mod spread;
mod vfs;

use anyhow::Result;
use clap::{Args, Subcommand};

/// `cargo xtask bench`
#[derive(Debug, Args)]
pub struct Bench {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time from exec to the guest's init, and the monitor's memory beyond guest RAM
    Boot(boot::Boot),
    /// Runs inside the machine
    #[command(hide = true)]
    BootInside(boot::Inside),
    /// Contexts of virtual functions: their size, and the time to save, restore and activate them
    Context(context::Context),
    /// What it takes to move a guest to another process: time, pause, bytes and processor time
    Migrate(migrate::Migrate),
    /// Runs inside the machine
    #[command(hide = true)]
    MigrateInside(migrate::Inside),
    /// Virtqueues, split and packed: buffers a second that a device fetches and gives back
    Queue(queue::Queue),
    /// What it takes to save a guest, to save what changed since, and to restore it
    Snapshot(snapshot::Snapshot),
    /// Runs inside the machine
    #[command(hide = true)]
    SnapshotInside(snapshot::Inside),
    /// What virtual functions cost: time, memory, commands, and the switch against a bridge of the host
    Vfs(vfs::Vfs),
    /// Runs inside the machine
    #[command(hide = true)]
    VfsInside(vfs::Inside),
}

impl Bench {
    pub fn run(self) -> Result<i32> {
        match self.what {
            What::Boot(boot) => boot.run(),
            What::BootInside(inside) => inside.run(),
            What::Context(context) => context.run(),
            What::Migrate(migrate) => migrate.run(),
            What::MigrateInside(inside) => inside.run(),
            What::Queue(queue) => queue.run(),
            What::Snapshot(snapshot) => snapshot.run(),
            What::SnapshotInside(inside) => inside.run(),
            What::Vfs(vfs) => vfs.run(),
            What::VfsInside(inside) => inside.run(),
        }
    }
}

/// The middle of `values`; of an even number, the lower of the two in the middle.
fn median<T: Copy + PartialOrd>(values: &[T]) -> Option<T> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
    sorted.get(sorted.len().checked_sub(1)? / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_a_value_that_was_measured() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4, 1, 3, 2]), Some(2));
        assert_eq!(median::<u8>(&[]), None);
    }
}
