//! `tern info` for people.

use devices::gate::Mode;
use devices::net::PortInfo;

use crate::api::managers::{Managed, Manager};
use crate::api::owners::{Function, Member, Owner};
use crate::api::{Device, Info, State};
use crate::layout::format_memory_size;
use crate::migrate::monitor::Status;

/// `info` in lines.
pub fn describe(info: &Info) -> String {
    let state = match info.state {
        State::Created => "created, not started",
        State::Saving => "running, a snapshot is being taken",
        State::Running => "running",
        State::Paused => "paused",
        State::Migrating => "running, it is being moved to another process",
        State::InDoubt => "in doubt: given to another process, standing still here",
        State::Receiving => "arriving from another process",
        State::Ended => "ended",
    };
    let mut lines = vec![
        format!("state    {state}"),
        format!("process  {} (tern {})", info.pid, info.version),
        format!("vCPUs    {}", info.cpus),
        format!("memory   {}", format_memory_size(info.memory)),
        format!("kernel   {}", info.kernel),
        format!("cmdline  {}", info.cmdline),
    ];
    lines.extend(info.migration.as_ref().map(migration));
    lines.extend(info.devices.iter().map(device));
    for owner in &info.owners {
        lines.extend(describe_owner(owner));
    }
    for manager in &info.managers {
        lines.extend(describe_manager(manager));
    }
    lines.join("\n")
}

/// How a migration stands.
fn migration(status: &Status) -> String {
    match status {
        Status::Source {
            to,
            phase,
            round,
            done,
            total,
            slow_down,
            predicted_us,
        } => {
            let pause = predicted_us.map(|us| format!(", a pause would take {} ms", us / 1000));
            format!(
                "moves    to {to}: {phase}, round {round}, {} of {} MiB, slowed down by {slow_down} %{}",
                done >> 20,
                total >> 20,
                pause.unwrap_or_default()
            )
        }
        Status::InDoubt { reason, .. } => format!("doubt    {reason}"),
        Status::Destination { round, pages } => {
            format!("arrives  round {round}, {} MiB so far", pages >> 8)
        }
    }
}

/// `number` things of which one is called `thing`.
fn count(number: u16, thing: &str) -> String {
    match number {
        1 => format!("1 {thing}"),
        _ => format!("{number} {thing}s"),
    }
}

fn device(device: &Device) -> String {
    let driver = if device.live { "in use" } else { "no driver" };
    format!(
        "{}  {:<8} {}, {driver}{}{}",
        device.place,
        device.name,
        count(device.queues, "queue"),
        stopped(device.live, &device.stopped_by),
        offers(&device.doors, device.packed, device.uses_packed)
    )
}

/// Why a device does not run. Without a driver that is ready there is nothing to stop.
fn stopped(live: bool, by: &[String]) -> String {
    match by {
        by if live && !by.is_empty() => format!(", stopped by {}", by.join(", ")),
        _ => String::new(),
    }
}

fn offers(doors: &[String], packed: bool, used: bool) -> String {
    let packed = packed.then_some(if used { "packed (in use)" } else { "packed" });
    let offered: Vec<_> = doors.iter().map(String::as_str).chain(packed).collect();
    match offered.as_slice() {
        [] => String::new(),
        offered => format!(", offers {}", offered.join(" ")),
    }
}

/// A member, with what owner drivers did to it if they did anything.
fn member(member: &Member) -> String {
    let mut text = function(&member.function);
    for (who, mode) in [
        ("guest", &member.guest_mode),
        ("monitor", &member.monitor_mode),
    ] {
        if mode != Mode::Active.name() {
            text.push_str(&format!(", mode {mode} by the {who}"));
        }
    }
    if !member.recorded_by.is_empty() {
        let who = member.recorded_by.join(" and the ");
        text.push_str(&format!(", writes recorded by the {who}"));
    }
    text
}

fn describe_owner(owner: &Owner) -> Vec<String> {
    let whose = if owner.passthrough {
        ", kept by the monitor"
    } else {
        ""
    };
    let strict = if owner.strict_admin { ", strict" } else { "" };
    let mut lines = vec![format!(
        "\nowner    {} ({}{whose}), {} of {}, admin commands {}{strict}",
        owner.name,
        owner.device,
        owner.existing_members,
        count(owner.total_members, "virtual function"),
        owner.admin
    )];
    lines.extend(owner.function.iter().map(function));
    lines.extend(owner.members.iter().map(member));
    if !owner.switch.is_empty() {
        lines.push(format!(
            "  {:<12} {:<17}  {:<4} {:>10} {:>12} {:>10} {:>12} {:>8}",
            "switch port", "MAC", "link", "received", "bytes", "sent", "bytes", "dropped"
        ));
        lines.extend(owner.switch.iter().map(port));
    }
    lines
}

fn describe_manager(manager: &Manager) -> Vec<String> {
    let heading = format!(
        "\nmanager  {} ({}), {} of {}, commands {}",
        manager.name,
        manager.device,
        manager.devices.len(),
        count(manager.total_devices, "managed device"),
        manager.wire
    );
    let devices = manager.devices.iter().map(|Managed { id, function }| {
        let id = format!("id {id}");
        line(&id, function)
    });
    [heading, function(&manager.function)]
        .into_iter()
        .chain(devices)
        .collect()
}

fn function(function: &Function) -> String {
    line(function.place.as_deref().unwrap_or("-"), function)
}

/// A function, behind what tells where it is.
fn line(place: &str, function: &Function) -> String {
    let driver = match (function.live, function.status.as_slice()) {
        (true, _) => format!("in use, features {}", function.features),
        (false, []) => "no driver".to_owned(),
        (false, status) => format!("driver not ready ({})", status.join(", ")),
    };
    format!(
        "{place:<7}  {:<9} {driver}{}{}",
        function.name,
        stopped(function.live, &function.stopped_by),
        offers(&function.doors, function.packed, function.uses_packed)
    )
}

fn port(port: &PortInfo) -> String {
    let stats = port.stats;
    let dropped = stats.rx_overflow
        + stats.rx_oversize
        + stats.tx_malformed
        + stats.tx_refused
        + stats.tx_spoofed;
    format!(
        "  {:<12} {:<17}  {:<4} {:>10} {:>12} {:>10} {:>12} {:>8}",
        port.name,
        port.mac,
        if port.up { "up" } else { "down" },
        stats.rx_frames,
        stats.rx_bytes,
        stats.tx_frames,
        stats.tx_bytes,
        dropped
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_function(status: &[&str], stopped_by: &[&str]) -> Function {
        Function {
            name: "pf0-vf1".to_owned(),
            place: Some("01:00.1".to_owned()),
            live: status.contains(&"DRIVER_OK"),
            status: status.iter().map(|s| (*s).to_owned()).collect(),
            features: "0x3".to_owned(),
            stopped_by: stopped_by.iter().map(|s| (*s).to_owned()).collect(),
            doors: Vec::new(),
            packed: false,
            uses_packed: false,
        }
    }

    #[test]
    fn members_show_what_owner_drivers_did_to_them() {
        let shown = |guest: &str, monitor: &str, recorded: &[&str]| {
            member(&Member {
                id: 1,
                function: Function {
                    doors: vec!["suspend=v5".to_owned(), "device-stop=44".to_owned()],
                    ..a_function(&["DRIVER_OK"], &[])
                },
                guest_mode: guest.to_owned(),
                monitor_mode: monitor.to_owned(),
                recorded_by: recorded.iter().map(|s| (*s).to_owned()).collect(),
            })
        };
        let always = "01:00.1  pf0-vf1   in use, features 0x3, offers suspend=v5 device-stop=44";
        assert_eq!(shown("active", "active", &[]), always);
        assert_eq!(
            shown("stop", "freeze", &["guest", "monitor"]),
            format!(
                "{always}, mode stop by the guest, mode freeze by the monitor, writes recorded by the guest and the \
                 monitor"
            )
        );
    }

    #[test]
    fn one_is_not_many() {
        let counted = [0, 1, 2].map(|number| count(number, "queue"));
        assert_eq!(counted, ["0 queues", "1 queue", "2 queues"]);
    }

    #[test]
    fn functions_show_their_driver_and_what_stops_them() {
        for (status, stopped_by, text) in [
            (&[][..], &["NO_DRIVER"][..], "01:00.1  pf0-vf1   no driver"),
            (
                &["ACKNOWLEDGE"],
                &["NO_DRIVER"],
                "01:00.1  pf0-vf1   driver not ready (ACKNOWLEDGE)",
            ),
            (
                &["DRIVER_OK"],
                &[],
                "01:00.1  pf0-vf1   in use, features 0x3",
            ),
            (
                &["DRIVER_OK"],
                &["PAUSED"],
                "01:00.1  pf0-vf1   in use, features 0x3, stopped by PAUSED",
            ),
        ] {
            assert_eq!(function(&a_function(status, stopped_by)), text);
        }
    }
}
