//! The virtio functions a configuration asks for, each shown on the PCI bus and served by the I/O thread.
//!
//! [`Backends::open`] claims what the host must give (files, taps) before anything of the guest exists; then
//! [`Functions::plug`] puts a function around each. Where that comes from says a [`Provider`].

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::block::{Block, BlockConfig, BlockError};
use devices::console::Console;
use devices::gate::{Patience, Reasons};
use devices::io::{IoThread, IoThreadError};
use devices::memory::{GuestRam, MemoryError};
use devices::msi::MsiController;
use devices::net::{Net, PortConfig, Switch, SwitchError, TapError};
use devices::parameters::BadParameter;
use devices::rng::Rng;
use devices::virtio::{Offer, VirtioDevice, VirtioFunction};
use pci::function::SingleFunction;
use pci::owner::OwnerError;
use pci::root::{AddError, PciRoot};
use pci::topology::Bdf;
use pci::virtio::{Options, VirtioPci, VirtioPciError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::manager::{Manager, ManagerBackend};
use super::owner::{Group, GroupBackend};
use super::provider::{HostSide, LeftOver, Provider};
use crate::config::check::{HostError, console_file};
use crate::config::{MachineSpec, NetBackend, Slot};
use crate::console::output::{Loss, Reporting};
use crate::console::{self, Target};

/// Why a function could not be built.
#[derive(Debug, thiserror::Error)]
pub enum FunctionError {
    /// A disk.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A file that another process gave.
    #[error(transparent)]
    LeftOver(#[from] LeftOver),
    /// A switch.
    #[error(transparent)]
    Switch(#[from] SwitchError),
    /// A console's file.
    #[error(transparent)]
    Host(#[from] HostError),
    /// No view of guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The function cannot be shown on the bus.
    #[error(transparent)]
    Pci(#[from] VirtioPciError),
    /// An owner and its members cannot be shown on a bus.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The bus has no place for it.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The I/O thread.
    #[error(transparent)]
    Io(#[from] IoThreadError),
    /// A device cannot have these parameters.
    #[error(transparent)]
    Parameter(#[from] BadParameter),
    /// A specification that was not decided.
    #[error("a network interface has no MAC address")]
    Undecided,
    /// A descriptor or thread.
    #[error("the host refused a descriptor or a thread")]
    Resource(#[from] std::io::Error),
}

/// A device that is not part of a machine yet.
struct Backend {
    name: String,
    slot: Slot,
    offer: Offer,
    device: Box<dyn VirtioDevice>,
}

/// The devices of a configuration, with everything the host gives them.
#[derive(Default)]
pub struct Backends {
    list: Vec<Backend>,
    groups: Vec<GroupBackend>,
    managers: Vec<ManagerBackend>,
    host: HostSide,
}

impl Backends {
    /// Opens what `spec` names, everything by its name. `stdin` is the virtio console's input if it is on standard input; what cannot be
    /// written of its output goes to `loss`.
    pub fn open(
        spec: &MachineSpec,
        stdin: Option<OwnedFd>,
        loss: &Loss,
    ) -> Result<Self, FunctionError> {
        Self::open_from(spec, Provider::by_name(), stdin, loss)
    }

    /// The same, with what `provider` gives.
    pub fn open_from(
        spec: &MachineSpec,
        mut provider: Provider,
        stdin: Option<OwnedFd>,
        loss: &Loss,
    ) -> Result<Self, FunctionError> {
        let mut backends = Self::default();
        let parameters = &spec.parameters;
        for (index, disk) in spec.disks.iter().enumerate() {
            let name = format!("disk{index}");
            let file = provider.disk(&name, &disk.path, disk.readonly)?;
            let config = BlockConfig {
                path: disk.path.clone(),
                read_only: disk.readonly,
                serial: disk.serial.clone().unwrap_or_default(),
                queues: disk.queues,
            };
            let device = Block::with_backend(file, &config)?.with_parameters(&parameters.block)?;
            backends.add(name, disk.bus, disk.offer, device);
        }
        let mut switches = BTreeMap::<String, Switch>::new();
        for (index, net) in spec.nets.iter().enumerate() {
            let name = format!("net{index}");
            let mac = net.mac.ok_or(FunctionError::Undecided)?;
            let device = match &net.backend {
                NetBackend::Tap(tap) => {
                    let tap = provider.tap(&name, tap)?;
                    provider.announcer(tap.announcer(mac));
                    Net::new(mac, tap)
                }
                NetBackend::Switch(switch) => {
                    let switch = switches.entry(switch.clone()).or_default();
                    let port = switch.port(PortConfig {
                        name: name.clone(),
                        mac,
                        check_source: false,
                    })?;
                    provider.announcer(port.announcer());
                    Net::new(mac, port)
                }
            }
            .with_control_queue(spec.layout.has_net_control())
            .with_parameters(&parameters.net)?;
            backends.add(name, net.bus, net.offer, device);
        }
        for (index, pf) in spec.pfs.iter().enumerate() {
            let name = format!("pf{index}");
            let group = GroupBackend::open(name, pf, spec, &mut switches, &mut provider)?;
            backends.groups.push(group);
        }
        for (index, manager) in spec.managers.iter().enumerate() {
            let name = format!("manager{index}");
            let manager = ManagerBackend::open(name, manager, spec, &mut switches, &mut provider)?;
            backends.managers.push(manager);
        }
        // There is no option for these two.
        let none = Offer::default();
        if spec.rng {
            let rng = Rng::new().with_parameters(&parameters.rng)?;
            backends.add("rng".to_owned(), Slot::Root, none, rng);
        }
        if let Some(target) = &spec.virtio_console {
            let file = console_file(target, &spec.boot_files())?;
            let output: Box<dyn Write + Send> = match (target, file) {
                (_, Some(file)) => Box::new(Reporting::new(file, &target.place(), loss)),
                (Target::Stdio, None) => {
                    Box::new(Reporting::new(console::stdout()?, &target.place(), loss))
                }
                (_, None) => Box::new(std::io::sink()),
            };
            let console = Console::new(stdin, output)?.with_parameters(&parameters.console)?;
            backends.add("console".to_owned(), Slot::Root, none, console);
        }
        backends.host = provider.finish()?;
        Ok(backends)
    }

    fn add(&mut self, name: String, slot: Slot, offer: Offer, device: impl VirtioDevice + 'static) {
        self.list.push(Backend {
            name,
            slot,
            offer,
            device: Box::new(device),
        });
    }
}

/// A function and its place.
pub struct Function {
    /// The function.
    pub virtio: Arc<VirtioFunction>,
    /// Its place on the root bus, or that of the port it is behind.
    pub place: Bdf,
    /// Whether it is behind a port.
    pub slot: Slot,
}

/// The functions of a machine.
pub struct Functions {
    single: Vec<Function>,
    groups: Vec<Group>,
    managers: Vec<Manager>,
    revived: Arc<EventFd>,
    host: HostSide,
    /// Serves the functions; there is none without functions.
    _io: Option<IoThread>,
}

impl Functions {
    /// Puts a function around each of `backends` and plugs it into `pci`.
    pub fn plug(
        mut backends: Backends,
        ram: &Arc<GuestRam>,
        pci: &Arc<PciRoot>,
        msi: &dyn MsiController,
    ) -> Result<Self, FunctionError> {
        let revived = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let Backends {
            list,
            groups,
            managers,
            ..
        } = &backends;
        if list.is_empty() && groups.is_empty() && managers.is_empty() {
            return Ok(Self {
                single: Vec::new(),
                groups: Vec::new(),
                managers: Vec::new(),
                revived,
                host: backends.host,
                _io: None,
            });
        }
        let io = IoThread::spawn("io")?;
        let mut single = Vec::with_capacity(backends.list.len());
        for Backend {
            name,
            slot,
            offer,
            device,
        } in backends.list
        {
            let virtio = VirtioFunction::offering(name, device, ram.view()?, offer)?;
            let place = match slot {
                Slot::Root => {
                    let function = VirtioPci::new(Arc::clone(&virtio), msi, Options::ROOT_BUS)?;
                    pci.add_endpoint(function)?
                }
                Slot::Port => {
                    let function = VirtioPci::new(Arc::clone(&virtio), msi, Options::BEHIND_PORT)?;
                    pci.add_root_port(Arc::new(SingleFunction(function)))?
                }
            };
            io.attach(&virtio)?;
            single.push(Function {
                virtio,
                place,
                slot,
            });
        }
        let mut groups = Vec::with_capacity(backends.groups.len());
        for group in backends.groups {
            groups.push(Group::plug(group, ram, pci, msi, &io)?);
        }
        let mut managers = Vec::with_capacity(backends.managers.len());
        for manager in backends.managers {
            managers.push(Manager::plug(manager, ram, pci, msi, &io)?);
        }
        backends.host.serve(&io)?;
        let functions = Self {
            single,
            groups,
            managers,
            revived,
            host: backends.host,
            _io: Some(io),
        };
        for function in functions.all() {
            function.set_revived(Arc::clone(&functions.revived));
        }
        Ok(functions)
    }

    /// Readable when a function became live without a write of its driver: its doorbells are to be registered.
    pub fn revived(&self) -> &EventFd {
        &self.revived
    }

    /// The functions that are neither owners nor members, with their places, in the order of the configuration.
    pub fn single(&self) -> &[Function] {
        &self.single
    }

    /// Owners with their members, in the order of the configuration.
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// Management devices with what they manage, in the order of the configuration.
    pub fn managers(&self) -> &[Manager] {
        &self.managers
    }

    /// Stops all functions for `reason` and waits until nothing is in flight in any of them, `patience` in all. Requests
    /// that have not begun are recalled at once. If that is not enough, none is stopped for `reason` any more, and the
    /// names of those that were stuck are the error.
    ///
    /// With [`Reasons::PAUSED`], announcements and uplinks stop as well, after their senders. They begin that way.
    pub fn close_and_drain(&self, reason: Reasons, patience: Duration) -> Result<(), Vec<String>> {
        close_and_drain(|| self.all(), reason, patience)?;
        if reason.contains(Reasons::PAUSED) {
            self.host.close();
        }
        Ok(())
    }

    /// Lets all functions go on that were stopped for `reason`; with [`Reasons::PAUSED`], uplinks and announcements as well, and
    /// taps that were received are the machine's from now on.
    pub fn reopen(&self, reason: Reasons) {
        if reason.contains(Reasons::PAUSED) {
            self.host.open();
        }
        for function in self.all() {
            function.reopen(reason);
        }
    }

    /// Takes the locks of all disks that are open without, all of them or none.
    ///
    /// # Errors
    ///
    /// The names of those that somebody else has.
    pub fn take_locks(&self) -> Result<(), Vec<String>> {
        self.host.take_locks()
    }

    /// Has everything on the storage that was written to disks, before another host reads it there. Those that are lent are
    /// left out: whoever has them sees what was written.
    ///
    /// # Errors
    ///
    /// The name of a disk, and the host's answer.
    pub fn sync(&self) -> Result<(), String> {
        self.host.sync()
    }

    /// Gives back the locks of all disks, so that another process can take them. Nothing may be in flight, and the machine
    /// must not go on before it [took them](Self::take_locks) again. Those of disks that are lent stay, as the other process
    /// has them too.
    pub fn release_locks(&self) {
        self.host.release_locks();
    }

    /// A descriptor of every disk and every tap for another process, to be taken by [`Provider::received`] there.
    ///
    /// # Errors
    ///
    /// The host refused a descriptor; none is lent then.
    pub fn lend(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.host.lend()
    }

    /// Nobody has what was lent any more: a process that was to take the machine over did not, and is gone.
    pub fn end_lending(&self) {
        self.host.end_lending();
    }

    /// Tells the network where the machine is now: drivers that can do so are asked to, and frames are sent in the name of each
    /// interface that has a driver. Frames go on for a second while the machine runs, and wait while it is paused; nothing
    /// blocks.
    pub fn announce(&self) {
        for function in self.all() {
            function.request_announcement();
        }
        self.host.announce();
    }

    /// All functions, whether or not they exist now, in the order of the configuration.
    pub fn all(&self) -> impl Iterator<Item = &Arc<VirtioFunction>> {
        let single = self.single.iter().map(|function| &function.virtio);
        let managed = self.managers.iter().flat_map(Manager::functions);
        let grouped = self.groups.iter().flat_map(Group::functions);
        single.chain(grouped).chain(managed)
    }
}

/// See [`Functions::close_and_drain`].
fn close_and_drain<'a, I: Iterator<Item = &'a Arc<VirtioFunction>>>(
    all: impl Fn() -> I,
    reason: Reasons,
    patience: Duration,
) -> Result<(), Vec<String>> {
    let deadline = Instant::now() + patience;
    // All at once: while one drains, none of the others fetches anything more.
    for function in all() {
        function.close(reason);
    }
    for function in all() {
        function.recall();
    }
    let left = || deadline.saturating_duration_since(Instant::now());
    let stuck: Vec<_> = all()
        .filter(|function| !function.stop(reason, Patience::prompt(left())))
        .map(|function| function.name().to_owned())
        .collect();
    if stuck.is_empty() {
        return Ok(());
    }
    for function in all() {
        function.reopen(reason);
    }
    Err(stuck)
}

#[cfg(test)]
mod tests;
