//! `cargo xtask bench context`: what it takes to move the context of virtual functions.
//!
//! Measured on this host, in process: no guest has a part in it.

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use serde::Serialize;

use super::median;
use crate::{tools, workspace};

/// `cargo xtask bench context`: size of contexts, and time to save, restore and activate
#[derive(Debug, Args)]
pub struct Context {
    /// How many rounds each figure is the median of
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One number of functions and queues; times are of one function.
#[derive(Debug, PartialEq, Serialize)]
struct Figure {
    vfs: u32,
    queues: u32,
    context_bytes: u64,
    save_microseconds: f64,
    restore_microseconds: f64,
    /// Of that, the change of the mode, when the context was written before.
    activate_microseconds: f64,
    /// The same change of the mode without a context.
    thaw_microseconds: f64,
}

impl Context {
    pub fn run(self) -> Result<i32> {
        let binary = workspace::release_binary("bench", "context")?;
        let program = binary.to_str().context("a strange path")?;
        let said = tools::output(program, &[&self.rounds.to_string()])?;
        let figures = figures(&said)?;
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            println!("medians of {} rounds; microseconds per VF", self.rounds);
            println!(
                "{:>4} {:>7} {:>8} {:>9} {:>9} {:>9} {:>9}",
                "VFs", "queues", "bytes", "save", "restore", "activate", "thaw"
            );
            for f in &figures {
                println!(
                    "{:>4} {:>7} {:>8} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
                    f.vfs,
                    f.queues,
                    f.context_bytes,
                    f.save_microseconds,
                    f.restore_microseconds,
                    f.activate_microseconds,
                    f.thaw_microseconds
                );
            }
        }
        Ok(0)
    }
}

/// The medians of the rounds of each case, in the order in which they come.
fn figures(said: &str) -> Result<Vec<Figure>> {
    let rows = said.lines().map(|line| {
        let words = line.split_whitespace().map(str::parse::<f64>);
        let words: Vec<f64> = words.collect::<Result<_, _>>()?;
        <[f64; 7]>::try_from(words)
            .ok()
            .with_context(|| line.to_owned())
    });
    let rows: Vec<[f64; 7]> = rows.collect::<Result<_>>()?;
    ensure!(!rows.is_empty(), "nothing was measured");
    let same = |a: &[f64; 7], b: &[f64; 7]| a[..3] == b[..3];
    rows.chunk_by(same).map(figure).collect()
}

fn figure(rows: &[[f64; 7]]) -> Result<Figure> {
    let first = rows.first().context("no rounds")?;
    let per_vf = |column: usize| -> Result<f64> {
        let values: Vec<f64> = rows.iter().map(|row| row[column] / row[0]).collect();
        median(&values).context("no rounds")
    };
    Ok(Figure {
        vfs: first[0] as u32,
        queues: first[1] as u32,
        context_bytes: first[2] as u64,
        save_microseconds: per_vf(3)?,
        restore_microseconds: per_vf(4)?,
        activate_microseconds: per_vf(5)?,
        thaw_microseconds: per_vf(6)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_of_one_case_have_one_median() {
        let said = "1 16 1220 2 10 8 3\n1 16 1220 4 12 9 5\n1 16 1220 3 11 7 4\n2 1 215 8 10 6 4\n";
        let [first, second] = &figures(said).unwrap()[..] else {
            panic!("two cases");
        };
        assert_eq!((first.queues, first.context_bytes), (16, 1220));
        assert_eq!(
            (first.save_microseconds, first.thaw_microseconds),
            (3.0, 4.0)
        );
        assert_eq!((second.vfs, second.activate_microseconds), (2, 3.0));
        assert!(figures("").is_err());
        assert!(figures("1 2 3\n").is_err());
    }
}
