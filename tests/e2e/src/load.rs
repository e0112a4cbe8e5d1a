//! A guest under the load of its scenario `steady`, with what that needs outside.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::block::MIB;
use crate::control::Control;
use crate::vm::{Outcome, PATIENCE, Running, Vm};

/// MiB of each disk.
const DISK: u64 = 4;
/// Virtual functions of each owner.
const MEMBERS: u16 = 2;
/// What the guest says about once a second.
pub const TICK: &str = "tern-guest: tick";
/// How often a monitor is asked.
const LOOK: Duration = Duration::from_millis(20);
/// Says it to the guest.
pub const ENOUGH: &[u8] = b"enough\n";

/// The devices of a guest, and the files behind them.
pub struct Load {
    directory: TempDir,
    kernel: (&'static str, &'static str),
    cpus: u32,
    parameters: Vec<String>,
    options: Vec<String>,
    scenario: Option<String>,
    then: String,
}

impl Load {
    /// Memory, timers and registers of a guest without devices.
    pub fn new(cpus: u32) -> Result<Self> {
        Ok(Self {
            directory: tempfile::tempdir()?,
            kernel: ("vmlinuz-6.12", "6.12"),
            cpus,
            parameters: Vec::new(),
            options: Vec::new(),
            scenario: None,
            then: String::new(),
        })
    }

    /// The same with everything there is: a disk, two network interfaces, and virtual functions of either kind.
    pub fn with_everything(cpus: u32) -> Result<Self> {
        let load = Self::new(cpus)?.disk("")?.interfaces();
        let card = ["--pf".into(), format!("net,vfs={MEMBERS}")];
        let mut load = load.options(card).owner_of_disks("pf1", MEMBERS, "")?;
        let members = [format!("vfs={MEMBERS}"), "pfs=0+1".into()];
        load.parameters.extend(members);
        Ok(load)
    }

    /// The same, where all but the owner of disks and its members offer packed virtqueues, and their drivers take them.
    pub fn with_packed_rings(cpus: u32) -> Result<Self> {
        let mut load = Self::with_everything(cpus)?;
        for option in &mut load.options {
            if option.starts_with("path=") || option.starts_with("switch=") {
                option.push_str(",packed");
            }
            if option.starts_with("net,") {
                option.push_str(",packed");
            }
        }
        // The disk, two interfaces, the owner of interfaces.
        Ok(load.and_then(&format!("packed:devices={}", 4 + MEMBERS)))
    }

    /// An owner of disks with two members, offering these doors.
    pub fn of_disks(cpus: u32, doors: &str) -> Result<Self> {
        Self::of_many_disks(cpus, MEMBERS, doors)
    }

    /// The same with another number of members.
    pub fn of_many_disks(cpus: u32, members: u16, more: &str) -> Result<Self> {
        Self::new(cpus)?.owner_of_disks("pf0", members, more)
    }

    /// Adds an owner of disks.
    fn owner_of_disks(mut self, name: &str, members: u16, doors: &str) -> Result<Self> {
        self.file(name)?;
        for member in 1..=members {
            self.file(&format!("{name}-vf{member}"))?;
        }
        let path = |file: String| self.path(&file).display().to_string();
        let (pf, vf) = (
            path(format!("{name}.raw")),
            path(format!("{name}-vf%d.raw")),
        );
        let option = format!("block,vfs={members},path={pf},vf-path={vf}{doors}");
        self.options.extend(["--pf".into(), option]);
        Ok(self)
    }

    /// Adds a disk with these options.
    pub fn disk(mut self, more: &str) -> Result<Self> {
        let path = self.file("disk0")?;
        self.options
            .extend(["--disk".into(), format!("path={}{more}", path.display())]);
        self.parameters.push("disks=vda".into());
        Ok(self)
    }

    /// Adds two interfaces on one switch.
    pub fn interfaces(mut self) -> Self {
        for _ in 0..2 {
            self.options.extend(["--net".into(), "switch=lan".into()]);
        }
        self.parameters.push("nets=eth0+eth1".into());
        self
    }

    /// Boots Linux 6.1.
    pub fn linux_6_1(mut self) -> Self {
        self.kernel = ("vmlinuz-6.1", "6.1");
        self
    }

    /// Gives the scenario one more parameter.
    pub fn parameter(mut self, parameter: &str) -> Self {
        self.parameters.push(parameter.into());
        self
    }

    /// Runs other scenarios instead of `steady`.
    pub fn scenario(mut self, scenario: &str) -> Self {
        self.scenario = Some(scenario.into());
        self
    }

    /// Runs another scenario afterwards.
    pub fn and_then(mut self, scenario: &str) -> Self {
        self.then = format!(",{scenario}");
        self
    }

    /// Adds options of `tern run`.
    pub fn options<S: Into<String>>(mut self, options: impl IntoIterator<Item = S>) -> Self {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// Adds files that no option names yet: `name` with the numbers up to `last`.
    pub fn files(self, name: &str, last: u16) -> Result<Self> {
        (0..=last).try_for_each(|number| self.file(&format!("{name}{number}")).map(drop))?;
        Ok(self)
    }

    fn file(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(&format!("{name}.raw"));
        File::create(&path)?.set_len(DISK * MIB)?;
        Ok(path)
    }

    /// A file of this guest.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directory with its files.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Its `tern run`, with a socket of this name.
    pub fn vm(&self, socket: &str) -> Vm {
        let steady = [&["steady".to_owned()], self.parameters.as_slice()].concat();
        let scenario = self.scenario.clone();
        let scenario = scenario.unwrap_or_else(|| steady.join(":")) + &self.then;
        Vm::new(scenario)
            .kernel(self.kernel.0, self.kernel.1)
            .args(["--cpus", &self.cpus.to_string()])
            .args(&self.options)
            .args(["--api-socket".as_ref(), self.path(socket).as_os_str()])
    }

    /// Starts it.
    pub fn run(&self) -> Result<Guest> {
        const SOCKET: &str = "api.sock";
        let vm = self.vm(SOCKET).spawn()?;
        Ok(Guest::new(vm, self.path(SOCKET)))
    }
}

/// A guest that runs, whichever process it is in.
pub struct Guest {
    pub vm: Running,
    pub control: Control,
}

impl Guest {
    pub fn new(vm: Running, socket: PathBuf) -> Self {
        Self {
            vm,
            control: Control { socket },
        }
    }

    /// Waits until the monitor has a guest that runs.
    pub fn awake(&mut self) -> Result<()> {
        self.await_state("running")
    }

    /// Waits until the monitor has a guest in this state.
    pub fn await_state(&mut self, wanted: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.control.state().is_ok_and(|state| state == wanted) {
            self.vm.expect_alive()?;
            ensure!(Instant::now() < deadline, "the guest is not {wanted}");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Waits until the load of the guest gets on: from now on there are so many ticks.
    pub fn ticks(&mut self, count: usize) -> Result<()> {
        let mut from = self.vm.console().len();
        for _ in 0..count {
            from = self.vm.wait_for(TICK, from)?;
        }
        Ok(())
    }

    /// Ends the load, which must have found nothing wrong.
    pub fn enough(mut self) -> Result<Outcome> {
        self.vm.send(ENOUGH)?;
        let outcome = self.vm.wait()?;
        outcome.expect_ok()?;
        Ok(outcome)
    }
}

/// Fails unless the load of a guest [with everything](Load::with_everything) did something of every kind, with all that it was
/// given.
pub fn expect_all_work(outcome: &Outcome) -> Result<()> {
    let kinds = [
        "pages",
        "timers",
        "spins",
        "registers",
        "blocks",
        "sent",
        "packets",
    ];
    expect_work(outcome, &kinds)?;
    for (what, count) in [("disks", 3), ("pairs", 2)] {
        ensure!(
            outcome.number("steady", what)? == count,
            "{}",
            outcome.stdout
        );
    }
    Ok(())
}

/// Fails unless the load of the guest did all of this.
pub fn expect_work(outcome: &Outcome, kinds: &[&str]) -> Result<()> {
    for kind in kinds {
        ensure!(
            outcome.number("steady", kind)? > 0,
            "no {kind}\n{}",
            outcome.stdout
        );
    }
    Ok(())
}
