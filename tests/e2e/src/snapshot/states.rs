//! What a guest does before, while and after it is saved, and when it is restored.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use super::{STOPPED, number, restore, save, text};
use crate::block::MIB;
use crate::load::{Load, TICK, expect_work};
use crate::trial;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for cpus in [1, 2] {
        trials.push(trial(
            format!("snapshot::linux_6_12_with_{cpus}_cpus_goes_on_twice"),
            move || goes_on(Load::new(cpus)?),
        ));
        trials.push(trial(
            format!("snapshot::linux_6_1_with_{cpus}_cpus_goes_on_twice"),
            move || goes_on(Load::new(cpus)?.linux_6_1()),
        ));
    }
    trials.extend([
        trial("snapshot::a_guest_is_left_as_the_options_say", options),
        trial(
            "snapshot::clocks_go_on_from_the_host_or_from_the_snapshot",
            clocks,
        ),
    ]);
    trials
}

const WORK: [&str; 4] = ["pages", "timers", "spins", "registers"];

/// The one that was saved goes on, and the one that is restored goes on from there.
fn goes_on(load: Load) -> Result<()> {
    let directory = load.path("snapshot");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    let before = last_tick(&guest.vm.console())?;
    let answer = save(&guest, &directory, &[])?;
    let after = last_tick(&guest.vm.console())?;
    ensure!(answer["state"] == "running", "{answer}");
    ensure!(answer["directory"] == text(&directory)?, "{answer}");
    ensure!(
        answer["id"].as_str().is_some_and(|id| id.len() == 32),
        "{answer}"
    );
    let part = |name| number(&answer, &["pause_us", name]);
    let parts = part("stop")? + part("devices")? + part("vcpus")? + part("memory")?;
    ensure!(parts > 0 && parts <= part("total")?, "{answer}");
    ensure!(
        part("total")? <= number(&answer, &["total_us"])?,
        "{answer}"
    );
    ensure!(
        number(&answer, &["bytes", "memory"])? == 256 * MIB,
        "{answer}"
    );
    ensure!(guest.control.state()? == "running");
    guest.ticks(2)?;
    expect_work(&guest.enough()?, &WORK)?;

    let mut again = restore(&directory, &load.path("again.sock"), &[])?;
    again.ticks(2)?;
    ensure!(again.control.state()? == "running");
    // It knows nothing of what the other did since.
    let console = again.vm.console();
    let begun = tick(console.split(TICK).nth(1).context("no tick")?)?;
    ensure!(
        (before..=after + 2).contains(&begun),
        "it goes on with tick {begun}, and was saved between {before} and {after}"
    );
    expect_work(&again.enough()?, &WORK)
}

/// The number of the last whole tick.
fn last_tick(console: &str) -> Result<u64> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    tick(whole.rsplit(TICK).next().context("no tick")?)
}

/// The number after [`TICK`].
fn tick(rest: &str) -> Result<u64> {
    let word = rest
        .split_whitespace()
        .next()
        .context("a tick without a number")?;
    word.parse().with_context(|| format!("tick {word}"))
}

/// `--paused` and `--pause` leave it paused, `--stop` ends it.
fn options() -> Result<()> {
    let load = Load::new(1)?.options(["--paused"]);
    let mut guest = load.run()?;
    guest.control.await_state("paused")?;
    ensure!(guest.vm.console().is_empty(), "{}", guest.vm.console());
    guest.control.ask("resume", &[])?;
    guest.ticks(1)?;

    let paused = load.path("paused");
    let answer = save(&guest, &paused, &["--pause"])?;
    ensure!(answer["state"] == "paused", "{answer}");
    ensure!(guest.control.state()? == "paused");
    // A guest that is paused can be saved too, and stays so.
    let answer = save(&guest, &load.path("again"), &["--pause"])?;
    ensure!(answer["state"] == "paused", "{answer}");
    guest.control.ask("resume", &[])?;
    guest.ticks(2)?;

    let stopped = load.path("stopped");
    let socket = guest.control.socket.clone();
    let answer = save(&guest, &stopped, &["--stop"])?;
    ensure!(answer["state"] == "ended", "{answer}");
    guest.vm.wait()?.expect_code(STOPPED)?;
    ensure!(
        crate::control::is_absent(&socket),
        "the socket outlived its owner"
    );

    let mut again = restore(&stopped, &socket, &["--paused"])?;
    again.control.await_state("paused")?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(again.vm.console().is_empty(), "{}", again.vm.console());
    again.control.ask("resume", &[])?;
    again.ticks(2)?;
    again.enough().map(drop)
}

/// A restored guest has the time of the host, or goes on where it was; for its monotonic clock there is no difference.
fn clocks() -> Result<()> {
    const LATER: Duration = Duration::from_secs(30);
    let load = Load::new(2)?;
    let directory = load.path("snapshot");
    let mut guest = load.run()?;
    guest.ticks(2)?;
    save(&guest, &directory, &["--stop"])?;
    let saved = clocks_of(&guest.vm.wait()?.stdout)?;
    std::thread::sleep(LATER);
    for (option, leaps) in [("host", true), ("saved", false)] {
        let socket = load.path(&format!("{option}.sock"));
        let mut again = restore(&directory, &socket, &["--clock", option, "--prefault"])?;
        // The first may have been made before the guest was saved, and the last need not be whole.
        again.ticks(3)?;
        let now = clocks_of(&again.vm.console())?;
        let host = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
        let passed = now.realtime - saved.realtime;
        if leaps {
            ensure!(
                (now.realtime - host).abs() < 15.0,
                "{now:?}, and here it is {host}"
            );
            ensure!(passed > LATER.as_secs_f64(), "{saved:?} {now:?}");
        } else {
            ensure!(passed < LATER.as_secs_f64(), "{saved:?} {now:?}");
        }
        ensure!(
            passed > 0.0 && now.monotonic > saved.monotonic,
            "{saved:?} {now:?}"
        );
        expect_work(&again.enough()?, &WORK)?;
    }
    Ok(())
}

#[derive(Debug)]
struct Clocks {
    monotonic: f64,
    realtime: f64,
}

/// What the last whole tick of this console says.
fn clocks_of(console: &str) -> Result<Clocks> {
    let whole = console.rfind('\n').map_or("", |end| &console[..end]);
    let mut lines = whole.lines().rev();
    let line = lines.find(|line| line.contains(TICK) && line.contains(" realtime="));
    let line = line.context("no tick")?;
    let value = |key: &str| -> Result<f64> {
        let mut words = line.split_whitespace();
        let word = words.find_map(|word| word.strip_prefix(key));
        let word = word.with_context(|| line.to_owned())?;
        word.parse().with_context(|| line.to_owned())
    };
    Ok(Clocks {
        monotonic: value("monotonic=")?,
        realtime: value("realtime=")?,
    })
}
