//! The host's limit on open descriptors, which hundreds of virtual functions reach.

use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::MachineSpec;

/// Descriptors of a process with a guest without devices, vCPUs and their events included, with some to spare.
const BASE: u64 = 128;
/// Those of one vCPU.
const PER_CPU: u64 = 4;
/// Those of one queue: the event of its kick, and that of its interrupt.
const PER_QUEUE: u64 = 2;
/// Those of one function besides: the event of its configuration interrupt, its backend, the backend's event.
const PER_FUNCTION: u64 = 3;

/// Descriptors that the kernel's table for this process has room for from the start: 32 KiB of it.
const TABLE: u64 = 4096;

/// More descriptors are needed than the host allows. Exit status 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this guest needs up to {needed} open files, and the host allows {allowed}; use fewer virtual functions or managed devices, or raise \
     the hard limit (`ulimit -Hn {needed}`, LimitNOFILE= of a service)"
)]
pub struct TooFewDescriptors {
    /// The most this guest can need.
    pub needed: u64,
    /// The hard limit.
    pub allowed: u64,
}

/// The most descriptors `config` can need.
pub fn needed(config: &MachineSpec) -> u64 {
    let function = |queues: u64| PER_FUNCTION + PER_QUEUE * queues;
    let disks = config.disks.iter().map(|d| function(d.queues.into()));
    let net_queues = u64::from(config.layout.net_queues());
    let nets = config.nets.iter().map(|_| function(net_queues));
    // No other type has more; an owner has one more.
    let groups = config.pfs.iter();
    let groups =
        groups.map(|pf| function(net_queues + 1) + u64::from(pf.vfs) * function(net_queues));
    // As well here. Each managed device has messages of its own besides.
    let managers = config.managers.iter().map(|manager| {
        function(net_queues + 1) + u64::from(manager.devices) * function(net_queues)
    });
    let all = disks.chain(nets).chain(groups).chain(managers);
    BASE + PER_CPU * u64::from(config.cpus) + all.sum::<u64>()
}

/// Checks that the process may have the descriptors that `config` can need, after [`reserve`].
pub fn check(config: &MachineSpec) -> Result<(), TooFewDescriptors> {
    let needed = needed(config);
    match getrlimit(Resource::Nofile).current {
        Some(allowed) if allowed < needed => Err(TooFewDescriptors { needed, allowed }),
        _ => Ok(()),
    }
}

/// Lets the process have as many descriptors as the host lets everyone; returns how many that are, if there is a limit.
fn raise_to_maximum() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        // Nothing says so, but then the old one still holds.
        Err(_) => current,
    }
}

/// Raises the limit on open descriptors, before it is known how many are needed, and has the kernel make its table of them
/// large, which costs nothing while there is one thread. With several, it waits for an RCU grace period each time the table
/// grows: milliseconds of the start of a guest, or of the pause of one that moves.
pub fn reserve() {
    let limit = raise_to_maximum().unwrap_or(TABLE);
    let last = limit.min(TABLE).saturating_sub(1);
    // It grows when it has to if this fails.
    let _ = fcntl_dupfd_cloexec(rustix::stdio::stdin(), last as i32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn machine(pf: &[&str]) -> MachineSpec {
        let config = Config {
            kernel: Some("k".into()),
            pfs: pf.iter().map(|pf| pf.parse().unwrap()).collect(),
            ..Config::default()
        };
        config.resolve().unwrap()
    }

    #[test]
    fn every_virtual_function_counts() {
        let none = needed(&machine(&[]));
        let one = needed(&machine(&["net,vfs=1"]));
        let many = needed(&machine(&["net,vfs=255"]));
        assert!(none < 200 && one > none, "{none} {one}");
        assert_eq!(many - one, 254 * 9);
    }

    #[test]
    fn the_table_has_room_before_there_are_many_descriptors() {
        reserve();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        let size: u64 = size.unwrap().trim().parse().unwrap();
        assert!(size >= TABLE.min(getrlimit(Resource::Nofile).current.unwrap_or(TABLE)));
    }

    #[test]
    fn what_an_ordinary_guest_needs_is_there() {
        reserve();
        assert_eq!(check(&machine(&["net,vfs=4"])), Ok(()));
    }
}
