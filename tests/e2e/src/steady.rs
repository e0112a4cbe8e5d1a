//! The load that checks itself notices nothing of pauses.

use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;

use crate::load::{Load, expect_all_work, expect_work};
use crate::trial;

/// How often the guest is paused.
const PAUSES: u32 = 4;
/// How long.
const PAUSE: Duration = Duration::from_millis(1500);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("steady::pauses_are_not_noticed_by_anything", || {
            pauses(Load::with_everything(2)?)
        }),
        trial("steady::pauses_are_not_noticed_by_linux_6_1", || {
            pauses(Load::with_everything(2)?.linux_6_1())
        }),
    ]
}

fn pauses(load: Load) -> Result<()> {
    let mut guest = load.run()?;
    guest.ticks(2)?;
    for _ in 0..PAUSES {
        guest.control.ask("pause", &[])?;
        std::thread::sleep(PAUSE);
        guest.control.ask("resume", &[])?;
        guest.ticks(2)?;
    }
    let outcome = guest.enough()?;
    expect_all_work(&outcome)?;
    expect_work(&outcome, &["looks"])?;
    ensure!(outcome.number("steady", "lost")? == 0, "{}", outcome.stdout);
    Ok(())
}
