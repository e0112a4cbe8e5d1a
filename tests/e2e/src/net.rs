//! virtio-net: the switch between functions, and taps.

use std::io::Write;
use std::net::TcpListener;
use std::process::Command;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;

use crate::trial;
use crate::vm::{Outcome, Vm, output};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("net::two_functions_on_a_switch_move_10_mib", switch),
        trial("net::packed_virtqueues_reach_split_ones", packed),
        trial("net::a_tap_reaches_the_machine_network", tap),
    ]
}

fn switch() -> Result<()> {
    let outcome = Vm::new("net-ping:a=eth0:b=eth1:mib=10")
        .args(["--cpus", "2", "--net", "switch=lan", "--net", "switch=lan"])
        .run_ok()?;
    ensure!(
        outcome.number("net-ping", "bytes")? >= 10 << 20,
        "{}",
        outcome.stdout
    );
    Ok(())
}

/// One of the two interfaces has packed virtqueues.
fn packed() -> Result<()> {
    for (kernel, version) in [("vmlinuz-6.1", "6.1"), ("vmlinuz-6.12", "6.12")] {
        let nets = ["--net", "switch=lan,packed", "--net", "switch=lan"];
        let outcome = Vm::new("packed:devices=1,net-ping:a=eth0:b=eth1:mib=10,dmesg-clean")
            .kernel(kernel, version)
            .args(["--cpus", "2"])
            .args(nets)
            .run_ok()?;
        ensure!(
            outcome.number("net-ping", "bytes")? >= 10 << 20,
            "{}",
            outcome.stdout
        );
    }
    Ok(())
}

fn ip(arguments: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(arguments.split_whitespace());
    let output = output(ip)?;
    ensure!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Makes tap `name` with address `192.168.NETWORK.1`, and expects that the guest reads all that is sent there: `run`
/// gets the parameters for the scenario `net-tap`.
pub fn with_tap(
    name: &str,
    network: u8,
    run: impl FnOnce(String) -> Result<Outcome>,
) -> Result<()> {
    const BYTES: usize = 4 << 20;
    let host = format!("192.168.{network}.1");
    with_interface(name, &host, || {
        let listener = TcpListener::bind((host.as_str(), 0))?;
        let port = listener.local_addr()?.port();
        let data: Vec<u8> = (0..BYTES).map(|i| (i * 7 + i / 251) as u8).collect();
        let crc = format!("{:08x}", crc32fast::hash(&data));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            stream.write_all(&data)
        });
        let outcome = run(format!("peer={host}:port={port}:addr=192.168.{network}.2"))?;
        ensure!(
            outcome.value("net-tap", "crc32")? == crc,
            "{}",
            outcome.stdout
        );
        ensure!(
            matches!(server.join(), Ok(Ok(()))),
            "the server on the tap failed"
        );
        Ok(())
    })
}

/// Makes tap `name` with this address of a network of 24 bits, for as long as `run` takes.
pub fn with_interface<T>(name: &str, address: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    ip(&format!("tuntap add dev {name} mode tap"))?;
    let result = (|| {
        ip(&format!("addr add {address}/24 dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        run()
    })();
    ip(&format!("link del {name}"))?;
    result
}

fn tap() -> Result<()> {
    with_tap("terntest0", 77, |parameters| {
        Vm::new(format!("net-tap:{parameters}"))
            .args(["--net", "tap=terntest0"])
            .run_ok()
    })
}
