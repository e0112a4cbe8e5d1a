//! Commands of a transport virtqueue, by hand.

use std::path::Path;

use clap::Args;

use super::{number, number16};
use crate::api::client::request;
use crate::api::managers::{ManagedAnswer, ManagedCommand};
use crate::cli::print::say;
use crate::exit;

/// A command, well-formed or not, but those that make and destroy devices.
#[derive(Debug, Args)]
pub struct Managed {
    /// Class of the command, decimal or 0x…
    #[arg(long, value_name = "N", value_parser = number16, allow_hyphen_values = true)]
    class: u16,

    /// Number of the command in its class
    #[arg(long, value_name = "N", value_parser = number16, allow_hyphen_values = true)]
    command: u16,

    /// Device id, as `tern info` shows it; 0 is the management device
    #[arg(long, value_name = "ID", value_parser = number, default_value = "0", allow_hyphen_values = true)]
    device: u64,

    /// Command-out-data in hexadecimal digits, in the layout of the management device
    #[arg(long, value_name = "HEX", default_value = "")]
    data: String,
}

impl Managed {
    /// Sends the command and shows the answer.
    pub fn run(&self, socket: &Path, manager: &str, json: bool) -> anyhow::Result<u8> {
        let command = ManagedCommand {
            manager: manager.to_owned(),
            device: self.device,
            class: self.class,
            command: self.command,
            data: self.data.clone(),
        };
        let body = serde_json::to_vec(&command)?;
        let answer: ManagedAnswer = request(socket, "POST", "/api/v1/managed", &body)?;
        if json {
            say!("{}", serde_json::to_string(&answer)?);
        } else if answer.error == 0 {
            let data = match answer.data.as_str() {
                "" => "none",
                data => data,
            };
            say!("status   {}\nresult   {data}", answer.error_name);
        } else {
            say!("status   error {}: {}", answer.error, answer.error_name);
        }
        Ok(match answer.error {
            0 => 0,
            _ => exit::SETUP,
        })
    }
}
