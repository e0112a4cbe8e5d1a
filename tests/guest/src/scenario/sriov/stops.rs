//! `vf-stop`: a virtual function under I/O by a driver in user space is stopped and goes on, in one of the ways there are,
//! while its sibling under the stock driver reads all the time. With `way=freeze` the driver is also that of the owner: it
//! freezes the virtual function, takes its context, resets it, and puts the context back. With `hold=yes` the first stop
//! lasts until a line is typed on the console; with `way=freeze` also the first context stays half read, and half written,
//! until then.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use driver::virtio::NO_VECTOR;

use super::super::block::Disk;
use super::super::{Found, console};
use super::held::{BURST, Load, OwnerDriver, SEED, Way};
use super::{Function, Owner};
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::pattern;
use crate::{Context, Failure, Result, check};

/// Of what the sibling reads.
const SIBLING: u64 = 12;

pub fn run(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let way = Way::named(request.text("way", "freeze"))?;
    let hold = match request.text("hold", "no") {
        "yes" => true,
        "no" => false,
        other => return Err(Failure(format!("hold={other} is neither yes nor no"))),
    };
    let log = Mark::now()?;
    let mut driver = match way.is_of_owner() {
        true => Some(OwnerDriver::start(&owner)?),
        false => None,
    };
    let members = owner.ensure(Some(2))?;
    let [first, sibling] = members.as_slice() else {
        return Err(Failure("there are not two virtual functions".into()));
    };
    if let Some(driver) = &mut driver {
        driver.negotiate()?;
    }
    first.unbind()?;
    first.set("reset_method", "flr")?;
    let disk = Disk::new(&sibling.disk()?);
    disk.write_pattern(SIBLING, 1)?;

    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    let stops = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !stop.load(Relaxed) {
                let (there, expected) = (disk.checksum(1)?, pattern::checksum(SIBLING, 1));
                check(there == expected, || {
                    format!("crc32={there:08x} instead of {expected:08x}")
                })?;
                read.fetch_add(1, Relaxed);
            }
            Ok::<_, Failure>(())
        });
        let stops = rounds(first, &way, driver.as_mut(), &read, hold);
        stop.store(true, Relaxed);
        let reader = reader.join();
        reader
            .map_err(|_| Failure("the sibling panicked".into()))?
            .context("the sibling")?;
        stops
    })?;
    log.check_clean()?;
    Ok(Found::default()
        .with("stops", stops)
        .with("sibling_mib", read.into_inner())
        .with("crc32", format_args!("{:08x}", pattern::checksum(SEED, 1))))
}

/// Writes a MiB, with a stop after each burst is begun. Returns how many.
fn rounds(
    function: &Function,
    way: &Way,
    mut owner: Option<&mut OwnerDriver>,
    read: &AtomicU64,
    hold: bool,
) -> Result<u32> {
    let mut load = Load::start(function, 1, way.feature(), NO_VECTOR)?;
    let mut stops = 0;
    while load.left() > 0 {
        let doing = |what: &'static str| move || format!("stop {stops}: {what}");
        load.submit(BURST)?;
        way.stop(&load, owner.as_deref_mut())
            .context(doing("stopping")())?;
        load.expect_stillness().context(doing("stopped")())?;
        let hold = hold && stops == 0;
        if hold {
            console::ask()?;
            load.expect_stillness().context(doing("held")())?;
        }
        let before = read.load(Relaxed);
        if let (Way::Freeze, Some(owner)) = (way, owner.as_deref_mut()) {
            // Its driver knows nothing of this.
            load.submit(BURST)?;
            owner.replace(function, hold).context(doing("moving")())?;
            load.expect_stillness().context(doing("moved")())?;
        }
        super::wait("the sibling stands still", || read.load(Relaxed) > before)?;
        way.resume(&load, owner.as_deref_mut())
            .context(doing("resuming")())?;
        load.drain().context(doing("resumed")())?;
        stops += 1;
    }
    load.transport().reset().context(&function.address)?;
    Ok(stops)
}
