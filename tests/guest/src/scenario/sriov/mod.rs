//! `sriov-*`: physical and virtual functions by the stock driver, through sysfs.
//!
//! A scenario that needs virtual functions enables them if none are, so that each can be run by itself.

mod admin;
mod block;
mod flr;
mod held;
mod net;
mod states;
mod stops;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::Found;
use crate::cmdline::Request;
use crate::kernel_log::Mark;
use crate::user::function::SysfsFunction;
use crate::{Context, Failure, Result, check};
use driver::access::FunctionExt;
use driver::pci::header;
use driver::virtio::{Transport, feature};

pub use admin::run as admin_user;
pub use block::run as block;
pub use flr::{physical as flr_pf, run as flr_io};
pub use net::{ping, traffic};
pub(super) use states::{APIC, VECTOR, interrupts};
pub use states::{run as vf_states, waits as vf_waits};
pub use stops::run as vf_stop;

pub(super) const DEVICES: &str = "/sys/bus/pci/devices";
/// Vendor of all virtio functions, as sysfs writes it.
const VIRTIO: &str = "0x1af4";
/// How long the kernel may take to find drivers for what it enumerated, or to let go of it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Enables `n` virtual functions.
pub fn enable(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let total = owner.total()?;
    let n = request.number("n", total)?;
    let drivers = match request.text("drivers", "yes") {
        "yes" => true,
        "no" => false,
        other => return Err(Failure(format!("drivers={other} is neither yes nor no"))),
    };
    let log = Mark::now()?;
    owner
        .function
        .set("sriov_drivers_autoprobe", u8::from(drivers))?;
    let began = Instant::now();
    owner.set_members(n)?;
    let took = began.elapsed();
    let members = owner.members()?;
    check(members.len() == usize::from(n), || {
        format!(
            "there are {} virtual functions instead of {n}",
            members.len()
        )
    })?;
    for member in &members {
        member.check_answers()?;
    }
    let mut addresses = BTreeSet::new();
    for member in &members {
        check(addresses.insert(member.window()?), || {
            format!("{} has the BAR of another", member.address)
        })?;
    }
    let bound = if drivers {
        owner.await_drivers(&members)?
    } else {
        0
    };
    log.check_clean()?;
    // Again, for those who enable more.
    owner.function.set("sriov_drivers_autoprobe", 1)?;
    Ok(Found::default()
        .with("pf", &owner.function.address)
        .with("total", total)
        .with("vfs", members.len())
        .with("bound", bound)
        .with("ms", took.as_millis()))
}

/// Disables all virtual functions.
pub fn disable(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let log = Mark::now()?;
    let began = Instant::now();
    let removed = owner.disable()?;
    let took = began.elapsed();
    log.check_clean()?;
    Ok(Found::default()
        .with("removed", removed)
        .with("ms", took.as_millis()))
}

/// Enables and disables, again and again.
pub fn rounds(request: &Request) -> Result<Found> {
    let owner = Owner::named(request)?;
    let (n, rounds) = (request.number("n", 4)?, request.number("rounds", 100)?);
    let began = Instant::now();
    for round in 1..=rounds {
        let log = Mark::now()?;
        let turn = || {
            let members = owner.ensure(Some(n))?;
            let removed = owner.disable()?;
            check(removed == members.len(), || {
                format!("{removed} were removed")
            })?;
            log.check_clean()
        };
        turn().context(format_args!("round {round}"))?;
    }
    Ok(Found::default()
        .with("rounds", rounds)
        .with("vfs", n)
        .with("ms", began.elapsed().as_millis()))
}

/// Fails if the kernel complained since it booted.
pub fn dmesg_clean(_: &Request) -> Result<Found> {
    Ok(Found::default().with("records", Mark::boot().check_clean()?))
}

/// A physical function with an SR-IOV capability.
struct Owner {
    function: Function,
}

impl Owner {
    /// The one that `pf=` names.
    fn named(request: &Request) -> Result<Self> {
        Self::called(request.text("pf", "0"))
    }

    /// The one of this index among them, or with this address (`01.00.0`; colons separate parameters).
    fn called(wanted: &str) -> Result<Self> {
        let all = Self::all()?;
        let found = match wanted.parse::<usize>() {
            Ok(index) => all.get(index),
            Err(_) => {
                let tail = wanted.replacen('.', ":", 1);
                all.iter()
                    .find(|function| function.address.ends_with(&tail))
            }
        };
        match found {
            Some(function) => Ok(Self {
                function: function.clone(),
            }),
            None => {
                let names: Vec<_> = all.iter().map(|f| f.address.as_str()).collect();
                Err(Failure(format!(
                    "there is no PF {wanted}; there are [{}]",
                    names.join(" ")
                )))
            }
        }
    }

    fn all() -> Result<Vec<Function>> {
        let mut all: Vec<Function> = fs::read_dir(DEVICES)
            .context("no PCI")?
            .flatten()
            .filter_map(|entry| Function::at(entry.path()))
            .filter(|function| {
                function.path.join("sriov_totalvfs").exists()
                    && function.text("vendor").is_ok_and(|vendor| vendor == VIRTIO)
            })
            .collect();
        all.sort_by(|a, b| a.address.cmp(&b.address));
        Ok(all)
    }

    fn total(&self) -> Result<u16> {
        self.function.number("sriov_totalvfs")
    }

    /// The virtual functions that exist, in order.
    fn members(&self) -> Result<Vec<Function>> {
        (0..self.function.number("sriov_numvfs")?)
            .map(|index: u16| {
                let name = format!("virtfn{index}");
                let link = fs::read_link(self.function.path.join(&name)).context(&name)?;
                let path = link.file_name().map(|name| Path::new(DEVICES).join(name));
                path.and_then(Function::at)
                    .ok_or_else(|| Failure(format!("{name} leads nowhere")))
            })
            .collect()
    }

    fn set_members(&self, n: u16) -> Result<()> {
        self.function.set("sriov_numvfs", n)?;
        let now: u16 = self.function.number("sriov_numvfs")?;
        check(now == n, || {
            format!("sriov_numvfs reads {now} instead of {n}")
        })
    }

    /// The virtual functions with their drivers: those that exist, or `n` new ones (default: all there can be).
    fn ensure(&self, n: Option<u16>) -> Result<Vec<Function>> {
        let mut members = self.members()?;
        if members.is_empty() {
            let n = match n {
                Some(n) => n,
                None => self.total()?,
            };
            self.set_members(n)?;
            members = self.members()?;
        }
        check(n.is_none_or(|n| members.len() == usize::from(n)), || {
            format!("there are {} virtual functions", members.len())
        })?;
        self.await_drivers(&members)?;
        Ok(members)
    }

    /// Waits until each member's virtio device has a driver, and what that driver makes of it. Returns how many.
    fn await_drivers(&self, members: &[Function]) -> Result<usize> {
        let kind = self.function.text("device")?;
        for member in members {
            wait(
                &format!("{} has no driver", member.address),
                || match kind.as_str() {
                    "0x1041" => member.interface().is_ok(),
                    "0x1042" => member.disk().is_ok(),
                    _ => member.virtio_driver().is_ok(),
                },
            )?;
        }
        Ok(members.len())
    }

    /// Disables all virtual functions, and waits until nothing of them is left. Returns how many there were.
    fn disable(&self) -> Result<usize> {
        let members = self.members()?;
        let mut traces: Vec<PathBuf> = Vec::new();
        for member in &members {
            traces.push(member.path.clone());
            traces.extend(
                member
                    .interface()
                    .map(|name| Path::new("/sys/class/net").join(name)),
            );
            traces.extend(member.disk().map(|name| Path::new("/sys/block").join(name)));
        }
        self.set_members(0)?;
        for trace in traces {
            wait(&format!("{} is still there", trace.display()), || {
                !trace.exists()
            })?;
        }
        check(!self.function.path.join("virtfn0").exists(), || {
            "virtfn0 is still there".into()
        })?;
        Ok(members.len())
    }
}

/// What the stock driver makes of the virtual functions of one owner.
#[derive(Default)]
pub struct Members {
    pub disks: Vec<String>,
    pub interfaces: Vec<String>,
}

impl Members {
    /// Those of the owner called `owner`, which has `n` if it had none.
    pub fn ensure(owner: &str, n: u16) -> Result<Self> {
        let mut found = Self::default();
        for member in Owner::called(owner)?.ensure(Some(n))? {
            match (member.disk(), member.interface()) {
                (Ok(disk), _) => found.disks.push(disk),
                (_, Ok(interface)) => found.interfaces.push(interface),
                (Err(why), Err(_)) => return Err(why),
            }
        }
        Ok(found)
    }
}

/// A PCI function in sysfs.
#[derive(Clone)]
pub(super) struct Function {
    /// `0000:01:00.0`
    pub address: String,
    path: PathBuf,
}

impl Function {
    pub fn at(path: PathBuf) -> Option<Self> {
        let address = path.file_name()?.to_str()?.to_owned();
        path.exists().then_some(Self { address, path })
    }

    pub fn text(&self, attribute: &str) -> Result<String> {
        let text = fs::read_to_string(self.path.join(attribute))
            .context(format_args!("{} {attribute}", self.address))?;
        Ok(text.trim().to_owned())
    }

    fn number(&self, attribute: &str) -> Result<u16> {
        self.text(attribute)?
            .parse()
            .context(format_args!("{} {attribute}", self.address))
    }

    fn set(&self, attribute: &str, value: impl std::fmt::Display) -> Result<()> {
        fs::write(self.path.join(attribute), value.to_string()).context(format_args!(
            "writing {value} to {attribute} of {}",
            self.address
        ))
    }

    /// Name of the PCI driver.
    pub fn driver(&self) -> Option<String> {
        let driver = fs::read_link(self.path.join("driver")).ok()?;
        Some(driver.file_name()?.to_str()?.to_owned())
    }

    /// Takes the driver away.
    pub fn unbind(&self) -> Result<()> {
        let path = self.path.join("driver/unbind");
        fs::write(path, &self.address).context(format_args!("unbinding {}", self.address))
    }

    /// Gives it the driver that fits, or the one `driver_override` names.
    fn bind(&self) -> Result<()> {
        fs::write("/sys/bus/pci/drivers_probe", &self.address)
            .context(format_args!("binding {}", self.address))
    }

    /// Reaches its registers from here.
    pub fn open(&self) -> Result<SysfsFunction> {
        SysfsFunction::open(&self.path).context(&self.address)
    }

    /// The directory of the virtio device behind it.
    fn virtio(&self) -> Result<PathBuf> {
        child(&self.path, "virtio").context(&self.address)
    }

    fn virtio_driver(&self) -> Result<PathBuf> {
        let driver = self.virtio()?.join("driver");
        fs::read_link(&driver).context(&self.address)
    }

    /// The network interface its driver made, as far as this namespace sees it.
    fn interface(&self) -> Result<String> {
        named_child(&self.virtio()?.join("net"), "").context(&self.address)
    }

    /// The disk its driver made.
    fn disk(&self) -> Result<String> {
        named_child(&self.virtio()?.join("block"), "").context(&self.address)
    }

    /// Fails unless configuration space answers and, of a function without a driver, the BAR.
    fn check_answers(&self) -> Result<()> {
        let config = SysfsFunction::without_bars(&self.path).context(&self.address)?;
        let class: u32 = config.config(header::REVISION);
        check(class != u32::MAX, || {
            format!("{} does not answer", self.address)
        })?;
        if self.driver().is_none() {
            let transport = Transport::new(self.open()?).context(&self.address)?;
            let (offered, owners) = (transport.offered(), feature::SR_IOV | feature::ADMIN_VQ);
            check(
                offered & feature::VERSION_1 != 0 && offered & owners == 0,
                || format!("{} offers features {offered:#x}", self.address),
            )?;
        }
        Ok(())
    }

    /// Where its first BAR is.
    fn window(&self) -> Result<String> {
        let resources = self.text("resource")?;
        let first = resources.lines().next().unwrap_or_default();
        let start = first.split_whitespace().next().unwrap_or_default();
        let assigned = start.trim_start_matches("0x").contains(|c| c != '0');
        check(assigned, || format!("{} has no BAR", self.address))?;
        Ok(start.to_owned())
    }
}

/// The first entry of a directory whose name begins like this.
fn named_child(directory: &Path, prefix: &str) -> Result<String> {
    let doing = || format!("{}/{prefix}*", directory.display());
    let names = fs::read_dir(directory).context(doing())?.flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .find(|name| name.starts_with(prefix))
        .ok_or_else(|| Failure(format!("there is no {}", doing())))
}

fn child(directory: &Path, prefix: &str) -> Result<PathBuf> {
    Ok(directory.join(named_child(directory, prefix)?))
}

/// Waits until `done`; `what` is wrong otherwise.
fn wait(what: &str, done: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        check(Instant::now() < deadline, || what.to_owned())?;
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
