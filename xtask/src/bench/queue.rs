//! `cargo xtask bench queue`: what virtqueues cost the device, split and packed.
//!
//! Measured on this host, in process: no guest has a part in it.

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::median;
use crate::{tools, workspace};

/// `cargo xtask bench queue`: buffers a second that a device fetches and gives back
#[derive(Debug, Args)]
#[command(
    after_help = "Chains of buffers are made available in batches, fetched and given back by a device that does nothing else. Ratios \
are to the virtio-queue crate alone with split rings, which walks the descriptors of a chain over the same memory, and \
neither checks nor keeps anything of it. The driver's work is not in the time."
)]
pub struct Queue {
    /// How many rounds each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One shape of chains.
#[derive(Debug, PartialEq, Serialize)]
struct Figure {
    chains: String,
    /// Million buffers a second.
    plain: f64,
    split: f64,
    packed: f64,
    split_ratio: f64,
    packed_ratio: f64,
}

impl Queue {
    pub fn run(self) -> Result<i32> {
        let binary = workspace::release_binary("bench", "queue")?;
        let program = binary.to_str().context("a strange path")?;
        let said = tools::output(program, &[&self.rounds.to_string()])?;
        let figures = figures(&said)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
            return Ok(0);
        }
        println!(
            "medians of {} rounds; million buffers per second, and as a ratio to virtio-queue alone",
            self.rounds
        );
        println!(
            "{:<17} {:>12} {:>7} {:>6} {:>7} {:>6}",
            "chains", "virtio-queue", "split", "", "packed", ""
        );
        for f in &figures {
            println!(
                "{:<17} {:>12.1} {:>7.1} {:>6.2} {:>7.1} {:>6.2}",
                f.chains, f.plain, f.split, f.split_ratio, f.packed, f.packed_ratio
            );
        }
        Ok(0)
    }
}

/// What was said of one shape and one kind in one round.
struct Row<'a> {
    chains: &'a str,
    kind: &'a str,
    /// Million buffers a second.
    rate: f64,
}

fn row(line: &str) -> Result<Row<'_>> {
    let words: Vec<_> = line.split_whitespace().collect();
    let [chains, kind, buffers, nanoseconds] = words.as_slice() else {
        anyhow::bail!("not understood: {line}");
    };
    let rate = 1e3 * buffers.parse::<f64>()? / nanoseconds.parse::<f64>()?;
    Ok(Row { chains, kind, rate })
}

/// The medians of the rounds of each shape, in the order in which they come.
fn figures(said: &str) -> Result<Vec<Figure>> {
    let rows: Vec<_> = said.lines().map(row).collect::<Result<_>>()?;
    ensure!(!rows.is_empty(), "nothing was measured");
    let mut names: Vec<&str> = Vec::new();
    for row in &rows {
        if !names.contains(&row.chains) {
            names.push(row.chains);
        }
    }
    let rate = |chains: &str, kind: &str| {
        let found = rows.iter().filter(|r| r.chains == chains && r.kind == kind);
        let rates: Vec<_> = found.map(|row| row.rate).collect();
        median(&rates).with_context(|| format!("{chains} was not measured with {kind}"))
    };
    let figure = |chains: &str| {
        let [plain, split, packed] = ["plain", "split", "packed"].map(|kind| rate(chains, kind));
        let (plain, split, packed) = (plain?, split?, packed?);
        Ok(Figure {
            chains: chains.to_owned(),
            plain,
            split,
            packed,
            split_ratio: split / plain,
            packed_ratio: packed / plain,
        })
    };
    names.into_iter().map(figure).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_put_together_by_shape_and_kind() {
        let said = "a plain 10 1000\na split 20 1000\na packed 40 1000\nb plain 1 1\nb split 1 2\nb packed 1 4\n\
                    a plain 30 1000\na split 20 1000\na packed 40 1000\na plain 20 1000\na split 20 1000\na packed 40 1000\n";
        let figures = figures(said).unwrap();
        let figure = |chains: &str, plain, split, packed| Figure {
            chains: chains.to_owned(),
            plain,
            split,
            packed,
            split_ratio: split / plain,
            packed_ratio: packed / plain,
        };
        assert_eq!(
            figures,
            [
                figure("a", 20.0, 20.0, 40.0),
                figure("b", 1000.0, 500.0, 250.0)
            ]
        );
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for said in ["", "a plain 1", "a plain x 1", "a plain 1 1"] {
            assert!(figures(said).is_err(), "{said}");
        }
    }
}
