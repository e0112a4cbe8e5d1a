//! This project's own way.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::copy;
use super::guest::{
    BEAT_PATIENCE, Bench, CPUS, Case, DOWNTIME_MS, Gap, How, Move, Mover, PATIENCE, Parts, Sent,
    await_socket, beat_after, beat_before, us,
};
use crate::process::Monitor;

const PAGE: u64 = 4096;
/// Exit status of a monitor whose guest was moved.
const MOVED: i32 = 8;

/// `tern`, and where its guest is.
pub struct Tern {
    program: PathBuf,
    guest: Option<(Monitor, PathBuf)>,
    number: u32,
}

/// What `tern migrate --json` says.
#[derive(Debug, Deserialize)]
struct Answer {
    report: Report,
}

#[derive(Debug, Deserialize)]
struct Report {
    how: String,
    total_us: u64,
    bytes: u64,
    rounds: Vec<Round>,
    pause_us: Pause,
}

#[derive(Debug, Deserialize)]
struct Round {
    data: u64,
}

#[derive(Debug, Deserialize)]
struct Pause {
    total: u64,
    stop: u64,
    state: u64,
    send: u64,
    restore: u64,
    resume: u64,
}

impl Tern {
    pub fn new(program: PathBuf) -> Self {
        Self {
            program,
            guest: None,
            number: 0,
        }
    }

    /// What the monitor at `socket` is, or why it cannot be asked.
    fn info(&self, socket: &Path) -> String {
        let mut command = Command::new(&self.program);
        command.args(["info", "--json", "--api-socket"]).arg(socket);
        let asking = Monitor::interactive(command);
        match asking.and_then(|mut asking| asking.next_line("{", BEAT_PATIENCE)) {
            Ok((_, said)) => said,
            Err(error) => format!("{error:#}"),
        }
    }
}

impl Mover for Tern {
    fn name(&self) -> &'static str {
        "tern"
    }

    fn boot(&mut self, bench: &Bench<'_>, case: Case) -> Result<()> {
        self.end();
        self.number += 1;
        let socket = bench.path(&format!("tern-{}.sock", self.number));
        let disk = bench.disk("tern.raw")?;
        let mut command = Command::new(&self.program);
        command.arg("run").arg("--kernel").arg(bench.kernel);
        command.arg("--initrd").arg(bench.initrd);
        command.args(["--cmdline", &bench.line(case)]);
        command.args(["--cpus", &CPUS.to_string()]);
        command.args(["--memory", &case.size.to_string()]);
        command.args(["--disk", &format!("path={}", disk.display())]);
        if case.vfs > 0 {
            command.args(["--pf", &format!("net,vfs={}", case.vfs)]);
        }
        command.arg("--api-socket").arg(&socket);
        self.guest = Some((Monitor::interactive(command)?, socket));
        Ok(())
    }

    fn end(&mut self) {
        self.guest = None;
    }

    fn go(&mut self, bench: &Bench<'_>, how: How) -> Result<Move> {
        let (mut source, socket) = self.guest.take().context("there is no guest")?;
        let before_us = beat_before(&mut source)?;
        self.number += 1;
        let next = bench.path(&format!("tern-{}.sock", self.number));
        let path = bench.path(&format!("tern-move-{}", self.number));
        let address = format!("unix:{}", path.display());
        let mut command = Command::new(&self.program);
        command
            .args(["receive", &address, "--api-socket"])
            .arg(&next);
        let mut destination = Monitor::interactive(command)?;
        await_socket(&path, &mut destination)?;
        let cpu = source.cpu_time()? + destination.cpu_time()?;
        let mut command = Command::new(&self.program);
        command
            .args(["migrate", "--json", "--downtime"])
            .arg(DOWNTIME_MS.to_string());
        if how == How::Copied {
            command.arg("--copy");
        }
        command.arg("--api-socket").arg(&socket).arg(&address);
        let said = match Monitor::interactive(command)?.next_line("{", PATIENCE) {
            Ok((_, said)) => said,
            Err(error) => {
                let info = [&socket, &next].map(|socket| self.info(socket));
                return Err(error.context(format!(
                    "the source is\n{}\nand says\n{}\nthe destination is\n{}\nand says\n{}",
                    info[0],
                    source.last_words(),
                    info[1],
                    destination.last_words(),
                )));
            }
        };
        let cpu = source.cpu_time()? + destination.cpu_time()? - cpu;
        let Answer { report } = serde_json::from_str(&said).with_context(|| said)?;
        let expected = match how {
            How::HandedOver => "handoff",
            How::Copied => "copy",
        };
        anyhow::ensure!(
            report.how == expected,
            "{} instead of {expected}",
            report.how
        );
        let status = source.wait_for_end(PATIENCE)?;
        anyhow::ensure!(status.code() == Some(MOVED), "tern ended with {status}");
        let around_us = beat_after(&mut destination)
            .with_context(|| format!("the guest is\n{}", self.info(&next)))?;
        self.guest = Some((destination, next));
        let plain = match how {
            How::Copied => Some(us(copy::through_socket(report.bytes)?)),
            How::HandedOver => None,
        };
        let pause = &report.pause_us;
        Ok(Move {
            total_us: report.total_us as f64,
            pause_us: pause.total as f64,
            parts: Some(Parts {
                stop: pause.stop as f64,
                state: pause.state as f64,
                send: pause.send as f64,
                restore: pause.restore as f64,
                resume: pause.resume as f64,
            }),
            gap: Gap {
                before_us,
                around_us,
            },
            cpu_us: us(cpu),
            sent: Some(Sent {
                bytes: report.bytes,
                not_zero: report.rounds.first().map(|round| round.data * PAGE),
            }),
            plain_us: plain,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_are_read() {
        let said = r#"{"outcome":"moved","report":{"session":"00","how":"copy","total_us":9,"build_us":1,"bytes":8192,
            "rounds":[{"number":1,"pages":3,"data":2,"zero":1,"time_us":1,"written":0,"slow_down":0,"predicted_us":1}],
            "pause_us":{"total":5,"stop":1,"state":1,"send":1,"restore":1,"resume":1},"paused_bytes":0}}"#;
        let answer: Answer = serde_json::from_str(said).unwrap();
        assert_eq!(answer.report.rounds[0].data, 2);
        assert_eq!(answer.report.pause_us.total, 5);
        let doubt = r#"{"outcome":"in_doubt","reason":"?"}"#;
        assert!(serde_json::from_str::<Answer>(doubt).is_err());
    }
}
