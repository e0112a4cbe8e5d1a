//! `flr-io`: function level reset of one virtual function while its siblings work; `flr-pf`: of a physical one.
//!
//! Linux 6.12 has no reset callbacks in its virtio-pci driver: after a reset through sysfs the driver of a function
//! does not know that its device has forgotten everything. What is in flight there never comes back, so that a disk
//! must be idle, that is, unbound; a network card only loses packets, and is reset as it is. Both work again when
//! they are bound anew.

use std::fs;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use driver::access::FunctionExt;
use driver::pci::{command as pci_command, find_extended_capability, header, id};

use super::super::Found;
use super::super::block::Disk;
use super::super::net::{exchange, ping_until_answered};
use super::net::{all_ping, host, hosts};
use super::{DEVICES, Function, Owner};
use crate::cmdline::Request;
use crate::host::{Host, Pending};
use crate::kernel_log::Mark;
use crate::pattern;
use crate::user::function::SysfsFunction;
use crate::{Context, Failure, Result, check};

/// Device of a network card and of a disk, as sysfs writes them.
const NET: &str = "0x1041";
const BLOCK: &str = "0x1042";
/// In the SR-IOV capability: SR-IOV Control, with VF Enable, and NumVFs.
const SRIOV_CONTROL: u16 = 0x08;
const VF_ENABLE: u16 = 1;
const NUM_VFS: u16 = 0x10;
/// MiB of each disk that is read again and again.
const DISK_CHUNKS: u64 = 2;
/// MiB the siblings exchange per turn.
const NET_CHUNKS: u64 = 2;

/// Resets the first virtual function `rounds` times, or the first of the functions there are if they have no owner here.
pub fn run(request: &Request) -> Result<Found> {
    let rounds: u32 = request.number("rounds", 3)?;
    let log = Mark::now()?;
    let (members, companion) = match request.text("pf", "0") {
        "none" => (ownerless()?, None),
        _ => {
            let owner = Owner::named(request)?;
            let members = owner.ensure(Some(request.number("n", 3)?))?;
            (members, Some(owner.function))
        }
    };
    let Some((first, siblings @ [sibling, ..])) = members.split_first() else {
        return Err(Failure("it takes a sibling: n=2".into()));
    };
    first.set("reset_method", "flr")?;
    let began = Instant::now();
    let moved = match first.text("device")?.as_str() {
        NET => {
            let last = siblings.last().unwrap_or(sibling);
            cards(first, [companion.as_ref().unwrap_or(sibling), last], rounds)?
        }
        _ => disks(first, siblings, rounds)?,
    };
    log.check_clean()?;
    Ok(Found::default()
        .with("resets", rounds)
        .with("sibling_mib", moved)
        .with("ms", began.elapsed().as_millis()))
}

/// The functions of the kind that was passed through, in order.
fn ownerless() -> Result<Vec<Function>> {
    let entries = fs::read_dir(DEVICES).context("no PCI")?.flatten();
    let mut all: Vec<Function> = entries
        .filter_map(|entry| Function::at(entry.path()))
        .filter(|function| {
            [NET, BLOCK].iter().any(|kind| {
                function.text("device").is_ok_and(|device| device == *kind)
                    && !function.path.join("sriov_totalvfs").exists()
            })
        })
        .collect();
    all.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(all)
}

/// Resets the physical function while its virtual functions have drivers, `rounds` times. All it owns is reset with it,
/// and Linux brings back what configuration space had: the virtual functions are there again, without their drivers'
/// knowledge. Each works once it is bound anew; so does the physical function.
pub fn physical(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let rounds: u32 = request.number("rounds", 2)?;
    let n: u16 = request.number("n", 3)?;
    let log = Mark::now()?;
    let pf = &owner.function;
    pf.set("reset_method", "flr")?;
    for _ in 0..rounds {
        let members = owner.ensure(Some(n))?;
        let registers = || Ok((register(pf, SRIOV_CONTROL)?, register(pf, NUM_VFS)?));
        let before = registers()?;
        check(before.0 & VF_ENABLE != 0 && before.1 == n, || {
            format!("control and NumVFs read {before:x?}")
        })?;
        pf.reset()?;
        let after = registers()?;
        check(before == after, || {
            format!("control and NumVFs read {after:x?} instead of {before:x?}")
        })?;
        for member in &members {
            member.check_answers()?;
            let command: u16 = SysfsFunction::without_bars(&member.path)
                .context(&member.address)?
                .config(header::COMMAND);
            check(command & pci_command::BUS_MASTER == 0, || {
                format!("{} was not reset: command {command:#x}", member.address)
            })?;
        }
        for member in &members {
            member.rebind()?;
        }
        owner.await_drivers(&members)?;
        let cards = hosts(&members)?;
        all_ping(&cards)?;
        for host in cards {
            host.end()?;
        }
        // Takes the virtual functions away.
        pf.rebind()?;
        super::wait("the physical function has no interface", || {
            pf.interface().is_ok()
        })?;
        check(owner.members()?.is_empty(), || {
            "there are virtual functions without a driver of their owner".into()
        })?;
        let members = owner.ensure(Some(n))?;
        let cards = hosts(std::iter::once(pf).chain(&members))?;
        all_ping(&cards)?;
        for host in cards {
            host.end()?;
        }
        owner.disable()?;
    }
    log.check_clean()?;
    Ok(Found::default().with("resets", rounds).with("vfs", n))
}

/// A 16-bit register of the SR-IOV capability.
fn register(pf: &Function, offset: u16) -> Result<u16> {
    let function = SysfsFunction::without_bars(&pf.path).context(&pf.address)?;
    let found = find_extended_capability(&function, id::EXT_SRIOV).context(&pf.address)?;
    let found = found.ok_or_else(|| Failure(format!("{}: no SR-IOV", pf.address)))?;
    Ok(function.config(found.offset + offset))
}

impl Function {
    fn reset(&self) -> Result<()> {
        self.set("reset", 1)
    }

    fn rebind(&self) -> Result<()> {
        if self.driver().is_some() {
            self.unbind()?;
        }
        self.bind()
    }
}

/// Siblings read their disks all the time; so does the first, until its driver is taken away.
fn disks(first: &Function, siblings: &[Function], rounds: u32) -> Result<u64> {
    let open = |function: &Function| Ok(Disk::new(&function.disk()?));
    let others: Vec<Disk> = siblings.iter().map(open).collect::<Result<_>>()?;
    for (seed, disk) in (2..).zip(&others) {
        disk.write_pattern(seed, DISK_CHUNKS)?;
    }
    open(first)?.write_pattern(1, DISK_CHUNKS)?;
    let stop = AtomicBool::new(false);
    let moved = AtomicU64::new(0);
    thread::scope(|scope| {
        let readers: Vec<_> = (2..)
            .zip(&others)
            .map(|(seed, disk)| {
                let (stop, moved) = (&stop, &moved);
                scope.spawn(move || {
                    while !stop.load(Relaxed) {
                        verify(disk, seed)?;
                        moved.fetch_add(DISK_CHUNKS, Relaxed);
                    }
                    Ok::<_, Failure>(())
                })
            })
            .collect();
        let resets = (0..rounds).try_for_each(|_| {
            let disk = open(first)?;
            let own = scope.spawn(move || while disk.checksum(DISK_CHUNKS).is_ok() {});
            await_progress(&moved)?;
            // Ends the reads, with an error.
            first.unbind()?;
            own.join()
                .map_err(|_| Failure("a reader panicked".into()))?;
            first.reset()?;
            first.bind()?;
            super::wait("the disk did not come back", || first.disk().is_ok())?;
            verify(&open(first)?, 1)?;
            await_progress(&moved)
        });
        stop.store(true, Relaxed);
        for reader in readers {
            reader
                .join()
                .map_err(|_| Failure("a reader panicked".into()))?
                .context("a sibling")?;
        }
        resets
    })?;
    Ok(moved.into_inner())
}

fn verify(disk: &Disk, seed: u64) -> Result<()> {
    let (there, expected) = (
        disk.checksum(DISK_CHUNKS)?,
        pattern::checksum(seed, DISK_CHUNKS),
    );
    check(there == expected, || {
        format!("disk {seed} has crc32={there:08x} instead of {expected:08x}")
    })
}

/// Siblings go on: at least one of them gets something done from now on.
fn await_progress(moved: &AtomicU64) -> Result<()> {
    let before = moved.load(Relaxed);
    super::wait("the siblings stand still", || moved.load(Relaxed) > before)
}

/// Two others exchange data all the time; the first one sends without end, and is reset under its driver.
fn cards(first: &Function, others: [&Function; 2], rounds: u32) -> Result<u64> {
    let others = hosts(others)?;
    let [ours, theirs] = others.as_slice() else {
        return Err(Failure("two hosts are not two".into()));
    };
    let target = theirs.address;
    let stop = AtomicBool::new(false);
    let moved = AtomicU64::new(0);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| {
            while !stop.load(Relaxed) {
                exchange(ours, theirs, NET_CHUNKS)?;
                moved.fetch_add(2 * NET_CHUNKS, Relaxed);
            }
            Ok::<_, Failure>(())
        });
        let resets = (0..rounds).try_for_each(|_| {
            let own = host(first, 9)?;
            own.run(move || ping_until_answered(target))?;
            let flood = flood(&own, target);
            await_progress(&moved)?;
            first.reset()?;
            await_progress(&moved)?;
            flood.wait()?;
            first.rebind()?;
            own.forget()?;
            super::wait("the interface did not come back", || {
                first.interface().is_ok()
            })?;
            let again = host(first, 9)?;
            again.run(move || ping_until_answered(target))?;
            again.end()?;
            await_progress(&moved)
        });
        stop.store(true, Relaxed);
        traffic
            .join()
            .map_err(|_| Failure("the traffic panicked".into()))?
            .context("the siblings")?;
        resets
    })?;
    for host in others {
        host.end()?;
    }
    Ok(moved.into_inner())
}

/// Sends to nobody in particular for a while, whatever becomes of it.
fn flood(host: &Host, target: Ipv4Addr) -> Pending<()> {
    const LASTS: Duration = Duration::from_secs(1);
    host.begin(move || {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).context("a socket")?;
        socket.set_nonblocking(true).context("a socket")?;
        let until = Instant::now() + LASTS;
        while Instant::now() < until {
            // Once the card is reset its queue fills up.
            if socket.send_to(&[0x55; 1000], (target, 9)).is_err() {
                thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    })
}
