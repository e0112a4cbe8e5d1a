//! `pci`: the PCI functions, by sysfs, one line each.

use std::fs;
use std::path::Path;

use super::Found;
use crate::cmdline::Request;
use crate::{Context, Result, say};

/// Vendor of all virtio functions.
const VIRTIO: &str = "1af4";

/// A PCI function as the kernel sees it.
pub struct Function {
    /// `0000:00:01.0`
    pub address: String,
    pub vendor: String,
    pub device: String,
    pub class: String,
    /// The driver of the PCI function and, of virtio, of the device behind it.
    pub drivers: Vec<String>,
}

impl Function {
    /// What it is, if it is virtio.
    pub fn virtio_kind(&self) -> Option<&'static str> {
        if self.vendor != VIRTIO {
            return None;
        }
        Some(match self.device.as_str() {
            "1000" | "1041" => "network card",
            "1001" | "1042" => "block device",
            "1003" | "1043" => "console",
            "1005" | "1044" => "entropy source",
            _ => "device",
        })
    }
}

pub fn run(_: &Request) -> Result<Found> {
    let functions = functions()?;
    let mut driven = 0;
    for function in &functions {
        let Function {
            address,
            vendor,
            device,
            class,
            drivers,
        } = function;
        let driver = if drivers.is_empty() {
            "none".to_owned()
        } else {
            drivers.join("+")
        };
        say(format_args!(
            "pci {address} id={vendor}:{device} class={class} driver={driver}"
        ));
        driven += usize::from(!drivers.is_empty());
    }
    let virtio = functions
        .iter()
        .filter(|function| function.vendor == VIRTIO)
        .count();
    Ok(Found::default()
        .with("functions", functions.len())
        .with("virtio", virtio)
        .with("driven", driven))
}

/// All functions, in the order of their addresses.
pub fn functions() -> Result<Vec<Function>> {
    let mut functions = Vec::new();
    for entry in fs::read_dir("/sys/bus/pci/devices")
        .context("no PCI")?
        .flatten()
    {
        let path = entry.path();
        let mut drivers: Vec<String> = driver(&path).into_iter().collect();
        let children = fs::read_dir(&path).into_iter().flatten().flatten();
        let virtio =
            children.filter(|child| child.file_name().to_string_lossy().starts_with("virtio"));
        drivers.extend(virtio.filter_map(|child| driver(&child.path())));
        functions.push(Function {
            address: entry.file_name().to_string_lossy().into_owned(),
            vendor: id(&path, "vendor")?,
            device: id(&path, "device")?,
            class: id(&path, "class")?,
            drivers,
        });
    }
    functions.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(functions)
}

fn id(function: &Path, file: &str) -> Result<String> {
    let text = fs::read_to_string(function.join(file)).context(file)?;
    Ok(text.trim().trim_start_matches("0x").to_owned())
}

fn driver(device: &Path) -> Option<String> {
    let driver = fs::read_link(device.join("driver")).ok()?;
    Some(driver.file_name()?.to_string_lossy().into_owned())
}
