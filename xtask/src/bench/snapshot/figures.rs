//! What was measured, as JSON and as tables for the README.

use anyhow::Result;
use serde::Serialize;

use super::super::size::Mib;
use super::super::spread::Spread;
use super::guest::{Report, Restored};
use super::peers;

/// A snapshot that was taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    pub report: Report,
    /// Bytes of its files on their file system.
    pub on_disk: u64,
    /// Microseconds to write the same data.
    pub plain_us: f64,
}

/// Snapshots of one kind, from all rounds.
#[derive(Debug, Serialize)]
pub struct Saves {
    total_us: Spread,
    pause_us: Spread,
    stop_us: Spread,
    devices_us: Spread,
    vcpus_us: Spread,
    memory_us: Spread,
    /// Bytes that were written in the pause; the others were while the guest ran.
    written_paused: Spread,
    on_disk: Spread,
    plain_write_us: Spread,
    /// Total time divided by that of the plain write of the same round.
    ratio: Spread,
}

impl Saves {
    pub fn of(taken: &[Taken]) -> Result<Self> {
        let spread = |pick: fn(&Taken) -> f64| Spread::of(taken.iter().map(pick));
        Ok(Self {
            total_us: spread(|t| t.report.total_us as f64)?,
            pause_us: spread(|t| t.report.pause_us.total as f64)?,
            stop_us: spread(|t| t.report.pause_us.stop as f64)?,
            devices_us: spread(|t| t.report.pause_us.devices as f64)?,
            vcpus_us: spread(|t| t.report.pause_us.vcpus as f64)?,
            memory_us: spread(|t| t.report.pause_us.memory as f64)?,
            written_paused: spread(|t| t.report.bytes.written_paused as f64)?,
            on_disk: spread(|t| t.on_disk as f64)?,
            plain_write_us: spread(|t| t.plain_us)?,
            ratio: spread(|t| t.report.total_us as f64 / t.plain_us)?,
        })
    }

    /// The cells of a row that both kinds have.
    fn row(&self) -> String {
        let ms = |spread: Spread| format!("{:.1}", spread.median / 1e3);
        format!(
            "{} | {} | {} | {}, {}, {}, {} | {} | {} | {}",
            self.on_disk.size(),
            self.total_us.time(),
            self.pause_us.time(),
            ms(self.stop_us),
            ms(self.devices_us),
            ms(self.vcpus_us),
            ms(self.memory_us),
            self.written_paused.size(),
            self.plain_write_us.time(),
            self.ratio.ratio(),
        )
    }
}

/// Restores of one kind, from all rounds.
#[derive(Debug, Serialize)]
pub struct Restores {
    running_us: Spread,
    output_us: Spread,
}

impl Restores {
    pub fn of(restored: &[Restored]) -> Result<Self> {
        let spread = |pick: fn(&Restored) -> f64| Spread::of(restored.iter().map(pick));
        Ok(Self {
            running_us: spread(|r| r.running.as_secs_f64() * 1e6)?,
            output_us: spread(|r| r.output.as_secs_f64() * 1e6)?,
        })
    }
}

/// All figures of guests of one size.
#[derive(Debug, Serialize)]
pub struct Figures {
    pub guest_mib: Mib,
    pub touched_mib: Mib,
    pub dirtied_mib: Mib,
    pub full: Saves,
    /// The part of the total time, from 0 to 1, that came after the pause: digest and syncing. Seen once.
    pub full_after_pause: f64,
    pub incremental: Saves,
    pub restore: Restores,
    pub restore_prefault: Restores,
    /// Until the guest ran whose memory was read first of all, holes included.
    pub first_prefault_us: f64,
    /// Other monitors with guests of the same size.
    pub peers: Vec<peers::Figures>,
}

/// What the columns of both tables of snapshots are.
const COLUMNS: &str = "on disk | total | pause | of that stop, devices, vCPUs, memory; ms | written in the pause | plain `write` \
     | total, as a ratio to it";

/// The tables.
pub fn print(figures: &[Figures]) {
    println!("\n| full snapshot: guest, touched | {COLUMNS} |");
    println!("{}", rule(8));
    for f in figures {
        println!("| {}, {} | {} |", f.guest_mib, f.touched_mib, f.full.row());
    }
    let after: Vec<String> = figures
        .iter()
        .map(|f| format!("{:.0} % ({})", f.full_after_pause * 100.0, f.guest_mib))
        .collect();
    println!(
        "\nDigest and syncing, after the pause, are {} of the total, as seen in the round that does not count.",
        after.join(", ")
    );
    println!("\n| incremental: guest, written to | {COLUMNS} |");
    println!("{}", rule(8));
    for f in figures {
        let row = f.incremental.row();
        println!("| {}, {} | {row} |", f.guest_mib, f.dirtied_mib);
    }
    println!(
        "\n| restore: guest | exec to running | to the first line | `--prefault`: to running | to the first line |"
    );
    println!("{}", rule(5));
    for f in figures {
        let [lazy, eager] = [&f.restore, &f.restore_prefault]
            .map(|r| format!("{} | {}", r.running_us.time(), r.output_us.time()));
        println!("| {} | {lazy} | {eager} |", f.guest_mib);
    }
    let first: Vec<String> = figures
        .iter()
        .map(|f| format!("{:.2} s ({})", f.first_prefault_us / 1e6, f.guest_mib))
        .collect();
    println!(
        "\nThe first `--prefault` of a snapshot, which fills the holes of its file in the page cache and does not count, ran \
         after {}.",
        first.join(", ")
    );
    if figures.iter().all(|f| f.peers.is_empty()) {
        return;
    }
    println!(
        "\n| peer: guest, touched | pause, full snapshot, resume | tern's total, as a ratio | its pause | restore: exec to \
         running | tern's, as a ratio |"
    );
    println!("{}", rule(6));
    for f in figures {
        for peer in &f.peers {
            println!(
                "| {}: {}, {} | {} |",
                peer.monitor,
                f.guest_mib,
                f.touched_mib,
                f.peer_row(peer)
            );
        }
    }
}

impl Figures {
    /// The cells of a peer, with medians as ratios.
    fn peer_row(&self, peer: &peers::Figures) -> String {
        let ratio = |own: Spread, other: Spread| format!("{:.3}", own.median / other.median);
        [
            peer.total_us.time().to_string(),
            ratio(self.full.total_us, peer.total_us),
            ratio(self.full.pause_us, peer.total_us),
            peer.restore_us.time().to_string(),
            ratio(self.restore.running_us, peer.restore_us),
        ]
        .join(" | ")
    }
}

fn rule(columns: usize) -> String {
    format!("|{}", "---|".repeat(columns))
}

#[cfg(test)]
mod tests {
    use super::super::guest::{Bytes, Pause};
    use super::*;

    #[test]
    fn a_ratio_is_that_of_its_round() {
        let taken = |total_us, plain_us| Taken {
            report: Report {
                bytes: Bytes {
                    written_running: 0,
                    written_paused: 1 << 20,
                },
                pause_us: Pause {
                    total: 10_000,
                    stop: 1000,
                    devices: 2000,
                    vcpus: 3000,
                    memory: 4000,
                },
                total_us,
            },
            on_disk: 5 << 20,
            plain_us,
        };
        let rounds = [
            taken(300_000, 100e3),
            taken(200_000, 200e3),
            taken(400_000, 200e3),
        ];
        let saves = Saves::of(&rounds).unwrap();
        assert_eq!(
            saves.row(),
            "5.0 MiB | 300 ms (200 to 400) | 10.0 ms | 1.0, 2.0, 3.0, 4.0 | 1.0 MiB | 200 ms (100 to 200) \
             | 2.00 (1.00 to 3.00)"
        );
        assert_eq!(COLUMNS.split('|').count(), saves.row().split('|').count());
        assert!(Saves::of(&[]).is_err());
    }
}
