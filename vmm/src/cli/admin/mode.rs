//! `tern admin … mode`.

use clap::{Args, ValueEnum};
use devices::admin::Migration;
use devices::gate::Mode as DeviceMode;
use serde_json::json;

use super::member::Member;
use crate::cli::print::say;

#[derive(Debug, Args)]
pub struct Mode {
    /// The mode to set; without it, the mode is shown. In stop, the virtual function reaches neither memory nor interrupts;
    /// in freeze, its registers do not change either, and a context can be written
    #[arg(value_enum)]
    mode: Option<Name>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    Active,
    Stop,
    Freeze,
}

impl Mode {
    pub fn run(&self, member: &Member, in_json: bool) -> anyhow::Result<()> {
        if let Some(name) = self.mode {
            member.command(Migration::ModeSet, &[name.mode() as u8])?;
        }
        // Also after a change: what is shown is what the owner says.
        let done = member.command(Migration::ModeGet, &[])?;
        let raw = done.result.first().copied().unwrap_or(0);
        let mode = DeviceMode::from_raw(raw).map_or("unknown", DeviceMode::name);
        match in_json {
            true => say!("{}", json!({ "member": member.name, "mode": mode })),
            false => say!("mode     {mode}"),
        }
        Ok(())
    }
}

impl Name {
    fn mode(self) -> DeviceMode {
        match self {
            Self::Active => DeviceMode::Active,
            Self::Stop => DeviceMode::Stop,
            Self::Freeze => DeviceMode::Freeze,
        }
    }
}
