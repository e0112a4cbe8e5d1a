//! `demo`: a short tour of the machine, for people. With `disks=` and `networks=` it fails if it finds fewer.

use std::fs;
use std::process::Command;

use super::{Found, boot, entropy, net, pci};
use crate::cmdline::Request;
use crate::scenario::block::Disk;
use crate::{Context, Failure, Result, check};

const MOUNT_POINT: &str = "/mnt";
const GREETING: &str = "Terns fly from pole to pole.\n";

pub fn run(request: &Request) -> Result<Found> {
    machine()?;
    devices()?;
    let disks = disk()?;
    let networks = network()?;
    random_numbers();
    for (key, found) in [("disks", disks), ("networks", networks)] {
        check(found >= request.number(key, 0)?, || {
            format!("found only {found} {key}")
        })?;
    }
    println!("\n  That was Linux under tern.\n");
    Ok(Found::default()
        .with("disks", disks)
        .with("networks", networks))
}

fn machine() -> Result<()> {
    let system = rustix::system::uname();
    let memory = boot::meminfo("MemTotal")? / 1024;
    println!("\n  This is the guest.\n");
    println!(
        "  kernel   {} {}",
        system.sysname().to_string_lossy(),
        system.release().to_string_lossy()
    );
    println!("  CPUs     {}", boot::online_cpus()?);
    println!("  memory   {memory} MiB");
    Ok(())
}

fn devices() -> Result<()> {
    println!("\n  PCI functions");
    for function in pci::functions()? {
        let kind = match (function.virtio_kind(), function.class.as_str()) {
            (Some(kind), _) => format!("virtio {kind}"),
            (None, class) if class.starts_with("0600") => "host bridge".into(),
            (None, class) if class.starts_with("0604") => "root port".into(),
            (None, class) => format!("class {class}"),
        };
        println!(
            "    {}  {}:{}  {kind:<24} {}",
            function.address,
            function.vendor,
            function.device,
            function.drivers.join(" ")
        );
    }
    Ok(())
}

/// A file system on the first disk, written, unmounted, and read again.
fn disk() -> Result<usize> {
    let disk = Disk::new("vda");
    let Ok(bytes) = disk.bytes() else {
        return Ok(0);
    };
    let device = disk.device.display().to_string();
    println!("\n  Disk {device}, {} MiB", bytes >> 20);
    busybox(&["mke2fs", "-F", &device])?;
    let file = format!("{MOUNT_POINT}/terns");
    busybox(&["mount", "-t", "ext4", &device, MOUNT_POINT])?;
    fs::write(&file, GREETING).context(&file)?;
    busybox(&["umount", MOUNT_POINT])?;
    busybox(&["mount", "-t", "ext4", &device, MOUNT_POINT])?;
    let read = fs::read_to_string(&file).context(&file)?;
    busybox(&["umount", MOUNT_POINT])?;
    check(read == GREETING, || format!("{file} contains {read:?}"))?;
    println!(
        "    made a file system, wrote a file, mounted it again, and read: {}",
        read.trim_end()
    );
    Ok(1)
}

fn network() -> Result<usize> {
    let has = |name: &str| fs::exists(format!("/sys/class/net/{name}")).unwrap_or(false);
    if !has("eth0") || !has("eth1") {
        return Ok(0);
    }
    println!("\n  Network: eth0 and eth1, two functions on the switch of the monitor");
    let found = net::ping(&Request::default())?;
    let value = |key: &str| found.value(key).unwrap_or_default();
    let milliseconds = value("ms").parse::<u64>().unwrap_or(1).max(1);
    let mebibytes = value("bytes").parse::<u64>().unwrap_or(0) >> 20;
    println!(
        "    {} pings answered, the fastest in {} µs",
        value("pings"),
        value("rtt_us")
    );
    println!(
        "    {mebibytes} MiB over TCP and back in {:.1} s, checksums equal",
        milliseconds as f64 / 1000.0
    );
    Ok(2)
}

fn random_numbers() {
    match entropy::source() {
        Ok(source) => println!("\n  Random numbers come from {source}"),
        Err(why) => println!("\n  No hardware random numbers: {why}"),
    }
}

fn busybox(arguments: &[&str]) -> Result<()> {
    let output = Command::new("/bin/busybox")
        .args(arguments)
        .output()
        .context("busybox")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Failure(format!("{}: {}", arguments.join(" "), said.trim())))
}
