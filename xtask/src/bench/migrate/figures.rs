//! What was measured, as JSON and as tables for the README.

use anyhow::Result;
use serde::Serialize;

use super::super::size::Mib;
use super::super::spread::Spread;
use super::guest::{Case, How, Move, Parts, Sent, Work};

/// All moves of one kind.
#[derive(Debug, Serialize)]
pub struct Figures {
    monitor: &'static str,
    how: How,
    guest_mib: Mib,
    work: Work,
    vfs: u32,
    rounds: usize,
    total_us: Spread,
    pause_us: Spread,
    pause_parts: Option<PauseParts>,
    /// The longest time between two looks of the guest at its clock, in the half second before, and around the move.
    gap_before_us: Spread,
    gap_us: Spread,
    cpu_us: Spread,
    sent: Option<Spread>,
    sent_per_byte_not_zero: Option<Spread>,
    plain_copy_us: Option<Spread>,
    /// Total time divided by that of the plain copy of the same round.
    ratio_to_plain: Option<Spread>,
    /// Median of this project divided by this monitor's.
    tern_total_ratio: Option<f64>,
    tern_pause_ratio: Option<f64>,
}

/// Parts of a pause.
#[derive(Debug, Serialize)]
pub struct PauseParts {
    stop_us: Spread,
    state_us: Spread,
    send_us: Spread,
    restore_us: Spread,
    resume_us: Spread,
}

impl Figures {
    pub fn of(monitor: &'static str, how: How, case: Case, moves: &[Move]) -> Result<Self> {
        let spread = |pick: fn(&Move) -> f64| Spread::of(moves.iter().map(pick));
        // Those that all moves have.
        let all = |pick: fn(&Move) -> Option<f64>| -> Result<Option<Spread>> {
            let values: Option<Vec<f64>> = moves.iter().map(pick).collect();
            values.map(|v| Spread::of(v.into_iter())).transpose()
        };
        let part = |pick: fn(&Parts) -> f64| -> Result<Option<Spread>> {
            let values: Option<Vec<f64>> =
                moves.iter().map(|m| m.parts.as_ref().map(pick)).collect();
            values.map(|v| Spread::of(v.into_iter())).transpose()
        };
        let pause_parts = match (
            part(|p| p.stop)?,
            part(|p| p.state)?,
            part(|p| p.send)?,
            part(|p| p.restore)?,
            part(|p| p.resume)?,
        ) {
            (Some(stop_us), Some(state_us), Some(send_us), Some(restore_us), Some(resume_us)) => {
                Some(PauseParts {
                    stop_us,
                    state_us,
                    send_us,
                    restore_us,
                    resume_us,
                })
            }
            _ => None,
        };
        Ok(Self {
            monitor,
            how,
            guest_mib: case.size,
            work: case.work,
            vfs: case.vfs,
            rounds: moves.len(),
            total_us: spread(|m| m.total_us)?,
            pause_us: spread(|m| m.pause_us)?,
            pause_parts,
            gap_before_us: spread(|m| m.gap.before_us)?,
            gap_us: spread(|m| m.gap.around_us)?,
            cpu_us: spread(|m| m.cpu_us)?,
            sent: all(|m| m.sent.map(|sent| sent.bytes as f64))?,
            sent_per_byte_not_zero: all(|m| m.sent.and_then(per_byte))?,
            plain_copy_us: all(|m| m.plain_us)?,
            ratio_to_plain: all(|m| m.plain_us.map(|plain| m.total_us / plain))?,
            tern_total_ratio: None,
            tern_pause_ratio: None,
        })
    }

    fn same_case(&self, other: &Self) -> bool {
        (self.how, self.guest_mib, self.work, self.vfs)
            == (other.how, other.guest_mib, other.work, other.vfs)
    }

    fn row(&self) -> String {
        let ms = |spread: Spread| format!("{:.1}", spread.median / 1e3);
        let parts = self.pause_parts.as_ref().map_or_else(String::new, |p| {
            [p.stop_us, p.state_us, p.send_us, p.restore_us, p.resume_us]
                .map(ms)
                .join(", ")
        });
        let shown = |spread: Option<Spread>, show: fn(Spread) -> String| {
            spread.map_or_else(String::new, show)
        };
        let ratio = |ratio: Option<f64>| ratio.map_or_else(String::new, |r| format!("{r:.2}"));
        let case = Case {
            size: self.guest_mib,
            work: self.work,
            vfs: self.vfs,
        };
        let cells = [
            self.monitor.to_owned(),
            case.to_string(),
            self.total_us.time().to_string(),
            self.pause_us.time().to_string(),
            parts,
            format!("{} [{}]", self.gap_us.time(), ms(self.gap_before_us)),
            shown(self.sent, |s| s.size().to_string()),
            shown(self.sent_per_byte_not_zero, |s| s.ratio().to_string()),
            self.cpu_us.time().to_string(),
            shown(self.plain_copy_us, |s| s.time().to_string()),
            shown(self.ratio_to_plain, |s| s.ratio().to_string()),
            ratio(self.tern_total_ratio),
            ratio(self.tern_pause_ratio),
        ];
        cells.join(" | ")
    }
}

/// Bytes sent for each that was worth it. Nothing was copied if there is none.
fn per_byte(sent: Sent) -> Option<f64> {
    let not_zero = sent.not_zero.filter(|bytes| *bytes > 0)?;
    Some(sent.bytes as f64 / not_zero as f64)
}

/// Compares with this project, whose figures come first.
pub fn compare(figures: &mut [Figures], tern: &str) {
    for index in 0..figures.len() {
        let peer = &figures[index];
        let own = figures
            .iter()
            .find(|own| own.monitor == tern && own.same_case(peer));
        let ratios = own.filter(|_| peer.monitor != tern).map(|own| {
            (
                own.total_us.median / peer.total_us.median,
                own.pause_us.median / peer.pause_us.median,
            )
        });
        figures[index].tern_total_ratio = ratios.map(|(total, _)| total);
        figures[index].tern_pause_ratio = ratios.map(|(_, pause)| pause);
    }
}

/// What the columns are.
const COLUMNS: &str = "guest | total | pause | of that stop, state, send, restore, resume; ms | gap the guest sees [before], ms \
     | sent | per byte not zero | CPU | plain copy | total, as a ratio to it | tern's total, as a ratio | its pause";

/// The tables.
pub fn print(figures: &[Figures]) {
    for how in How::ALL {
        println!("\n| {} | {COLUMNS} |", how.name());
        println!("|{}", "---|".repeat(COLUMNS.split('|').count() + 1));
        for f in figures.iter().filter(|f| f.how == how) {
            println!("| {} |", f.row());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::guest::Gap;
    use super::*;

    fn case() -> Case {
        Case {
            size: Mib(256),
            work: Work::Writes,
            vfs: 2,
        }
    }

    fn moved(total_us: f64) -> Move {
        Move {
            total_us,
            pause_us: 10_000.0,
            parts: Some(Parts {
                stop: 1000.0,
                state: 2000.0,
                send: 3000.0,
                restore: 4000.0,
                resume: 0.0,
            }),
            gap: Gap {
                before_us: 2000.0,
                around_us: 12_000.0,
            },
            cpu_us: 50_000.0,
            sent: Some(Sent {
                bytes: 3 << 20,
                not_zero: Some(2 << 20),
            }),
            plain_us: Some(100_000.0),
        }
    }

    #[test]
    fn rows_have_a_cell_for_each_column() {
        let moves = [moved(300_000.0), moved(200_000.0), moved(400_000.0)];
        let figures = Figures::of("tern", How::Copied, case(), &moves).unwrap();
        assert_eq!(
            figures.row(),
            "tern | 256M, writes, 2 VFs | 300 ms (200 to 400) | 10.0 ms | 1.0, 2.0, 3.0, 4.0, 0.0 | 12.0 ms [2.0] \
             | 3.0 MiB | 1.50 | 50.0 ms | 100 ms | 3.00 (2.00 to 4.00) |  | "
        );
        assert_eq!(
            COLUMNS.split('|').count() + 1,
            figures.row().split('|').count()
        );
        assert!(Figures::of("tern", How::Copied, case(), &[]).is_err());
    }

    #[test]
    fn peers_are_compared_with_the_same_case() {
        let other = Case { vfs: 0, ..case() };
        let peer = Move {
            parts: None,
            sent: None,
            plain_us: None,
            ..moved(100_000.0)
        };
        let of = |name, how, case, moved| Figures::of(name, how, case, &[moved]).unwrap();
        let mut all = [
            of("tern", How::Copied, other, moved(1.0)),
            of("tern", How::Copied, case(), moved(300_000.0)),
            of("peer", How::Copied, case(), peer),
            of("peer", How::HandedOver, case(), peer),
        ];
        compare(&mut all, "tern");
        let ratios = all.each_ref().map(|f| f.tern_total_ratio);
        assert_eq!(ratios, [None, None, Some(3.0), None]);
        assert_eq!(all[2].tern_pause_ratio, Some(1.0));
        assert!(all[2].sent.is_none() && all[2].pause_parts.is_none());
    }
}
